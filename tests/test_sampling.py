"""Interpolants and samplers have the laws they claim. Chi-square tests with a fixed generator; each rejects a
correct implementation with probability 1e-4 (over the choice of the seed), and has power against the named wrongs."""

import math
from itertools import product

import pytest
import torch
from torch import Generator

import dtm

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
    return dtm.Table(scale * torch.randn((V + 1) ** L, L, V, generator=Generator().manual_seed(seed)))


def draw(model, n, seed=0, **kwargs):
    blank = torch.full((n, L), V)
    return list(dtm.sample(model, blank, V, generator=Generator().manual_seed(seed), **kwargs))[-1]


def law_of(model, choose=None):
    return dtm.exact_marginal(model, V, L, choose=choose).detach()


def counts_of(x):
    return torch.bincount(digits(x, V), minlength=V**L)


def test_the_chi_square_test_can_reject():
    p = torch.tensor([0.2, 0.3, 0.5])
    assert not rejects(torch.tensor([2010, 2985, 5005]), 10000 * p)
    assert rejects(torch.tensor([2300, 2900, 4800]), 10000 * p)


def test_random_order_draws_from_the_exact_marginal():
    model, n = table(), 40_000
    assert not rejects(counts_of(draw(model, n)), n * law_of(model))
    assert rejects(counts_of(draw(model, n, per_step=3)), n * law_of(model))  # several tokens a step is another law


def test_confidence_and_state_orders_have_their_enumerated_laws():
    model, n = table(1, 0.6), 40_000
    for order, choose in (("confidence", dtm.confidence_choice), ("state", dtm.state_choice)):
        law = law_of(model, choose)
        assert law.sum().item() == pytest.approx(1)
        assert not rejects(counts_of(draw(model, n, order=order)), n * law)
        assert rejects(counts_of(draw(model, n, order="random")), n * law)


def test_state_order_keeps_the_law_of_a_consistent_model_and_confidence_order_does_not():
    rho = torch.randn(V**L, generator=Generator().manual_seed(2)).double().softmax(0)
    model = dtm.Table(dtm.exact_posterior(rho, dtm.all_sequences(V + 1, L)).log().clamp_min(-60))
    torch.testing.assert_close(law_of(model), rho, atol=1e-12, rtol=0)
    torch.testing.assert_close(law_of(model, dtm.state_choice), rho, atol=1e-12, rtol=0)
    assert (law_of(model, dtm.confidence_choice) - rho).abs().sum() > 0.05


def test_blocks_are_decoded_left_to_right():
    model, n = table(3), 40_000
    expected = torch.zeros(V**L).double()
    x = dtm.all_sequences(V, L)
    for first, second in ((0, 1), (1, 0)):  # block 1 in either order, then position 2
        xt, p = torch.full_like(x, V), torch.ones(V**L).double()
        for i in (first, second, 2):
            p = p * model(xt)[:, i].double().softmax(-1).gather(1, x[:, i : i + 1])[:, 0]
            xt[:, i] = x[:, i]
        expected += p.detach() / 2
    assert not rejects(counts_of(draw(model, n, block=2)), n * expected)
    assert rejects(counts_of(draw(model, n)), n * expected)


def test_temperature_and_gumbel_noise():
    logits, n = torch.randn(200, generator=Generator().manual_seed(0)) * 2, 200_000
    model = lambda xt, where: logits.expand(int(where.sum()), -1)
    x = list(dtm.sample(model, torch.full((n, 1), 999), 999, temperature=0.7, generator=Generator().manual_seed(1)))[-1]
    p = (logits.double() / 0.7).softmax(0)
    keep = n * p > 6
    counts = torch.bincount(x[:, 0], minlength=200)
    assert not rejects(torch.cat([counts[keep], counts[~keep].sum()[None]]), torch.cat([n * p[keep], n * p[~keep].sum()[None]]))
    cold = list(dtm.sample(model, torch.full((9, 1), 999), 999, temperature=0))[-1]
    assert (cold == logits.argmax()).all()


def test_every_canvas_and_the_schedule():
    model = table(4)
    start = torch.tensor([[V, V, V], [V, 1, V], [0, 1, 2]])
    canvases = list(dtm.sample(model, start, V, generator=Generator().manual_seed(0)))
    assert torch.equal(canvases[0], start) and torch.equal(canvases[-1][2], start[2]) and canvases[-1][1, 1] == 1
    masks = torch.stack([(c == V).sum(1) for c in canvases])
    assert masks.tolist() == [[3, 2, 0], [2, 1, 0], [1, 0, 0], [0, 0, 0]]
    wide = lambda xt, where: torch.zeros(int(where.sum()), 5)
    schedules = ((3, [8, 5, 2, 0]), (5, [8, 6, 4, 2, 1, 0]), (20, list(range(8, -1, -1))))  # 8 in 3 steps: 3, 3, 2
    for order, (steps, left) in product(("random", "state", "confidence"), schedules):
        canvases = list(dtm.sample(wide, torch.full((2, 8), 9), 9, order=order, steps=steps, generator=Generator().manual_seed(0)))
        assert [(c == 9).sum(1).tolist() for c in canvases] == [[k, k] for k in left]


def test_the_mask_is_never_drawn_unless_asked_for():
    loud = lambda xt, where: torch.tensor([0.0, 9.0, 0.0]).expand(int(where.sum()), -1)
    blank = torch.full((50, 4), 1)
    assert not (list(dtm.sample(loud, blank, 1, generator=Generator().manual_seed(0)))[-1] == 1).any()
    assert (list(dtm.sample(loud, blank, 1, temperature=0, steps=4, ban_mask=False))[-1] == 1).all()


def test_the_head_is_asked_for_the_committed_positions_only():
    asked = []
    model = table()
    spy = lambda xt, where: asked.append(int(where.sum())) or model(xt, where)
    list(dtm.sample(spy, torch.full((7, L), V), V, generator=Generator().manual_seed(0)))
    assert asked == [7, 7, 7]


def test_mask_random_has_its_law():
    n, x1 = 60_000, torch.arange(L).expand(60_000, L)
    xt, mask = dtm.mask_random(x1, V, Generator().manual_seed(0))
    assert torch.equal(xt, torch.where(mask, V, x1))
    counts = torch.bincount(digits(mask.long(), 2), minlength=2**L)
    k = dtm.all_sequences(2, L).sum(1)
    expected = torch.tensor([0.0] + [n / (L * math.comb(L, int(i))) for i in k[1:]])
    assert counts[0] == 0 and not rejects(counts[1:], expected[1:])


def test_mask_bernoulli_has_its_law():
    n = 60_000
    xt, mask = dtm.mask_bernoulli(torch.arange(L).expand(n, L), V, Generator().manual_seed(0))
    assert torch.equal(xt, torch.where(mask, V, torch.arange(L)))
    p = 0.1 + 0.9 * (torch.arange(10_000) + 0.5).double() / 10_000  # an integral over the row's probability
    k = dtm.all_sequences(2, L).sum(1)
    expected = torch.stack([(p**i * (1 - p) ** (L - i)).mean() + (i == 1) * ((1 - p) ** L).mean() / L for i in k.tolist()])
    counts = torch.bincount(digits(mask.long(), 2), minlength=2**L)
    assert counts[0] == 0 and not rejects(counts[1:], n * expected[1:])


def test_mask_blockwise_has_its_law():
    n, length, block = 60_000, 6, 2
    x1 = torch.arange(length).expand(n, length)
    xt, mask = dtm.mask_blockwise(x1, 99, block, Generator().manual_seed(0))
    expected = {}
    for k in range(1, length + 1):  # from the definition
        full, m = (k - 1) // block, (k - 1) % block + 1
        active = range(length - (full + 1) * block, length - full * block)
        ways = [c for c in product((0, 1), repeat=block) if sum(c) == m]
        for way in ways:
            train = tuple(way[i - active[0]] if i in active else 0 for i in range(length))
            hidden = tuple(train[i] or i >= active[-1] + 1 for i in range(length))
            expected[train, tuple(map(int, hidden))] = n / length / len(ways)
    pairs = list(zip(map(tuple, mask.long().tolist()), map(tuple, (xt == 99).long().tolist())))
    counts = {pair: pairs.count(pair) for pair in set(pairs)}
    assert set(counts) == set(expected)
    assert not rejects([counts[p] for p in expected], list(expected.values()))


def test_generators_make_runs_repeat():
    model = table()
    assert torch.equal(draw(model, 50, seed=5), draw(model, 50, seed=5))
    assert not torch.equal(draw(model, 50, seed=5), draw(model, 50, seed=6))
    x1 = torch.zeros(50, L, dtype=torch.long)
    assert torch.equal(*(dtm.mask_random(x1, V, Generator().manual_seed(1))[0] for _ in range(2)))


# ---- bad input: one sentence, ValueError ---------------------------------------------------------
LOGITS, X1 = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
BAD = {
    "expected logits": lambda: dtm.c_dtm_loss(LOGITS, LOGITS[:1], X1, torch.ones(2, 1)),
    "does not broadcast": lambda: dtm.c_dtm_loss(LOGITS, LOGITS, X1, torch.ones(2)),
    "c must be finite": lambda: dtm.c_dtm_loss(LOGITS, LOGITS, X1, torch.ones(2, 1), math.nan),
    "w must be finite": lambda: dtm.c_dtm_loss(LOGITS, LOGITS, X1, torch.full((2, 1), math.inf)),
    "x1 must hold": lambda: dtm.c_dtm_loss(LOGITS, LOGITS, X1 + 5, torch.ones(2, 1)),
    "overflows": lambda: dtm.tilt_weight(torch.tensor([1.0, 50.0]), 2.0),
    "not finite": lambda: dtm.tilt_weight(torch.tensor([1.0, math.nan]), 2.0),
    "must match r": lambda: dtm.tilt_weight(torch.ones(4), 2.0, normalize=True, group=torch.ones(3)),
    "no masked position": lambda: dtm.row_mean(torch.ones(2, 3), torch.tensor([[True, True, False], [False] * 3])),
    "does not fit": lambda: dtm.row_mean(torch.ones(4), torch.ones(2, 3, dtype=torch.bool)),
    "c must be positive": lambda: dtm.self_consistent_loss(LOGITS, LOGITS, X1, torch.ones(2, 1), 0.0),
    "already holds the mask": lambda: dtm.mask_random(X1, 0),
    "must divide": lambda: dtm.mask_blockwise(X1, 9, 2),
    "x1 must be": lambda: dtm.mask_random(X1[0], 9),
    "order 'best'": lambda: list(dtm.sample(table(), X1 + V, V, order="best")),
    "must be >= 1": lambda: list(dtm.sample(table(), X1 + V, V, per_step=0)),
    "0 < ess": lambda: dtm.next_h(torch.ones(3), 1.5, 1.0),
    "does not lead": lambda: list(dtm.phases(1.0, lambda a: 0.0)),
    "not V**": lambda: dtm.exact_posterior(torch.ones(26), torch.zeros(1, 3, dtype=torch.long)),
    "share a shape": lambda: dtm.exact_tilt(torch.ones(4), torch.ones(5), 1.0),
    "baseline 'best'": lambda: dtm.dmpo_weights(torch.ones(4), torch.ones(4), torch.ones(4), 0.1, baseline="best"),
    "no log_theta": lambda: dtm.dmpo_weights(torch.ones(4), torch.ones(4), torch.ones(4), 0.1, baseline="unbiased"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_raises_one_sentence(message):
    with pytest.raises(ValueError, match=message.replace("**", r"\*\*")) as error:
        BAD[message]()
    assert "\n" not in str(error.value)
