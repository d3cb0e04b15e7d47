"""What the tests of dtm.py share: V = 3 tokens and L = 3 positions, 27 sequences and 64 states."""

import math

import torch
from torch import Generator

import dtm

V, L = 3, 3
X = dtm.all_sequences(V, L)
STATES = dtm.all_sequences(V + 1, L)


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **({"atol": 1e-10, "rtol": 1e-8} | tolerance))


# ---- random models and rewards -------------------------------------------------------------------
def distribution(seed):
    return torch.randn(V**L, generator=Generator().manual_seed(seed)).double().softmax(0)


def rewards(seed):
    return torch.rand(V**L, generator=Generator().manual_seed(seed)).double()


def random_table(seed):
    logits = torch.randn((V + 1) ** L, L, V, generator=Generator().manual_seed(seed))
    return dtm.Table(logits.double())


def posterior_table(rho):
    """The consistent model: the table of rho's own posteriors."""
    return dtm.Table(dtm.exact_posterior(rho, STATES).log().clamp_min(-60)).requires_grad_(False)


# ---- enumeration ---------------------------------------------------------------------------------
def agreement(xt):
    """(B, V^L): 1 where a sequence agrees with the state."""
    return ((X[None] == xt[:, None]) | (xt[:, None] == V)).all(-1).double()


def posterior_by_sums(rho, xt):
    """P(x1_i = v | xt) from its definition: sums of rho over the sequences that agree with xt."""
    agree = agreement(xt) * rho
    hits = torch.stack([(agree[:, :, None] * (X == v)).sum(1) for v in range(V)], -1)
    return hits / agree.sum(1)[:, None, None]


def mean_loss(student, rho, per_position_loss):
    """The exact mean of the loss over every (x1, mask) that `mask_random` makes of x1 ~ rho.

    per_position_loss(logits, xt, n) is (B, L), for the states xt of the sequences X[n].
    """
    masks = dtm.all_sequences(2, L)[1:].bool()
    n = torch.arange(V**L).repeat(len(masks))
    mask = masks.repeat_interleave(V**L, 0)
    ways = torch.tensor([math.comb(L, int(m.sum())) for m in mask])
    xt = torch.where(mask, V, X[n])
    loss = per_position_loss(student(xt), xt, n) * mask / mask.sum(1, keepdim=True).double()
    return (rho[n] / (L * ways.double()) * loss.sum(1)).sum()


def mean_gradient(theta, rho, per_position_loss):
    """The exact gradient of `mean_loss` with respect to a table of logits."""
    student = dtm.Table(theta.clone())
    mean_loss(student, rho, per_position_loss).backward()
    return student.logits.grad


def weighted(teacher, w, c):
    """(D3) as `mean_loss` takes it; c is a number or a table over states and positions."""
    table = torch.zeros(len(STATES), L).double() + c

    def loss(logits, xt, n):
        return dtm.c_dtm_loss(logits, teacher(xt), X[n], w[n, None], table[dtm.state_number(xt, V)])

    return loss


# ---- samples -------------------------------------------------------------------------------------
def rejects(counts, expected) -> bool:
    """Pearson's test at level 1e-4, by the Wilson-Hilferty normal approximation to chi-square."""
    counts, expected = (torch.as_tensor(t).double().flatten() for t in (counts, expected))
    assert expected.min() > 5, "cells too small for the approximation"
    chi2, df = ((counts - expected) ** 2 / expected).sum().item(), len(counts) - 1
    z = ((chi2 / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))
    return z > 3.719


def digits(x, base):
    return (x * base ** torch.arange(x.shape[1] - 1, -1, -1)).sum(1)


def counts_of(x):
    return torch.bincount(digits(x, V), minlength=V**L)


def last(states):
    *_, finished = states
    return finished


def draw(model, n, seed=0, **settings):
    blank = torch.full((n, L), V)
    return last(dtm.sample(model, blank, V, generator=Generator().manual_seed(seed), **settings))
