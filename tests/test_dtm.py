"""The theorems of dtm.py, each against a second derivation: enumeration, float64, finite differences."""

import math

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


def posterior_by_sums(rho, xt):
    """P(x1_i = v | xt) from the definition: sum the law over the sequences that agree with xt."""
    agree = ((X[None] == xt[:, None]) | (xt[:, None] == V)).all(-1).double() * rho  # (B, V^L)
    return torch.stack([(agree[:, :, None] * (X == v)).sum(1) for v in range(V)], -1) / agree.sum(1)[:, None, None]


def training_law(rho):
    """Every (x1, mask) that `mask_random` can produce from x1 ~ rho: rows of x1, mask, and their probability."""
    rows = [(n, mask) for mask in dtm.all_sequences(2, L)[1:].bool() for n in range(V**L)]
    n, mask = torch.tensor([n for n, _ in rows]), torch.stack([m for _, m in rows])
    chance = torch.tensor([1 / (L * math.comb(L, int(m.sum()))) for _, m in rows], dtype=torch.float64)
    return n, mask, rho[n] * chance


def mean_gradient(theta, rho, per_position_loss):
    """Exact gradient of the row-mean loss with respect to a table of logits."""
    student = dtm.Table(theta.clone())
    n, mask, p = training_law(rho)
    loss = per_position_loss(student(torch.where(mask, V, X[n])), X[n], n) * mask / mask.sum(1, keepdim=True).double()
    (p * loss.sum(1)).sum().backward()
    return student.logits.grad


# ---- the loss ------------------------------------------------------------------------------------
def test_compact_equals_gathered_equals_one_hot():
    g = Generator().manual_seed(0)
    logits, logits_a = (torch.randn(4, 5, 7, generator=g).double() for _ in range(2))
    x1, w, mask = torch.randint(7, (4, 5), generator=g), torch.rand(4, 1, generator=g).double() * 5, torch.rand(4, 5, generator=g) < 0.5
    for c in (0.0, 1.0, 2.5, torch.rand(4, 5, generator=g).double()):
        c_full = torch.as_tensor(c).expand(4, 5)[..., None]
        T = c_full * logits_a.softmax(-1) + (w[..., None] - c_full) * F.one_hot(x1, 7)
        dense = -(T * logits.log_softmax(-1)).sum(-1)
        close(dtm.c_dtm_loss(logits, logits_a, x1, w, c), dense)
        c_gathered = c if isinstance(c, float) else c[mask]
        close(dtm.c_dtm_loss(logits[mask], logits_a[mask], x1[mask], w.expand(4, 5)[mask], c_gathered), dense[mask])


def test_mean_gradient_does_not_depend_on_c_and_is_the_tilted_cross_entropy():
    rho, r, h = law(1), rewards(2), 1.7
    w = dtm.tilt_weight(r, h)
    teacher = dtm.exact_posterior(rho, STATES).log().clamp_min(-60)
    theta = torch.randn(teacher.shape, generator=Generator().manual_seed(3)).double()
    table = dtm.Table(teacher)
    state_c = torch.rand((V + 1) ** L, L, generator=Generator().manual_seed(4)).double() * 3
    number = lambda xt: (xt * (V + 1) ** torch.arange(L - 1, -1, -1)).sum(1)
    n, mask, _ = training_law(rho)
    xt = torch.where(mask, V, X[n])
    tilted = dtm.exact_tilt(rho, r, h)
    post = posterior_by_sums(tilted, xt)
    expected = (rho * w).sum() * mean_gradient(theta, tilted, lambda lo, x, n: -(post * lo.log_softmax(-1)).sum(-1))
    assert expected.abs().max() > 1e-3
    for c in (0.0, 1.0, -2.0, state_c[number(xt)]):
        close(mean_gradient(theta, rho, lambda lo, x, n: dtm.c_dtm_loss(lo, table(xt).detach(), x, w[n, None], c)), expected)


def test_gradient_of_the_mean_vanishes_at_the_tilted_posterior_only_there():
    rho, r, h = law(5), rewards(6), 2.3
    w, teacher = dtm.tilt_weight(r, h), dtm.Table(dtm.exact_posterior(rho, STATES).log().clamp_min(-60))
    n, mask, _ = training_law(rho)
    logits_a = teacher(torch.where(mask, V, X[n])).detach()
    loss = lambda lo, x, n: dtm.c_dtm_loss(lo, logits_a, x, w[n, None], 1.0)
    best = posterior_by_sums(dtm.exact_tilt(rho, r, h), STATES).log().clamp_min(-60)
    assert mean_gradient(best, rho, loss).abs().max() < 1e-12
    assert mean_gradient(best + 0.1 * torch.randn(best.shape, generator=Generator().manual_seed(0)), rho, loss).abs().max() > 1e-4


def test_negative_weights_are_unbounded_below_one_by_one():
    far = torch.tensor([[-50.0, 0.0]]), torch.tensor([[-500.0, 0.0]])
    losses = [dtm.c_dtm_loss(lo, torch.zeros(1, 2), torch.tensor([0]), dtm.tilt_weight(torch.tensor([-3.0]), 1.0), 1.0) for lo in far]
    assert losses[1] < losses[0] < -10


def test_explicit_loss_is_the_first_order_of_the_tilt():
    rho, r = law(7), rewards(8)
    n, mask, _ = training_law(rho)
    xt = torch.where(mask, V, X[n])
    pi = posterior_by_sums(rho, STATES)
    teacher = dtm.Table(pi.log().clamp_min(-60))(xt).detach()
    errors = []
    for h in (0.1, 0.05):
        explicit = (dtm.exact_posterior(dtm.exact_tilt(rho, r, 1e-5), STATES) - pi) / 1e-5 * h + pi  # Euler step by finite difference
        gradient = mean_gradient(explicit.clamp_min(1e-30).log(), rho, lambda lo, x, n: dtm.etm_loss(lo, teacher, x, r[n, None], h))
        assert gradient.abs().max() < 1e-6
        errors.append((explicit - dtm.exact_posterior(dtm.exact_tilt(rho, r, h), STATES)).abs().max())
    assert 3.5 < errors[0] / errors[1] < 4.5  # O(h^2)


def test_self_consistent_gradient_is_the_c_dtm_gradient_over_c():
    g = Generator().manual_seed(0)
    logits, logits_a = (torch.randn(6, 5, generator=g).double().requires_grad_() for _ in range(2))
    x1, w = torch.randint(5, (6,), generator=g), torch.rand(6, generator=g).double() * 4
    for c in (0.5, 1.0, 3.0):
        one, = torch.autograd.grad(dtm.c_dtm_loss(logits, logits_a, x1, w, c).sum(), logits)
        two, = torch.autograd.grad(dtm.self_consistent_loss(logits, logits_a, x1, w, c).sum(), logits)
        close(two, one / c)


def test_row_mean_dense_equals_gathered_equals_loops():
    g = Generator().manual_seed(0)
    loss, mask = torch.randn(5, 4, generator=g), torch.rand(5, 4, generator=g) < 0.5
    mask[:, 0] = True
    by_loops = sum(sum(loss[b, i] for i in range(4) if mask[b, i]) / mask[b].sum() for b in range(5)) / 5
    close(dtm.row_mean(loss, mask), by_loops, atol=1e-6)
    close(dtm.row_mean(loss[mask], mask), by_loops, atol=1e-6)


def test_bfloat16_is_reduced_in_float32():
    g = Generator().manual_seed(0)
    logits, logits_a = (torch.randn(8, 2000, generator=g).bfloat16() for _ in range(2))
    x1, w = torch.randint(2000, (8,), generator=g), torch.rand(8, generator=g)
    loss = dtm.c_dtm_loss(logits, logits_a, x1, w)
    assert loss.dtype == torch.float32
    close(loss.double(), dtm.c_dtm_loss(logits.double(), logits_a.double(), x1, w), atol=2e-5)


# ---- weights and annealing -----------------------------------------------------------------------
def test_weights_normalise_by_batch_and_by_group_without_overflow():
    r = torch.tensor([0.0, 1.0, 2.0, 500.0, 400.0])
    group = torch.tensor([7, 7, 3, 3, 3])
    w = dtm.tilt_weight(r, 1.0, normalize=True, group=group)
    close(w[:2], torch.tensor([1.0, math.e]) / ((1 + math.e) / 2), atol=1e-6)
    close(w[2:], torch.tensor([0.0, 3.0, 0.0]), atol=1e-6)
    close(dtm.tilt_weight(r, 1.0, normalize=True).mean(), torch.tensor(1.0), atol=1e-6)
    close(dtm.tilt_weight(r[:3], 2.0), torch.exp(2 * r[:3]))


def test_tilting_twice_is_tilting_once():
    rho, r = law(1), rewards(2)
    close(dtm.exact_tilt(dtm.exact_tilt(rho, r, 0.7), r, 1.9), dtm.exact_tilt(rho, r, 2.6))
    raw = rho * torch.exp(2.6 * r)
    close(dtm.exact_tilt(rho, r, 2.6), raw / raw.sum())


def test_next_h_is_where_the_effective_sample_size_meets_its_bound():
    r = torch.rand(1000, generator=Generator().manual_seed(0))
    for ess in (0.3, 0.9):
        h = dtm.next_h(r, ess, 100.0)
        w = torch.exp(h * r.double())
        assert w.sum() ** 2 / (1000 * w.square().sum()) == pytest.approx(ess, abs=1e-6)
    assert dtm.next_h(r, 0.3, 0.5) == 0.5 and dtm.next_h(torch.ones(9), 0.9, 4.0) == 4.0
    values, counts = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([5, 3, 2])
    assert dtm.next_h(values, 0.8, 50.0, p=counts / 10) == pytest.approx(dtm.next_h(values.repeat_interleave(counts), 0.8, 50.0))


def test_phases_end_at_a_end():
    assert [x for step in dtm.phases(1.0, 0.4) for x in step] == pytest.approx([0.0, 0.4, 0.4, 0.4, 0.8, 0.2])
    assert sum(h for _, h in dtm.phases(10.0, lambda a: 0.1 + a)) == pytest.approx(10.0)


# ---- the control variate -------------------------------------------------------------------------
def logit_gradients(logits, logits_a, x1, w, c):
    logits = logits.clone().requires_grad_()
    dtm.c_dtm_loss(logits, logits_a, x1, w, c).sum().backward()
    return logits.grad


def test_best_c_is_the_argmin_of_the_gradient_variance():
    g = Generator().manual_seed(0)
    logits_a = torch.randn(1, 6, generator=g).double()
    logits, n = logits_a + 0.3 * torch.randn(1, 6, generator=g).double(), 200_000
    x1 = logits_a.softmax(-1)[0].multinomial(n, True, generator=g)
    w = torch.exp(torch.tensor([2.0, 1.0, 0.5, 0.0, 1.5, 0.3]).double())[x1] * (0.5 + torch.rand(n, generator=g).double())
    logits, logits_a = logits.expand(n, 6), logits_a.expand(n, 6)
    grid = torch.arange(0.0, 6.0, 0.01)
    trio = [logit_gradients(logits, logits_a, x1, w, c).var(0).sum() for c in (0.0, 1.0, 2.0)]  # a parabola in c
    bend, slope = (trio[0] - 2 * trio[1] + trio[2]) / 2, (4 * trio[1] - 3 * trio[0] - trio[2]) / 2
    argmin = grid[(trio[0] + slope * grid + bend * grid**2).argmin()].item()
    assert dtm.best_c(logits, logits_a, x1, w).item() == pytest.approx(argmin, abs=0.03)  # sd of the difference: .006


def test_state_target_regression_minimises_the_second_moment_pointwise():
    g = Generator().manual_seed(1)
    logits, logits_a = (torch.randn(50, 6, generator=g).double() for _ in range(2))
    x1, w = torch.randint(6, (50,), generator=g), torch.rand(50, generator=g).double() * 3
    y, q = dtm.state_c_target(logits, logits_a, x1, w)
    moment = lambda c: logit_gradients(logits, logits_a, x1, w, c).square().sum(-1)
    close(moment(y + 1.0) - moment(y), q)  # q (c - y)^2 + const, and so is
    close(moment(y - 2.0) - moment(y), 4 * q)  # the minimum at y
    close(dtm.state_c_target(logits_a, logits_a, x1, w)[0], w, rtol=1e-6)


# ---- the exact oracles ---------------------------------------------------------------------------
def test_posterior_against_plain_sums():
    close(dtm.exact_posterior(law(3), STATES), posterior_by_sums(law(3), STATES))


def test_marginal_is_the_sum_over_orders_and_normalised():
    table = dtm.Table(torch.randn((V + 1) ** L, L, V, generator=Generator().manual_seed(0)).double())
    from itertools import permutations

    expected = torch.zeros(V**L).double()
    for order in permutations(range(L)):
        xt, p = torch.full_like(X, V), torch.ones(V**L).double()
        for i in order:
            p = p * table(xt)[:, i].softmax(-1).gather(1, X[:, i : i + 1])[:, 0]
            xt[:, i] = X[:, i]
        expected += p.detach() / math.factorial(L)
    close(dtm.exact_marginal(table, V, L).detach(), expected)
    assert dtm.exact_marginal(table, V, L).sum().item() == pytest.approx(1)


def test_marginal_is_differentiable():
    small = torch.randn(9, 2, 2, generator=Generator().manual_seed(0)).double().requires_grad_()

    class Model:
        def __call__(self, xt, where=None):
            logits = small[(xt * torch.tensor([3, 1])).sum(1)]
            return logits if where is None else logits[where]

    f = lambda: (dtm.exact_marginal(Model(), 2, 2) * torch.arange(4)).sum()
    grad, = torch.autograd.grad(f(), small)
    with torch.no_grad():
        numeric = torch.zeros_like(small)
        for i in range(small.numel()):
            small.view(-1)[i] += 1e-6
            numeric.view(-1)[i] = f()
            small.view(-1)[i] -= 2e-6
            numeric.view(-1)[i] = (numeric.view(-1)[i] - f()) / 2e-6
            small.view(-1)[i] += 1e-6
    close(grad, numeric, atol=1e-7)


def test_bound_holds_and_its_right_side_is_the_loss_regret():
    rho, r, h = law(1), rewards(2), 1.5
    w, tilted = dtm.tilt_weight(r, h), dtm.exact_tilt(rho, r, h)
    teacher = dtm.Table(dtm.exact_posterior(rho, STATES).log().clamp_min(-60))
    n, mask, p = training_law(rho)
    xt = torch.where(mask, V, X[n])

    def total_loss(model):  # L times the row mean of (D3), c = 1, by enumeration
        per = dtm.c_dtm_loss(model(xt), teacher(xt), X[n], w[n, None], 1.0) * mask / mask.sum(1, keepdim=True).double()
        return L * (p * per.sum(1)).sum()

    best = dtm.Table(dtm.exact_posterior(tilted, STATES).log().clamp_min(-60))
    for seed in range(5):
        student = dtm.Table(torch.randn((V + 1) ** L, L, V, generator=Generator().manual_seed(seed)).double())
        kl, bound = dtm.regret_bound(student, rho, r, h, V)
        assert 0 < kl < bound
        close(bound, (total_loss(student) - total_loss(best)) / (rho * w).sum())
    kl, bound = dtm.regret_bound(best, rho, r, h, V)
    assert abs(kl) < 1e-10 and abs(bound) < 1e-10


def test_bound_is_tight_for_a_consistent_model():
    other, rho, r = law(9), law(1), rewards(2)
    consistent = dtm.Table(dtm.exact_posterior(other, STATES).log().clamp_min(-60))
    kl, bound = dtm.regret_bound(consistent, rho, r, 0.8, V)
    assert kl > 0.1
    close(kl, bound)


# ---- DMPO ----------------------------------------------------------------------------------------
def test_dmpo_weights_with_exact_likelihoods_are_the_tilt_over_the_sampler():
    pre, cur, r, alpha = law(1), law(2), rewards(3), 0.3
    u = dtm.dmpo_weights(r, cur.log(), pre.log(), alpha, baseline="none")
    ratio = dtm.exact_tilt(pre, r, 1 / alpha) / cur
    close(u, ratio / ratio.sum())
    v = dtm.exact_tilt(pre, r, -1 / alpha) / cur
    close(dtm.dmpo_weights(r, cur.log(), pre.log(), alpha), u - v / v.sum())
    close(dtm.dmpo_weights(r, cur.log(), pre.log(), alpha, baseline="mean"), u - u.mean())
    close(dtm.dmpo_weights(r, cur.log(), pre.log(), alpha, baseline="unbiased", log_theta=cur.log()), u - 1 / len(u))


def test_dmpo_tied_rewards_give_no_gradient():
    logits = torch.randn(4, 5, generator=Generator().manual_seed(0), requires_grad=True)
    a = dtm.dmpo_weights(torch.ones(4), law(1)[:4].log(), law(2)[:4].log(), 0.1)
    dtm.dmpo_loss(logits, torch.tensor([0, 1, 2, 3]), a).sum().backward()
    assert logits.grad.abs().max() < 1e-12
    close(dtm.dmpo_loss(logits, torch.tensor([0, 1, 2, 3]), torch.ones(4)), F.cross_entropy(logits, torch.arange(4), reduction="none"), atol=1e-6)
