"""A stress campaign: kills, damaged files, hostile answers, extreme numbers, lost ranks, a soak.

    python -m tests.campaign            30 minutes on 2 cores; not collected by pytest
    python -m tests.campaign --quick    5 minutes; --size .4 lies between

The last results of each part lie in figures/campaign.json. What did not hold is listed there, and
the exit status is 1 if there is any. Runs are real processes of `llada_finetune.py train` with
the tiny base and task of loop_helpers.py; "equal" means every byte of the last two checkpoints and
of RUN/best, and the log without its seconds.
"""

import argparse
import functools
import itertools
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import Queue
from pathlib import Path
from queue import Empty

import torch
from tqdm import tqdm

import dtm
from figures import files
from tests import (
    campaign_answers,
    campaign_files,
    campaign_kills,
    campaign_ranks,
    campaign_soak,
    loop_helpers,
)
from tests.campaign_runs import ROOT, Part


# ---- Numbers ---------------------------------------------------------------------------------
def hold_finite(part: Part, name: str, call: Callable[[], object]) -> None:
    """A finite result, or a ValueError of one sentence."""
    try:
        result = torch.as_tensor(call(), dtype=torch.float64)
    except ValueError as error:
        said = str(error)
        part.hold(0 < len(said) < 300 and "\n" not in said, f"{name}: says {said!r:.200}")
    except Exception as error:
        part.hold(False, f"{name}: {error!r:.200}")
    else:
        finite = bool(result.isfinite().all())
        part.hold(finite, f"{name}: {result.flatten()[:4].tolist()}")


def reward_cases() -> Iterator[tuple[str, torch.Tensor]]:
    for top in (0.0, 1e-300, 1.0, 88.0, 700.0, 1e308, float("inf"), float("nan")):
        yield f"one {top}", torch.tensor([top], dtype=torch.float64)
        yield f"equal {top}", torch.full((5,), top, dtype=torch.float64)
        yield f"from -{top} to {top}", torch.linspace(-1, 1, 7).double() * top
        yield f"0 but one {top}", torch.eye(6)[0].double() * top
    yield "none", torch.tensor([])


def weights_and_steps(part: Part) -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    group = torch.tensor([3, 3, 1, 1, 1, 7, 7])
    for (name, r), dtype in itertools.product(reward_cases(), dtypes):
        r = r.to(dtype)
        for h, normalize in itertools.product((0.0, 1.0, -1.0, 700.0, 1e308), (False, True)):
            words = f"tilt_weight, {name}, {dtype}, h {h}, normalize {normalize}"
            call = (r, h, normalize, group[: len(r)] if normalize and len(r) % 2 else None)
            hold_finite(part, words, functools.partial(dtm.tilt_weight, *call))
        for ess, h in itertools.product((0.0, 1e-9, 0.5, 1.0), (0.0, 1.0, 700.0, 1e308)):
            words = f"next_h, {name}, {dtype}, ess {ess}, h_max {h}"
            hold_finite(part, words, functools.partial(dtm.next_h, r, ess, h))


def logit_cases(V: int, L: int, noise: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    plain = torch.randn(2, L, V, generator=noise)
    for scale in (0, 1, 700, 1e4, 1e30):
        yield f"scale {scale}", plain * scale
    for name, value in (("lowest", -3e38), ("-inf", -torch.inf), ("inf", torch.inf)):
        poisoned = plain.clone()
        poisoned[..., -1] = value
        yield f"last token {name}", poisoned
    yield "nan", plain * torch.nan


def numbers(part: Part, draw: random.Random, size: float) -> None:
    """Weights, steps and losses at the ends of their ranges."""
    weights_and_steps(part)
    noise = torch.Generator().manual_seed(draw.randrange(10**6))
    shapes = itertools.product((2, 126464), (1, 3) if size < 0.1 else (1, 3, 16))
    for V, L in shapes:
        for (name, logits), dtype in itertools.product(
            logit_cases(V, L, noise), (torch.bfloat16, torch.float16, torch.float32, torch.float64)
        ):
            logits_a = torch.randn(2, L, V, generator=noise).to(dtype)
            x1 = torch.randint(V - 1, (2, L), generator=noise)
            for w, c in itertools.product((0.0, 1.0, 1e30, torch.inf), (0.0, 1.0, torch.nan)):
                both = [("student", logits.to(dtype), logits_a)]
                both += [("teacher", logits_a, logits.to(dtype))]
                for which, *pair in both:
                    words = f"c_dtm_loss, {which} {name}, V {V}, L {L}, {dtype}, w {w}, c {c}"
                    call = (*pair, x1, w, c)
                    hold_finite(part, words, functools.partial(dtm.c_dtm_loss, *call))


# ---- The campaign -------------------------------------------------------------------------------
# What is tried at full size, and seconds of it on 2 cores that do nothing else: for the bar alone.
EXPECTED = {
    "answers": (886_000, 1700),
    "numbers": (8_600, 60),
    "kills": (520, 900),
    "damage": (125, 200),
    "ranks": (44, 200),
    "soak": (6, 0),
}
# Lanes run beside each other, a lane's parts one after the other. The last ones give way.
LANES = ((0, ("answers",)), (0, ("kills", "damage", "ranks", "numbers")), (10, ("soak",)))
CALLS = {
    "answers": campaign_answers.answers,
    "numbers": numbers,
    "kills": campaign_kills.kills,
    "damage": campaign_files.damage,
    "ranks": campaign_ranks.ranks,
    "soak": campaign_soak.soak,
}
OF_FUNCTIONS = ("answers", "numbers")  # the others start runs


def seconds_of(name: str, given: argparse.Namespace) -> float:
    return 60 * given.soak if name == "soak" else EXPECTED[name][1] * max(given.size, 0.05)


def run_lane(lane: tuple, given: argparse.Namespace, base: Path, queue: Queue) -> None:
    """The parts of a lane in a process of its own; lines, progress and rows go to the queue."""
    nice, names = lane
    os.nice(nice)
    torch.set_num_threads(1)
    for name in names:
        folder = base.parent / name
        folder.mkdir()
        tell = functools.partial(tell_of, queue, name)
        part = Part(round(EXPECTED[name][0] * given.size), tell)
        draw = random.Random(f"{given.seed} {name}")
        began = time.monotonic()
        size = given.soak if name == "soak" else given.size
        try:
            if name in OF_FUNCTIONS:
                CALLS[name](part, draw, size)
            else:
                CALLS[name](part, base, folder, draw, size)
        except Exception:
            part.hold(False, f"{name}: {traceback.format_exc()[-800:]}")
        seconds = round(time.monotonic() - began)
        queue.put((name, part.row() | {"seconds": seconds}))


def tell_of(queue: Queue, name: str, said: object) -> None:
    queue.put((name, said))


class Bar:
    """Minutes of the lane that has most of them left, by each part's share that is done."""

    def __init__(self, lanes: list[tuple], given: argparse.Namespace):
        self.seconds = {name: seconds_of(name, given) for _, names in lanes for name in names}
        self.lanes = [names for _, names in lanes]
        self.share = dict.fromkeys(self.seconds, 0.0)
        self.most = self.left()
        form = "{l_bar}{bar}| {elapsed}, about {remaining} left, {postfix}"
        self.bar = tqdm(total=round(self.most), bar_format=form, dynamic_ncols=True)

    def left(self) -> float:
        """Seconds, were the machine as fast as the one of EXPECTED."""
        lanes = []
        for names in self.lanes:
            lanes.append(sum(self.seconds[name] * (1 - self.share[name]) for name in names))
        return max(lanes)

    def move(self, name: str, share: float) -> None:
        self.share[name] = share
        self.bar.n = round(self.most - self.left())
        running = [f"{n} {x:.0%}" for n, x in self.share.items() if 0 < x < 1]
        self.bar.set_postfix_str(", ".join(running))


def results(lanes: list[tuple], given: argparse.Namespace, base: Path) -> Iterator[tuple]:
    """(name, row) of each part when it has ended."""
    queue = multiprocessing.Queue()
    bar = Bar(lanes, given)
    expected = {name for _, names in lanes for name in names}
    workers = {}
    for lane in lanes:
        worker = multiprocessing.Process(
            target=run_lane, args=(lane, given, base, queue), daemon=True
        )
        worker.start()
        workers |= dict.fromkeys(lane[1], worker)
    while expected:
        try:
            name, said = queue.get(timeout=5)
        except Empty:
            for name in [name for name in expected if not workers[name].is_alive()]:
                expected.remove(name)
                lost = {"failures": [f"{name}: its process ended"], "notes": {}}
                yield name, lost | {"tried": 1, "held": 0, "seconds": 0}
            continue
        if isinstance(said, str):
            tqdm.write(f"{name}: {said.strip()}")
        elif isinstance(said, float):
            bar.move(name, said)
        else:
            expected.remove(name)
            bar.move(name, 1.0)
            tqdm.write(line(name, said))
            yield name, said
    bar.bar.close()


def line(name: str, row: dict) -> str:
    failed = row["tried"] - row["held"]
    return f"{name:10}{row['tried']:10}{row['held']:10}{failed:8}{row['seconds']:9}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="as --size 0.015 --soak 0")
    parser.add_argument("--size", type=float, default=1.0, help="share of the full size")
    parser.add_argument("--soak", type=float, help="minutes of the soak (30 x size; 0: none)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=[*CALLS], default=[*CALLS])
    parser.add_argument("--out", type=Path, default=ROOT / "figures" / "campaign.json")
    given = parser.parse_args()
    given.size = 0.015 if given.quick else given.size
    if given.soak is None:
        given.soak = 0.0 if given.quick else 30 * given.size
    return given


def main() -> int:
    given = arguments()
    cores = len(os.sched_getaffinity(0))
    about = {"command": " ".join(["python -m tests.campaign", *sys.argv[1:]]), "seed": given.seed}
    about |= {"machine": f"{platform.platform()}, {cores} cores, root: {os.geteuid() == 0}"}
    about |= {"python": platform.python_version(), "torch": torch.__version__, "size": given.size}
    table = files.read_json(given.out) if given.out.is_file() else {}
    lanes = []
    for nice, names in LANES:
        names = [name for name in names if name in given.parts and (name != "soak" or given.soak)]
        lanes += [(nice, names)] if names else []
    failed = False
    print(f"{'part':10}{'tried':>10}{'held':>10}{'failed':>8}{'seconds':>9}", flush=True)
    with tempfile.TemporaryDirectory(prefix="campaign-") as name:
        for base in loop_helpers.small_base(Path(name, "base")):
            for part, row in results(lanes, given, base):
                failed |= row["tried"] > row["held"]
                table[part] = row | about
                files.write(given.out, table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
