"""Interpolants and samplers have the laws they claim. Chi-square tests with a fixed generator; each
rejects a correct implementation with probability 1e-4 (over the choice of the seed), and has power
against the named wrongs."""

import math
from collections import Counter
from itertools import product

import pytest
import torch
from theory_helpers import L, V, counts_of, digits, draw, last, law_of, rejects, table
from torch import Generator

import dtm


def constant_model(logits):
    """The same logits (V,) at every position of every state."""
    return lambda xt, where: logits.expand(int(where.sum()), -1)


def test_the_chi_square_test_can_reject():
    p = torch.tensor([0.2, 0.3, 0.5])
    assert not rejects(torch.tensor([2010, 2985, 5005]), 10000 * p)
    assert rejects(torch.tensor([2300, 2900, 4800]), 10000 * p)


def test_random_order_draws_from_the_exact_marginal():
    model, n = table(), 40_000
    assert not rejects(counts_of(draw(model, n)), n * law_of(model))
    assert rejects(
        counts_of(draw(model, n, per_step=3)), n * law_of(model)
    )  # several tokens a step is another law


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
    n = 200_000
    logits = torch.randn(200, generator=Generator().manual_seed(0)) * 2
    model = constant_model(logits)
    noise = Generator().manual_seed(1)
    x = last(dtm.sample(model, torch.full((n, 1), 999), 999, temperature=0.7, generator=noise))
    p = (logits.double() / 0.7).softmax(0)
    often = n * p > 6
    counts = torch.bincount(x[:, 0], minlength=200)
    pooled = torch.cat([counts[often], counts[~often].sum()[None]])
    assert not rejects(pooled, n * torch.cat([p[often], p[~often].sum()[None]]))
    cold = last(dtm.sample(model, torch.full((9, 1), 999), 999, temperature=0))
    assert (cold == logits.argmax()).all()


def test_every_state_is_yielded_and_what_is_known_stays():
    start = torch.tensor([[V, V, V], [V, 1, V], [0, 1, 2]])
    states = list(dtm.sample(table(4), start, V, generator=Generator().manual_seed(0)))
    assert torch.equal(states[0], start) and torch.equal(states[-1][2], start[2])
    assert states[-1][1, 1] == 1
    masks = [(xt == V).sum(1).tolist() for xt in states]
    assert masks == [[3, 2, 0], [2, 1, 0], [1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("order", dtm.ORDERS)
@pytest.mark.parametrize(
    "steps, left",
    [
        pytest.param(3, [8, 5, 2, 0], id="8 masks in 3 steps: 3, 3, 2"),
        pytest.param(5, [8, 6, 4, 2, 1, 0], id="in 5 steps"),
        pytest.param(20, [8, 7, 6, 5, 4, 3, 2, 1, 0], id="in at most 20 steps"),
    ],
)
def test_the_schedule_of_steps(order, steps, left):
    noise = Generator().manual_seed(0)
    model = constant_model(torch.zeros(5))
    blank = torch.full((2, 8), 9)
    states = dtm.sample(model, blank, 9, order=order, steps=steps, generator=noise)
    assert [(xt == 9).sum(1).tolist() for xt in states] == [[k, k] for k in left]


def test_the_mask_is_never_drawn_unless_asked_for():
    loud = constant_model(torch.tensor([0.0, 9.0, 0.0]))
    blank = torch.full((50, 4), 1)
    banned = last(dtm.sample(loud, blank, 1, generator=Generator().manual_seed(0)))
    assert not (banned == 1).any()
    free = last(dtm.sample(loud, blank, 1, temperature=0, steps=4, ban_mask=False))
    assert (free == 1).all()


def test_the_head_is_asked_for_the_committed_positions_only():
    asked = []
    model = table()

    def spy(xt, where):
        asked.append(int(where.sum()))
        return model(xt, where)

    last(dtm.sample(spy, torch.full((7, L), V), V, generator=Generator().manual_seed(0)))
    assert asked == [7, 7, 7]


def test_mask_random_has_its_law():
    n, x1 = 60_000, torch.arange(L).expand(60_000, L)
    xt, mask = dtm.mask_random(x1, V, Generator().manual_seed(0))
    assert torch.equal(xt, torch.where(mask, V, x1))
    counts = torch.bincount(digits(mask.long(), 2), minlength=2**L)
    k = dtm.all_sequences(2, L).sum(1)
    expected = torch.tensor([0.0] + [n / (L * math.comb(L, int(i))) for i in k[1:]])
    assert counts[0] == 0 and not rejects(counts[1:], expected[1:])


def test_mask_blockwise_has_its_law():
    n, length, block = 60_000, 6, 2
    x1 = torch.arange(length).expand(n, length)
    xt, mask = dtm.mask_blockwise(x1, 99, block, Generator().manual_seed(0))
    expected = {}
    for k in range(1, length + 1):  # from the definition: k tokens are still to go
        full, m = (k - 1) // block, (k - 1) % block + 1
        begin = length - (full + 1) * block  # of the active block
        ways = [way for way in product((0, 1), repeat=block) if sum(way) == m]
        for way in ways:
            train = (0,) * begin + way + (0,) * (full * block)
            hidden = (0,) * begin + way + (1,) * (full * block)
            expected[train, hidden] = n / length / len(ways)
    counts = Counter()
    for train, hidden in zip(mask.long().tolist(), (xt == 99).long().tolist(), strict=True):
        counts[tuple(train), tuple(hidden)] += 1
    assert set(counts) == set(expected)
    assert not rejects([counts[pair] for pair in expected], list(expected.values()))


def test_generators_make_runs_repeat():
    model = table()
    assert torch.equal(draw(model, 50, seed=5), draw(model, 50, seed=5))
    assert not torch.equal(draw(model, 50, seed=5), draw(model, 50, seed=6))
    x1 = torch.zeros(50, L, dtype=torch.long)
    once, again = [dtm.mask_random(x1, V, Generator().manual_seed(1))[0] for _ in range(2)]
    assert torch.equal(once, again)


# ---- bad input: one sentence, ValueError ---------------------------------------------------------
LOGITS, X1 = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
W = torch.ones(2, 1)
LAST_ROW_EMPTY = torch.tensor([[True, True, False], [False, False, False]])


def sample_with(**settings):
    return lambda: last(dtm.sample(table(), X1 + V, V, **settings))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: dtm.c_dtm_loss(LOGITS, LOGITS[:1], X1, W), "expected logits"),
        (lambda: dtm.c_dtm_loss(LOGITS, LOGITS, X1, torch.ones(2)), "does not broadcast"),
        (lambda: dtm.c_dtm_loss(LOGITS, LOGITS, X1, W, math.nan), "c must be finite"),
        (lambda: dtm.c_dtm_loss(LOGITS, LOGITS, X1, W * math.inf), "w must be finite"),
        (lambda: dtm.c_dtm_loss(LOGITS, LOGITS, X1 + 5, W), "x1 must hold"),
        (lambda: dtm.self_consistent_loss(LOGITS, LOGITS, X1, W, 0.0), "c must be positive"),
        (lambda: dtm.tilt_weight(torch.tensor([1.0, 50.0]), 2.0), "overflows"),
        (lambda: dtm.tilt_weight(torch.tensor([1.0, math.nan]), 2.0), "not finite"),
        (lambda: dtm.tilt_weight(torch.ones(4), 2.0, True, torch.ones(3)), "must match r"),
        (lambda: dtm.mean_over_masked(torch.ones(2, 3), LAST_ROW_EMPTY), "no masked position"),
        (lambda: dtm.mean_over_masked(torch.ones(4), torch.ones(2, 3).bool()), "does not fit"),
        (lambda: dtm.mask_random(X1, 0), "already holds the mask"),
        (lambda: dtm.mask_random(X1[0], 9), "x1 must be"),
        (lambda: dtm.mask_blockwise(X1, 9, 2), "must divide"),
        (sample_with(order="best"), "order 'best'"),
        (sample_with(per_step=0), "must be >= 1"),
        (sample_with(temperature=-1.0), "temperature -1"),
        (lambda: dtm.next_h(torch.ones(3), 1.5, 1.0), "0 < ess"),
        (lambda: list(dtm.phases(1.0, lambda a: 0.0)), "does not lead"),
        (lambda: dtm.exact_posterior(torch.ones(26), X1[:1]), r"not V\*\*"),
        (lambda: dtm.exact_tilt(torch.ones(4), torch.ones(5), 1.0), "share a shape"),
    ],
)
def test_bad_input_raises_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
