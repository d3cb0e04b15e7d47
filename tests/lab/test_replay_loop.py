"""Replay in the loop of the maze lab, and its comparison with fresh rollouts."""

import json
from dataclasses import replace

import pytest
import torch
from lab_helpers import CFG, ROOT, SMALL, base_net, rejects

import dtm
import maze_lab as lab
from figures import replay

ARM = replace(lab.REPLAY, c=1.0)


def phases_of(arm, cfg):
    schedule = lab.make_schedule(arm, cfg)
    return lab.tilt(base_net(), SMALL, arm=arm, cfg=cfg, choose_h=schedule, seed=0)


def test_front_loaded_rollouts_fall_geometrically_above_a_floor():
    cfg = replace(CFG, rollouts=10_000, steps=333)
    rollouts, steps = zip(*lab.phase_sizes(cfg, 5, decay=0.6), strict=True)
    assert sum(rollouts) == 10_000
    above = [n - 0.25 * 10_000 / 5 for n in rollouts]
    for now, following in zip(above, above[1:], strict=False):
        assert following == pytest.approx(0.6 * now, abs=2)
    assert list(steps) == [steps for _, steps in lab.phase_sizes(cfg, 5)]


def test_every_phase_trains_on_all_rollouts_so_far_with_weights_of_mean_one():
    drawn, total = lab.phase_sizes(CFG, 3, ARM.decay), 0
    before = torch.empty(0, SMALL.L, dtype=torch.long)
    for phase, (n, _) in zip(phases_of(ARM, CFG), drawn, strict=True):
        total += n
        assert len(phase.x1) == total and torch.equal(phase.x1[: len(before)], before)
        torch.testing.assert_close(phase.r, SMALL.reward(phase.x1))
        assert phase.w.mean().item() == pytest.approx(1, abs=1e-5)
        for reward in phase.r.unique():  # The weights depend on the rewards only.
            assert phase.w[phase.r == reward].std(correction=0) < 1e-5
        before = phase.x1


def test_the_loss_sees_the_weights_w_of_the_rows_that_were_drawn():
    """u is the weight of the draw; it must not enter the loss a second time."""
    seen = []

    def loss(logits, logits_a, token, w, c):
        seen.append(w)
        return dtm.c_dtm_loss(logits, logits_a, token, w, c)

    cfg = replace(CFG, phases=2, steps=8, rollouts=400, last=1.0)
    *_, last = phases_of(replace(ARM, loss=loss), cfg)
    n = len(last.r) - lab.phase_sizes(cfg, 2, ARM.decay)[1][0]
    u = dtm.replay_weights([last.r[:n], last.r[n:]], [0.0, last.a], last.a)
    w = (last.w / u).unique()  # the weights of all rewards
    for batch in seen[4:]:
        assert ((batch[:, None] - w).abs().amin(1) < 1e-4).all()


def test_the_loss_sees_a_share_of_the_fitted_c_and_the_fit_all_of_it(monkeypatch):
    seen, learned = [], []

    class Control(lab.FixedC):
        def learn(self, c, **facts):
            learned.append(c)

    def loss(logits, logits_a, token, w, c):
        seen.append(c)
        return dtm.c_dtm_loss(logits, logits_a, token, w, c)

    monkeypatch.setattr(lab, "make_control", lambda *settings: Control(3.0))
    for _ in phases_of(replace(ARM, c_share=0.5, loss=loss), CFG):
        pass
    assert seen == [1.5] * CFG.steps and learned == [3.0] * CFG.steps


def test_batches_are_drawn_in_proportion_to_u(monkeypatch):
    """Pearson's test at level 1e-4 of the rewards in the batches of the last phase."""
    batches, mask_random = [], dtm.mask_random

    def watched(x1, *more):
        batches.append(x1)
        return mask_random(x1, *more)

    cfg = replace(CFG, phases=2, steps=9, rollouts=600, batch=500, last=2.0)
    run = phases_of(ARM, cfg)
    first = next(run)  # Base training and the first phase have masked batches, too.
    monkeypatch.setattr(dtm, "mask_random", watched)
    second = next(run)
    earlier, now = second.r[: len(first.r)], second.r[len(first.r) :]
    u = dtm.replay_weights([earlier, now], [0.0, second.a], second.a)
    values, level = second.r.unique(return_inverse=True)
    expected = torch.zeros(len(values)).index_add(0, level, u)
    got = SMALL.reward(torch.cat(batches))
    counts = (got[:, None] == values).sum(0)
    usual = expected > 0.01 * expected.sum()  # rarer rewards together are one cell
    counts = torch.cat([counts[usual], counts[~usual].sum(0, keepdim=True)])
    expected = torch.cat([expected[usual], expected[~usual].sum(0, keepdim=True)])
    full = expected > 0
    expected = expected[full] / expected.sum() * len(got)
    assert not rejects(counts[full], expected)


def row(arm, maze, kl, modes):
    return {"arm": arm, "seed": maze, "kl": kl, "modes": modes, "target_modes": 4.0}


def result_of(rows):
    bases = [{"seed": maze, "success": 10.0 ** -(maze + 2)} for maze in (0, 1)]
    arms = [{"name": "learned c"}, {"name": "replay"}]
    return {"arms": arms, "bases": bases, "rows": rows, "seeds": [0, 1]}


def test_runs_are_averaged_per_maze_before_mazes_are_compared(tmp_path):
    rows = [row("learned c", 0, kl, 3.0) for kl in (0.2, 0.4)]
    rows += [row("learned c", 1, kl, 2.0) for kl in (1.0, 1.0)]
    rows += [row("replay", 0, kl, 4.0) for kl in (0.1, 0.3)]
    rows += [row("replay", 1, kl, 4.0) for kl in (0.5, 0.9)]
    result = result_of(rows)
    lines = replay.table(result).splitlines()
    assert lines[2] == "| 0 | 0.01000 | 0.300 | 0.200 | 0.750 | 1.000 |"
    assert lines[4].startswith("| mean | | 0.650 ± 0.350 | 0.450 ± 0.250 |")
    assert lab.mean_and_error(replay.kl_differences(result), "kl") == pytest.approx((-0.2, 0.1))
    assert replay.title_of(result).endswith("closer on 2 of 2 mazes")
    replay.draw(result, tmp_path / "replay.png")
    assert (tmp_path / "replay.png").stat().st_size > 10_000


def test_the_parts_of_the_kl_are_those_of_the_conditional_distributions():
    """Given that a path is a shortest one, or is not, target and model are distributions, too."""
    base = lab.tabulate(base_net(), SMALL.L)
    evaluation = lab.ExactEvaluation(SMALL, base)
    noise = torch.randn(base.logits.shape, generator=torch.Generator().manual_seed(0))
    model = dtm.Table(base.logits + noise)
    parts = replay.kl_parts(evaluation.measure(model, a=4.0))
    target = dtm.exact_tilt(evaluation.rho_0, evaluation.r, 4.0)
    rho, shortest = lab.path_distribution(model), evaluation.r == 1
    expected = {}
    for name, group in (("shortest", shortest), ("others", ~shortest)):
        p, q = target[group], rho[group]
        expected[name] = (p * (p / p.sum() / (q / q.sum())).log()).sum()
    groups = [(target[group].sum(), rho[group].sum()) for group in (shortest, ~shortest)]
    expected["success"] = sum(p * (p / q).log() for p, q in groups)
    assert parts == pytest.approx({name: float(part) for name, part in expected.items()})
    assert min(parts.values()) > 0.001


def test_replay_claims_what_the_shipped_numbers_say():
    result = json.loads((ROOT / "figures" / "data" / "replay.json").read_text())
    arms = lab.by_arm(result)
    means = {}
    for name, rows in arms.items():
        assert len({row["seed"] for row in rows}) == 10
        assert len(rows) == (10 if "no" in name.split() else 30)
        means[name] = sum(row["kl"] for row in rows) / len(rows)
    words = replay.title_of(result).split()
    assert float(words[2]) == pytest.approx(means["replay"], abs=0.005)
    assert float(words[6]) == pytest.approx(means["learned c"], abs=0.005)
    closer = 0
    for maze in range(10):
        of_maze = {
            name: [row["kl"] for row in rows if row["seed"] == maze] for name, rows in arms.items()
        }
        closer += sum(of_maze["replay"]) < sum(of_maze["learned c"])
    assert (words[11], words[13]) == (str(closer), "10")
    assert means["replay"] < 0.5 * means["learned c"]
