"""Draw the pictures of the gallery again, from their JSON.

python -m figures.redraw                     every picture whose JSON is in figures/data
python -m figures.redraw --out runs/maze     those of your own runs
"""

import argparse
import json
from pathlib import Path

import maze_lab
from figures import antibody, control_variate, decoding_order, phases, replay, toy_llada
from figures.rivals import compare

DRAW = {
    "main": maze_lab.draw,
    "phases": phases.draw,
    "control_variate": control_variate.draw,
    "decoding_order": decoding_order.draw,
    "replay": replay.draw,
    "rivals": compare.draw,
    "antibody": antibody.draw,
    "toy": toy_llada.draw,
}


def main(argv: list[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    text = "Read DIR/data/NAME.json and write DIR/NAME.png (default figures)."
    parser.add_argument("--out", type=Path, default=Path("figures"), metavar="DIR", help=text)
    args = parser.parse_args(argv)
    for name, draw in DRAW.items():
        file = args.out / "data" / f"{name}.json"
        if file.exists():
            draw(json.loads(file.read_text()), args.out / f"{name}.png")
            print("The picture is", args.out / f"{name}.png")


if __name__ == "__main__":
    main()
