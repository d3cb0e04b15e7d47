"""The maze lab: Discrete Tilt Matching where every number is known exactly.

    python maze_lab.py                 six arms, from nothing to table and figure
    python maze_lab.py --ablate cv     one question at a time: anneal, cv, loss, sampler, ess
    python maze_lab.py --mazes 6       a random maze a seed;  --grid 5: a larger one, exact too

THE TASK. A sequence is a path through a grid maze: L moves from {0 up, 1 right, 2 down, 3 left}; a
move into a wall or off the grid is a bump, and the walker stays. The reward is the progress made,
r = 1 - dist(end, goal) / dist(start, goal), below 0 where a random maze leads farther away than it
starts. L is the length of a shortest path, so r = 1 exactly on the shortest paths: they are the
modes, and "no collapse" is to keep them all. The default maze:

    S . # #     S start, G goal, # wall; L = 6, 5 shortest paths. "right down down right down right"
    . . . .     is [1, 2, 2, 1, 2, 1] and ends on G with r = 1; [1, 1, 1, 1, 1, 1] bumps five times
    . . . #     and ends beside S with r = 1/6. The model reads moves and masks (token 4) only: maze
    . # . G     and reward are not in its input, so the answer cannot leak.

THE BASE rho_0 is a small masked diffusion transformer trained on a noisy walker that drifts away
from the goal. THE TARGET is rho_A ~ rho_0 e^{A r}. There are 5^6 = 15,625 states, so both laws and
the distance between them are computed, not estimated.

THE METRICS (`rows` of the JSON; symbols and equations as in dtm.py)
    kl        KL(rho_A || rho_theta), nats, the score: 0 is the exact tilt; in `trace` against rho_a
    success   rho_theta(r = 1); target_success: rho_A's
    modes     e^entropy of rho_theta given r = 1, the effective number of shortest paths;
              target_modes: rho_A's; kl_modes: KL between the two laws given r = 1
    paths     rho_theta of each shortest path given r = 1; target_paths: rho_A's
    ess       effective sample size of the last phase, a share of its rollouts; seconds: of the arm

CONTENTS   1 settings   2 the loop: `tilt`   3 control variates   4 schedules of h   5 the maze
           6 the net   7 the exact judge   8 running   9 table and figures   10 command line
"""

import argparse
import copy
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import networkx as nx
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

import dtm

V, MASK = 4, 4  # moves; the token of a hidden move
MOVES = {0: (-1, 0), 1: (0, 1), 2: (1, 0), 3: (0, -1)}  # up, right, down, left
DRIFT = {"away": (0, 3), "towards": (1, 2)}  # the moves that the walker of the base prefers
BYTES = 120  # for each state and position, at the peak of a process: measured on --grid 5
BASE_LINE = "seed {seed}: base success {success:.5f}, {jump_ess:.0f} effective rollouts in one jump"
ROW_LINE = (
    "seed {seed} {arm:>16}: KL {kl:.3f}, success {success:.3f}, {modes:.2f} paths, {seconds:.0f} s"
)
ROLLOUT_ESS = 0.93  # of a phase whose h the rollouts choose; reaches A = 32 in about 16 phases


# ---- 1. Settings --------------------------------------------------------------------------------
def option(default: int | float | str, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """The settings of a run; each is a flag of the command line."""

    grid: int = option(4, "cells along a side of the maze; 4 and 5 are for any machine")
    walker: str = option("away", "drift of the base's walker, away from or towards the goal")
    a_end: float = option(32.0, "final tilt A, per unit of reward")
    rollouts: int = option(32768, "sequences drawn per arm, all phases together")
    steps: int = option(1600, "gradient steps per arm, all phases together")
    phases: int = option(16, "annealing phases")
    last: float = option(2.0, "rollouts and steps of the last phase, as a multiple of the others'")
    batch: int = option(256, "sequences per gradient step")
    lr: float = option(7e-3, "peak learning rate of the first phase, see `tilt`")
    base_steps: int = option(800, "gradient steps of the base model")
    base_batch: int = option(512, "walks per gradient step of the base model")
    base_lr: float = option(3e-3, "peak learning rate of the base model")
    width: int = option(32, "width of the model, for two attention heads a layer")
    layers: int = option(2, "layers of the model")
    mazes: int = option(0, "run on so many random mazes, one a seed; 0: on the default maze")


QUICK = {"base_steps": 150, "base_batch": 256, "steps": 240, "phases": 8, "rollouts": 8192}


@dataclass
class Arm:
    """One way from rho_0 to rho_A; all have one base, as many rollouts and as many steps."""

    name: str  # in code, tables and figures
    control: str = "learned c"  # or "best scalar c"
    c: float | None = None  # a number, in place of a control that learns
    normalize: bool = True  # weights divided by their mean over the phase's rollouts
    schedule: str = "equal h"  # how h is chosen; or "rollouts", or "exact law"
    phases: int = 0  # 0: Config.phases
    weight: str = "tilt"  # e^{h r}; or "advantage", which leaves the reward alone
    lr: float = 0.0  # 0: Config.lr
    loss: str = "implicit"  # (D3); or "explicit" (D4), or "self-consistent" (D5)
    order: str = "random"  # decoding order of the rollouts


def paper(name: str, c: float, **changes) -> Arm:
    """An arm as in the paper: c is a number, the weights are raw."""
    return Arm(name, c=c, normalize=False, **changes)


LOSSES = {"implicit": dtm.c_dtm_loss, "self-consistent": dtm.self_consistent_loss}  # see `tilt`
C_0, C_1 = paper("c = 0", c=0.0), paper("c = 1", c=1.0)
NORMALIZED = Arm("c = 1, w / mean", c=1.0)
BEST_SCALAR, LEARNED = Arm("best scalar c", control="best scalar c"), Arm("learned c")
REWARD_ALONE = Arm("reward alone", c=0.0, weight="advantage", lr=1e-3)
ONE_JUMP = Arm("one jump", control="best scalar c", phases=1)
H_BY_ROLLOUTS = Arm("h by rollouts", schedule="rollouts")
BY_CERTAINTY = Arm("by certainty", order="state")
MAIN = [REWARD_ALONE, ONE_JUMP, C_0, C_1, BEST_SCALAR, LEARNED]
ABLATIONS = {
    "anneal": [*[Arm(f"K = {k}", phases=k) for k in (1, 2, 4, 8, 16, 32)], H_BY_ROLLOUTS],
    "cv": [C_0, paper("c = 0.5", 0.5), C_1, NORMALIZED, BEST_SCALAR, LEARNED],
    "loss": [paper(loss, c=1.0, loss=loss) for loss in ("explicit", "implicit", "self-consistent")],
    "sampler": [Arm("random order"), BY_CERTAINTY, Arm("by confidence", order="confidence")],
    "ess": [Arm("equal h"), H_BY_ROLLOUTS, Arm("h by exact law", schedule="exact law")],
}


# ---- 2. The loop --------------------------------------------------------------------------------
@dataclass
class Phase:
    """A finished phase of `tilt`, for who looks from outside; student and control learn on."""

    a: float  # the tilt at its start
    h: float  # its increment
    x1: Tensor  # (n, L) rollouts of the teacher
    r: Tensor  # (n,) their rewards
    w: Tensor  # (n,) their weights
    student: "MazeNet"  # at the end of the phase
    teacher: dtm.Table  # at tilt a
    next_teacher: dtm.Table  # at tilt a + h: the student, tabulated
    control: "FixedC | ScalarC | LearnedC"


def tilt(base, maze, arm: Arm, cfg: Config, choose_h: Callable, seed: int) -> Iterator[Phase]:
    """DTM from rho_0, the MazeNet base, to rho_A: the six steps of dtm.py's head. choose_h(a, r)
    says h at tilt a, where the rollouts have the rewards r (section 4)."""
    device = next(base.parameters()).device
    noise = Generator(device).manual_seed(seed)
    torch.manual_seed(seed)  # for the first weights of a learned c

    # 1. teacher = student = base
    student = copy.deepcopy(base)
    teacher = tabulate(student, maze.L)
    optimiser = adam(student)  # its state lives on over the phases; the authors' code clears it
    control = make_control(arm, maze.L, device)
    a = 0.0
    plan = shares(cfg, arm.phases or cfg.phases)
    for k, (n, steps) in enumerate(plan):
        # The later the phase, the less there is to move.
        peak = (arm.lr or cfg.lr) * (1 - 0.8 * k / len(plan))
        # 2. draw from the teacher, score, weigh
        blank = torch.full((n, maze.L), MASK, device=device)
        *_, x1 = dtm.sample(teacher, blank, MASK, order=arm.order, generator=noise)
        r = maze.reward(x1)  # (n,)
        h = min(choose_h(a, r), cfg.a_end - a)  # the last step ends at A
        w = dtm.tilt_weight(r, h, normalize=arm.normalize)  # (n,)  (D1)
        if arm.weight == "advantage":
            w = r - r.mean()  # the loss is then a policy gradient on the bound (D6)
        for step in range(steps):
            # 3. mask a batch
            i = torch.randint(len(x1), (cfg.batch,), generator=noise, device=device)  # (B,)
            xt, mask = dtm.mask_random(x1[i], MASK, noise)  # (B, L) each
            # 4. a step on c-DTM at the masked positions, M in all
            logits, logits_a = student(xt, mask), teacher(xt, mask)  # (M, V)
            token = x1[i][mask]  # (M,)
            w_i = spread(w[i], mask)  # (M,)
            c = control(xt, mask)  # a number or (M,)
            if arm.loss == "explicit":
                loss = dtm.etm_loss(logits, logits_a, token, spread(r[i], mask), h)  # (D4)
            else:
                loss = LOSSES[arm.loss](logits, logits_a, token, w_i, c)  # (D3) or (D5)
            take_step(optimiser, dtm.row_mean(loss, mask), lr=peak * (1 - step / steps))
            control.learn(c, logits.detach(), logits_a, token, w_i, mask)
        # 5. the student is the teacher of the next phase
        next_teacher = tabulate(student, maze.L)
        yield Phase(a, h, x1, r, w, student, teacher, next_teacher, control)
        teacher = next_teacher
        a += h
        if a >= cfg.a_end * (1 - 1e-9):
            break  # 6. the tilt is A


def shares(cfg: Config, phases: int) -> list[tuple[int, int]]:
    """Rollouts and steps of each phase; the last phase is `cfg.last` times as long."""
    pieces = []
    for total in (cfg.rollouts, cfg.steps):
        ends = [round(total * k / (phases - 1 + cfg.last)) for k in range(phases)] + [total]
        pieces.append([high - low for low, high in itertools.pairwise(ends)])
    return list(zip(*pieces, strict=True))


def spread(per_row: Tensor, mask: Tensor) -> Tensor:
    """A value a row (B,) at each of its masked positions, (M,)."""
    return per_row[:, None].expand(mask.shape)[mask]


def adam(model: nn.Module) -> torch.optim.Adam:
    fused = next(model.parameters()).device.type != "mps"
    return torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=fused)


def take_step(optimiser: torch.optim.Adam, loss: Tensor, lr: float) -> None:
    optimiser.param_groups[0]["lr"] = lr
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimiser.param_groups[0]["params"], 1.0)
    optimiser.step()


# ---- 3. Control variates: what c is, and how it learns from a batch once that has been used ------
@dataclass(eq=False)
class FixedC:
    """c is a number: 0 leaves the control variate out, 1 is the paper's."""

    c: float

    def __call__(self, xt: Tensor, mask: Tensor) -> float:
        return self.c

    def learn(self, c, logits, logits_a, token, w, mask) -> None:
        pass


class ScalarC(FixedC):
    """c is the running best scalar (D8), of past batches: on its own batch it would be biased."""

    def learn(self, c, logits, logits_a, token, w, mask) -> None:
        share = spread(1 / mask.sum(1), mask)  # how `row_mean` weighs a position
        best = dtm.best_c(logits, logits_a, token, w, share).item()  # (D8)
        self.c = 0.9 * self.c + 0.1 * best


class LearnedC:
    """c(xt, i) is a small net on the one-hot state that starts near 1 and regresses (D7)."""

    def __init__(self, L: int, device: torch.device, hidden: int = 64):
        state, relu = nn.Linear(L * (V + 1), hidden), nn.ReLU()
        inner, out = nn.Linear(hidden, hidden), nn.Linear(hidden, L)
        self.net = nn.Sequential(state, relu, inner, relu, out).to(device)
        self.optimiser = adam(self.net)  # of its own: the student does not share its steps
        self.device = device

    def __call__(self, xt: Tensor, mask: Tensor) -> Tensor:
        state = F.one_hot(xt.to(self.device), V + 1).flatten(1)  # (B, L (V + 1))
        c = 1 + self.net(state.float())  # (B, L)
        return c[mask.to(self.device)]

    def learn(self, c, logits, logits_a, token, w, mask) -> None:
        # At theta = teacher, where y = w: less noise than at the student.
        y, q = dtm.state_c_target(logits_a, logits_a, token, w)
        take_step(self.optimiser, dtm.row_mean(q * (c - y) ** 2, mask), lr=2e-3)


def make_control(arm: Arm, L: int, device: torch.device) -> FixedC | ScalarC | LearnedC:
    if arm.c is not None:
        return FixedC(arm.c)
    if arm.control == "best scalar c":
        return ScalarC(1.0)
    dtm.check(arm.control == "learned c", f"{arm.name}: no control {arm.control!r}")
    return LearnedC(L, device)


# ---- 4. Schedules: choose_h(a, r) at tilt a, from the rewards r of the phase's rollouts ----------
class PlannedSteps:
    """Steps that were known before the run."""

    def __init__(self, steps: list[float]):
        self.steps = iter(steps)

    def __call__(self, a: float, r: Tensor) -> float:
        return next(self.steps)


@dataclass
class StepsByRollouts:
    """h keeps an effective sample size of the phase's own rollouts, which any run can know."""

    a_end: float
    phases: int
    begun: int = 0  # phases

    def __call__(self, a: float, r: Tensor) -> float:
        self.begun += 1
        if self.begun == self.phases:  # the last phase takes what is left
            return self.a_end - a
        return max(dtm.next_h(r, ROLLOUT_ESS, self.a_end - a), 0.1 * self.a_end / self.phases)


def make_schedule(arm: Arm, cfg: Config, judge: "Judge") -> Callable:
    phases = arm.phases or cfg.phases
    enough = phases + cfg.last <= 1 + min(cfg.steps, cfg.rollouts)
    dtm.check(enough, f"{phases} phases need as many steps and rollouts, and more for the last")
    if arm.schedule == "rollouts":
        return StepsByRollouts(cfg.a_end, phases)
    if arm.schedule == "equal h":
        return PlannedSteps([cfg.a_end / phases] * phases)
    dtm.check(arm.schedule == "exact law", f"{arm.name}: no schedule {arm.schedule!r}")
    return PlannedSteps(equal_ess_steps(judge.rho_0, judge.r, cfg.a_end, phases))


def equal_ess_steps(rho_0: Tensor, r: Tensor, a_end: float, phases: int) -> list[float]:
    """`phases` steps of one effective sample size: a reference, from a law that no run knows."""
    values, p_0 = reward_law(rho_0, r)  # a tilt sees no more of a law than this
    low, high = 1e-6, 1.0
    steps = [a_end / phases] * phases  # equal ones, where no size above 1e-6 will do
    for _ in range(25):
        ess = (low + high) / 2
        trial, a = [], 0.0
        while a < a_end * (1 - 1e-9) and len(trial) <= phases:
            trial.append(dtm.next_h(values, ess, a_end - a, p=dtm.exact_tilt(p_0, values, a)))
            a += trial[-1]
        if len(trial) <= phases:  # steps that keep so much still arrive: ask for more
            low = ess
            steps = trial
        else:
            high = ess
    return steps


def reward_law(rho: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """The values of the reward and their probabilities, float64."""
    values, which = r.double().unique(return_inverse=True)
    return values, torch.zeros_like(values).index_add(0, which, rho)


# ---- 5. The maze --------------------------------------------------------------------------------
class Maze:
    """One maze, from the top left to the bottom right, as tables over its n * n cells.

    next      (n*n, 4)  where each move leads: a wall or the edge is a bump, and the walker stays
    progress  (n*n,)    the reward of ending there, 1 - dist(cell, goal) / dist(start, goal)
    paths     (K, L)    the shortest paths as moves, in lexical order: the modes
    policy    (n*n, 4)  the walker that makes the training data: weight 2 for the moves of its
                        drift, 1 for other free moves, 0.3 for a bump
    """

    def __init__(self, walls: list[list[int]], drift: tuple[int, int] = DRIFT["away"]):
        self.walls = walls
        self.n = n = len(walls)  # cell (i, j) has the number i * n + j
        graph = maze_graph(walls)
        start, goal = (0, 0), (n - 1, n - 1)
        distance = nx.single_source_shortest_path_length(graph, goal)
        self.L = distance[start]  # moves: just enough

        self.next = torch.arange(n * n)[:, None].repeat(1, 4)
        self.progress = torch.zeros(n * n)  # walls are never visited
        weight = torch.full((n * n, 4), 0.3)  # bumps, unless the move is free
        for i, j in graph:
            cell = i * n + j
            self.progress[cell] = 1 - distance.get((i, j), self.L) / self.L
            for move, (di, dj) in MOVES.items():
                there = (i + di, j + dj)
                if there in graph:  # neither wall nor edge
                    self.next[cell, move] = there[0] * n + there[1]
                    weight[cell, move] = 2.0 if move in drift else 1.0
        self.policy = weight / weight.sum(1, keepdim=True)

        moves = {step: move for move, step in MOVES.items()}  # by (row, column) step
        paths = []
        for cells in nx.all_shortest_paths(graph, start, goal):
            steps = itertools.pairwise(cells)
            paths.append([moves[b[0] - a[0], b[1] - a[1]] for a, b in steps])
        self.paths = torch.tensor(sorted(paths))

    def cells(self, x1: Tensor) -> Tensor:
        """The cells (B, L + 1) on the paths x1 (B, L), start included."""
        visited = [torch.zeros_like(x1[:, 0])]  # every path starts in cell 0
        for move in x1.T:
            visited.append(self.next[visited[-1], move])
        return torch.stack(visited, 1)

    def reward(self, x1: Tensor) -> Tensor:
        """(B,), on the device of x1 (B, L)."""
        return self.progress[self.cells(x1.cpu())[:, -1]].to(x1.device)

    def walks(self, n: int, generator: Generator) -> Tensor:
        """n paths (n, L) of the noisy walker, the training data of the base model."""
        cell = torch.zeros(n, dtype=torch.long)  # all walkers start there
        moves = []
        for _ in range(self.L):
            moves.append(self.policy[cell].multinomial(1, generator=generator)[:, 0])
            cell = self.next[cell, moves[-1]]
        return torch.stack(moves, 1)


def maze_graph(walls: list[list[int]]) -> nx.Graph:
    graph = nx.grid_2d_graph(len(walls), len(walls))
    graph.remove_nodes_from([(i, j) for i, j in list(graph) if walls[i][j]])
    return graph


def make_maze(cfg: Config, seed: int = 0) -> Maze:
    """The maze of a seed: with --mazes the seed-th random one, else the default one for all."""
    if cfg.mazes:
        return Maze(random_walls(cfg.grid, seed), DRIFT[cfg.walker])
    if cfg.grid == 4:
        return Maze([[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]], DRIFT[cfg.walker])
    walls = [[0] * cfg.grid for _ in range(cfg.grid)]
    for i, j in itertools.product(range(1, cfg.grid - 1, 2), repeat=2):
        walls[i][j] = 1  # pillars with streets between them
    return Maze(walls, DRIFT[cfg.walker])


def random_walls(n: int, k: int) -> list[list[int]]:
    """The k-th of a list of mazes, always the same, with 2 to 8 shortest paths of 2n - 2 moves."""
    draw = random.Random(0)
    cells = list(itertools.product(range(n), repeat=2))[1:-1]  # without start and goal
    found = []
    while len(found) <= k:
        walls = [[0] * n for _ in range(n)]
        for i, j in draw.sample(cells, draw.randint(n // 2, 3 * n // 2)):
            walls[i][j] = 1
        graph = maze_graph(walls)
        if walls not in found and nx.has_path(graph, (0, 0), (n - 1, n - 1)):
            routes = list(nx.all_shortest_paths(graph, (0, 0), (n - 1, n - 1)))
            if len(routes[0]) == 2 * n - 1 and 2 <= len(routes) <= 8:
                found.append(walls)
    return found[k]


# ---- 6. The net and its base training -----------------------------------------------------------
class MazeNet(nn.Module):
    """A bidirectional transformer over partly masked paths; the model protocol of dtm.py."""

    def __init__(self, L: int, cfg: Config):
        super().__init__()
        self.embed = nn.Embedding(L * (V + 1), cfg.width)  # one vector per (position, token)
        d, options = cfg.width, {"dropout": 0.0, "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(d, nhead=2, dim_feedforward=4 * d, **options)
        norm = nn.LayerNorm(cfg.width)
        self.body = nn.TransformerEncoder(layer, cfg.layers, norm, enable_nested_tensor=False)
        self.head = nn.Linear(cfg.width, V)

    def forward(self, xt: Tensor, where: Tensor | None = None) -> Tensor:
        place = torch.arange(xt.shape[1], device=xt.device)  # (L,)
        x = self.body(self.embed(xt + (V + 1) * place))  # (B, L, width)
        return self.head(x if where is None else x[where])  # (B, L, V) or (M, V)


def train_base(maze: Maze, cfg: Config, seed: int, device: str) -> MazeNet:
    """rho_0 by denoising cross-entropy on fresh walks, which is (D3) with w = 1 and c = 0."""
    torch.manual_seed(seed)  # initial weights are all that torch draws without a named generator
    net = MazeNet(maze.L, cfg).to(device)
    walker = Generator().manual_seed(seed)
    masker = Generator(device).manual_seed(seed)
    optimiser = adam(net)
    for step in range(cfg.base_steps):
        x1 = maze.walks(cfg.base_batch, walker).to(device)  # (B, L)
        xt, mask = dtm.mask_random(x1, MASK, masker)
        loss = F.cross_entropy(net(xt, mask), x1[mask], reduction="none")  # (M,)
        lr = cfg.base_lr * min(1, (step + 1) / 50) * (1 - step / cfg.base_steps)  # with warm-up
        take_step(optimiser, dtm.row_mean(loss, mask), lr)
    return net


@torch.no_grad()
def tabulate(net: nn.Module, L: int) -> dtm.Table:
    """The net as a table over all 5^L states: one forward pass each, look-ups afterwards."""
    states = dtm.all_sequences(V + 1, L, next(net.parameters()).device)  # (5^L, L)
    logits = torch.empty(len(states), L, V, device=states.device)
    for piece, xt in zip(logits.split(2**11), states.split(2**11), strict=True):
        piece.copy_(net(xt))  # in place: pieces that are kept would fragment the memory
    return dtm.Table(logits).requires_grad_(False)


# ---- 7. The judge: exact, on the CPU, in float64 ------------------------------------------------
class Judge:
    """Measures models against the tilts of one base."""

    def __init__(self, maze: Maze, base: dtm.Table):
        self.x = dtm.all_sequences(V, maze.L)  # (V**L, L)  every path
        self.r = maze.reward(self.x)  # (V**L,)
        self.rho_0 = law(base)  # (V**L,)
        self.optimal = (maze.paths * V ** torch.arange(maze.L - 1, -1, -1)).sum(1)  # (K,)  in x

    def measure(self, table: dtm.Table, a: float) -> dict:
        """The metrics of the file's head, against rho_a."""
        rho, target = law(table), dtm.exact_tilt(self.rho_0, self.r, a)  # (V**L,) each
        paths, target_paths = rho[self.optimal], target[self.optimal]  # (K,) each
        given, target_given = paths / paths.sum(), target_paths / target_paths.sum()
        return {
            "a": a,
            "kl": kl(target, rho),
            "success": paths.sum().item(),
            "target_success": target_paths.sum().item(),
            "modes": torch.special.entr(given).sum().exp().item(),
            "target_modes": torch.special.entr(target_given).sum().exp().item(),
            "kl_modes": kl(target_given, given),
            "paths": given.tolist(),
            "target_paths": target_given.tolist(),
        }


def law(table: dtm.Table) -> Tensor:
    """rho_theta (V**L,) of a table, on the CPU."""
    return dtm.exact_marginal(dtm.Table(table.logits.cpu()), V, table.logits.shape[1]).detach()


def kl(p: Tensor, q: Tensor) -> float:
    return torch.xlogy(p, p / q).sum().item()


# ---- 8. Running: bases first, then every arm on every base, a process a core ---------------------
def run_base(cfg: Config, seed: int, device: str) -> dict:
    """A seed's base: its weights and what is known of it."""
    maze = make_maze(cfg, seed)
    net = train_base(maze, cfg, seed, device)
    table = tabulate(net, maze.L)
    judge = Judge(maze, table)
    target = dtm.exact_tilt(judge.rho_0, judge.r, cfg.a_end)
    values, p = reward_law(judge.rho_0, judge.r)
    return {
        "seed": seed,
        "walls": maze.walls,
        "net": net.cpu(),
        "reward_law": {"values": values.tolist(), "p": p.tolist()},
        "jump_ess": cfg.rollouts / (target.square() / judge.rho_0).sum().item(),
        **judge.measure(table, a=0.0),
    }


def run_arm(cfg: Config, arm: Arm, base: dict, device: str, look: Callable | None = None) -> dict:
    """A row of the result; look(phase, judge, arm) may add metrics to a phase's record."""
    maze = make_maze(cfg, base["seed"])
    net = base["net"].to(device)
    judge = Judge(maze, tabulate(net, maze.L))
    schedule = make_schedule(arm, cfg, judge)
    trace = []
    for phase, record in follow(tilt(net, maze, arm, cfg, schedule, base["seed"]), judge):
        trace.append(record | (look(phase, judge, arm) if look else {}))
    return {"arm": arm.name, "seed": base["seed"], **trace[-1], "trace": trace}


def follow(phases: Iterator[Phase], judge: Judge) -> Iterator[tuple[Phase, dict]]:
    """Measures a run from outside, phase by phase."""
    seconds = 0.0
    clock = time.perf_counter()
    for phase in phases:  # the loop trains while next() waits
        seconds += time.perf_counter() - clock
        record = judge.measure(phase.next_teacher, phase.a + phase.h)
        ess = (phase.w.mean().square() / phase.w.square().mean()).item()  # (D9)
        yield phase, record | {"h": phase.h, "ess": ess, "seconds": seconds}
        clock = time.perf_counter()


def experiment(cfg: Config, arms: list, seeds: list[int], args, run: Callable = run_arm) -> dict:
    """Every arm on every seed's base. run(cfg, arm, base, device) makes a row, printed at once."""
    start = time.time()
    bases, rows, names = [], [], [arm.name for arm in arms]
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(args.jobs, context, torch.set_num_threads, (1,))  # one thread each
    try:
        with tqdm(total=len(seeds) * (1 + len(arms)), unit="run", smoothing=0) as bar:
            for future in as_completed([pool.submit(run_base, cfg, s, args.device) for s in seeds]):
                bases.append(future.result())
                bar.write(BASE_LINE.format_map(bases[-1]))
                bar.update()
            tasks = itertools.product(arms[::-1], bases)  # lists of arms end with the slowest
            futures = [pool.submit(run, cfg, arm, base, args.device) for arm, base in tasks]
            for future in as_completed(futures):
                rows.append(future.result())
                bar.write(ROW_LINE.format_map(rows[-1]))
                bar.update()
    except ValueError as error:
        sys.exit(f"stopped: {error}")
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, too, nothing more is begun
    return {
        "command": args.command,
        "seeds": seeds,
        "seconds": time.time() - start,
        "config": asdict(cfg),
        "arms": [asdict(arm) for arm in arms],
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "device": args.device},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "nets": {base["seed"]: base.pop("net") for base in bases},  # for scripts; not in the JSON
        "bases": sorted(bases, key=lambda base: base["seed"]),
        "rows": sorted(rows, key=lambda row: (names.index(row["arm"]), row["seed"])),
    }


# ---- 9. Table and figures: from the result, or its JSON, alone ----------------------------------
COLUMNS = {"kl": "KL, nats", "success": "success", "target_success": "its target"}
COLUMNS |= {"modes": "eff. paths", "target_modes": "their target"}
COLOURS = ["#000000", "#D55E00", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#999999"]


def by_arm(result: dict) -> dict[str, list[dict]]:
    """The rows of each arm, one a seed."""
    groups = {arm["name"]: [] for arm in result["arms"]}
    for row in result["rows"]:
        groups[row["arm"]].append(row)
    return groups


def mean_and_error(rows: list[dict], key: str) -> tuple[float, float]:
    """The mean of a metric over the seeds and its standard error, NaN for a single seed."""
    t = torch.tensor([row[key] for row in rows], dtype=torch.float64)
    error = t.std().item() / math.sqrt(len(t)) if len(t) > 1 else math.nan
    return t.mean().item(), error


def format_table(result: dict, columns: dict[str, str]) -> str:
    arms = by_arm(result)
    width = max(len(name) for name in arms)
    lines = [f"Mean +- standard error over {len(result['seeds'])} seeds; all exact."]
    lines.append(" " * width + "".join(f"{title:>17}" for title in columns.values()))
    for name, rows in arms.items():
        lines.append(f"{name:>{width}}")
        for key in columns:
            cell = "-"  # where a metric means nothing for an arm
            if all(row.get(key) is not None for row in rows):
                mean, error = mean_and_error(rows, key)
                cell = f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} +- {error:.3f}"
            lines[-1] += f"{cell:>17}"
    return "\n".join(lines)


def write(path: Path, save: Callable[[Path], None]) -> None:
    half = path.with_name(f".half-{path.name}")  # renamed when it is whole: nobody reads half
    save(half)
    half.replace(path)


def save_result(file: Path, result: dict) -> None:
    text = json.dumps({key: value for key, value in result.items() if key != "nets"})
    write(file, lambda half: half.write_text(text))


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    spines = {"axes.spines.top": False, "axes.spines.right": False}
    plt.rcParams.update({"font.size": 10, "savefig.dpi": 200, "legend.frameon": False, **spines})
    return plt


def save_figure(figure, path: Path) -> Path:
    write(path, lambda half: figure.savefig(half, format="png"))
    pyplot().close(figure)
    return path


def draw(result: dict, path: Path) -> Path:
    """What every arm makes of the shortest paths: a bar a seed, a shade a path, the KL above."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8.8, 3.6), layout="constrained")
    arms = by_arm(result)
    any_arm = next(iter(arms.values()))
    target = [{"success": r["target_success"], "paths": r["target_paths"]} for r in any_arm]
    groups = {"base": result["bases"], **arms, "exact target": target}
    most = max(len(base["paths"]) for base in result["bases"])
    shades = plt.get_cmap("Blues_r")([0.05 + 0.8 * k / max(1, most - 1) for k in range(most)])
    for place, (name, rows) in enumerate(groups.items()):
        for k, row in enumerate(rows):
            x = place + 0.8 * ((k + 0.5) / len(rows) - 0.5)  # side by side in the group
            bottom = 0.0
            for share, shade in zip(row["paths"], shades, strict=False):
                axis.bar(x, row["success"] * share, 0.7 / len(rows), bottom, color=shade)
                bottom += row["success"] * share
        if name in arms:
            axis.text(place, 1.03, f"KL {mean_and_error(rows, 'kl')[0]:.2f}", ha="center")
    kept = {name: mean_and_error(rows, "modes")[0] for name, rows in arms.items()}
    ends = [min(kept, key=kept.get), min(arms, key=lambda name: mean_and_error(arms[name], "kl"))]
    ends = [f"'{name}' {kept[name]:.1f}" for name in ends]  # the fewest paths, the nearest law
    goal = mean_and_error(any_arm, "target_modes")[0]
    axis.set_title(f"of {goal:.1f} shortest paths, a shade each, {', '.join(ends)} are kept")
    axis.set_xticks(range(len(groups)), groups, rotation=0 if len(groups) < 9 else 20)
    axis.set(ylabel="probability; a bar is a seed", ylim=(0, 1.1))
    return save_figure(figure, path)


# ---- 10. The command line -----------------------------------------------------------------------
def make_parser(description: str, without: tuple = ()) -> argparse.ArgumentParser:
    """The flags that the scripts in figures/ have too, but for the settings that one has not."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--seeds", type=int, help="seeds, each with its own base (default: one a process)")
    add("--first-seed", type=int, default=0, help="the first of the seeds (default 0)")
    add("--quick", action="store_true", help=f"half a minute on 2 cores, a sketch: {QUICK}")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default auto")
    add("--jobs", type=int, help="processes (default: the cores, at most 8; 1 on a GPU)")
    add("--out", type=Path, default=Path("figures"), help="folder of results (default figures)")
    add("--plot-only", action="store_true", help="only draw the results in --out again")
    for f in fields(Config):
        if f.name not in without:
            choices = {"walker": DRIFT, "grid": range(4, 8)}.get(f.name)
            text = f"{f.metadata['help']} (default {f.default})"
            add(f"--{f.name.replace('_', '-')}", type=f.type, choices=choices, help=text)
    return parser


def read_settings(parser: argparse.ArgumentParser, preset: dict) -> tuple:
    """Config, seeds, and the flags, filled in; what cannot be stops here, with one sentence."""
    args = parser.parse_args()
    given = {f.name: getattr(args, f.name, None) for f in fields(Config)}
    given = {name: value for name, value in given.items() if value is not None}
    cfg = Config(**preset | (QUICK if args.quick else {}) | given)
    if args.device == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        args.device = "cuda" if torch.cuda.is_available() else mps
    if args.jobs is None:
        args.jobs = min(8, os.cpu_count() or 1) if args.device == "cpu" else 1
    default = cfg.mazes or (1 if args.quick else args.jobs)
    count = default if args.seeds is None else args.seeds
    check_settings(parser, cfg, args, count)
    file = Path(sys.argv[0])
    module = f"-m figures.{file.stem}"
    args.script = f"python {module if file.parent.name == 'figures' else file.name}"
    args.command = " ".join([args.script, *sys.argv[1:]])
    return cfg, list(range(args.first_seed, args.first_seed + count)), args


def check_settings(parser: argparse.ArgumentParser, cfg: Config, args, count: int) -> None:
    for name, value in {**asdict(cfg), "jobs": args.jobs, "seeds": count}.items():
        exempt = name == "walker" or (name, value) == ("mazes", 0)
        if not exempt and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive and finite, not {value}")
    if args.seeds is not None and cfg.mazes:
        parser.error("--mazes N already says how many seeds; leave out --seeds")
    if not 0 <= args.first_seed < args.first_seed + count <= 1000:
        parser.error("--first-seed and --seeds or --mazes must stay within seeds 0 to 999")
    if cfg.width % 2:
        parser.error(f"--width {cfg.width} must be even, for two attention heads")
    L = 2 * cfg.grid - 2  # moves
    need = args.jobs * (0.4 + BYTES * L * (V + 1) ** L / 2**30)
    if hasattr(os, "sysconf"):
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        if need > have:
            parser.error(f"--grid {cfg.grid} takes {need:.0f} GiB, of {have:.0f}; try --jobs 1")
    try:
        torch.zeros(1, device=args.device)  # fails where there is no such device
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except (RuntimeError, AssertionError, OSError) as error:
        parser.error(f"--device {args.device} or --out {args.out}: {str(error).splitlines()[0]}")


def main() -> None:
    parser = make_parser("DTM on a maze, every number exact; the file's head explains the metrics.")
    parser.add_argument("--ablate", choices=ABLATIONS, help="the arms of one question")
    cfg, seeds, args = read_settings(parser, preset={})
    if args.plot_only:
        redraw(parser, args, draw)
        return
    arms = ABLATIONS[args.ablate] if args.ablate else MAIN
    most = max(arm.phases or cfg.phases for arm in arms)  # phases of any arm
    if min(cfg.steps, cfg.rollouts) < most - 1 + cfg.last:
        parser.error(f"{most} phases need more --steps and --rollouts, {cfg.last:g} for the last")
    print(f"{args.device}, float32, laws in float64; {args.jobs} processes, {len(seeds)} seeds")
    result = experiment(cfg, arms, seeds, args)
    print(f"\n{format_table(result, COLUMNS)}\n{len(seeds)} seeds in {result['seconds']:.0f} s")
    parts = {"quick": args.quick, f"ablate_{args.ablate}" if args.ablate else "main": True}
    parts |= {f"grid{cfg.grid}": cfg.grid != 4, "mazes": cfg.mazes, "towards": cfg.walker != "away"}
    file = args.out / ("_".join(part for part, on in parts.items() if on) + ".json")
    save_result(file, result)
    print("wrote", file, draw(result, file.with_suffix(".png")))


def redraw(parser: argparse.ArgumentParser, args, draw: Callable) -> None:
    """--plot-only: draws what the same script has written to --out."""
    drawn = []
    for file in sorted(args.out.glob("*.json")):
        try:
            result = json.loads(file.read_text())
        except ValueError:
            parser.error(f"{file} is no JSON: delete it, or make it again")
        if "bases" in result and result["command"].startswith(args.script):
            drawn.append(draw(result, file.with_suffix(".png")))
    if not drawn:
        parser.error(f"no JSON of this script in {args.out}: run without --plot-only first")
    print("wrote", *drawn)


if __name__ == "__main__":
    main()
