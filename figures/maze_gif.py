"""See collapse: paths drawn from three models that were trained on the same maze.

    python -m figures.maze_gif     2 minutes on one core

Three arms of `maze_lab.py` are trained on one seed: reward only, one jump, and annealing with a
learned c. Each panel then unmasks paths in random order. It draws a segment of a path as soon as
both of its ends are known from the start, and leaves finished paths behind as trails, which are
darker where more paths passed. A model that has collapsed leaves only one trail. The last picture
stands still and gives the exact numbers of each model. The animation is written to OUT/maze.gif.
"""

import argparse
from pathlib import Path

import torch
from torch import Generator, Tensor
from tqdm import tqdm

import dtm
import maze_lab as lab
from figures import command
from maze_lab import MASK

ARMS = [lab.REWARD_ONLY, lab.ONE_JUMP, lab.LEARNED]
EPISODES = 8  # paths of each model
REST = 2  # frames for which a finished path is shown
STILL = 12  # frames of the last picture
PER_SECOND = 4  # frames
ARROWS = "↑→↓←·"  # one per token, with a dot for the mask


def known_cells(maze: lab.Maze, xt: Tensor) -> list[tuple[int, int]]:
    """Return the cells (row, column) on the path xt (L,) until its first mask."""
    hidden = (xt == MASK).nonzero()
    known = int(hidden[0]) if len(hidden) else len(xt)
    cells = maze.cells(xt[None, :known])[0] if known else torch.zeros(1)
    return [divmod(int(cell), maze.side) for cell in cells]


def draw_maze(axis, maze: lab.Maze) -> None:
    """Draw the walls, the start S and the goal G."""
    axis.imshow(torch.tensor(maze.walls).numpy(), cmap="Greys", vmax=1.4)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(True)
    for letter, cell in (("S", 0), ("G", maze.side - 1)):
        axis.text(cell, cell, letter, ha="center", va="center", weight="bold")


def draw_path(axis, cells: list[tuple[int, int]], **style) -> None:
    """Draw a line through the centres of the cells."""
    axis.plot([column for _, column in cells], [row for row, _ in cells], **style)


def animate(
    maze: lab.Maze, episodes: dict[str, list[Tensor]], numbers: dict[str, str], file: Path
) -> None:
    """Write the animation.

    episodes  the L + 1 states (EPISODES, L) of `dtm.sample`, by model
    numbers   what the last picture says about each model
    """
    from matplotlib.animation import FuncAnimation, PillowWriter

    figure, axes = command.new_figure(columns=len(episodes), height=3.4)
    frames = maze.L + 1 + REST  # per episode

    def draw_frame(number: int) -> None:
        episode, step = divmod(number, frames)
        for axis, (name, states) in zip(axes, episodes.items(), strict=True):
            axis.clear()
            draw_maze(axis, maze)
            axis.set_title(name, fontsize=12)
            for path in states[-1][:episode]:
                draw_path(axis, known_cells(maze, path), color="#0072B2", lw=4, alpha=0.3)
            if episode < EPISODES:
                xt = states[min(step, maze.L)][episode]
                draw_path(axis, known_cells(maze, xt), color="#D55E00", lw=3)
                axis.set_xlabel(" ".join(ARROWS[move] for move in xt), fontsize=13)
            else:
                axis.set_xlabel(numbers[name], fontsize=11)

    movie = FuncAnimation(figure, draw_frame, EPISODES * frames + STILL)
    writer = PillowWriter(fps=PER_SECOND)
    lab.write_then_rename(file, lambda temporary: movie.save(temporary, writer, dpi=80))


def main(argv: list[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    text = "Use this seed for the base model, the runs and the paths (default 0)."
    parser.add_argument("--seed", type=int, default=0, help=text)
    parser.add_argument("--quick", action="store_true", help="Train less, as a sketch.")
    text = "Write maze.gif to this folder (default runs/maze)."
    parser.add_argument("--out", type=Path, default=Path("runs/maze"), help=text)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)  # A folder that cannot be made fails at once.
    torch.set_num_threads(1)
    cfg = lab.Config(**(lab.QUICK if args.quick else {}))
    maze = lab.make_maze(cfg)
    base = lab.train_base(maze, cfg, args.seed, "cpu")
    evaluation = lab.ExactEvaluation(maze, lab.tabulate(base, maze.L))
    noise = Generator().manual_seed(args.seed)
    episodes, numbers = {}, {}
    for arm in tqdm(ARMS, unit="model"):
        schedule = lab.make_schedule(arm, cfg)
        *_, last = lab.tilt(base, maze, arm=arm, cfg=cfg, choose_h=schedule, seed=args.seed)
        found = evaluation.measure(last.next_teacher, cfg.a_end)
        kept = f"{found['modes']:.1f} of {found['target_modes']:.1f} paths kept"
        numbers[arm.name] = f"success {found['success']:.2f}, {kept}"
        blank = torch.full((EPISODES, maze.L), MASK)
        episodes[arm.name] = list(dtm.sample(last.student, blank, MASK, generator=noise))
        print(f"{arm.name}: {numbers[arm.name]}")
    file = args.out / ("quick_maze.gif" if args.quick else "maze.gif")
    animate(maze, episodes, numbers, file)
    print("The animation is", file)


if __name__ == "__main__":
    main()
