"""Rollouts: ours, what released code computes, and an earlier revision, in turn in one process.

    python -m tests.bench_rollout                          10 minutes on one core of a laptop
    python -m tests.bench_rollout --against FOLDER         also the checkout of another revision

The released sampler (ML-GSAI/LLaDA generate.py, as d1 and DTM use it) is written anew here: blocks,
norm and head at all positions, noise and softmax over all of the answer, positions ranked row by
row. Theirs runs in bfloat16 on a GPU, with noise in bfloat16 or float64; here all is float32.
"ended" counts an answer as ended at the first of 1 / 40 of all tokens, so that answers of a random
model fill about half of their length. Floors count products at the rate of a large one.
"""

import argparse
import math
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import llada_finetune as llada
from dtm import check
from figures import llada_cost
from maze_lab import save_result
from tests import bench_helpers as bench


@torch.no_grad()
def released_generate(model: llada.LLaDA, ids: Tensor, steps: int, temperature: float) -> Tensor:
    """Prompts (B, P) -> (B, P + ANSWER); noise by torch's own generator."""
    mask_id, P = model.config["mask_token_id"], ids.shape[1]
    x = F.pad(ids, (0, bench.ANSWER), value=mask_id)
    for start in range(P, P + bench.ANSWER, bench.BLOCK):
        stop = start + bench.BLOCK
        for _ in range(steps * bench.BLOCK // bench.ANSWER):
            logits = bench.released_logits(model, x, 0)
            noisy = logits
            if temperature > 0:
                noisy = logits.exp() / (-torch.rand_like(logits).log()) ** temperature
            token = noisy.argmax(-1)
            p = logits.softmax(-1).gather(-1, token[..., None])[..., 0]
            p[:, stop:] = -math.inf
            hidden = x == mask_id
            certainty = torch.where(hidden, p, -math.inf)
            for row in range(len(x)):
                k = bench.ANSWER // steps
                best = certainty[row].topk(k).indices
                x[row, best] = token[row, best]
    return x


def ours(module, model, ids: Tensor, cfg: llada.Config, **more) -> Tensor:
    size = (cfg.gen_length, cfg.block, cfg.steps, cfg.temperature)
    noise = Generator(ids.device).manual_seed(0)
    return module.generate(model.eval().use("teacher"), ids, *size, None, noise, **more)


def share_decoded(answers: Tensor, ends: list[int]) -> float:
    before = llada.reached(answers, bench.BLOCK, torch.tensor(ends, device=answers.device))
    return float(before.float().mean())


def main(argv: list[str] | None = None) -> None:
    parser = bench.make_parser("Rollouts, ours and others, in turn.", "bench_rollout.json")
    parser.add_argument("--rows", type=int, default=8, help="answers at once (default 8)")
    parser.add_argument("--steps", type=int, default=32, help="evaluations an answer (default 32)")
    args = parser.parse_args(argv)
    check(args.rows > 0, f"--rows {args.rows} must be positive")
    llada.check_lengths(bench.ANSWER, bench.BLOCK, args.steps)
    bench.prepare(args)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    save_result(args.out / "bench_rollout.json", bench.about(steps=args.steps, rows=rows))


def measure(args: argparse.Namespace, folder: Path) -> list[dict]:
    run = bench.make_run(llada, folder, steps=args.steps)
    cfg, model = run.cfg, run.model
    prompts = [run.buffer.prompt(row) for row in range(args.rows)]
    ids, _ = llada.pad_left(prompts, 0, run.ranks.device)
    ends = [*range(bench.SIZE["vocab_size"] // 40)]
    call = partial(ours, llada, model, ids, cfg)

    def released():
        torch.manual_seed(0)
        with bench.peft_products():
            released_generate(model.eval().use("teacher"), ids, cfg.steps, cfg.temperature)

    variants = {"released": released}
    if args.against:
        module = bench.load_earlier(args.against)
        before = bench.make_run(module, folder, steps=args.steps)
        variants["earlier revision"] = partial(ours, module, before.model, ids, before.cfg)
        same = torch.equal(variants["earlier revision"](), call())
        print("the same samples as the earlier revision:", same)
    whole, ended = call()[:, ids.shape[1] :], call(ends=ends)[:, ids.shape[1] :]
    reached = llada.reached(whole, cfg.block, torch.tensor(ends, device=ids.device))
    check(torch.equal(whole[reached], ended[reached]), "ended rows changed what stands before")
    decoded = share_decoded(whole, ends)
    rate = llada_cost.matmul_rate(run.ranks, 1024)
    floors = {}
    for name, cache, filled in (
        ("ours", "off", 1.0),
        ("ours, ended", "off", decoded),
        ("ours, cache prefix", "prefix", 1.0),
        ("ours, cache dual", "dual", 1.0),
    ):
        variants[name] = partial(call, cache=cache, ends=ends if filled < 1 else [])
        counted = replace(cfg, cache=cache)
        floors[name] = bench.floor_of_answers(counted, len(ids), filled, rate)
    found = bench.seconds_in_turn(variants, args.rounds, run.ranks.cuda)
    rows = bench.report(found, "earlier revision" if args.against else "released", floors)
    print(f"blocks decoded where answers end: {decoded:.2f}; products: {rate / 1e9:.0f} GFLOP/s")
    return rows + [{"decoded": decoded, "matmul_gflops": rate / 1e9}]


if __name__ == "__main__":
    llada.run_as_script(main)
