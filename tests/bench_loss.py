"""The loss of dtm.py against the formula of the released DTM code: time and memory.

    python -m tests.bench_loss              a minute on one thread; writes figures/bench_loss.json

Ours is `c_dtm_loss`. The release (yuyuanchen0/dtm, lightning_module.py l.465 to 488, 901c244) is
written again from its formula: a dense one-hot target of 8-byte integers beside the teacher's
softmax, times log_softmax, in float32 as under its autocast. Where we differ: it has logits at all
256 positions of an answer and masks the losses afterwards, we have them at the M trained ones, 16.5
on average. Three cases leave this out, both get the same M; in "1 of 16" the release gets 16
positions for each of ours. The network, which costs far more than either, is left out.

ratio       seconds of both passes, ours over the release's, in turn in one process, over the rounds
kept, peak  MiB that autograd keeps for the backward pass, each storage once; and on CUDA the most
floor       moving what no version can avoid, at the speed of a copy on this machine: M x V logits
            of student and teacher read forward and again backward, the gradient written
"""

import argparse
import functools
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator, Tensor

from dtm import c_dtm_loss
from maze_lab import save_result
from tests.bench_helpers import about, seconds_in_turn

CASES = {  # M, positions of the release, V
    "LLaDA, M = 16": (16, 16, 126_464),
    "LLaDA, M = 64": (64, 64, 126_464),
    "toy, M = 4096": (4096, 4096, 24),
    "LLaDA, 1 of 16": (16, 256, 126_464),
}
Side = Callable[[], tuple[Tensor, Tensor]]  # both passes: the mean loss and its gradient


def ours(logits: Tensor, logits_a: Tensor, x1: Tensor, hr: Tensor) -> Tensor:
    return c_dtm_loss(logits, logits_a, x1, hr.exp(), c=1.0)


def released(logits: Tensor, logits_a: Tensor, x1: Tensor, hr: Tensor, c: float = 1.0) -> Tensor:
    one_hot = torch.nn.functional.one_hot(x1, logits.shape[1])  # int64
    target = c * logits_a.float().softmax(-1) + one_hot * (1 - c + torch.expm1(hr))[:, None]
    return -(target * logits.float().log_softmax(-1)).sum(-1)


def make_sides(case: str, dtype: torch.dtype, device: str, seed: int) -> list[Side]:
    """Ours and the release's, on the same logits; the trained positions are the first M."""
    M, positions, V = CASES[case]
    noise = Generator(device).manual_seed(seed)
    student, change = torch.randn(2, positions, V, generator=noise, device=device)
    x1 = torch.randint(V, (positions,), generator=noise, device=device)
    hr = 3 * torch.rand(positions, generator=noise, device=device)
    every = ((2 * student).to(dtype), (2 * student + change).to(dtype), x1, hr)
    first = [t[:M].clone() for t in every]
    sides = ((ours, first), (released, every))
    return [functools.partial(both_passes, losses, M, *given) for losses, given in sides]


def both_passes(losses: Callable, M: int, logits: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    loss = losses(logits.requires_grad_(), *rest)[:M].mean()
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def check_agreement(name: str, sides: list[Side]) -> None:
    """Which also warms up. A gradient in bfloat16 has 8 bits."""
    (loss, gradient), (their_loss, their_gradient) = [side() for side in sides]
    bound = 1e-5 if gradient.dtype == torch.float32 else 1e-2
    untrained = their_gradient[len(gradient) :].abs().sum()
    gap = (gradient - their_gradient[: len(gradient)]).abs().max() / gradient.abs().max()
    if not (abs(loss / their_loss - 1) < 1e-5 and gap < bound and untrained == 0):
        sys.exit(f"{name}: the two differ, {loss:.7g} and {their_loss:.7g}, gradients by {gap:.0e}")


def memory(side: Side) -> tuple[int, int]:
    """Bytes kept for the backward pass, and at the peak, which CUDA alone knows."""
    kept = {}

    def note(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        side()
    return sum(kept.values()), torch.cuda.max_memory_allocated() - before


def measure(case: str, dtype: torch.dtype, device: str, args: argparse.Namespace) -> dict:
    name = f"{case}, {str(dtype)[6:]}, {device}"
    sides = make_sides(case, dtype, device, args.seed)
    check_agreement(name, sides)
    cuda = device == "cuda"
    times = seconds_in_turn(dict(enumerate(sides)), args.rounds, cuda)
    M, _, V = CASES[case]
    block = torch.zeros(2**26, dtype=torch.uint8, device=device)  # larger than a cache
    [copies] = seconds_in_turn({"copy": block.clone}, 9, cuda).values()
    speed = 2 * block.numel() / statistics.median(copies)  # bytes are read and written
    ratios = [ours / theirs for ours, theirs in zip(*times.values(), strict=True)]
    return {
        "case": name,
        "ratio": statistics.quantiles(ratios, n=4, method="inclusive"),
        "seconds": [statistics.median(side) for side in times.values()],
        "floor_seconds": 5 * M * V * dtype.itemsize / speed,
        "kept_and_peak_bytes": [*memory(sides[0]), *memory(sides[1])],
        "rounds": [*zip(*times.values(), strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=41, help="runs of each (default 41)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the logits (default 0)")
    parser.add_argument("--out", type=Path, default="figures", help="folder (default figures)")
    args = parser.parse_args()
    if args.rounds < 2 or not 0 <= args.seed < 1000 or not args.out.is_dir():
        parser.error("--rounds must be 2 or more, --seed 0 to 999, --out a folder that exists")
    torch.set_num_threads(1)
    rows = []
    print(f"{'':31}ratio (quartiles)       ours  released  floor, ms  kept, peak of ours, released")
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for place in itertools.product(CASES, (torch.float32, torch.bfloat16), devices):
        rows.append(measure(*place, args))
        low, middle, high = rows[-1]["ratio"]
        numbers = [1e3 * t for t in (*rows[-1]["seconds"], rows[-1]["floor_seconds"])]
        numbers += [size / 2**20 for size in rows[-1]["kept_and_peak_bytes"]]
        text = "".join(f"{number:10.2f}" for number in numbers)
        print(f"{rows[-1]['case']:31}{middle:.3f} ({low:.3f} to {high:.3f}){text}", flush=True)
    save_result(args.out / "bench_loss.json", about(seed=args.seed, rows=rows))


if __name__ == "__main__":
    main()
