"""DMPO's weights, states and loss, each against a second derivation."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import VOCABULARY, L, V, batch, frozen, gradient, moves_table, one_position, rejects
from torch import Generator

import dtm
from figures import objectives


def law_of_27(seed):
    return torch.randn(27, generator=Generator().manual_seed(seed)).double().softmax(0)


def test_dmpo_weights_with_exact_likelihoods_are_the_tilt_over_the_sampler():
    pre, cur, alpha = law_of_27(1), law_of_27(2), 0.3
    r = torch.rand(27, generator=Generator().manual_seed(3)).double()
    logs = (r, cur.log(), pre.log(), alpha)
    u = dtm.exact_tilt(pre, r, 1 / alpha) / cur
    v = dtm.exact_tilt(pre, r, -1 / alpha) / cur
    u, v = u / u.sum(), v / v.sum()
    close = torch.testing.assert_close
    close(objectives.dmpo_weights(*logs, baseline="none"), u)
    close(objectives.dmpo_weights(*logs), u - v)
    close(objectives.dmpo_weights(*logs, baseline="mean"), u - u.mean())
    unbiased = objectives.dmpo_weights(*logs, baseline="unbiased", log_theta=cur.log())
    close(unbiased, u - 1 / len(u))


def test_dmpo_tied_rewards_give_no_gradient():
    logits = torch.randn(4, 5, generator=Generator().manual_seed(0), requires_grad=True)
    x1 = torch.arange(4)
    tied = objectives.dmpo_weights(
        torch.ones(4), law_of_27(1)[:4].log(), law_of_27(2)[:4].log(), 0.1
    )
    objectives.dmpo_loss(logits, x1, tied).sum().backward()
    assert logits.grad.abs().max() < 1e-12
    expected = F.cross_entropy(logits, x1, reduction="none")
    torch.testing.assert_close(objectives.dmpo_loss(logits, x1, torch.ones(4)), expected)


@pytest.mark.parametrize("baseline, message", [("best", "baseline 'best'"), ("unbiased", "no log")])
def test_dmpo_refuses_what_it_does_not_know(baseline, message):
    with pytest.raises(ValueError, match=message):
        objectives.dmpo_weights(torch.ones(4), torch.ones(4), torch.ones(4), 0.1, baseline=baseline)


def test_mask_bernoulli_has_its_law():
    n = 60_000
    x1 = torch.arange(L).expand(n, L)
    xt, mask = objectives.mask_bernoulli(x1, V, Generator().manual_seed(0))
    assert torch.equal(xt, torch.where(mask, V, x1))
    p = 0.1 + 0.9 * (torch.arange(10_000) + 0.5).double() / 10_000  # an integral over the row's u
    expected = []
    for k in dtm.all_sequences(2, L).sum(1).tolist():
        expected.append(n * (p**k * (1 - p) ** (L - k)).mean())
    number = (mask.long() * 2 ** torch.arange(L - 1, -1, -1)).sum(1)
    counts = torch.bincount(number, minlength=2**L)
    assert not rejects(counts, expected)


def test_dmpos_states_are_two_antithetic_pairs():
    x = torch.randint(VOCABULARY, (50, 4), generator=Generator().manual_seed(0))
    masks = objectives.antithetic_masks(x, Generator().manual_seed(0))
    assert torch.equal(masks[2:], ~masks[:2])

    net, weight = moves_table(4, 0), torch.randn(50, generator=Generator().manual_seed(1)).double()
    b = batch(x, weight, net, net, net, weight=weight, noise=Generator().manual_seed(0))
    expected = 0.0
    for mask in masks:
        loss = -net(x.masked_fill(mask, VOCABULARY)).log_softmax(-1).gather(-1, x[..., None])
        for i in mask.any(1).nonzero()[:, 0]:  # an empty mask counts 0
            expected = expected + weight[i] * loss[i, mask[i], 0].mean() / 4
    torch.testing.assert_close(objectives.dmpo(b), expected)


def test_dmpo_with_exact_likelihoods_ends_at_the_tilt():
    net, base, a = moves_table(1, 0), frozen(moves_table(1, 1)), 2.0
    old = frozen(one_position(torch.zeros(VOCABULARY)))
    x, r = torch.arange(VOCABULARY)[:, None], torch.tensor([0.0, 0.3, 0.6, 1.0]).double()
    noise = Generator().manual_seed(0)
    weight = objectives.dmpo_round(old, base, x, r, a, "none", noise)
    target = dtm.exact_tilt(dtm.exact_marginal(base, VOCABULARY, 1), r, a)
    torch.testing.assert_close(weight.double(), target, atol=1e-6, rtol=1e-5)

    at_target = one_position(target.log())
    b = batch(x, r, at_target, old, base, weight=target)
    assert gradient(objectives.dmpo(b), at_target).abs().max() < 1e-9
    assert gradient(objectives.dmpo(replace(b, net=net)), net).abs().max() > 1e-2
