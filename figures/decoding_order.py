"""The order in which a path is unmasked changes the distribution that it is drawn from.

    python -m figures.decoding_order --seeds 5     4 minutes on 2 cores

The left panel shows runs whose rollouts are decoded in each order (`maze_lab.py --ablate sampler`).
The right panel shows the exact distribution of the paths in each order, one token per step, if the
model is the exact posterior of rho_a: its KL from rho_a, without any training. The JSON also has
the success of that distribution and its effective number of sequences, e^entropy.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import dtm
import maze_lab as lab
from figures import command
from figures.command import COLOURS, mean
from figures.control_variate import SHARES, exact_teacher
from maze_lab import V


# ---- The exact distribution of an order, as the argument `choose` of dtm.exact_marginal ----------
def top_prob_choice(p: Tensor) -> Tensor:
    """Return the probabilities (n, k, V) of the next step in top-probability order.

    p (n, k, V) are the posteriors at the k masked positions. The position with the highest top
    probability is chosen, and a token is drawn there.
    """
    chosen = F.one_hot(p.amax(-1).argmax(-1), p.shape[1])  # (n, k)
    return p * chosen[..., None]


def low_confidence_choice(p: Tensor) -> Tensor:
    """Return the probabilities (n, k, V) of the next step in low-confidence remasking.

    p (n, k, V) are the posteriors at the k masked positions. A token is drawn at each position, and
    position i is chosen with its token v if all others drew tokens that are less likely than v.
    """
    k = p.shape[1]
    other, own = p[:, None, None], p[..., None, None]  # (n, 1, 1, k, V), (n, k, V, 1, 1)
    below = (other * (other < own)).sum(-1)  # (n, i, v, j): j draws something less likely
    itself = torch.eye(k, dtype=torch.bool, device=p.device)[:, None]
    return p * below.masked_fill(itself, 1).prod(-1)


CHOICES = {
    "random order": None,
    "top-probability order": top_prob_choice,
    "low-confidence remasking": low_confidence_choice,
}


def exact_teachers(evaluation: lab.ExactEvaluation, a_end: float) -> list[dict]:
    """Return what each order makes of exact teachers at three tilts."""
    L = evaluation.x.shape[1]
    points = []
    for a in [share * a_end for share in SHARES]:
        rho = dtm.exact_tilt(evaluation.rho_0, evaluation.r, a)
        teacher = exact_teacher(rho, L)
        for name, choose in CHOICES.items():
            drawn = dtm.exact_marginal(teacher, V, L, choose=choose)
            point = {"a": a, "arm": name, "kl": max(0.0, lab.kl(rho, drawn))}
            point["success"] = drawn[evaluation.shortest].sum().item()
            point["sequences"] = torch.special.entr(drawn).sum().exp().item()
            points.append(point)
    return points


def title_of(result: dict) -> str:
    ends = {name: mean(rows, "kl") for name, rows in lab.by_arm(result).items()}
    low, exact = ends["low-confidence remasking"], ends["random order"]
    claim = f"DTM on rollouts by low-confidence remasking ends {low:.1f} nats from the target;"
    return f"{claim}\nin random order it ends {exact:.2f} nats away"


def draw(result: dict, path: Path) -> None:
    figure, (runs, exact) = command.new_figure(columns=2, height=3.2)
    arms = lab.by_arm(result)
    for place, (name, rows) in enumerate(arms.items()):
        colour = COLOURS[name]
        center, error = lab.mean_and_error(rows, "kl")
        runs.errorbar(place, center, error, fmt="o", ms=8, capsize=4, color=colour)
        runs.plot([place] * len(rows), [row["kl"] for row in rows], ".", color=colour, alpha=0.5)
        runs.annotate(f"   {center:.2f}", (place, center), va="center", color=colour)
        points = [point for point in result["exact"] if point["arm"] == name]
        tilts, distances = [p["a"] for p in points], [p["kl"] for p in points]
        exact.plot(tilts, distances, "o-", color=colour)
        spot, shift = (tilts[1], distances[1]), (0, (18, 6, 8)[place])
        exact.annotate(name, spot, shift, textcoords="offset points", color=colour, ha="center")
    runs.set_xticks(range(len(arms)), [name.replace(" ", "\n", 1) for name in arms])
    runs.set(yscale="log", ylabel="final KL(target, model), nats", xlim=(-0.5, len(arms) - 0.2))
    runs.set_title(f"Small points are the {len(result['seeds'])} seeds", fontsize=10)
    exact.set(xlabel="tilt a", ylabel="KL(rho_a, paths drawn), nats")
    exact.margins(y=0.12)
    exact.set_title("The order changes even an exact model (one seed)", fontsize=10)
    command.save_figure(figure, title_of(result), path)


def main(argv: list[str] | None = None) -> None:
    cfg, args = command.read_flags(command.make_parser(__doc__), argv, "decoding_order")
    result = lab.experiment(cfg, lab.ABLATIONS["sampler"], args)
    seed = args.seeds[0]
    maze, net = lab.make_maze(cfg, seed), result["nets"][seed]
    evaluation = lab.ExactEvaluation(maze, lab.tabulate(net, maze.L))
    result["exact"] = exact_teachers(evaluation, cfg.a_end)
    print(lab.format_table(result, lab.COLUMNS))
    command.save(result, args, draw)


if __name__ == "__main__":
    main()
