"""DMPO (yuchen-zhu-zyc/DMPO 96af1a4) on LLaDA, beside the loop of `llada_finetune.py`.

    torchrun --nproc_per_node=8 -m figures.dmpo_llada --task countdown --out RUN

As published: rounds of 4 prompts x 16 answers over all ranks; their weights (D10) with alpha = .04
come from rewards and from likelihood bounds under the sampler and the base, and stay for the
round's 8 steps; each step takes the whole buffer, every answer at four fresh states, two masks and
their complements; AdamW is kept, its rate constant. Sudoku's reward is at most 1, DTM's is doubled.
Differences: sums in float32, base in bfloat16, LoRA on all seven maps, attention masks, no cache.
There the loss is a sum over answers and a mean over 8 ranks; here an eighth of the sum.
"""

import argparse
import contextlib
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llada_finetune as llada
from dtm import check
from figures import objectives
from figures.tasks import Sudoku

PROMPTS, ANSWERS, STEPS = 4, 16, 8  # of a round
ALPHA = 0.04
SETTINGS = {"a_end": 1000.0, "refresh": 0, "refresh_steps": 0, "steps_per_h": STEPS, "h": 1.0}
SETTINGS |= {"prompts": PROMPTS, "completions": ANSWERS, "batch": 4, "accum": 1, "c": "0"}
SETTINGS |= {"temperature": 0.2, "lr": 1e-6, "clip": 0.2, "ema": 0.0, "ess": 0.0}
SETTINGS |= {"past_end": True}
FLAGS = ("task", "model", "out", "seed", "data", "chunk", "gen_length", "block", "steps", "batch")
FLAGS += ("prompt_length", "lr", "clip", "weight_decay", "lora", "rank", "alpha", "dropout")
FLAGS += ("temperature", "order", "checkpointing", "eval_rows", "save_every")


def tune(run: llada.Run) -> None:
    """Rounds, counted by a, from wherever `run` stands; scores and checkpoints between rounds."""
    cfg, state = run.cfg, run.state
    student = llada.parallel(run.model, run.ranks)
    with run.saved_when_stopped():
        if not state.scored:
            llada.score_phase(run, None)
        run.keep_best()
        while state.a < cfg.a_end:
            begin_round(run)
            with run.progress_bar() as bar:
                for _ in range(STEPS):
                    optimiser_step(run, student)
                    bar.update()
            run.teacher.load_state_dict(run.student.state_dict())
            state.a += 1
            state.phase += 1
            run.mark()
            due = state.phase % max(1, cfg.save_every // STEPS) == 0
            if due or state.a >= cfg.a_end:
                state.scored = False
                llada.score_phase(run, None)
                run.save()
            run.ranks.stop_together()


def begin_round(run: llada.Run) -> None:
    """This rank's share of 64 answers, and their weights, which need whole groups."""
    buffer, ranks = run.buffer, run.ranks
    check(PROMPTS * ANSWERS % ranks.size == 0, f"64 answers do not split over {ranks.size} ranks")
    buffer.own = random.Random(run.cfg.seed).sample(range(len(buffer.rows)), len(buffer.rows))
    rows = [row for row in buffer.next_rows(PROMPTS) for _ in range(ANSWERS)]  # alike on all ranks
    share = slice(ranks.rank * len(rows) // ranks.size, (ranks.rank + 1) * len(rows) // ranks.size)
    buffer.data = buffer.answered(rows[share])
    if isinstance(llada.TASKS[run.cfg.task], Sudoku):
        buffer.data["r"] /= 2
    buffer.data |= bounds(run)
    groups = [buffer.everywhere(key).view(PROMPTS, ANSWERS) for key in ("r", "log_cur", "log_pre")]
    buffer.data["w"] = objectives.dmpo_weights(*groups, ALPHA).flatten()[share]
    run.state.h = 1.0
    run.lap("rollout")


@torch.no_grad()
def bounds(run: llada.Run) -> dict[str, Tensor]:
    """Bounds (D6) of the answers' log-likelihoods under the sampler (cur) and the base (pre), at
    the same four states."""
    x1, L = run.buffer.data["x1"], run.cfg.gen_length
    found = {"log_cur": torch.zeros(len(x1)).double(), "log_pre": torch.zeros(len(x1)).double()}
    for part in batches(run):
        for mask in antithetic_masks(x1[part], run):
            for key, adapter in (("log_cur", "teacher"), ("log_pre", None)):
                log = hidden_log(run, run.model.eval().use(adapter), part, mask)
                found[key][part] += (L * log / 4).double().cpu()
    return found


def antithetic_masks(x1: Tensor, run: llada.Run) -> Tensor:
    """Four masks (4, B, L), as in the lab."""
    return objectives.antithetic_masks(x1, run.generator, run.model.config["mask_token_id"])


def hidden_log(run: llada.Run, model: nn.Module, part: list[int], mask: Tensor) -> Tensor:
    """The mean log-probability (B,) of an answer's hidden tokens, 0 without any."""
    x1, mask_id = run.buffer.data["x1"][part], run.model.config["mask_token_id"]
    prompts = run.buffer.prompts(run.buffer.data["row"][part].tolist())
    logits = model(*llada.canvas(*prompts, torch.where(mask, mask_id, x1), mask)).float()
    log_p = -F.cross_entropy(logits, x1[mask], reduction="none")  # (M,)
    dense = torch.zeros(mask.shape, device=x1.device).masked_scatter(mask, log_p)  # (B, L)
    return dense.sum(1) / mask.sum(1).clamp_min(1)


def batches(run: llada.Run) -> list[list[int]]:
    lengths = [len(run.buffer.prompt(row)) for row in run.buffer.data["row"].tolist()]
    return llada.by_length(range(len(lengths)), run.batch, key=lengths.__getitem__)


def optimiser_step(run: llada.Run, student: nn.Module) -> None:
    """One step of AdamW on the whole buffer, each answer at four states."""
    ranks, data = run.ranks, run.buffer.data
    run.student.train()
    run.model.use("student")
    passes = []
    for part in batches(run):
        passes += [(part, mask) for mask in antithetic_masks(data["x1"][part], run)]
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    for i, (part, mask) in enumerate(passes):
        together = i + 1 == len(passes) or ranks.size == 1
        with contextlib.nullcontext() if together else student.no_sync():
            w = data["w"][part].float().to(ranks.device)
            loss = -(w * hidden_log(run, student, part, mask)).sum() / 4 * ranks.size / 8
            loss.backward()
        sums[0] += loss.detach() * run.cfg.batch  # the log has a mean
    norm = float(nn.utils.clip_grad_norm_(run.student.parameters(), run.cfg.clip))
    check(bool(sums.isfinite().all()), f"the loss is not finite at step {run.state.total + 1}")
    run.adam.step()
    run.adam.zero_grad()
    run.state.total += 1
    run.log_step(sums, grad_norm=norm, lr=run.cfg.lr)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="DMPO on LLaDA.", allow_abbrev=False)
    parser.add_argument(
        "--rounds", type=int, default=1000, help="rounds of 8 optimiser steps (default 1000)"
    )
    llada.add_settings(parser, only=FLAGS, own=SETTINGS | {"lr": "1e-6, constant"})
    given = vars(parser.parse_args(argv))
    tune(llada.open_run(SETTINGS | {"a_end": float(given.pop("rounds"))} | given, llada.Ranks()))


if __name__ == "__main__":
    llada.run_as_script(main)
