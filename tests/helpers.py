"""What several tests share: a chi-square test, random tables, a 3 x 3 maze, a short training."""

import math
import subprocess
import sys
from pathlib import Path

import torch
from torch import Generator

import dtm
import maze_lab as lab
from figures import objectives

ROOT = Path(__file__).parent.parent
CFG = lab.Config(base_steps=30, base_batch=64, steps=24, phases=3, rollouts=192, batch=32, width=16)
SMALL = lab.Maze([[0, 0, 0], [0, 0, 0], [0, 0, 0]])  # 4 moves, 625 states


def base_net(seed=0, cfg=CFG):
    return lab.train_base(SMALL, cfg, seed, "cpu")


def judge_of(base):
    return lab.Judge(SMALL, lab.tabulate(base, SMALL.L))


def run_tilt(base, arm, cfg, seed):
    """The records of a run, without their seconds."""
    judge = judge_of(base)
    schedule = lab.make_schedule(arm, cfg, judge)
    phases = lab.tilt(base, SMALL, arm, cfg, schedule, seed)
    return [record | {"seconds": 0} for _, record in lab.follow(phases, judge)]


def command(*args):
    words = [sys.executable, *[str(word) for word in args]]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


# ---- sampling from a table on V = 3 tokens and L = 3 positions -----------------------------------
V, L = 3, 3


def rejects(counts, expected) -> bool:
    """Pearson's test at level 1e-4, by the Wilson-Hilferty normal approximation to chi-square."""
    counts, expected = (torch.as_tensor(t).double().flatten() for t in (counts, expected))
    assert expected.min() > 5, "cells too small for the approximation"
    chi2, df = ((counts - expected) ** 2 / expected).sum().item(), len(counts) - 1
    z = ((chi2 / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))
    return z > 3.719


def digits(x, base):
    return (x * base ** torch.arange(x.shape[1] - 1, -1, -1)).sum(1)


def table(seed=0, scale=1.0):
    return dtm.Table(
        scale * torch.randn((V + 1) ** L, L, V, generator=Generator().manual_seed(seed))
    )


def last(states):
    *_, finished = states
    return finished


def draw(model, n, seed=0, **settings):
    blank = torch.full((n, L), V)
    return last(dtm.sample(model, blank, V, generator=Generator().manual_seed(seed), **settings))


def counts_of(x):
    return torch.bincount(digits(x, V), minlength=V**L)


def law_of(model):
    return dtm.exact_marginal(model, V, L).detach()


# ---- the rivals' objectives, on paths of few moves, of V = 4 each --------------------------------
VOCABULARY = lab.V  # where V is the samplers' 3


def moves_table(length, seed, scale=0.3):
    g = Generator().manual_seed(seed)
    logits = torch.randn((VOCABULARY + 1) ** length, length, VOCABULARY, generator=g)
    return dtm.Table(scale * logits.double())


def frozen(model):
    return model.requires_grad_(False)


def one_position(row):
    """A model of one position with the logits `row` (V,), whatever it sees."""
    return dtm.Table(row.double().expand(VOCABULARY + 1, 1, VOCABULARY).clone())


def batch(x, r, net, old, base, **changes):
    settings = {
        "advantage": r - r.mean(),
        "a": 2.0,
        "h": 0.5,
        "noise": Generator().manual_seed(0),
        "start": torch.rand(len(x), generator=Generator().manual_seed(1)),
        "progress": 0.5,
        "spread": r.std().item() if len(r) > 1 else 1.0,
        "count": 10**9,  # a group so large that an own reward is nothing in its mean
        "weight": r,
    }
    return objectives.Batch(net, old, base, x, r, **(settings | changes))


def each_token(objective, net, r, base, **changes):
    """The mean of an objective over tokens drawn from net, of paths of one token."""
    p = net.logits[VOCABULARY, 0].softmax(-1).detach()
    old = frozen(dtm.Table(net.logits.detach().clone()))
    losses = []
    for token in range(VOCABULARY):
        settings = {"advantage": r[token : token + 1] - p @ r, "spread": 1.0} | changes
        x = torch.tensor([[token]])
        losses.append(objective(batch(x, r[token : token + 1], net, old, base, **settings)))
    return p @ torch.stack(losses)


def gradient(loss, net):
    return torch.autograd.grad(loss, net.logits, retain_graph=True)[0]
