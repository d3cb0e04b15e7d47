"""What a control variate does to the gradient, and what that does to a run.

    python -m figures.control_variate --seeds 5     15 minutes on one core

Left: the six arms of `maze_lab.py --ablate cv`, final KL beside gradient variance. Right: the
variance against h for an exact teacher near the end of the way, by enumeration.

METRIC. grad_var is the variance over x1 of the logit gradient of (D3) at a given state and theta =
teacher, by enumeration, over (E w)^2; mean over states, positions and every fourth phase. The
variance over which state is drawn is left out: no c can move it.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import dtm
import maze_lab as lab
from maze_lab import MASK, V

INCREMENTS = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
SHARES = (0.0, 0.4, 0.8)  # of the way to A: where the exact teachers stand


@torch.no_grad()
def gradient_variance(teacher: dtm.Table, rho: Tensor, w: Tensor, control: Callable) -> float:
    """grad_var, from the gradient (c - w)(e - pi_a) of (D3) at theta = a. rho and w (V**L,) are law
    and weights of the sequences; control(xt, mask) says c, a number or (M,)."""
    L = teacher.logits.shape[1]
    x1 = dtm.all_sequences(V, L)
    w = w.double()[:, None]
    total = 0.0
    for mask in dtm.all_sequences(2, L)[1:].bool():  # every set of masked positions
        k = int(mask.sum())
        xt = torch.where(mask, MASK, x1)
        c = torch.as_tensor(control(xt, mask.expand_as(xt)), dtype=torch.float64, device="cpu")
        c = c.expand(len(x1) * k).view(len(x1), k)
        g = (c - w)[..., None] * error_of_guess(teacher, x1, xt, mask)  # (V**L, k, V)
        # E|g|^2, less |E[g | xt]|^2: what is left is the variance at a given state.
        state = dtm.state_number(xt, V).unique(return_inverse=True)[1]  # (V**L,)
        p = sum_by(state, rho)
        mean = sum_by(state, rho[:, None, None] * g)
        squares = (mean.square().sum((1, 2)) / p.clamp_min(1e-300)).sum()
        variance = rho @ g.square().sum((1, 2)) - squares
        total += variance.item() / (k * L * math.comb(L, k))
    return total / (rho @ w[:, 0]).item() ** 2


def error_of_guess(teacher: dtm.Table, x1: Tensor, xt: Tensor, mask: Tensor) -> Tensor:
    """e - pi_a at the k positions of mask (L,), float64 (n, k, V)."""
    pi_a = teacher(xt)[:, mask].double().softmax(-1)
    return F.one_hot(x1[:, mask], V) - pi_a


def sum_by(index: Tensor, values: Tensor) -> Tensor:
    """Row j holds the sum of the values (n, ...) whose index is j."""
    zeros = torch.zeros(int(index.max()) + 1, *values.shape[1:], dtype=values.dtype)
    return zeros.index_add(0, index, values)


class ExactBestC:
    """The best c(xt, i) of (D7) at theta = teacher, by enumeration."""

    def __init__(self, teacher: dtm.Table, rho: Tensor, w: Tensor):
        L = teacher.logits.shape[1]
        x1 = dtm.all_sequences(V, L)
        self.table = torch.ones((V + 1) ** L, L, dtype=torch.float64)  # (states, L)
        for mask in dtm.all_sequences(2, L)[1:].bool():
            xt = torch.where(mask, MASK, x1)
            q = rho[:, None] * error_of_guess(teacher, x1, xt, mask).square().sum(-1)  # (V**L, k)
            number, state = dtm.state_number(xt, V).unique(return_inverse=True)
            best = sum_by(state, q * w.double()[:, None]) / sum_by(state, q).clamp_min(1e-300)
            self.table[number[:, None], mask.nonzero()[:, 0]] = best

    def __call__(self, xt: Tensor, mask: Tensor) -> Tensor:
        return self.table[dtm.state_number(xt, V)][mask]


def run_arm(cfg: lab.Config, arm: lab.Arm, base: dict, device: str) -> dict:
    """As `maze_lab.run_arm`, with grad_var, taken in every fourth phase."""
    phases = itertools.count()

    def look(phase: lab.Phase, judge: lab.Judge, arm: lab.Arm) -> dict:
        return phase_variance(phase, judge, arm) if next(phases) % 4 == 0 else {}

    row = lab.run_arm(cfg, arm, base, device, look)
    variances = [record["grad_var"] for record in row["trace"] if "grad_var" in record]
    return row | {"grad_var": sum(variances) / len(variances)}


def phase_variance(phase: lab.Phase, judge: lab.Judge, arm: lab.Arm) -> dict:
    w = dtm.tilt_weight(judge.r, phase.h)
    if arm.normalize:
        w = w / dtm.tilt_weight(phase.r, phase.h).mean().cpu()
    teacher = dtm.Table(phase.teacher.logits.cpu())
    variance = gradient_variance(teacher, lab.law(phase.teacher), w, phase.control)
    return {"grad_var": variance}


def exact_teacher(rho: Tensor, L: int) -> dtm.Table:
    """The posteriors of the law rho as a model: a uniform guess where rho never comes, and no
    probability below 1e-30, so that logits are finite."""
    pi = dtm.exact_posterior(rho, dtm.all_sequences(V + 1, L)).nan_to_num(1 / V)
    return dtm.Table(pi.clamp_min(1e-30).log()).requires_grad_(False)


def exact_teachers(judge: lab.Judge, a_end: float, increments: tuple = INCREMENTS) -> list[dict]:
    """grad_var of each arm against h, at three tilts, with the posteriors of rho_a as teacher."""
    points = []
    for a in [share * a_end for share in SHARES]:
        rho = dtm.exact_tilt(judge.rho_0, judge.r, a)
        teacher = exact_teacher(rho, L=judge.x.shape[1])
        for h in increments:
            for name, variance in variances_at(teacher, rho, judge.r, h).items():
                points.append({"a": a, "h": h, "arm": name, "grad_var": variance})
    return points


def variances_at(teacher: dtm.Table, rho: Tensor, r: Tensor, h: float) -> dict[str, float]:
    """By arm. For a number c the variance is a parabola in c: three points tell all of it."""
    w = dtm.tilt_weight(r.double(), h)
    zero, half, one = [gradient_variance(teacher, rho, w, lab.FixedC(c)) for c in (0.0, 0.5, 1.0)]
    slope, bend = 4 * half - 3 * zero - one, 2 * zero - 4 * half + 2 * one
    mean = (rho @ w).item()  # c = 1 on normalised weights is c = E w on raw ones
    return {
        "c = 0": zero,
        "c = 0.5": half,
        "c = 1": one,
        "c = 1, w / mean": zero + slope * mean + bend * mean**2,
        "best scalar c": zero - slope**2 / (4 * bend),
        "learned c": gradient_variance(teacher, rho, w, ExactBestC(teacher, rho, w)),
    }


def draw(result: dict, path: Path) -> Path:
    plt = lab.pyplot()
    figure, (runs, exact) = plt.subplots(1, 2, figsize=(8.8, 3.6), layout="constrained")
    last = max(point["a"] for point in result["exact"])
    beside = {"textcoords": "offset points"}
    arms = lab.by_arm(result)
    for place, (name, rows) in enumerate(arms.items()):
        colour = lab.COLOURS[place % len(lab.COLOURS)]
        for row in rows:
            runs.plot(row["grad_var"], row["kl"], "o", ms=3, color=colour, alpha=0.5)
        centre = [lab.mean_and_error(rows, key)[0] for key in ("grad_var", "kl")]
        runs.plot(*centre, "o", ms=9, color=colour)
        runs.annotate(name, centre, (8, 4), **beside, color=colour)
        line = [p for p in result["exact"] if p["a"] == last and p["arm"] == name]
        exact.plot([p["h"] for p in line], [p["grad_var"] for p in line], ".-", color=colour)
        if name in ("c = 0", "c = 1", "learned c"):  # the others lie between
            start = (line[0]["h"], line[0]["grad_var"])
            label = "best c(xt, i)" if name == "learned c" else name
            exact.annotate(label, start, (12, -6), **beside, color=colour)
    runs.set(xscale="log", yscale="log", xlabel="gradient variance in the run")
    runs.set(ylabel="final KL to the target, nats", xlim=(None, 1.2))
    runs.yaxis.set_major_formatter("{x:g}")
    runs.yaxis.set_minor_formatter("{x:.1g}")
    exact.set(xscale="log", yscale="log", xlabel="tilt increment h", ylabel="gradient variance")
    exact.set_title(f"exact teacher and best c at a = {last:g}, one seed", fontsize=10)
    nearest = min(arms, key=lambda name: lab.mean_and_error(arms[name], "kl")[0])
    quietest = min(arms, key=lambda name: lab.mean_and_error(arms[name], "grad_var")[0])
    end = "ends nearest to the target" if nearest == quietest else f"'{nearest}' ends nearest"
    figure.suptitle(f"'{quietest}' has the least gradient variance, and {end}")
    return lab.save_figure(figure, path)


def main() -> None:
    parser = lab.make_parser("Gradient variance and final KL by control variate.")
    cfg, seeds, args = lab.read_settings(parser, preset={})
    file = args.out / ("quick_control_variate.json" if args.quick else "control_variate.json")
    if args.plot_only:
        lab.redraw(parser, args, draw)
        return
    if cfg.grid != 4:
        parser.error("the variance is enumerated on the 4 x 4 maze only: leave out --grid")
    result = lab.experiment(cfg, lab.ABLATIONS["cv"], seeds, args, run_arm)
    maze, net = lab.make_maze(cfg, seeds[0]), result["nets"][seeds[0]]
    judge = lab.Judge(maze, lab.tabulate(net, maze.L))
    increments = INCREMENTS[::3] if args.quick else INCREMENTS
    result["exact"] = exact_teachers(judge, cfg.a_end, increments)
    print(lab.format_table(result, lab.COLUMNS | {"grad_var": "grad. variance"}))
    lab.save_result(file, result)
    print("wrote", file, draw(result, file.with_suffix(".png")))


if __name__ == "__main__":
    main()
