"""`dtm.tilt_matching` and `maze_lab.tilt` are the same algorithm."""

import copy

import pytest
import torch
from torch import Generator

import dtm
import maze_lab as lab

PHASES, STEPS, ROLLOUTS = 3, 12, 64  # in each phase


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)  # `tabulate` makes its table in the default type
    yield
    torch.set_default_dtype(torch.float32)


def test_D3_both_loops_train_the_same_model_on_the_same_draws():
    """On a 3 x 3 maze in float64, with a constant c and equal phases."""
    cfg = lab.Config(
        a_end=6.0,
        phases=PHASES,
        last=1.0,
        steps=PHASES * STEPS,
        rollouts=PHASES * ROLLOUTS,
        batch=16,
        width=16,
        base_steps=30,
    )
    maze = lab.Maze([[0, 0, 0], [0, 0, 0], [0, 0, 0]])
    base = lab.train_base(maze, cfg, seed=0, device="cpu")

    arm = lab.Arm("c = 0.7", c=0.7)
    *_, last = lab.tilt(base, maze, arm, cfg, lambda a, r: cfg.a_end / PHASES, seed=5)
    rewards = []
    model = dtm.tilt_matching(
        copy.deepcopy(base),
        maze.reward,
        lab.MASK,
        maze.L,
        a_end=cfg.a_end,
        h=cfg.a_end / PHASES,
        c=0.7,
        rollouts=ROLLOUTS,
        steps=STEPS,
        batch=cfg.batch,
        lr=cfg.lr,
        generator=Generator().manual_seed(5),
        watch=lambda a, r, model: rewards.append(r),
    )

    assert torch.equal(rewards[-1], last.r)
    trained, expected = lab.tabulate(model, maze.L).logits, last.next_teacher.logits
    torch.testing.assert_close(trained, expected, atol=1e-8, rtol=0)
    assert (trained - lab.tabulate(base, maze.L).logits).abs().max() > 0.1
