"""Optimiser steps: ours, what released code computes, an earlier revision, in turn in one process.

    python -m tests.bench_step                          5 minutes on one core of a laptop
    python -m tests.bench_step --against FOLDER         also the checkout of another revision

A step takes 16 answers in passes of 4: teacher, student, loss, backward, AdamW. The released step
(DTM's lightning_module.py, 901c244) is written anew here: blocks and norm at all positions, logits
at all of the answer, LoRA in two products, activations recomputed, the target of the loss as a
tensor over the vocabulary. Theirs has a 4-bit base and bfloat16; here all is float32.
"half" means that answers end in the middle.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llada_finetune as llada
from dtm import mask_blockwise
from figures import llada_cost
from maze_lab import save_result
from tests import bench_helpers as bench


def released_step(run: llada.Run) -> None:
    """With c = 1, as published."""
    cfg, model = run.cfg, run.model
    drawn = run.buffer.draw(cfg.batch * cfg.accum)
    w = run.buffer.weights(run.state.h).float()
    run.student.train()
    with bench.peft_products():
        for i in range(0, len(drawn), cfg.batch):
            part = drawn[i : i + cfg.batch]
            (released_loss(run, part, w[part]) / cfg.accum).backward()
    nn.utils.clip_grad_norm_(run.student.parameters(), cfg.clip)
    run.adam.step()
    run.adam.zero_grad()
    model.use("teacher")


def released_loss(run: llada.Run, part: list[int], w: Tensor) -> Tensor:
    model, data = run.model, run.buffer.data
    x1 = data["x1"][part]
    mask_id = model.config["mask_token_id"]
    xt, mask = mask_blockwise(x1, mask_id, run.cfg.block, run.generator)
    prompts, _ = run.buffer.prompts(data["row"][part].tolist())
    ids, start = torch.cat([prompts, xt], 1), prompts.shape[1]
    with torch.no_grad():
        p_a = bench.released_logits(model.use("teacher"), ids, start).softmax(-1)
    log_p = bench.released_logits(model.use("student"), ids, start).log_softmax(-1)
    w = w[:, None, None]
    target = p_a + (w - 1) * F.one_hot(x1, log_p.shape[-1])
    loss = -(target * log_p).sum(-1)  # (B, L)
    return ((loss * mask).sum(1) / mask.sum(1)).mean()


def fill_at_random(run, share: float = 1.0) -> None:
    """Answers and rewards at random, which end after this share of their length."""
    answers = torch.randint(2, 20, (run.cfg.prompts, bench.ANSWER), generator=run.generator)
    answers[:, int(share * bench.ANSWER) :] = run.model.config["eos_token_id"]
    r = torch.rand(run.cfg.prompts, generator=run.generator).double()
    rows = torch.arange(run.cfg.prompts)
    run.buffer.data = {"row": rows, "x1": answers, "r": r, "solved": r.round()}
    run.state.h = 2.0
    run.out.mkdir(parents=True, exist_ok=True)


def main(argv: list[str] | None = None) -> None:
    parser = bench.make_parser("Optimiser steps, ours and others, in turn.", "bench_step.json")
    args = parser.parse_args(argv)
    bench.prepare(args)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    save_result(args.out / "bench_step.json", bench.about(rows=rows))


def measure(args: argparse.Namespace, folder: Path) -> list[dict]:
    released = bench.make_run(llada, folder, checkpointing="on")
    fill_at_random(released)
    variants = {"released": partial(released_step, released)}
    if args.against:
        module = bench.load_earlier(args.against)
        old = bench.make_run(module, folder)
        fill_at_random(old)
        variants["earlier revision"] = partial(module.optimiser_step, old, old.model)
    rate = llada_cost.matmul_rate(released.ranks, 1024)
    floors = {}
    for name, recompute, filled in (
        ("ours, recomputation", "on", 1.0),
        ("ours", "off", 1.0),
        ("ours, half", "off", 0.5),
    ):
        run = bench.make_run(llada, folder, checkpointing=recompute)
        fill_at_random(run, filled)
        variants[name] = partial(llada.optimiser_step, run, run.model)
        floors[name] = bench.floor_of_step(run.cfg, recompute == "on", filled, rate)
    found = bench.seconds_in_turn(variants, args.rounds, released.ranks.cuda)
    rows = bench.report(found, "earlier revision" if args.against else "released", floors)
    return rows + [{"matmul_gflops": rate / 1e9}]


if __name__ == "__main__":
    llada.run_as_script(main)
