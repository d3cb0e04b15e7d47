"""The scripts in figures/: gradient variance, the bound along a run, decoding orders, pictures."""

import importlib
import json
import math
from dataclasses import replace

import pytest
import torch
from lab_helpers import (
    CFG,
    ROOT,
    SMALL,
    InThisProcess,
    base_net,
    command,
    count_sequences,
    evaluation_of,
    mean,
    moves_table,
    rejects,
    table_of,
)
from PIL import Image
from torch import Generator

import dtm
import maze_lab as lab
from figures import control_variate, decoding_order, maze_gif, phases, redraw
from figures.rivals import compare
from maze_lab import MASK, V


# ---- gradient variance ---------------------------------------------------------------------------
def state_c(xt, mask):
    """A control variate that depends on the state."""
    return (1 + 0.3 * xt)[mask]


def variance_by_autograd(teacher, rho, w, control):
    """The definition: the gradient of every sequence at every state, and its spread there."""
    length = 2
    x, total = dtm.all_sequences(V, length), 0.0
    for mask in dtm.all_sequences(2, length)[1:].bool():
        xt, k = torch.where(mask, MASK, x), int(mask.sum())
        where = mask.expand_as(xt)
        logits = teacher(xt, where).clone().requires_grad_()
        w_here = w[:, None].expand_as(xt)[where]
        loss = dtm.c_dtm_loss(logits, teacher(xt, where), x[where], w_here, control(xt, where))
        loss.sum().backward()
        gradients = logits.grad.view(len(x), k, V)
        for state in xt.unique(dim=0):
            rows = (xt == state).all(1)
            p = (rho[rows] / rho[rows].sum())[:, None, None]
            spread = (p * (gradients[rows] - (p * gradients[rows]).sum(0)) ** 2).sum()
            total += rho[rows].sum() * spread / (k * length * math.comb(length, k))
    return (total / (rho * w).sum() ** 2).item()


def test_D7_gradient_variance_against_autograd():
    g = Generator().manual_seed(0)
    rho = torch.randn(V**2, generator=g).double().softmax(0)
    w = torch.exp(2 * torch.rand(V**2, generator=g).double())
    posterior = dtm.exact_posterior(rho, dtm.all_sequences(V + 1, 2))
    teacher = table_of(posterior).requires_grad_(False)
    best = control_variate.ExactBestC(teacher, rho, w)
    found = {}
    for control in (*[lab.FixedC(c) for c in (0.0, 1.5, 3.0)], state_c, best):
        found[control] = control_variate.gradient_variance(teacher, rho, w, control)
        assert found[control] == pytest.approx(variance_by_autograd(teacher, rho, w, control))
    assert 0 < found[best] == min(found.values())


def test_the_variance_at_any_number_c_follows_from_three_points():
    evaluation, table = evaluation_of(base_net()), lab.tabulate(base_net(), SMALL.L)
    rho, w = lab.path_distribution(table), dtm.tilt_weight(evaluation.r.double(), 1.0)
    known = control_variate.variances_at(table, rho, evaluation.r, 1.0)
    normalized = w / (rho @ w).item()
    expected = control_variate.gradient_variance(table, rho, normalized, lab.FixedC(1.0))
    assert known["c = 1, self-normalized"] == pytest.approx(expected)
    grid = [lab.FixedC(c / 20) for c in range(10, 60)]
    scanned = min(control_variate.gradient_variance(table, rho, w, control) for control in grid)
    assert known["best scalar c"] == pytest.approx(scanned, rel=5e-3)
    assert known["learned c"] <= known["best scalar c"] <= scanned


def test_D7_the_learned_c_fits_its_closed_form():
    """On a fixed teacher it comes close to the best variance, and is better than any scalar."""
    base = base_net(0, replace(CFG, base_steps=200))
    evaluation, teacher = evaluation_of(base), lab.tabulate(base, SMALL.L)
    w = dtm.tilt_weight(evaluation.r, 4.0)
    w = w / (evaluation.rho_0 @ w.double()).float()
    g = Generator().manual_seed(0)
    torch.manual_seed(0)
    control = lab.LearnedC(SMALL.L, "cpu")
    for _ in range(600):
        i = evaluation.rho_0.multinomial(256, True, generator=g)
        xt, mask = dtm.mask_random(evaluation.x[i], MASK, g)
        facts = {"logits": None, "logits_a": teacher(xt, mask), "token": evaluation.x[i][mask]}
        facts |= {"w": w[i, None].expand(mask.shape)[mask]}
        facts |= {"share": (1 / (256 * mask.sum(1)))[:, None].expand(mask.shape)[mask]}
        control.learn(control(xt, mask), **facts)

    def variance(control):
        return control_variate.gradient_variance(teacher, evaluation.rho_0, w, control)

    best = variance(control_variate.ExactBestC(teacher, evaluation.rho_0, w))
    scalar = min(variance(lab.FixedC(c)) for c in (0.8, 0.9, 1.0, 1.1))
    assert best < variance(control) < 0.9 * scalar


# ---- the bound, and the orders -------------------------------------------------------------------
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
    [
        ("low_confidence", decoding_order.low_confidence_choice),
        ("top_prob", decoding_order.top_prob_choice),
    ],
)
def test_D11_each_decoding_order_has_its_enumerated_law(order, choose):
    """False alarm 1e-4, and the generators are fixed."""
    model, length, n = moves_table(2, seed=1, scale=0.6), 2, 40_000
    law = dtm.exact_marginal(model, V, length, choose=choose).detach()
    assert law.sum().item() == pytest.approx(1)

    def drawn(order):
        blank, noise = torch.full((n, length), MASK), Generator().manual_seed(0)
        *_, x = dtm.sample(model, blank, MASK, order=order, generator=noise)
        return count_sequences(x, V, length)

    assert not rejects(drawn(order), n * law)
    assert rejects(drawn("random"), n * law)


def test_D11_top_prob_keeps_a_consistent_model_and_low_confidence_does_not():
    rho = torch.randn(V**3, generator=Generator().manual_seed(2)).double().softmax(0)
    model = table_of(dtm.exact_posterior(rho, dtm.all_sequences(V + 1, 3)))
    laws = {}
    for name, choose in decoding_order.CHOICES.items():
        laws[name] = dtm.exact_marginal(model, V, 3, choose=choose).detach()
    torch.testing.assert_close(laws["random order"], rho, atol=1e-12, rtol=0)
    torch.testing.assert_close(laws["top-probability order"], rho, atol=1e-12, rtol=0)
    assert (laws["low-confidence remasking"] - rho).abs().sum() > 0.05


# ---- the commands --------------------------------------------------------------------------------
TINY = {"base_steps": 8, "base_batch": 32, "steps": 40, "phases": 2, "rollouts": 256, "batch": 8}
TINY |= {"width": 16, "layers": 1}


@pytest.fixture
def tiny(monkeypatch):
    """`--quick` runs on a small maze, in this process, in a fraction of a second per method."""
    monkeypatch.setattr(lab, "QUICK", TINY)
    monkeypatch.setattr(lab, "make_maze", lambda cfg, seed=0: SMALL)
    monkeypatch.setattr(lab, "ProcessPoolExecutor", InThisProcess)
    few = [replace(method, rounds=16) for method in compare.METHODS]
    monkeypatch.setattr(compare, "METHODS", few)
    few = [arm for arm in lab.ABLATIONS["anneal"] if arm.phases in (None, 1, 16)]
    monkeypatch.setitem(lab.ABLATIONS, "anneal", few)


@pytest.mark.parametrize(
    "module, key",
    [("control_variate", "grad_var"), ("phases", "phase_bound"), ("decoding_order", "modes")]
    + [("rivals.compare", "frontier")],
)
def test_each_script_writes_its_table_json_and_picture(tmp_path, tiny, capsys, module, key):
    script = importlib.import_module(f"figures.{module}")
    name = module.partition(".")[0]
    script.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "data" / f"quick_{name}.json").read_text())
    assert result["command"] == f"python -m figures.{name} --quick --out {tmp_path}"
    assert len(result["rows"]) == len(result["arms"])
    assert all(math.isfinite(row[key]) and row["arm"] in printed for row in result["rows"])
    assert (tmp_path / f"quick_{name}.png").stat().st_size > 5_000
    assert [file.name for file in (tmp_path / "data").iterdir()] == [f"quick_{name}.json"]


def test_tuning_scores_rates_and_rounds(tmp_path, tiny, capsys):
    args = ["--quick", "--tune", "--only", "ELBO", "--first-seed", "100", "--out", str(tmp_path)]
    compare.main(args)
    result = json.loads((tmp_path / "data" / "quick_rivals_tuning_only.json").read_text())
    [method] = [method for method in compare.METHODS if method.name == "ELBO-REINFORCE"]
    tried = [
        (arm["lr"] / method.lr, arm["rounds"] / method.rounds, arm["decay"])
        for arm in result["arms"]
    ]
    rates, rounds = [(1, 1, 0.7), (0.5, 1, 0.7), (2, 1, 0.7)], [(1, 0.5, 0.7), (1, 2, 0.7)]
    assert tried == [*rates, *rounds, (1, 1, 1)]
    scores = {row["arm"]: row["kl_reverse"] for row in result["rows"]}
    assert result["scores"] == scores and {row["seed"] for row in result["rows"]} == {100}
    best = min(scores, key=scores.get)
    verdict = "stays at" if best == result["arms"][0]["name"] else "MOVES to"
    assert f"{verdict} {best}" in capsys.readouterr().out


def test_a_package_sends_its_runs_to_processes(tmp_path):
    """`python -m figures.rivals` has a __main__.py that a spawned process does not import."""
    quick = f"import maze_lab; maze_lab.QUICK = {TINY}; import runpy, sys; "
    code = quick + "runpy.run_module('figures.rivals', run_name='__main__', alter_sys=True)"
    ran = command("-c", code, "--quick", "--only", "c = 1", "--jobs", 1, "--out", tmp_path)
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "data" / "quick_rivals_only.json").read_text())
    assert [row["arm"] for row in result["rows"]] == ["c-DTM, c = 1"]


def test_the_animation_is_small_and_complete(tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setattr(maze_gif, "EPISODES", 2)
    maze_gif.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(f"{name}: success" in printed for name in ("reward only", "one jump", "learned c"))
    with Image.open(tmp_path / "quick_maze.gif") as image:
        assert image.size[0] <= 1000
        milliseconds = []
        for number in range(image.n_frames):  # The writer joins equal frames.
            image.seek(number)
            milliseconds.append(image.info["duration"])
    assert milliseconds[-1] == 3000  # the still picture
    assert sum(milliseconds) == 2 * 7 * 250 + 3000  # A path has 5 states and 2 frames of rest.


def test_a_path_is_drawn_as_far_as_it_is_known():
    maze = lab.make_maze(lab.Config())
    finished = torch.tensor([1, 2, 2, 1, 2, 1])
    through = [(0, 0), (0, 1), (1, 1), (2, 1), (2, 2), (3, 2), (3, 3)]
    assert maze_gif.known_cells(maze, finished) == through
    hidden = torch.tensor([1, 2, MASK, 1, MASK, 1])
    assert maze_gif.known_cells(maze, hidden) == through[:3]
    assert maze_gif.known_cells(maze, torch.full((6,), MASK)) == through[:1]


# ---- the shipped pictures ------------------------------------------------------------------------
def shipped(name):
    return json.loads((ROOT / "figures" / "data" / f"{name}.json").read_text())


def test_every_picture_can_be_drawn_again(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for name in redraw.DRAW:
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(shipped(name)))
        monkeypatch.setitem(redraw.DRAW, name, lambda result, path: path.write_text("drawn"))
    redraw.main(["--out", str(tmp_path)])
    assert {file.stem for file in tmp_path.glob("*.png")} == set(redraw.DRAW)


def test_phases_claims_what_its_numbers_say():
    result = shipped("phases")
    arms = lab.by_arm(result)
    assert phases.title_of(result) == (
        "One phase ends 1.86 nats from the target; sixteen phases end 0.10 nats away"
    )
    ends = {name: mean(rows, "kl") for name, rows in arms.items()}
    assert max(ends, key=ends.get) == "K = 1" and min(ends, key=ends.get) == "K = 16"
    for record in (record for row in arms["K = 16"] for record in row["trace"]):
        assert record["phase_kl"] <= record["phase_bound"]


def test_control_variate_claims_what_its_numbers_say():
    result = shipped("control_variate")
    arms = lab.by_arm(result)
    assert control_variate.title_of(result) == (
        "A learned c divides the gradient variance of c = 0 by 10 "
        "and ends 0.10 instead of 0.37 nats from the target"
    )
    for key in ("grad_var", "kl"):
        values = {name: mean(rows, key) for name, rows in arms.items()}
        assert max(values, key=values.get) == "c = 0" and min(values, key=values.get) == "learned c"
    last = [p for p in result["exact"] if p["a"] == 25.6]
    for h in control_variate.INCREMENTS:
        line = {p["arm"]: p["grad_var"] for p in last if p["h"] == h}
        assert min(line, key=line.get) == "learned c"


def test_decoding_order_claims_what_its_numbers_say():
    result = shipped("decoding_order")
    assert decoding_order.title_of(result) == (
        "DTM on rollouts by low-confidence remasking ends 2.2 nats from the target;\n"
        "in random order it ends 0.11 nats away"
    )
    rows = lab.by_arm(result)
    nearest = min(row["kl"] for row in rows["low-confidence remasking"])
    assert nearest > 5 * max(row["kl"] for row in rows["random order"])
    for point in result["exact"]:
        assert (point["kl"] > 1) == (point["arm"] == "low-confidence remasking")


def test_rivals_claims_what_its_numbers_say():
    result = shipped("rivals")
    assert compare.title_of(result) == (
        "In KL(model, target), no method without exact likelihoods ends closer to the target\n"
        'than "c-DTM, closed loop": 0.088 nats'
    )
    ends = {name: mean(rows, "kl_reverse") for name, rows in lab.by_arm(result).items()}
    nearest = sorted(ends, key=ends.get)[:5]
    exact = ["TraFL, exact, replay", "TraFL, exact", "exact REINFORCE"]
    assert nearest == [*exact, "c-DTM, closed loop", "DMPO, u"]
    methods = [method for method in compare.METHODS if method.name in ends]
    assert [method.name for method in methods] == list(ends)
    aimed = [name for name, rows in lab.by_arm(result).items() if "target_kl" in rows[0]]
    assert aimed == [method.name for method in methods if method.target]
