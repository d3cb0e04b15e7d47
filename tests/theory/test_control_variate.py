"""The best control variate, against the variance of the gradient itself."""

import pytest
import torch
from theory_helpers import close
from torch import Generator

import dtm


def logit_gradients(logits, logits_a, x1, w, c):
    logits = logits.clone().requires_grad_()
    dtm.c_dtm_loss(logits, logits_a, x1, w, c).sum().backward()
    return logits.grad


def test_D8_best_c_is_the_argmin_of_the_gradient_variance():
    g = Generator().manual_seed(0)
    n = 200_000
    logits_a = torch.randn(1, 6, generator=g).double()
    logits = logits_a + 0.3 * torch.randn(1, 6, generator=g).double()
    x1 = logits_a.softmax(-1)[0].multinomial(n, True, generator=g)
    by_token = torch.exp(torch.tensor([2.0, 1.0, 0.5, 0.0, 1.5, 0.3]).double())
    w = by_token[x1] * (0.5 + torch.rand(n, generator=g).double())
    logits, logits_a = logits.expand(n, 6), logits_a.expand(n, 6)
    variance = [logit_gradients(logits, logits_a, x1, w, c).var(0).sum() for c in (0.0, 1.0, 2.0)]
    bend = (variance[0] - 2 * variance[1] + variance[2]) / 2  # three points of a parabola in c
    slope = (4 * variance[1] - 3 * variance[0] - variance[2]) / 2
    best = dtm.best_scalar_c(logits, logits_a, x1, w).item()
    argmin = (-slope / (2 * bend)).item()
    assert best == pytest.approx(argmin, abs=0.03)  # sd of the difference: .006


def test_D7_regression_minimises_the_second_moment_pointwise():
    g = Generator().manual_seed(1)
    logits = torch.randn(50, 6, generator=g).double()
    logits_a = torch.randn(50, 6, generator=g).double()
    x1 = torch.randint(6, (50,), generator=g)
    w = torch.rand(50, generator=g).double() * 3
    y, q = dtm.control_variate_targets(logits, logits_a, x1, w)
    at_best, above, below = [
        logit_gradients(logits, logits_a, x1, w, c).square().sum(-1) for c in (y, y + 1, y - 2)
    ]
    close(above - at_best, q)  # q (c - y)^2 + const, and so is
    close(below - at_best, 4 * q)  # the minimum at y
    close(dtm.control_variate_targets(logits_a, logits_a, x1, w)[0], w, rtol=1e-6)
