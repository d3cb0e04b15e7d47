"""The small LLaDA's runs as one figure, `python -m figures.toy_llada`: draws toy.png from toy.json.

The runs, for SEED 0, 1, 2 (7 minutes each on 2 cores), and their JSON:

    python llada_finetune.py --toy --seed SEED --out runs/learned-SEED
    python llada_finetune.py --toy --seed SEED --c 1 --model runs/learned-SEED/base \\
        --out runs/one-SEED
    python llada_finetune.py --plot runs/learned-? runs/one-? --to figures/toy
"""

import argparse
import json
from pathlib import Path

import maze_lab as lab

NAMES = {"learned": "learned c", "1": "c = 1"}


def series(run: dict, key: str, kind: str, by: str) -> tuple[list[float], list[float]]:
    """A metric of one run's log: its records of a kind, `test` evaluations or `step`."""
    records = [e for e in run["log"] if key in e and e.get("split", e["kind"]) == kind]
    return [e[by] for e in records], [e[key] for e in records]


def draw(result: dict, path: Path) -> Path:
    """Left: test puzzles solved, phase by phase. Right: the gradient's norm along the run."""
    plt = lab.pyplot()
    figure, (solved, norm) = plt.subplots(1, 2, figsize=(8.8, 3.4), layout="constrained")
    ends = {}
    for place, (kind, name) in enumerate(NAMES.items()):
        colour = lab.COLOURS[4 - 3 * place]
        runs = [run for run in result["runs"] if run["settings"]["c"] == kind]
        for run in runs:
            phases, shares = series(run, "solved", "test", by="phase")
            solved.plot(phases, shares, "o-", ms=3, lw=1, color=colour)
            norm.plot(*series(run, "grad_norm", "step", by="total"), lw=0.6, color=colour)
            ends.setdefault(name, []).append((phases[-1], shares[-1]))
        x, y = ends[name][0]
        drop = 12 if place == 0 else -22
        solved.annotate(name, (x, y), (-40, drop), textcoords="offset points", color=colour)
    solved.set(xlabel="phase", ylabel="test puzzles solved", ylim=(0, 1.1))
    norm.set(yscale="log", xlabel="optimiser step", ylabel="gradient norm before clipping")
    figure.suptitle("A learned c quiets the gradient and solves more puzzles (3 seeds each)")
    return lab.save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws OUT/toy.png from OUT/toy.json.")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="default figures")
    args = parser.parse_args()
    file = args.out / "toy.json"
    if not file.exists():
        parser.error(f"no {file}: the head of figures/toy_llada.py says how to make it")
    print("wrote", draw(json.loads(file.read_text()), file.with_suffix(".png")))


if __name__ == "__main__":
    main()
