"""The methods of the comparison, their metrics and their accounts.

The objectives have their own file, test_objectives.py.
"""

import math
from dataclasses import replace

import pytest
import torch
from lab_helpers import CFG, SMALL, base_net
from torch import Generator

import dtm
import maze_lab as lab
from figures.rivals import compare
from figures.rivals.frontier import FrontierEvaluation, frontier_at
from figures.rivals.objectives import Batch, dmpo_u, exact_reinforce

SMALL_METHODS = [replace(method, rounds=min(method.rounds, 4)) for method in compare.METHODS]


def frontier_evaluation(base, a_end):
    return FrontierEvaluation(SMALL, lab.tabulate(base, SMALL.L), a_end)


# ---- scores and accounts -------------------------------------------------------------------------
def test_frontier_is_the_distance_to_the_tilts():
    evaluation, g = frontier_evaluation(base_net(), 6.0), Generator().manual_seed(0)
    r = evaluation.r.double()
    for a in (0.0, 3.0, 12.0):
        assert abs(evaluation.frontier(dtm.exact_tilt(evaluation.rho_0, r, a))) < 1e-9
    tilts = [dtm.exact_tilt(evaluation.rho_0, r, a) for a in torch.linspace(-20, 40, 6001).tolist()]
    costs = [lab.kl(p, evaluation.rho_0) for p in tilts]
    for size in (0.5, 3.0):
        noise = size * torch.randn(len(r), generator=g)
        rho = (evaluation.rho_0.log() + 2 * r + noise).softmax(0)
        cost, found = lab.kl(rho, evaluation.rho_0), evaluation.frontier(rho)
        assert found > 0
        assert found == pytest.approx(min(lab.kl(rho, p) for p in tilts), rel=1e-3)
        same = min(tilts, key=lambda p, rho=rho: abs(p @ r - rho @ r))  # the tilt of this reward
        assert found == pytest.approx(cost - lab.kl(same, evaluation.rho_0), rel=1e-2)
        affordable = [p @ r for p, c in zip(tilts, costs, strict=True) if c <= cost]
        assert max(affordable) > rho @ r  # no distribution is above the frontier


def test_both_directions_are_measured_against_the_end():
    evaluation, other = frontier_evaluation(base_net(), 6.0), lab.tabulate(base_net(1), SMALL.L)
    found, end = evaluation.measure(other, 1.0), evaluation.measure(other, 6.0)
    rho, goal = lab.path_distribution(other), dtm.exact_tilt(evaluation.rho_0, evaluation.r, 6.0)
    assert found["kl_end"] == pytest.approx(end["kl"]) != pytest.approx(found["kl"], rel=1e-2)
    assert found["kl_reverse"] == pytest.approx((rho * (rho / goal).log()).sum().item())
    # The objective of regularised RL, E r - KL / A, is the reverse KL up to a constant.
    log_z = (evaluation.rho_0 * (6.0 * evaluation.r.double()).exp()).sum().log().item()
    objective = found["reward"] - found["kl_base"] / 6.0
    assert objective == pytest.approx((log_z - found["kl_reverse"]) / 6.0)


def row_of(method, cfg, seed, monkeypatch):
    monkeypatch.setattr(lab, "make_maze", lambda cfg, seed: SMALL)
    return compare.run_method(cfg, method, {"seed": seed, "net": base_net()}, "cpu")


def run_method(method, cfg, seed, monkeypatch):
    """The trace of a row, without its seconds."""
    row = row_of(method, cfg, seed, monkeypatch)
    return [record | {"seconds": 0} for record in row["trace"]]


@pytest.mark.parametrize("method", SMALL_METHODS, ids=lambda method: method.name)
def test_every_method_repeats_itself_and_spends_its_budget(method, monkeypatch):
    trace = run_method(method, CFG, 0, monkeypatch)
    torch.rand(7)  # what others draw from the global generator must not matter
    assert trace == run_method(method, CFG, 0, monkeypatch)
    assert method.closed_loop or trace[-1]["a"] == pytest.approx(CFG.a_end)

    allowed = compare.budget(CFG, SMALL.L)
    states = 2**SMALL.L if method.exact else 6  # of a path in a step, at most
    spent = [record["evaluations"] for record in trace]
    assert spent == sorted(spent)
    assert allowed <= spent[-1] <= allowed + 5 * CFG.batch * states  # one step more, at most


def test_the_budget_is_what_c_dtm_spends(monkeypatch):
    """Counted by a hook on every student and teacher."""
    spent = 0

    def count(module, args, logits):
        nonlocal spent
        if isinstance(module, lab.MazeNet | dtm.Table) and not listing:
            spent += len(args[0]) * (3 if logits.requires_grad else 1)

    listing = False  # making a table is not part of the method
    plain = lab.tabulate

    def tabulate(net, length):
        nonlocal listing
        listing = True
        table = plain(net, length)
        listing = False
        return table

    monkeypatch.setattr(lab, "tabulate", tabulate)
    base = base_net()
    arm = replace(lab.LEARNED, phases=2)
    schedule = lab.make_schedule(arm, CFG)
    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        for _ in lab.tilt(base, SMALL, arm=arm, cfg=CFG, choose_h=schedule, seed=0):
            pass
    finally:
        hook.remove()
    assert spent == compare.budget(CFG, SMALL.L)


def test_a_meter_counts_three_for_a_pass_forward_and_back():
    meter, xt = compare.Meter(), torch.full((5, SMALL.L), lab.MASK)
    net = meter.watch(base_net())
    net(xt)
    assert meter.spent == 3 * 5
    with torch.no_grad():
        net(xt)
    assert meter.spent == 4 * 5
    meter.watch(base_net().requires_grad_(False), cost=0.1)(xt)
    assert meter.spent == pytest.approx(4.1 * 5)


def test_a_learned_c_pays_for_its_net():
    """The sizes of the matrices give the ratio of one pass of c's net to L of the student."""
    hidden, d = 64, CFG.width
    small = SMALL.L * (lab.V + 1) * hidden + hidden**2 + hidden * SMALL.L
    attention, forward = 4 * d**2, 8 * d**2
    student = SMALL.L * (CFG.layers * (attention + forward) + d * lab.V)
    cfg = replace(CFG, steps=1000)
    steps = compare.affordable_steps(cfg, lab.LEARNED, base_net(), SMALL.L)
    assert steps * (4 + 3 * small / student) <= 4000 < (steps + 1) * (4 + 3 * small / student)
    assert compare.affordable_steps(cfg, lab.C_1, base_net(), SMALL.L) == 1000


def test_a_distance_to_the_target_is_for_methods_that_have_one(monkeypatch):
    by_name = {method.name: replace(method, rounds=4) for method in compare.METHODS}
    shown = [by_name[name] for name in ("ELBO-REINFORCE", "SPG", "JustGRPO")]
    rows = [row_of(method, CFG, 0, monkeypatch) for method in shown]
    assert rows[0]["target_kl"] == rows[0]["kl_end"]
    assert rows[0]["target_kl_reverse"] == rows[0]["kl_reverse"]
    assert all("target_kl" not in row and "target_kl_reverse" not in row for row in rows[1:])

    arms = [{"name": row["arm"]} for row in rows]
    result = compare.with_other_order({"rows": rows, "arms": arms})
    names = [row["arm"] for row in result["rows"]]
    assert names == ["ELBO-REINFORCE", "SPG", "JustGRPO", "JustGRPO, its order"]
    table = lab.format_table(result, compare.COLUMNS).splitlines()
    assert [line.split().count("-") >= 2 for line in table[1:-1]] == [False, True, True, True]


def test_a_closed_loop_asks_for_what_is_left():
    """Rewards of 0 and 1: after a tilt of s the odds are e^s times as large."""
    before = torch.cat([torch.zeros(5000), torch.ones(5000)]).double()
    odds = math.exp(0.7)
    ones = round(10_000 * odds / (1 + odds))
    now = torch.cat([torch.zeros(10_000 - ones), torch.ones(ones)]).double()
    assert compare.step_reached(before, now, h=1.0) == pytest.approx(0.7, abs=1e-3)
    assert compare.step_reached(before[::500], now[::500], h=1.0) == 1.0  # too few to tell

    schedule = compare.ClosedLoop(a_end=4.0, phases=4)
    assert schedule(0.0, before) == 1.0
    assert schedule(1.0, now) == pytest.approx((4.0 - 0.7) / 3, abs=1e-3)


def test_the_frontier_is_read_where_the_reward_passes():
    looks = [{"reward": 0.5, "frontier": 0.1}, {"reward": 1.0, "frontier": 0.6}]
    assert frontier_at(0.9, looks) == pytest.approx(0.5)
    assert frontier_at(0.9, looks[:1]) is None


def test_a_stopped_table_resumes_with_the_missing_rows(tmp_path, monkeypatch):
    made = []

    def run_method(cfg, method, base, device):
        made.append(method.name)
        return {"arm": method.name, "seed": base["seed"]}

    monkeypatch.setattr(compare, "run_method", run_method)
    for method in (*compare.METHODS[:2], *compare.METHODS):
        row = compare.row_once(tmp_path, CFG, method, {"seed": 0}, "cpu")
        assert row == {"arm": method.name, "seed": 0}
    assert made == [method.name for method in compare.METHODS]


def test_wd1s_reference_is_a_geometric_mixture():
    student, base = base_net(0), base_net(1)
    xt = torch.full((1, SMALL.L), lab.MASK)
    mixed = compare.mixture(student, base, 0.25)(xt).softmax(-1)
    product = student(xt).softmax(-1) ** 0.75 * base(xt).softmax(-1) ** 0.25
    torch.testing.assert_close(mixed, product / product.sum(-1, keepdim=True))


def test_exact_reinforce_approaches_the_tilt(monkeypatch):
    cfg = replace(CFG, a_end=4.0, steps=300, rollouts=3000)
    method = compare.Method("x", 3e-3, exact_reinforce, rounds=20)
    base = lab.tabulate(base_net(), SMALL.L)
    before = frontier_evaluation(base_net(), 4.0).measure(base, 4.0)
    end = run_method(method, cfg, 0, monkeypatch)[-1]
    assert end["kl"] < 0.5 * before["kl"] and end["reward"] > before["reward"] + 0.1


def test_a_method_that_does_not_exist_is_refused_with_the_names(tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare.main(["--only", "DMPO u", "--out", str(tmp_path)])
    refusal = capsys.readouterr().err
    assert "--only DMPO u" in refusal and "DMPO, u;" in refusal


# ---- more rollouts early, and replay -------------------------------------------------------------
def round_of(x, r, log_old, log_base):
    """A round of paths of one token, where the bounds are the likelihoods."""
    old = {"log_old": log_old[x[:, 0]], "log_base": log_base[x[:, 0]]}
    rest = {"start": torch.zeros(len(x)), "spread": 1.0, "count": len(x), "h": 1.0, "a": 2.0}
    networks = dict.fromkeys(("net", "old", "base"))
    noise = Generator().manual_seed(0)
    rewards = {"r": r[x[:, 0]], "advantage": r[x[:, 0]]}
    return Batch(x=x, noise=noise, **networks, **rewards, **old, **rest)


def test_round_sizes_add_up_and_fall_by_the_factor_per_sixteenth_of_the_run():
    cfg = lab.Config()
    for rounds in (16, 128, 2048):
        method = replace(compare.METHODS[4], rounds=rounds)
        assert compare.round_sizes(method, cfg) == [cfg.rollouts // rounds] * rounds
        sizes = torch.tensor(compare.round_sizes(replace(method, decay=0.7), cfg)).double()
        assert sizes.sum() == cfg.rollouts and sizes.min() >= 1
        above = (sizes - 0.25 * cfg.rollouts / rounds).view(16, -1).sum(1)
        torch.testing.assert_close(
            above[1:6] / above[:5], torch.full((5,), 0.7).double(), rtol=0.05, atol=0
        )


def test_dmpo_with_replay_weights_the_rounds_of_different_models_to_the_tilt():
    """Two models draw every token as often as they should, and the weights u lead to rho_a."""
    noise = Generator().manual_seed(1)
    r = torch.rand(4, generator=noise).double()
    log_base = torch.randn(4, generator=noise).double().log_softmax(0)
    counts = ([8, 4, 2, 2], [2, 2, 8, 4])
    rounds = []
    for count in counts:
        x = torch.arange(4).repeat_interleave(torch.tensor(count))[:, None]
        log_old = (torch.tensor(count).double() / 16).log()
        rounds.append(round_of(x, r, log_old, log_base))
    whole = compare.joined(rounds)
    assert torch.equal(whole.x, torch.cat([drawn.x for drawn in rounds]))
    u = dmpo_u(whole)  # (32,)
    found = torch.zeros(4).double().index_add(0, whole.x[:, 0], u)
    torch.testing.assert_close(found, (log_base + 2 * r).softmax(0))
    assert whole.count == 32 and whole.advantage.sum().abs() < 1e-9


def test_a_weighted_batch_has_the_mean_loss_of_all_paths():
    """10,000 draws with a fixed generator; the mean is within 4 standard errors."""
    weight = torch.tensor([0.5, -0.3, 0.2, 0.0]).double()
    whole = round_of(torch.arange(4)[:, None], *[torch.zeros(4).double()] * 3)
    whole = replace(whole, weight=weight)
    values = torch.tensor([1.0, 2.0, -3.0, 7.0]).double()
    batch = compare.draw_batch(whole, 10_000, weighted=True)
    terms = batch.weight * values[batch.x[:, 0]] * 10_000
    error = terms.std() / 100
    assert abs(terms.mean() - weight @ values) < 4 * error


def test_tuning_tries_replay_only_where_the_loss_is_off_policy():
    for method in compare.METHODS:
        tried = compare.variants(method)
        assert any(variant.replay for variant in tried) == method.off_policy
        both = {variant.decay for variant in tried} == {1.0, 0.7}
        assert both == (method.target and method.arm is None)
        assert len({variant.name for variant in tried}) == len(tried)
