"""How many phases, and the regret bound along the way.

    python -m figures.phases --seeds 5     23 minutes on one core

Runs the arms of `maze_lab.py --ablate anneal`, and takes both sides of (D12) in every phase, from
the law of that phase's own teacher: phase_kl <= phase_bound, nats.
"""

from pathlib import Path

import torch

import dtm
import maze_lab as lab
from maze_lab import V

SHOWN = "K = 16"  # the run whose phases are drawn


def run_arm(cfg: lab.Config, arm: lab.Arm, base: dict, device: str) -> dict:
    """As `maze_lab.run_arm`, with both sides of (D12) in the trace."""
    return lab.run_arm(cfg, arm, base, device, look=both_sides)


def both_sides(phase: lab.Phase, judge: lab.Judge, arm: lab.Arm) -> dict:
    student = dtm.Table(phase.next_teacher.logits.cpu())
    rho = lab.law(phase.teacher)
    distance, bound = dtm.regret_bound(student, rho, judge.r, phase.h, V)
    return {"phase_kl": distance.item(), "phase_bound": bound.item()}


def along(rows: list[dict], key: str) -> list[float]:
    """The mean over seeds of a metric, phase by phase."""
    total = torch.zeros(len(rows[0]["trace"]), dtype=torch.float64)
    for row in rows:
        total += torch.tensor([record[key] for record in row["trace"]], dtype=torch.float64)
    return (total / len(rows)).tolist()


def draw(result: dict, path: Path) -> Path:
    plt = lab.pyplot()
    figure, (way, final) = plt.subplots(1, 2, figsize=(8.8, 3.6), layout="constrained")
    arms = lab.by_arm(result)
    tilts = along(arms[SHOWN], "a")
    lines = {
        "regret / Z": "phase_bound",
        "KL so far, to rho_a": "kl",
        "KL of the phase": "phase_kl",
    }
    for place, (name, key) in enumerate(lines.items()):
        values = along(arms[SHOWN], key)
        colour = lab.COLOURS[place]
        way.plot(tilts, values, "o-", ms=3, color=colour)
        middle = len(tilts) // 2
        spot = (tilts[middle], values[middle])
        way.annotate(name, spot, (0, 6), textcoords="offset points", color=colour)
    for arm, rows in arms.items():
        count = sum(len(row["trace"]) for row in rows) / len(rows)
        mean, error = lab.mean_and_error(rows, "kl")
        planned = arm.startswith("K = ")
        colour = lab.COLOURS[0] if planned else lab.COLOURS[1]
        final.errorbar(count, mean, error, fmt="o", color=colour, capsize=3)
        if not planned:
            below = {"textcoords": "offset points", "ha": "right", "va": "top"}
            final.annotate(arm, (count, mean), (-6, -6), color=colour, **below)
    way.set(yscale="log", xlabel="tilt a", ylabel="nats")
    way.set_title(f"{SHOWN}: a phase's KL and its bound (D12)", fontsize=10)
    final.set_xscale("log", base=2)
    final.set(yscale="log", xlabel="phases", ylabel="final KL to the target, nats")
    ends = {arm: lab.mean_and_error(rows, "kl")[0] for arm, rows in arms.items()}
    best = min(ends, key=ends.get)
    final.set_title("mean and s.e. of the seeds", fontsize=10)
    first = next(iter(ends))
    figure.suptitle(
        f"The final KL falls from {ends[first]:.2f} at {first} to {ends[best]:.2f} at {best}"
    )
    return lab.save_figure(figure, path)


def main() -> None:
    what = "Final KL against the number of phases, and the regret bound (D12)."
    parser = lab.make_parser(what, without=("phases",))
    cfg, seeds, args = lab.read_settings(parser, preset={})
    file = args.out / ("quick_phases.json" if args.quick else "phases.json")
    if args.plot_only:
        lab.redraw(parser, args, draw)
        return
    result = lab.experiment(cfg, lab.ABLATIONS["anneal"], seeds, args, run_arm)
    print(lab.format_table(result, lab.COLUMNS))
    lab.save_result(file, result)
    print("wrote", file, draw(result, file.with_suffix(".png")))


if __name__ == "__main__":
    main()
