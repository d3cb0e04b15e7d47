"""The other scripts in figures/: gradient variance, the bound along a run, decoding orders."""

import json
import math
import pickle
import sys
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch
from helpers import CFG, SMALL, L, V, base_net, command, counts_of, draw, judge_of, rejects, table
from PIL import Image
from torch import Generator

import dtm
import maze_lab as lab
from figures import control_variate, decoding_order, maze_gif, phases, rivals

VOCABULARY = lab.V  # 4, where V is the samplers' 3


# ---- gradient variance, phases, decoding orders --------------------------------------------------
class StateC:
    """A control variate that depends on the state."""

    def __call__(self, xt, mask):
        return (1 + 0.3 * xt)[mask]


def variance_by_autograd(teacher, rho, w, control):
    """The definition: the gradient of every sequence at every state, its spread around the mean."""
    length = 2
    x, total = dtm.all_sequences(VOCABULARY, length), 0.0
    for mask in dtm.all_sequences(2, length)[1:].bool():
        xt, k = torch.where(mask, VOCABULARY, x), int(mask.sum())
        where = mask.expand_as(xt)
        logits = teacher(xt, where).clone().requires_grad_()
        w_here = w[:, None].expand_as(xt)[where]
        loss = dtm.c_dtm_loss(logits, teacher(xt, where), x[where], w_here, control(xt, where))
        loss.sum().backward()
        gradients = logits.grad.view(len(x), k, VOCABULARY)
        for state in xt.unique(dim=0):
            rows = (xt == state).all(1)
            p = (rho[rows] / rho[rows].sum())[:, None, None]
            spread = (p * (gradients[rows] - (p * gradients[rows]).sum(0)) ** 2).sum()
            total += rho[rows].sum() * spread / (k * length * math.comb(length, k))
    return (total / (rho * w).sum() ** 2).item()


def test_D7_gradient_variance_against_autograd():
    g = Generator().manual_seed(0)
    rho = torch.randn(VOCABULARY**2, generator=g).double().softmax(0)
    w = torch.exp(2 * torch.rand(VOCABULARY**2, generator=g).double())
    pi = dtm.exact_posterior(rho, dtm.all_sequences(VOCABULARY + 1, 2))
    teacher = dtm.Table(pi.log().clamp_min(-60)).requires_grad_(False)
    best = control_variate.ExactBestC(teacher, rho, w)
    found = {}
    for control in (*[lab.FixedC(c) for c in (0.0, 1.5, 3.0)], StateC(), best):
        found[control] = control_variate.gradient_variance(teacher, rho, w, control)
        expected = variance_by_autograd(teacher, rho, w, control)
        assert found[control] == pytest.approx(expected)
    assert 0 < found[best] == min(found.values())


def test_variance_of_any_number_c_from_three_points():
    judge = judge_of(base_net())
    table = lab.tabulate(base_net(), SMALL.L)
    rho, w = lab.law(table), dtm.tilt_weight(judge.r.double(), 1.0)
    known = control_variate.variances_at(table, rho, judge.r, 1.0)
    mean = (rho @ w).item()
    normalised = control_variate.gradient_variance(table, rho, w / mean, lab.FixedC(1.0))
    assert known["c = 1, w / mean"] == pytest.approx(normalised)
    grid = [lab.FixedC(c / 20) for c in range(10, 60)]
    scanned = min(control_variate.gradient_variance(table, rho, w, control) for control in grid)
    assert known["best scalar c"] == pytest.approx(scanned, rel=5e-3)
    assert known["learned c"] <= known["best scalar c"] <= scanned


def test_D7_the_learned_c_fits_its_closed_form():
    """On a fixed teacher: near the best enumerated variance, and better than any scalar."""
    base = base_net(0, replace(CFG, base_steps=200))
    judge, teacher, g = judge_of(base), lab.tabulate(base, SMALL.L), Generator().manual_seed(0)
    w = dtm.tilt_weight(judge.r, 4.0)
    w = w / (judge.rho_0 @ w.double()).float()
    torch.manual_seed(0)
    control = lab.LearnedC(SMALL.L, "cpu")
    for _ in range(600):
        i = judge.rho_0.multinomial(256, True, generator=g)
        xt, mask = dtm.mask_random(judge.x[i], VOCABULARY, g)
        logits_a, c = teacher(xt, mask), control(xt, mask)
        control.learn(c, logits_a, logits_a, judge.x[i][mask], lab.spread(w[i], mask), mask)

    def variance(control):
        return control_variate.gradient_variance(teacher, judge.rho_0, w, control)

    best = variance(control_variate.ExactBestC(teacher, judge.rho_0, w))
    scalar = min(variance(lab.FixedC(c)) for c in (0.8, 0.9, 1.0, 1.1))
    assert best < variance(control) < 0.9 * scalar


def test_D12_both_sides_of_the_bound_along_a_run(monkeypatch):
    monkeypatch.setattr(lab, "make_maze", lambda cfg, seed: SMALL)
    base = {"seed": 0, "net": base_net()}
    row = phases.run_arm(replace(CFG, a_end=6.0), lab.Arm("x", phases=3), base, "cpu")
    first, _, last = row["trace"]
    assert all(0 < p["phase_kl"] <= p["phase_bound"] for p in row["trace"])
    assert first["phase_kl"] == pytest.approx(first["kl"], rel=1e-4)  # its teacher is rho_0
    assert last["phase_kl"] != pytest.approx(last["kl"], rel=1e-2)


@pytest.mark.parametrize(
    "order, choose",
    [("confidence", decoding_order.confidence_choice), ("state", decoding_order.state_choice)],
)
def test_D11_each_decoding_order_has_its_enumerated_law(order, choose):
    model, n = table(1, 0.6), 40_000
    law = dtm.exact_marginal(model, V, L, choose=choose).detach()
    assert law.sum().item() == pytest.approx(1)
    assert not rejects(counts_of(draw(model, n, order=order)), n * law)
    assert rejects(counts_of(draw(model, n, order="random")), n * law)


def test_certainty_keeps_the_law_of_a_consistent_model_and_confidence_does_not():
    rho = torch.randn(27, generator=Generator().manual_seed(2)).double().softmax(0)
    posterior = dtm.exact_posterior(rho, dtm.all_sequences(V + 1, L))
    model = dtm.Table(posterior.log().clamp_min(-60))
    laws = {}
    for name, choose in decoding_order.CHOICES.items():
        laws[name] = dtm.exact_marginal(model, V, L, choose=choose).detach()
    torch.testing.assert_close(laws["random order"], rho, atol=1e-12, rtol=0)
    torch.testing.assert_close(laws["by certainty"], rho, atol=1e-12, rtol=0)
    assert (laws["by confidence"] - rho).abs().sum() > 0.05


# ---- the commands --------------------------------------------------------------------------------
TINY = "--quick --steps 40 --rollouts 256 --batch 8 --base-steps 8 --jobs 2 --seeds 1"
TINY = [*TINY.split(), "--width", "16", "--layers", "1"]


class InThisProcess:
    """In the place of the pool: runs on a small maze end before another process has started. What
    a process would be sent is pickled all the same."""

    def __init__(self, *settings):
        pass

    def submit(self, *call):
        run, *args = pickle.loads(pickle.dumps(call))
        future = Future()
        future.set_result(run(*args))
        return future

    def shutdown(self, cancel_futures):
        pass


@pytest.mark.parametrize(
    "script, key",
    [
        (rivals, "frontier"),
        (control_variate, "grad_var"),
        (phases, "ess"),
        (decoding_order, "modes"),
    ],
)
def test_each_script_makes_its_table_json_and_png_and_redraws(
    tmp_path, monkeypatch, capsys, script, key
):
    name = script.__name__.rpartition(".")[2]
    settings = [*TINY, *(["--phases", "2"] if script != phases else [])]
    monkeypatch.setattr(lab, "make_maze", lambda cfg, seed=0: SMALL)
    monkeypatch.setattr(lab, "ProcessPoolExecutor", InThisProcess)
    few = [replace(method, rounds=16) for method in rivals.METHODS]  # DMPO's 2,048 take long
    monkeypatch.setattr(rivals, "METHODS", few)
    monkeypatch.setattr(sys, "argv", [script.__file__, *settings, "--out", str(tmp_path)])
    script.main()
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / f"quick_{name}.json").read_text())
    assert result["command"].startswith(f"python -m figures.{name} --quick")
    assert len(result["rows"]) == len(result["arms"])
    assert all(math.isfinite(row[key]) and row["arm"] in printed for row in result["rows"])
    picture = tmp_path / f"quick_{name}.png"
    before = picture.read_bytes()
    picture.unlink()
    monkeypatch.setattr(sys, "argv", [script.__file__, "--plot-only", "--out", str(tmp_path)])
    script.main()
    assert picture.read_bytes() == before


def test_tuning_tries_rates_and_rounds_and_says_who_moves(tmp_path, monkeypatch, capsys):
    settings = [*TINY, "--rollouts", "512", "--tune", "--only", "ELBO", "--first-seed", "100"]
    monkeypatch.setattr(lab, "make_maze", lambda cfg, seed=0: SMALL)
    monkeypatch.setattr(lab, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(sys, "argv", [rivals.__file__, *settings, "--out", str(tmp_path)])
    rivals.main()
    result = json.loads((tmp_path / "quick_rivals_tuning_only.json").read_text())
    [method] = [method for method in rivals.METHODS if method.name == "ELBO-REINFORCE"]
    tried = [(arm["lr"] / method.lr, arm["rounds"] / method.rounds) for arm in result["arms"]]
    assert tried == [(1, 1), (0.5, 1), (2, 1), (1, 0.5), (1, 2)]
    scores = {row["arm"]: row["kl_reverse"] for row in result["rows"]}
    assert result["scores"] == scores and {row["seed"] for row in result["rows"]} == {100}
    best = min(scores, key=scores.get)
    verb = "stays" if best == result["arms"][0]["name"] else "MOVES"
    assert f"{verb} {best}" in capsys.readouterr().out


def test_a_script_sends_its_runs_to_processes_of_their_own(tmp_path):
    settings = [*TINY, "--phases", "2", "--only", "c = 1", "--out", tmp_path]
    ran = command("-m", "figures.rivals", *settings)
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "quick_rivals_only.json").read_text())
    assert [row["arm"] for row in result["rows"]] == ["c-DTM, c = 1"]


def test_the_animation_is_small_and_complete(tmp_path, monkeypatch, capsys):
    tiny = {"base_steps": 8, "base_batch": 32, "steps": 16, "phases": 2, "rollouts": 256}
    monkeypatch.setattr(lab, "QUICK", tiny)
    monkeypatch.setattr(lab, "make_maze", lambda cfg, seed=0: SMALL)
    monkeypatch.setattr(sys, "argv", ["maze_gif.py", "--quick", "--out", str(tmp_path)])
    maze_gif.main()
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("reward alone", "one jump", "annealed, learned c"))
    with Image.open(tmp_path / "quick_maze.gif") as image:
        assert image.n_frames > 30 and image.size[0] <= 1000
    assert (tmp_path / "quick_maze.gif").stat().st_size < 2_000_000


def test_a_path_is_drawn_as_far_as_it_is_known():
    maze = lab.make_maze(lab.Config())
    finished = torch.tensor([1, 2, 2, 1, 2, 1])
    through = [(0, 0), (0, 1), (1, 1), (2, 1), (2, 2), (3, 2), (3, 3)]
    assert maze_gif.known_cells(maze, finished) == through
    hidden = torch.tensor([1, 2, lab.MASK, 1, lab.MASK, 1])
    assert maze_gif.known_cells(maze, hidden) == through[:3]
    assert maze_gif.known_cells(maze, torch.full((6,), lab.MASK)) == through[:1]
