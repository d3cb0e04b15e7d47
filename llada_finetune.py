"""Discrete Tilt Matching on LLaDA-8B: the loss of `dtm.py` in one plain PyTorch loop.

    torchrun --nproc_per_node=8 llada_finetune.py                  the full run, on Sudoku
    torchrun --nproc_per_node=8 llada_finetune.py train --task countdown --out RUN
    torchrun --nproc_per_node=8 llada_finetune.py eval --adapter RUN/best
    python llada_finetune.py merge OUT --adapter RUN/best          a whole checkpoint

The same `train` command starts a run and goes on with it. On several nodes add torchrun's
--nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500. The same loop on a laptop, with a small
LLaDA made there: python -m figures.toy_llada. GB and hours beforehand: python -m figures.llada_cost

CONTENTS   1 settings   2 the loop   3 the buffer   4 the control variate   5 a run, its checkpoints
6 scores   7 the model   8 adapters   9 text in, text out   10 command line
A task (rows, prompt, reward) is one class, see `figures/tasks.py`; write yours there or below.

FOUR FACTS ABOUT LLADA: attention sees both sides, and logits at position t predict token t. Padding
is EOS on the left; attention masks are honoured, where the release attends to pads. "o_proj",
"gate_proj" and "down_proj" name nothing in it, so released code adapts four maps of seven (`--lora
paper`). MASK is an ordinary id that sampling can draw: rollouts ban it.
RANDOMNESS: a generator per rank draws masks and tokens, torch's own, of another seed, the adapter's
dropout; `Ranks.seed`. DEVICE AND DTYPE: see `Ranks`. FILES are safetensors, JSON and JSONL, written
beside their name and renamed. Symbols and equations (D1), (D2), ... are those of `dtm.py`.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import dtm
from dtm import c_dtm_loss, check, mask_blockwise, tilt_weight
from figures import files
from figures.llada_shape import (
    ADAPTED,
    MAPS,
    check_model_config,
    choose_pass,
    count_memory,
    map_shape,
)
from figures.processes import Ranks, Stopped, run_as_script
from figures.tasks import TASKS, Task, cut, read_rows

Device = torch.device | str
Padded = tuple[Tensor, Tensor | None]  # ids of prompts, and where they are not padding


# ---- 1. Settings --------------------------------------------------------------------------------
def option(default, text: str):
    """A field of `Config` with the words that -h shows for it."""
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """The settings of a run; each is a flag. Defaults are the release's for Sudoku, and a task's
    `preset` says what it changes."""

    task: str = option("sudoku", "sudoku, countdown, math, gsm8k or your class, in lower case")
    model: str = option("GSAI-ML/LLaDA-8B-Instruct", "checkpoint folder or hub id")
    out: str = option("", "folder of the run (runs/TASK-SEED), or of the scores (ADAPTER-eval)")
    seed: int = option(42, "of masks, tokens, dropout; rank k adds k million")
    data: str = option("", "FILE.jsonl or .csv; a tenth validates; empty: the task's own rows")
    test_data: str = option("", "FILE.jsonl or .csv of test rows; empty: the task's own")
    # the tilt
    h: float = option(5.0, "tilt increment of a phase, per unit of reward; with --ess the largest")
    a_end: float = option(100.0, "tilt A at which the run ends, per unit of reward")
    ess: float = option(0.0, "choose h by this effective sample size, a share of 1; 0: h is fixed")
    c: str = option("1", "control variate: a number, best (scalar) or learned, c(xt, i)")
    normalize: str = option("none", "weights over a mean: none, batch (all ranks), group (prompt)")
    steps_per_h: int = option(256, "optimiser steps of a phase")
    # the buffer of a rank
    prompts: int = option(80, "prompts in each rank's buffer")
    completions: int = option(1, "answers to a prompt")
    refresh: int = option(20, "prompts of each rank renewed at a time; 0: none")
    refresh_steps: int = option(32, "optimiser steps between renewals; 0: none")
    # decoding
    chunk: int = option(16, "answers that a rank decodes at once; fewer take less memory")
    gen_length: int = option(256, "tokens of an answer")
    block: int = option(32, "tokens of a block, in decoding and in masking")
    steps: int = option(128, "network evaluations of an answer; as many as tokens: one a step")
    temperature: float = option(0.0, "of rollouts; 1: draws from the model, 0: the likeliest token")
    order: str = option("confidence", "of rollouts: confidence, state (by certainty) or random")
    prompt_length: int = option(1132, "longest prompt, tokens; longer ones are skipped, counted")
    # the optimiser
    batch: int = option(4, "answers in a rank's forward pass")
    accum: int = option(16, "forward passes of an optimiser step")
    lr: float = option(3e-6, "learning rate, reached after 5 % of a phase")
    lr_min: float = option(1e-6, "learning rate after its fall over the last 10 % of a phase")
    weight_decay: float = option(0.1, "AdamW's; its betas are .9 and .99")
    clip: float = option(1.0, "largest gradient norm, over all of the adapter")
    ema: float = option(0.0, "decay a step of the student's average, the next teacher; 0: off")
    # the adapter
    lora: str = option("all", "adapted maps: all seven of a block, or paper, the release's four")
    rank: int = option(128, "LoRA rank")
    alpha: float = option(64.0, "LoRA alpha; the adapter is scaled by alpha / rank")
    dropout: float = option(0.05, "LoRA dropout, a probability")
    # time and memory
    checkpointing: str = option("auto", "recompute activations: on, off, or if memory is short")
    compile: bool = option(False, "torch.compile the blocks; needs a GPU")
    cache: str = option("off", "decode with keys and values of a block's first step: prefix, dual")
    past_end: bool = option(False, "decode past an end token and train there, as published")
    # bookkeeping
    save_every: int = option(100, "optimiser steps between checkpoints; one more after a phase")
    eval_rows: int = option(128, "validation rows that choose RUN/best after a phase; 0: its last")


CHOICES = {
    "normalize": ("none", "batch", "group"),
    "order": ("confidence", "state", "random"),
    "lora": ("all", "paper"),
    "checkpointing": ("auto", "on", "off"),
    "cache": ("off", "prefix", "dual"),
}
MAY_BE_ZERO = {"seed", "ess", "refresh", "refresh_steps", "temperature", "lr_min"}
MAY_BE_ZERO |= {"weight_decay", "ema", "dropout", "eval_rows"}
# In a run that goes on: no mathematics, or (model, data) files whose content is compared.
MAY_CHANGE = {"out", "model", "data", "chunk", "checkpointing", "compile", "save_every"}


def make_config(**given) -> Config:
    """The task's preset with the given changes. ValueError names the setting that cannot be."""
    task = given.get("task", Config.task)
    check(task in TASKS, f"--task {task}: expected one of {', '.join(TASKS)}")
    cfg = Config(**{**TASKS[task].preset, **given})
    cfg.out = cfg.out or f"runs/{task}-{cfg.seed}"
    check_settings(cfg)
    return cfg


def check_settings(cfg: Config) -> None:
    for name, value in asdict(cfg).items():
        if name in CHOICES:
            known = ", ".join(CHOICES[name])
            check(value in CHOICES[name], f"--{name} {value}: expected one of {known}")
        elif not isinstance(value, (str, bool)):
            least = "0 or more" if name in MAY_BE_ZERO else "positive"
            good = value > 0 or (value == 0 and name in MAY_BE_ZERO)
            check(good and math.isfinite(value), f"--{name} {value} must be {least} and finite")
    for name in ("ess", "dropout", "ema"):
        check(getattr(cfg, name) < 1, f"--{name} {getattr(cfg, name)} must lie in [0, 1)")
    number = re.fullmatch(r"(\d+\.?\d*|\.\d+)(e-?\d{1,2})?", cfg.c)
    known = cfg.c in ("best", "learned") or number is not None
    check(known, f"--c {cfg.c}: expected a number >= 0, best or learned")
    check_lengths(cfg.gen_length, cfg.block, cfg.steps)
    drawn = cfg.batch * cfg.accum
    held = cfg.prompts * cfg.completions
    too_few = f"a step draws batch x accum = {drawn} different answers, the buffer holds prompts x"
    check(drawn <= held, f"{too_few} completions = {held}; lower --batch or --accum")
    check(cfg.refresh <= cfg.prompts, f"--refresh {cfg.refresh} exceeds --prompts {cfg.prompts}")
    alone = cfg.normalize == "group" and cfg.completions == 1
    check(not alone, "--normalize group divides a prompt's only weight by itself: --completions 2")
    both_or_neither = (cfg.refresh == 0) == (cfg.refresh_steps == 0)
    check(both_or_neither, "--refresh and --refresh_steps are both 0, or neither")
    if cfg.normalize == "none" and not cfg.ess:  # what overflows is said before the first rollout
        tilt_weight(torch.tensor([TASKS[cfg.task].top]), cfg.h)


def check_lengths(gen_length: int, block: int, steps: int) -> None:
    fits = gen_length > 0 and block > 0 and gen_length % block == 0
    check(fits, f"--gen_length {gen_length} must be a multiple of --block {block}")
    blocks = gen_length // block
    fits = steps >= blocks and steps % blocks == 0
    check(fits, f"--steps {steps} must be a multiple of the {blocks} blocks")


# ---- 2. The loop --------------------------------------------------------------------------------
def train(run: "Run", watch: Callable[["Run"], None] | None = None) -> None:
    """The algorithm of `dtm.py`, from wherever `run` stands. a = 0 is the base model; teacher and
    student are two adapters on it. watch(run) is called at a = 0 and after each phase, before its
    checkpoint."""
    cfg, state, buffer = run.cfg, run.state, run.buffer
    student = parallel(run.model, run.ranks)
    with run.saved_when_stopped():
        if not state.scored:
            score_phase(run, watch)
            if state.total:  # they were interrupted; if they are the last, nothing else saves them
                run.save()
        run.keep_best()
        while cfg.a_end - state.a > 1e-9 * cfg.a_end:
            if state.step == 0:  # a new phase: rollouts of its teacher, then its h
                run.fill_buffer(cfg.prompts)
                state.h = choose_h(buffer, state.a, cfg)
            with run.progress_bar() as bar:
                while state.step < cfg.steps_per_h:
                    if cfg.refresh and state.step and state.step % cfg.refresh_steps == 0:
                        run.fill_buffer(cfg.refresh)
                    optimiser_step(run, student)
                    bar.update()
                    if state.total % cfg.save_every == 0 and state.step < cfg.steps_per_h:
                        run.save()
            run.end_phase()  # teacher <- student or its average; a <- a + h; step <- 0
            score_phase(run, watch)
            run.save()
    chosen = "" if run.valid else "; no validation rows: RUN/best is the last phase"
    run.say(f"done: a = {state.a:g}, best phase {state.best_phase}{chosen}")


def choose_h(buffer: "Buffer", a: float, cfg: Config) -> float:
    """A phase's tilt increment: fixed, or by effective sample size (D9); the last is shortened."""
    h = dtm.next_h(buffer.everywhere("r"), cfg.ess, cfg.h) if cfg.ess else cfg.h
    check(h > 1e-9 * cfg.a_end, f"h = {h:g} at a = {a:g} does not lead to a_end = {cfg.a_end:g}")
    return min(h, cfg.a_end - a)


def learning_rate(cfg: Config, step: int) -> float:
    """Rises over 5 % of a phase and falls linearly to lr_min over the last 10 %."""
    left = cfg.steps_per_h - step - 1
    fall = max(0.0, 1 - left / (0.1 * cfg.steps_per_h))
    rise = min(1.0, (step + 1) / (0.05 * cfg.steps_per_h))
    return rise * (cfg.lr + (cfg.lr_min - cfg.lr) * fall)


def optimiser_step(run: "Run", student: nn.Module) -> None:
    """One step of AdamW on `batch` x `accum` answers of each rank's buffer, and its record."""
    cfg, state, ranks = run.cfg, run.state, run.ranks
    w = run.buffer.weights(state.h).to(ranks.device, torch.float32)
    passes = masked_answers(run)
    run.student.train()
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    where = f"the loss is not finite at step {state.total + 1}, rank {ranks.rank}"
    advice = "start another --out with a lower --lr or --h, or with --normalize batch"
    broken = f"{where}; the last checkpoint is whole. If it comes again, {advice}"
    for i, (part, xt, mask) in enumerate(passes):
        last = i + 1 == len(passes)
        if ranks.asked and not last:  # SIGTERM: nothing of this step will stay
            continue
        together = contextlib.nullcontext() if last or ranks.size == 1 else student.no_sync()
        with together, files.explained(broken, ValueError):  # ranks exchange gradients once a step
            loss, part_sums = loss_sum(run, student, part, xt, mask, w[part])
            (loss / (cfg.batch * cfg.accum)).backward()
        sums += part_sums
    ranks.stop_together()
    norm = float(nn.utils.clip_grad_norm_(run.student.parameters(), cfg.clip))
    check(math.isfinite(norm) and bool(sums.isfinite().all()), broken)
    rate = learning_rate(cfg, state.step)
    run.adam.param_groups[0]["lr"] = rate
    run.adam.step()
    run.adam.zero_grad()
    run.control.fit(ranks)
    for name, p in run.student.named_parameters() if cfg.ema else ():
        run.average[name].lerp_(p.detach(), 1 - cfg.ema)
    state.step += 1
    state.total += 1
    run.mark()
    run.log_step(sums, grad_norm=norm, lr=rate)


def masked_answers(run: "Run") -> list[tuple]:
    """A step's answers (rows of the buffer), xt and mask (B, L), in passes of run.batch. Those with
    an active block past their end are left out: they have no loss, but count in the mean."""
    cfg, buffer = run.cfg, run.buffer
    drawn = buffer.draw(cfg.batch * cfg.accum)
    x1 = buffer.data["x1"][drawn]
    xt, mask = mask_blockwise(x1, run.model.config["mask_token_id"], cfg.block, run.generator)
    if not cfg.past_end:
        mask = mask & reached(x1, cfg.block, torch.tensor(run.text.ends, device=x1.device))
    trained = mask.any(1)
    trained[0] |= ~trained.any()  # every rank takes part in the exchange of gradients
    left = trained.nonzero()[:, 0].tolist()
    parts = [left[i : i + run.batch] for i in range(0, len(left), run.batch)]
    return [([drawn[i] for i in part], xt[part], mask[part]) for part in parts]


def loss_sum(
    run: "Run", student: nn.Module, part: list[int], xt: Tensor, mask: Tensor, w: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of the buffer's answers `part`, masked as xt, mask (B, L), weights w (B,): a sum
    over answers of means over masked positions (`dtm.row_mean`). Beside it, for the log, float64
    sums of [loss, KL(pi_a || pi_theta)] over answers and of [c, 1] over positions."""
    model, data = run.model, run.buffer.data
    inputs = canvas(*run.buffer.prompts(data["row"][part].tolist()), xt, mask)
    with torch.no_grad():
        logits_a, hidden = model.use("teacher")(*inputs, hidden=True)  # (M, V), (M, d)
    model.use("student")
    logits = student(*inputs)  # (M, V)
    tokens = data["x1"][part][mask]  # (M,)
    w = w[:, None].expand_as(mask)[mask]  # (M,)
    share = (1 / mask.sum(1, keepdim=True)).expand_as(mask)[mask]  # (M,)
    c = run.control(hidden)  # (M,)
    loss = (share * c_dtm_loss(logits, logits_a, tokens, w, c)).sum()
    with torch.no_grad():
        run.control.observe(hidden, logits, logits_a, tokens, w, share)
        log_p = logits.float().log_softmax(-1)
        log_a = logits_a.float().log_softmax(-1)
        kl = F.kl_div(log_p, log_a, reduction="none", log_target=True).sum(-1)
        sums = torch.stack([loss, (share * kl).sum(), c.sum(), mask.sum()]).double()
    return loss, sums


def score_phase(run: "Run", watch: Callable[["Run"], None] | None) -> None:
    """Validation rows choose RUN/best; without any it is the last phase."""
    state = run.state
    if not run.valid:
        state.best_phase = state.phase
    else:
        scores = evaluate(run, run.valid, run.cfg.gen_length)
        if scores:  # on rank 0
            run.log(kind="eval", split="valid", phase=state.phase, a=state.a, **scores)
            run.say(f"a = {state.a:6.2f} valid: {show(scores)}")
            if scores["solved"] > state.best:
                state.best = scores["solved"]
                state.best_phase = state.phase
    if watch:
        watch(run)
    state.scored = True
    run.lap("eval")


# ---- 3. The buffer ------------------------------------------------------------------------------
class Buffer:
    """A rank's rollouts: prompts `row` (N,), answers x1 (N, L), rewards r and `solved` (N,)."""

    def __init__(self, cfg: Config, ranks: Ranks, text: "Text", model: "LLaDA", rows: list[dict]):
        few = f"{ranks.size} ranks share {len(rows)} prompts; start fewer ranks or give more rows"
        check(len(rows) >= ranks.size, few)
        self.cfg, self.ranks, self.text = cfg, ranks, text
        self.model = model
        self.rows = rows
        self.generator = Generator(ranks.device).manual_seed(ranks.seed(cfg.seed))
        shuffled = random.Random(cfg.seed).sample(range(len(rows)), len(rows))
        self.own = shuffled[ranks.rank :: ranks.size]  # ranks share no prompt
        self.cursor = 0
        self.skipped = 0  # prompts that were too long
        self.data: dict[str, Tensor] = {}
        self.known: dict[int, list[int]] = {}

    def prompt(self, row: int) -> list[int]:
        """The prompt's tokens, encoded once."""
        if row not in self.known:
            task = TASKS[self.cfg.task]
            self.known[row] = self.text.prompt(task.prompt(self.rows[row]))
        return self.known[row]

    def prompts(self, rows: list[int]) -> Padded:
        pad_id = self.model.config["pad_token_id"]
        return pad_left([self.prompt(row) for row in rows], pad_id, self.ranks.device)

    def next_rows(self, count: int) -> list[int]:
        """This rank's next prompts; those that are too long are skipped and counted, never cut."""
        rows = []
        start = self.cursor
        longest = self.cfg.prompt_length
        hopeless = f"every prompt is longer than --prompt_length {longest} tokens; raise it"
        while len(rows) < count:
            check(bool(rows) or self.cursor < start + len(self.own), hopeless)
            row = self.own[self.cursor % len(self.own)]
            self.cursor += 1
            if len(self.prompt(row)) <= longest:
                rows.append(row)
            else:
                self.skipped += 1
        return rows

    def fill(self, count: int) -> None:
        """The teacher answers `count` new prompts; the oldest answers make room."""
        rows = [row for row in self.next_rows(count) for _ in range(self.cfg.completions)]
        new = self.answered(rows)
        if self.data:
            new = {key: torch.cat([self.data[key][len(rows) :], t]) for key, t in new.items()}
        self.data = new

    def answered(self, rows: list[int]) -> dict[str, Tensor]:
        """The teacher's answers to these prompts; negative rewards count 0, as in the release."""
        task: Task = TASKS[self.cfg.task]
        prompts = [self.prompt(row) for row in rows]
        model, quiet = self.model.use("teacher"), self.ranks.rank > 0
        grades = []
        with self.ranks.stoppable(model):
            x1 = decode(model, self.text, prompts, self.cfg, self.generator, quiet, ban=True)
            for row, answer in zip(rows, x1.tolist(), strict=True):
                self.ranks.look()
                grades.append(task.grade(self.text.answer(answer), self.rows[row]))
        r, solved = torch.tensor(grades).double().T.contiguous()
        return {"row": torch.tensor(rows), "x1": x1, "r": r.clamp_min(0), "solved": solved}

    def weights(self, h: float) -> Tensor:
        """w (N,) = e^{h r} (D1), over its mean if asked for."""
        r, normalize = self.data["r"], self.cfg.normalize
        if normalize == "batch":
            start = self.ranks.rank * len(r)
            return tilt_weight(self.everywhere("r"), h, True)[start : start + len(r)]
        return tilt_weight(r, h, normalize == "group", self.data["row"])

    def draw(self, count: int) -> list[int]:
        """`count` different answers at random, neighbours in length of prompt."""
        device = self.ranks.device
        order = torch.randperm(len(self.data["r"]), generator=self.generator, device=device)
        rows = self.data["row"].tolist()
        return sorted(order[:count].tolist(), key=lambda i: len(self.prompt(rows[i])))

    def everywhere(self, key: str) -> Tensor:
        """(ranks N,): a column of all ranks' buffers."""
        return self.ranks.gather(self.data[key].to(self.ranks.device)).cpu()


# ---- 4. The control variate ---------------------------------------------------------------------
class ControlVariate:
    """c of (D3) at the masked positions: a number, the best scalar c (D8), or a learned c(xt, i)
    (D7). Both are least-squares fits of `state_c_target` over past steps, with forgetting: the best
    scalar on phi = 1, the learned one on 64 more, fixed random projections of the teacher's final
    hidden state (or itself, if no wider). More numbers would learn a buffer's w by heart."""

    def __init__(self, kind: str, width: int, device: torch.device):
        self.fitted = kind in ("best", "learned")
        self.constant = 1.0 if self.fitted else float(kind)
        k = min(width, 64)
        if k == width:
            project = torch.eye(k)
        else:
            noise = torch.randn(width, k, generator=Generator().manual_seed(0))
            project = noise * width**-0.5
        self.project = project.to(device)
        n = 1 + k if kind == "learned" else 1
        # The normal equations [G | b] of all past steps, and of this one.
        self.past = torch.zeros(n, n + 1, device=device, dtype=torch.float64)
        self.new = torch.zeros_like(self.past)

    def phi(self, hidden: Tensor) -> Tensor:
        """(M, n): 1, then the projections."""
        projected = hidden.float() @ self.project
        return F.pad(projected, (1, 0), value=1.0)[:, : len(self.past)]

    def __call__(self, hidden: Tensor) -> Tensor:
        """c (M,) for the teacher's hidden states (M, d); 1 before the first fit."""
        G, b = self.past[:, :-1], self.past[:, -1]
        if not (self.fitted and G.any()):
            return torch.full((len(hidden),), self.constant, device=hidden.device)
        but_the_mean = torch.arange(len(b), device=b.device) > 0  # a poor fit falls back on it
        ridge = 1e-3 * G.trace() / len(b) * but_the_mean
        return self.phi(hidden) @ torch.linalg.solve(G + ridge.diag(), b).float()

    def observe(
        self, hidden: Tensor, logits: Tensor, logits_a: Tensor, x1: Tensor, w: Tensor, share: Tensor
    ) -> None:
        """Adds a batch's normal equations; share (M,) is the 1/k that `row_mean` gives."""
        if self.fitted:
            y, q = dtm.state_c_target(logits, logits_a, x1, w)
            phi = self.phi(hidden)
            weighted = ((q * share**2)[:, None] * phi).T.double()
            self.new += weighted @ torch.cat([phi, y[:, None].float()], 1).double()

    def fit(self, ranks: Ranks) -> None:
        """After a step, so that c never depends on the batch it serves; alike on all ranks."""
        if self.fitted:
            self.past = 0.95 * self.past + ranks.gather(self.new[None]).sum(0)
            self.new = torch.zeros_like(self.past)


# ---- 5. A run and its checkpoints ---------------------------------------------------------------
@dataclass
class State:
    """Where a run stands; a resumed one starts from here."""

    a: float = 0.0
    h: float = 0.0  # of the present phase
    phase: int = 0
    step: int = 0  # of the present phase
    total: int = 0  # steps of all phases
    best: float = -1.0  # share of validation rows solved ...
    best_phase: int = 0  # ... after this phase
    scored: bool = False  # whether the present teacher is
    filled: int = -1  # the step before which the buffer was last filled
    ranks: int = 1


class Run:
    """Model, adapters, optimiser, buffer, generators, state: all that a run's future depends on."""

    def __init__(self, cfg: Config, ranks: Ranks, rows: list[dict], valid: list[dict]):
        self.cfg, self.ranks = cfg, ranks
        self.out = Path(cfg.out)
        self.valid = valid
        self.lock = None
        self.saved = None  # the state of the last checkpoint
        self.seconds = {"rollout": 0.0, "train": 0.0, "eval": 0.0, "save": 0.0}
        self.clock = 0.0  # when the present lap began
        folder = files.locate(cfg.model)
        dtype = str(ranks.dtype).removeprefix("torch.")
        self.say(f"{cfg.model}: {ranks.size} rank(s), {ranks.device.type}, {dtype}")
        self.text = Text(folder)
        self.model = LLaDA.from_pretrained(folder, ranks.device, ranks.dtype)
        self.batch, self.model.checkpointing = cfg.batch, cfg.checkpointing == "on"
        if cfg.compile:
            check(ranks.cuda, "--compile needs a GPU; leave it out here")
            self.model.compile_blocks()
        self.inputs = {"base": "", "rows": files.digest(rows), "valid": files.digest(valid)}
        self.student = self.new_adapter()
        self.teacher = self.new_adapter().eval().to(ranks.dtype).requires_grad_(False)
        self.model.adapters.update({"student": self.student, "teacher": self.teacher})
        torch.manual_seed(ranks.seed(cfg.seed, stream=1))  # the adapter's dropout
        self.buffer = Buffer(cfg, ranks, self.text, self.model, rows)
        self.generator = self.buffer.generator
        self.state = State(ranks=ranks.size)
        self.begin_phase()
        self.mark()
        if cfg.cache != "off":
            self.say(f"--cache {cfg.cache}: answers are no draws from the model, as (D2) asks for")

    def new_adapter(self) -> "LoRA":
        cfg = self.cfg
        maps = ADAPTED[cfg.lora]
        lora = LoRA(self.model.config, maps, cfg.rank, cfg.alpha, cfg.dropout, cfg.seed)
        return lora.to(self.ranks.device)

    def choose_pass(self, kept: list | None) -> None:
        """Answers in a forward pass and recomputation, by the memory of the smallest device; a run
        that goes on keeps them, as the order of sums and of dropout depends on them."""
        gb = torch.tensor([self.ranks.memory()], device=self.ranks.device)
        gb = float(self.ranks.gather(gb).min())
        config = self.model.config
        itemsize = self.ranks.dtype.itemsize
        self.batch, recompute = kept or choose_pass(self.cfg, config, gb, itemsize)
        self.model.checkpointing = recompute
        how = "with" if recompute else "without"
        self.say(f"{self.batch} answers a pass, {how} recomputation, in {gb:.3g} GB")
        need = sum(count_memory(self.cfg, config, self.batch, recompute, itemsize).values())
        if need > gb:
            self.say(f"these count {need:.3g} GB: memory will probably not do")

    def begin_phase(self) -> None:
        """A new optimiser, average and control variate."""
        cfg = self.cfg
        self.adam = torch.optim.AdamW(
            self.student.parameters(), cfg.lr, (0.9, 0.99), 1e-8, cfg.weight_decay
        )
        weights = self.student.state_dict() if cfg.ema else {}
        self.average = {name: t.clone() for name, t in weights.items()}
        self.control = ControlVariate(cfg.c, self.model.config["d_model"], self.ranks.device)

    def end_phase(self) -> None:
        after = self.average or self.student.state_dict()
        self.teacher.load_state_dict(after)
        self.student.load_state_dict(after)
        self.begin_phase()
        self.state.a += self.state.h
        self.state.phase += 1
        self.state.step = 0
        self.state.scored = False
        self.state.filled = -1

    def fill_buffer(self, count: int) -> None:
        """Rollouts, unless SIGTERM came between them and the step that they are for."""
        if self.state.filled == self.state.step:
            return
        if self.state.step == 0:
            self.buffer.data = {}
        self.buffer.fill(count)
        self.state.filled = self.state.step
        self.mark()
        self.lap("rollout")

    # Random numbers, and SIGTERM.
    def random_states(self) -> dict[str, Tensor]:
        """Where this rank's generators and its walk through the prompts stand."""
        return {
            "cursor": torch.tensor([self.buffer.cursor, self.buffer.skipped]),
            "generator": self.generator.get_state(),
            "torch": (torch.cuda if self.ranks.cuda else torch).get_rng_state(),
        }

    def set_random_states(self, states: dict[str, Tensor]) -> None:
        self.buffer.cursor, self.buffer.skipped = states["cursor"].tolist()
        same = len(states["generator"]) == len(self.generator.get_state())
        other = "began on another kind of device, whose random numbers this one cannot continue"
        check(same, f"{self.out} {other}; go on there")
        self.generator.set_state(states["generator"])
        (torch.cuda if self.ranks.cuda else torch).set_rng_state(states["torch"])

    def mark(self) -> None:
        """What has happened so far stays, whenever SIGTERM comes."""
        self.marked = self.random_states()

    @contextlib.contextmanager
    def saved_when_stopped(self):
        """In here SIGTERM undoes a step or rollouts under way, saves and leaves. The folder's lock
        is given back at the end."""
        handler = signal.signal(signal.SIGTERM, self.ranks.ask_to_stop)
        self.ranks.clear_sign(self.out)
        self.clock = time.perf_counter()
        try:
            yield
        except Stopped:
            self.set_random_states(self.marked)
            if self.saved != self.state:
                self.save()
            self.say(f"SIGTERM: saved at step {self.state.total}; the same command goes on")
            sys.exit(143)
        except RuntimeError as error:
            self.ranks.name_lost(error, self.out)
        finally:
            signal.signal(signal.SIGTERM, handler)  # whoever called may be stopped again
            self.ranks.asked = False
            if self.lock:
                self.lock.release(force=True)

    # The log.
    def say(self, line: str) -> None:
        if self.ranks.rank == 0:
            tqdm.write(line)

    def progress_bar(self) -> tqdm:
        """Of the present phase's steps."""
        words = f"a {self.state.a:.1f} of {self.cfg.a_end:g}"
        size = {"initial": self.state.step, "total": self.cfg.steps_per_h}
        return tqdm(desc=words, unit="step", disable=self.ranks.rank > 0, **size)

    def lap(self, name: str) -> None:
        """The seconds since the last lap belong to `name`."""
        now = time.perf_counter()
        self.seconds[name] += now - self.clock
        self.clock = now

    def log(self, **record) -> None:
        if self.ranks.rank == 0:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(record | {"total": self.state.total}) + "\n")

    def has_logged(self, record: dict) -> bool:
        """Whether a record is of this run's past; SIGTERM may have left scores half done."""
        if record["total"] == self.state.total:
            return self.state.scored or record["kind"] == "step"
        return record["total"] < self.state.total

    def log_step(self, sums: Tensor, **more) -> None:
        """A step's record: all ranks' loss, KL to the teacher, c, and what the buffer holds."""
        state, buffer = self.state, self.buffer
        loss, kl, c, positions = self.ranks.gather(sums[None]).sum(0).tolist()
        answers = self.cfg.batch * self.cfg.accum * self.ranks.size
        r = buffer.everywhere("r")
        self.lap("train")
        record = {"kind": "step", "phase": state.phase, "a": state.a, "h": state.h}
        record |= {"loss": loss / answers, "kl": kl / answers, "c": c / max(1, positions)}
        record["ess"] = 1 / float(tilt_weight(r, state.h, True).square().mean())
        record |= {"reward": float(r.mean()), "reward_sd": float(r.std(correction=0))}
        top = TASKS[self.cfg.task].top
        record["reward_hist"] = torch.histc(r, 10, 0, top).int().tolist()
        record["solved"] = float(buffer.everywhere("solved").mean())
        record |= {"skipped": buffer.skipped, "seconds": self.seconds}
        record["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9 if self.ranks.cuda else 0.0
        self.log(**record, **more)

    # Checkpoints.
    def shared_tensors(self) -> dict[str, Tensor]:
        """What all ranks have in common, beside the student."""
        tensors = {f"teacher.{name}": t for name, t in self.teacher.state_dict().items()}
        tensors |= {f"average.{name}": t for name, t in self.average.items()}
        for i, moments in self.adam.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": t for name, t in moments.items()}
        return tensors | {"control": self.control.past}

    def own_tensors(self) -> dict[str, Tensor]:
        """A rank's buffer and generators."""
        buffer = {f"buffer.{name}": t for name, t in self.buffer.data.items()}
        return buffer | self.random_states()

    def save(self) -> None:
        """RUN/step-N, renamed once every rank has written its part; the last two are kept."""
        name = f"step-{self.state.total:07}"
        half = self.out / f".half-{name}"
        files.write(half / f"rank{self.ranks.rank}.safetensors", self.own_tensors())
        if self.ranks.rank == 0:
            self.student.save(half / "adapter", self.cfg.model, self.inputs["base"])
            files.write(half / "shared.safetensors", self.shared_tensors())
            files.write(half / "state.json", asdict(self.state))
        self.ranks.wait()
        if self.ranks.rank == 0:
            paths = [path for path in sorted(half.rglob("[!.]*")) if path.is_file()]
            sums = {str(path.relative_to(half)): files.file_digest(path) for path in paths}
            all_here = len([*half.glob("rank*")]) == self.ranks.size
            check(all_here, f"{half} lacks a rank's file: all nodes must share the folder --out")
            files.write(half / files.MANIFEST, sums)
            aside = half.with_name(f"{half.name}-before")
            if (self.out / name).is_dir():  # saved once more, by SIGTERM before a step
                (self.out / name).replace(aside)
            half.replace(self.out / name)
            shutil.rmtree(aside, ignore_errors=True)
            found = files.checkpoints(self.out)
            whole = [path for path in found if (path / files.MANIFEST).is_file()]
            for old in found:  # without a manifest: its removal was killed
                if old < whole[-2:][0]:
                    shutil.rmtree(old)
            self.keep_best()
        self.saved = replace(self.state)
        self.ranks.wait()  # no rank leaves before the checkpoint is whole
        self.lap("save")

    def keep_best(self) -> None:
        """RUN/best, written after the checkpoint that knows its score."""
        if self.ranks.rank == 0 and self.state.best_phase == self.state.phase:
            self.teacher.save(self.out / "best", self.cfg.model, self.inputs["base"])

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Goes back to a checkpoint."""
        self.state = State(**files.read_json(folder / "state.json"))
        was, now = self.state.ranks, self.ranks.size
        check(was == now, f"{self.out} ran on {was} ranks, now there are {now}; resume with {was}")
        own = dict(files.read_tensors(folder / f"rank{self.ranks.rank}.safetensors"))
        shared = dict(files.read_tensors(folder / "shared.safetensors"))
        student = files.read_tensors(folder / "adapter" / "adapter_model.safetensors")
        self.student.fill(dict(student))
        self.teacher.load_state_dict(part_of(shared, "teacher."))
        for name, t in part_of(shared, "average.").items():
            self.average[name].copy_(t)
        adam = self.adam.state_dict()
        for name, t in part_of(shared, "adam.").items():
            i, moment = name.split(".")
            adam["state"].setdefault(int(i), {})[moment] = t
        self.adam.load_state_dict(adam)
        self.control.past.copy_(shared["control"])
        self.buffer.data = part_of(own, "buffer.")
        if self.buffer.data:  # else it stopped in a phase's first rollouts
            self.buffer.data["x1"] = self.buffer.data["x1"].to(self.ranks.device)
        self.set_random_states(own)
        self.mark()
        self.saved = replace(self.state)
        self.say(f"resumed {folder}: phase {self.state.phase}, step {self.state.step}")


def part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors[name] for name in names}


def last_checkpoint(run: Run) -> Path | None:
    """The last whole checkpoint; damaged ones are named and set aside. None before the first."""
    last = -1
    if run.ranks.rank == 0:  # the others follow its choice
        for folder in reversed(files.checkpoints(run.out)):
            damaged = files.damaged_file(folder)
            if not damaged:
                last = int(folder.name.removeprefix("step-"))
                break
            aside = folder.with_name(f"{folder.name}.damaged")
            run.say(f"{folder / damaged} is damaged; renamed to {aside.name}, going on before it")
            shutil.rmtree(aside, ignore_errors=True)
            folder.replace(aside)
        lost = last < 0 and any(run.out.glob("step-*.damaged"))
        check(not lost, f"every checkpoint of {run.out} is damaged; start anew with another --out")
    last = int(run.ranks.gather(torch.tensor([last], device=run.ranks.device))[0])
    return run.out / f"step-{last:07}" if last >= 0 else None


def open_run(given: dict, ranks: Ranks) -> Run:
    """Starts the run that `given` describes, or goes on with the one that its folder holds."""
    out = given.get("out") or make_config(**given).out
    file = Path(out, "config.json")
    saved = files.read_json(file) if file.exists() else None
    begun = (file.parent / "metrics.jsonl").is_file() or files.checkpoints(file.parent)
    lost = f"{file} is missing, although a run began there; restore it, or take another --out"
    check(bool(saved or not begun), lost)
    cfg = saved_config(saved, given, file) if saved else make_config(**given)
    rows = task_rows(cfg, "train")
    files.locate(cfg.model)  # nothing is written for a model that is not there
    lock = files.lock_folder(file.parent) if ranks.rank == 0 else None
    run = Run(cfg, ranks, rows, task_rows(cfg, "valid")[: cfg.eval_rows])
    run.lock = lock
    run.choose_pass(saved["passes"] if saved and "checkpointing" not in given else None)
    count = sum(p.numel() for p in run.student.parameters())
    run.say(f"LoRA on {', '.join(run.student.maps)}: {count:,} trainable parameters")
    if ranks.rank == 0:  # scores alone do without reading the whole base once more
        run.inputs["base"] = files.fingerprint(files.locate(cfg.model))
    ranks.wait()  # every rank has looked for the file
    if saved is None:
        if ranks.rank == 0:
            passes = [run.batch, run.model.checkpointing]
            files.write(file, asdict(cfg) | {"inputs": run.inputs, "passes": passes})
        return run
    if ranks.rank == 0:
        for key, what in (("base", "--model"), ("rows", "--data"), ("valid", "--data")):
            changed = f"{file.parent}: the content of {what} has changed since the run began"
            same_content = saved["inputs"][key] == run.inputs[key]
            check(same_content, f"{changed}; restore it, or start another run with --out FOLDER")
        for half in file.parent.glob(".half-step-*"):  # of a save that was killed
            shutil.rmtree(half)
    last = last_checkpoint(run)
    if last:
        run.load(last)
    if ranks.rank == 0:
        kept = [json.dumps(r) + "\n" for r in files.read_log(run.out) if last and run.has_logged(r)]
        files.write(run.out / "metrics.jsonl", "".join(kept))
    return run


def saved_config(saved: dict, given: dict, file: Path) -> Config:
    """The settings of a run that goes on; those given must be the same, but for MAY_CHANGE."""
    names = {f.name for f in fields(Config)}
    same_version = names | {"inputs", "passes"} == saved.keys()
    check(same_version, f"{file} is of another version; use another --out")
    changed = []
    for name, value in given.items():
        if name not in MAY_CHANGE and saved[name] != value:
            changed.append(f"{name} (was {saved[name]!r}, now {value!r})")
    hint = f"leave out {', '.join(changed)}, or start another run with --out FOLDER"
    check(not changed, f"{file.parent} holds a run, which keeps its settings: {hint}")
    settings = {name: given.get(name, saved[name]) for name in names}
    return make_config(**settings | {"out": str(file.parent)})


def task_rows(cfg: Config, split: str) -> list[dict]:
    file = cfg.test_data if split == "test" else cfg.data
    if not file:
        return TASKS[cfg.task].rows(split)
    rows = read_rows(file, cfg.task)
    return rows if split == "test" else cut(rows, split)


def parallel(model: "LLaDA", ranks: Ranks) -> nn.Module:
    """DDP on the student's adapter, as all else is frozen."""
    if ranks.size == 1:
        return model
    # Without the view every gradient would be kept twice.
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


# ---- 6. Scores ----------------------------------------------------------------------------------
def evaluate(run: Run, rows: list[dict], gen_length: int, path: Path | None = None) -> dict | None:
    """Decodes every row with the teacher's adapter at temperature 0, by confidence, with as many
    tokens a step as rollouts. Scores with standard errors on rank 0; `path` receives the answers.
    """
    cfg, ranks, task = run.cfg, run.ranks, TASKS[run.cfg.task]
    steps = max(gen_length // cfg.block, gen_length * cfg.steps // cfg.gen_length)
    cfg = replace(cfg, order="confidence", gen_length=gen_length, steps=steps, temperature=0.0)
    # Every rank decodes as many; the repeats at the end count once.
    most = -(-len(rows) // ranks.size) * ranks.size
    prompts = [run.text.prompt(task.prompt(row)) for row in rows]
    own = [prompts[i % len(rows)] for i in range(ranks.rank, most, ranks.size)]
    noise = Generator(ranks.device).manual_seed(ranks.seed(cfg.seed))
    with ranks.stoppable(run.model.use("teacher")):
        ids = decode(run.model, run.text, own, cfg, noise, ranks.rank > 0)
    ids = ranks.gather(ids[None]).transpose(0, 1).flatten(0, 1)[: len(rows)]
    graded = []
    with ranks.stoppable(run.model):
        if ranks.rank == 0:
            for answer, row in zip(ids.tolist(), rows, strict=True):
                ranks.look()
                graded.append(graded_answer(task, run.text.answer(answer), row))
    if ranks.rank > 0:
        return None
    if path:
        files.write(path, "".join(json.dumps(line) + "\n" for line in graded))
    scores = {"n": len(rows)}
    for key in ("solved", "reward"):
        scores |= share_and_error(key, [(line[key], 1) for line in graded])
    if task.cells:
        scores |= share_and_error("cells", [line["cells"] for line in graded])
    return scores


def graded_answer(task: Task, text: str, row: dict) -> dict:
    reward, solved = task.grade(text, row)
    answer = {"row": row, "text": text, "solved": solved, "reward": reward}
    if task.cells:
        answer["cells"] = task.cells(text, row)
    return answer


def share_and_error(key: str, pairs: list[tuple[float, int]]) -> dict[str, float]:
    """Pooled over cells; the error counts rows, as a puzzle's cells stand or fall together."""
    part, whole = torch.tensor(pairs).double().unbind(1)
    share = part.sum() / whole.sum()
    error = (part - share * whole).std(correction=0) / len(pairs) ** 0.5 / whole.mean()
    return {key: float(share), f"{key}_se": float(error)}


def show(scores: dict) -> str:
    found = [key for key in ("solved", "cells", "reward") if key in scores]
    words = [f"{key} {scores[key]:.3f} +- {scores[key + '_se']:.3f}" for key in found]
    return f"{', '.join(words)} (n = {scores['n']})"


# ---- 7. The model -------------------------------------------------------------------------------
class RMSNorm(nn.RMSNorm):
    """In float32, rounded to the stream's dtype before the gain."""

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), self.normalized_shape, None, self.eps)
        return self.weight * normed.to(x.dtype)


@functools.lru_cache(8)
@torch.inference_mode(False)  # what that mode had built, no backward pass could use
def angles(T: int, half: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin (T, half), float32, of t theta^(-i / half); on the CPU, so that devices agree."""
    frequency = 1 / theta ** (torch.arange(half).float() / half)
    turn = torch.arange(T).float()[:, None] * frequency
    return turn.cos().to(device), turn.sin().to(device)


def rotate(u: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on u (B, heads, T, d), half-split, in float32; cos, sin (T, d / 2)."""
    u1, u2 = u.float().chunk(2, -1)
    return torch.cat([u1 * cos - u2 * sin, u2 * cos + u1 * sin], -1).to(u.dtype)


def low_rank(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float) -> Tensor:
    """y + scale B A dropout(x), for a map's input x (..., inputs) and output y (..., outputs); the
    sum and the second product are one call."""
    inner = F.linear(F.dropout(x, dropout), A.to(x.dtype)).flatten(0, -2)
    return torch.addmm(y.flatten(0, -2), inner, B.to(x.dtype).T, alpha=scale).view_as(y)


class Block(nn.Module):
    """Llama's block without the causal mask, under OLMo's names."""

    def __init__(self, config: dict):
        super().__init__()
        self.heads = config["n_heads"]
        self.attn_norm = RMSNorm(config["d_model"], config["rms_norm_eps"])
        self.ff_norm = RMSNorm(config["d_model"], config["rms_norm_eps"])
        for name in MAPS:
            outputs, inputs = map_shape(config, name)
            self.add_module(name, nn.Linear(inputs, outputs, bias=False))

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        visible: Tensor | None,
        lora: dict[str, tuple],
        at: Tensor | None = None,
        cached: Callable | None = None,
    ) -> Tensor:
        """x (B, T, d) -> (B, T, d), or (B, m, d) at the positions `at` (B, m): all have keys and
        values, the others nothing more. lora: `LoRA.block`; cached: `Cache.renewed`."""
        u = self.attn_norm(x)
        k = rotate(self.split(self.mapped("k_proj", u, lora)), cos, sin)
        v = self.split(self.mapped("v_proj", u, lora))
        if cached is not None:
            k, v = cached(k, v)
        if at is not None:
            row = torch.arange(len(at), device=at.device)[:, None]
            x, u = x[row, at], u[row, at]
            cos, sin = cos[at][:, None], sin[at][:, None]
        q = rotate(self.split(self.mapped("q_proj", u, lora)), cos, sin)
        u = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + self.mapped("attn_out", u.transpose(1, 2).flatten(2), lora)
        u = self.ff_norm(x)
        gated = F.silu(self.mapped("ff_proj", u, lora)) * self.mapped("up_proj", u, lora)
        return x + self.mapped("ff_out", gated, lora)

    def mapped(self, name: str, u: Tensor, lora: dict[str, tuple]) -> Tensor:
        y = getattr(self, name)(u)
        return low_rank(u, y, *lora[name]) if name in lora else y

    def split(self, u: Tensor) -> Tensor:
        """(B, T, heads d) -> (B, heads, T, d)"""
        return u.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Cache:
    """The blocks' keys and values of all positions; those in `span` are computed anew."""

    def __init__(self, n_layers: int):
        self.span = slice(None)
        self.layers: list = [None] * n_layers

    def renewed(self, i: int, k: Tensor, v: Tensor) -> list[Tensor]:
        """k, v (B, heads, T, d) of block i: all, or those of `span` among the older ones."""
        if self.span == slice(None):
            self.layers[i] = [k, v]
        else:
            for kept, new in zip(self.layers[i], (k, v), strict=True):
                kept[:, :, self.span] = new
        return self.layers[i]


def in_order(where: Tensor) -> tuple[Tensor, Tensor]:
    """Wanted positions (B, T) as at (B, m): each row's own in order, then others, up to the most
    that a row has; and own (B, m), which are its own."""
    count = where.sum(1, keepdim=True)  # (B, 1)
    at = where.int().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(count.max()))]
    return at, torch.arange(at.shape[1], device=at.device) < count


class LLaDA(nn.Module):
    """The transformer of ML-GSAI/LLaDA; its state dict has the checkpoint's names, adapters aside.
    use("student") and use("teacher") put an adapter on, use(None) takes it off; `checkpointing`
    recomputes blocks in the backward pass."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = check_model_config(config)
        self.checkpointing = False
        self.active: str | None = None
        d, V = config["d_model"], config["vocab_size"]
        parts = {
            "wte": nn.Embedding(V, d),
            "blocks": nn.ModuleList(Block(config) for _ in range(config["n_layers"])),
            "ln_f": RMSNorm(d, config["rms_norm_eps"]),
            "ff_out": nn.Linear(d, V, bias=False),
        }
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(parts)})
        self.adapters = nn.ModuleDict()

    def compile_blocks(self, **how) -> None:
        """One compilation serves all blocks; each kind of call (student, teacher, padded, the last
        block) has its own."""
        torch._dynamo.config.cache_size_limit = 64
        Cache.renewed = torch.compiler.disable(Cache.renewed)  # it holds other tensors in each
        for block in self.model["transformer"]["blocks"]:
            block.compile(**how)

    def use(self, adapter: str | None) -> "LLaDA":
        known = adapter is None or adapter in self.adapters
        check(known, f"no adapter is called {adapter!r}")
        self.active = adapter
        return self

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        where: Tensor | None = None,
        hidden: bool = False,
        cache: "Cache | None" = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """ids (B, T) int64, attention_mask (B, T) bool or 0/1 (None: no padding, no cost), where
        (B, T) bool -> logits (B, T, V), or (M, V) at `where` in row-major order: there alone run
        the last block beyond keys and values, final norm and head. hidden=True adds the head's
        input. A cache computes its span alone, which holds `where`."""
        net = self.model["transformer"]
        adapter = self.adapters[self.active] if self.active else None
        visible = None
        if attention_mask is not None:  # keys; a pad's own row is garbage
            visible = attention_mask.bool()[:, None, None]
        half = self.config["d_model"] // self.config["n_heads"] // 2
        cos, sin = angles(ids.shape[1], half, self.config["rope_theta"], ids.device)
        span = cache.span if cache else slice(None)
        x = net["wte"](ids[:, span])
        at, wanted = (None, ...) if where is None else in_order(where[:, span])
        cos, sin = cos[span], sin[span]
        last = len(net["blocks"]) - 1
        for i, block in enumerate(net["blocks"]):
            lora = adapter.block(i) if adapter is not None else {}
            cached = functools.partial(cache.renewed, i) if cache else None
            given = (x, cos, sin, visible, lora, at if i == last else None, cached)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *given, use_reentrant=False)
            else:
                x = block(*given)
        x = net["ln_f"](x[wanted])
        return (net["ff_out"](x), x) if hidden else net["ff_out"](x)

    @classmethod
    def from_pretrained(cls, source: Path | str, device: Device = "cpu", dtype=torch.float32):
        """The frozen model of a folder or hub id in `dtype` on `device`, built on the meta device
        and filled tensor by tensor from the files that the index names, however they are cut.
        ValueError: a missing, torn, quantised or misshapen file, or another kind of model."""
        folder = files.locate(source)
        with torch.device("meta"):
            model = cls(files.read_json(folder / "config.json"))
        wanted = model.state_dict()
        filled = {}
        for name, t in files.base_tensors(folder):
            if name in wanted:
                shapes = f"{tuple(t.shape)}, config.json asks for {tuple(wanted[name].shape)}"
                check(t.shape == wanted[name].shape, f"{folder}: {name} is {shapes}")
            filled[name] = t.to(device, dtype)
        odd = sorted(wanted.keys() ^ filled.keys())
        hint = f"are missing or not of this config.json, such as {odd[0] if odd else ''}"
        check(not odd, f"{folder}: {len(odd)} tensors {hint}; download again")
        model.load_state_dict(filled, assign=True)
        return model.requires_grad_(False).eval()

    def save_pretrained(self, folder: Path, shards: int = 2) -> None:
        """config.json, shards and their index in the original's format, without adapters."""
        tensors = self.state_dict()
        names = [name for name in tensors if not name.startswith("adapters")]
        shard = {}
        for i, name in enumerate(names):
            shard[name] = f"model-{i * shards // len(names) + 1:05}-of-{shards:05}.safetensors"
        for file in sorted(set(shard.values())):
            part = {name: tensors[name] for name in names if shard[name] == file}
            files.write(folder / file, part)
        size = sum(tensors[name].nbytes for name in names)
        index = {"metadata": {"total_size": size}, "weight_map": shard}
        files.write(folder / "model.safetensors.index.json", index)
        # The last, so that it marks a whole folder.
        files.write(folder / "config.json", self.config)


# ---- 8. Adapters --------------------------------------------------------------------------------
class LoRA(nn.Module):
    """y -> y + (alpha / rank) B A dropout(x) for every adapted map, keyed "layer:map"; B is zero at
    first (huggingface/peft). In training it is float32: steps of 1e-6 vanish in bfloat16."""

    def __init__(self, config: dict, maps: list, rank: int, alpha: float, dropout=0.0, seed=0):
        super().__init__()
        known = bool(maps) and set(maps) <= MAPS.keys()
        check(known, f"LoRA: {maps} must name maps of a block: {', '.join(MAPS)}")
        fits = rank > 0 and 0 <= dropout < 1
        check(fits, f"LoRA: rank {rank} must be positive and dropout {dropout} in [0, 1)")
        self.maps = list(maps)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.base = ("", "")  # name and fingerprint of its base, as far as known
        generator = Generator().manual_seed(seed)  # on the CPU: all ranks start alike
        A, B = {}, {}
        for i in range(config["n_layers"]):
            for name in maps:
                outputs, inputs = map_shape(config, name)
                uniform = 2 * torch.rand(rank, inputs, generator=generator) - 1
                A[f"{i}:{name}"] = nn.Parameter(uniform * inputs**-0.5)
                B[f"{i}:{name}"] = nn.Parameter(torch.zeros(outputs, rank))
        self.A, self.B = nn.ParameterDict(A), nn.ParameterDict(B)

    def block(self, i: int) -> dict[str, tuple]:
        """What `low_rank` needs for the adapted maps of block i."""
        rest = (self.alpha / self.rank, self.dropout if self.training else 0.0)
        return {m: (self.A[f"{i}:{m}"], self.B[f"{i}:{m}"], *rest) for m in self.maps}

    def peft(self) -> dict[str, Tensor]:
        """The tensors under peft's names on the original model class."""
        tensors = {}
        for letter, factors in (("A", self.A), ("B", self.B)):
            for key, p in factors.items():
                place = f"base_model.model.model.transformer.blocks.{key.replace(':', '.')}"
                tensors[f"{place}.lora_{letter}.weight"] = p
        return tensors

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Takes over, in place, tensors under peft's names."""
        own = self.peft()
        fits = {k: p.shape for k, p in own.items()} == {k: t.shape for k, t in tensors.items()}
        check(fits, "the adapter does not fit the base model")
        for name, p in own.items():
            p.data.copy_(tensors[name])

    def save(self, folder: Path, base: str, base_print: str = "") -> None:
        """A PEFT folder; base is the checkpoint's name, base_print its `fingerprint`."""
        files.write(folder / "adapter_model.safetensors", self.peft(), {"base": base_print})
        config = files.PLAIN | {"task_type": "CAUSAL_LM", "inference_mode": True}
        config |= {"base_model_name_or_path": base, "r": self.rank}
        config |= {"lora_alpha": self.alpha, "lora_dropout": self.dropout}
        # A regex, as the bare name ff_out would also adapt the head.
        config["target_modules"] = rf".*blocks\.\d+\.({'|'.join(self.maps)})"
        files.write(folder / "adapter_config.json", config)

    @classmethod
    def load(cls, folder: Path, config: dict) -> "LoRA":
        """A PEFT folder that adapts nothing but a block's maps, by nothing but plain LoRA."""
        saved = files.read_json(Path(folder) / "adapter_config.json")
        files.check_peft_config(saved, f"{folder}/adapter_config.json")
        file = Path(folder) / "adapter_model.safetensors"
        tensors = dict(files.read_tensors(file))
        maps = [m for m in MAPS if any(f".{m}.lora_" in name for name in tensors)]
        check(bool(maps), f"{file} adapts none of {', '.join(MAPS)}")
        lora = cls(config, maps, saved["r"], saved["lora_alpha"], saved.get("lora_dropout", 0.0))
        with files.explained(str(file), ValueError):
            lora.fill(tensors)
        finite = all(bool(t.isfinite().all()) for t in tensors.values())
        check(finite, f"{file} has non-finite numbers; take another checkpoint")
        with safe_open(file, framework="pt") as opened:
            base_print = (opened.metadata() or {}).get("base", "")
        lora.base = (saved.get("base_model_name_or_path") or "", base_print)
        return lora.requires_grad_(False).eval()


def base_of(adapter: Path, model: str) -> Path:
    """The folder of the base that an adapter was made on; `model`, if given, must be that base."""
    name = files.read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or ""
    check(bool(model or name), f"{adapter} names no base model; add --model FOLDER")
    folder = files.locate(model or name)
    expected = load_adapter(adapter, folder).base[1]
    if not expected and model and name and model != name:  # peft's own know the name alone
        hint = f"set base_model_name_or_path in its adapter_config.json to {model} if they are one"
        check(Path(name).is_dir(), f"{adapter} was made on {name}, not on {model}; {hint}")
        same_content = files.fingerprint(Path(name)) == files.fingerprint(folder)
        check(same_content, f"{adapter} was made on {name}, {folder} is another model")
    return folder


def load_adapter(adapter: Path, base: Path) -> LoRA:
    """Refuses an adapter that was made on a base of other content, as far as it knows its own."""
    lora = LoRA.load(adapter, check_model_config(files.read_json(base / "config.json")))
    name, expected = lora.base
    if expected and os.environ.get("RANK", "0") == "0":  # one rank reads the whole base
        same_content = files.fingerprint(base) == expected
        hint = f"it was made on {name or 'another one'}"
        check(same_content, f"{adapter} does not belong to the base {base}: {hint}")
    return lora


def merge(base: Path, adapter: Path, out: Path) -> None:
    """W + (alpha / rank) B A, added in float32, rounded to the checkpoint's dtype, shard by shard,
    under the original names."""
    check(not out.exists(), f"{out} exists; merge writes a new folder")
    lora = load_adapter(adapter, base)
    places = {f"model.transformer.blocks.{k.replace(':', '.')}.weight": k for k in lora.A}
    half = out.with_name(f".half-{out.name}")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    for file in base.iterdir():  # config, index, tokenizer, remote code
        if file.suffix in (".json", ".py", ".txt", ".jinja"):
            shutil.copy(file, half)
    for file, names in tqdm(files.shard_names(base).items(), desc="merge", unit="shard"):
        tensors = dict(files.shard_tensors(base / file, names))
        for name in tensors.keys() & places.keys():
            key = places.pop(name)
            t = tensors[name]
            delta = lora.alpha / lora.rank * (lora.B[key] @ lora.A[key])
            fits = delta.shape == t.shape
            check(fits, f"{base / file}: {name} has not the shape that config.json asks for")
            tensors[name] = (t.float() + delta).to(t.dtype)
        files.write(half / file, tensors)
    lost = min(places, default="")
    check(not lost, f"{base} lacks {lost}, which the adapter changes; download it again")
    half.replace(out)


# ---- 9. Text in, text out -----------------------------------------------------------------------
class Text:
    """A checkpoint's tokenizer and chat template."""

    TURN = (
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer

        file = folder / "tokenizer.json"
        with files.explained(f"{file} is missing or is torn; copy it from the original checkpoint"):
            self.tokenizer = Tokenizer.from_file(str(file))
        self.chat = self.tokenizer.token_to_id("<|start_header_id|>") is not None  # not in Base
        eos = files.read_json(folder / "config.json").get("eos_token_id")
        ends = (eos, self.tokenizer.token_to_id("<|eot_id|>"))  # Base has but the first
        self.ends = [end for end in ends if end is not None]

    def prompt(self, text: str) -> list[int]:
        """One user turn and the assistant's header, or the bare text for a base model."""
        turn = self.TURN if self.chat else "{}"
        full = "<|startoftext|>" + turn.replace("{}", text.strip())
        return self.tokenizer.encode(full, add_special_tokens=False).ids

    def answer(self, ids: list[int]) -> str:
        """The reply up to the first EOS or end of turn."""
        reply = itertools.takewhile(lambda token: token not in self.ends, ids)
        return self.tokenizer.decode([*reply], skip_special_tokens=True)


def pad_left(prompts: list[list[int]], pad_id: int, device: Device = "cpu") -> Padded:
    """ids (B, P) and attention mask (B, P), None when nothing is padded: decided on the host."""
    width = max(map(len, prompts))
    pads = [width - len(prompt) for prompt in prompts]
    ids = [[pad_id] * n + prompt for n, prompt in zip(pads, prompts, strict=True)]
    mask = torch.arange(width) >= torch.tensor(pads)[:, None]
    return torch.tensor(ids, device=device), (mask.to(device) if any(pads) else None)


def canvas(ids: Tensor, pad: Tensor | None, xt: Tensor, where: Tensor) -> tuple:
    """The model's arguments for prompts (`pad_left`) with answers xt (B, L) and the positions
    `where` (B, L) whose logits are wanted."""
    visible = None if pad is None else F.pad(pad.bool(), (0, xt.shape[1]), value=True)
    return torch.cat([ids, xt], 1), visible, F.pad(where, (ids.shape[1], 0))


def reached(x1: Tensor, block: int, ends: Tensor) -> Tensor:
    """Where answers x1 (B, L) are in blocks that begin before their first end token; (B, L) bool.
    What stands behind neither earns a reward nor is seen from before it: decoding goes from left
    to right by blocks, and so does `mask_blockwise`."""
    ended = torch.isin(x1, ends).unflatten(1, (-1, block)).any(2).int()  # (B, blocks)
    return (ended.cumsum(1) - ended == 0).repeat_interleave(block, 1)


class Answering:
    """The model as `dtm.sample` asks it, behind fixed prompts (ids (B, P) and their mask). A row
    with an end token in an earlier block is not computed any more; it gets the first of `ends`.
    With a cache (NVlabs/Fast-dLLM) keys and values before the block (prefix), or on both sides
    (dual), are those of the block's first step: faster, and no draw from the model."""

    def __init__(self, model: Callable, prompts: Padded, block: int, ends: list[int], cache: str):
        self.model, self.block, self.cache = model, block, cache
        self.ids, self.pad = prompts
        self.ends = torch.tensor(ends, dtype=torch.long, device=self.ids.device)
        self.begin = -1  # of the block that `kept` belongs to
        self.kept = Cache(model.config["n_layers"]) if cache != "off" else None

    def __call__(self, yt: Tensor, where: Tensor) -> Tensor:
        """Answers yt (B, L) -> logits (M, V) at `where` (B, L), all in one block."""
        begin = int(where.any(0).int().argmax()) // self.block * self.block
        live = reached(yt, self.block, self.ends)[:, begin]  # (B,)
        if live.all():
            return self.computed(yt, where, live, begin)
        V = self.model.config["vocab_size"]
        logits = torch.full((int(where.sum()), V), -math.inf, device=yt.device)
        logits[:, self.ends[0]] = 0
        if live.any():
            found = self.computed(yt[live], where[live], live, begin)
            logits[live[:, None].expand_as(where)[where]] = found.float()
        return logits

    def computed(self, yt: Tensor, where: Tensor, live: Tensor, begin: int) -> Tensor:
        pad = None if self.pad is None else self.pad[live]
        more = {}
        if self.kept:
            P = self.ids.shape[1]
            stop = begin + self.block if self.cache == "dual" else yt.shape[1]
            new = begin != self.begin
            self.kept.span = slice(None) if new else slice(P + begin, P + stop)
            self.begin = begin
            more = {"cache": self.kept}
        logits = self.model(*canvas(self.ids[live], pad, yt, where), **more)
        check(logits.isfinite().all(), "the model's logits are not finite: damaged weights?")
        return logits


@torch.no_grad()
def generate(
    model: Callable,
    prompt_ids: Tensor,
    gen_length: int,
    block: int,
    steps: int,
    temperature: float = 0.0,
    attention_mask: Tensor | None = None,
    generator: Generator | None = None,
    order: str = "confidence",
    ban_mask: bool = False,
    ends: Sequence[int] = (),
    cache: str = "off",
) -> Tensor:
    """Prompts (B, P) int64, mask (B, P) -> ids (B, P + gen_length), in `steps` network evaluations
    and gen_length / block blocks. ML-GSAI/LLaDA generate.py (b7e6c35) without guidance, on
    `dtm.sample`. Differences: float32 confidence and noise, head at the block's masks only, a mask
    id in the prompt stays. `ban_mask` never draws the mask id; `order` as in `dtm.sample`; `ends`
    (none: the published behaviour) and `cache` (off, prefix, dual) as in `Answering`."""
    check_lengths(gen_length, block, steps)
    blocks = gen_length // block
    mask_id = model.config["mask_token_id"]
    pad = None if attention_mask is None or attention_mask.all() else attention_mask
    answering = Answering(model, (prompt_ids, pad), block, [*ends], cache)
    yt = prompt_ids.new_full((len(prompt_ids), gen_length), mask_id)
    how = (order, block, 1, temperature, generator, steps // blocks, ban_mask)
    *_, yt = dtm.sample(answering, yt, mask_id, *how)
    return torch.cat([prompt_ids, yt], 1)


def by_length(items: list[int], size: int, key: Callable) -> list[list[int]]:
    """Batches of near length: little padding, and none, hence no mask, where lengths are equal."""
    items = sorted(items, key=key)
    return [items[i : i + size] for i in range(0, len(items), size)]


def decode(
    model: LLaDA,
    text: Text,
    prompts: list,
    cfg: Config,
    generator: Generator,
    quiet=True,
    ban=False,
) -> Tensor:
    """Answers (N, gen_length) to N prompts, in their order, cfg.chunk of near length at once. ban:
    the mask id is never drawn."""
    device = generator.device
    x1 = torch.empty(len(prompts), cfg.gen_length, dtype=torch.long, device=device)
    parts = by_length(range(len(prompts)), cfg.chunk, key=lambda i: len(prompts[i]))
    size = (cfg.gen_length, cfg.block, cfg.steps, cfg.temperature)
    how = (cfg.order, ban, () if cfg.past_end else text.ends, cfg.cache)
    for part in tqdm(parts, "decoding", disable=quiet, leave=False):
        ids, pad = pad_left([prompts[i] for i in part], model.config["pad_token_id"], device)
        out = generate(model.eval(), ids, *size, pad, generator, *how)
        x1[part] = out[:, ids.shape[1] :]
    return x1


# ---- 10. Command line ---------------------------------------------------------------------------
def make_parser() -> argparse.ArgumentParser:
    """No abbreviations: eval's --h would otherwise be its --help."""
    parser = argparse.ArgumentParser(description="Discrete Tilt Matching on LLaDA.")
    actions = parser.add_subparsers(dest="action", required=True)

    def add_action(name: str, about: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=about, description=about, allow_abbrev=False)

    tune = add_action("train", "start a run, or go on with the one in --out (the default)")
    add_settings(tune, without=("test_data",))
    scores = add_action("eval", "score test rows at temperature 0, with the settings of the run")
    scores.add_argument("--adapter", type=Path, help="PEFT folder, such as RUN/best (none: base)")
    lengths = "answer lengths, tokens (the run's, and twice that)"
    scores.add_argument("--lengths", type=int, nargs="+", metavar="L", help=lengths)
    flags = ("task", "model", "out", "test_data", "chunk", "block", "steps", "cache")
    add_settings(scores, only=flags)
    whole = add_action("merge", "write a base model with an adapter merged in, as a checkpoint")
    whole.add_argument("folder", type=Path, metavar="OUT", help="new folder")
    whole.add_argument("--adapter", type=Path, required=True, help="PEFT folder, as RUN/best")
    whole.add_argument("--model", default="", help="its base (the one that the adapter names)")
    return parser


def add_settings(parser: argparse.ArgumentParser, only=(), without=(), own=None) -> None:
    """Flags for these settings, or for all, with every task's defaults or a script's own."""
    for f in fields(Config):
        if f.name in without or (only and f.name not in only):
            continue
        shown = str(f.default)
        for name, task in TASKS.items():
            if task.preset.get(f.name, f.default) != f.default:
                shown += f"; {name}: {task.preset[f.name]}"
        shown = str((own or {}).get(f.name, shown))
        kind = {"type": f.type, "metavar": "X"}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        flags = dict.fromkeys([f"--{f.name}", f"--{f.name.replace('_', '-')}"])
        text = f"{f.metadata['help']} [{shown}]".removesuffix(" []").replace("%", "%%")
        parser.add_argument(*flags, default=argparse.SUPPRESS, help=text, **kind)


def settings_of_run(adapter: Path, given: dict) -> dict:
    """How the run of an adapter (RUN/best, RUN/step-N/adapter) decoded, unless it had another task
    than is given."""
    saved = {}
    for folder in adapter.resolve().parents[:2]:
        if not saved and (folder / "config.json").is_file():
            saved = files.read_json(folder / "config.json")
    if given.get("task", saved.get("task")) != saved.get("task"):
        return {}
    names = saved.keys() & {"task", "gen_length", "block", "steps", "chunk"}
    return {name: saved[name] for name in names}


def evaluate_command(given: dict, adapter: Path | None, lengths: list[int] | None) -> None:
    """Scores of the test rows in OUT/eval.json, answers beside it."""
    if adapter:
        given["model"] = str(base_of(adapter, given.get("model", "")))
        given = settings_of_run(adapter, given) | given
        if "task" not in given and os.environ.get("RANK", "0") == "0":
            print(f"no run's config.json near {adapter}: its task is taken to be {Config.task}")
    place = adapter or f"runs/{given.get('task', Config.task)}-base"
    cfg = make_config(**{"out": f"{place}-eval", **given})
    lengths = lengths or [cfg.gen_length, 2 * cfg.gen_length]
    for length in lengths:
        check_lengths(length, cfg.block, length)
    rows = task_rows(cfg, "test")
    run = Run(cfg, Ranks(), rows, [])
    if TASKS[cfg.task].generated and not cfg.test_data:
        run.say("these test rows were generated here: no published table compares with them")
    if adapter:
        lora = LoRA.load(adapter, run.model.config)
        run.model.adapters["teacher"] = lora.to(run.ranks.device, run.ranks.dtype)
    table = {}
    for length in lengths:
        scores = evaluate(run, rows, length, run.out / f"eval-{length}.jsonl")
        if scores:
            table[length] = scores
            run.say(f"{cfg.task}, {length} tokens: {show(scores)}")
            name = str(adapter) if adapter else None
            found = {"model": cfg.model, "adapter": name, "cache": cfg.cache, "lengths": table}
            files.write(run.out / "eval.json", found)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["train", *argv]
    given = vars(make_parser().parse_args(argv))
    action = given.pop("action")
    if action == "merge":
        merge(base_of(given["adapter"], given["model"]), given["adapter"], given["folder"])
    elif action == "eval":
        evaluate_command(given, given.pop("adapter"), given.pop("lengths"))
    else:
        train(open_run(given, Ranks()))


if __name__ == "__main__":
    run_as_script(main)
