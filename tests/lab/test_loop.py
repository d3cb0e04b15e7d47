"""The loop of the lab: its arms, its control variates and its schedules."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from lab_helpers import CFG, SMALL, base_net, evaluation_of, run_tilt
from torch import Generator

import dtm
import maze_lab as lab
from maze_lab import V

ARMS = {arm.name: arm for arms in (lab.MAIN, *lab.ABLATIONS.values()) for arm in arms}
ONCE = [arm for arm in ARMS.values() if arm.phases in (None, 1)]  # K = 2, ... differ by a number


@pytest.mark.parametrize("arm", ONCE, ids=lambda arm: arm.name)
def test_every_arm_runs_and_the_same_seed_gives_the_same_run(arm):
    base = base_net()
    first = run_tilt(base, arm, CFG, seed=0)
    torch.rand(7)  # what others draw from the global generator must not matter
    assert first == run_tilt(base, arm, CFG, seed=0) != run_tilt(base, arm, CFG, seed=1)
    assert first[-1]["a"] == pytest.approx(CFG.a_end)
    assert len(first) == (arm.phases or CFG.phases)
    assert math.isfinite(first[-1]["kl"])
    if arm.reward_only:
        assert first[-1]["ess"] is None
    else:
        assert 0 < first[-1]["ess"] <= 1
    assert sum(record["h"] for record in first) == pytest.approx(CFG.a_end)


def test_tilt_leaves_its_base_alone_and_hands_over_its_phases():
    base = base_net()
    before = copy.deepcopy(base.state_dict())

    def choose_h(a, r):
        return 10.0 if a == 0 else 30.0  # The second is cut to 22, where the tilt is A = 32.

    phases = list(lab.tilt(base, SMALL, arm=lab.LEARNED, cfg=CFG, choose_h=choose_h, seed=0))
    assert [(phase.a, phase.h) for phase in phases] == [(0.0, 10.0), (10.0, 22.0)]
    assert all(torch.equal(before[name], t) for name, t in base.state_dict().items())
    assert phases[1].teacher is phases[0].next_teacher
    assert torch.equal(phases[0].teacher.logits, lab.tabulate(base, SMALL.L).logits)
    last = lab.tabulate(phases[1].student, SMALL.L)
    assert torch.equal(phases[1].next_teacher.logits, last.logits)


def test_tilting_raises_the_reward_and_approaches_the_tilt():
    cfg = replace(CFG, a_end=4.0, steps=300, rollouts=3000, base_steps=150)
    base = base_net(0, cfg)
    evaluation, table = evaluation_of(base), lab.tabulate(base, SMALL.L)
    end = run_tilt(base, lab.LEARNED, cfg, seed=0)[-1]
    assert end["kl"] < 0.5 * evaluation.measure(table, cfg.a_end)["kl"]
    assert end["success"] > 2 * evaluation.measure(table, 0.0)["success"]


def test_D5_self_consistent_loss_trains_as_the_implicit_one():
    """At c = 1 their gradients are equal, so the runs differ by rounding only."""
    ends = []
    for loss in (dtm.c_dtm_loss, dtm.self_consistent_loss):
        arm = lab.paper_arm("x", c=1.0, loss=loss)
        ends.append(run_tilt(base_net(), arm, CFG, seed=0)[-1]["kl"])
    assert ends[0] == pytest.approx(ends[1], rel=1e-2)


def test_the_batch_loss_is_the_mean_over_masked_positions(monkeypatch):
    """The loop weights each position itself, without a second wait for the mask's indices."""
    masks, losses, batch_losses = [], [], []

    def mask_random(*args):
        masks.append(plain_mask(*args))
        return masks[-1]

    def loss(*args):
        losses.append(dtm.c_dtm_loss(*args))
        return losses[-1]

    def take_step(optimizer, loss, lr):
        batch_losses.append(loss.detach())
        plain_step(optimizer, loss, lr)

    plain_mask, plain_step = dtm.mask_random, dtm.take_step
    base = base_net()
    monkeypatch.setattr(dtm, "mask_random", mask_random)
    monkeypatch.setattr(dtm, "take_step", take_step)
    run_tilt(base, lab.paper_arm("x", c=1.0, loss=loss), CFG, seed=0)
    assert len(batch_losses) == CFG.steps
    for (_, mask), loss_here, found in zip(masks, losses, batch_losses, strict=True):
        rows = loss_here.split(mask.sum(1).tolist())
        expected = torch.stack([row.mean() for row in rows]).mean()
        torch.testing.assert_close(found, expected)


def test_scalar_c_is_the_running_best_of_past_batches():
    """The best scalar is the vertex of a parabola, found here by a least-squares fit of (D7)."""
    control, g = lab.ScalarC(1.0), Generator().manual_seed(0)
    expected = 1.0
    for _ in range(3):
        logits, logits_a = torch.randn(2, 20, V, generator=g)
        token, w = torch.randint(V, (20,), generator=g), torch.rand(20, generator=g)
        share = torch.rand(20, generator=g)
        assert control(None, None) == pytest.approx(expected, rel=1e-4)  # before it learns
        facts = {"logits": logits, "logits_a": logits_a, "token": token, "w": w, "share": share}
        control.learn(control.c, **facts)
        e = torch.nn.functional.one_hot(token, V)
        fixed = share[:, None] * w[:, None] * (logits.softmax(-1) - e)  # the gradient at c = 0
        slope = share[:, None] * (e - logits_a.softmax(-1))  # its derivative in c
        best = torch.linalg.lstsq(slope.reshape(-1, 1), -fixed.reshape(-1, 1)).solution.item()
        expected = 0.9 * expected + 0.1 * best


def test_phases_share_the_budget_and_the_last_is_longer():
    cfg = replace(CFG, rollouts=1000, steps=333, last=2.0)
    rollouts, steps = zip(*lab.phase_sizes(cfg, 5), strict=True)
    assert sum(rollouts) == 1000 and sum(steps) == 333
    assert all(abs(n - 1000 / 6) <= 1 for n in rollouts[:-1])
    assert all(abs(n - 333 / 6) <= 1 for n in steps[:-1])
    assert lab.phase_sizes(cfg, 1) == [(1000, 333)]


def test_reward_only_is_the_policy_gradient_on_the_bound():
    """Advantages reach the loss as weights, with c = 0: it is -(r - mean r) log pi_theta(x1_i)."""
    calls = []

    def loss(*args):
        calls.append(args)
        return dtm.c_dtm_loss(*args)

    cfg, arm = replace(CFG, phases=1, steps=2), replace(lab.REWARD_ONLY, loss=loss)
    schedule = lab.make_schedule(arm, cfg)
    [phase] = lab.tilt(base_net(), SMALL, arm=arm, cfg=cfg, choose_h=schedule, seed=0)
    torch.testing.assert_close(phase.w, phase.r - phase.r.mean())
    logits, _, token, w, c = calls[0]
    score = w * logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]
    torch.testing.assert_close(dtm.c_dtm_loss(*calls[0]), -score)
    assert c == 0


def test_D9_schedules_keep_what_they_promise():
    equal = lab.make_schedule(lab.LEARNED, CFG)
    assert [equal(0.0, None) for _ in range(3)] == pytest.approx([CFG.a_end / 3] * 3)

    r = torch.rand(500, generator=Generator().manual_seed(0))
    adaptive = lab.AdaptiveSchedule(a_end=8.0, phases=2)
    h = adaptive(0.0, r)
    w = torch.exp(h * r.double())
    assert (w.mean() ** 2 / w.square().mean()).item() == pytest.approx(adaptive.ESS, abs=1e-6)
    assert adaptive(h, r) == pytest.approx(8.0 - h)  # The last phase takes what is left.
    equal_rewards = torch.ones(500)  # Their weights are equal for every h, so A is reached at once.
    assert lab.AdaptiveSchedule(a_end=8.0, phases=2)(0.0, equal_rewards) == 8.0
