"""Collapse at sight: paths drawn from three models, `python -m figures.maze_gif`, 2 minutes.

Three arms of `maze_lab.py`, as it runs them on one seed: reward alone, one jump, annealed with a
learned c. Each panel unmasks paths in random order: a line where the moves from the start are
known, trails of the earlier paths behind it. One trail out of five is collapse.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Generator, Tensor
from tqdm import tqdm

import dtm
import maze_lab as lab
from maze_lab import MASK

EPISODES = 8
ARROWS = "↑→↓←·"
SHOWN = {
    "reward alone": lab.REWARD_ALONE,
    "one jump": lab.ONE_JUMP,
    "annealed, learned c": lab.LEARNED,
}


def train(maze: lab.Maze, base: lab.MazeNet, cfg: lab.Config, seed: int) -> Iterator[tuple]:
    """Yields the three models with their names."""
    judge = lab.Judge(maze, lab.tabulate(base, maze.L))
    for name, arm in SHOWN.items():
        schedule = lab.make_schedule(arm, cfg, judge)
        *_, phase = lab.tilt(base, maze, arm, cfg, schedule, seed)
        yield name, phase.student


def known_cells(maze: lab.Maze, xt: Tensor) -> list[tuple[int, int]]:
    """The cells, as (row, column), that the moves from the start lead through."""
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


def draw_path(axis, cells: list[tuple[int, int]], episode: int, **look) -> None:
    """Shifted a little by episode, so that trails on one another can be told apart."""
    shift = 0.04 * (episode - EPISODES / 2)
    axis.plot([j + shift for _, j in cells], [i + shift for i, _ in cells], **look)


def animate(
    maze: lab.Maze, episodes: dict[str, list[Tensor]], titles: dict[str, str], file
) -> None:
    """episodes: by model, the L + 1 states (EPISODES, L) of `dtm.sample`."""
    plt = lab.pyplot()
    from matplotlib.animation import FuncAnimation, PillowWriter

    figure, axes = plt.subplots(1, 3, figsize=(8.8, 3.4), layout="constrained")
    frames = maze.L + 3  # of an episode: its states, and two to rest

    def frame(number: int) -> None:
        episode, step = divmod(number, frames)
        for axis, (name, states) in zip(axes, episodes.items(), strict=True):
            axis.clear()
            draw_maze(axis, maze)
            for past in range(episode):
                cells = known_cells(maze, states[-1][past])
                draw_path(axis, cells, past, color=lab.COLOURS[6], lw=2.5, alpha=0.35)
            xt = states[min(step, maze.L)][episode]
            draw_path(axis, known_cells(maze, xt), episode, color=lab.COLOURS[1], lw=3)
            axis.set_title(titles[name], fontsize=10)
            axis.set_xlabel(" ".join(ARROWS[move] for move in xt), fontsize=13)

    movie = FuncAnimation(figure, frame, EPISODES * frames)
    lab.write(file, lambda half: movie.save(half, PillowWriter(fps=4), dpi=80))


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws OUT/maze.gif, on a CPU.")
    parser.add_argument("--seed", type=int, default=0, help="of base, models and paths (default 0)")
    parser.add_argument("--quick", action="store_true", help=f"a sketch: {lab.QUICK}")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="default figures")
    args = parser.parse_args()
    if not args.out.is_dir() or args.seed < 0:
        parser.error(f"--out {args.out} must be a folder and --seed {args.seed} not negative")
    torch.set_num_threads(1)
    cfg = lab.Config(**(lab.QUICK if args.quick else {}))
    maze = lab.make_maze(cfg)
    base = lab.train_base(maze, cfg, args.seed, "cpu")
    judge = lab.Judge(maze, lab.tabulate(base, maze.L))
    noise = Generator().manual_seed(args.seed)
    episodes, titles = {}, {}
    for name, model in tqdm(train(maze, base, cfg, args.seed), total=3, unit="model"):
        found = judge.measure(lab.tabulate(model, maze.L), cfg.a_end)
        modes = f"{found['modes']:.1f} of {found['target_modes']:.1f} paths"
        titles[name] = f"{name}\nsuccess {found['success']:.2f}, {modes}"
        blank = torch.full((EPISODES, maze.L), MASK)
        episodes[name] = list(dtm.sample(model, blank, MASK, generator=noise))
    print(*[title.replace("\n", ": ") for title in titles.values()], sep="\n")
    file = args.out / ("quick_maze.gif" if args.quick else "maze.gif")
    animate(maze, episodes, titles, file)
    print("wrote", file)


if __name__ == "__main__":
    main()
