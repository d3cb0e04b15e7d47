"""The theorems of dtm.py, each against a second derivation: enumeration or finite differences.

All on V = 3 tokens and L = 3 positions: 27 sequences, 64 states.
"""

import math
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import Generator

import dtm

V, L = 3, 3
X = dtm.all_sequences(V, L)
STATES = dtm.all_sequences(V + 1, L)


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **({"atol": 1e-10, "rtol": 1e-8} | tolerance))


def law(seed):
    return torch.randn(V**L, generator=Generator().manual_seed(seed)).double().softmax(0)


def rewards(seed):
    return torch.rand(V**L, generator=Generator().manual_seed(seed)).double()


def random_table(seed):
    logits = torch.randn((V + 1) ** L, L, V, generator=Generator().manual_seed(seed))
    return dtm.Table(logits.double())


def posterior_table(rho):
    """The consistent model: the table of rho's own posteriors."""
    return dtm.Table(dtm.exact_posterior(rho, STATES).log().clamp_min(-60)).requires_grad_(False)


def agreement(xt):
    """(B, V^L): 1 where a sequence agrees with the state."""
    return ((X[None] == xt[:, None]) | (xt[:, None] == V)).all(-1).double()


def posterior_by_sums(rho, xt):
    """P(x1_i = v | xt) from the definition: sum the law over the sequences that agree with xt."""
    agree = agreement(xt) * rho
    hits = torch.stack([(agree[:, :, None] * (X == v)).sum(1) for v in range(V)], -1)
    return hits / agree.sum(1)[:, None, None]


def mean_loss(student, rho, per_position_loss):
    """Exact mean of the row-mean loss over every (x1, mask) that `mask_random` makes of x1 ~ rho.
    per_position_loss(logits, xt, n) is (B, L), for the states xt of the sequences X[n]."""
    masks = dtm.all_sequences(2, L)[1:].bool()
    n = torch.arange(V**L).repeat(len(masks))
    mask = masks.repeat_interleave(V**L, 0)
    ways = torch.tensor([math.comb(L, int(m.sum())) for m in mask])
    xt = torch.where(mask, V, X[n])
    loss = per_position_loss(student(xt), xt, n) * mask / mask.sum(1, keepdim=True).double()
    return (rho[n] / (L * ways.double()) * loss.sum(1)).sum()


def mean_gradient(theta, rho, per_position_loss):
    """Exact gradient of `mean_loss` with respect to a table of logits."""
    student = dtm.Table(theta.clone())
    mean_loss(student, rho, per_position_loss).backward()
    return student.logits.grad


def weighted(teacher, w, c):
    """(D3) as `mean_loss` takes it; c is a number or a table over states and positions."""
    table = torch.zeros(len(STATES), L).double() + c

    def loss(logits, xt, n):
        return dtm.c_dtm_loss(logits, teacher(xt), X[n], w[n, None], table[dtm.state_number(xt, V)])

    return loss


# ---- the loss ------------------------------------------------------------------------------------
@pytest.mark.parametrize("c", [0.0, 1.0, 2.5, "a value a position"])
def test_D3_compact_equals_gathered_equals_one_hot(c):
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


@pytest.mark.parametrize("c", [0.0, 1.0, -2.0, "a value a state and position"])
def test_D3_mean_gradient_does_not_depend_on_c_and_is_the_tilted_cross_entropy(c):
    rho, r, h = law(1), rewards(2), 1.7
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
    rho, r, h = law(5), rewards(6), 2.3
    w, teacher = dtm.tilt_weight(r, h), posterior_table(rho)
    loss = weighted(teacher, w, 1.0)
    best = posterior_by_sums(dtm.exact_tilt(rho, r, h), STATES).log().clamp_min(-60)
    elsewhere = best + 0.1 * torch.randn(best.shape, generator=Generator().manual_seed(0))
    assert mean_gradient(best, rho, loss).abs().max() < 1e-12
    assert mean_gradient(elsewhere, rho, loss).abs().max() > 1e-4


def minimiser(teacher, rho, w, c):
    """The table that minimises the population loss at c: E[T | xt] / Z(xt), by plain sums."""
    law_of_x1 = agreement(STATES) * rho
    law_of_x1 = law_of_x1 / law_of_x1.sum(1, keepdim=True)  # (64, 27)
    e = F.one_hot(X, V).double()  # (27, L, V)
    target = torch.einsum("sn,n,niv->siv", law_of_x1, w - c, e) + c * teacher(STATES).softmax(-1)
    return target / (law_of_x1 @ w)[:, None, None]


def test_D3_the_minimiser_moves_with_c_unless_the_teacher_is_consistent():
    """An inconsistent teacher: random conditionals that belong to no law. The rollouts are its
    own, the tilt is that of their law; c = 0 finds it, c > 0 is off by c (pi_a - posterior)."""
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

    consistent, rho = posterior_table(law(3)), law(3)
    close(minimiser(consistent, rho, w, 2.0), minimiser(consistent, rho, w, 0.0))


@pytest.mark.parametrize("w, c, pi", [(0.8, 1, 0.9), (0.05, 1, 0.9), (0.3, 1, 0.6), (0.5, 1, 0.6)])
def test_D3_one_sample_is_unbounded_below_iff_w_is_below_c_times_1_less_pi(w, c, pi):
    """Not iff w < c, which holds in all four: push the token away and see where the loss goes."""
    logits_a = torch.tensor([[pi, 1 - pi]]).double().log()
    losses = []
    for push in (-50.0, -500.0):
        logits = torch.tensor([[push, 0.0]]).double()
        losses.append(dtm.c_dtm_loss(logits, logits_a, torch.tensor([0]), w, c).item())
    falls = losses[1] < losses[0] < -1
    grows = losses[1] > losses[0] > 1
    assert falls == (w < c * (1 - pi)) and grows == (w > c * (1 - pi))


def test_D3_the_mean_is_bounded_for_a_consistent_teacher_and_the_full_expectation_only():
    """Bounded below iff no E[T | xt](v) is negative."""
    rho, r, c = law(3), rewards(2), 1.0
    w = dtm.tilt_weight(r, -4.0)  # far below c
    hidden = STATES == V
    assert w.max() < c
    assert minimiser(posterior_table(rho), rho, w, c)[hidden].min() >= 0

    inconsistent = random_table(1).requires_grad_(False)
    own_law = dtm.exact_marginal(inconsistent, V, L)
    assert minimiser(inconsistent, own_law, w, c)[hidden].min() < 0

    draws = rho.multinomial(20, True, generator=Generator().manual_seed(0))
    buffer = torch.bincount(draws, minlength=V**L).double() / 20
    all_masked = minimiser(posterior_table(rho), buffer, w, c)[-1]  # the state that always occurs
    assert all_masked.min() < 0


def test_D4_explicit_loss_is_the_first_order_of_the_tilt():
    rho, r, step = law(7), rewards(8), 1e-5
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


def test_D6_row_mean_dense_equals_gathered_equals_a_mean_of_means():
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


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_gives_one_sentence(value):
    bad, x1 = torch.tensor([[0.0, value], [value, value]]), torch.tensor([0, 0])
    for loss in (dtm.c_dtm_loss, dtm.self_consistent_loss, dtm.etm_loss, dtm.best_scalar_c):
        with pytest.raises(ValueError, match="^[a-z_]+: the result is not finite: .*by -1e4.*$"):
            loss(bad, bad, x1, torch.ones(2), 1.0)
    model = dtm.Table(torch.full((9, 2, 2), value))
    with pytest.raises(ValueError, match="^sample: a drawn logit is not finite"):
        list(dtm.sample(model, torch.full((1, 2), 2), 2))
    with pytest.raises(ValueError, match="^phases: the step .* does not lead to"):
        list(dtm.phases(abs(value), 1.0))


# ---- weights and annealing -----------------------------------------------------------------------
def test_D1_weights_normalise_by_batch_and_by_group_without_overflow():
    r = torch.tensor([0.0, 1.0, 2.0, 500.0, 400.0])
    group = torch.tensor([7, 7, 3, 3, 3])
    w = dtm.tilt_weight(r, 1.0, normalize=True, group=group)
    close(w[:2], torch.tensor([1.0, math.e]) / ((1 + math.e) / 2), atol=1e-6)
    close(w[2:], torch.tensor([0.0, 3.0, 0.0]), atol=1e-6)
    close(dtm.tilt_weight(r, 1.0, normalize=True).mean(), torch.tensor(1.0), atol=1e-6)
    close(dtm.tilt_weight(r[:3], 2.0), torch.exp(2 * r[:3]))
    r = torch.tensor([-700.0, 0.0, 700.0]).double()
    close(dtm.tilt_weight(r, 1.0).log(), r)
    close(dtm.tilt_weight(r * 1e300, 1.0, normalize=True), torch.tensor([0.0, 0.0, 3.0]).double())


def test_D1_tilting_twice_is_tilting_once():
    rho, r = law(1), rewards(2)
    close(dtm.exact_tilt(dtm.exact_tilt(rho, r, 0.7), r, 1.9), dtm.exact_tilt(rho, r, 2.6))
    raw = rho * torch.exp(2.6 * r)
    close(dtm.exact_tilt(rho, r, 2.6), raw / raw.sum())


def test_D9_next_h_is_where_the_effective_sample_size_meets_its_bound():
    r = torch.rand(1000, generator=Generator().manual_seed(0))
    for ess in (0.3, 0.9):
        w = torch.exp(dtm.next_h(r, ess, 100.0) * r.double())
        assert w.sum() ** 2 / (1000 * w.square().sum()) == pytest.approx(ess, abs=1e-6)
    assert dtm.next_h(r, 0.3, 0.5) == 0.5
    for same in (torch.ones(9), torch.full((1,), -700.0), 1e300 * torch.ones(2).double()):
        assert dtm.next_h(same, 1.0, 1e308) == 1e308  # equal rewards keep the sample at any h
    for scale in (1e-290, 1e-9, 1e290):
        h = dtm.next_h(scale * (r.double() - 700), 0.3, 1e308)
        assert h * scale == pytest.approx(dtm.next_h(r, 0.3, 100.0), rel=1e-6)
    values, counts = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([5, 3, 2])
    listed = dtm.next_h(values.repeat_interleave(counts), 0.8, 50.0)
    assert dtm.next_h(values, 0.8, 50.0, p=counts / 10) == pytest.approx(listed)


def test_phases_end_at_a_end():
    steps = [number for step in dtm.phases(1.0, 0.4) for number in step]
    assert steps == pytest.approx([0.0, 0.4, 0.4, 0.4, 0.8, 0.2])
    assert sum(h for _, h in dtm.phases(10.0, lambda a: 0.1 + a)) == pytest.approx(10.0)


# ---- the control variate -------------------------------------------------------------------------
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


# ---- the exact oracles ---------------------------------------------------------------------------
def test_D2_posterior_against_plain_sums():
    close(dtm.exact_posterior(law(3), STATES), posterior_by_sums(law(3), STATES))


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
    rho, r, h = law(1), rewards(2), 1.5
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
    kl, bound = dtm.regret_bound(posterior_table(law(9)), law(1), rewards(2), 0.8, V)
    assert kl > 0.1
    close(kl, bound)
