"""The tests of the lab share a chi-square test, a 3 x 3 maze, tables, a short training."""

import math
import os
import pickle
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Generator

import dtm
import maze_lab as lab

ROOT = Path(__file__).parents[2]
CFG = lab.Config(base_steps=30, base_batch=64, steps=24, phases=3, rollouts=192, batch=32, width=16)
SMALL = lab.Maze([[0, 0, 0], [0, 0, 0], [0, 0, 0]])  # 4 moves, 625 states


# ---- short runs on the 3 x 3 maze ----------------------------------------------------------------
def base_net(seed=0, cfg=CFG):
    return lab.train_base(SMALL, cfg, seed, "cpu")


def evaluation_of(base):
    return lab.ExactEvaluation(SMALL, lab.tabulate(base, SMALL.L))


def run_tilt(base, arm, cfg, seed):
    """Return the records of a run, without their seconds."""
    schedule = lab.make_schedule(arm, cfg)
    phases = lab.tilt(base, SMALL, arm=arm, cfg=cfg, choose_h=schedule, seed=seed)
    return [record | {"seconds": 0} for _, record in lab.follow(phases, evaluation_of(base))]


def command(*args, **environment):
    """Run python with these arguments in the root folder."""
    words = [sys.executable, *[str(word) for word in args]]
    environment = os.environ | environment
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)


class InThisProcess:
    """Stands for the pool of processes: it runs each call at once, here.

    It still pickles what a process would be sent.
    """

    def __init__(self, **settings):
        pass

    def submit(self, *call):
        run, *args = pickle.loads(pickle.dumps(call))
        future = Future()
        future.set_result(run(*args))
        return future

    def shutdown(self, cancel_futures):
        pass


def mean(rows, key):
    return lab.mean_and_error(rows, key)[0]


# ---- samples -------------------------------------------------------------------------------------
def rejects(counts, expected) -> bool:
    """Apply Pearson's test at level 1e-4, by the Wilson-Hilferty approximation to chi-square."""
    counts, expected = (torch.as_tensor(t).double().flatten() for t in (counts, expected))
    assert expected.min() > 5, "the cells are too small for the approximation"
    chi2, df = ((counts - expected) ** 2 / expected).sum().item(), len(counts) - 1
    z = ((chi2 / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))
    return z > 3.719


def count_sequences(x, base, length):
    number = (x * base ** torch.arange(length - 1, -1, -1)).sum(1)
    return torch.bincount(number, minlength=base**length)


# ---- models given as tables, on paths of few moves -----------------------------------------------
def moves_table(length, seed, scale=0.3):
    g = Generator().manual_seed(seed)
    logits = torch.randn((lab.V + 1) ** length, length, lab.V, generator=g)
    return dtm.Table(scale * logits.double())


def table_of(posterior):
    """Return the model with these posteriors; log 0 becomes -60, so that logits are finite."""
    return dtm.Table(posterior.log().clamp_min(-60))


def frozen(model):
    return model.requires_grad_(False)


def copy_of(model):
    return frozen(dtm.Table(model.logits.detach().clone()))


def one_position(row):
    """Return a model of one position with the logits `row` (V,), whatever it sees."""
    return dtm.Table(row.double().expand(lab.V + 1, 1, lab.V).clone())


def gradient(loss, net):
    return torch.autograd.grad(loss, net.logits, retain_graph=True)[0]
