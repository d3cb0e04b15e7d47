"""Compare our scores of a model's outputs with the verdicts of another scorer.

    python -m figures.score_outputs llada_outputs.jsonl.gz --out figures/data/scores.json

The input is a .jsonl or .jsonl.gz file with one output per line: its `task`, its `length` in
tokens, its `text`, the `row` as the task takes it, and `d1`, the verdict of d1's scorer: whether
the text is right, or for Sudoku how many of the empty cells are. The shipped table was made from
3,210 public outputs of LLaDA-8B-Instruct in dllm-reasoning/d1 (eval/eval_baselines at 837888f,
every second one), which are not part of this project. It takes half a minute.
"""

import argparse
import gzip
import json
from importlib.metadata import version
from pathlib import Path

from llada.tasks import TASKS

COLUMNS = {
    "task": "task",
    "length": "tokens",
    "n": "n",
    "here": "right here",
    "d1": "right by d1's scorer",
    "lost": "lost",
    "won": "won",
}


def read_outputs(path: Path) -> list[dict]:
    """Return the outputs in a .jsonl or .jsonl.gz file."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def score(output: dict) -> tuple[int, int, int]:
    """Return how much of an output is right here, how much by d1's scorer, and how much there is.

    For Sudoku these are counts of empty cells; for other tasks the third number is 1.
    """
    task = TASKS[output["task"]]
    if task.cells:
        right, cells = task.cells(output["text"], output["row"])
        return right, output["d1"], cells
    return int(task.correct(output["text"], output["row"])), int(output["d1"]), 1


def make_table(outputs: list[dict]) -> list[dict]:
    """Return one row per task and length.

    `lost` counts the texts that get more from d1's scorer than here, `won` those that get less.
    """
    rows = {}
    for output in outputs:
        key = (output["task"], output["length"])
        row = rows.setdefault(key, dict(zip(COLUMNS, (*key, 0, 0, 0, 0, 0), strict=True)))
        here, d1, n = score(output)
        row["n"] += n
        row["here"] += here
        row["d1"] += d1
        row["lost"] += here < d1
        row["won"] += here > d1
    return [rows[key] for key in sorted(rows)]


def main(argv: list[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("file", type=Path, help="the outputs, in .jsonl or .jsonl.gz")
    parser.add_argument("--out", type=Path, help="a JSON file for the table")
    args = parser.parse_args(argv)
    table = make_table(read_outputs(args.file))
    print(f"| {' | '.join(COLUMNS.values())} |\n|{'---|' * len(COLUMNS)}")
    for row in table:
        print(f"| {' | '.join(str(row[name]) for name in COLUMNS)} |")
    if args.out:
        result = {
            "command": f"python -m figures.score_outputs {args.file.name}",
            "versions": {name: version(name) for name in ("math-verify", "sympy")},
            "table": table,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
