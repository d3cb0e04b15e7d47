"""Write explore.html, a page on which one moves the tilt of the maze, and c and h of the loss.

    python -m figures.explore                           read data/main.json, write explore.html
    python -m figures.explore --data FILE --out DIR     from another result, to another folder

The page is one file without dependencies, so that it opens from disk. It has the numbers of every
arm and seed of the main experiment after each phase. The template, explore_template.html, has the
drawing and the formulas; a test compares these with dtm.py.
"""

import argparse
import json
from pathlib import Path

import maze_lab as lab
from dtm import check
from llada.checkpoint import read_json, write_file
from llada.distributed import run_as_script

HERE = Path(__file__).parent
ABOUT = {
    lab.REWARD_ONLY.name: "This training maximises the reward and nothing else. It is not DTM and "
    "has no tilt; the slider shows how far the training has come.",
    lab.ONE_JUMP.name: "DTM in one step from tilt 0 to the end (ours). At smaller tilts the page "
    "shows the base model.",
    lab.C_0.name: "DTM in 16 steps without a control variate (c = 0).",
    lab.C_1.name: "DTM in 16 steps with c = 1, which the authors use.",
    lab.BEST_SCALAR.name: "DTM in 16 steps with the single value of c that minimises the variance "
    "(ours).",
    lab.LEARNED.name: "DTM in 16 steps with a c that a small network predicts (ours).",
    lab.REPLAY.name: "DTM in 16 steps with 0.8 times the learned c, where sequences that earlier "
    "models wrote are used again (ours).",
}
# The position of widget B is that of `python dtm.py`.
POSITION = {"pi": [0.4, 0.2, 0.2, 0.1, 0.1], "rewards": [0, 0, 1, 1, 2]}


def cells_of(maze: lab.Maze) -> list[list[tuple[int, int]]]:
    """Return for each shortest path the cells (row, column) that it visits, with the start."""
    return [[divmod(int(cell), maze.side) for cell in path] for path in maze.cells(maze.paths)]


def rounded(record: dict) -> dict:
    """Return what the page shows of a record of a trace."""
    numbers = {key: float(f"{record[key]:.5g}") for key in ("a", "kl", "success")}
    return numbers | {"paths": [float(f"{share:.4g}") for share in record["paths"]]}


def page_data(result: dict) -> dict:
    """Return the data of the page, from the JSON of `maze_lab.py` on one maze."""
    names = list(dict.fromkeys(row["arm"] for row in result["rows"]))
    runs = []
    for base in result["bases"]:
        own = {row["arm"]: row["trace"] for row in result["rows"] if row["seed"] == base["seed"]}
        traces = {name: [rounded(record) for record in own[name]] for name in names}
        start = {"seed": base["seed"], "walls": base["walls"], "paths": base["paths"]}
        more = {"success": base["success"], "rewards": base["reward_distribution"]}
        runs.append(start | more | {"traces": traces})
    config = lab.Config(**result["config"])
    phases = config.phases
    return {
        "arms": [{"name": name, "about": ABOUT.get(name, "")} for name in names],
        "tilts": [config.a_end * k / phases for k in range(phases + 1)],
        "paths": cells_of(lab.make_maze(config, result["seeds"][0])),
        "runs": runs,
        "position": POSITION,
    }


def main(argv: list[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    text = "Read this result of `python maze_lab.py` (default: figures/data/main.json)."
    parser.add_argument("--data", type=Path, default=HERE / "data" / "main.json", help=text)
    text = "Write explore.html to this folder (default: figures)."
    parser.add_argument("--out", type=Path, default=HERE, help=text)
    args = parser.parse_args(argv)
    result = read_json(args.data)
    check(not result["config"]["mazes"], f"{args.data} has many mazes; the page shows only one")
    data = json.dumps(page_data(result), separators=(",", ":"))
    page = (HERE / "explore_template.html").read_text().replace(">DATA<", f">{data}<")
    write_file(args.out / "explore.html", page)
    print("The page is", args.out / "explore.html")


if __name__ == "__main__":
    run_as_script(main)
