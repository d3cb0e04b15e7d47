"""The losses of dtm.py: their values, their gradients and their minimisers, by enumeration."""

import pytest
import torch
import torch.nn.functional as F
from theory_helpers import (
    STATES,
    L,
    V,
    X,
    agreement,
    close,
    distribution,
    mean_gradient,
    mean_loss,
    posterior_by_sums,
    posterior_table,
    random_table,
    rewards,
    weighted,
)
from torch import Generator

import dtm


@pytest.mark.parametrize("c", [0.0, 1.0, 2.5, "one value per position"])
def test_D3_without_one_hot_vectors_equals_gathered_equals_with_one_hot_vectors(c):
    g = Generator().manual_seed(0)
    logits = torch.randn(4, 5, 7, generator=g).double()
    logits_a = torch.randn(4, 5, 7, generator=g).double()
    x1 = torch.randint(7, (4, 5), generator=g)
    w = torch.rand(4, 1, generator=g).double() * 5
    mask = torch.rand(4, 5, generator=g) < 0.5
    c = torch.zeros(4, 5).double() + (torch.rand(4, 5, generator=g) if isinstance(c, str) else c)

    target = c[..., None] * logits_a.softmax(-1) + (w - c)[..., None] * F.one_hot(x1, 7)
    dense = -(target * logits.log_softmax(-1)).sum(-1)
    close(dtm.c_dtm_loss(logits, logits_a, x1, w, c), dense)
    gathered = dtm.c_dtm_loss(logits[mask], logits_a[mask], x1[mask], w.expand(4, 5)[mask], c[mask])
    close(gathered, dense[mask])


@pytest.mark.parametrize("c", [0.0, 1.0, -2.0, "one value per state and position"])
def test_D3_mean_gradient_does_not_depend_on_c_and_is_the_tilted_cross_entropy(c):
    rho, r, h = distribution(1), rewards(2), 1.7
    w = dtm.tilt_weight(r, h)
    teacher = posterior_table(rho)
    theta = random_table(3).logits.detach()
    if isinstance(c, str):
        c = torch.rand((V + 1) ** L, L, generator=Generator().manual_seed(4)).double() * 3
    tilted = dtm.exact_tilt(rho, r, h)

    def cross_entropy(logits, xt, n):
        return -(posterior_by_sums(tilted, xt) * logits.log_softmax(-1)).sum(-1)

    expected = (rho * w).sum() * mean_gradient(theta, tilted, cross_entropy)
    assert expected.abs().max() > 1e-3
    close(mean_gradient(theta, rho, weighted(teacher, w, c)), expected)


def test_D2_gradient_of_the_mean_vanishes_at_the_tilted_posterior_and_only_there():
    rho, r, h = distribution(5), rewards(6), 2.3
    w, teacher = dtm.tilt_weight(r, h), posterior_table(rho)
    loss = weighted(teacher, w, 1.0)
    best = posterior_by_sums(dtm.exact_tilt(rho, r, h), STATES).log().clamp_min(-60)
    elsewhere = best + 0.1 * torch.randn(best.shape, generator=Generator().manual_seed(0))
    assert mean_gradient(best, rho, loss).abs().max() < 1e-12
    assert mean_gradient(elsewhere, rho, loss).abs().max() > 1e-4


def minimiser(teacher, rho, w, c):
    """The table that minimises the population loss at c: E[T | xt] / Z(xt), by plain sums."""
    p_x1 = agreement(STATES) * rho
    p_x1 = p_x1 / p_x1.sum(1, keepdim=True)  # (64, 27)  P(x1 | xt)
    e = F.one_hot(X, V).double()  # (27, L, V)
    target = torch.einsum("sn,n,niv->siv", p_x1, w - c, e) + c * teacher(STATES).softmax(-1)
    return target / (p_x1 @ w)[:, None, None]


def test_D3_the_minimiser_moves_with_c_unless_the_teacher_is_consistent():
    """The inconsistent teacher is a random table, and the target is the tilt of what it samples."""
    teacher = random_table(1).requires_grad_(False)
    rho, r = dtm.exact_marginal(teacher, V, L), rewards(2)
    w, tilted = dtm.tilt_weight(r, 3.0), dtm.exact_tilt(rho, r, 3.0)

    distances = []
    for c in (0.0, 0.5, 1.0):
        best = minimiser(teacher, rho, w, c)
        assert best[STATES == V].min() > 0
        logits = best.clamp_min(1e-30).log()
        gradient = mean_gradient(logits, rho, weighted(teacher, w, c))
        assert gradient.abs().max() < 1e-12  # it is the minimiser
        rho_theta = dtm.exact_marginal(dtm.Table(logits), V, L).detach()
        distances.append((tilted * (tilted / rho_theta).log()).sum().item())
    assert abs(distances[0]) < 1e-12
    assert 1e-4 < distances[2] < 1e-2 and distances[2] > 2 * distances[1] > 1e-5

    consistent, rho = posterior_table(distribution(3)), distribution(3)
    close(minimiser(consistent, rho, w, 2.0), minimiser(consistent, rho, w, 0.0))


@pytest.mark.parametrize("share", [0.4, 0.8])
def test_D3_the_student_inherits_the_share_c_over_the_mean_weight_of_the_teachers_error(share):
    """The teacher's error is its posterior minus the true one, and c is share times E[w | xt].

    The mean gradient must vanish at the tilted posterior plus share times this error.
    """
    teacher = random_table(1).requires_grad_(False)
    rho, w = dtm.exact_marginal(teacher, V, L), dtm.tilt_weight(rewards(2), 1.0)
    p_x1 = agreement(STATES) * rho
    mean_w = (p_x1 @ w) / p_x1.sum(1)  # (64,)  E_a[w | xt]
    error = teacher(STATES).softmax(-1) - posterior_by_sums(rho, STATES)
    student = posterior_by_sums(rho * w, STATES) + share * error
    hidden = STATES == V
    assert student[hidden].min() > 0 and error[hidden].abs().max() > 0.1
    loss = weighted(teacher, w, share * mean_w[:, None].expand(-1, L))
    gradient = mean_gradient(student.clamp_min(1e-30).log(), rho, loss)
    assert gradient.abs().max() < 1e-12
    exact = posterior_by_sums(rho * w, STATES).clamp_min(1e-30).log()
    assert mean_gradient(exact, rho, loss).abs().max() > 1e-4


@pytest.mark.parametrize("w, c, pi", [(0.8, 1, 0.9), (0.05, 1, 0.9), (0.3, 1, 0.6), (0.5, 1, 0.6)])
def test_D3_one_sample_is_unbounded_below_iff_w_is_below_c_times_1_less_pi(w, c, pi):
    """The test pushes the token away and looks where the loss goes; w < c in all four cases."""
    logits_a = torch.tensor([[pi, 1 - pi]]).double().log()
    losses = []
    for push in (-50.0, -500.0):
        logits = torch.tensor([[push, 0.0]]).double()
        losses.append(dtm.c_dtm_loss(logits, logits_a, torch.tensor([0]), w, c).item())
    falls = losses[1] < losses[0] < -1
    grows = losses[1] > losses[0] > 1
    assert falls == (w < c * (1 - pi)) and grows == (w > c * (1 - pi))


def test_D3_the_mean_is_bounded_for_a_consistent_teacher_and_the_full_expectation_only():
    """The mean given xt is bounded below iff no entry of E[T | xt] is negative."""
    rho, r, c = distribution(3), rewards(2), 1.0
    w = dtm.tilt_weight(r, -4.0)  # far below c
    hidden = STATES == V
    assert w.max() < c
    assert minimiser(posterior_table(rho), rho, w, c)[hidden].min() >= 0

    inconsistent = random_table(1).requires_grad_(False)
    samples = dtm.exact_marginal(inconsistent, V, L)
    assert minimiser(inconsistent, samples, w, c)[hidden].min() < 0

    draws = rho.multinomial(20, True, generator=Generator().manual_seed(0))
    buffer = torch.bincount(draws, minlength=V**L).double() / 20
    all_masked = minimiser(posterior_table(rho), buffer, w, c)[-1]  # the state that always occurs
    assert all_masked.min() < 0


def test_D4_explicit_loss_is_the_first_order_of_the_tilt():
    rho, r, step = distribution(7), rewards(8), 1e-5
    pi = posterior_by_sums(rho, STATES)
    teacher = posterior_table(rho)
    slope = (dtm.exact_posterior(dtm.exact_tilt(rho, r, step), STATES) - pi) / step

    errors = []
    for h in (0.1, 0.05):

        def loss(logits, xt, n, h=h):
            return dtm.etm_loss(logits, teacher(xt), X[n], r[n, None], h)

        euler = pi + h * slope
        assert mean_gradient(euler.clamp_min(1e-30).log(), rho, loss).abs().max() < 1e-6
        exact = dtm.exact_posterior(dtm.exact_tilt(rho, r, h), STATES)
        errors.append((euler - exact).abs().max())
    assert 3.5 < errors[0] / errors[1] < 4.5  # O(h^2)


@pytest.mark.parametrize("c", [0.5, 1.0, 3.0])
def test_D5_self_consistent_gradient_is_the_c_dtm_gradient_over_c(c):
    g = Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=g).double().requires_grad_()
    logits_a = torch.randn(6, 5, generator=g).double()
    x1 = torch.randint(5, (6,), generator=g)
    w = torch.rand(6, generator=g).double() * 4
    implicit = dtm.c_dtm_loss(logits, logits_a, x1, w, c).sum()
    fixed_point = dtm.self_consistent_loss(logits, logits_a, x1, w, c)
    expected = torch.autograd.grad(implicit, logits)[0] / c
    close(torch.autograd.grad(fixed_point.sum(), logits)[0], expected)

    target = logits_a.softmax(-1)
    push = (w / c - 1)[:, None] * (F.one_hot(x1, 5) - logits.softmax(-1))
    close(fixed_point, -((target + push) * logits.log_softmax(-1)).sum(-1))


def test_D6_mean_over_masked_is_a_mean_of_means_for_dense_and_gathered_losses():
    g = Generator().manual_seed(0)
    loss = torch.randn(5, 4, generator=g)
    mask = torch.rand(5, 4, generator=g) < 0.5
    mask[:, 0] = True
    by_rows = sum(loss[b][mask[b]].mean() for b in range(5)) / 5
    close(dtm.mean_over_masked(loss, mask), by_rows, atol=1e-6)
    close(dtm.mean_over_masked(loss[mask], mask), by_rows, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [2, 126_464])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_D3_in_every_precision_and_vocabulary(dtype, vocabulary):
    """Half precision is reduced in float32; -1e4 takes a token out of the vocabulary."""
    g = Generator().manual_seed(0)
    logits, logits_a = torch.randn(2, 8, vocabulary, generator=g).to(dtype)
    x1, w = torch.randint(vocabulary, (8,), generator=g), torch.rand(8, generator=g)
    loss = dtm.c_dtm_loss(logits, logits_a, x1, w)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(loss.double(), dtm.c_dtm_loss(logits.double(), logits_a.double(), x1, w), atol=2e-5)
    banned = [F.pad(t, (0, 1), value=-1e4) for t in (logits, logits_a)]
    close(dtm.c_dtm_loss(*banned, x1, w), loss, atol=2e-5)
    assert dtm.c_dtm_loss(logits[:0], logits_a[:0], x1[:0], w[:0]).shape == (0,)


def test_D6_the_mean_over_masks_bounds_the_log_likelihood():
    student = random_table(0)
    consistent = posterior_table(distribution(1))
    for n in range(V**L):
        this = F.one_hot(torch.tensor(n), V**L).double()

        def cross_entropy(logits, xt, index):
            return -logits.log_softmax(-1).gather(-1, X[index][..., None])[..., 0]

        bound = L * mean_loss(student, this, cross_entropy)
        assert bound > -dtm.exact_marginal(student, V, L)[n].log()
        close(L * mean_loss(consistent, this, cross_entropy), -distribution(1)[n].log())


def test_the_two_token_example_of_an_inconsistent_teacher():
    """The first token is a coin; the second copies a known first one, and is a coin otherwise."""
    states = dtm.all_sequences(3, 2)  # two tokens and the mask
    logits = torch.zeros(9, 2, 2).double()
    for number, (first, _) in enumerate(states.tolist()):
        if first < 2:
            logits[number, 1] = -100 * F.one_hot(torch.tensor(1 - first), 2)
    rho = dtm.exact_marginal(dtm.Table(logits), 2, 2).detach()
    close(rho, torch.tensor([3, 1, 1, 3]).double() / 8)
    known_first = torch.tensor([[0, 2], [1, 2]])
    close(dtm.exact_posterior(rho, known_first)[:, 1], torch.tensor([[3, 1], [1, 3]]).double() / 4)


@pytest.mark.parametrize("corruption", ["uniform state", "blocks"])
def test_D3_holds_for_other_corruptions(corruption):
    """Enumerate P(xt | x1) on 9 sequences: the mean gradient vanishes at the tilted posterior.

    "uniform state" replaces each token by a uniform one with probability 0.4. "blocks" keeps the
    first token, and masks or replaces the second.
    """
    tokens, x1 = 3, dtm.all_sequences(3, 2)
    rho = torch.randn(9, generator=Generator().manual_seed(0)).double().softmax(0)
    w = torch.rand(9, generator=Generator().manual_seed(1)).double() * 3
    states = dtm.all_sequences(4, 2)  # with a mask, which the first corruption never uses
    if corruption == "uniform state":
        one = F.pad(0.6 * torch.eye(tokens) + 0.4 / tokens, (0, 1)).double()  # (x1_i, xt_i)
        first = second = one
    else:
        first = F.pad(torch.eye(tokens), (0, 1)).double()
        second = F.pad(0.3 * torch.eye(tokens) + 0.2 / tokens, (0, 1), value=0.5).double()
    q = (first[x1[:, :1], states[:, 0]] * second[x1[:, 1:], states[:, 1]]).T  # (S, N)
    assert torch.allclose(q.sum(0), torch.ones(9).double())
    e = F.one_hot(x1, tokens).double()  # (N, 2, V)

    def posterior(p):  # (S, 2, V); a state that never occurs gets an arbitrary one
        joint = q * p
        return torch.einsum("sn,niv->siv", joint, e) / joint.sum(1).clamp_min(1e-30)[:, None, None]

    logits_a = (posterior(rho) + 1e-30).log()[:, None].expand(-1, 9, 2, tokens)
    best = (posterior(rho * w) + 1e-30).log()
    noise = 0.1 * torch.randn(best.shape, generator=Generator().manual_seed(2))
    for c in (0.0, 1.0, 2.5):
        gradients = []
        for theta in (best, best + noise):
            theta = theta.requires_grad_()
            logits = theta[:, None].expand_as(logits_a)
            tokens_1 = x1.expand(len(states), -1, -1)
            loss = dtm.c_dtm_loss(logits, logits_a, tokens_1, w[:, None].expand(9, 2), c)
            gradients.append(torch.autograd.grad((q * rho * loss.sum(-1)).sum(), theta)[0])
        assert gradients[0].abs().max() < 1e-12 and gradients[1].abs().max() > 1e-4
