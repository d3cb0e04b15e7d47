"""Masking and sampling draw from the distributions that they claim, by chi-square tests.

Each test has a fixed generator and rejects a correct implementation with probability 1e-4 over the
choice of the seed. Tests that name a wrong implementation also show that they reject it.
"""

import math
from collections import Counter
from itertools import product

import pytest
import torch
from theory_helpers import L, V, counts_of, digits, draw, last, random_table, rejects
from torch import Generator

import dtm


def exact(model):
    return dtm.exact_marginal(model, V, L).detach()


def constant_model(logits):
    """The same logits (V,) at every position of every state."""
    return lambda xt, where: logits.expand(int(where.sum()), -1)


def test_the_chi_square_test_can_reject():
    p = torch.tensor([0.2, 0.3, 0.5])
    assert not rejects(torch.tensor([2010, 2985, 5005]), 10000 * p)
    assert rejects(torch.tensor([2300, 2900, 4800]), 10000 * p)


def test_random_order_draws_from_the_exact_marginal_and_several_tokens_per_step_do_not():
    model, n = random_table(0), 40_000
    assert not rejects(counts_of(draw(model, n)), n * exact(model))
    assert rejects(counts_of(draw(model, n, per_step=3)), n * exact(model))


def test_blocks_are_decoded_left_to_right():
    model, n = random_table(3), 40_000
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
    states = list(dtm.sample(random_table(4), start, V, generator=Generator().manual_seed(0)))
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
    model = random_table(0)

    def spy(xt, where):
        asked.append(int(where.sum()))
        return model(xt, where)

    last(dtm.sample(spy, torch.full((7, L), V), V, generator=Generator().manual_seed(0)))
    assert asked == [7, 7, 7]


def test_mask_random_draws_k_positions_at_random():
    n, x1 = 60_000, torch.arange(L).expand(60_000, L)
    xt, mask = dtm.mask_random(x1, V, Generator().manual_seed(0))
    assert torch.equal(xt, torch.where(mask, V, x1))
    counts = torch.bincount(digits(mask.long(), 2), minlength=2**L)
    k = dtm.all_sequences(2, L).sum(1)
    expected = torch.tensor([0.0] + [n / (L * math.comb(L, int(i))) for i in k[1:]])
    assert counts[0] == 0 and not rejects(counts[1:], expected[1:])


def test_mask_blockwise_draws_k_positions_at_random():
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
    model = random_table(0)
    assert torch.equal(draw(model, 50, seed=5), draw(model, 50, seed=5))
    assert not torch.equal(draw(model, 50, seed=5), draw(model, 50, seed=6))
    x1 = torch.zeros(50, L, dtype=torch.long)
    once, again = [dtm.mask_random(x1, V, Generator().manual_seed(1))[0] for _ in range(2)]
    assert torch.equal(once, again)
