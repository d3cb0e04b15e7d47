"""The lab's maze, measurements and loop, each against a second derivation; and its command line, end to end."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from torch import Generator

import dtm
import maze_lab
from maze_lab import MASK, Arm, Config, Judge, MazeNet, V

ROOT = Path(__file__).parent.parent
CFG = Config(base_steps=30, base_batch=64, steps=24, phases=3, rollouts=192, batch=32, width=16)
MAZE = maze_lab.make_maze(CFG)
SMALL = maze_lab.Maze([[0, 0, 0], [0, 0, 0], [0, 0, 0]])  # 4 moves, 625 masked states: enough for the loop
quiet = lambda rows: None


def random_net(seed=0, L=MAZE.L):
    torch.manual_seed(seed)
    net = MazeNet(L, CFG)
    with torch.no_grad():
        net.head.weight *= 4
    return net


def graph_of(maze):
    return nx.Graph([(a, b) for a in product_cells(maze) for b in product_cells(maze) if abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1])


def product_cells(maze):
    return [(i, j) for i in range(maze.n) for j in range(maze.n) if not maze.walls[i][j]]


# ---- the maze ------------------------------------------------------------------------------------
@pytest.mark.parametrize("grid", [4, 5, 6])
def test_rewards_and_modes_against_the_graph(grid):
    maze = maze_lab.make_maze(replace(CFG, grid=grid))
    graph, goal = graph_of(maze), (grid - 1, grid - 1)
    assert len(maze.paths) == len(list(nx.all_shortest_paths(graph, (0, 0), goal))) >= 4
    order = sorted(graph)
    walks = torch.tensor(nx.to_numpy_array(graph, order)).matrix_power(maze.L)
    assert len(maze.paths) == walks[order.index((0, 0)), order.index(goal)]  # a second count: walks of length L
    g = Generator().manual_seed(0)
    moves = torch.cat([torch.randint(4, (300, maze.L), generator=g), maze.paths])
    delta = [(-1, 0), (0, 1), (1, 0), (0, -1)]
    for row, r in zip(moves.tolist(), maze.reward(moves).tolist()):
        here = (0, 0)
        for m in row:
            there = (here[0] + delta[m][0], here[1] + delta[m][1])
            here = there if graph.has_edge(here, there) else here
        assert r == pytest.approx(1 - nx.shortest_path_length(graph, here, goal) / maze.L)
        assert (r == 1) == (row in maze.paths.tolist())


def test_the_worked_example_of_the_docstring():
    r = MAZE.reward(torch.tensor([[1, 2, 2, 1, 2, 1], [1, 1, 1, 1, 1, 1]]))
    assert r.tolist() == pytest.approx([1, 1 / 6]) and len(MAZE.paths) == 5


def test_the_walker_drifts_as_it_says():
    graph, delta = graph_of(MAZE), [(-1, 0), (0, 1), (1, 0), (0, -1)]
    for towards, drift in ((False, (0, 3)), (True, (1, 2))):
        maze = maze_lab.Maze(MAZE.walls, towards)
        for i, j in graph:
            free = [graph.has_edge((i, j), (i + di, j + dj)) for di, dj in delta]
            weight = torch.tensor([(2.0 if k in drift else 1.0) if free[k] else 0.3 for k in range(4)])
            torch.testing.assert_close(maze.policy[i * maze.n + j], weight / weight.sum())


def test_walks_follow_their_law():
    n, x = 40_000, dtm.all_sequences(V, MAZE.L)
    law = MAZE.walk_law(x)
    assert law.sum().item() == pytest.approx(1)
    counts = torch.bincount((MAZE.walks(n, Generator().manual_seed(0)) * V ** torch.arange(MAZE.L - 1, -1, -1)).sum(1), minlength=V**MAZE.L)
    often = n * law > 10
    chi2 = ((counts - n * law)[often] ** 2 / (n * law)[often]).sum() / often.sum()
    assert chi2 < 1 + 4 * math.sqrt(2 / often.sum())  # 4 standard deviations: false alarm 3e-5


# ---- measuring -----------------------------------------------------------------------------------
def test_sequence_law_is_the_marginal():
    net, x = random_net(L=3), dtm.all_sequences(V, 3)
    torch.testing.assert_close(dtm.sequence_law(net, x, V), dtm.exact_marginal(net, V, 3).detach(), atol=1e-9, rtol=1e-5)


def test_tabulated_net_is_the_net():
    net = random_net(L=3)
    xt = dtm.all_sequences(V + 1, 3)
    where = xt == MASK
    torch.testing.assert_close(maze_lab.tabulate(net, 3, "cpu")(xt, where), net(xt, where).detach(), atol=1e-5, rtol=1e-5)


def test_gradient_variance_against_autograd():
    L, g = 2, Generator().manual_seed(0)
    rho = torch.randn(V**L, generator=g).double().softmax(0)
    x, states = dtm.all_sequences(V, L), dtm.all_sequences(V + 1, L)
    teacher = dtm.Table(dtm.exact_posterior(rho, states).log().clamp_min(-60)).requires_grad_(False)
    w = torch.exp(2 * torch.rand(V**L, generator=g).double())
    c_of = lambda xt: 1 + 0.3 * xt
    for c in (0.0, 1.5, c_of):
        expected = 0.0
        for mask in dtm.all_sequences(2, L)[1:].bool():
            xt, k = torch.where(mask, V, x), int(mask.sum())
            logits = teacher(xt).clone().requires_grad_()
            dtm.c_dtm_loss(logits, teacher(xt), x, w[:, None], c(xt) if callable(c) else c).sum().backward()
            for state in xt.unique(dim=0):
                rows = (xt == state).all(1)
                p, grads = rho[rows] / rho[rows].sum(), logits.grad[rows][:, mask]
                spread = (p[:, None, None] * (grads - (p[:, None, None] * grads).sum(0)) ** 2).sum()
                expected += rho[rows].sum() * spread / (k * L * math.comb(L, k))
        assert maze_lab.gradient_variance(teacher, rho, w, c) == pytest.approx((expected / (rho * w).sum() ** 2).item())
    best = maze_lab.gradient_variance(teacher, rho, w, "best")
    assert 0 < best < min(maze_lab.gradient_variance(teacher, rho, w, c) for c in (0.0, 1.0, 2.0, 3.0, 4.0, c_of))


def test_judge_knows_the_exact_answers():
    net = random_net()
    judge = Judge(MAZE, net, "cpu", 0)
    assert judge.rho_0.sum().item() == pytest.approx(1)
    assert judge(net, 0.0)["kl"] == pytest.approx(0, abs=1e-9)
    target = dtm.exact_tilt(judge.rho_0, judge.r, 3.0)
    perfect = dtm.Table(dtm.exact_posterior(target, dtm.all_sequences(V + 1, MAZE.L)).log().clamp_min(-60).float())
    found = judge(perfect, 3.0)
    assert found["kl"] == pytest.approx(0, abs=1e-5) and found["kl_modes"] == pytest.approx(0, abs=1e-5)
    assert found["success"] == pytest.approx(found["target_success"], rel=1e-4) and found["modes"] == pytest.approx(found["target_modes"], rel=1e-4)
    given = target[[(judge.x == path).all(1).nonzero().item() for path in MAZE.paths]]
    given, other = given / given.sum(), judge(random_net(1), 3.0)  # another law over the optimal paths than the target's
    assert other["target_modes"] == pytest.approx((-(given * given.log()).sum()).exp().item()) != pytest.approx(other["modes"], rel=1e-3)
    assert judge(net, 3.0)["kl"] == pytest.approx((target * (target / judge.rho_0).log()).sum().item())
    assert found["occupancy"][0] == 1 and found["occupancy"][-1] == pytest.approx(found["success"], rel=1e-4)


def test_sampled_metrics_agree_with_exact_ones(monkeypatch):
    base, net = random_net(0), random_net(0)
    with torch.no_grad():
        net.head.bias += 0.6 * torch.randn(V, generator=Generator().manual_seed(0))
    exact = Judge(MAZE, base, "cpu", 0)(net, 0.5)
    monkeypatch.setattr(maze_lab, "EXACT_STATES", 0)
    sampled = Judge(MAZE, base, "cpu", 0)(net, 0.5)
    for key in ("success", "modes", "target_modes", "kl_modes"):
        assert sampled[key] == pytest.approx(exact[key], rel=1e-4)
    assert sampled["kl_ess"] > 0.3 and 0 < sampled["kl_se"] < 0.3 * exact["kl"]
    assert abs(sampled["kl"] - exact["kl"]) < 4 * sampled["kl_se"]  # false alarm 6e-5, over seeds


def test_equal_ess_schedule():
    r = torch.tensor([0.0, 0.5, 1.0] * 2)
    rho = torch.tensor([0.6, 0.2, 0.05, 0.1, 0.04, 0.01]).double()
    steps = maze_lab.equal_ess(rho, r, 12.0, 6)
    assert len(steps) == 6 and sum(steps) == pytest.approx(12.0)
    sizes = []
    for i, h in enumerate(steps):
        p, w = dtm.exact_tilt(rho, r, sum(steps[:i])), torch.exp(h * r.double())
        sizes.append(((p * w).sum() ** 2 / (p * w**2).sum()).item())
    assert max(sizes) - min(sizes) < 1e-3 and sizes[0] < 0.99
    rare = torch.tensor([1.0, 1e-12]).double()  # one jump of size 1e-12: no schedule keeps 1e-6, the steps must still arrive
    assert maze_lab.equal_ess(rare, torch.tensor([0.0, 1.0]), 40.0, 1) == [40.0]


# ---- the loop ------------------------------------------------------------------------------------
def base_net(seed=0, cfg=CFG):
    return maze_lab.train_base(SMALL, cfg, seed, "cpu", quiet)


def test_base_training_learns_the_walker():
    walk = SMALL.walk_law(dtm.all_sequences(V, SMALL.L))
    gaps = [torch.xlogy(walk, walk / dtm.exact_marginal(base_net(0, replace(CFG, base_steps=n)), V, SMALL.L)).sum().item() for n in (1, 60)]
    assert gaps[1] < 0.75 * gaps[0]


@pytest.mark.parametrize("arm", [arm for arms in maze_lab.ARMS.values() for arm in arms if arm.phases in (None, 1)], ids=lambda arm: arm.name)
def test_every_arm_runs_and_the_same_seed_gives_the_same_run(arm):
    base = base_net()
    restless = lambda rows: torch.rand(rows)  # what others draw from the global generator must not matter
    ticks = ((0, quiet), (0, restless), (1, quiet))
    how = maze_lab.compete if arm.loss in maze_lab.RIVALS else maze_lab.tilt
    runs = [[p | {"seconds": 0} for p in how(Judge(SMALL, base, "cpu", 0), arm, CFG, seed, tick)] for seed, tick in ticks]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][-1]["a"] == pytest.approx(CFG.a_end) and len(runs[0]) == (arm.phases or CFG.phases)
    assert math.isfinite(runs[0][-1]["kl"]) and sum(p["h"] for p in runs[0]) == pytest.approx(CFG.a_end)


def test_tilting_raises_the_reward_and_approaches_the_tilt():
    cfg = replace(CFG, a_end=4.0, steps=300, rollouts=3000, base_steps=150)
    judge = Judge(SMALL, base_net(0, cfg), "cpu", 0)
    end = list(maze_lab.tilt(judge, Arm("state"), cfg, 0, quiet))[-1]
    assert end["kl"] < 0.5 * judge(judge.base, cfg.a_end)["kl"]
    assert end["success"] > 2 * judge(judge.base, 0.0)["success"]


def test_self_consistent_loss_trains_as_the_implicit_one():
    judge = Judge(SMALL, base_net(), "cpu", 0)
    ends = [list(maze_lab.tilt(judge, Arm("x", 1.0, False, loss=loss), CFG, 0, quiet))[-1] for loss in ("implicit", "self")]
    assert ends[0]["kl"] == pytest.approx(ends[1]["kl"], rel=1e-2)


def test_the_state_baseline_fits_its_closed_form():
    """The regression finds (D7): on a fixed teacher, near the best enumerated variance and better than any scalar."""
    judge = Judge(SMALL, base_net(0, replace(CFG, base_steps=200)), "cpu", 0)
    teacher, g = maze_lab.tabulate(judge.base, SMALL.L, "cpu"), Generator().manual_seed(0)
    torch.manual_seed(0)
    net = maze_lab.StateBaseline(SMALL.L)
    optimiser = maze_lab.adam(net)
    w_all = dtm.tilt_weight(judge.r, 4.0) / (judge.rho_0 * dtm.tilt_weight(judge.r, 4.0)).sum().float()
    for step in range(500):
        i = judge.rho_0.multinomial(256, True, generator=g)
        xt, mask = dtm.mask_random(judge.x[i], MASK, g)
        y, q = dtm.state_c_target(teacher(xt, mask), teacher(xt, mask), judge.x[i][mask], w_all[i, None].expand(mask.shape)[mask])
        maze_lab.take_step(optimiser, dtm.row_mean(q * (net(xt)[mask] - y) ** 2, mask), 3e-3 * (1 - step / 500))
    variance = lambda c: maze_lab.gradient_variance(teacher, judge.rho_0, w_all, c)
    with torch.no_grad():
        learned = variance(net)
    assert variance("best") < learned < 0.9 * min(variance(c) for c in (0.8, 0.9, 1.0, 1.1))


def test_where_gives_the_gathered_logits():
    net, g = random_net(), Generator().manual_seed(0)
    xt, mask = dtm.mask_random(torch.randint(V, (9, MAZE.L), generator=g), MASK, g)
    torch.testing.assert_close(net(xt, mask), net(xt)[mask])
    loss = F.cross_entropy(net(xt, mask), torch.zeros(int(mask.sum()), dtype=torch.long))
    assert torch.isfinite(loss)


# ---- the command line ----------------------------------------------------------------------------
def command(*args):
    return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True)


def test_the_demo_prints_its_table():
    lines = command("dtm.py").stdout.splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if line.count("|") == 3]
    assert [row[0] for row in rows] == ["0", "0.5", "1", "2", "c*", "c*(xt,i)"]
    assert all(float(row[1]) < 1e-14 for row in rows)
    variance = {row[0]: float(row[2]) for row in rows}
    assert variance["c*(xt,i)"] < variance["c*"] <= min(variance[c] for c in ("0", "0.5", "1", "2"))
    sides = [tuple(map(float, row[3].split("<="))) for row in rows]
    assert all(0 < kl < bound for kl, bound in sides)


TINY = "--quick --steps 16 --rollouts 128 --phases 2 --base-steps 8 --jobs 2".split()


@pytest.mark.parametrize("ablate", [None, "cv", "sampler"])
def test_the_lab_runs_end_to_end_and_redraws(tmp_path, ablate):
    ran = command("maze_lab.py", *TINY, "--seeds", 2, "--out", tmp_path, *(["--ablate", ablate] if ablate else []))
    assert ran.returncode == 0, ran.stderr
    stem = f"quick_{f'ablate_{ablate}' if ablate else 'main'}"
    result = json.loads((tmp_path / f"{stem}.json").read_text())
    keys = {"arm", "seed", "kl", "success", "target_success", "modes", "target_modes", "seconds"}
    assert all(keys <= set(row) for row in result["rows"]) and len(result["rows"]) == 2 * len(result["arms"])
    for arm in result["arms"]:
        assert arm["name"] in ran.stdout
    if ablate is None:
        assert [arm["name"] for arm in result["arms"]] == ["one_jump", "c0", "c1", "cstar", "state"]
        assert [row["seed"] for row in result["rows"]] == [0, 1] * 5
        assert all(h1 == h2 for a, b in pairwise([r["trace"] for r in result["rows"] if r["arm"] != "one_jump" and r["seed"] == 0])
                   for h1, h2 in zip([p["h"] for p in a], [p["h"] for p in b]))  # one schedule for all annealed arms
    pictures = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert len(pictures) == {None: 3, "cv": 2, "sampler": 2}[ablate]
    for path in tmp_path.glob("*.png"):
        path.unlink()
    assert command("maze_lab.py", "--plot-only", "--out", tmp_path).returncode == 0
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == pictures


@pytest.mark.parametrize("args, word", [
    (["--seeds", "0"], "seeds"), (["--lr", "nan"], "lr"), (["--a-end", "-1"], "a-end"), (["--steps", "3"], "phases"),
    (["--width", "5"], "width"), (["--grid", "2"], "grid"), (["--walker", "drunk"], "walker"), (["--ablate", "colour"], "ablate"),
    (["--plot-only"], "JSON"), (["--device", "cuda"], "device"), (["--batch", "x"], "batch")])
def test_bad_flags_say_what_is_wrong(tmp_path, args, word):
    if args == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("cuda is usable here")
    ran = command("maze_lab.py", "--out", tmp_path, *args)
    assert ran.returncode == 2 and word in ran.stderr.splitlines()[-1] and "Traceback" not in ran.stderr
