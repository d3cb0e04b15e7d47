"""Measure how much time the design saves, as ratios of processor time in one process.

    python -m tests.benchmark          3 minutes on one core; writes figures/data/benchmark.json

There are three comparisons:

loss      `dtm.c_dtm_loss` computes the loss at the masked positions, 16 of the 256 of a completion.
          The authors' code (github.com/yuyuanchen0/dtm, lightning_module.py, lines 465-488, commit
          901c244) computes it at all 256 with dense one-hot vectors and masks it afterwards; the
          dense form is written again here. A second row gives 16 positions to both. The vocabulary
          has 126,464 tokens, and the time includes the backward pass.
rollout   A completion is not decoded after the block of its end token. It is compared with one that
          is decoded to its full length. About one token in forty is an end token.
step      An optimizer step keeps its activations. It is compared with one that recomputes them.

Rollouts and steps use a LLaDA of 4 blocks of width 256, with prompts of 283 tokens and completions
of 64 tokens in blocks of 8: the proportions of Sudoku at the 8B size. All is in float32. The two
sides of a comparison run in turn, once per round after a first round that warms up. A ratio below
1 says that the first side is faster; the median and the quartiles are over the rounds.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

import llada_finetune as finetune
from dtm import c_dtm_loss, check
from figures import llada_cost, toy_llada
from llada.checkpoint import write_file
from llada.decoding import before_the_end, generate, pad_left
from llada.distributed import Ranks, run_as_script

V_8B, MASKED, ALL = 126_464, 16, 256
SIZE = toy_llada.SIZE | {"d_model": 256, "n_layers": 4, "mlp_hidden_size": 768}
SIZE |= {"vocab_size": 4096, "mask_token_id": 4095}
ENDS = [*range(SIZE["vocab_size"] // 40)]
SETTINGS = {"task": "bench", "prompts": 16, "refresh": 0, "refresh_steps": 0, "eval_rows": 0}
SETTINGS |= {"prompt_length": 283, "gen_length": 64, "block": 8, "steps": 8, "temperature": 1.0}
SETTINGS |= {"batch": 4, "accum": 1, "rank": 16, "alpha": 8.0}
Pair = tuple[Callable, Callable]


# ---- 1. The loss --------------------------------------------------------------------------------
def dense_loss(logits: Tensor, logits_a: Tensor, x1: Tensor, w: Tensor) -> Tensor:
    """Return the authors' form of (D3) with c = 1, one value per position."""
    target = logits_a.softmax(-1) + F.one_hot(x1, V_8B) * (w - 1)[:, None]
    return -(target * logits.log_softmax(-1)).sum(-1)


def loss_pair(positions: int, seed: int) -> Pair:
    """Return our loss at MASKED positions and the dense one at `positions`, on equal logits."""
    noise = Generator().manual_seed(seed)
    logits, change = torch.randn(2, positions, V_8B, generator=noise)
    x1 = torch.randint(V_8B, (positions,), generator=noise)
    w = torch.rand(positions, generator=noise).mul(3).exp()
    inputs = (logits, logits + change, x1, w)
    ours = partial(loss_and_gradient, c_dtm_loss, *[t[:MASKED].clone() for t in inputs])
    dense = partial(loss_and_gradient, dense_loss, *inputs)
    for mine, theirs in zip(ours(), dense(), strict=True):
        torch.testing.assert_close(mine, theirs[:MASKED], atol=1e-6, rtol=1e-4)
    return ours, dense


def loss_and_gradient(loss: Callable, logits: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    values = loss(logits.requires_grad_(), *rest)
    return values.detach(), torch.autograd.grad(values[:MASKED].mean(), logits)[0]


# ---- 2. Rollouts and steps ----------------------------------------------------------------------
def make_run(folder: Path, seed: int, recompute: bool) -> finetune.Run:
    """Return a run with random weights, adapters that are not zero, and random rollouts."""
    llada_cost.make_random_base(folder / "base", SIZE, Ranks())
    llada_cost.add_bench_task(SETTINGS["prompt_length"])
    out = folder / f"run-{recompute}"
    settings = {"model": str(folder / "base"), "out": str(out), "recompute": recompute}
    run = finetune.open_run(SETTINGS | settings, Ranks())
    noise = Generator().manual_seed(seed)
    for p in [*run.student.parameters(), *run.teacher.parameters()]:
        nn.init.normal_(p.data, std=0.02, generator=noise)
    count, length = run.cfg.prompts, run.cfg.gen_length
    x1 = torch.randint(2, 20, (count, length), generator=noise)
    r = torch.rand(count, generator=noise).double()
    run.buffer.data = {"row": torch.arange(count), "x1": x1, "r": r, "solved": r.round()}
    return run


def optimizer_step(run: finetune.Run) -> None:
    """Take one step as `llada_finetune.train` does, without its log."""
    run.student.train()
    for batch in run.buffer.micro_batches(a=0.0, h=1.0):
        at = finetune.trained_positions(run, batch)
        loss = c_dtm_loss(at.logits, at.logits_a, at.x1, at.w, at.c)
        ((at.share * loss).sum() / run.cfg.batch).backward()
    nn.utils.clip_grad_norm_(run.student.parameters(), run.cfg.clip)
    run.optimizer.step()
    run.optimizer.zero_grad()


def rollout_pair(run: finetune.Run, seed: int) -> tuple[Pair, float]:
    """Return rollouts with and without end tokens, and the share of blocks that the first decodes.

    ValueError if end tokens change what stands before them.
    """
    prompts, mask = pad_left([run.buffer.prompt(row) for row in range(4)], 0)
    cfg, length = run.cfg, run.cfg.gen_length
    model = run.model.eval().use("teacher")

    def roll_out(ends: list[int]) -> Tensor:
        noise = Generator().manual_seed(seed)
        how = {"temperature": 1.0, "attention_mask": mask, "generator": noise, "ends": ends}
        return generate(model, prompts, length, cfg.block, cfg.steps, **how)[:, -length:]

    complete, ended = roll_out([]), roll_out(ENDS)
    first = before_the_end(complete[:, : cfg.block], cfg.block, torch.tensor(ENDS))
    same = torch.equal(complete[:, : cfg.block][first], ended[:, : cfg.block][first])
    check(same, "end tokens changed the first block of a rollout")
    decoded = float(before_the_end(ended, cfg.block, torch.tensor(ENDS)).float().mean())
    return (partial(roll_out, ENDS), partial(roll_out, [])), decoded


# ---- 3. Ratios ----------------------------------------------------------------------------------
def compare(name: str, pair: Pair, rounds: int) -> dict:
    """Return and print the ratio of the processor times of the first and the second function."""
    seconds = []
    for _ in tqdm(range(rounds + 1), name, leave=False):
        clocks = [time.process_time()]
        for call in pair:
            call()
            clocks.append(time.process_time())
        seconds.append([clocks[1] - clocks[0], clocks[2] - clocks[1]])
    seconds = seconds[1:]  # the first round warms up
    low, median, high = statistics.quantiles([a / b for a, b in seconds], n=4, method="inclusive")
    print(f"{median:7.3f}  [{low:.3f}, {high:.3f}]  {name}", flush=True)
    return {"name": name, "median": median, "quartiles": [low, high], "seconds": seconds}


def main(argv: list[str] | None = None) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the ratios are of processor time
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=31, help="timed rounds (default: 31)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all inputs (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("figures/data"), help="folder of the JSON")
    args = parser.parse_args(argv)
    check(args.rounds > 1, f"--rounds {args.rounds} must be 2 or more")
    torch.set_num_threads(args.threads)
    ratios = []
    for positions in (ALL, MASKED):
        name = f"loss: {MASKED} masked positions, against the dense form at {positions}"
        ratios.append(compare(name, loss_pair(positions, args.seed), args.rounds))
    with tempfile.TemporaryDirectory() as folder:
        runs = [make_run(Path(folder), args.seed, recompute) for recompute in (False, True)]
        pair, decoded = rollout_pair(runs[0], args.seed)
        name = f"rollout: {decoded:.2f} of the blocks are decoded, against all"
        ratios.append(compare(name, pair, args.rounds))
        name = "step: activations are kept, against recomputed"
        pair = (partial(optimizer_step, runs[0]), partial(optimizer_step, runs[1]))
        ratios.append(compare(name, pair, args.rounds))
    words = sys.argv[1:] if argv is None else argv
    about = {"command": " ".join(["python -m tests.benchmark", *words]), "seed": args.seed}
    about |= {"rounds": args.rounds, "threads": args.threads, "torch": torch.__version__}
    about |= {"python": platform.python_version(), "ratios": ratios}
    write_file(args.out / "benchmark.json", about)


if __name__ == "__main__":
    run_as_script(main)
