"""How many phases does annealing need, and how tight is the regret bound along the way?

    python -m figures.phases --seeds 5     23 minutes on one core

This script runs the arms of `maze_lab.py --ablate anneal`. In every phase it also computes both
sides of the bound (D12) of dtm.py, from the exact distribution rho of that phase's own teacher:

    phase_kl     KL(rho_h || rho_theta), in nats, where rho_h is rho tilted by the increment h
    phase_bound  the regret over Z, which (D12) proves to be at least as large
"""

from pathlib import Path

import torch

import dtm
import maze_lab as lab
from figures import command
from figures.command import mean
from maze_lab import V

SHOWN = "K = 16"  # the arm whose phases are drawn


def run_arm(cfg: lab.Config, arm: lab.Arm, base: dict, device: str) -> dict:
    """Return the row of `maze_lab.run_arm`, with both sides of (D12) in its trace."""
    return lab.run_arm(cfg, arm, base, device, extra_metrics=both_sides)


def both_sides(phase: lab.Phase, evaluation: lab.ExactEvaluation, arm: lab.Arm) -> dict:
    student = dtm.Table(phase.next_teacher.logits.cpu())
    rho = lab.path_distribution(phase.teacher)
    distance, bound = dtm.regret_bound(student, rho, evaluation.r, phase.h, V)
    return {"phase_kl": distance.item(), "phase_bound": bound.item()}


def mean_trace(rows: list[dict], key: str) -> list[float]:
    """Return the mean of a metric over the seeds, phase by phase."""
    traces = [[record[key] for record in row["trace"]] for row in rows]
    return torch.tensor(traces, dtype=torch.float64).mean(0).tolist()


def title_of(result: dict) -> str:
    arms = lab.by_arm(result)
    one, sixteen = mean(arms["K = 1"], "kl"), mean(arms["K = 16"], "kl")
    return (
        f"One phase ends {one:.2f} nats from the target; sixteen phases end {sixteen:.2f} nats away"
    )


def draw(result: dict, path: Path) -> None:
    """Draw the phases of one arm on the left, and the final KL of every arm on the right."""
    figure, (run, final) = command.new_figure(columns=2, height=3.6)
    arms, colour = lab.by_arm(result), command.COLOURS["learned c"]
    tilts = mean_trace(arms[SHOWN], "a")
    middle = len(tilts) // 2
    lines = {
        "KL of all phases so far": ("kl", "o-", (0, 6)),
        "bound (D12) on the KL of one phase": ("phase_bound", "s--", (0, -26)),
        "KL of one phase": ("phase_kl", "^:", (52, 6)),
    }
    for name, (key, style, shift) in lines.items():
        values = mean_trace(arms[SHOWN], key)
        run.plot(tilts, values, style, ms=3, color=colour)
        spot = (tilts[middle], values[middle])
        run.annotate(name, spot, shift, textcoords="offset points", ha="center")
    for name, rows in arms.items():
        count = sum(len(row["trace"]) for row in rows) / len(rows)
        center, error = lab.mean_and_error(rows, "kl")
        style = {"fmt": "o", "ms": 6, "color": colour, "capsize": 3}
        if not name.startswith("K = "):
            style |= {"fmt": "D", "ms": 10, "mfc": "none"}
        final.errorbar(count, center, error, **style)
        if not name.startswith("K = "):
            below = {"textcoords": "offset points", "ha": "right", "va": "top"}
            final.annotate(name, (count, center), (-8, -2), **below)
    run.margins(y=0.12)
    run.set(yscale="log", xlabel="tilt a", ylabel="nats")
    run.set_title("The bound holds in every phase of the run with 16 phases", fontsize=10)
    final.set_xscale("log", base=2)
    final.xaxis.set_major_formatter("{x:g}")
    final.set(yscale="log", xlabel="number of phases", ylabel="final KL(target, model), nats")
    seeds = len(result["seeds"])
    final.set_title(f"Bars show the standard error over {seeds} seeds", fontsize=10)
    command.save_figure(figure, title_of(result), path)


def main(argv: list[str] | None = None) -> None:
    cfg, args = command.read_flags(command.make_parser(__doc__), argv, "phases")
    result = lab.experiment(cfg, lab.ABLATIONS["anneal"], args, run_arm)
    print(lab.format_table(result, lab.COLUMNS))
    command.save(result, args, draw)


if __name__ == "__main__":
    main()
