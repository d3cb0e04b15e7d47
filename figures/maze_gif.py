"""See collapse: paths drawn from three models that were trained on the same maze.

    python -m figures.maze_gif     2 minutes on one core

Three arms of `maze_lab.py` are trained on one seed: reward only, one jump, and annealing with a
learned c. Each panel then unmasks paths in random order. It draws a line as far as the moves from
the start are known, and leaves earlier paths behind it as trails. A model that has collapsed leaves
only one trail. The animation is written to OUT/maze.gif.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Generator, Tensor
from tqdm import tqdm

import dtm
import maze_lab as lab
from figures import command
from maze_lab import MASK

EPISODES = 8  # paths of each model
ARROWS = "↑→↓←·"  # by token; the dot stands for a mask
SHOWN = {
    "reward only": lab.REWARD_ONLY,
    "one jump": lab.ONE_JUMP,
    "annealing, learned c": lab.LEARNED,
}


def train(maze: lab.Maze, base: lab.MazeNet, cfg: lab.Config, seed: int) -> Iterator[tuple]:
    """Yield the name and the model of each panel."""
    for name, arm in SHOWN.items():
        schedule = lab.make_schedule(arm, cfg)
        *_, phase = lab.tilt(base, maze, arm=arm, cfg=cfg, choose_h=schedule, seed=seed)
        yield name, phase.student


def known_cells(maze: lab.Maze, xt: Tensor) -> list[tuple[int, int]]:
    """Return the cells (row, column) on the path xt (L,) until its first mask."""
    hidden = (xt == MASK).nonzero()
    known = int(hidden[0]) if len(hidden) else len(xt)
    cells = maze.cells(xt[None, :known])[0] if known else torch.zeros(1)
    return [divmod(int(cell), maze.n) for cell in cells]


def draw_maze(axis, maze: lab.Maze) -> None:
    axis.imshow(torch.tensor(maze.walls).numpy(), cmap="Greys", vmax=1.4)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(True)
    for letter, cell in (("S", 0), ("G", maze.n - 1)):
        axis.text(cell, cell, letter, ha="center", va="center", weight="bold")


def draw_path(axis, cells: list[tuple[int, int]], episode: int, **style) -> None:
    """Draw a line, shifted a little by the episode so that equal paths stay visible."""
    shift = 0.04 * (episode - EPISODES / 2)
    axis.plot([j + shift for _, j in cells], [i + shift for i, _ in cells], **style)


def animate(
    maze: lab.Maze, episodes: dict[str, list[Tensor]], titles: dict[str, str], file: Path
) -> None:
    """Write the animation. episodes: the L + 1 states (EPISODES, L) of `dtm.sample`, by model."""
    from matplotlib.animation import FuncAnimation, PillowWriter

    figure, axes = command.new_figure(columns=3, height=3.4)
    frames = maze.L + 3  # per episode: its states, and two frames to rest

    def draw_frame(number: int) -> None:
        episode, step = divmod(number, frames)
        for axis, (name, states) in zip(axes, episodes.items(), strict=True):
            axis.clear()
            draw_maze(axis, maze)
            for past in range(episode):
                cells = known_cells(maze, states[-1][past])
                draw_path(axis, cells, past, color="#0072B2", lw=2.5, alpha=0.35)
            xt = states[min(step, maze.L)][episode]
            draw_path(axis, known_cells(maze, xt), episode, color="#D55E00", lw=3)
            axis.set_title(titles[name], fontsize=10)
            axis.set_xlabel(" ".join(ARROWS[move] for move in xt), fontsize=13)

    movie = FuncAnimation(figure, draw_frame, EPISODES * frames)
    movie.save(file, PillowWriter(fps=4), dpi=80)


def main(argv: list[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    text = "Use this seed for the base model, the runs and the paths (default 0)."
    parser.add_argument("--seed", type=int, default=0, help=text)
    parser.add_argument("--quick", action="store_true", help="Train less, as a sketch.")
    text = "Write maze.gif to this folder (default runs/maze)."
    parser.add_argument("--out", type=Path, default=Path("runs/maze"), help=text)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    cfg = lab.Config(**(lab.QUICK if args.quick else {}))
    maze = lab.make_maze(cfg)
    base = lab.train_base(maze, cfg, args.seed, "cpu")
    evaluation = lab.ExactEvaluation(maze, lab.tabulate(base, maze.L))
    noise = Generator().manual_seed(args.seed)
    episodes, titles = {}, {}
    for name, model in tqdm(train(maze, base, cfg, args.seed), total=3, unit="model"):
        found = evaluation.measure(lab.tabulate(model, maze.L), cfg.a_end)
        kept = f"{found['modes']:.1f} of {found['target_modes']:.1f} paths"
        titles[name] = f"{name}\nsuccess {found['success']:.2f}, {kept}"
        blank = torch.full((EPISODES, maze.L), MASK)
        episodes[name] = list(dtm.sample(model, blank, MASK, generator=noise))
        print(titles[name].replace("\n", ": "))
    file = args.out / ("quick_maze.gif" if args.quick else "maze.gif")
    animate(maze, episodes, titles, file)
    print("The animation is", file)


if __name__ == "__main__":
    main()
