"""What does a control variate do to the gradient, and what does that do to a run?

    python -m figures.control_variate --seeds 5     15 minutes on one core

The left panel shows the six arms of `maze_lab.py --ablate cv`: the final KL against the gradient
variance. The right panel shows the gradient variance against the increment h for an exact teacher,
the posteriors of rho_a, without any training.

THE METRIC `grad_var` is the variance of the logit gradient of (D3) in dtm.py, given the masked
state xt, at theta = teacher. It is computed by enumeration, divided by (E w)^2, and averaged over
states and positions. In a run it is also averaged over every fourth phase. Which state is drawn
varies, too, but no c can change that part, so it is left out.
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
from figures import command
from figures.command import COLOURS, mean
from maze_lab import MASK, V

INCREMENTS = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)  # the increments h of the right panel
SHARES = (0.0, 0.4, 0.8)  # the exact teachers stand at these shares of the way to A
LABELS = {  # the labels in the right panel: which point of the line, shift in points, alignment
    "c = 0": (0, (8, 5), "left"),
    "c = 0.5": (0, (8, 6), "left"),
    "c = 1": (1, (-6, 5), "right"),
    "c = 1, self-normalized": (-5, (36, 22), "right"),
    "best scalar c": (-5, (-4, 5), "right"),
    "learned c": (-5, (6, -12), "left"),
}


@torch.no_grad()
def gradient_variance(teacher: dtm.Table, rho: Tensor, w: Tensor, control: Callable) -> float:
    """Return grad_var, from the gradient (c - w)(e - pi_a) of (D3) at theta = teacher.

    rho, w   (V**L,)  the probability and the weight of every path
    control  returns c, a number or (M,), for states xt and a mask (V**L, L)
    """
    L = teacher.logits.shape[1]
    x1 = dtm.all_sequences(V, L)
    w = w.double()[:, None]
    total = 0.0
    for mask in dtm.all_sequences(2, L)[1:].bool():  # every set of masked positions
        k = int(mask.sum())
        xt = torch.where(mask, MASK, x1)
        c = control(xt, mask.expand_as(xt))
        c = c.cpu().double() if isinstance(c, Tensor) else torch.tensor(c, dtype=torch.float64)
        c = c.expand(len(x1) * k).view(len(x1), k)
        g = (c - w)[..., None] * prediction_error(teacher, x1, xt, mask)  # (V**L, k, V)
        # The variance given xt is E|g|^2 less the mean of |E[g | xt]|^2.
        state = dtm.state_number(xt, V).unique(return_inverse=True)[1]  # (V**L,)
        p = sum_by(state, rho)
        mean_g = sum_by(state, rho[:, None, None] * g)
        squares = (mean_g.square().sum((1, 2)) / p.clamp_min(1e-300)).sum()
        variance = rho @ g.square().sum((1, 2)) - squares
        total += variance.item() / (k * L * math.comb(L, k))
    return total / (rho @ w[:, 0]).item() ** 2


def prediction_error(teacher: dtm.Table, x1: Tensor, xt: Tensor, mask: Tensor) -> Tensor:
    """Return e - pi_a at the k positions of mask (L,), float64 (n, k, V)."""
    pi_a = teacher(xt)[:, mask].double().softmax(-1)
    return F.one_hot(x1[:, mask], V) - pi_a


def sum_by(index: Tensor, values: Tensor) -> Tensor:
    """Return a tensor whose row j is the sum of the values (n, ...) whose index is j."""
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
            error = prediction_error(teacher, x1, xt, mask)
            q = rho[:, None] * error.square().sum(-1)  # (V**L, k)
            number, state = dtm.state_number(xt, V).unique(return_inverse=True)
            best = sum_by(state, q * w.double()[:, None]) / sum_by(state, q).clamp_min(1e-300)
            self.table[number[:, None], mask.nonzero()[:, 0]] = best

    def __call__(self, xt: Tensor, mask: Tensor) -> Tensor:
        return self.table[dtm.state_number(xt, V)][mask]


def run_arm(cfg: lab.Config, arm: lab.Arm, base: dict, device: str) -> dict:
    """Return the row of `maze_lab.run_arm`, with grad_var from every fourth phase."""
    phases = itertools.count()

    def extra_metrics(phase: lab.Phase, evaluation: lab.ExactEvaluation, arm: lab.Arm) -> dict:
        return phase_variance(phase, evaluation, arm) if next(phases) % 4 == 0 else {}

    row = lab.run_arm(cfg, arm, base, device, extra_metrics=extra_metrics)
    variances = [record["grad_var"] for record in row["trace"] if "grad_var" in record]
    return row | {"grad_var": sum(variances) / len(variances)}


def phase_variance(phase: lab.Phase, evaluation: lab.ExactEvaluation, arm: lab.Arm) -> dict:
    """Return grad_var of a phase; the variance is computed on the CPU."""
    device = phase.x1.device
    w = dtm.tilt_weight(evaluation.r, phase.h)
    if arm.normalize:
        w = w / dtm.tilt_weight(phase.r, phase.h).mean().cpu()

    def control(xt: Tensor, mask: Tensor) -> Tensor | float:
        return phase.control(xt.to(device), mask.to(device))

    teacher = dtm.Table(phase.teacher.logits.cpu())
    rho = lab.path_distribution(phase.teacher)
    return {"grad_var": gradient_variance(teacher, rho, w, control)}


def exact_teacher(rho: Tensor, L: int) -> dtm.Table:
    """Return the posteriors of rho as a model.

    Where rho never reaches a state, its posterior is uniform. No probability is below 1e-30, so
    that the logits are finite.
    """
    pi = dtm.exact_posterior(rho, dtm.all_sequences(V + 1, L)).nan_to_num(1 / V)
    return dtm.Table(pi.clamp_min(1e-30).log()).requires_grad_(False)


def exact_teachers(evaluation: lab.ExactEvaluation, a_end: float) -> list[dict]:
    """Return grad_var of each arm for exact teachers at three tilts a and several h."""
    points = []
    for a in [share * a_end for share in SHARES]:
        rho = dtm.exact_tilt(evaluation.rho_0, evaluation.r, a)
        teacher = exact_teacher(rho, L=evaluation.x.shape[1])
        for h in INCREMENTS:
            for name, variance in variances_at(teacher, rho, evaluation.r, h).items():
                points.append({"a": a, "h": h, "arm": name, "grad_var": variance})
    return points


def variances_at(teacher: dtm.Table, rho: Tensor, r: Tensor, h: float) -> dict[str, float]:
    """Return grad_var of each arm at one increment h.

    For a number c the variance is a parabola in c, so three points determine all of it.
    """
    w = dtm.tilt_weight(r.double(), h)
    zero, half, one = [gradient_variance(teacher, rho, w, lab.FixedC(c)) for c in (0.0, 0.5, 1.0)]
    slope, bend = 4 * half - 3 * zero - one, 2 * zero - 4 * half + 2 * one
    mean_w = (rho @ w).item()  # c = 1 on self-normalized weights is c = E w on raw weights
    return {
        "c = 0": zero,
        "c = 0.5": half,
        "c = 1": one,
        "c = 1, self-normalized": zero + slope * mean_w + bend * mean_w**2,
        "best scalar c": zero - slope**2 / (4 * bend),
        "learned c": gradient_variance(teacher, rho, w, ExactBestC(teacher, rho, w)),
    }


def title_of(result: dict) -> str:
    arms = lab.by_arm(result)
    variance = mean(arms["c = 0"], "grad_var") / mean(arms["learned c"], "grad_var")
    before, after = mean(arms["c = 0"], "kl"), mean(arms["learned c"], "kl")
    claim = f"A learned c divides the gradient variance of c = 0 by {variance:.0f}"
    return f"{claim} and ends {after:.2f} instead of {before:.2f} nats from the target"


def draw(result: dict, path: Path) -> None:
    figure, (runs, exact) = command.new_figure(columns=2, height=3.6)
    last = max(point["a"] for point in result["exact"])
    for name, rows in lab.by_arm(result).items():
        colour = COLOURS[name]
        for row in rows:
            runs.plot(row["grad_var"], row["kl"], "o", ms=3, color=colour, alpha=0.5)
        center = (mean(rows, "grad_var"), mean(rows, "kl"))
        runs.plot(*center, "o", ms=9, color=colour)
        label = {"color": colour, "textcoords": "offset points"}
        shift = {"c = 1, self-normalized": (8, -2), "learned c": (8, -6)}.get(name, (8, 4))
        if name in ("c = 0.5", "c = 1"):  # The points of other arms are on the right of them.
            label["ha"], shift = "right", (-8, 4)
        runs.annotate(name.replace(", ", ",\n"), center, shift, **label)
        label.pop("ha", None)
        line = [p for p in result["exact"] if p["a"] == last and p["arm"] == name]
        exact.plot([p["h"] for p in line], [p["grad_var"] for p in line], ".-", color=colour)
        text = "best c(xt, i), by enumeration" if name == "learned c" else name
        point, shift, side = LABELS[name]
        spot = (line[point]["h"], line[point]["grad_var"])
        exact.annotate(text, spot, shift, ha=side, **label)
    runs.set(xscale="log", yscale="log", xlabel="gradient variance during the run")
    runs.set(ylabel="final KL(target, model), nats", xlim=(None, 1.2))
    runs.yaxis.set_major_formatter("{x:g}")
    runs.yaxis.set_minor_formatter("{x:.1g}")
    runs.set_title(f"Small points are the {len(result['seeds'])} seeds of each arm", fontsize=10)
    exact.set(xscale="log", yscale="log", xlabel="increment h", ylabel="gradient variance")
    exact.set_title(f"An exact teacher at a = {last:g} (one seed) shows why", fontsize=10)
    command.save_figure(figure, title_of(result), path)


def main(argv: list[str] | None = None) -> None:
    cfg, args = command.read_flags(command.make_parser(__doc__), argv, "control_variate")
    result = lab.experiment(cfg, lab.ABLATIONS["cv"], args, run_arm)
    seed = args.seeds[0]
    maze, net = lab.make_maze(cfg, seed), result["nets"][seed]
    evaluation = lab.ExactEvaluation(maze, lab.tabulate(net, maze.L))
    result["exact"] = exact_teachers(evaluation, cfg.a_end)
    print(lab.format_table(result, lab.COLUMNS | {"grad_var": "grad. variance"}))
    command.save(result, args, draw)


if __name__ == "__main__":
    main()
