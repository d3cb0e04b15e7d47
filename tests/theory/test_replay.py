"""Replay (D13): rollouts of several phases, with weights that depend on the rewards only.

The rollouts of a phase are listed so that every sequence occurs exactly in proportion to its
probability. So a mean over rollouts is an expectation, and the theorems hold to rounding.
"""

import math

import pytest
import torch
from theory_helpers import L, V, X, close, mean_loss, posterior_table
from torch import Generator

import dtm

NOISE = Generator().manual_seed(5)
COUNTS = torch.randint(1, 6, (V**L,), generator=NOISE)
BASE = COUNTS.double() / COUNTS.sum()  # rho_0
R = torch.randint(3, (V**L,), generator=NOISE).double()  # rewards 0, 1 and 2
PHASES = (0, 1, 3)  # phase j has the tilt j log 2, so that e^{a_j r} is an integer
TILTS = [j * math.log(2) for j in PHASES]
A = 2.6  # the tilt at which the rollouts are used


def rollouts() -> list[torch.Tensor]:
    """Return the numbers of the sequences of each phase, (n_j,); phase j has j + 1 copies."""
    counts = [(j + 1) * COUNTS * 2 ** (j * R.long()) for j in PHASES]
    return [torch.arange(V**L).repeat_interleave(count) for count in counts]


def tilted(a: float) -> torch.Tensor:
    weight = BASE * (a * R).exp()
    return weight / weight.sum()


def test_D13_weighted_means_over_all_rollouts_are_those_of_the_tilt():
    drawn = rollouts()
    u = dtm.replay_weights([R[x] for x in drawn], TILTS, A)
    g = torch.randn(V**L, generator=Generator().manual_seed(6)).double()
    close(u.mean(), torch.tensor(1.0).double())
    close((u * g[torch.cat(drawn)]).mean(), tilted(A) @ g)


def test_D13_the_constants_are_the_log_normalisers():
    drawn = rollouts()
    n = torch.tensor([len(x) for x in drawn]).double()
    Z = torch.stack([BASE @ (a * R).exp() for a in TILTS])
    density = (
        (n / n.sum() / Z) * (R[:, None] * torch.tensor(TILTS, dtype=torch.float64)).exp()
    ).sum(1)
    expected = ((A * R).exp() / density)[torch.cat(drawn)]
    u = dtm.replay_weights([R[x] for x in drawn], TILTS, A)
    close(u, expected / expected.mean())


@pytest.mark.parametrize("c", [0.0, 1.0, 2.5])
def test_D13_the_minimiser_of_the_weighted_loss_is_the_tilted_posterior(c):
    h, drawn = 0.7, rollouts()
    u = dtm.replay_weights([R[x] for x in drawn], TILTS, A)
    q = torch.cat(drawn).bincount(minlength=V**L).double() / len(u)
    u_of = torch.zeros(V**L).double().scatter(0, torch.cat(drawn), u)  # equal for equal sequences
    teacher = posterior_table(tilted(A))
    w = (h * R).exp()

    def loss(logits, xt, n):
        each = dtm.c_dtm_loss(logits, teacher(xt), X[n], w[n][:, None], c)
        return u_of[n][:, None] * each

    def gradient(student):
        student.requires_grad_(True)
        [g] = torch.autograd.grad(mean_loss(student, q, loss), [student.logits])
        return g.norm()

    close(gradient(posterior_table(tilted(A + h))), torch.tensor(0.0).double())
    assert gradient(posterior_table(tilted(A))) > 1e-3


def test_D13_one_phase_at_its_own_tilt_has_equal_weights():
    r = torch.rand(50, generator=NOISE).double()
    close(dtm.replay_weights([r], [3.0], 3.0), torch.ones(50).double())
    close(dtm.replay_weights([r], [3.0], 4.5), dtm.tilt_weight(r, 1.5, normalize=True))


def test_the_weights_of_a_phase_never_exceed_its_inverse_share():
    """At a = a_j the density q is at least n_j / n times rho_{a_j}."""
    drawn = rollouts()
    for j, a in enumerate(TILTS):
        u = dtm.replay_weights([R[x] for x in drawn], TILTS, a)
        assert u.max() <= len(u) / len(drawn[j]) * (1 + 1e-6)


def test_huge_exponents_do_not_overflow():
    r = [torch.linspace(0, 1, 5), torch.linspace(0.5, 1, 7)]
    for a in (-1e4, 0.0, 1e4):
        u = dtm.replay_weights(r, [0.0, 1e4], a)
        assert u.dtype == torch.float32 and u.isfinite().all()
        close(u.mean(), torch.tensor(1.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "rewards, tilts",
    [
        ([torch.ones(2)], [0.0, 1.0]),
        ([torch.ones(0)], [0.0]),
        ([torch.tensor([1.0, math.nan])], [0.0]),
        ([torch.ones(2)], [math.inf]),
    ],
)
def test_bad_input_is_refused(rewards, tilts):
    with pytest.raises(ValueError, match="replay_weights"):
        dtm.replay_weights(rewards, tilts, 1.0)


@pytest.mark.parametrize("far", [40.0, 120.0])
def test_D13_phases_that_hardly_overlap_are_solved_exactly(far):
    """Two phases have one unknown, f_2 - f_1, which bisection finds: m must give phase 1 its share.

    At half the larger tilt the weights depend on the solution most.
    """
    noise = Generator().manual_seed(8)
    low = (0.3 + 0.07 * torch.randn(2000, generator=noise)).clamp(0, 1).double()
    high = (low[:1000] + far * 0.07**2).clamp(0, 1)
    r = torch.cat([low, high])
    less, more = -far, 2 * far
    for _ in range(200):
        f = (less + more) / 2
        from_1 = (2 / 3) / (2 / 3 + (1 / 3) * (far * r - f).exp())  # the share of phase 1 in m
        less, more = (f, more) if from_1.mean() < 2 / 3 else (less, f)
    expected = (far / 2 * r).exp() / (2 / 3 + (1 / 3) * (far * r - f).exp())
    u = dtm.replay_weights([low, high], [0.0, far], far / 2)
    close(u, expected / expected.mean(), rtol=1e-6, atol=1e-6)
