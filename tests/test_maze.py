"""The lab's maze, measurements and loop, each against a second derivation; and its command line."""

import copy
import json
import math
from dataclasses import replace
from itertools import pairwise, product

import networkx as nx
import pytest
import torch
from helpers import CFG, SMALL, base_net, command, judge_of, run_tilt
from torch import Generator

import dtm
import maze_lab as lab
from maze_lab import MASK, V

MAZE = lab.make_maze(CFG)
DELTA = [(-1, 0), (0, 1), (1, 0), (0, -1)]  # up, right, down, left


def random_net(seed=0, L=MAZE.L):
    torch.manual_seed(seed)
    net = lab.MazeNet(L, CFG)
    with torch.no_grad():
        net.head.weight *= 4
    return net


def free_cells(maze):
    return [cell for cell in product(range(maze.n), repeat=2) if not maze.walls[cell[0]][cell[1]]]


def graph_of(maze):
    """A second derivation of the maze: cells at distance one."""
    graph = nx.Graph()
    for a, b in product(free_cells(maze), repeat=2):
        if abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1:
            graph.add_edge(a, b)
    return graph


# ---- the maze ------------------------------------------------------------------------------------
def walk_on(graph, moves):
    """Where a list of moves ends, step by step."""
    here = (0, 0)
    for move in moves:
        there = (here[0] + DELTA[move][0], here[1] + DELTA[move][1])
        here = there if graph.has_edge(here, there) else here
    return here


@pytest.mark.parametrize("grid", [4, 5, 6])
def test_rewards_and_modes_against_the_graph(grid):
    maze = lab.make_maze(replace(CFG, grid=grid))
    graph, goal = graph_of(maze), (grid - 1, grid - 1)
    order = sorted(graph)
    walks = torch.tensor(nx.to_numpy_array(graph, order)).matrix_power(maze.L)
    routes = list(nx.all_shortest_paths(graph, (0, 0), goal))
    assert len(maze.paths) == len(routes) >= 4
    assert len(maze.paths) == walks[order.index((0, 0)), order.index(goal)]  # walks of length L

    g = Generator().manual_seed(0)
    moves = torch.cat([torch.randint(4, (300, maze.L), generator=g), maze.paths])
    for row, r in zip(moves.tolist(), maze.reward(moves).tolist(), strict=True):
        distance = nx.shortest_path_length(graph, walk_on(graph, row), goal)
        assert r == pytest.approx(1 - distance / maze.L)
        assert (r == 1) == (row in maze.paths.tolist())


def test_the_worked_example_of_the_docstring():
    r = MAZE.reward(torch.tensor([[1, 2, 2, 1, 2, 1], [1, 1, 1, 1, 1, 1]]))
    assert r.tolist() == pytest.approx([1, 1 / 6]) and len(MAZE.paths) == 5


def walker_weights(maze, drift):
    """The walker from its words: 2 for its drift, 1 for other free moves, .3 for a bump."""
    graph = graph_of(maze)
    weights = {}
    for i, j in graph:
        row = torch.full((4,), 0.3)
        for move, (di, dj) in enumerate(DELTA):
            if graph.has_edge((i, j), (i + di, j + dj)):
                row[move] = 2.0 if move in drift else 1.0
        weights[i, j] = row / row.sum()
    return weights


@pytest.mark.parametrize("name, drift", [("away", (0, 3)), ("towards", (1, 2))])
def test_the_walker_drifts_as_it_says(name, drift):
    maze = lab.Maze(MAZE.walls, lab.DRIFT[name])
    for (i, j), weight in walker_weights(maze, drift).items():
        torch.testing.assert_close(maze.policy[i * maze.n + j], weight)


def walk_law(maze):
    """The walker's probability of every path, float64: a product along the path."""
    x = dtm.all_sequences(V, maze.L)
    return maze.policy[maze.cells(x)[:, :-1], x].double().prod(1)


def test_walks_follow_their_law():
    n, rho = 40_000, walk_law(MAZE)
    assert rho.sum().item() == pytest.approx(1)
    x = MAZE.walks(n, Generator().manual_seed(0))
    number = (x * V ** torch.arange(MAZE.L - 1, -1, -1)).sum(1)
    counts = torch.bincount(number, minlength=V**MAZE.L)
    often = n * rho > 10
    chi2 = ((counts - n * rho)[often] ** 2 / (n * rho)[often]).sum() / often.sum()
    assert chi2 < 1 + 4 * math.sqrt(2 / often.sum())  # 4 standard deviations: false alarm 3e-5


def test_random_mazes_are_what_they_say():
    walls = [lab.random_walls(4, k) for k in range(20)]
    assert walls == [lab.random_walls(4, k) for k in range(20)]  # always the same
    assert len({str(rows) for rows in walls}) == 20
    for k, rows in enumerate(walls):
        maze = lab.make_maze(replace(CFG, mazes=3), seed=k)
        routes = list(nx.all_shortest_paths(graph_of(maze), (0, 0), (3, 3)))
        assert maze.walls == rows and maze.L == 6 and 2 <= len(routes) == len(maze.paths) <= 8
        assert maze.reward(maze.paths).tolist() == [1.0] * len(routes)


# ---- measuring -----------------------------------------------------------------------------------
def test_tabulated_net_is_the_net():
    net = random_net(L=3)
    xt = dtm.all_sequences(V + 1, 3)
    where = xt == MASK
    tabled = lab.tabulate(net, 3)(xt, where)
    torch.testing.assert_close(tabled, net(xt, where).detach(), atol=1e-5, rtol=1e-5)


def test_D11_a_law_too_large_for_one_piece_is_exact_too():
    """177,147 states, several pieces a level; with independent positions the law is a product."""
    length = 11
    logits = torch.randn(length, 2, generator=Generator().manual_seed(0)).double()

    def independent(xt, where):
        return logits.expand(len(xt), -1, -1)[where]

    rho = dtm.exact_marginal(independent, 2, length)
    x = dtm.all_sequences(2, length)
    chances = logits.softmax(-1).expand(len(x), -1, -1).gather(-1, x[..., None])[..., 0]
    torch.testing.assert_close(rho, chances.prod(1))


def test_where_gives_the_gathered_logits():
    net, g = random_net(), Generator().manual_seed(0)
    xt, mask = dtm.mask_random(torch.randint(V, (9, MAZE.L), generator=g), MASK, g)
    torch.testing.assert_close(net(xt, mask), net(xt)[mask])


def test_the_judge_knows_the_exact_answers():
    base = lab.tabulate(random_net(), MAZE.L)
    judge = lab.Judge(MAZE, base)
    assert judge.rho_0.sum().item() == pytest.approx(1)
    assert judge.measure(base, 0.0)["kl"] == pytest.approx(0, abs=1e-9)

    target = dtm.exact_tilt(judge.rho_0, judge.r, 3.0)
    posterior = dtm.exact_posterior(target, dtm.all_sequences(V + 1, MAZE.L))
    perfect = judge.measure(dtm.Table(posterior.log().clamp_min(-60).float()), 3.0)
    assert perfect["kl"] == pytest.approx(0, abs=1e-5)
    assert perfect["kl_modes"] == pytest.approx(0, abs=1e-5)
    assert perfect["success"] == pytest.approx(perfect["target_success"], rel=1e-4)
    assert perfect["modes"] == pytest.approx(perfect["target_modes"], rel=1e-4)

    still = judge.measure(base, 3.0)
    by_hand = (target * (target / judge.rho_0).log()).sum().item()
    assert still["kl"] == pytest.approx(by_hand)


def test_the_judge_measures_the_shortest_paths():
    judge = lab.Judge(MAZE, lab.tabulate(random_net(), MAZE.L))
    target = dtm.exact_tilt(judge.rho_0, judge.r, 3.0)
    rows = [(judge.x == path).all(1).nonzero().item() for path in MAZE.paths]
    given = target[rows] / target[rows].sum()
    other = judge.measure(lab.tabulate(random_net(1), MAZE.L), 3.0)
    entropy = -(given * given.log()).sum()
    assert other["target_modes"] == pytest.approx(entropy.exp().item())
    assert other["target_modes"] != pytest.approx(other["modes"], rel=1e-3)
    assert other["target_paths"] == pytest.approx(given.tolist())
    assert other["target_success"] == pytest.approx(target[rows].sum().item())
    assert sum(other["paths"]) == pytest.approx(1)


def test_equal_ess_steps():
    r = torch.tensor([0.0, 0.5, 1.0] * 2)
    rho = torch.tensor([0.6, 0.2, 0.05, 0.1, 0.04, 0.01]).double()
    steps = lab.equal_ess_steps(rho, r, 12.0, 6)
    assert len(steps) == 6 and sum(steps) == pytest.approx(12.0)
    sizes = []
    for i, h in enumerate(steps):
        p, w = dtm.exact_tilt(rho, r, sum(steps[:i])), torch.exp(h * r.double())
        sizes.append(((p * w).sum() ** 2 / (p * w**2).sum()).item())
    assert max(sizes) - min(sizes) < 1e-3 and sizes[0] < 0.99
    # One jump of size 1e-12: no schedule keeps 1e-6, and the steps must still arrive.
    rare = torch.tensor([1.0, 1e-12]).double()
    assert lab.equal_ess_steps(rare, torch.tensor([0.0, 1.0]), 40.0, 1) == [40.0]


# ---- the loop ------------------------------------------------------------------------------------
def test_base_training_learns_the_walker():
    walk = walk_law(SMALL)
    gaps = []
    for steps in (1, 60):
        table = lab.tabulate(base_net(0, replace(CFG, base_steps=steps)), SMALL.L)
        gaps.append(lab.kl(walk, lab.law(table)))
    assert gaps[1] < 0.75 * gaps[0]


ARMS = {arm.name: arm for arms in (lab.MAIN, *lab.ABLATIONS.values()) for arm in arms}
ONCE = [arm for arm in ARMS.values() if arm.phases in (0, 1)]  # K = 2 and so on differ by a number


@pytest.mark.parametrize("arm", ONCE, ids=lambda arm: arm.name)
def test_every_arm_runs_and_the_same_seed_gives_the_same_run(arm):
    base = base_net()
    first = run_tilt(base, arm, CFG, seed=0)
    torch.rand(7)  # what others draw from the global generator must not matter
    assert first == run_tilt(base, arm, CFG, seed=0) != run_tilt(base, arm, CFG, seed=1)
    assert first[-1]["a"] == pytest.approx(CFG.a_end)
    assert len(first) == (arm.phases or CFG.phases)
    assert math.isfinite(first[-1]["kl"]) and 0 < first[-1]["ess"] <= 1
    assert sum(record["h"] for record in first) == pytest.approx(CFG.a_end)


def test_tilt_leaves_its_base_alone_and_hands_over_its_phases():
    base = base_net()
    before = copy.deepcopy(base.state_dict())
    schedule = lab.PlannedSteps([10.0, 22.0])
    phases = list(lab.tilt(base, SMALL, lab.LEARNED, CFG, schedule, seed=0))
    assert [(phase.a, phase.h) for phase in phases] == [(0.0, 10.0), (10.0, 22.0)]
    assert all(torch.equal(before[name], t) for name, t in base.state_dict().items())
    assert phases[1].teacher is phases[0].next_teacher
    assert torch.equal(phases[0].teacher.logits, lab.tabulate(base, SMALL.L).logits)
    last = lab.tabulate(phases[1].student, SMALL.L)
    assert torch.equal(phases[1].next_teacher.logits, last.logits)


def test_tilting_raises_the_reward_and_approaches_the_tilt():
    cfg = replace(CFG, a_end=4.0, steps=300, rollouts=3000, base_steps=150)
    base = base_net(0, cfg)
    judge, table = judge_of(base), lab.tabulate(base, SMALL.L)
    end = run_tilt(base, lab.LEARNED, cfg, seed=0)[-1]
    assert end["kl"] < 0.5 * judge.measure(table, cfg.a_end)["kl"]
    assert end["success"] > 2 * judge.measure(table, 0.0)["success"]


def test_D5_self_consistent_loss_trains_as_the_implicit_one():
    ends = []
    for loss in ("implicit", "self-consistent"):
        arm = lab.paper("x", c=1.0, loss=loss)
        ends.append(run_tilt(base_net(), arm, CFG, seed=0)[-1]["kl"])
    assert ends[0] == pytest.approx(ends[1], rel=1e-2)


def test_scalar_c_is_the_running_best_of_past_batches():
    control, g = lab.ScalarC(1.0), Generator().manual_seed(0)
    expected = 1.0
    for _ in range(3):
        mask = torch.rand(6, 4, generator=g) < 0.7
        mask[:, 0] = True
        M = int(mask.sum())
        logits, logits_a = torch.randn(2, M, V, generator=g)
        x1, w = torch.randint(V, (M,), generator=g), torch.rand(M, generator=g)
        assert control(None, mask) == pytest.approx(expected)  # before it has seen the batch
        control.learn(control.c, logits, logits_a, x1, w, mask)
        weight = torch.cat([torch.full((int(n),), 1 / n) for n in mask.sum(1).tolist()])
        y, q = dtm.state_c_target(logits, logits_a, x1, w)
        best = ((weight**2 * q * y).sum() / (weight**2 * q).sum()).item()
        expected = 0.9 * expected + 0.1 * best


def test_phases_share_the_budget_and_the_last_is_longer():
    cfg = replace(CFG, rollouts=1000, steps=333, last=2.0)
    rollouts, steps = zip(*lab.shares(cfg, 5), strict=True)
    assert sum(rollouts) == 1000 and sum(steps) == 333
    assert all(abs(n - 1000 / 6) <= 1 for n in rollouts[:-1])
    assert all(abs(n - 333 / 6) <= 1 for n in steps[:-1])
    assert lab.shares(cfg, 1) == [(1000, 333)]


def test_reward_alone_is_the_policy_gradient_on_the_bound(monkeypatch):
    """Advantages reach the loss as weights, with c = 0: it is -(r - mean r) (bound) / L."""
    seen = []
    plain = dtm.c_dtm_loss
    monkeypatch.setitem(lab.LOSSES, "implicit", lambda *args: seen.append(args) or plain(*args))
    cfg = replace(CFG, phases=1, steps=2)
    schedule = lab.PlannedSteps([cfg.a_end])
    (phase,) = lab.tilt(base_net(), SMALL, lab.REWARD_ALONE, cfg, schedule, seed=0)
    torch.testing.assert_close(phase.w, phase.r - phase.r.mean())
    logits, _, token, w, c = seen[0]
    score = w * logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]
    torch.testing.assert_close(plain(*seen[0]), -score)
    assert c == 0


def test_schedules_say_what_they_know():
    judge, equal = judge_of(base_net()), lab.Arm("x", schedule="equal h")
    planned = lab.make_schedule(equal, CFG, judge)
    assert [planned(0.0, None) for _ in range(3)] == pytest.approx([CFG.a_end / 3] * 3)

    r = torch.rand(500, generator=Generator().manual_seed(0))
    by_rollouts = lab.StepsByRollouts(a_end=8.0, phases=2)
    h = by_rollouts(0.0, r)
    w = torch.exp(h * r.double())
    assert (w.mean() ** 2 / w.square().mean()).item() == pytest.approx(lab.ROLLOUT_ESS, abs=1e-6)
    assert by_rollouts(h, r) == pytest.approx(8.0 - h)  # the last phase takes what is left


def test_an_unknown_control_or_schedule_is_no_other_one():
    with pytest.raises(ValueError, match="no control 'learned'"):
        lab.make_control(lab.Arm("x", control="learned"), SMALL.L, "cpu")
    with pytest.raises(ValueError, match="no schedule 'equal'"):
        lab.make_schedule(lab.Arm("x", schedule="equal"), CFG, judge_of(base_net()))
    half = lab.make_control(lab.Arm("x", c=0.5), SMALL.L, "cpu")
    assert half(None, None) == 0.5


# ---- the command line ----------------------------------------------------------------------------
TINY = "--quick --steps 16 --rollouts 128 --phases 2 --base-steps 8 --jobs 2".split()
KEYS = {"arm", "seed", "kl", "success", "target_success", "modes", "target_modes", "seconds"}
SIX = ["reward alone", "one jump", "c = 0", "c = 1", "best scalar c", "learned c"]


def test_the_lab_runs_end_to_end_and_redraws(tmp_path):
    ran = command("maze_lab.py", *TINY, "--seeds", 2, "--out", tmp_path)
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "quick_main.json").read_text())
    assert [arm["name"] for arm in result["arms"]] == SIX
    assert [row["arm"] for row in result["rows"]] == [name for name in SIX for _ in range(2)]
    assert [row["seed"] for row in result["rows"]] == [0, 1] * len(SIX)
    assert all(set(row) >= KEYS and row["arm"] in ran.stdout for row in result["rows"])
    annealed = [row["trace"] for row in result["rows"] if row["arm"] != "one jump"]
    for a, b in pairwise(annealed[::2]):  # one schedule for all annealed arms of a seed
        assert [record["h"] for record in a] == [record["h"] for record in b]

    picture = tmp_path / "quick_main.png"
    before = picture.read_bytes()
    picture.unlink()
    assert command("maze_lab.py", "--plot-only", "--out", tmp_path).returncode == 0
    assert picture.read_bytes() == before


def test_a_run_that_fails_says_so_and_begins_nothing_more(tmp_path):
    ran = command("maze_lab.py", *TINY, "--a-end", "1e9", "--seeds", 1, "--out", tmp_path)
    assert ran.returncode == 1 and "overflows" in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr and not list(tmp_path.iterdir())


def test_plot_only_says_what_it_cannot_read(tmp_path):
    (tmp_path / "main.json").write_text("{half")
    ran = command("maze_lab.py", "--plot-only", "--out", tmp_path)
    assert ran.returncode == 2 and "main.json" in ran.stderr.splitlines()[-1]


def test_one_more_arm_or_ten_never_break_the_figure(tmp_path):
    row = {"seed": 0, "kl": 1.0, "success": 0.5, "modes": 2.0, "kl_modes": 0.1}
    row |= {"paths": [0.5, 0.5]}
    row |= {"target_success": 0.9, "target_modes": 2.0, "target_paths": [0.5, 0.5]}
    for count in (1, 17):
        arms = [{"name": f"arm {k}"} for k in range(count)]
        rows = [row | {"arm": arm["name"]} for arm in arms]
        result = {"arms": arms, "rows": rows, "bases": [row], "seeds": [0]}
        assert lab.draw(result, tmp_path / "arms.png").stat().st_size > 5_000
        assert len(lab.format_table(result, lab.COLUMNS).splitlines()) == count + 2


@pytest.mark.parametrize(
    "args, word",
    [
        (["--seeds", "0"], "seeds"),
        (["--lr", "nan"], "lr"),
        (["--a-end", "-1"], "a-end"),
        (["--steps", "3"], "phases"),
        (["--width", "5"], "width"),
        (["--grid", "2"], "grid"),
        (["--grid", "7"], "GiB"),
        (["--walker", "drunk"], "walker"),
        (["--ablate", "colour"], "ablate"),
        (["--mazes", "-1"], "mazes"),
        (["--mazes", "2", "--seeds", "3"], "mazes"),
        (["--first-seed", "-1"], "first-seed"),
        (["--mazes", "2", "--first-seed", "2500"], "first-seed"),
        (["--out", "README.md"], "README.md"),
        (["--plot-only"], "JSON"),
        (["--batch", "x"], "batch"),
    ],
)
def test_bad_flags_say_what_is_wrong(tmp_path, args, word):
    ran = command("maze_lab.py", "--out", tmp_path, *args)
    assert ran.returncode == 2 and word in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuda is usable here")
def test_a_device_that_is_not_there_is_refused(tmp_path):
    ran = command("maze_lab.py", "--out", tmp_path, "--device", "cuda")
    assert ran.returncode == 2 and "device" in ran.stderr.splitlines()[-1]
