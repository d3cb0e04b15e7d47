"""The scripts in this folder share these flags, the end of a run, empty figures and colours.

A script calls `read_flags`, then `maze_lab.experiment`, then `save`. With `--out DIR` it writes
DIR/NAME.png and DIR/data/NAME.json; `--out figures` is how the shipped results were made.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure  # Pyplot could have a backend that a notebook has chosen.

import maze_lab as lab

# One colour per arm in every figure. Runs that differ in something else than c use the learned c.
COLOURS = {
    "c = 0": "#000000",
    "c = 0.5": "#D55E00",
    "c = 1": "#E69F00",
    "c = 1, self-normalized": "#56B4E9",
    "best scalar c": "#009E73",
    "learned c": "#CC79A7",
    "replay": "#117733",
    "random order": "#CC79A7",  # the order of all arms above
    "top-probability order": "#332288",
    "low-confidence remasking": "#882255",
    "rivals": "#0072B2",
}


def make_parser(docstring: str) -> argparse.ArgumentParser:
    """Return a parser with the flags of every script, described by the script's docstring."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=docstring, formatter_class=form)
    lab.add_run_flags(parser)
    return parser


def read_flags(
    parser: argparse.ArgumentParser, argv: list[str] | None, name: str
) -> tuple[lab.Config, argparse.Namespace]:
    """Return the settings and the flags. `args.name` is the name of the result."""
    args = parser.parse_args(argv)
    lab.complete_run_flags(parser, args)
    given = sys.argv[1:] if argv is None else argv
    args.command = " ".join([f"python -m figures.{name}", *given])
    args.name = f"quick_{name}" if args.quick else name
    return lab.Config(**(lab.QUICK if args.quick else {})), args


def save(result: dict, args: argparse.Namespace, draw: Callable | None = None) -> None:
    """Write the JSON of a result, and its picture if draw(result, path) is given."""
    print("The numbers are in", lab.save_result(args.out, args.name, result))
    if draw:
        draw(result, args.out / f"{args.name}.png")
        print("The picture is", args.out / f"{args.name}.png")


def new_figure(columns: int, height: float) -> tuple[Figure, list]:
    """Return an empty figure, 8.8 inches wide, and its axes from left to right."""
    figure = Figure(figsize=(8.8, height), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Figure, title: str, path: Path) -> None:
    """Write a figure with its title."""
    figure.suptitle(title, fontsize=11)
    lab.write_then_rename(path, lambda temporary: figure.savefig(temporary, dpi=200))


def mean(rows: list[dict], key: str) -> float:
    """Return the mean of a metric over the rows of an arm."""
    return lab.mean_and_error(rows, key)[0]
