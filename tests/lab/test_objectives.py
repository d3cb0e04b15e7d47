"""The objectives of the rivals, each against a second derivation."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from lab_helpers import CFG, copy_of, frozen, gradient, moves_table, one_position, rejects, table_of
from torch import Generator

import dtm
import maze_lab as lab
from figures.rivals import objectives
from maze_lab import MASK, V

REWARDS = torch.tensor([0.0, 0.3, 0.6, 1.0]).double()


def batch(x, r, net, old, base, **changes):
    settings = {
        "advantage": r - r.mean(),
        "a": 2.0,
        "h": 0.5,
        "noise": Generator().manual_seed(0),
        "start": torch.rand(len(x), generator=Generator().manual_seed(1)),
        "progress": 0.5,
        "spread": r.std().item() if len(r) > 1 else 1.0,
        "count": 10**9,  # in so large a group a path's own reward does not move the mean
        "weight": r,
    }
    networks = {"net": net, "old": old, "base": base}
    return objectives.Batch(x=x, r=r, **networks, **(settings | changes))


def each_token(objective, net, r, base, **changes):
    """Return the mean of an objective over tokens drawn from net, for paths of one token."""
    p = net.logits[MASK, 0].softmax(-1).detach()
    old, losses = copy_of(net), []
    for token in range(V):
        settings = {"advantage": r[token : token + 1] - p @ r, "spread": 1.0} | changes
        x = torch.tensor([[token]])
        losses.append(objective(batch(x, r[token : token + 1], net, old, base, **settings)))
    return p @ torch.stack(losses)


# ---- likelihoods and objectives ------------------------------------------------------------------
def test_D11_sequence_law_is_the_marginal_and_has_its_gradient():
    net, x = moves_table(3, 0), dtm.all_sequences(V, 3)
    weight = torch.rand(V**3, generator=Generator().manual_seed(1)).double()
    short = objectives.sequence_law(net, x, MASK)
    full = dtm.exact_marginal(net, V, 3)
    torch.testing.assert_close(short, full)
    torch.testing.assert_close(gradient(weight @ short, net), gradient(weight @ full, net))


def test_D11_sequence_law_of_a_net():
    torch.manual_seed(0)
    net, x = lab.MazeNet(3, CFG), dtm.all_sequences(V, 3)
    expected = dtm.exact_marginal(net, V, 3).detach()
    actual = objectives.sequence_law(net, x, MASK).detach()
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-5)


def test_exact_reinforce_has_the_gradient_of_reward_minus_kl():
    """Every sequence once, from a uniform sampler: the estimate is then the expectation, and its
    optimum the tilt."""
    length, a = 2, 2.0
    net, base = moves_table(length, 0, 0.1), frozen(moves_table(length, 1))
    old = frozen(moves_table(length, 0, 0.0))
    x = dtm.all_sequences(V, length)
    r = torch.rand(len(x), generator=Generator().manual_seed(2)).double()
    b = batch(x, r, net, old, base, a=a)
    rho = dtm.exact_marginal(net, V, length)
    rho_0 = dtm.exact_marginal(base, V, length)
    goal = -(rho @ r - (rho * (rho / rho_0).log()).sum() / a)
    torch.testing.assert_close(gradient(objectives.exact_reinforce(b), net), gradient(goal, net))

    states = dtm.all_sequences(V + 1, length)
    tilt = dtm.exact_posterior(dtm.exact_tilt(rho_0, r, a), states)
    best = table_of(tilt)
    at_best = replace(b, net=best)
    assert gradient(objectives.exact_reinforce(at_best), best).abs().max() < 1e-9


def test_on_paths_of_one_token_all_surrogates_are_the_likelihood():
    """At L = 1, where theta is the sampler and the KL weighs nothing, every policy gradient is that
    of REINFORCE."""
    x = torch.tensor([[0], [1], [1], [2], [3], [3], [3], [0]])
    r = torch.rand(V, generator=Generator().manual_seed(3)).double()[x[:, 0]]
    net = moves_table(1, 0)
    old = copy_of(net)
    b = batch(x, r, net, old, frozen(moves_table(1, 1)), a=1e12)
    exact = gradient(objectives.exact_reinforce(b), net)
    for rival in (objectives.spg, objectives.diffu_grpo_k2, objectives.elbo_reinforce):
        torch.testing.assert_close(gradient(rival(b), net), exact)
    torch.testing.assert_close(gradient(objectives.uni_grpo_k2(b), net) * (r.std() + 1e-4), exact)

    weight = b.advantage.softmax(0) - (-b.advantage).softmax(0)
    by_hand = -(weight * objectives.sequence_law(net, x, MASK).log()).sum()
    torch.testing.assert_close(gradient(objectives.wd1(b), net), gradient(by_hand, net))


@pytest.mark.parametrize(
    "shift, stopped",
    [
        pytest.param(
            [2.0, 0.9, 0.0, 0.0], 0, id="a good token above 1.5 times its old probability"
        ),
        pytest.param([0.0, -3.0, 0.0, 0.0], 1, id="a bad one below half of it"),
    ],
)
def test_clipped_ratios_stop_where_they_should(shift, stopped):
    old = frozen(one_position(torch.zeros(V)))
    for row, advantage in enumerate((1.0, -1.0)):
        net = one_position(torch.tensor(shift))
        x, r = torch.tensor([[row]]), torch.tensor([0.5]).double()
        advantage = torch.tensor([advantage]).double()
        b = batch(x, r, net, old, old, a=1e12, advantage=advantage)
        still = gradient(objectives.diffu_grpo_k2(b), net).abs().max() < 1e-9
        assert still == (row == stopped)


@pytest.mark.parametrize("estimator, of_base", [("k2", False), ("k3", True)])
def test_a_kl_estimator_as_a_loss_has_the_gradient_of_which_kl(estimator, of_base):
    """On fixed draws from theta: k2 of KL(theta || base), k3 of KL(base || theta)."""
    net, base = moves_table(1, 0), frozen(moves_table(1, 1))
    p, q = [model.logits[MASK, 0].softmax(-1) for model in (net, base)]
    estimate = p.detach() @ objectives.kl_estimate(q.log(), p.log(), estimator)
    distance = (q * (q / p).log()).sum() if of_base else (p * (p / q).log()).sum()
    torch.testing.assert_close(gradient(estimate, net), gradient(distance, net))


WITH_K2 = [objectives.diffu_grpo_k2, objectives.uni_grpo_k2, objectives.espo]


@pytest.mark.parametrize("objective", WITH_K2, ids=lambda objective: objective.__name__)
def test_with_k2_the_optimum_is_the_tilt(objective):
    base = frozen(moves_table(1, 1))
    p_0 = base.logits[MASK, 0].softmax(-1)
    at_tilt = one_position(dtm.exact_tilt(p_0, REWARDS, 2.0).log())
    size = gradient(each_token(objective, at_tilt, REWARDS, base, spread=0.3), at_tilt).abs().max()
    elsewhere = moves_table(1, 0)
    far = gradient(each_token(objective, elsewhere, REWARDS, base), elsewhere).abs().max()
    assert size < 1e-4 < 1e-2 < far


@pytest.mark.parametrize(
    "objective, beta",
    [
        (objectives.diffu_grpo, 0.04),
        (objectives.uni_grpo, 0.01),
        (objectives.uni_grpo_k3_at_tilt, 0.02),
    ],
)
def test_with_k3_the_optimum_is_rational(objective, beta):
    """p = beta p_0 / (const - r): it keeps far more of the worst token than the tilt 1/beta."""
    base = frozen(moves_table(1, 1))
    p_0 = base.logits[MASK, 0].softmax(-1)
    low, high = 1.0 + 1e-9, 1e3  # the constant, above the largest reward
    for _ in range(200):
        const = (low + high) / 2
        total = beta * (p_0 / (const - REWARDS)).sum()
        low, high = (const, high) if total > 1 else (low, const)
    rational = beta * p_0 / (const - REWARDS)
    net = one_position(rational.log())
    loss = each_token(objective, net, REWARDS, base, a=1 / beta)
    assert gradient(loss, net).abs().max() < 1e-4
    assert rational[0] > 1e6 * dtm.exact_tilt(p_0, REWARDS, 1 / beta)[0]


# ---- states and estimators of GDSD, ESPO, JustGRPO, TraFL ----------------------------------------
def test_split_masks_are_complements_of_every_size():
    L = 3
    x = torch.zeros(L + 1, L, dtype=torch.long)
    masks = objectives.split_masks(x, 2, Generator().manual_seed(0))
    assert torch.equal(masks[0::2], ~masks[1::2])
    for mask in masks:
        assert sorted(mask.sum(1).tolist()) == list(range(L + 1))


def test_proper_split_masks_are_never_empty():
    x = torch.zeros(500, 3, dtype=torch.long)
    masks = objectives.proper_split_masks(x, 2, Generator().manual_seed(0))
    assert torch.equal(masks[0::2], ~masks[1::2])
    assert masks.any(-1).all()


def test_D6_espos_bound_is_unbiased():
    """Its mean over sizes k = 0..L and masks of a size is the bound over k = 1..L."""
    length = 3
    net, x = moves_table(length, 0, 1.0), torch.tensor([[0, 2, 1], [3, 3, 0]])
    espo, bound = 0.0, 0.0
    for mask in dtm.all_sequences(2, length).bool():
        k = int(mask.sum())
        probability = 1 / ((length + 1) * math.comb(length, k))
        rows = mask.expand(len(x), -1)
        espo = espo + probability * objectives.split_elbo(net, x, torch.stack([rows, ~rows]))
        if k > 0:
            logs = torch.where(
                rows,
                net(x.masked_fill(rows, MASK)).log_softmax(-1).gather(-1, x[..., None])[..., 0],
                0,
            )
            bound = bound + logs.sum(1) / k / math.comb(length, k)
    torch.testing.assert_close(espo, bound)


def first_masked(pi):
    """Chooses the first masked position of a state, for `exact_marginal`."""
    return torch.cat([pi[:, :1], torch.zeros_like(pi[:, 1:])], 1)


def test_left_to_right_logs_are_the_law_of_that_order():
    net, x = moves_table(3, 0, 1.0), dtm.all_sequences(V, 3)
    law = objectives.left_to_right_logs(net, x).sum(1).exp()
    torch.testing.assert_close(law, dtm.exact_marginal(net, V, 3, choose=first_masked))


def test_just_grpo_has_the_gradient_of_the_left_to_right_reward():
    """Every path once, from a uniform sampler at theta: REINFORCE over the spread, per token."""
    net, x = moves_table(2, 0, 0.0), dtm.all_sequences(V, 2)
    r = torch.rand(len(x), generator=Generator().manual_seed(2)).double()
    b = batch(x, r, net, net, net)
    law = dtm.exact_marginal(net, V, 2, choose=first_masked)
    expected = -gradient(law @ r, net) / (b.spread + 1e-4) / 2
    torch.testing.assert_close(gradient(objectives.just_grpo(b), net), expected)


def test_an_own_reward_in_the_mean_shrinks_the_advantage():
    """E[r_i - mean_G r | y_i] = (1 - 1/G)(r_i - E r); leave-one-out does not shrink."""
    p, G = torch.tensor([0.1, 0.2, 0.3, 0.4]).double(), 3
    groups = dtm.all_sequences(V, G)
    probability = p[groups[:, 1:]].prod(1)  # of the others
    r = REWARDS[groups]
    advantage = r[:, 0] - r.mean(1)
    b = batch(groups, r[:, 0], None, None, None, advantage=advantage, count=G)
    for own in range(V):
        rows = groups[:, 0] == own
        centred = REWARDS[own] - p @ REWARDS
        torch.testing.assert_close(probability[rows] @ advantage[rows], (1 - 1 / G) * centred)
        torch.testing.assert_close(probability[rows] @ b.leave_one_out[rows], centred)


def test_trajectory_balance_with_the_exact_likelihood_ends_at_the_tilt():
    """Its loss is 0 there, and its gradient with it."""
    length, a = 2, 3.0
    base, x = frozen(moves_table(length, 1)), dtm.all_sequences(V, length)
    r = torch.rand(len(x), generator=Generator().manual_seed(2)).double()
    rho_0 = dtm.exact_marginal(base, V, length)
    tilt = dtm.exact_posterior(dtm.exact_tilt(rho_0, r, a), dtm.all_sequences(V + 1, length))
    best = table_of(tilt)
    b = batch(x, r, best, base, base, a=a)
    loss = objectives.trafl_exact(b)
    assert loss < 1e-12 and gradient(loss, best).abs().max() < 1e-6
    other = moves_table(length, 0)
    assert objectives.trafl_exact(replace(b, net=other)) > 1e-3


# ---- GDSD ----------------------------------------------------------------------------------------
def euler_step(teacher, rho, r, psi):
    """pi(v|xt,i) e^{psi E[r | xt, x1_i = v]}, normalised: a table; and log of the normaliser."""
    length = teacher.logits.shape[1]
    states = dtm.all_sequences(V + 1, length)
    x = dtm.all_sequences(V, length)
    agree = ((states[:, None] == x) | (states == MASK)[:, None]).all(-1)  # (S, N)
    is_v = torch.nn.functional.one_hot(x, V).double()  # (N, L, V)
    joint = torch.einsum("sn,nlv->slv", agree * rho, is_v)
    reward = torch.einsum("sn,nlv->slv", agree * rho * r, is_v) / joint.clamp_min(1e-300)
    logits = teacher.logits.detach().log_softmax(-1) + psi * reward
    return dtm.Table(logits.log_softmax(-1)), logits.logsumexp(-1)


def test_gdsds_ideal_fixed_point_is_an_euler_step(monkeypatch):
    length, psi = 2, 1.5
    states = dtm.all_sequences(V + 1, length)
    x = dtm.all_sequences(V, length)
    rho = dtm.exact_marginal(moves_table(length, 0), V, length).detach()
    r = torch.rand(len(x), generator=Generator().manual_seed(2)).double()
    old = frozen(table_of(dtm.exact_posterior(rho, states)))
    net, constants = euler_step(old, rho, r, psi)

    def constant(xt):
        return constants[dtm.state_number(xt, V)]

    total = 0.0
    for mask in dtm.all_sequences(2, length)[1:].bool():
        monkeypatch.setattr(objectives, "random_masks", lambda x, n, g, mask=mask: mask[None, None])
        for i, probability in enumerate(rho.tolist()):
            row = (x[i : i + 1], r[i : i + 1])
            b = batch(*row, net, old, old, advantage=row[1], h=psi, extra=constant)
            total = total + probability * objectives.gdsd_ideal(b)
    masked = (states == MASK)[..., None]
    assert (gradient(total, net) * masked).abs().max() < 1e-9 < 1e-3 < total


def test_gdsds_steps_approach_the_tilt_as_they_shrink():
    """The distance falls as psi^2: an Euler scheme's error is O(psi), its KL the square of it."""
    length, a = 2, 3.0
    states = dtm.all_sequences(V + 1, length)
    rho_0 = dtm.exact_marginal(moves_table(length, 0), V, length).detach()
    r = torch.rand(len(rho_0), generator=Generator().manual_seed(2)).double()
    target = dtm.exact_tilt(rho_0, r, a)
    distances = []
    for steps in (4, 8, 16):
        rho = rho_0
        for _ in range(steps):
            teacher = table_of(dtm.exact_posterior(rho, states))
            moved, _ = euler_step(teacher, rho, r, a / steps)
            rho = dtm.exact_marginal(moved, V, length).detach()
        distances.append((target * (target / rho).log()).sum().item())
    for large, small in itertools.pairwise(distances):
        assert 3 < large / small < 6


def test_gdsd_of_the_authors_is_reinforce_with_a_dead_zone():
    """At theta = old the gradient is that of -2 psi K/L A S (and nothing of the base); once S has
    moved by 4e-4 nothing is left but its weak anchor, whatever the advantage."""
    x, r = torch.tensor([[0], [1], [2], [3]]), REWARDS
    net = moves_table(1, 0)
    old = copy_of(net)
    b = batch(x, r, net, old, frozen(moves_table(1, 1)))
    score = objectives.hidden_logs(net, x, torch.ones_like(x, dtype=torch.bool))[:, 0] / 2
    reinforce = gradient(-2 * 10.0 * 2 * (b.advantage * score).mean(), net)
    torch.testing.assert_close(gradient(objectives.gdsd(b), net), reinforce, atol=1e-3, rtol=1e-3)

    moved = dtm.Table(net.logits.detach() + torch.tensor([0.3, 0.0, -0.3, 0.1]))
    left = gradient(objectives.gdsd(replace(b, net=moved)), moved).abs().max()
    assert left < 1e-3 < 1 < reinforce.abs().max()


# ---- DMPO ----------------------------------------------------------------------------------------
def random_law(seed):
    return torch.randn(27, generator=Generator().manual_seed(seed)).double().softmax(0)


def test_D10_dmpo_weights_with_exact_likelihoods_are_the_tilt_over_the_sampler():
    base, old, alpha = random_law(1), random_law(2), 0.3
    r = torch.rand(27, generator=Generator().manual_seed(3)).double()
    u, v = objectives.dmpo_weights(r, old.log(), base.log(), alpha=alpha)
    for weights, tilt in ((u, 1 / alpha), (v, -1 / alpha)):
        ratio = dtm.exact_tilt(base, r, tilt) / old
        torch.testing.assert_close(weights, ratio / ratio.sum())


def test_D10_tied_rewards_give_no_weight_to_u_minus_v():
    u, v = objectives.dmpo_weights(
        torch.ones(27), random_law(1).log(), random_law(2).log(), alpha=0.1
    )
    assert (u - v).abs().max() < 1e-12


def test_dmpos_masks_are_two_antithetic_pairs_with_their_law():
    """False alarm 1e-4, and the generator is fixed."""
    n, L = 60_000, 3
    masks = objectives.antithetic_masks(torch.zeros(n, L), Generator().manual_seed(0))
    assert torch.equal(masks[2:], ~masks[:2])
    p = 0.1 + 0.9 * (torch.arange(10_000) + 0.5).double() / 10_000  # an integral over the row's u
    expected = []
    for k in dtm.all_sequences(2, L).sum(1).tolist():
        expected.append(n * (p**k * (1 - p) ** (L - k)).mean())
    number = (masks[0].long() * 2 ** torch.arange(L - 1, -1, -1)).sum(1)
    assert not rejects(torch.bincount(number, minlength=2**L), expected)


def test_dmpo_is_a_weighted_cross_entropy_at_its_four_masks():
    x = torch.randint(V, (50, 4), generator=Generator().manual_seed(0))
    net, weight = moves_table(4, 0), torch.randn(50, generator=Generator().manual_seed(1)).double()
    b = batch(x, weight, net, net, net, weight=weight, noise=Generator().manual_seed(0))
    expected = 0.0
    for mask in objectives.antithetic_masks(x, Generator().manual_seed(0)):
        loss = -net(x.masked_fill(mask, MASK)).log_softmax(-1).gather(-1, x[..., None])
        for i in mask.any(1).nonzero()[:, 0]:  # an empty mask counts 0
            expected = expected + weight[i] * loss[i, mask[i], 0].mean() / 4
    torch.testing.assert_close(objectives.dmpo(b), expected)


def test_dmpo_with_exact_likelihoods_ends_at_the_tilt():
    """On paths of one token the bounds are the likelihoods."""
    net, base, a = moves_table(1, 0), frozen(moves_table(1, 1)), 2.0
    old = frozen(one_position(torch.zeros(V)))
    x = torch.arange(V)[:, None]
    b = batch(x, REWARDS, net, old, base, a=a)
    log_old, log_base = objectives.bounds_of_round(b)
    b = replace(b, log_old=log_old, log_base=log_base)
    target = dtm.exact_tilt(dtm.exact_marginal(base, V, 1), REWARDS, a)
    torch.testing.assert_close(objectives.dmpo_u(b), target, atol=1e-6, rtol=1e-5)
    against = dtm.exact_tilt(dtm.exact_marginal(base, V, 1), REWARDS, -a)
    difference = objectives.dmpo_u_minus_v(b)
    torch.testing.assert_close(difference, target - against, atol=1e-6, rtol=1e-5)

    at_target = one_position(target.log())
    b = replace(b, net=at_target, weight=target)
    assert gradient(objectives.dmpo(b), at_target).abs().max() < 1e-9
    assert gradient(objectives.dmpo(replace(b, net=net)), net).abs().max() > 1e-2
