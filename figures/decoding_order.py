"""The order in which a path is unmasked is part of the law that it is drawn from.

    python -m figures.decoding_order --seeds 5     4 minutes on 2 cores

Left: runs whose rollouts are decoded in each order (`maze_lab.py --ablate sampler`). Right: the
exact law of each order for an exact teacher, one token a step: KL(rho_a || law). The JSON has its
success and its effective number of sequences, too.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import dtm
import maze_lab as lab
from figures.control_variate import SHARES, exact_teacher
from maze_lab import V


def state_choice(p: Tensor) -> Tensor:
    """`dtm.exact_marginal`'s choose, (n, k, V) both, for order="state", by certainty: the position
    of the highest top probability, then a draw there."""
    chosen = F.one_hot(p.amax(-1).argmax(-1), p.shape[1])  # (n, k)
    return p * chosen[..., None]


def confidence_choice(p: Tensor) -> Tensor:
    """For order="confidence": position i becomes v if it draws v, and all others draw tokens that
    are less likely than that."""
    k = p.shape[1]
    other, own = p[:, None, None], p[..., None, None]  # (n, 1, 1, k, V), (n, k, V, 1, 1)
    below = (other * (other < own)).sum(-1)  # (n, i, v, j): j draws something less likely
    itself = torch.eye(k, dtype=torch.bool, device=p.device)[:, None]
    return p * below.masked_fill(itself, 1).prod(-1)


CHOICES = {"random order": None, "by certainty": state_choice, "by confidence": confidence_choice}


def exact_teachers(judge: lab.Judge, a_end: float) -> list[dict]:
    """The law of each order at three tilts, with the posteriors of rho_a as the model."""
    L = judge.x.shape[1]
    points = []
    for a in [share * a_end for share in SHARES]:
        rho = dtm.exact_tilt(judge.rho_0, judge.r, a)
        teacher = exact_teacher(rho, L)
        for name, choose in CHOICES.items():
            law = dtm.exact_marginal(teacher, V, L, choose=choose)
            point = {"a": a, "arm": name, "kl": max(0.0, lab.kl(rho, law))}
            point["success"] = law[judge.optimal].sum().item()
            point["sequences"] = torch.special.entr(law).sum().exp().item()
            points.append(point)
    return points


def draw(result: dict, path: Path) -> Path:
    plt = lab.pyplot()
    figure, (runs, exact) = plt.subplots(1, 2, figsize=(8.8, 3.2), layout="constrained")
    arms = lab.by_arm(result)
    for place, (name, rows) in enumerate(arms.items()):
        colour = lab.COLOURS[place % len(lab.COLOURS)]
        mean, error = lab.mean_and_error(rows, "kl")
        runs.errorbar(place, mean, error, fmt="o", ms=8, capsize=4, color=colour)
        runs.plot([place] * len(rows), [row["kl"] for row in rows], ".", color=colour, alpha=0.5)
        runs.annotate(f"  {mean:.2f}", (place, mean), va="center", color=colour)
        points = [point for point in result["exact"] if point["arm"] == name]
        tilts = [point["a"] for point in points]
        distances = [point["kl"] for point in points]
        exact.plot(tilts, distances, "o-", color=colour)
        spot, lift = (tilts[-1], distances[-1]), (12, -4, 4)[place % 3]
        exact.annotate(f"  {name}", spot, (0, lift), textcoords="offset points", color=colour)
    runs.set_xticks(range(len(arms)), arms)
    runs.set(yscale="log", ylabel="final KL of the run, nats", xlim=(-0.5, len(arms) - 0.2))
    exact.set(
        xlabel="tilt a of an exact teacher, one seed", ylabel="KL(rho_a || law of the order), nats"
    )
    exact.set_xlim(right=1.6 * tilts[-1])
    ends = {name: lab.mean_and_error(rows, "kl")[0] for name, rows in arms.items()}
    worst, best = max(ends, key=ends.get), min(ends, key=ends.get)
    claim = f"Rollouts {worst} end {ends[worst]:.1f} nats away, {best} {ends[best]:.2f}"
    figure.suptitle(f"{claim}: the order is part of the law")
    return lab.save_figure(figure, path)


def main() -> None:
    parser = lab.make_parser("The law of each decoding order, and runs with such rollouts.")
    cfg, seeds, args = lab.read_settings(parser, preset={})
    file = args.out / ("quick_decoding_order.json" if args.quick else "decoding_order.json")
    if args.plot_only:
        lab.redraw(parser, args, draw)
        return
    result = lab.experiment(cfg, lab.ABLATIONS["sampler"], seeds, args)
    maze, net = lab.make_maze(cfg, seeds[0]), result["nets"][seeds[0]]
    judge = lab.Judge(maze, lab.tabulate(net, maze.L))
    result["exact"] = exact_teachers(judge, cfg.a_end)
    print(lab.format_table(result, lab.COLUMNS))
    for point in result["exact"]:
        print({key: round(v, 3) if isinstance(v, float) else v for key, v in point.items()})
    lab.save_result(file, result)
    print("wrote", file, draw(result, file.with_suffix(".png")))


if __name__ == "__main__":
    main()
