"""The exact oracles of dtm.py, each against sums that follow its definition."""

import math
from itertools import permutations

import pytest
import torch
from theory_helpers import (
    STATES,
    L,
    V,
    X,
    close,
    distribution,
    mean_loss,
    posterior_by_sums,
    posterior_table,
    random_table,
    rewards,
    weighted,
)
from torch import Generator

import dtm


def test_D2_posterior_against_plain_sums():
    close(dtm.exact_posterior(distribution(3), STATES), posterior_by_sums(distribution(3), STATES))


def test_D11_marginal_is_the_sum_over_orders_and_normalised():
    table = random_table(0)
    expected = torch.zeros(V**L).double()
    for order in permutations(range(L)):
        xt, p = torch.full_like(X, V), torch.ones(V**L).double()
        for i in order:
            p = p * table(xt)[:, i].softmax(-1).gather(1, X[:, i : i + 1])[:, 0]
            xt[:, i] = X[:, i]
        expected += p.detach() / math.factorial(L)
    close(dtm.exact_marginal(table, V, L).detach(), expected)
    assert dtm.exact_marginal(table, V, L).sum().item() == pytest.approx(1)


def test_D11_marginal_is_differentiable():
    table = dtm.Table(torch.zeros(9, 2, 2).double())

    def mean_number(logits):
        def model(*state):
            return torch.func.functional_call(table, {"logits": logits}, state)

        return (dtm.exact_marginal(model, 2, 2) * torch.arange(4)).sum()

    logits = torch.randn(9, 2, 2, generator=Generator().manual_seed(0)).double().requires_grad_()
    assert torch.autograd.gradcheck(mean_number, logits, atol=1e-7, rtol=1e-8)


def test_D12_bound_holds_and_its_right_side_is_the_loss_regret():
    rho, r, h = distribution(1), rewards(2), 1.5
    w = dtm.tilt_weight(r, h)
    teacher, best = posterior_table(rho), posterior_table(dtm.exact_tilt(rho, r, h))
    loss = weighted(teacher, w, 1.0)
    for seed in range(5):
        student = random_table(seed)
        kl, bound = dtm.regret_bound(student, rho, r, h, V)
        assert 0 < kl < bound
        regret = L * (mean_loss(student, rho, loss) - mean_loss(best, rho, loss))
        close(bound, regret / (rho * w).sum())
    kl, bound = dtm.regret_bound(best, rho, r, h, V)
    assert abs(kl) < 1e-10 and abs(bound) < 1e-10


def test_D12_bound_is_tight_for_a_consistent_model():
    kl, bound = dtm.regret_bound(
        posterior_table(distribution(9)), distribution(1), rewards(2), 0.8, V
    )
    assert kl > 0.1
    close(kl, bound)
