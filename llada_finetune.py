"""Discrete Tilt Matching on LLaDA-8B: the loss of `dtm.py` in one plain PyTorch loop.

    torchrun --nproc_per_node=8 llada_finetune.py                  the full run, on Sudoku
    torchrun --nproc_per_node=8 llada_finetune.py train --task countdown --out RUN
    torchrun --nproc_per_node=8 llada_finetune.py eval --adapter RUN/best      the best phase
    python llada_finetune.py merge OUT --adapter RUN/best          a complete checkpoint

`train` starts a run, and resumes it when it is called again with the same --out. On several nodes
add torchrun's --nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500. The same loop on a small
LLaDA runs on a laptop: python -m figures.toy_llada. What a run costs: python -m figures.llada_cost

CONTENTS   1 settings   2 the loop   3 the rollout buffer   4 the control variate
           5 a run: its parts, saving, resuming   6 evaluation   7 the command line

The loop uses the package `llada/`: model, adapters, decoding, tasks, answer checking, checkpoints
and processes. A task is one class; see `llada/tasks.py`.

GLOSSARY. The head of `dtm.py` explains teacher, student, tilt, phase and control variate. Its
symbols are used here, and (D1), (D2), ... are the equations in it.
x1, xt              finished completions, and the same partly masked
rollout             a completion that the teacher has drawn, with its reward
block               as many consecutive tokens as --block says; blocks are decoded from left to
                    right, until one holds an end token (unless --past_end)
active block        the block that is being decoded, or that `mask_blockwise` picks for training:
                    earlier ones are complete, later ones masked
trained positions   the masked positions of the active block; a block after the end has none
a, h                the tilt, and its increment
r, w                the rewards of completions, and their weights e^{h r}
c                   the coefficient of the control variate
L, V                the length of a completion, the size of the vocabulary
N, B, M             the numbers of rollouts of the present phase in a rank's buffer, of completions
                    in a micro-batch, and of trained positions in a micro-batch
n                   N, or with --replay the number of rollouts of all phases in a rank's buffer

RANDOM NUMBERS. Each rank uses two generators: its own for masks and tokens, and torch's global one,
with another seed, for the adapter's dropout; see `Ranks.seed`. On CPUs a resumed run equals one
that was never stopped, bit for bit. On GPUs it does not: the backward pass of attention sums in no
fixed order.
"""

import argparse
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import dtm
from dtm import c_dtm_loss, check, mask_blockwise, tilt_weight
from llada.checkpoint import (
    State,
    checkpoints,
    digest,
    load_checkpoint,
    read_json,
    save_checkpoint,
    with_prefix,
    without_prefix,
    write_file,
)
from llada.decoding import (
    ChatTokenizer,
    Padded,
    before_the_end,
    by_length,
    check_lengths,
    generate,
    model_inputs,
    pad_left,
)
from llada.distributed import Ranks, run_as_script
from llada.lora import ADAPTED, LoRA, base_of, merge
from llada.model import LLaDA, locate
from llada.tasks import TASKS, cut, read_rows


# ---- 1. Settings --------------------------------------------------------------------------------
def option(default, text: str):
    """Return a field of `Config` with the words that -h shows for it."""
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """The settings of a run; each is a flag. The defaults are the authors' settings for Sudoku,
    except that they adapted four projections (--lora paper) and decoded past an end token
    (--past_end). Each task has a `preset` of changes."""

    task: str = option(
        "sudoku", f"{', '.join(TASKS)}, or the name of your own class, in lower case"
    )
    model: str = option("GSAI-ML/LLaDA-8B-Instruct", "checkpoint: a folder or a hub id")
    out: str = option("", "output folder; empty: runs/TASK-SEED for train, ADAPTER-eval for eval")
    seed: int = option(42, "seed of masks, tokens and dropout; rank k adds k million")
    data: str = option("", "training rows: FILE.jsonl or FILE.csv; a tenth is held out to validate")
    test_data: str = option("", "test rows: FILE.jsonl or FILE.csv")
    # the tilt
    h: float = option(5.0, "increment of the tilt in each phase; with --ess its upper limit")
    a_end: float = option(100.0, "tilt at which the run ends")
    ess: float = option(
        0.0,
        "choose h by this effective sample size of the phase's rollouts, a share below 1; 0: fixed",
    )
    c: str = option(
        "1",
        "coefficient of the control variate: a number; best: a fitted one; learned: per position",
    )
    normalize: str = option(
        "none",
        "none: weights e^{h r}; batch: divided by their mean over all ranks; group: per prompt",
    )
    steps_per_h: int = option(256, "optimizer steps per phase")
    # the rollout buffer of a rank
    prompts: int = option(80, "prompts in each rank's buffer")
    completions: int = option(1, "completions per prompt")
    refresh: int = option(20, "prompts that each rank replaces by new ones at a time; 0: none")
    refresh_steps: int = option(32, "optimizer steps between two renewals; 0: none")
    replay: int = option(
        0, "use the rollouts of this many earlier phases again (ours); 0: none, as in the paper"
    )
    # decoding
    chunk: int = option(16, "completions that a rank decodes at once; fewer need less memory")
    gen_length: int = option(256, "tokens per completion")
    block: int = option(32, "tokens per block, in decoding and in masking")
    steps: int = option(
        128, "network evaluations per completion; as many as its tokens: one token per evaluation"
    )
    temperature: float = option(
        0.0, "sampling temperature of rollouts; 0 takes the most probable token"
    )
    order: str = option("low_confidence", "decoding order of rollouts")
    prompt_length: int = option(
        1132, "longest prompt in tokens; longer ones are skipped and counted"
    )
    past_end: bool = option(False, "decode and train past an end token, as the authors' code does")
    # the optimizer
    batch: int = option(4, "completions per micro-batch and rank")
    accum: int = option(16, "micro-batches per optimizer step")
    lr: float = option(3e-6, "largest learning rate of a phase")
    lr_min: float = option(1e-6, "learning rate at the end of a phase, at most --lr")
    weight_decay: float = option(0.1, "weight decay of AdamW, whose betas are 0.9 and 0.99")
    clip: float = option(1.0, "largest norm of the adapter's gradient")
    ema: float = option(
        0.0, "decay of an average of the student, which is the next teacher; 0: no average"
    )
    # the adapter
    lora: str = option("all", "adapted projections, see ADAPTED in llada/lora.py")
    rank: int = option(128, "LoRA rank")
    alpha: float = option(64.0, "LoRA alpha; the adapter is scaled by alpha / rank")
    dropout: float = option(0.05, "dropout probability at the adapter's input")
    # memory
    recompute: bool = option(
        False, "recompute activations: 26 to 27 GB per GPU instead of 66 to 71"
    )
    # bookkeeping
    save_every: int = option(100, "optimizer steps between checkpoints; each phase ends with one")
    eval_rows: int = option(128, "validation rows that choose RUN/best; 0: the last phase is best")


CHOICES = {
    "normalize": ("none", "batch", "group"),
    "order": dtm.ORDERS,
    "lora": tuple(ADAPTED),
}
MAY_BE_ZERO = {"seed", "ess", "refresh", "refresh_steps", "replay", "temperature", "lr_min"}
MAY_BE_ZERO |= {"weight_decay", "ema", "dropout", "eval_rows"}
# These may change when a run resumes. The content of the data is compared, not the file's name.
MAY_CHANGE = {"out", "data", "chunk", "recompute", "save_every"}


def make_config(**given) -> Config:
    """Return the preset of the task with the given changes; ValueError names a bad setting."""
    task = given.get("task", Config.task)
    check(task in TASKS, f"--task {task} is not one of {', '.join(TASKS)}")
    cfg = Config(**{**TASKS[task].preset, **given})
    cfg.out = cfg.out or f"runs/{task}-{cfg.seed}"
    check_settings(cfg)
    return cfg


def check_settings(cfg: Config) -> None:
    for name, value in asdict(cfg).items():
        if name in CHOICES:
            known = ", ".join(CHOICES[name])
            check(value in CHOICES[name], f"--{name} {value} is not one of {known}")
        elif not isinstance(value, (str, bool)):
            least = "0 or more" if name in MAY_BE_ZERO else "positive"
            good = value > 0 or (value == 0 and name in MAY_BE_ZERO)
            check(good and math.isfinite(value), f"--{name} {value} must be {least} and finite")
    for name in ("ess", "dropout", "ema"):
        check(getattr(cfg, name) < 1, f"--{name} {getattr(cfg, name)} must be less than 1")
    number = re.fullmatch(r"(\d+\.?\d*|\.\d+)(e-?\d{1,2})?", cfg.c)
    known = cfg.c in ("best", "learned") or number is not None
    check(known, f"--c {cfg.c} is not a number >= 0, best or learned")
    check_lengths(cfg.gen_length, cfg.block, cfg.steps)
    drawn, held = cfg.batch * cfg.accum, cfg.prompts * cfg.completions
    too_few = (
        f"a step draws --batch x --accum = {drawn} different completions, but the buffer holds"
    )
    advice = f"--prompts x --completions = {held}; lower --batch or --accum"
    check(drawn <= held, f"{too_few} {advice}")
    check(cfg.refresh <= cfg.prompts, f"--refresh {cfg.refresh} exceeds --prompts {cfg.prompts}")
    alone = cfg.normalize == "group" and cfg.completions == 1
    advice = "add --completions 2 or more"
    check(not alone, f"--normalize group divides the only weight of a prompt by itself; {advice}")
    both_or_neither = (cfg.refresh == 0) == (cfg.refresh_steps == 0)
    check(both_or_neither, "--refresh and --refresh_steps must both be 0, or neither")
    samples = cfg.replay == 0 or cfg.temperature > 0
    check(
        samples,
        "--replay needs rollouts that are samples, not the most probable tokens; set "
        "--temperature 1",
    )
    alike = cfg.normalize == "group" and cfg.temperature == 0
    advice = "set --temperature 1"
    check(not alike, f"--normalize group at temperature 0 compares equal completions; {advice}")
    check(cfg.lr_min <= cfg.lr, f"--lr_min {cfg.lr_min} exceeds --lr {cfg.lr}; lower it, too")
    # `tilt_weight` raises ValueError if e^{h r} overflows at the task's largest reward, `top`.
    if cfg.normalize == "none":
        tilt_weight(torch.tensor([TASKS[cfg.task].top]), min(cfg.h, cfg.a_end))


# ---- 2. The loop --------------------------------------------------------------------------------
def train(run: "Run", watch: Callable[["Run"], None] | None = None) -> None:
    """Run the algorithm of `dtm.py` from the present state of `run` until the tilt is a_end.

    Teacher and student are two adapters on one frozen base model. The numbers in the comments are
    the steps of the algorithm. `trained_positions` computes c with `run.control`, which was fitted
    to earlier steps of the phase. `watch(run)` is called on every rank at a = 0 and after each
    phase, before the checkpoint that holds its score.
    """
    cfg, state, buffer, ranks = run.cfg, run.state, run.buffer, run.ranks
    with ranks.signals_caught():
        if not state.evaluated:
            evaluate_phase(run, watch)  # 1. teacher and student are the base model, a = 0
        keep_best(run)  # a process that died may not have written RUN/best
        while cfg.a_end - state.a > 1e-9 * cfg.a_end:
            if state.step == 0:  # 2. a new phase: rollouts of the teacher, and their rewards
                fill_buffer(run, cfg.prompts)
                state.h = choose_h(buffer.from_all_ranks("r"), state.a, cfg)
            progress = progress_bar(run)
            while state.step < cfg.steps_per_h:
                if cfg.refresh and state.step and state.step % cfg.refresh_steps == 0:
                    fill_buffer(run, cfg.refresh)
                run.student.train()  # rollouts have left it in eval mode
                sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
                for micro_batch in buffer.micro_batches(state.a, state.h):  # 3. masked completions
                    at = trained_positions(run, micro_batch)
                    losses = c_dtm_loss(at.logits, at.logits_a, at.x1, at.w, at.c)  # 4. (M,)
                    loss = (at.share * losses).sum()  # a mean per completion, then a sum
                    (loss / (cfg.batch * cfg.accum)).backward()
                    run.control.observe(at)
                    sums += logged_sums(at, loss)
                sums = ranks.gather(sums[None]).sum(0)  # of all ranks
                ranks.average_gradients(run.student.parameters())
                grad_norm = clip_grad_norm_(run.student.parameters(), cfg.clip)
                check_finite(run, sums, grad_norm)
                lr = run.optimizer.param_groups[0]["lr"] = learning_rate(cfg, state.step)
                run.optimizer.step()
                run.optimizer.zero_grad()
                run.control.fit(ranks)
                update_average(run)
                state.step += 1
                state.total += 1
                log_step(run, sums, grad_norm=float(grad_norm), lr=lr)
                progress.update()
                last = state.step == cfg.steps_per_h  # save before the evaluation, which is long
                save_or_stop(run, due=last or state.total % cfg.save_every == 0)
            progress.close()
            end_phase(run)  # 5. teacher <- student or its average; a <- a + h; step <- 0
            evaluate_phase(run, watch)
            save_or_stop(run, due=True)
            keep_best(run)
    chosen = "" if run.valid else "; without validation rows, RUN/best is the last phase"
    say(ranks, f"done: a = {state.a:g}, best phase {state.best_phase}{chosen}")


def fill_buffer(run: "Run", prompts: int) -> None:
    """Let the teacher complete this many new prompts; after each batch of them the run may stop."""
    for _ in run.buffer.fill(prompts):
        save_or_stop(run, due=False)
    run.log.lap("rollout")


def choose_h(rewards: Tensor, a: float, cfg: Config) -> float:
    """Return h for this phase: cfg.h, or with --ess the largest h <= cfg.h whose weights keep this
    effective sample size (D9). The last phase is shortened so that it ends at a_end."""
    h = dtm.next_h(rewards, cfg.ess, cfg.h) if cfg.ess else cfg.h
    stuck = f"h = {h:g} at a = {a:g} does not lead to --a_end {cfg.a_end:g}; lower --ess"
    check(h > 1e-9 * cfg.a_end, stuck)
    return min(h, cfg.a_end - a)


def learning_rate(cfg: Config, step: int) -> float:
    """Return the rate of a phase's step: it rises over the first 5 % of the phase and falls
    linearly to lr_min over the last 10 %. To use another schedule, change this function."""
    left = cfg.steps_per_h - step - 1
    fall = max(0.0, 1 - left / (0.1 * cfg.steps_per_h))
    rise = min(1.0, (step + 1) / (0.05 * cfg.steps_per_h))
    return rise * (cfg.lr + (cfg.lr_min - cfg.lr) * fall)


@dataclass
class Positions:
    """The M trained positions of a micro-batch. Only `logits` carries a gradient."""

    logits: Tensor  # (M, V) of the student
    logits_a: Tensor  # (M, V) of the teacher
    hidden: Tensor  # (M, d) the input of the teacher's head
    x1: Tensor  # (M,) the sampled tokens
    w: Tensor  # (M,) the weight of each token's completion
    c: Tensor  # (M,) the coefficient of the control variate
    share: Tensor  # (M,) 1 / the number of trained positions in the same completion


def trained_positions(run: "Run", batch: "MicroBatch") -> Positions:
    """Evaluate teacher and student at the masked positions of a micro-batch."""
    inputs = model_inputs(batch.prompts, batch.xt, batch.mask)
    with torch.no_grad():
        run.model.use("teacher")
        logits_a, hidden = run.model(*inputs, hidden=True)
    return Positions(
        logits=run.model.use("student")(*inputs),
        logits_a=logits_a,
        hidden=hidden,
        x1=batch.x1[batch.mask],
        w=batch.w[:, None].expand_as(batch.mask)[batch.mask],
        c=run.control(hidden),
        share=(1 / batch.mask.sum(1, keepdim=True)).expand_as(batch.mask)[batch.mask],
    )


@torch.no_grad()
def logged_sums(at: Positions, loss: Tensor) -> Tensor:
    """Return four numbers: the loss and KL(pi_a || pi_theta), both summed over completions, the sum
    of c over positions, and M."""
    log_p = at.logits.float().log_softmax(-1)
    log_a = at.logits_a.float().log_softmax(-1)
    kl = F.kl_div(log_p, log_a, reduction="none", log_target=True).sum(-1)  # (M,)
    count = at.c.new_tensor(len(at.c))
    return torch.stack([loss, (at.share * kl).sum(), at.c.sum(), count]).double()


def check_finite(run: "Run", sums: Tensor, grad_norm: Tensor) -> None:
    """Raise ValueError on every rank, before the student moves, if a sum over all ranks or the
    gradient is not finite."""
    finite = bool(sums.isfinite().all() & grad_norm.isfinite())
    step = run.state.total + 1
    advice = "start another run with a lower --lr or --h, or with --normalize batch"
    check(finite, f"loss or gradient of step {step} is not finite; if this happens again, {advice}")


def update_average(run: "Run") -> None:
    if run.average:
        for name, p in run.student.named_parameters():
            run.average[name].lerp_(p.detach(), 1 - run.cfg.ema)


# ---- 3. The rollout buffer ----------------------------------------------------------------------
@dataclass
class MicroBatch:
    """B completions of the buffer, masked for one forward pass."""

    prompts: Padded
    x1: Tensor  # (B, L) completions of the teacher
    xt: Tensor  # (B, L) with the active block partly and later blocks fully masked
    mask: Tensor  # (B, L) bool: the trained positions
    w: Tensor  # (B,) weights


class Buffer:
    """The rollouts of one rank.

    data     row (N,): indices of the training rows; x1 (N, L): completions, on the device; r (N,):
             rewards, and solved (N,): 1 for right ones, float64; the oldest rollouts come first
    pending  rollouts in progress, with the same keys, and done (1,), the number of finished ones
    kept     with --replay one dict for each earlier phase, the oldest first: the keys of data, and
             the key "a" (1,), the tilt of the teacher that drew the rollouts; n is the number of
             rollouts in kept and data together
    cursor   how many prompts have been taken from this rank's list, skipped ones included
    skipped  how many of them were too long
    """

    def __init__(
        self, *, cfg: Config, ranks: Ranks, tokenizer: ChatTokenizer, model: LLaDA, rows: list[dict]
    ):
        few = f"{ranks.size} ranks share {len(rows)} prompts; start fewer ranks or give more rows"
        check(len(rows) >= ranks.size, few)
        self.cfg, self.ranks, self.tokenizer, self.model = cfg, ranks, tokenizer, model
        self.rows = rows
        self.task = TASKS[cfg.task]
        self.generator = Generator(ranks.device).manual_seed(ranks.seed(cfg.seed))
        shuffled = random.Random(cfg.seed).sample(range(len(rows)), len(rows))
        self.own = shuffled[ranks.rank :: ranks.size]  # ranks share no prompt
        self.cursor = 0
        self.skipped = 0  # prompts that were too long
        self.data: dict[str, Tensor] = {}
        self.pending: dict[str, Tensor] = {}
        self.kept: list[dict[str, Tensor]] = []
        self.encoded: dict[int, list[int]] = {}

    def prompt(self, row: int) -> list[int]:
        """Return the tokens of a row's prompt, which is encoded once."""
        if row not in self.encoded:
            self.encoded[row] = self.tokenizer.prompt(self.task.prompt(self.rows[row]))
        return self.encoded[row]

    def next_rows(self, count: int) -> list[int]:
        """Return this rank's next prompts. Too long ones are skipped and counted, never cut."""
        rows, start, longest = [], self.cursor, self.cfg.prompt_length
        message = f"every prompt is longer than --prompt_length {longest} tokens; raise it"
        while len(rows) < count:
            check(bool(rows) or self.cursor < start + len(self.own), message)
            row = self.own[self.cursor % len(self.own)]
            self.cursor += 1
            if len(self.prompt(row)) <= longest:
                rows.append(row)
            else:
                self.skipped += 1
        return rows

    def fill(self, count: int) -> Iterator[None]:
        """Let the teacher complete `count` new prompts, which replace the oldest rollouts.

        Yields after each batch of completions; the caller may save a checkpoint then. After a
        resume, a call with the same count continues with what is pending.
        """
        if not self.pending:
            rows = [row for row in self.next_rows(count) for _ in range(self.cfg.completions)]
            x1 = torch.zeros(len(rows), self.cfg.gen_length, dtype=torch.long)
            zeros, done = torch.zeros(len(rows)).double(), torch.zeros(1, dtype=torch.long)
            self.pending = {"row": torch.tensor(rows), "x1": x1.to(self.ranks.device), "done": done}
            self.pending |= {"r": zeros, "solved": zeros.clone()}
        rows = self.pending["row"].tolist()
        # Sort all rollouts by prompt length; below, --chunk of them at a time are decoded.
        [order] = by_length([self.prompt(row) for row in rows], size=len(rows))
        quiet = self.ranks.rank > 0
        with tqdm(total=len(rows), desc="rollouts", disable=quiet, leave=False) as progress:
            while (done := int(self.pending["done"])) < len(rows):
                self.complete_pending(order[done : done + self.cfg.chunk])
                progress.update(int(self.pending["done"]) - progress.n)
                yield
        new = {key: t for key, t in self.pending.items() if key != "done"}
        if self.data:
            new = {key: torch.cat([self.data[key][len(rows) :], t]) for key, t in new.items()}
        self.data, self.pending = new, {}

    def complete_pending(self, batch: list[int]) -> None:
        """Complete and reward the pending rollouts of these indices."""
        rows = self.pending["row"][batch].tolist()
        x1 = complete(
            self.model.use("teacher"),
            [self.prompt(row) for row in rows],
            cfg=self.cfg,
            tokenizer=self.tokenizer,
            generator=self.generator,
            ban_mask=True,  # a rollout must not contain the mask token; in `evaluate` it may
        )
        self.pending["x1"][batch] = x1
        for i, row, ids in zip(batch, rows, x1.tolist(), strict=True):
            reward, solved = self.task.grade(self.tokenizer.completion(ids), self.rows[row])
            self.pending["r"][i] = max(0.0, reward)  # as in the authors' code
            self.pending["solved"][i] = solved
        self.pending["done"] += len(batch)

    def end_phase(self, a: float) -> None:
        """End the phase that began at tilt a. With --replay K its last rollouts are kept, and
        only those of the last K phases stay; otherwise all are dropped."""
        if self.cfg.replay:
            kept = self.data | {"a": torch.tensor([a], dtype=torch.float64)}
            self.kept = [*self.kept, kept][-self.cfg.replay :]
        self.data = {}

    def column(self, key: str) -> Tensor:
        """Return the values of a key: those of the kept phases, then those of data, n in all."""
        return torch.cat([*[phase[key] for phase in self.kept], self.data[key]])

    def phase_weights(self, a: float) -> Tensor:
        """Return the weights u (n,), float64, with which this rank picks rollouts at tilt a (ours).

        The present rollouts have u = 1. Each kept phase at tilt a_j is normalised on its own: v is
        e^{(a - a_j) r} divided by its sum over the phase's rollouts on all ranks, ESS = 1 / sum v^2
        is their effective sample size, and u = ESS v. So a kept phase counts as much as ESS new
        rollouts. (D13) itself would need an f_j for each prompt, because each prompt has its own
        rho_0, and there are too few completions per prompt for that. For
        one prompt and phase, v is rho_a / rho_{a_j} up to a constant. The constants change how
        often prompts are picked, in favour of those with high rewards; they do not change the
        posterior that the rollouts of a prompt teach.
        """
        parts = []
        for phase in self.kept:
            exponent = (a - float(phase["a"])) * phase["r"]
            everywhere = self.gathered(exponent)
            v = (exponent - everywhere.logsumexp(0)).exp()
            parts.append(v / everywhere.log_softmax(0).mul(2).exp().sum())
        return torch.cat([*parts, torch.ones_like(self.data["r"])])

    def weights(self, h: float, u: Tensor) -> Tensor:
        """Return w = e^{h r} (D1), (n,), divided by a mean as --normalize says.

        Once earlier phases are kept, the mean is weighted by u (n,) on each rank: it is the
        expectation of the weight of a picked rollout.
        """
        r, row = self.column("r"), self.column("row")
        if self.cfg.normalize == "none":
            return tilt_weight(r, h)
        if self.cfg.normalize == "batch":  # the mean over all ranks
            start = self.ranks.rank * len(r)
            w = tilt_weight(self.gathered(r), h, normalize=True)[start : start + len(r)]
            if self.kept:
                w = w / self.gathered((u @ w / u.sum())[None]).mean()
            return w
        w = torch.empty_like(r)
        for prompt in row.unique():  # the mean over a prompt's completions
            same = row == prompt
            w[same] = tilt_weight(r[same], h, normalize=True)
            if self.kept:
                w[same] *= u[same].sum() / (u[same] @ w[same])
        return w

    def draw(self, u: Tensor) -> list[int]:
        """Return the indices of batch x accum rollouts. They are distinct and uniform, or, once
        earlier phases are kept, picked with replacement with probability u / sum u; u is (n,)."""
        device, size = self.ranks.device, self.cfg.batch * self.cfg.accum
        if self.kept:
            u = u.to(device, torch.float32)
            return u.multinomial(size, replacement=True, generator=self.generator).tolist()
        shuffled = torch.randperm(len(u), generator=self.generator, device=device)
        return shuffled[:size].tolist()

    def micro_batches(self, a: float, h: float) -> list[MicroBatch]:
        """Draw and mask batch x accum rollouts for tilt a, in micro-batches of similar length.

        Completions whose active block lies past their end have no trained position. They are left
        out of the micro-batches, but they count in the mean over completions.
        """
        cfg, device = self.cfg, self.ranks.device
        u = self.phase_weights(a)
        row = self.column("row").tolist()
        drawn = sorted(self.draw(u), key=lambda i: len(self.prompt(row[i])))
        w = self.weights(h, u).to(device, torch.float32)[drawn]
        x1 = self.column("x1")[drawn]
        mask_id = self.model.config["mask_token_id"]
        xt, mask = mask_blockwise(x1, mask_id, cfg.block, self.generator)
        if not cfg.past_end:
            ends = torch.tensor(self.tokenizer.ends, device=device)
            mask = mask & before_the_end(x1, cfg.block, ends)
        trained = mask.any(1)
        # If no row has a trained position, row 0 stays. Its loss is an empty sum, so the gradients
        # are zeros instead of None, and the ranks can average them.
        trained[0] |= ~trained.any()
        batches = []
        for rows in trained.nonzero()[:, 0].split(cfg.batch):
            prompts = [self.prompt(row[drawn[i]]) for i in rows.tolist()]
            padded = pad_left(prompts, self.model.config["pad_token_id"], device)
            batches.append(MicroBatch(padded, x1[rows], xt[rows], mask[rows], w[rows]))
        return batches

    def from_all_ranks(self, key: str) -> Tensor:
        """Return (ranks N,): a key of `data` of all ranks' buffers, on the CPU."""
        return self.gathered(self.data[key])

    def gathered(self, t: Tensor) -> Tensor:
        """Return the tensors of all ranks, concatenated, on the CPU."""
        return self.ranks.gather(t.to(self.ranks.device)).cpu()


def complete(
    model: LLaDA,
    prompts: list[list[int]],
    *,
    cfg: Config,
    tokenizer: ChatTokenizer,
    generator: Generator | None,
    ban_mask: bool,
) -> Tensor:
    """Return completions (B, gen_length) of prompts, decoded as one batch with the settings in cfg.
    It leaves the model in eval mode."""
    ids, mask = pad_left(prompts, model.config["pad_token_id"], next(model.parameters()).device)
    ids = generate(
        model.eval(),
        ids,
        cfg.gen_length,
        cfg.block,
        cfg.steps,
        temperature=cfg.temperature,
        attention_mask=mask,
        generator=generator,
        order=cfg.order,
        ban_mask=ban_mask,
        ends=() if cfg.past_end else tokenizer.ends,
    )
    return ids[:, -cfg.gen_length :]


# ---- 4. The control variate ---------------------------------------------------------------------
class ControlVariate:
    """The coefficient c of (D3) at the trained positions: a number, the best scalar, or learned.

    "best" is the one number that minimises the variance of the gradient (D8). "learned" does the
    same for each position (D7): it is a ridge regression on a constant and 64 fixed random
    projections of the teacher's last hidden state. (`maze_lab.py` learns c with a small network
    instead.) Both are least-squares fits, over past steps with older ones counting less, to the
    targets of `dtm.control_variate_targets`: y, the best c for a sampled token, and its weight q. A
    step's c comes from earlier steps. With new rollouts in every step the gradient would be
    unbiased. Here rollouts are used again, so c has seen their rewards; the bias is small, because
    64 features cannot memorise the rewards of one buffer.
    """

    FEATURES = 64
    MEMORY = 0.95  # each step multiplies the normal equations of earlier steps by it
    RIDGE = 1e-3  # the penalty, as a multiple of the mean diagonal of these equations

    def __init__(self, kind: str, width: int, device: torch.device):
        self.fitted = kind in ("best", "learned")
        self.constant = 1.0 if self.fitted else float(kind)
        k = min(width, self.FEATURES)
        if k == width:
            project = torch.eye(k)
        else:
            noise = torch.randn(width, k, generator=Generator().manual_seed(0))
            project = noise * width**-0.5
        self.project = project.to(device)
        n = 1 + k if kind == "learned" else 1
        # The normal equations [G | b] of all past steps, and of the present one.
        self.past = torch.zeros(n, n + 1, device=device, dtype=torch.float64)
        self.new = torch.zeros_like(self.past)

    def features(self, hidden: Tensor) -> Tensor:
        """Return (M, n): 1, then the projections of hidden (M, d)."""
        projected = hidden.float() @ self.project
        return F.pad(projected, (1, 0), value=1.0)[:, : len(self.past)]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return c (M,) for the teacher's hidden states (M, d); 1 before the first fit."""
        G, b = self.past[:, :-1], self.past[:, -1]
        if not (self.fitted and G.any()):
            return torch.full((len(hidden),), self.constant, device=hidden.device)
        penalised = torch.arange(len(b), device=b.device) > 0  # all but the constant
        ridge = self.RIDGE * G.trace() / len(b) * penalised
        return self.features(hidden) @ torch.linalg.solve(G + ridge.diag(), b).float()

    @torch.no_grad()
    def observe(self, at: Positions) -> None:
        """Add a micro-batch to the normal equations; a position weighs q share^2, see (D8)."""
        if self.fitted:
            y, q = dtm.control_variate_targets(at.logits, at.logits_a, at.x1, at.w)
            phi = self.features(at.hidden)
            weighted = ((q * at.share**2)[:, None] * phi).T.double()
            self.new += weighted @ torch.cat([phi, y[:, None].float()], 1).double()

    def fit(self, ranks: Ranks) -> None:
        """Add the equations of this step, summed over all ranks, to those of earlier steps."""
        if self.fitted:
            self.past = self.MEMORY * self.past + ranks.gather(self.new[None]).sum(0)
            self.new = torch.zeros_like(self.past)


# ---- 5. A run: its parts, saving, resuming ------------------------------------------------------
class Log:
    """metrics.jsonl: one record per optimizer step and per evaluation, written by rank 0."""

    def __init__(self, file: Path, ranks: Ranks):
        self.file, self.ranks = file, ranks
        self.seconds = {"rollout": 0.0, "train": 0.0, "eval": 0.0, "save": 0.0}
        self.clock = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the seconds since the last lap to `name`."""
        now = time.perf_counter()
        self.seconds[name] += now - self.clock
        self.clock = now

    def write(self, **record) -> None:
        if self.ranks.rank == 0:
            with open(self.file, "a") as file:
                file.write(json.dumps(record) + "\n")

    def bytes(self) -> int:
        return self.file.stat().st_size if self.file.exists() else 0

    def cut(self, size: int) -> None:
        """Remove what was written after the checkpoint that a run resumes from."""
        if self.ranks.rank == 0 and self.bytes() > size:
            os.truncate(self.file, size)


@dataclass
class Run:
    """The parts of a run: everything that determines how it continues, and its log."""

    cfg: Config
    ranks: Ranks
    out: Path
    valid: list[dict]  # validation rows
    tokenizer: ChatTokenizer
    model: LLaDA
    student: LoRA
    teacher: LoRA
    buffer: Buffer
    state: State
    log: Log
    # These three are made anew in each phase.
    optimizer: torch.optim.Optimizer | None = None
    average: dict[str, Tensor] = field(default_factory=dict)
    control: ControlVariate | None = None


def build_run(cfg: Config, ranks: Ranks, rows: list[dict], valid: list[dict]) -> Run:
    """Load the base model and put two adapters on it, which are equal and change nothing yet."""
    folder = locate(cfg.model)
    dtype = str(ranks.dtype).removeprefix("torch.")
    say(ranks, f"{cfg.model}: {ranks.size} rank(s), {ranks.device.type}, {dtype}")
    tokenizer = ChatTokenizer(folder)
    model = LLaDA.from_pretrained(folder, ranks.device, ranks.dtype)
    model.recompute = cfg.recompute
    student, teacher = [
        LoRA(model.config, ADAPTED[cfg.lora], cfg.rank, cfg.alpha, cfg.dropout, cfg.seed)
        for _ in range(2)
    ]
    student.to(ranks.device)
    teacher.eval().to(ranks.device, ranks.dtype).requires_grad_(False)
    model.adapters.update({"student": student, "teacher": teacher})
    torch.manual_seed(ranks.seed(cfg.seed, stream=1))  # the adapter's dropout
    run = Run(
        cfg=cfg,
        ranks=ranks,
        out=Path(cfg.out),
        valid=valid,
        tokenizer=tokenizer,
        model=model,
        student=student,
        teacher=teacher,
        buffer=Buffer(cfg=cfg, ranks=ranks, tokenizer=tokenizer, model=model, rows=rows),
        state=State(ranks=ranks.size),
        log=Log(Path(cfg.out, "metrics.jsonl"), ranks),
    )
    begin_phase(run)
    count = sum(p.numel() for p in student.parameters())
    say(ranks, f"LoRA on {', '.join(student.projections)}: {count:,} trainable parameters")
    return run


def begin_phase(run: Run) -> None:
    """Make a new optimizer, average and control variate."""
    cfg = run.cfg
    settings = {"lr": cfg.lr, "betas": (0.9, 0.99), "weight_decay": cfg.weight_decay}
    run.optimizer = torch.optim.AdamW(run.student.parameters(), **settings)
    weights = run.student.state_dict() if cfg.ema else {}
    run.average = {name: t.clone() for name, t in weights.items()}
    run.control = ControlVariate(cfg.c, run.model.config["d_model"], run.ranks.device)


def end_phase(run: Run) -> None:
    """Copy the student, or its average with --ema, into both adapters, and advance a by h."""
    tuned = run.average or run.student.state_dict()
    run.teacher.load_state_dict(tuned)
    run.student.load_state_dict(tuned)
    begin_phase(run)
    run.buffer.end_phase(run.state.a)
    run.state.a += run.state.h
    run.state.phase += 1
    run.state.step = 0


def save_or_stop(run: Run, due: bool) -> None:
    """Write a checkpoint if it is due; if any rank was asked to stop, write one and leave."""
    number = run.ranks.agreed_signal()
    if due or number:
        save(run)
    if number:
        say(run.ranks, f"saved at step {run.state.total}; the same command resumes the run")
        sys.exit(128 + number)


def save(run: Run) -> None:
    run.log.lap("train")
    run.state.log_bytes = run.log.bytes()
    shared = with_prefix("teacher.", run.teacher.state_dict())
    shared |= with_prefix("average.", run.average)
    for i, moments in run.optimizer.state_dict()["state"].items():
        shared |= with_prefix(f"optimizer.{i}.", moments)
    buffer, cuda = run.buffer, run.ranks.cuda
    own = with_prefix("buffer.", buffer.data) | with_prefix("pending.", buffer.pending)
    for i, phase in enumerate(buffer.kept):
        own |= with_prefix(f"kept.{i}.", phase)
    own["cursor"] = torch.tensor([buffer.cursor, buffer.skipped])
    own["generator"] = buffer.generator.get_state()
    own["dropout"] = (torch.cuda if cuda else torch).get_rng_state()
    save_checkpoint(
        run.out,
        run.ranks,
        state=run.state,
        shared=shared | {"control": run.control.past},
        own=own,
        save_adapter=lambda folder: run.student.save(folder, run.cfg.model),
    )
    run.log.lap("save")


def resume(run: Run) -> None:
    """Continue from the newest checkpoint, if there is one."""
    loaded = load_checkpoint(run.out, run.ranks)
    if loaded is None:
        run.log.cut(0)
        return
    run.state, shared, own, student = loaded
    run.student.fill(student)
    run.teacher.load_state_dict(without_prefix("teacher.", shared))
    for name, t in without_prefix("average.", shared).items():
        run.average[name].copy_(t)
    optimizer = run.optimizer.state_dict()
    for name, t in without_prefix("optimizer.", shared).items():
        i, moment = name.split(".")
        optimizer["state"].setdefault(int(i), {})[moment] = t
    run.optimizer.load_state_dict(optimizer)
    run.control.past.copy_(shared["control"])
    buffer = run.buffer
    buffer.data = without_prefix("buffer.", own)
    buffer.pending = without_prefix("pending.", own)
    while phase := without_prefix(f"kept.{len(buffer.kept)}.", own):
        buffer.kept.append(phase)
    for rollouts in (buffer.data, buffer.pending, *buffer.kept):
        if rollouts:
            rollouts["x1"] = rollouts["x1"].to(run.ranks.device)
    buffer.cursor, buffer.skipped = own["cursor"].tolist()
    same = len(own["generator"]) == len(buffer.generator.get_state())
    kind = "was started on another kind of device, whose random numbers cannot be continued here"
    check(same, f"{run.out} {kind}; resume it there")
    buffer.generator.set_state(own["generator"])
    (torch.cuda if run.ranks.cuda else torch).set_rng_state(own["dropout"])
    run.log.cut(run.state.log_bytes)
    say(run.ranks, f"resumed {run.out} in phase {run.state.phase}, at step {run.state.step}")


def open_run(given: dict, ranks: Ranks) -> Run:
    """Start the run that `given` describes, or resume the one that its folder holds."""
    out = Path(given.get("out") or make_config(**given).out)
    file = out / "config.json"
    saved = read_json(file) if file.exists() else None
    lost = f"{file} is missing, but {out} holds checkpoints; restore it or use another --out"
    check(bool(saved or not checkpoints(out)), lost)
    cfg = settings_to_resume(saved, given, out) if saved else make_config(**given)
    rows, valid = task_rows(cfg, "train"), task_rows(cfg, "valid")[: cfg.eval_rows]
    hashes = {"rows": digest(rows), "valid": digest(valid)}
    same = saved is None or saved["hashes"] == hashes
    advice = "restore it, or start another run with another --out"
    check(same, f"the training rows (--data) have changed since {out} was started; {advice}")
    run = build_run(cfg, ranks, rows, valid)
    ranks.barrier()  # until every rank has looked for the file, rank 0 must not write it
    if saved is None and ranks.rank == 0:
        write_file(file, asdict(cfg) | {"hashes": hashes})
    resume(run)
    return run


def settings_to_resume(saved: dict, given: dict, out: Path) -> Config:
    """Return the settings of a run; ValueError lists the given ones that may not change."""
    names = {f.name for f in fields(Config)}
    same_version = names | {"hashes"} == saved.keys()
    check(same_version, f"{out} was started by another version of this program; use another --out")
    changed = []
    for name, value in given.items():
        if name not in MAY_CHANGE and saved[name] != value:
            changed.append(f"--{name} {value} (it was started with {saved[name]})")
    advice = f"leave out {', '.join(changed)}, or start another run with another --out"
    check(not changed, f"{out} holds a run, which keeps its settings: {advice}")
    settings = {name: given.get(name, saved[name]) for name in names}
    return make_config(**settings | {"out": str(out)})


def task_rows(cfg: Config, split: str) -> list[dict]:
    """Return the rows of "train", "valid" or "test": from the given file, or the task's own."""
    file = cfg.test_data if split == "test" else cfg.data
    if not file:
        return TASKS[cfg.task].rows(split)
    rows = read_rows(file, cfg.task)
    return rows if split == "test" else cut(rows, split)


def say(ranks: Ranks, line: str) -> None:
    if ranks.rank == 0:
        tqdm.write(line)


def progress_bar(run: Run) -> tqdm:
    """Return a bar over the optimizer steps of the present phase."""
    words = f"a {run.state.a:.1f} of {run.cfg.a_end:g}"
    steps = {"initial": run.state.step, "total": run.cfg.steps_per_h, "unit": "step"}
    return tqdm(desc=words, disable=run.ranks.rank > 0, **steps)


def log_step(run: Run, sums: Tensor, **more) -> None:
    """Write the record of an optimizer step. figures/README.md explains the keys."""
    state, buffer = run.state, run.buffer
    loss, kl, c, positions = sums.tolist()
    completions = run.cfg.batch * run.cfg.accum * run.ranks.size
    r, solved = buffer.from_all_ranks("r"), buffer.from_all_ranks("solved")
    run.log.lap("train")
    run.log.write(
        kind="step",
        phase=state.phase,
        total=state.total,
        a=state.a,
        h=state.h,
        loss=loss / completions,
        kl=kl / completions,
        c=c / max(1, positions),
        ess=1 / float(tilt_weight(r, state.h, normalize=True).square().mean()),
        reward=float(r.mean()),
        reward_sd=float(r.std(correction=0)),
        reward_hist=torch.histc(r, 10, 0, TASKS[run.cfg.task].top).int().tolist(),
        solved=float(solved.mean()),
        skipped=buffer.skipped,
        seconds=run.log.seconds,
        gpu_gb=torch.cuda.max_memory_allocated() / 1e9 if run.ranks.cuda else 0.0,
        **more,
    )


# ---- 6. Evaluation ------------------------------------------------------------------------------
def evaluate_phase(run: Run, watch: Callable[[Run], None] | None) -> None:
    """Evaluate the teacher on the validation rows, update the best score, and call `watch`. Without
    validation rows the present phase counts as the best one."""
    state = run.state
    state.evaluated = True
    if not run.valid:
        state.best_phase = state.phase
    else:
        scores = evaluate_teacher(run, run.valid)
        if scores:  # on rank 0, which alone writes RUN/best
            record = {"phase": state.phase, "total": state.total, "a": state.a, **scores}
            run.log.write(kind="eval", split="valid", **record)
            say(run.ranks, f"a = {state.a:6.2f}  validation: {show(scores)}")
            if scores["solved"] > state.best:
                state.best = scores["solved"]
                state.best_phase = state.phase
    if watch:
        watch(run)
    run.log.lap("eval")


def keep_best(run: Run) -> None:
    """Write RUN/best if the present teacher is the best one.

    Call it after the checkpoint that holds the score, and when a run resumes, in case the process
    died between the two.
    """
    if run.ranks.rank == 0 and run.state.best_phase == run.state.phase:
        run.teacher.save(run.out / "best", run.cfg.model)


def evaluate_teacher(run: Run, rows: list[dict]) -> dict | None:
    """Return the scores of the run's teacher on some rows; None on ranks other than 0."""
    model = run.model.use("teacher")
    return evaluate(model, rows, cfg=run.cfg, tokenizer=run.tokenizer, ranks=run.ranks)


def evaluate(
    model: LLaDA,
    rows: list[dict],
    *,
    cfg: Config,
    tokenizer: ChatTokenizer,
    ranks: Ranks,
    path: Path | None = None,
) -> dict | None:
    """Complete every row at temperature 0 in the order low_confidence, and return the scores.

    The scores are `solved`, `reward` and, for tasks with cells (parts of an answer), `cells`, each
    with its standard error over the rows, and the number of rows `n`. Rank 0 grades and returns
    them; the others return None. `path` receives the completions, one JSON object per line.
    """
    task = TASKS[cfg.task]
    cfg = replace(cfg, order="low_confidence", temperature=0.0)
    # Every rank decodes the same number of rows; the repeated ones at the end are dropped.
    per_rank = -(-len(rows) // ranks.size)
    own = [rows[(ranks.rank + i * ranks.size) % len(rows)] for i in range(per_rank)]
    prompts = [tokenizer.prompt(task.prompt(row)) for row in own]
    x1 = torch.empty(per_rank, cfg.gen_length, dtype=torch.long, device=ranks.device)
    batches = by_length(prompts, cfg.chunk)
    for batch in tqdm(batches, "evaluation", disable=ranks.rank > 0, leave=False):
        batch_prompts = [prompts[i] for i in batch]
        settings = {"cfg": cfg, "tokenizer": tokenizer, "generator": None, "ban_mask": False}
        x1[batch] = complete(model, batch_prompts, **settings)
    x1 = ranks.gather(x1[None]).transpose(0, 1).flatten(0, 1)[: len(rows)]
    if ranks.rank > 0:
        return None
    graded = []
    for ids, row in zip(x1.tolist(), rows, strict=True):
        text = tokenizer.completion(ids)
        reward, solved = task.grade(text, row)
        graded.append({"row": row, "text": text, "solved": solved, "reward": reward})
        if task.cells:
            graded[-1]["cells"] = task.cells(text, row)
    if path:
        write_file(path, "".join(json.dumps(line) + "\n" for line in graded))
    scores = {"n": len(rows)}
    for key in ("solved", "reward"):
        scores |= share_and_error(key, [(line[key], 1) for line in graded])
    if task.cells:
        scores |= share_and_error("cells", [line["cells"] for line in graded])
    return scores


def share_and_error(key: str, pairs: list[tuple[float, int]]) -> dict[str, float]:
    """Return the share sum(part) / sum(whole) under `key`, and its standard error under key_se.

    The cells of a row are not independent, so the error is that of a ratio of means over rows.
    """
    part, whole = torch.tensor(pairs).double().unbind(1)
    share = part.sum() / whole.sum()
    error = (part - share * whole).std(correction=0) / len(pairs) ** 0.5 / whole.mean()
    return {key: float(share), f"{key}_se": float(error)}


def show(scores: dict) -> str:
    found = [key for key in ("solved", "cells", "reward") if key in scores]
    words = [f"{key} {scores[key]:.3f} +- {scores[key + '_se']:.3f}" for key in found]
    return f"{', '.join(words)} (n = {scores['n']})"


# ---- 7. The command line ------------------------------------------------------------------------
def make_parser() -> argparse.ArgumentParser:
    """Return the parser of train, eval and merge. Flags cannot be abbreviated."""
    parser = argparse.ArgumentParser(description="Discrete Tilt Matching on LLaDA.")
    actions = parser.add_subparsers(dest="action", required=True)

    def add_action(name: str, about: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=about, description=about, allow_abbrev=False)

    train_flags = add_action(
        "train", "Start a run, or resume the one in --out. This is the default."
    )
    add_settings(train_flags, without=("test_data",))
    about = "Score an adapter, or the base model, on test rows at temperature 0."
    eval_flags = add_action("eval", about)
    eval_flags.add_argument(
        "--adapter", type=Path, help="PEFT folder, such as RUN/best; none: base"
    )
    text = "lengths of completions in tokens (default: the run's, and twice that); --steps is "
    text += "meant for the run's length and is scaled for others"
    eval_flags.add_argument("--lengths", type=int, nargs="+", metavar="L", help=text)
    add_settings(eval_flags, only=("task", "model", "out", "test_data", "chunk", "block", "steps"))
    merge_flags = add_action("merge", "Write the base model with an adapter merged into it.")
    merge_flags.add_argument(
        "folder", type=Path, metavar="OUT", help="folder, which must not exist"
    )
    merge_flags.add_argument(
        "--adapter", type=Path, required=True, help="PEFT folder, such as RUN/best"
    )
    merge_flags.add_argument("--model", default="", help="base (default: the one of the adapter)")
    return parser


def add_settings(parser: argparse.ArgumentParser, only=(), without=(), defaults=None) -> None:
    """Add a flag per setting; -h shows `defaults[name]` if the caller gives it, else the tasks'."""
    for f in fields(Config):
        if f.name in without or (only and f.name not in only):
            continue
        shown = str(f.default)
        for name, task in TASKS.items():
            if task.preset.get(f.name, f.default) != f.default:
                shown += f"; {name}: {task.preset[f.name]}"
        shown = str((defaults or {}).get(f.name, shown)) or "none"
        text = f"{f.metadata['help']} (default: {shown})".replace("%", "%%")
        flags = dict.fromkeys([f"--{f.name}", f"--{f.name.replace('_', '-')}"])
        choices = ",".join(CHOICES.get(f.name, ()))
        kind = {"type": f.type, "metavar": f"{{{choices}}}" if choices else "X"}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(*flags, default=argparse.SUPPRESS, help=text, **kind)


def settings_near(adapter: Path, given: dict) -> dict:
    """Return the decoding settings of the run that made an adapter, RUN/best or RUN/step-N/adapter;
    {} if another task is given."""
    saved = {}
    for folder in adapter.resolve().parents[:2]:
        if not saved and (folder / "config.json").is_file():
            saved = read_json(folder / "config.json")
    if given.get("task", saved.get("task")) != saved.get("task"):
        return {}
    names = saved.keys() & {"task", "gen_length", "block", "steps", "chunk", "past_end"}
    return {name: saved[name] for name in names}


def evaluate_command(given: dict, adapter: Path | None, lengths: list[int] | None) -> None:
    """Write the scores of the test rows to OUT/eval.json, and the completions beside it."""
    ranks = Ranks()
    if adapter:
        given["model"] = base_of(adapter, given.get("model", ""))
        given = settings_near(adapter, given) | given
        if "task" not in given:
            say(ranks, f"no run's config.json near {adapter}: the task is {Config.task}")
    task, base = given.get("task", Config.task), Path(given.get("model") or Config.model).name
    cfg = make_config(**{"out": f"{adapter or f'runs/{task}-{base}'}-eval", **given})
    lengths = lengths or [cfg.gen_length, 2 * cfg.gen_length]
    settings = {}
    for length in lengths:  # as many tokens per network evaluation as in rollouts
        steps = max(length // cfg.block, length * cfg.steps // cfg.gen_length)
        check_lengths(length, cfg.block, steps)
        settings[length] = replace(cfg, gen_length=length, steps=steps)
    rows, folder = task_rows(cfg, "test"), locate(cfg.model)
    tokenizer = ChatTokenizer(folder)
    model = LLaDA.from_pretrained(folder, ranks.device, ranks.dtype)
    if adapter:
        lora = LoRA.load(adapter, model.config)
        model.adapters["tuned"] = lora.to(ranks.device, ranks.dtype)
        model.use("tuned")
    if TASKS[cfg.task].generated and not cfg.test_data:
        say(
            ranks,
            "these test rows were generated here, so no published table can be compared with them",
        )
    name, table = str(adapter) if adapter else None, {}
    for length in lengths:
        path = Path(cfg.out, f"eval-{length}.jsonl")
        how = {"cfg": settings[length], "tokenizer": tokenizer, "ranks": ranks, "path": path}
        scores = evaluate(model, rows, **how)
        if scores:
            table[length] = scores
            say(ranks, f"{cfg.task}, {length} tokens: {show(scores)}")
            found = {"task": cfg.task, "model": cfg.model, "adapter": name, "lengths": table}
            write_file(Path(cfg.out, "eval.json"), found)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["train", *argv]
    given = vars(make_parser().parse_args(argv))
    action = given.pop("action")
    if action == "merge":
        base = locate(base_of(given["adapter"], given["model"]))
        merge(base, given["adapter"], given["folder"])
        print(f"{given['folder']} is a checkpoint like {base}, with the adapter merged into it")
    elif action == "eval":
        evaluate_command(given, given.pop("adapter"), given.pop("lengths"))
    else:
        train(open_run(given, Ranks()))


if __name__ == "__main__":
    run_as_script(main)
