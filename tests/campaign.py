"""A stress campaign: kills, damaged files, hostile answers, extreme numbers, ranks that die.

    python -m tests.campaign            25 minutes on 2 cores; not collected by pytest
    python -m tests.campaign --quick    3 minutes; --size .4 lies between

The last results of each part lie in figures/campaign.json. What did not hold is listed there, and
the exit status is 1 if there is any. Runs are real processes of `llada_finetune.py train` with
the tiny base and task of loop_helpers.py; "equal" means every byte of the last two checkpoints and
of RUN/best, and the log without its seconds.
"""

import argparse
import itertools
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import dtm
from figures import files
from tests import campaign_answers, campaign_runs, loop_helpers
from tests.campaign_runs import ROOT, Part


# ---- Numbers ---------------------------------------------------------------------------------
def hold_finite(part: Part, name: str, call: Callable[[], object]) -> None:
    """A finite result, or a ValueError of one sentence."""
    try:
        result = torch.as_tensor(call())
    except ValueError as error:
        said = str(error)
        part.hold(0 < len(said) < 300 and "\n" not in said, f"{name}: says {said!r:.200}")
    except Exception as error:
        part.hold(False, f"{name}: {error!r:.200}")
    else:
        part.hold(result.isfinite().all(), f"{name}: {result.flatten()[:4].tolist()}")


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
            hold_finite(part, words, lambda call=call: dtm.tilt_weight(*call))
        for ess, h in itertools.product((0.0, 1e-9, 0.5, 1.0), (0.0, 1.0, 700.0, 1e308)):
            words = f"next_h, {name}, {dtype}, ess {ess}, h_max {h}"
            hold_finite(part, words, lambda call=(r, ess, h): dtm.next_h(*call))


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
                    hold_finite(part, words, lambda call=call: dtm.c_dtm_loss(*call))


# ---- The campaign -------------------------------------------------------------------------------
OF_RUNS = {name: getattr(campaign_runs, name) for name in ("kills", "damage", "ranks")}
OF_FUNCTIONS = {"answers": campaign_answers.answers, "numbers": numbers}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="as --size 0.015")
    parser.add_argument("--size", type=float, default=1.0, help="share of the full size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--parts", nargs="+", choices=[*OF_RUNS, *OF_FUNCTIONS], default=[*OF_RUNS, *OF_FUNCTIONS]
    )
    parser.add_argument("--out", type=Path, default=ROOT / "figures" / "campaign.json")
    given = parser.parse_args()
    size = 0.015 if given.quick else given.size
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    about = {"command": " ".join(["python -m tests.campaign", *sys.argv[1:]]), "seed": given.seed}
    about |= {"machine": f"{platform.platform()}, {cores} cores, root: {os.geteuid() == 0}"}
    about |= {"python": platform.python_version(), "torch": torch.__version__, "size": size}
    table = files.read_json(given.out) if given.out.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="campaign-") as name:
        for base in loop_helpers.small_base(Path(name, "base")):
            for key in given.parts:
                print(f"{key} ...", flush=True)
                folder = Path(name, key)
                folder.mkdir()
                began = time.monotonic()
                part, draw = Part(), random.Random(f"{given.seed} {key}")
                if key in OF_RUNS:
                    OF_RUNS[key](part, base, folder, draw, size)
                else:
                    OF_FUNCTIONS[key](part, draw, size)
                seconds = {"seconds": round(time.monotonic() - began)}
                table[key] = vars(part) | seconds | about
                files.write(given.out, table)
    print(f"\n{'part':10}{'tried':>10}{'held':>10}{'failed':>8}{'seconds':>9}")
    for key, row in table.items():
        failed = row["tried"] - row["held"]
        print(f"{key:10}{row['tried']:10}{row['held']:10}{failed:8}{row['seconds']:9}")
    return any(row["failures"] for row in table.values())


if __name__ == "__main__":
    sys.exit(main())
