"""Replay uses the rollouts of earlier phases again; this compares it with fresh rollouts only.

    python -m figures.replay     10 random mazes; 25 minutes on 2 cores

All arms have a learned c and the same numbers of rollouts and gradient steps. The arm "replay"
differs from "learned c" in two ways: it uses the rollouts of earlier phases again (D13), and early
phases draw more of the rollouts than late ones. Two further arms differ in one of these ways only.
Each maze has one base model, from which all its runs start: three runs of "learned c" and of
"replay", and one run of each other arm. Runs differ in the noise of rollouts and batches.
"""

import argparse
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import maze_lab as lab
from figures import command
from figures.command import COLOURS

ARMS = (lab.LEARNED, lab.REPLAY)  # the figure has these
PARTS = (  # decay is the factor from the rollouts of a phase to those of the next, see phase_sizes
    replace(lab.LEARNED, name="more rollouts early, no replay", decay=lab.REPLAY.decay),
    replace(lab.REPLAY, name="replay, no extra rollouts early", decay=1.0),
)


@dataclass(frozen=True)
class Run(lab.Arm):
    """An arm with the number of the run; runs with other numbers have other noise."""

    run: int = 0


def run_of_arm(cfg: lab.Config, arm: Run, base: dict, device: str) -> dict:
    """Return the row of one run. Run 0 has the noise that `maze_lab.py --mazes` has."""
    seed = base["seed"] + 1000 * arm.run
    return lab.run_arm(cfg, arm, base, device, noise_seed=seed) | {"run": arm.run}


def by_maze(rows: list[dict], value) -> dict[int, float]:
    """Return for each maze the mean over its runs of value(row)."""
    mazes = sorted({row["seed"] for row in rows})
    return {
        maze: statistics.mean(value(row) for row in rows if row["seed"] == maze) for maze in mazes
    }


def divergence(row: dict) -> float:
    return row["kl"]


def kept(row: dict) -> float:
    """Return the effective number of shortest paths of a run, divided by the target's."""
    return row["modes"] / row["target_modes"]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return the mean over mazes and its standard error, NaN for a single maze."""
    many = len(values) > 1
    error = statistics.stdev(values) / len(values) ** 0.5 if many else float("nan")
    return statistics.mean(values), error


def table(result: dict) -> str:
    """Return a Markdown table with one line per maze, and the means."""
    arms = lab.by_arm(result)
    success = {base["seed"]: base["success"] for base in result["bases"]}
    columns = [by_maze(arms[arm.name], value) for value in (divergence, kept) for arm in ARMS]
    lines = [
        "| maze | base success | KL, learned c | KL, replay | kept, learned c | kept, replay |"
    ]
    lines += ["|---|--:|--:|--:|--:|--:|"]
    for maze in success:
        cells = [f"{column[maze]:.3f}" for column in columns]
        lines.append(f"| {maze} | {success[maze]:.5f} | {' | '.join(cells)} |")
    means = []
    for column in columns:
        means.append("{:.3f} ± {:.3f}".format(*mean_and_error([*column.values()])))
    return "\n".join([*lines, f"| mean | | {' | '.join(means)} |"])


def summary(result: dict) -> str:
    """Return a Markdown table with one line per arm: KL, and paths kept on the worst maze."""
    lines = ["| arm | runs per maze | KL(target, model) | kept, on the maze where it is lowest |"]
    lines += ["|---|--:|--:|--:|"]
    for name, rows in lab.by_arm(result).items():
        mean, error = mean_and_error([*by_maze(rows, divergence).values()])
        worst = min(by_maze(rows, kept).values())
        runs = len(rows) // len(result["bases"])
        lines.append(f"| {name} | {runs} | {mean:.3f} ± {error:.3f} | {worst:.2f} |")
    return "\n".join(lines)


def paired(result: dict) -> dict[str, float]:
    """Return how replay changes the KL: mean and error over mazes, and on how many it is lower."""
    arms = lab.by_arm(result)
    fresh, again = (by_maze(arms[arm.name], divergence) for arm in ARMS)
    changes = [again[maze] - fresh[maze] for maze in fresh]
    mean, error = mean_and_error(changes)
    lower = sum(change < 0 for change in changes)
    return {"mean": mean, "error": error, "lower": lower, "of": len(changes)}


def title_of(result: dict) -> str:
    """Return the claim of the figure."""
    arms = lab.by_arm(result)
    fresh, again = (by_maze(arms[arm.name], divergence).values() for arm in ARMS)
    lower = paired(result)
    return (
        f"Mean KL {statistics.mean(again):.2f} nats with replay and {statistics.mean(fresh):.2f} "
        f"without; replay is closer on {lower['lower']} of {lower['of']} mazes"
    )


def draw(result: dict, path: Path) -> None:
    """Draw the KL and the paths kept on each maze, without and with replay."""
    figure, panels = command.new_figure(columns=2, height=3.4)
    arms = lab.by_arm(result)
    order = sorted(result["bases"], key=lambda base: base["success"])
    place = {base["seed"]: i for i, base in enumerate(order)}
    labels = ("KL(target, model), nats", "share of the target's paths kept")
    for axis, value, label in zip(panels, (divergence, kept), labels, strict=True):
        for arm in ARMS:
            rows, colour = arms[arm.name], COLOURS[arm.name]
            xs = [place[row["seed"]] for row in rows]
            axis.plot(xs, [value(row) for row in rows], ".", color=colour, alpha=0.5)
            means = by_maze(rows, value)
            middle = [means[base["seed"]] for base in order]
            axis.plot(range(len(order)), middle, "o", ms=7, color=colour, label=arm.name)
        names = [f"{base['seed']}\n{base['success']:.0e}" for base in order]
        axis.set_xticks(range(len(order)), names, fontsize=7)
        axis.set(xlabel="maze, and how often its base model succeeds", ylabel=label)
    panels[0].set(yscale="log")
    panels[0].legend(frameon=False)
    panels[0].set_title("Small points are the runs", fontsize=10)
    panels[1].axhline(0.95, color="#999999", lw=1)
    panels[1].set_title("The line is at 95 %", fontsize=10)
    command.save_figure(figure, title_of(result), path)


def make_parser() -> argparse.ArgumentParser:
    parser = command.make_parser(__doc__)
    parser.set_defaults(seeds=10)
    text = "Run the two arms of the figure this many times on each maze (default 3)."
    parser.add_argument("--runs", type=int, default=3, help=text)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    cfg, args = command.read_flags(parser, argv, "replay")
    if args.runs < 1:
        parser.error(f"--runs {args.runs} must be at least 1.")
    cfg = replace(cfg, mazes=len(args.seeds))
    arms = [Run(**vars(arm), run=run) for arm in ARMS for run in range(args.runs)]
    arms += [Run(**vars(arm)) for arm in PARTS]
    result = lab.experiment(cfg, arms, args, run_of_arm)
    print(table(result))
    print(summary(result))
    print("KL with replay minus KL without:", paired(result))
    command.save(result, args, draw)


if __name__ == "__main__":
    main()
