"""The rivals and their accounts, each against a second derivation.

Statistical tests fix their generator; `rejects` states its false alarm.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import CFG, SMALL, L, V, base_net, command, rejects
from torch import Generator

import dtm
import maze_lab as lab
from figures import rivals

VOCABULARY = lab.V  # 4, where V is the samplers' 3
SMALL_METHODS = [replace(method, rounds=min(method.rounds, 4)) for method in rivals.METHODS]


def moves_table(length, seed, scale=0.3):
    g = Generator().manual_seed(seed)
    logits = torch.randn((VOCABULARY + 1) ** length, length, VOCABULARY, generator=g)
    return dtm.Table(scale * logits.double())


def frozen(model):
    return model.requires_grad_(False)


def one_position(row):
    """A model of one position with the logits `row` (V,), whatever it sees."""
    return dtm.Table(row.double().expand(VOCABULARY + 1, 1, VOCABULARY).clone())


def batch(x, r, net, old, base, **changes):
    settings = {
        "advantage": r - r.mean(),
        "a": 2.0,
        "noise": Generator().manual_seed(0),
        "u": torch.rand(len(x), generator=Generator().manual_seed(1)),
        "part": 0.5,
        "weight": r,
    }
    return rivals.Batch(net, old, base, x, r, **(settings | changes))


def gradient(loss, net):
    return torch.autograd.grad(loss, net.logits)[0]


def judge_with_frontier(base, a_end):
    return rivals.FrontierJudge(SMALL, lab.tabulate(base, SMALL.L), a_end)


# ---- likelihoods and objectives ------------------------------------------------------------------
def test_D11_sequence_law_is_the_marginal_and_has_its_gradient():
    net, x = moves_table(3, 0), dtm.all_sequences(VOCABULARY, 3)
    weight = torch.rand(VOCABULARY**3, generator=Generator().manual_seed(1)).double()
    short = rivals.sequence_law(net, x, VOCABULARY)
    full = dtm.exact_marginal(net, VOCABULARY, 3)
    torch.testing.assert_close(short, full)
    torch.testing.assert_close(gradient(weight @ short, net), gradient(weight @ full, net))


def test_D11_sequence_law_of_a_net():
    torch.manual_seed(0)
    net, x = lab.MazeNet(3, CFG), dtm.all_sequences(VOCABULARY, 3)
    expected = dtm.exact_marginal(net, VOCABULARY, 3).detach()
    actual = rivals.sequence_law(net, x, VOCABULARY).detach()
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-5)


def test_exact_reinforce_has_the_gradient_of_reward_minus_kl():
    """Every sequence once, from a uniform sampler: the estimate is then the expectation, and its
    optimum the tilt."""
    length, a = 2, 2.0
    net, base = moves_table(length, 0, 0.1), frozen(moves_table(length, 1))
    old = frozen(moves_table(length, 0, 0.0))
    x = dtm.all_sequences(VOCABULARY, length)
    r = torch.rand(len(x), generator=Generator().manual_seed(2)).double()
    b = batch(x, r, net, old, base, a=a)
    rho = dtm.exact_marginal(net, VOCABULARY, length)
    rho_0 = dtm.exact_marginal(base, VOCABULARY, length)
    goal = -(rho @ r - (rho * (rho / rho_0).log()).sum() / a)
    torch.testing.assert_close(gradient(rivals.exact_reinforce(b), net), gradient(goal, net))

    states = dtm.all_sequences(VOCABULARY + 1, length)
    tilt = dtm.exact_posterior(dtm.exact_tilt(rho_0, r, a), states)
    best = dtm.Table(tilt.log().clamp_min(-60))
    at_best = replace(b, net=best)
    assert gradient(rivals.exact_reinforce(at_best), best).abs().max() < 1e-9


def test_on_paths_of_one_token_all_surrogates_are_the_likelihood():
    """At L = 1, where theta is the sampler and the KL weighs nothing, every policy gradient is that
    of REINFORCE."""
    x = torch.tensor([[0], [1], [1], [2], [3], [3], [3], [0]])
    r = torch.rand(VOCABULARY, generator=Generator().manual_seed(3)).double()[x[:, 0]]
    net = moves_table(1, 0)
    old = frozen(dtm.Table(net.logits.detach().clone()))
    b = batch(x, r, net, old, frozen(moves_table(1, 1)), a=1e12)
    exact = gradient(rivals.exact_reinforce(b), net)
    for rival in (rivals.spg, rivals.diffu_grpo, rivals.elbo_reinforce):
        torch.testing.assert_close(gradient(rival(b), net), exact)
    torch.testing.assert_close(gradient(rivals.uni_grpo(b), net) * r.std(), exact)

    weight = b.advantage.softmax(0) - (-b.advantage).softmax(0)
    by_hand = -(weight * rivals.sequence_law(net, x, VOCABULARY).log()).sum()
    torch.testing.assert_close(gradient(rivals.wd1(b), net), gradient(by_hand, net))


@pytest.mark.parametrize(
    "shift, stopped",
    [
        pytest.param([2.0, 0.9, 0.0, 0.0], 0, id="a good token above 1.5 times its old chance"),
        pytest.param([0.0, -3.0, 0.0, 0.0], 1, id="a bad one below half of it"),
    ],
)
def test_clipped_ratios_stop_where_they_should(shift, stopped):
    old = frozen(one_position(torch.zeros(VOCABULARY)))
    for row, advantage in enumerate((1.0, -1.0)):
        net = one_position(torch.tensor(shift))
        x, r = torch.tensor([[row]]), torch.tensor([0.5]).double()
        advantage = torch.tensor([advantage]).double()
        b = batch(x, r, net, old, old, a=1e12, advantage=advantage)
        still = gradient(rivals.diffu_grpo(b), net).abs().max() < 1e-9
        assert still == (row == stopped)


def test_the_kl_estimate_has_the_mean_of_the_kl():
    """Without advantage the mean of e^d - d - 1 over tokens from theta is KL(theta || base)."""
    net, base, old = moves_table(1, 0), frozen(moves_table(1, 1)), frozen(moves_table(1, 2))
    p, q = [model.logits[VOCABULARY, 0].softmax(-1) for model in (net, base)]
    mask, losses = torch.ones(1, 1, dtype=torch.bool), []
    for token in range(VOCABULARY):
        b = batch(torch.tensor([[token]]), torch.zeros(1).double(), net, old, base)
        losses.append(rivals.clipped(b, mask))
    torch.testing.assert_close(2.0 * p @ torch.stack(losses), (p * (p / q).log()).sum())


# ---- DMPO ----------------------------------------------------------------------------------------
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
    close(rivals.dmpo_weights(*logs, baseline="none"), u)
    close(rivals.dmpo_weights(*logs), u - v)
    close(rivals.dmpo_weights(*logs, baseline="mean"), u - u.mean())
    unbiased = rivals.dmpo_weights(*logs, baseline="unbiased", log_theta=cur.log())
    close(unbiased, u - 1 / len(u))


def test_dmpo_tied_rewards_give_no_gradient():
    logits = torch.randn(4, 5, generator=Generator().manual_seed(0), requires_grad=True)
    x1 = torch.arange(4)
    tied = rivals.dmpo_weights(torch.ones(4), law_of_27(1)[:4].log(), law_of_27(2)[:4].log(), 0.1)
    rivals.dmpo_loss(logits, x1, tied).sum().backward()
    assert logits.grad.abs().max() < 1e-12
    expected = F.cross_entropy(logits, x1, reduction="none")
    torch.testing.assert_close(rivals.dmpo_loss(logits, x1, torch.ones(4)), expected)


@pytest.mark.parametrize("baseline, message", [("best", "baseline 'best'"), ("unbiased", "no log")])
def test_dmpo_refuses_what_it_does_not_know(baseline, message):
    with pytest.raises(ValueError, match=message):
        rivals.dmpo_weights(torch.ones(4), torch.ones(4), torch.ones(4), 0.1, baseline=baseline)


def test_mask_bernoulli_has_its_law():
    n = 60_000
    x1 = torch.arange(L).expand(n, L)
    xt, mask = rivals.mask_bernoulli(x1, V, Generator().manual_seed(0))
    assert torch.equal(xt, torch.where(mask, V, x1))
    p = 0.1 + 0.9 * (torch.arange(10_000) + 0.5).double() / 10_000  # an integral over the row's u
    expected = []
    for k in dtm.all_sequences(2, L).sum(1).tolist():
        chance = (p**k * (1 - p) ** (L - k)).mean()
        if k == 1:  # a row that masked nothing masks one position
            chance = chance + ((1 - p) ** L).mean() / L
        expected.append(n * chance)
    number = (mask.long() * 2 ** torch.arange(L - 1, -1, -1)).sum(1)
    counts = torch.bincount(number, minlength=2**L)
    assert counts[0] == 0 and not rejects(counts[1:], expected[1:])


def test_dmpo_with_exact_likelihoods_ends_at_the_tilt():
    net, base, a = moves_table(1, 0), frozen(moves_table(1, 1)), 2.0
    old = frozen(one_position(torch.zeros(VOCABULARY)))
    x, r = torch.arange(VOCABULARY)[:, None], torch.tensor([0.0, 0.3, 0.6, 1.0]).double()
    noise = Generator().manual_seed(0)
    weight = rivals.dmpo_round(old, base, x, r, a, "none", noise)
    target = dtm.exact_tilt(dtm.exact_marginal(base, VOCABULARY, 1), r, a)
    torch.testing.assert_close(weight.double(), target, atol=1e-6, rtol=1e-5)

    at_target = one_position(target.log())
    b = batch(x, r, at_target, old, base, weight=target)
    assert gradient(rivals.dmpo(b), at_target).abs().max() < 1e-9
    assert gradient(rivals.dmpo(replace(b, net=net)), net).abs().max() > 1e-2


# ---- scores and accounts -------------------------------------------------------------------------
def test_frontier_is_the_distance_to_the_tilts():
    judge, g = judge_with_frontier(base_net(), 6.0), Generator().manual_seed(0)
    r = judge.r.double()
    for a in (0.0, 3.0, 12.0):
        assert abs(judge.frontier(dtm.exact_tilt(judge.rho_0, r, a))) < 1e-9
    tilts = [dtm.exact_tilt(judge.rho_0, r, a) for a in torch.linspace(-20, 40, 6001).tolist()]
    costs = [lab.kl(p, judge.rho_0) for p in tilts]
    for size in (0.5, 3.0):
        noise = size * torch.randn(len(r), generator=g)
        rho = (judge.rho_0.log() + 2 * r + noise).softmax(0)
        cost, found = lab.kl(rho, judge.rho_0), judge.frontier(rho)
        assert found > 0
        assert found == pytest.approx(min(lab.kl(rho, p) for p in tilts), rel=1e-3)
        same = min(tilts, key=lambda p, rho=rho: abs(p @ r - rho @ r))  # the tilt of this reward
        assert found == pytest.approx(cost - lab.kl(same, judge.rho_0), rel=1e-2)
        affordable = [p @ r for p, c in zip(tilts, costs, strict=True) if c <= cost]
        assert max(affordable) > rho @ r  # nobody is above the frontier


def test_both_directions_are_measured_against_the_end():
    judge, other = judge_with_frontier(base_net(), 6.0), lab.tabulate(base_net(1), SMALL.L)
    found, end = judge.measure(other, 1.0), judge.measure(other, 6.0)
    rho, goal = lab.law(other), dtm.exact_tilt(judge.rho_0, judge.r, 6.0)
    assert found["kl_end"] == pytest.approx(end["kl"]) != pytest.approx(found["kl"], rel=1e-2)
    assert found["kl_reverse"] == pytest.approx((rho * (rho / goal).log()).sum().item())
    # The objective of regularised RL, E r - KL / A, is the reverse KL up to a constant.
    log_z = (judge.rho_0 * (6.0 * judge.r.double()).exp()).sum().log().item()
    objective = found["reward"] - found["kl_base"] / 6.0
    assert objective == pytest.approx((log_z - found["kl_reverse"]) / 6.0)


def run_method(method, cfg, seed, monkeypatch):
    """The trace of a row, without its seconds."""
    monkeypatch.setattr(lab, "make_maze", lambda cfg, seed: SMALL)
    row = rivals.run_method(cfg, method, {"seed": seed, "net": base_net()}, "cpu")
    return [record | {"seconds": 0} for record in row["trace"]]


@pytest.mark.parametrize("method", SMALL_METHODS, ids=lambda method: method.name)
def test_every_method_repeats_itself_and_spends_its_budget(method, monkeypatch):
    method = replace(method, arm=method.arm and replace(method.arm, phases=3))
    trace = run_method(method, CFG, 0, monkeypatch)
    torch.rand(7)  # what others draw from the global generator must not matter
    assert trace == run_method(method, CFG, 0, monkeypatch)
    assert trace != run_method(method, CFG, 1, monkeypatch)
    assert trace[-1]["a"] == pytest.approx(CFG.a_end)

    allowed = rivals.budget(CFG, SMALL.L)
    paths = 2**SMALL.L if method.objective == "exact_reinforce" else 1  # states of a path
    spent = [record["evaluations"] for record in trace]
    assert spent == sorted(spent)
    assert allowed <= spent[-1] <= allowed + 6 * CFG.batch * paths  # one step more, at most


def test_the_budget_is_what_c_dtm_spends(monkeypatch):
    """Counted by a hook on every student and teacher."""
    spent = 0

    def count(module, args, logits):
        nonlocal spent
        if isinstance(module, lab.MazeNet | dtm.Table) and not listing:
            spent += len(args[0]) * (3 if logits.requires_grad else 1)

    listing = False  # tabulating a net, and the judge's look-ups, are not the method's
    plain = lab.tabulate

    def tabulate(net, length):
        nonlocal listing
        listing = True
        table = plain(net, length)
        listing = False
        return table

    monkeypatch.setattr(lab, "tabulate", tabulate)
    base = base_net()
    schedule = lab.PlannedSteps([16.0, 16.0])
    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        for _ in lab.tilt(base, SMALL, replace(lab.LEARNED, phases=2), CFG, schedule, 0):
            pass
    finally:
        hook.remove()
    assert spent == rivals.budget(CFG, SMALL.L)


def test_exact_reinforce_approaches_the_tilt(monkeypatch):
    cfg = replace(CFG, a_end=4.0, steps=300, rollouts=3000)
    method = rivals.Method("x", 3e-3, objective="exact_reinforce", rounds=20)
    base = lab.tabulate(base_net(), SMALL.L)
    before = judge_with_frontier(base_net(), 4.0).measure(base, 4.0)
    end = run_method(method, cfg, 0, monkeypatch)[-1]
    assert end["kl"] < 0.5 * before["kl"] and end["reward"] > before["reward"] + 0.1


def test_too_few_rollouts_for_the_rounds(tmp_path):
    ran = command("-m", "figures.rivals", "--rollouts", "100", "--out", tmp_path)
    assert ran.returncode == 2 and "rounds" in ran.stderr.splitlines()[-1]
