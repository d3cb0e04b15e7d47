"""Replay reuses the rollouts of earlier phases; this compares it with fresh rollouts only.

    python -m figures.replay --seeds 10     10 random mazes; about 30 minutes on 2 cores

In all arms a network predicts c, the coefficient of the control variate, for each state and
position, and all have the same numbers of rollouts and gradient steps. The arm "replay" differs
from "learned c" in three ways: it reuses the rollouts of earlier phases, by (D13) of dtm.py; early
phases draw more of the rollouts than late ones; and the predicted c is multiplied by 0.8. The arm
"replay, all of c" has only the first two of these, and two further arms have one of them each.

Each maze has one base model, from which all its runs start. The first three arms have --runs runs
per maze, and the two further arms have one. Runs differ in the noise of rollouts and batches.
"""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import maze_lab as lab
from figures import command
from figures.command import COLOURS

ARMS = (lab.LEARNED, lab.REPLAY)  # the figure has these
# `decay` < 1 means that early phases draw more rollouts, see `phase_sizes`.
FURTHER_ARMS = (
    replace(lab.LEARNED, name="more rollouts early, no replay", decay=lab.REPLAY.decay),
    replace(lab.ALL_OF_C, name="replay, all of c, no extra rollouts early", decay=1.0),
)


@dataclass(frozen=True)
class Run(lab.Arm):
    """An arm with the number of the run; runs with different numbers use different noise."""

    run: int = 0


def run_of_arm(cfg: lab.Config, arm: Run, base: dict, device: str) -> dict:
    """Return the row of one run. Run 0 has the noise that `maze_lab.py --mazes` has."""
    seed = base["seed"] + 1000 * arm.run
    return lab.run_arm(cfg, arm, base, device, noise_seed=seed) | {"run": arm.run}


def by_maze(rows: list[dict]) -> dict[int, dict[str, float]]:
    """Return for each maze `kl` and `kept`, each a mean over the runs of an arm.

    `kept` is the effective number of shortest paths of a run, divided by the target's.
    """
    means = {}
    for maze in sorted({row["seed"] for row in rows}):
        runs = [row for row in rows if row["seed"] == maze]
        share = statistics.mean(row["modes"] / row["target_modes"] for row in runs)
        means[maze] = {"kl": statistics.mean(row["kl"] for row in runs), "kept": share}
    return means


def over_mazes(rows: list[dict], key: str) -> str:
    """Return the mean over mazes of a key of `by_maze` and its standard error."""
    return "{:.3f} ± {:.3f}".format(*lab.mean_and_error([*by_maze(rows).values()], key))


def table(result: dict) -> str:
    """Return a Markdown table with one line per maze, and the means."""
    arms = lab.by_arm(result)
    columns = [(arms[arm.name], key) for key in ("kl", "kept") for arm in ARMS]
    names = [f"{key}, {arm.name}" for key in ("KL", "kept") for arm in ARMS]
    lines = [f"| maze | base success | {' | '.join(names)} |", "|---|--:|--:|--:|--:|--:|"]
    for base in result["bases"]:
        cells = [f"{by_maze(rows)[base['seed']][key]:.3f}" for rows, key in columns]
        lines.append(f"| {base['seed']} | {base['success']:.5f} | {' | '.join(cells)} |")
    means = [over_mazes(rows, key) for rows, key in columns]
    return "\n".join([*lines, f"| mean | | {' | '.join(means)} |"])


def kl_parts(row: dict) -> dict[str, float]:
    """Divide KL(target, model) of a run into three parts that add up to it, by the chain rule.

    success   the KL between the probabilities that a path is a shortest one
    shortest  the KL between the distributions over the shortest paths, times the probability that
              the target gives to them together
    others    the same for all other paths
    """
    shares = torch.tensor([row["target_success"], row["success"]], dtype=torch.float64)
    target, model = torch.stack([shares, 1 - shares], 1)  # (2,) each: shortest paths, others
    success, shortest = lab.kl(target, model), row["target_success"] * row["kl_modes"]
    return {"success": success, "shortest": shortest, "others": row["kl"] - success - shortest}


def summary(result: dict) -> str:
    """Return a Markdown table with one line per arm: KL, its parts, and paths on the worst maze."""
    titles = ["arm", "runs per maze", "KL(target, model)", "part 1: shortest or not"]
    titles += ["part 2: which shortest path", "part 3: which other path"]
    titles += ["lowest share of paths kept on any maze"]
    lines = [f"| {' | '.join(titles)} |", "|---|" + "--:|" * 6]
    for name, rows in lab.by_arm(result).items():
        worst = min(means["kept"] for means in by_maze(rows).values())
        runs = len(rows) // len(result["bases"])
        divided = [kl_parts(row) for row in rows]
        parts = [f"{command.mean(divided, key):.3f}" for key in ("success", "shortest", "others")]
        cells = [name, str(runs), over_mazes(rows, "kl"), *parts, f"{worst:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def kl_differences(result: dict) -> list[dict[str, float]]:
    """Return for each maze, under the key kl, the KL with replay minus the KL without."""
    arms = lab.by_arm(result)
    fresh, again = (by_maze(arms[arm.name]) for arm in ARMS)
    return [{"kl": again[maze]["kl"] - fresh[maze]["kl"]} for maze in fresh]


def title_of(result: dict) -> str:
    """Return the claim of the figure."""
    arms = lab.by_arm(result)
    without, kl = (command.mean([*by_maze(arms[arm.name]).values()], "kl") for arm in ARMS)
    differences = kl_differences(result)
    closer = sum(change["kl"] < 0 for change in differences)
    return (
        f"Mean KL {kl:.2f} nats with replay, {without:.2f} without it; "
        f"closer on {closer} of {len(differences)} mazes"
    )


def draw(result: dict, path: Path) -> None:
    """Draw the KL and the paths kept on each maze, without and with replay."""
    figure, panels = command.new_figure(columns=2, height=3.4)
    arms = lab.by_arm(result)
    order = sorted(result["bases"], key=lambda base: base["success"])
    place = {base["seed"]: i for i, base in enumerate(order)}
    labels = {"kl": "KL(target, model), nats", "kept": "share of the target's paths kept"}
    for axis, (key, label) in zip(panels, labels.items(), strict=True):
        for arm in ARMS:
            rows, colour = arms[arm.name], COLOURS[arm.name]
            for row in rows:
                [run] = by_maze([row]).values()
                axis.plot(place[row["seed"]], run[key], ".", color=colour, alpha=0.5)
            means = by_maze(rows)
            middle = [means[base["seed"]][key] for base in order]
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


def main(argv: list[str] | None = None) -> None:
    parser = command.make_parser(__doc__)
    text = 'Run "learned c", "replay" and "replay, all of c" this many times per maze (default 3).'
    parser.add_argument("--runs", type=int, default=3, help=text)
    cfg, args = command.read_flags(parser, argv, "replay")
    if args.runs < 1:
        parser.error(f"--runs {args.runs} must be at least 1.")
    cfg = replace(cfg, mazes=len(args.seeds))
    arms = [Run(**vars(arm), run=run) for arm in (*ARMS, lab.ALL_OF_C) for run in range(args.runs)]
    arms += [Run(**vars(arm)) for arm in FURTHER_ARMS]
    result = lab.experiment(cfg, arms, args, run_of_arm)
    print(table(result))
    print(summary(result))
    mean, error = lab.mean_and_error(kl_differences(result), "kl")
    print(f"KL with replay minus KL without: {mean:.3f} +- {error:.3f}")
    command.save(result, args, draw)


if __name__ == "__main__":
    main()
