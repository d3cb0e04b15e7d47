"""Wrong input: each function raises ValueError with one sentence that says what to change."""

import math

import pytest
import torch
from theory_helpers import L, V, last, random_table
from torch import Generator, nn

import dtm

LOGITS, X1 = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
W = torch.ones(2, 1)
LAST_ROW_EMPTY = torch.tensor([[True, True, False], [False, False, False]])


def sample_with(**settings):
    return lambda: last(dtm.sample(random_table(0), X1 + V, V, **settings))


def tilt_with(model=None, reward=lambda x1: x1[:, 0], **settings):
    settings = {"rollouts": 9, "steps": 1, "batch": 4} | settings
    return lambda: dtm.tilt_matching(model or random_table(0), reward, V, L, **settings)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: dtm.c_dtm_loss(LOGITS, LOGITS[:1], X1, W), "expected logits"),
        (lambda: dtm.c_dtm_loss(LOGITS, LOGITS, X1, torch.ones(2)), "does not broadcast"),
        (lambda: dtm.control_variate_targets(LOGITS, LOGITS, X1, torch.ones(4)), "not broadcast"),
        (lambda: dtm.tilt_weight(torch.tensor([1.0, 50.0]), 2.0), "overflows"),
        (lambda: dtm.tilt_weight(torch.tensor([1.0, math.nan]), 2.0), "not finite"),
        (lambda: dtm.mean_over_masked(torch.ones(2, 3), LAST_ROW_EMPTY), "no masked position"),
        (lambda: dtm.mean_over_masked(torch.ones(4), torch.ones(2, 3).bool()), "has no entry per"),
        (lambda: dtm.mask_random(X1, 0), "already holds the mask"),
        (lambda: dtm.mask_random(X1[0], 9), "x1 must be"),
        (lambda: dtm.mask_blockwise(X1, 9, 2), "must divide"),
        (sample_with(order="best"), "order 'best'"),
        (sample_with(per_step=0), "must be at least 1"),
        (sample_with(temperature=-1.0), "temperature -1"),
        (lambda: dtm.next_h(torch.ones(3), 1.5, 1.0), "0 < ess"),
        (lambda: list(dtm.phases(1.0, lambda a: 0.0)), "does not lead"),
        (lambda: list(dtm.phases(-1.0, 1.0)), "negate the reward"),
        (lambda: dtm.exact_posterior(torch.ones(26), X1[:1]), r"not V\*\*"),
        (lambda: dtm.exact_tilt(torch.ones(4), torch.ones(5), 1.0), "share a shape"),
        (tilt_with(nn.Identity()), "no parameter requires a gradient"),
        (tilt_with(reward=lambda x1: x1), "one number per row"),
        (tilt_with(reward=lambda x1: x1[:, 0] / 0), "h \\* r is not finite"),
        (tilt_with(c=math.inf), "the loss of this step is"),
    ],
)
def test_bad_input_raises_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_is_reported_by_sampling_and_by_the_training_loop(value):
    model = dtm.Table(torch.full((9, 2, 2), value))
    with pytest.raises(ValueError, match="^sample: a logit was NaN or infinite"):
        last(dtm.sample(model, torch.full((1, 2), 2), 2))
    bad, x1 = torch.tensor([[0.0, value]]).requires_grad_(), torch.tensor([0])
    loss = dtm.c_dtm_loss(bad, bad, x1, torch.ones(1))
    assert not loss.isfinite()
    with pytest.raises(ValueError, match="^the loss of this step is .*; lower lr"):
        dtm.take_step(torch.optim.SGD([bad]), loss, lr=1.0)
    with pytest.raises(ValueError, match="^phases: the step .* does not lead to"):
        list(dtm.phases(abs(value), 1.0))


def test_a_banned_token_has_probability_zero():
    """The logit -1e4, which the messages recommend, is as good as -inf and keeps losses finite."""
    table = dtm.Table(torch.tensor([0.0, -1e4]).expand(9, 2, 2).clone())
    blank = torch.full((500, 2), 2)
    x1 = last(dtm.sample(table, blank, 2, generator=Generator().manual_seed(0)))
    assert (x1 == 0).all()
