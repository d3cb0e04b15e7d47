"""Where the seconds of the maze lab go: one seed, its base and the default arms, on one thread.

    python -m tests.bench_lab       3 minutes, or with --quick half a one; figures/bench_lab.json

Timed from outside: functions of the lab are replaced by ones that tell a clock. It runs for one
part at a time, so that the parts sum to the whole; inside a part no other is told apart, but the
backward pass in the optimiser's step. Nothing is compared: the released DTM code has no lab.

base       training it, its passes and steps     forward    the student's, in the arms
loss       (D3) and its mean over rows           backward   of that loss
optimiser  clipping and Adam                     tabulate   all states, for teacher and judge
rollouts   drawn from the teacher, and scored    variance   c, and what it learns
judge      exact laws and metrics                schedule   of h; rest: batches, masks, the loops
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import dtm
import maze_lab as lab
from tests.bench_helpers import about

PARTS = {  # what is timed, by class or module
    "base": [(lab, "train_base")],
    "forward": [(lab.MazeNet, "forward")],
    "loss": [(dtm, "row_mean")],  # and c_dtm_loss
    "backward": [(torch.Tensor, "backward")],
    "optimiser": [(lab, "take_step")],
    "tabulate": [(lab, "tabulate")],
    "rollouts": [(dtm, "sample"), (lab.Maze, "reward")],
    "variance": [(lab.LearnedC, "__call__"), (lab.LearnedC, "learn"), (lab.ScalarC, "learn")],
    "judge": [(lab.Judge, "__init__"), (lab.Judge, "measure")],
    "schedule": [(lab, "make_schedule"), (lab.PlannedSteps, "__call__")],
}


class Clock:
    """Puts itself into the lab's functions, and gives every second to the part that runs."""

    def __init__(self):
        self.seconds = Counter()
        self.part = "rest"
        self.since = time.perf_counter()
        for part, owners in PARTS.items():
            for owner, name in owners:
                setattr(owner, name, self.timed(part, getattr(owner, name)))
        lab.LOSSES["implicit"] = self.timed("loss", dtm.c_dtm_loss)

    def switch(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[self.part] += now - self.since
        self.part = part
        self.since = now

    def timed(self, part: str, function: Callable) -> Callable:
        def stand_in(*args, **kwargs):
            before = self.part
            if before not in ("rest", "optimiser"):
                return function(*args, **kwargs)
            self.switch(part)
            result = function(*args, **kwargs)
            if isinstance(result, Iterator):  # `sample` works while it is read
                result = list(result)
            self.switch(before)
            return result

        return stand_in

    def time_of(self, run: Callable, *args) -> tuple[object, dict[str, float]]:
        """What it returns, and its seconds by part."""
        self.switch("rest")
        self.seconds.clear()  # of what went before
        result = run(*args)
        self.switch("rest")
        return result, {part: self.seconds[part] for part in (*PARTS, "rest")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="its quick settings (default off)")
    parser.add_argument("--seed", type=int, default=0, help="seed of base and arms (default 0)")
    parser.add_argument("--out", type=Path, default="figures", help="folder (default figures)")
    args = parser.parse_args()
    if not 0 <= args.seed < 1000 or not args.out.is_dir():
        parser.error("--seed must be 0 to 999, --out a folder that exists")
    torch.set_num_threads(1)
    cfg = lab.Config(**lab.QUICK if args.quick else {})
    clock = Clock()
    base, seconds = clock.time_of(lab.run_base, cfg, args.seed, "cpu")
    runs = {"base": seconds}
    for arm in lab.MAIN:
        _, runs[arm.name] = clock.time_of(lab.run_arm, cfg, arm, base, "cpu")
    total = {part: sum(run[part] for run in runs.values()) for part in runs["base"]}
    whole = sum(total.values())
    shares = {part: spent / whole for part, spent in total.items()}
    for part, share in shares.items():
        print(f"{part:10}{total[part]:9.2f} s {share:7.3f}")
    print(f"{'whole':10}{whole:9.2f} s   1.000")
    result = {"seconds": whole, "shares": shares, "seconds_by_run": runs}
    lab.save_result(args.out / "bench_lab.json", about(seed=args.seed, **result))


if __name__ == "__main__":
    main()
