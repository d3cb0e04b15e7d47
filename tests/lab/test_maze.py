"""The mazes, the walker and the exact evaluation, each against a second derivation."""

from dataclasses import replace
from itertools import product

import networkx as nx
import pytest
import torch
from lab_helpers import CFG, SMALL, base_net, count_sequences, rejects, table_of
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


def graph_of(maze):
    """Derive the maze a second time: free cells at distance one are joined."""
    graph = nx.Graph()
    cells = [
        cell for cell in product(range(maze.side), repeat=2) if not maze.walls[cell[0]][cell[1]]
    ]
    for a, b in product(cells, repeat=2):
        if abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1:
            graph.add_edge(a, b)
    return graph


# ---- the maze ------------------------------------------------------------------------------------
def end_of_walk(graph, moves):
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
    assert len(maze.paths) == walks[order.index((0, 0)), order.index(goal)]  # walks of length L

    g = Generator().manual_seed(0)
    moves = torch.cat([torch.randint(4, (300, maze.L), generator=g), maze.paths])
    for row, r in zip(moves.tolist(), maze.reward(moves).tolist(), strict=True):
        distance = nx.shortest_path_length(graph, end_of_walk(graph, row), goal)
        assert r == pytest.approx(1 - distance / maze.L)
        assert (r == 1) == (row in maze.paths.tolist())


def test_the_worked_example_of_the_docstring():
    r = MAZE.reward(torch.tensor([[1, 2, 2, 1, 2, 1], [1, 1, 1, 1, 1, 1]]))
    assert r.tolist() == pytest.approx([1, 1 / 6]) and len(MAZE.paths) == 5


def walker_weights(maze, drift):
    """Derive the walker from its description: 2 for its drift, 1 for other free moves, .3 else."""
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
def test_the_walker_drifts_as_described(name, drift):
    maze = lab.Maze(MAZE.walls, lab.DRIFT[name])
    for (i, j), weight in walker_weights(maze, drift).items():
        torch.testing.assert_close(maze.policy[i * maze.side + j], weight)


def walk_law(maze):
    """Return the walker's probability of every path, float64: a product along the path."""
    x = dtm.all_sequences(V, maze.L)
    return maze.policy[maze.cells(x)[:, :-1], x].double().prod(1)


def test_walks_follow_their_law():
    """False alarm 1e-4, and the generator is fixed."""
    n, rho = 40_000, walk_law(MAZE)
    assert rho.sum().item() == pytest.approx(1)
    counts = count_sequences(MAZE.walks(n, Generator().manual_seed(0)), V, MAZE.L)
    often = n * rho > 10
    counts = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([n * rho[often], n * rho[~often].sum()[None]])
    assert not rejects(counts, expected)


def test_random_mazes_are_reproducible_distinct_and_solvable():
    walls = [lab.random_walls(4, number) for number in range(20)]
    assert walls == [lab.random_walls(4, number) for number in range(20)]
    assert len({str(rows) for rows in walls}) == 20
    for number, rows in enumerate(walls):
        maze = lab.make_maze(replace(CFG, mazes=3), seed=number)
        routes = list(nx.all_shortest_paths(graph_of(maze), (0, 0), (3, 3)))
        assert maze.walls == rows and maze.L == 6 and 2 <= len(routes) == len(maze.paths) <= 8
        assert maze.reward(maze.paths).tolist() == [1.0] * len(routes)


# ---- the model -----------------------------------------------------------------------------------
def test_a_table_is_the_net_that_it_was_made_from():
    net = random_net(L=3)
    xt = dtm.all_sequences(V + 1, 3)
    where = xt == MASK
    torch.testing.assert_close(lab.tabulate(net, 3)(xt, where), net(xt, where).detach())


@pytest.mark.parametrize("model", [random_net(), lab.tabulate(random_net(), MAZE.L)])
def test_where_is_a_mask_or_its_indices(model):
    g = Generator().manual_seed(0)
    xt, mask = dtm.mask_random(torch.randint(V, (9, MAZE.L), generator=g), MASK, g)
    dense = model(xt)[mask]
    torch.testing.assert_close(model(xt, mask), dense)
    torch.testing.assert_close(model(xt, mask.nonzero(as_tuple=True)), dense)


def test_base_training_learns_the_walker():
    walk = walk_law(SMALL)
    gaps = []
    for steps in (1, 60):
        table = lab.tabulate(base_net(0, replace(CFG, base_steps=steps)), SMALL.L)
        gaps.append(lab.kl(walk, lab.path_distribution(table)))
    assert gaps[1] < 0.75 * gaps[0]


# ---- the exact evaluation ------------------------------------------------------------------------
def test_D11_a_distribution_too_large_for_one_piece_is_exact():
    """There are 177,147 states; with independent positions the distribution is a product."""
    length = 11
    logits = torch.randn(length, 2, generator=Generator().manual_seed(0)).double()

    def independent(xt, where):
        return logits.expand(len(xt), -1, -1)[where]

    rho = dtm.exact_marginal(independent, 2, length)
    x = dtm.all_sequences(2, length)
    p = logits.softmax(-1).expand(len(x), -1, -1).gather(-1, x[..., None])[..., 0]
    torch.testing.assert_close(rho, p.prod(1))


def test_the_evaluation_gives_the_exact_tilt_a_perfect_score():
    base = lab.tabulate(random_net(), MAZE.L)
    evaluation = lab.ExactEvaluation(MAZE, base)
    assert evaluation.rho_0.sum().item() == pytest.approx(1)
    assert evaluation.measure(base, 0.0)["kl"] == pytest.approx(0, abs=1e-9)

    target = dtm.exact_tilt(evaluation.rho_0, evaluation.r, 3.0)
    posterior = dtm.exact_posterior(target, dtm.all_sequences(V + 1, MAZE.L))
    perfect = evaluation.measure(table_of(posterior), 3.0)
    assert perfect["kl"] == pytest.approx(0, abs=1e-5)
    assert perfect["kl_modes"] == pytest.approx(0, abs=1e-5)
    assert perfect["success"] == pytest.approx(perfect["target_success"], rel=1e-4)
    assert perfect["modes"] == pytest.approx(perfect["target_modes"], rel=1e-4)

    by_hand = (target * (target / evaluation.rho_0).log()).sum().item()
    assert evaluation.measure(base, 3.0)["kl"] == pytest.approx(by_hand)


def test_the_evaluation_measures_the_shortest_paths():
    evaluation = lab.ExactEvaluation(MAZE, lab.tabulate(random_net(), MAZE.L))
    target = dtm.exact_tilt(evaluation.rho_0, evaluation.r, 3.0)
    rows = [(evaluation.x == path).all(1).nonzero().item() for path in MAZE.paths]
    given = target[rows] / target[rows].sum()
    other = evaluation.measure(lab.tabulate(random_net(1), MAZE.L), 3.0)
    assert other["target_modes"] == pytest.approx((-(given * given.log()).sum()).exp().item())
    assert other["target_modes"] != pytest.approx(other["modes"], rel=1e-3)
    assert other["target_paths"] == pytest.approx(given.tolist())
    assert other["target_success"] == pytest.approx(target[rows].sum().item())
    assert sum(other["paths"]) == pytest.approx(1)
