"""The lab's rivals, its accounts, its many mazes and its GIF, each against a second derivation."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import networkx as nx
import pytest
import torch
from test_maze import CFG, ROOT, SMALL, TINY, base_net, command, quiet
from torch import Generator

import dtm
import maze_lab
from maze_lab import Arm, Judge, Mazes, V

METHODS = [replace(arm, phases=min(arm.phases, 4)) for arm in maze_lab.ARMS["method"]]


def table(L, seed, scale=0.3):
    return dtm.Table(scale * torch.randn((V + 1) ** L, L, V, generator=Generator().manual_seed(seed)).double())


def batch(x, r, net, old, base, **more):
    return SimpleNamespace(x=x, r=r, adv=r - r.mean(), net=net, old=old, base=base, a=2.0, part=0.5, u=torch.rand(len(x)),
                           g=Generator().manual_seed(0)) if not more else SimpleNamespace(**vars(batch(x, r, net, old, base)) | more)


def gradient(loss, net):
    return torch.autograd.grad(loss, net.logits)[0]


# ---- likelihoods and objectives ------------------------------------------------------------------
def test_sequence_law_has_the_gradient_of_the_enumerated_law():
    net, weight = table(3, 0), torch.rand(V**3, generator=Generator().manual_seed(1)).double()
    x = dtm.all_sequences(V, 3)
    short, full = (gradient((weight * law).sum(), net) for law in (dtm.sequence_law(net, x, V), dtm.exact_marginal(net, V, 3)))
    torch.testing.assert_close(short, full)


def test_exact_reinforce_has_the_gradient_of_reward_minus_kl():
    """Every sequence once, from a uniform sampler: the estimate is then the expectation, and its optimum the tilt."""
    L, a = 2, 2.0
    net, base, old = table(L, 0, 0.1), table(L, 1), dtm.Table(torch.zeros((V + 1) ** L, L, V).double())
    x, r = dtm.all_sequences(V, L), torch.rand(V**L, generator=Generator().manual_seed(2)).double()
    b = batch(x, r, net, old.requires_grad_(False), base.requires_grad_(False), a=a)
    rho, rho_0 = dtm.exact_marginal(net, V, L), dtm.exact_marginal(base, V, L)
    goal = -(rho @ r - (rho * (rho / rho_0).log()).sum() / a)
    torch.testing.assert_close(gradient(maze_lab.exact_reinforce(b), net), gradient(goal, net))
    tilt = dtm.exact_posterior(dtm.exact_tilt(rho_0, r, a), dtm.all_sequences(V + 1, L))
    best = dtm.Table(tilt.log().clamp_min(-60))
    assert gradient(maze_lab.exact_reinforce(SimpleNamespace(**vars(b) | {"net": best})), best).abs().max() < 1e-9


def test_on_paths_of_one_token_all_surrogates_are_the_likelihood():
    """At L = 1, where theta is the sampler and the KL weighs nothing, every policy gradient is that of REINFORCE."""
    x, g = torch.tensor([[0], [1], [1], [2], [3], [3], [3], [0]]), Generator().manual_seed(3)
    r, net = torch.rand(V, generator=g).double()[x[:, 0]], table(1, 0)
    old = dtm.Table(net.logits.detach().clone()).requires_grad_(False)
    b = batch(x, r, net, old, table(1, 1).requires_grad_(False), a=1e12)
    exact = gradient(maze_lab.exact_reinforce(b), net)
    for rival, scale in ((maze_lab.spg, 1), (maze_lab.diffu_grpo, 1), (maze_lab.uni_grpo, r.std()), (maze_lab.elbo_reinforce, 1)):
        torch.testing.assert_close(gradient(rival(b), net) * scale, exact)
    by_hand = b.adv.softmax(0) - (-b.adv).softmax(0)
    torch.testing.assert_close(gradient(maze_lab.wd1(b), net), -torch.autograd.grad((by_hand * dtm.sequence_law(net, x, V).log()).sum(), net.logits)[0])


def test_clipped_ratios_stop_where_they_should():
    """A good token above 1.5 times its old chance gives no gradient, nor a bad one below half of it; others do."""
    x, r = torch.tensor([[0], [1]]), torch.tensor([1.0, 0.0]).double()
    for shift, stopped in ((torch.tensor([2.0, 0.9, 0, 0]), 0), (torch.tensor([0, -3.0, 0, 0]), 1)):
        old, net = dtm.Table(torch.zeros(5, 1, V).double()).requires_grad_(False), dtm.Table(torch.zeros(5, 1, V).double() + shift)
        for row in range(2):
            b = batch(x[row:row + 1], r[row:row + 1], net, old, old, a=1e12, adv=torch.tensor([1.0, -1.0]).double()[row:row + 1])
            assert (gradient(maze_lab.diffu_grpo(b), net).abs().max() < 1e-9) == (row == stopped)


def test_the_kl_estimate_has_the_gradient_of_the_kl():
    """No advantage: over tokens from theta the mean of e^d - d - 1 is KL(theta || base) / L at that state, zero at the base."""
    net, base, old = table(1, 0), table(1, 1).requires_grad_(False), table(1, 2).requires_grad_(False)
    x, zero = torch.arange(V)[:, None], torch.zeros(V).double()
    p, q = (t.logits[V, 0].softmax(-1) for t in (net, base))
    losses = torch.stack([maze_lab.clipped(batch(x[i:i + 1], zero[:1], net, old, base), torch.ones(1, 1, dtype=torch.bool)) for i in range(V)])
    torch.testing.assert_close(2.0 * p @ losses, (p * (p / q).log()).sum())


def test_dmpo_with_exact_likelihoods_ends_at_the_tilt():
    net, base, a = table(1, 0), table(1, 1).requires_grad_(False), 2.0
    old, x, r = dtm.Table(torch.zeros(5, 1, V).double()).requires_grad_(False), torch.arange(V)[:, None], torch.tensor([0.0, 0.3, 0.6, 1.0]).double()
    weight = maze_lab.dmpo_round(old, base, x, r, a, "none", Generator().manual_seed(0))
    target = dtm.exact_tilt(dtm.exact_marginal(base, V, 1), r, a)
    torch.testing.assert_close(weight.double(), target, atol=1e-6, rtol=1e-5)
    at_target = dtm.Table(target.log().expand(5, 1, V).clone())
    assert gradient(maze_lab.dmpo(batch(x, r, at_target, old, base, weight=target)), at_target).abs().max() < 1e-9
    assert gradient(maze_lab.dmpo(batch(x, r, net, old, base, weight=target)), net).abs().max() > 1e-2


# ---- scores and accounts -------------------------------------------------------------------------
def test_waste_is_the_distance_to_the_frontier():
    judge, g = Judge(SMALL, base_net(), "cpu", 0, 6.0), Generator().manual_seed(0)
    r, kl = judge.r.double(), lambda p, q: torch.xlogy(p, p / q).sum()
    for a in (0.0, 3.0, 12.0):
        assert abs(judge.waste(dtm.exact_tilt(judge.rho_0, r, a))) < 1e-9
    for size in (0.5, 3.0):
        rho = (judge.rho_0.log() + 2 * r + size * torch.randn(len(r), generator=g)).softmax(0)
        tilts = [dtm.exact_tilt(judge.rho_0, r, a) for a in torch.linspace(-20, 40, 6001).tolist()]
        assert judge.waste(rho) == pytest.approx(min(kl(rho, p).item() for p in tilts), rel=1e-3)
        same = min(tilts, key=lambda p: abs(p @ r - rho @ r))  # the tilt of this reward costs so much less
        assert judge.waste(rho) == pytest.approx((kl(rho, judge.rho_0) - kl(same, judge.rho_0)).item(), rel=1e-2) and judge.waste(rho) > 0
        assert max((p @ r).item() for p in tilts if kl(p, judge.rho_0) <= kl(rho, judge.rho_0)) > rho @ r  # nobody is above


def test_the_judge_measures_both_directions_against_the_end():
    judge, other = Judge(SMALL, base_net(), "cpu", 0, 6.0), base_net(1)
    found, end = judge(other, 1.0), judge(other, 6.0)
    rho, goal = judge.law(maze_lab.tabulate(other, SMALL.L, "cpu")), dtm.exact_tilt(judge.rho_0, judge.r, 6.0)
    assert found["kl_end"] == pytest.approx(end["kl"]) and found["kl"] != pytest.approx(end["kl"], rel=1e-2)
    assert found["kl_reverse"] == pytest.approx((rho * (rho / goal).log()).sum().item())
    # The objective of regularised RL, E r - KL / A, is the reverse KL up to a constant.
    log_z = (judge.rho_0 * (6.0 * judge.r.double()).exp()).sum().log().item()
    assert found["reward"] - found["kl_base"] / 6.0 == pytest.approx((log_z - found["kl_reverse"]) / 6.0)


def test_all_methods_spend_what_they_are_allowed():
    cfg, judge = replace(CFG, steps=24, rollouts=64), Judge(SMALL, base_net(), "cpu", 0, CFG.a_end)
    budget = cfg.rollouts * SMALL.L + cfg.steps * cfg.batch * 4
    for arm in METHODS:
        how = maze_lab.compete if arm.loss in maze_lab.RIVALS else maze_lab.tilt
        spent = [p["evaluations"] for p in how(judge, arm, cfg, 0, quiet)]
        largest = 5 * 2**SMALL.L * cfg.batch if arm.loss == "exact_reinforce" else 6 * cfg.batch  # one step more, at most
        assert budget <= spent[-1] <= budget + largest, arm.name
        assert spent == sorted(spent) and (arm.loss in maze_lab.RIVALS or spent[-1] == budget)


@pytest.mark.parametrize("arm", METHODS, ids=lambda arm: arm.name)
def test_every_method_runs_and_the_same_seed_gives_the_same_run(arm):
    how, judge = maze_lab.compete if arm.loss in maze_lab.RIVALS else maze_lab.tilt, Judge(SMALL, base_net(), "cpu", 0, CFG.a_end)
    runs = [[p | {"seconds": 0} for p in how(judge, arm, CFG, seed, tick)] for seed, tick in ((0, quiet), (0, lambda n: torch.rand(n)), (1, quiet))]
    assert runs[0] == runs[1] != runs[2] and len(runs[0]) == 4 and runs[0][-1]["a"] == pytest.approx(CFG.a_end)


def test_exact_reinforce_approaches_the_tilt():
    cfg = replace(CFG, a_end=4.0, steps=300, rollouts=3000, base_steps=150, lr=3e-3)
    judge = Judge(SMALL, base_net(0, cfg), "cpu", 0, cfg.a_end)
    end = list(maze_lab.compete(judge, Arm("x", loss="exact_reinforce", phases=20), cfg, 0, quiet))[-1]
    assert end["kl"] < 0.5 * judge(judge.base, cfg.a_end)["kl"] and end["reward"] > judge(judge.base, 0.0)["reward"] + 0.1


def test_both_sides_of_the_bound_along_a_run():
    judge = Judge(SMALL, base_net(), "cpu", 0)
    trace = list(maze_lab.tilt(judge, Arm("x", phases=3, bound=True), replace(CFG, a_end=6.0), 0, quiet))
    assert all(0 < p["phase_kl"] <= p["phase_bound"] and 0 < p["ess"] <= 1 for p in trace)
    assert trace[0]["phase_kl"] == pytest.approx(trace[0]["kl"], rel=1e-4)  # the first teacher is rho_0 itself
    assert trace[2]["phase_kl"] != pytest.approx(trace[2]["kl"], rel=1e-2)


# ---- many mazes ----------------------------------------------------------------------------------
MANY = replace(CFG, mazes=6, walker="goal", a_end=6.0)


def test_drawn_mazes_are_what_they_say():
    mazes = maze_lab.draw_mazes(4, None, 40)
    assert len({str(m.walls) for m in mazes}) == 40 and mazes[:10] == maze_lab.draw_mazes(4, None, 40)[:10]
    for m in mazes:
        graph = nx.grid_2d_graph(4, 4)
        graph.remove_nodes_from([(i, j) for i in range(4) for j in range(4) if m.walls[i][j]])
        routes = list(nx.all_shortest_paths(graph, divmod(m.start, 4), divmod(m.goal, 4)))
        assert m.L == len(routes[0]) - 1 == 6 and 2 <= len(routes) == len(m.paths) <= 8
        assert m.reward(m.paths).tolist() == [1.0] * len(routes) and m.cells(m.paths)[:, -1].tolist() == [m.goal] * len(routes)


def test_mazes_side_by_side_are_the_mazes_one_by_one():
    parts = maze_lab.draw_mazes(4, None, 5)
    many, g = Mazes(parts, "cpu"), Generator().manual_seed(0)
    start = many.begin(600, g, each=3)
    assert (start.view(200, 3) == start[::3, None]).all() and set(start.tolist()) == set(many.start.tolist())
    x = many.walks(600, g, start)
    for k, part in enumerate(parts):
        here = start // 16 == k
        torch.testing.assert_close(many.reward(x, start)[here], part.reward(x[here]))
        assert (part.walk_law(x[here]) > 0).all() and (many.cells(x, start)[here] - 16 * k == part.cells(x[here])).all()
        kinds = (many.prompt[k] - 4 * torch.arange(16)).view(4, 4)  # the prompt tells the maze again
        assert (kinds == 1).int().tolist() == part.walls and kinds.flatten().tolist().index(2) == part.start and kinds.flatten().tolist().index(3) == part.goal


def test_the_net_reads_its_prompt_and_the_jury_averages_its_judges():
    maze = maze_lab.make_maze(MANY)
    net = maze_lab.train_base(maze, MANY, 0, "cpu", quiet)
    blank = maze_lab.blank(maze, 2, "cpu")
    logits = maze_lab.ask(net, maze, maze.start[:2])(blank)
    assert not torch.allclose(logits[0], logits[1])
    torch.testing.assert_close(logits[1:], maze_lab.ask(net, maze, maze.start[1:2])(blank[:1]))


def test_held_out_mazes_and_a_run_over_many(monkeypatch):
    monkeypatch.setattr(maze_lab, "HELD", 2)
    maze = maze_lab.make_maze(MANY)
    judge = maze_lab.make_judge(MANY, maze_lab.train_base(maze, MANY, 0, "cpu", quiet), "cpu", 0)
    held = maze_lab.draw_mazes(4, None, 8)[6:]
    assert [str(j.maze.walls) for _, _, j in judge.judges] == [str(m.walls) for m in (*held, maze.mazes[0])]
    arm = Arm("x", "state", True, "equal", each=4)
    ends = [[p | {"seconds": 0} for p in maze_lab.tilt(judge, arm, MANY, seed, quiet)][-1] for seed in (0, 0, 1)]
    assert ends[0] == ends[1] != ends[2]
    assert ends[0]["kl"] == pytest.approx(sum(ends[0]["each"]["kl"][:2]) / 2) and {"train_kl", "train_success", "found", "target_found"} <= set(ends[0])


def test_found_counts_distinct_optimal_paths():
    judge = Judge(SMALL, base_net(), "cpu", 0)
    p, g = judge.base_paths, Generator().manual_seed(0)
    law = torch.cat([p, (1 - p.sum())[None]])
    draws = torch.stack([law.multinomial(maze_lab.DRAWS, True, generator=g) for _ in range(4000)])
    counts = torch.tensor([len(set(row.tolist()) - {len(p)}) for row in draws]).double()
    assert abs(judge(judge.base, 0.0)["found"] - counts.mean()) < 4 * counts.std() / math.sqrt(4000)  # false alarm 6e-5


# ---- the command line ----------------------------------------------------------------------------
def test_the_gif_is_small_and_complete(tmp_path):
    from PIL import Image
    ran = command("maze_lab.py", "--gif", *TINY[:-2], "--jobs", 1, "--out", tmp_path)
    assert ran.returncode == 0, ran.stderr
    with Image.open(tmp_path / "maze.gif") as image:
        assert image.n_frames > 30 and image.size[0] <= 1000
    assert (tmp_path / "maze.gif").stat().st_size < 2_000_000


def test_the_methods_end_to_end(tmp_path):
    small = "--steps 16 --rollouts 256 --base-steps 8 --jobs 2 --seeds 1".split()
    ran = command("maze_lab.py", "--ablate", "method", *small, "--out", tmp_path)
    assert ran.returncode == 0, ran.stderr
    rows = json.loads((tmp_path / "ablate_method.json").read_text())["rows"]
    assert len(rows) == len(METHODS) and all(math.isfinite(row["waste"]) and row["evaluations"] > 0 for row in rows)
    assert (tmp_path / "ablate_method.png").stat().st_size > 20_000


@pytest.mark.parametrize("args, word", [(["--ablate", "method", "--rollouts", "100"], "rounds"), (["--ablate", "cv", "--mazes", "4"], "mazes"),
                                        (["--mazes", "-1"], "mazes")])
def test_bad_flags_say_what_is_wrong(tmp_path, args, word):
    ran = command("maze_lab.py", "--out", tmp_path, *args)
    assert ran.returncode == 2 and word in ran.stderr.splitlines()[-1] and "Traceback" not in ran.stderr


# ---- README --------------------------------------------------------------------------------------
README = (ROOT / "README.md").read_text()


def test_readme_names_tests_and_pictures_that_exist():
    written = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    names = re.findall(r"`(test_\w+)`", README)
    assert len(names) > 30 and [name for name in names if f"def {name}(" not in written] == []
    pictures = re.findall(r"\((figures/[\w.]+)\)", README)
    assert len(pictures) > 10 and [name for name in pictures if not (ROOT / name).is_file()] == []


def test_readmes_dtm_in_fifteen_lines_tilts_a_model(tmp_path):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "def tilt(" in block)
    (tmp_path / "snippet.py").write_text(code)
    (tmp_path / "drive.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torch, dtm\nfrom snippet import tilt\ntorch.set_num_threads(1)\n"
        "V, L = 3, 2\nmodel, r = dtm.Table(torch.zeros((V + 1) ** L, L, V)), lambda x: (x == 2).float().mean(1)\n"
        "rho_0 = dtm.exact_marginal(model, V, L).detach()\ntilt(model, r, V, L, a_end=3.0, steps=60, lr=0.03)\n"
        "target = dtm.exact_tilt(rho_0, r(dtm.all_sequences(V, L)), 3.0)\n"
        "kl = lambda rho: (target * (target / rho).log()).sum().item()\nprint(kl(rho_0), kl(dtm.exact_marginal(model, V, L)))\n")
    ran = command(tmp_path / "drive.py")
    assert ran.returncode == 0, ran.stderr
    before, after = map(float, ran.stdout.split())
    assert after < 0.1 * before
