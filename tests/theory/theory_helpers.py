"""What the tests of dtm.py share: a chi-square test, tables on V = 3 tokens, exact expectations."""

import math

import torch
from torch import Generator

import dtm

V, L = 3, 3  # 27 sequences and 64 states
X = dtm.all_sequences(V, L)
STATES = dtm.all_sequences(V + 1, L)


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **({"atol": 1e-10, "rtol": 1e-8} | tolerance))


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
