"""The maze lab: Discrete Tilt Matching on a problem where every number is known exactly.

    python maze_lab.py                 train by seven methods, print a table, and draw a figure
    python maze_lab.py --ablate cv     compare control variates; or vary another part of the method:
                                       the number of phases (anneal), the form of the loss (loss),
                                       the decoding order (sampler), the choice of h (ess), or
                                       replay (replay)
    python maze_lab.py --mazes 6       give each of six seeds its own random maze
    python maze_lab.py --grid 5        use a larger maze, which is still exact

"The paper" is Discrete Tilt Matching by Chen, Wang, Potaptchik, Kim and Albergo (arXiv 2604.18739).
"The authors" are its authors. "Ours" marks what this project added.

THE TASK. A sequence is a path through a grid maze. It has L moves, and each move is one of 0 (up),
1 (right), 2 (down) and 3 (left). A move into a wall or off the grid is a bump: the walker stays
where it is. The reward measures progress, r = 1 - dist(end, goal) / dist(start, goal), where dist
is the number of moves along a shortest path. In some random mazes r can be negative, because a
path can end farther from the goal than it started. L is dist(start, goal), so r = 1 exactly on the
shortest paths. The target distribution, defined below, puts most of its mass on them, so they are
its modes. A method that loses some of them has collapsed. This is the default maze:

    S . # #     S is the start, G the goal, and # a wall. L is 6, and there are 5 shortest paths.
    . . . .     "right down down right down right" is [1, 2, 2, 1, 2, 1]. It ends on G, so r = 1.
    . . . #     [1, 1, 1, 1, 1, 1] bumps five times and ends beside S, so r = 1/6.
    . # . G

The model sees only moves and masks (token 4), neither the maze nor the reward.

THE BASE MODEL is a small masked diffusion transformer. It is trained on the paths of a noisy walker
that drifts away from the goal, so it rarely succeeds. There are only 4^6 = 4,096 paths and
5^6 = 15,625 partly masked states, so the distributions below are computed and not estimated.

GLOSSARY (the equations (D1) to (D13) are those of dtm.py)
    V, L, P       there are V possible moves, L moves in a path, and P shortest paths
    B, M          a batch has B paths with M masked positions altogether
    r             the reward of a path
    x1            finished paths (B, L)
    xt, mask      states: paths with some moves masked, (B, L), and where they are masked, (B, L)
    rho_0         the distribution of the base model's paths
    rho_a         rho_0(x) e^{a r(x)}, normalized: the base tilted by a                       (D1)
    a, A          the tilt, which rises from 0; the final tilt `a_end`, whose rho_A is the target
    phase         a round of the algorithm, which moves the model from tilt a to tilt a + h
    h             the increment of a phase
    K, n          the number of phases of a run; the number of rollouts of a phase
    rho_theta     the distribution of the trained model's paths, unmasked in random order    (D11)
    teacher       the model at tilt a, which draws paths, called rollouts
    student       the model that is trained on the rollouts until it is at tilt a + h
    w             the weight e^{h r} of a rollout
    replay, u     with replay, batches are drawn from all rollouts so far, with probabilities
                  proportional to u (D13)
    N             the number of rollouts in use: n, or with replay those of all phases so far
    c             the coefficient of the control variate, a term of mean zero that lowers the noise
                  of the gradient (D3); c(xt, i) is a coefficient for position i of the state xt
    arm           one method of the comparison; all arms may use the same number of rollouts and
                  gradient steps, but an arm that chooses h from its rollouts may need fewer phases
                  to reach A, and then uses fewer of both

THE METRICS describe the model at the end of a run. The program writes them to a JSON file, whose
list `rows` has an entry with these keys for each arm and seed.
    kl        KL(rho_A || rho_theta) in nats, the score: 0 is the exact tilt
    success   the probability that rho_theta gives to the shortest paths, where r = 1
    modes     the effective number of shortest paths: e^entropy of rho_theta given r = 1
    paths     the probability of each shortest path under rho_theta given r = 1
    kl_modes  KL(rho_A given r = 1 || rho_theta given r = 1)
    target_success, target_modes, target_paths   the same numbers for rho_A
    a, h      the tilt at the end; the increment of the last phase
    ess       the effective sample size of the last phase, as a share of the rollouts in use
              (D9); null for the arm "reward only", a policy gradient that has r - mean r for w
    seconds   the training time of the arm
    trace     a list of the same metrics after every phase, where `a` is the tilt at the end of the
              phase, and rho_a is the target

CONTENTS   1 settings   2 the loop   3 control variates   4 schedules   5 the maze   6 the model
           7 exact evaluation   8 running   9 table and figure   10 command line
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
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path

import networkx as nx
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

import dtm

V, MASK = 4, 4  # the number of possible moves; the token that stands for a masked move
MOVES = {0: (-1, 0), 1: (0, 1), 2: (1, 0), 3: (0, -1)}  # how each move changes (row, column)
DRIFT = {"away": (0, 3), "towards": (1, 2)}  # the moves that the walker prefers


# ---- 1. Settings --------------------------------------------------------------------------------
def setting(default: int | float | str, help: str):
    """Return a field of `Config` with its default and the help text of its flag."""
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """The settings of a run. Each one is also a flag of the command line."""

    grid: int = setting(4, "Use a maze with this many cells per side; 5 takes 0.9 GB per process")
    walker: str = setting("away", "Let the base model's walker drift away from or towards the goal")
    a_end: float = setting(32.0, "Stop at this tilt A, the factor of the reward in the exponent")
    rollouts: int = setting(32768, "Draw this many paths per arm, all phases together")
    steps: int = setting(1600, "Take this many gradient steps per arm, all phases together")
    phases: int = setting(16, "Divide the way to A into this many phases")
    last: float = setting(2.0, "Make the last phase this many times as long as an ordinary phase")
    batch: int = setting(256, "Use this many paths per gradient step")
    lr: float = setting(7e-3, "Start the first phase at this learning rate")
    base_steps: int = setting(800, "Train the base model for this many gradient steps")
    base_batch: int = setting(512, "Use this many paths per gradient step of the base model")
    base_lr: float = setting(3e-3, "Train the base model at this peak learning rate")
    width: int = setting(32, "Give the model this width, an even number for two attention heads")
    layers: int = setting(2, "Give the model this many layers")
    mazes: int = setting(0, "Run on this many random mazes, one per seed; 0 means the fixed maze")


QUICK = {"base_steps": 150, "base_batch": 256, "steps": 240, "phases": 8, "rollouts": 8192}


class FittedC(Enum):
    """A coefficient c of the control variate that a run fits to its own batches (section 3)."""

    SCALAR = "one number for all positions"
    NET = "a number c(xt, i) for each masked position, from a small net"


@dataclass(frozen=True)
class Arm:
    """One way from rho_0 to rho_A. All arms share the base model and the budget."""

    name: str  # the name in tables, figures and JSON
    c: float | FittedC = FittedC.NET
    normalize: bool = True  # whether the weights are divided by their mean over the phase
    # the loss (D3), or dtm.etm_loss (D4, explicit tilt matching), or dtm.self_consistent_loss (D5)
    loss: Callable = dtm.c_dtm_loss
    phases: int | None = None  # None stands for Config.phases.
    adaptive_h: bool = False  # whether h depends on the rollouts; if not, h is equal in all phases
    reward_only: bool = False  # whether r - mean r replaces w, which gives a policy gradient
    lr: float | None = None  # None stands for Config.lr.
    order: str = "random"  # the decoding order of the rollouts, one of dtm.ORDERS
    replay: bool = False  # whether the rollouts of earlier phases are used again, by (D13)
    decay: float = 1.0  # if below 1, early phases draw more rollouts; see `phase_sizes`
    c_share: float = 1.0  # c is multiplied by this number; see section 3 below


def paper_arm(name: str, c: float, loss: Callable = dtm.c_dtm_loss) -> Arm:
    """Return an arm as in the paper: c is a fixed number and the weights are not normalized."""
    return Arm(name, c=c, normalize=False, loss=loss)


C_0, C_1 = paper_arm("c = 0", c=0.0), paper_arm("c = 1", c=1.0)
SELF_NORMALIZED = Arm("c = 1, self-normalized", c=1.0)
BEST_SCALAR, LEARNED = Arm("best scalar c", c=FittedC.SCALAR), Arm("learned c")
# The target (D3) with c = 0 is w e. With r - mean r for w, the gradient of the loss is a policy
# gradient. The loss is not bounded below: with the learning rate of the other arms, paths lose all
# of their probability, and the KL becomes infinite.
REWARD_ONLY = Arm("reward only", c=0.0, reward_only=True, lr=1e-3)
ONE_JUMP = Arm("one jump", c=FittedC.SCALAR, phases=1)
ADAPTIVE_H = Arm("h by rollouts", adaptive_h=True)
REPLAY = Arm("replay", replay=True, decay=0.7, c_share=0.8)
ALL_OF_C = Arm("replay, all of c", replay=True, decay=0.7)
MAIN = [REWARD_ONLY, ONE_JUMP, C_0, C_1, BEST_SCALAR, LEARNED, REPLAY]
# Whose an arm is; the main figure shows it.
ORIGIN = {REWARD_ONLY.name: "not DTM", C_0.name: "paper", C_1.name: "paper"}
ORIGIN |= dict.fromkeys([arm.name for arm in (ONE_JUMP, BEST_SCALAR, LEARNED, REPLAY)], "ours")
ABLATIONS = {
    "anneal": [*[Arm(f"K = {K}", phases=K) for K in (1, 2, 4, 8, 16, 32)], ADAPTIVE_H],
    "cv": [C_0, paper_arm("c = 0.5", c=0.5), C_1, SELF_NORMALIZED, BEST_SCALAR, LEARNED],
    "loss": [
        paper_arm("explicit", c=1.0, loss=dtm.etm_loss),  # (D4) has no c.
        paper_arm("implicit", c=1.0, loss=dtm.c_dtm_loss),
        paper_arm("self-consistent", c=1.0, loss=dtm.self_consistent_loss),
    ],
    "sampler": [
        Arm("random order"),  # of the positions in which the teacher draws a rollout
        Arm("top-probability order", order="top_prob"),  # The surest position is next.
        # A token is drawn at every mask, and the surest one is kept.
        Arm("low-confidence remasking", order="low_confidence"),
    ],
    "ess": [Arm("equal h"), ADAPTIVE_H],
    "replay": [LEARNED, Arm("learned c, times 0.8", c_share=0.8), ALL_OF_C, REPLAY],
}


# ---- 2. The loop --------------------------------------------------------------------------------
@dataclass
class Phase:
    """What `tilt` yields after each phase, for code that measures from outside the loop.

    `student` and `control` are live objects that keep training. A Table is a model in the form of
    its logits in all 5^L states, see `tabulate`.
    """

    a: float  # the tilt at the start of the phase
    h: float  # its increment
    x1: Tensor  # (N, L) the rollouts of the teacher, and with replay those of earlier phases
    r: Tensor  # (N,) their rewards
    w: Tensor  # (N,) their weights w; with replay u w, because rollouts are drawn by u
    student: "MazeNet"
    teacher: dtm.Table  # the model at tilt a
    next_teacher: dtm.Table  # the model at tilt a + h: the student as a table
    control: "FixedC | ScalarC | LearnedC"


def tilt(
    base: "MazeNet", maze: "Maze", arm: Arm, cfg: Config, choose_h: Callable, seed: int
) -> Iterator[Phase]:
    """Run DTM from rho_0, the model `base`, to rho_A, and yield each phase when it is finished.

    The comments 1 to 6 are the items of the algorithm at the head of dtm.py. choose_h(a, r) returns
    the increment h at tilt a, where the rollouts have the rewards r (section 4).
    """
    device = next(base.parameters()).device
    noise = Generator(device).manual_seed(seed)
    torch.manual_seed(seed)  # for the initial weights of a learned c

    # 1. Start with teacher = student = base.
    student = copy.deepcopy(base)
    teacher = tabulate(student, maze.L)
    optimizer = adam(student)  # Its state is kept over the phases; the authors' code clears it.
    control = make_control(arm, maze.L, device)
    a = 0.0
    plan = phase_sizes(cfg, arm.phases or cfg.phases, arm.decay)
    drawn = []  # (a, x1, r) of each phase whose rollouts are in use
    for k, (n, steps) in enumerate(plan):
        peak_lr = (arm.lr or cfg.lr) * (1 - 0.8 * k / len(plan))  # Later phases move less.
        # 2. Draw rollouts from the teacher, compute their rewards, and weight them.
        blank = torch.full((n, maze.L), MASK, device=device)
        # `sample` yields the states on the way; the last one is finished.
        *_, x1 = dtm.sample(teacher, blank, MASK, order=arm.order, generator=noise)
        r = maze.reward(x1)  # (n,)
        h = min(choose_h(a, r), cfg.a_end - a)  # The last increment ends at A.
        drawn = [*drawn, (a, x1, r)] if arm.replay else [(a, x1, r)]
        tilts, paths, rewards = zip(*drawn, strict=True)
        x1, r = torch.cat(paths), torch.cat(rewards)
        u = dtm.replay_weights(rewards, tilts, a)  # (N,)  (D13); all are 1 without replay
        w = dtm.tilt_weight(r, h, normalize=arm.normalize)  # (N,)  (D1)
        if arm.replay and arm.normalize:
            w = w / (u * w).mean()  # so that the weights of a batch have mean 1
        if arm.reward_only:
            w = r - r.mean()  # The loss then gives a policy gradient, with the bound (D6) in
            # place of the log-probability of a path.
        for step in range(steps):
            # 3. Mask a batch. The indices are computed once, because `nonzero` makes the CPU wait
            #    for the GPU.
            if arm.replay:
                chosen = u.multinomial(cfg.batch, replacement=True, generator=noise)  # (B,)
            else:
                chosen = torch.randint(n, (cfg.batch,), generator=noise, device=device)  # (B,)
            xt, mask = dtm.mask_random(x1[chosen], MASK, noise)  # (B, L) each
            positions = mask.nonzero(as_tuple=True)  # rows and columns of the M masked positions
            row = positions[0]  # (M,)
            # 4. Take a gradient step on the loss at the masked positions.
            logits, logits_a = student(xt, positions), teacher(xt, positions)  # (M, V) each
            token, w_masked = x1[chosen][positions], w[chosen][row]  # (M,) each
            full_c = control(xt, positions)  # a number or (M,)
            c = arm.c_share * full_c  # The losses treat it as a constant.
            if arm.loss is dtm.etm_loss:  # (D4) takes the reward and h instead of w and c.
                loss = dtm.etm_loss(logits, logits_a, token, r[chosen][row], h)  # (M,)
            else:
                loss = arm.loss(logits, logits_a, token, w_masked, c)  # (M,)  (D3) or (D5)
            # Each path counts 1 / B, which its masked positions share equally.
            share = (1 / (mask.sum(1) * cfg.batch))[row]  # (M,)
            dtm.take_step(optimizer, (share * loss).sum(), lr=peak_lr * (1 - step / steps))
            control.learn(
                full_c,
                logits=logits.detach(),
                logits_a=logits_a,
                token=token,
                w=w_masked,
                share=share,
            )
        # 5. Make the student the teacher of the next phase.
        next_teacher = tabulate(student, maze.L)
        models = {"student": student, "teacher": teacher, "next_teacher": next_teacher}
        yield Phase(a=a, h=h, x1=x1, r=r, w=u * w, control=control, **models)
        teacher = next_teacher
        a += h
        if a >= cfg.a_end * (1 - 1e-9):
            break  # 6. Stop when the tilt is A.


def phase_sizes(cfg: Config, phases: int, decay: float = 1.0) -> list[tuple[int, int]]:
    """Return the numbers of rollouts and of gradient steps of each phase.

    The last phase is `cfg.last` times as long as an ordinary phase, so that the run has the length
    of phases - 1 + cfg.last ordinary phases. With decay < 1 this holds for the gradient steps only:
    a quarter of the rollouts is divided equally among all phases, and of the rest each phase draws
    `decay` times as many as the phase before.
    """
    lengths = [1.0] * (phases - 1) + [cfg.last]
    geometric = [decay**k for k in range(phases)]
    front = [0.25 / phases + 0.75 * part / sum(geometric) for part in geometric]

    def sizes(total: int, parts: list[float]) -> list[int]:
        ends = [round(total * sum(parts[:k]) / sum(parts)) for k in range(phases)] + [total]
        return [end - start for start, end in itertools.pairwise(ends)]

    rollouts = sizes(cfg.rollouts, lengths if decay == 1 else front)
    return list(zip(rollouts, sizes(cfg.steps, lengths), strict=True))


def adam(model: nn.Module) -> torch.optim.Adam:
    """Return the optimizer that all networks of this file use."""
    return torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=True)


# ---- 3. Control variates ------------------------------------------------------------------------
# An object of this section computes c, the coefficient of the control variate, for a batch
# of states: one number, or one number per masked position. It learns from a batch only after its c
# was used on that batch, because a c fitted to the batch on which it is used would bias the loss.
#
# The best c is close to E[w | xt]. A teacher that is not consistent passes the share c / E[w | xt]
# of its error on to the student (section 3 of dtm.py), so that with the best c an error of the
# first phase may still be there in the last one. The arm "replay" uses 0.8 of the best c, at the
# price of a noisier gradient. Without replay this does not help (--ablate replay).
@dataclass(eq=False)
class FixedC:
    """c is a number. c = 0 leaves the control variate out, and c = 1 is the paper's choice."""

    c: float

    def __call__(self, xt: Tensor, positions: tuple[Tensor, Tensor]) -> float:
        return self.c

    def learn(self, c, *, logits, logits_a, token, w, share) -> None:
        pass


class ScalarC(FixedC):
    """c is the running mean of the best scalar (D8) of past batches (ours)."""

    def learn(self, c, *, logits, logits_a, token, w, share) -> None:
        best = dtm.best_scalar_c(logits, logits_a, token, w, share).item()  # (D8)
        self.c = 0.9 * self.c + 0.1 * best


class LearnedC:
    """c(xt, i) is a small net that reads the state xt and regresses on the targets of (D7) (ours).

    It starts near 1, and it has its own optimizer.
    """

    def __init__(self, L: int, device: torch.device, hidden: int = 64):
        self.net = nn.Sequential(
            nn.Linear(L * (V + 1), hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, L),
        ).to(device)
        self.optimizer = adam(self.net)

    def __call__(self, xt: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        state = F.one_hot(xt, V + 1).flatten(1)  # (B, L (V + 1))
        c = 1 + self.net(state.float())  # (B, L)
        return c[positions]  # (M,)

    def learn(self, c, *, logits, logits_a, token, w, share) -> None:
        # The best c minimises the mean of q (c - y)^2, see (D7). The first argument should be the
        # student's logits. With the teacher's logits in their place the target y is just w, which
        # is less noisy.
        y, q = dtm.control_variate_targets(logits_a, logits_a, token, w)
        dtm.take_step(self.optimizer, (share * q * (c - y) ** 2).sum(), lr=2e-3)


def make_control(arm: Arm, L: int, device: torch.device) -> FixedC | ScalarC | LearnedC:
    """Return the control variate of an arm, before it has learned."""
    if arm.c is FittedC.NET:
        return LearnedC(L, device)
    return ScalarC(1.0) if arm.c is FittedC.SCALAR else FixedC(arm.c)


# ---- 4. Schedules -------------------------------------------------------------------------------
# A schedule choose_h(a, r) returns the increment h of a phase that starts at tilt a. r (n,) are the
# rewards of its rollouts.
def make_schedule(arm: Arm, cfg: Config) -> Callable[[float, Tensor], float]:
    """Return the schedule of an arm."""
    phases = arm.phases or cfg.phases
    if arm.adaptive_h:
        return AdaptiveSchedule(cfg.a_end, phases)

    def equal_increments(a: float, r: Tensor) -> float:
        return cfg.a_end / phases

    return equal_increments


class AdaptiveSchedule:
    """Chooses h so that the weighted rollouts have an effective sample size of 0.93 n (ours).

    No h is smaller than a tenth of an equal increment, and the last phase takes what is left.
    """

    ESS = 0.93  # With this share of n, the run reaches A = 32 in about 16 phases.

    def __init__(self, a_end: float, phases: int):
        self.a_end = a_end
        self.phases = phases
        self.phases_started = 0

    def __call__(self, a: float, r: Tensor) -> float:
        self.phases_started += 1
        left = self.a_end - a
        if self.phases_started == self.phases:
            return left
        return max(dtm.next_h(r, self.ESS, left), 0.1 * self.a_end / self.phases)


# ---- 5. The maze --------------------------------------------------------------------------------
class Maze:
    """A maze as tables over its N = side * side cells: cell 0 is the start, and the last the goal.

    next_cell (N, 4)    the cell that each move leads to; a bump leads to the same cell
    progress  (N,)      the reward of ending there, 1 - dist(cell, goal) / dist(start, goal); walls
                        keep 0, because no path visits them; a cell that is cut off from the goal
                        keeps 0
    paths     (P, L)    the shortest paths as moves, in lexical order: the modes
    policy    (N, 4)    the move probabilities of the walker that makes the training data. It
                        gives weight 2 to the moves of its drift, 1 to other free moves, and 0.3
                        to a bump.
    """

    def __init__(self, walls: list[list[int]], drift: tuple[int, int] = DRIFT["away"]):
        self.walls = walls
        self.side = n = len(walls)  # Cell (i, j) has the number i * n + j.
        graph = maze_graph(walls)
        start, goal = (0, 0), (n - 1, n - 1)
        distance = nx.single_source_shortest_path_length(graph, goal)
        self.L = distance[start]  # The moves are just enough to reach the goal.

        self.next_cell = torch.arange(n * n)[:, None].repeat(1, 4)
        self.progress = torch.zeros(n * n)
        weight = torch.full((n * n, 4), 0.3)  # the weight of a bump
        for i, j in graph:
            cell = i * n + j
            self.progress[cell] = 1 - distance.get((i, j), self.L) / self.L
            for move, (di, dj) in MOVES.items():
                there = (i + di, j + dj)
                if there in graph:  # It is neither a wall nor off the grid.
                    self.next_cell[cell, move] = there[0] * n + there[1]
                    weight[cell, move] = 2.0 if move in drift else 1.0
        self.policy = weight / weight.sum(1, keepdim=True)

        move_of = {change: move for move, change in MOVES.items()}
        paths = []
        for cells in nx.all_shortest_paths(graph, start, goal):
            pairs = itertools.pairwise(cells)
            paths.append([move_of[b[0] - a[0], b[1] - a[1]] for a, b in pairs])
        self.paths = torch.tensor(sorted(paths))

    def cells(self, x1: Tensor) -> Tensor:
        """Return the cells (B, L + 1) that the paths x1 (B, L) visit, the start included."""
        visited = [torch.zeros_like(x1[:, 0])]  # Every path starts in cell 0.
        for move in x1.T:
            visited.append(self.next_cell[visited[-1], move])
        return torch.stack(visited, 1)

    def reward(self, x1: Tensor) -> Tensor:
        """Return the rewards (B,) of the paths x1 (B, L), on their device."""
        return self.progress[self.cells(x1.cpu())[:, -1]].to(x1.device)

    def walks(self, n: int, generator: Generator) -> Tensor:
        """Return n paths (n, L) of the noisy walker, the training data of the base model."""
        cell = torch.zeros(n, dtype=torch.long)
        moves = []
        for _ in range(self.L):
            moves.append(self.policy[cell].multinomial(1, generator=generator)[:, 0])
            cell = self.next_cell[cell, moves[-1]]
        return torch.stack(moves, 1)


def maze_graph(walls: list[list[int]]) -> nx.Graph:
    """Return the graph of the free cells (row, column); neighbours are joined by an edge."""
    graph = nx.grid_2d_graph(len(walls), len(walls))
    graph.remove_nodes_from([(i, j) for i, j in list(graph) if walls[i][j]])
    return graph


def make_maze(cfg: Config, seed: int = 0) -> Maze:
    """Return the maze of a seed: with --mazes a random one, otherwise the same for all seeds."""
    if cfg.mazes:
        walls = random_walls(cfg.grid, seed)
    elif cfg.grid == 4:
        walls = [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]]
    else:
        walls = [[0] * cfg.grid for _ in range(cfg.grid)]
        for i, j in itertools.product(range(1, cfg.grid - 1, 2), repeat=2):
            walls[i][j] = 1  # pillars with streets between them
    return Maze(walls, DRIFT[cfg.walker])


def random_walls(n: int, number: int) -> list[list[int]]:
    """Return the walls of the random maze with this number, the same in every run.

    The maze has 2 to 8 shortest paths, each of 2n - 2 moves.
    """
    noise = random.Random(0)
    cells = list(itertools.product(range(n), repeat=2))[1:-1]  # all but the start and the goal
    mazes = []
    while len(mazes) <= number:
        walls = [[0] * n for _ in range(n)]
        for i, j in noise.sample(cells, noise.randint(n // 2, 3 * n // 2)):
            walls[i][j] = 1
        graph = maze_graph(walls)
        if walls not in mazes and nx.has_path(graph, (0, 0), (n - 1, n - 1)):
            routes = list(nx.all_shortest_paths(graph, (0, 0), (n - 1, n - 1)))
            if len(routes[0]) == 2 * n - 1 and 2 <= len(routes) <= 8:
                mazes.append(walls)
    return mazes[number]


# ---- 6. The model and its base training ---------------------------------------------------------
class MazeNet(nn.Module):
    """A bidirectional transformer over partly masked paths.

    model(xt) returns logits (B, L, V). model(xt, where) returns the logits (M, V) at the positions
    `where`, a boolean mask (B, L) or the index tuple that mask.nonzero(as_tuple=True) returns.
    """

    def __init__(self, L: int, cfg: Config):
        super().__init__()
        self.embed = nn.Embedding(L * (V + 1), cfg.width)  # one vector per (position, token)
        d, options = cfg.width, {"dropout": 0.0, "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(d, nhead=2, dim_feedforward=4 * d, **options)
        norm = nn.LayerNorm(cfg.width)
        self.body = nn.TransformerEncoder(layer, cfg.layers, norm, enable_nested_tensor=False)
        self.head = nn.Linear(cfg.width, V)

    def forward(self, xt: Tensor, where: Tensor | tuple[Tensor, Tensor] | None = None) -> Tensor:
        place = torch.arange(xt.shape[1], device=xt.device)  # (L,)
        x = self.body(self.embed(xt + (V + 1) * place))  # (B, L, width)
        return self.head(x if where is None else x[where])  # (B, L, V) or (M, V)


def train_base(maze: Maze, cfg: Config, seed: int, device: str) -> MazeNet:
    """Return the base model, trained by cross-entropy at masked positions of fresh walks.

    This is the loss (D3) with w = 1 and c = 0.
    """
    torch.manual_seed(seed)  # The initial weights use it; all else has its own generator.
    net = MazeNet(maze.L, cfg).to(device)
    walk_noise = Generator().manual_seed(seed)
    mask_noise = Generator(device).manual_seed(seed)
    optimizer = adam(net)
    for step in range(cfg.base_steps):
        x1 = maze.walks(cfg.base_batch, walk_noise).to(device)  # (B, L)
        xt, mask = dtm.mask_random(x1, MASK, mask_noise)
        loss = F.cross_entropy(net(xt, mask), x1[mask], reduction="none")  # (M,)
        lr = cfg.base_lr * min(1, (step + 1) / 50) * (1 - step / cfg.base_steps)  # with a warm-up
        dtm.take_step(optimizer, dtm.mean_over_masked(loss, mask), lr)
    return net


@torch.no_grad()
def tabulate(net: nn.Module, L: int) -> dtm.Table:
    """Return the net as a table over all 5^L states, so that later calls are look-ups."""
    states = dtm.all_sequences(V + 1, L, next(net.parameters()).device)  # (5^L, L)
    logits = torch.empty(len(states), L, V, device=states.device)
    for chunk, xt in zip(logits.split(2**11), states.split(2**11), strict=True):
        chunk.copy_(net(xt))  # A list of pieces, to be joined later, would fragment the memory.
    return dtm.Table(logits).requires_grad_(False)


# ---- 7. Exact evaluation, on the CPU and in float64 ---------------------------------------------
class ExactEvaluation:
    """An object of this class measures models against the tilts of one base model.

    x         (V**L, L)  all paths
    r         (V**L,)    their rewards
    rho_0     (V**L,)    their probabilities under the base model
    shortest  (P,)       the indices of the shortest paths in x
    """

    def __init__(self, maze: Maze, base: dtm.Table):
        self.x = dtm.all_sequences(V, maze.L)
        self.r = maze.reward(self.x)
        self.rho_0 = path_distribution(base)
        # `all_sequences` counts in base V, so a path that is read as a number is its own index.
        self.shortest = (maze.paths * V ** torch.arange(maze.L - 1, -1, -1)).sum(1)

    def measure(self, table: dtm.Table, a: float) -> dict:
        """Return the metrics that the head of the file lists, with rho_a as the target."""
        rho, target = path_distribution(table), dtm.exact_tilt(self.rho_0, self.r, a)
        success, target_success = rho[self.shortest].sum(), target[self.shortest].sum()
        paths, target_paths = rho[self.shortest] / success, target[self.shortest] / target_success
        return {
            "a": a,
            "kl": kl(target, rho),
            "success": success.item(),
            "target_success": target_success.item(),
            "modes": torch.special.entr(paths).sum().exp().item(),
            "target_modes": torch.special.entr(target_paths).sum().exp().item(),
            "kl_modes": kl(target_paths, paths),
            "paths": paths.tolist(),
            "target_paths": target_paths.tolist(),
        }


def path_distribution(table: dtm.Table) -> Tensor:
    """Return rho_theta (V**L,), float64, for a model given as a table."""
    return dtm.exact_marginal(dtm.Table(table.logits.cpu()), V, table.logits.shape[1]).detach()


def reward_distribution(rho: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct values of the rewards r and their probabilities, float64."""
    values, which = r.double().unique(return_inverse=True)
    return values, torch.zeros_like(values).index_add(0, which, rho)


def kl(p: Tensor, q: Tensor) -> float:
    """Return KL(p || q) in nats."""
    return torch.xlogy(p, p / q).sum().item()


# ---- 8. Running: first the base models, then every arm on every base ----------------------------
BASE_TEMPLATE = (
    "seed {seed}: the base model succeeds with probability {success:.5f}; "
    "one jump to A leaves {jump_ess:.0f} effective rollouts"
)
ROW_TEMPLATE = (
    "seed {seed}, {arm}: KL {kl:.3f}, success {success:.3f}, {modes:.2f} paths, {seconds:.0f} s"
)


def run_base(cfg: Config, seed: int, device: str) -> dict:
    """Train the base model of a seed, and return it with its metrics and its rewards."""
    maze = make_maze(cfg, seed)
    net = train_base(maze, cfg, seed, device)
    table = tabulate(net, maze.L)
    evaluation = ExactEvaluation(maze, table)
    target = dtm.exact_tilt(evaluation.rho_0, evaluation.r, cfg.a_end)
    values, p = reward_distribution(evaluation.rho_0, evaluation.r)
    return {
        "seed": seed,
        "walls": maze.walls,
        "net": net.cpu(),
        "reward_distribution": {"values": values.tolist(), "p": p.tolist()},
        "jump_ess": cfg.rollouts / (target.square() / evaluation.rho_0).sum().item(),  # (D9)
        **evaluation.measure(table, a=0.0),
    }


def run_arm(
    cfg: Config,
    arm: Arm,
    base: dict,
    device: str,
    extra_metrics: Callable | None = None,
    noise_seed: int | None = None,
) -> dict:
    """Run one arm on one base model, and return its row of the result.

    extra_metrics(phase, evaluation, arm) may return further metrics for the record of a phase.
    noise_seed is the seed of rollouts and batches; None stands for that of the base model.
    """
    maze = make_maze(cfg, base["seed"])
    seed = base["seed"] if noise_seed is None else noise_seed
    net = base["net"].to(device)
    evaluation = ExactEvaluation(maze, tabulate(net, maze.L))
    trace = []
    phases = tilt(net, maze, arm=arm, cfg=cfg, choose_h=make_schedule(arm, cfg), seed=seed)
    for phase, record in follow(phases, evaluation):
        if extra_metrics:
            record |= extra_metrics(phase, evaluation, arm)
        trace.append(record)
    return {"arm": arm.name, "seed": base["seed"], **trace[-1], "trace": trace}


def follow(phases: Iterator[Phase], evaluation: ExactEvaluation) -> Iterator[tuple[Phase, dict]]:
    """Yield each phase with its metrics. The time that measuring takes is not counted."""
    seconds, clock = 0.0, time.perf_counter()
    for phase in phases:
        seconds += time.perf_counter() - clock
        w = phase.w
        # "Reward only" has r - mean r in place of a weight.
        is_weight = bool(w.min() >= 0 and w.max() > 0)
        ess = (w.mean().square() / w.square().mean()).item() if is_weight else None  # (D9)
        record = evaluation.measure(phase.next_teacher, phase.a + phase.h)
        yield phase, record | {"h": phase.h, "ess": ess, "seconds": seconds}
        clock = time.perf_counter()


def experiment(
    cfg: Config, arms: list, args: argparse.Namespace, make_row: Callable = run_arm
) -> dict:
    """Run every arm on the base model of every seed, and return the result.

    make_row(cfg, arm, base, device) runs one arm in one of `args.jobs` processes. A ValueError in
    one of them ends the program with its message.
    """
    start = time.time()
    pool = ProcessPoolExecutor(
        max_workers=args.jobs,
        mp_context=multiprocessing.get_context("spawn"),  # A forked process could not use CUDA.
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    try:
        futures = [pool.submit(run_base, cfg, seed, args.device) for seed in args.seeds]
        bases = collect(futures, BASE_TEMPLATE)
        # Start the slowest arms first; they stand last in each list.
        pairs = [(arm, base) for arm in reversed(arms) for base in bases]
        futures = [pool.submit(make_row, cfg, arm, base, args.device) for arm, base in pairs]
        rows = collect(futures, ROW_TEMPLATE)
    except ValueError as error:
        sys.exit(f"The run stopped: {error}")
    finally:
        pool.shutdown(cancel_futures=True)
    names = [arm.name for arm in arms]
    nets = {base["seed"]: base.pop("net") for base in bases}
    return {
        "command": args.command,
        "seeds": args.seeds,
        "seconds": time.time() - start,
        "config": asdict(cfg),
        "arms": [asdict(arm) for arm in arms],
        "machine": {"system": platform.platform(), "cores": processors(), "device": args.device},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "nets": nets,  # `save_result` leaves them out.
        "bases": bases,
        "rows": sorted(rows, key=lambda row: (names.index(row["arm"]), row["seed"])),
    }


def collect(futures: list[Future], template: str) -> list[dict]:
    """Return the results in the order of the futures, and print each one when it is finished."""
    for future in tqdm(as_completed(futures), total=len(futures), unit="run", smoothing=0):
        tqdm.write(template.format_map(future.result()))
    return [future.result() for future in futures]


def processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ---- 9. The table and the figure, from the result or its JSON -----------------------------------
COLUMNS = {
    "kl": "KL, nats",
    "success": "success",
    "target_success": "target success",
    "modes": "paths kept",
    "target_modes": "target paths",
}


def by_arm(result: dict) -> dict[str, list[dict]]:
    """Return the rows of each arm, one per seed."""
    names = [arm["name"] for arm in result["arms"]]
    return {name: [row for row in result["rows"] if row["arm"] == name] for name in names}


def mean_and_error(rows: list[dict], key: str) -> tuple[float, float]:
    """Return the mean of a metric over the rows, and its standard error or NaN for a single row."""
    values = torch.tensor([row[key] for row in rows], dtype=torch.float64)
    error = values.std().item() / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
    return values.mean().item(), error


def format_table(result: dict, columns: dict[str, str]) -> str:
    """Return a table with one line per arm. A dash stands where an arm lacks the metric."""
    arms = by_arm(result)
    width = max(len(name) for name in arms)
    lines = [" " * width + "".join(f"{title:>17}" for title in columns.values())]
    for name, rows in arms.items():
        cells = "".join(f"{format_cell(rows, key):>17}" for key in columns)
        lines.append(f"{name:>{width}}{cells}")
    count = len(next(iter(arms.values())))
    seeds = f"the mean +- standard error over {count} seeds" if count > 1 else "one seed"
    return "\n".join([*lines, f"Each model is measured exactly; the table shows {seeds}."])


def format_cell(rows: list[dict], key: str) -> str:
    """Return the mean of a metric and its standard error, or a dash if a row lacks the metric."""
    if any(row.get(key) is None for row in rows):
        return "-"
    mean, error = mean_and_error(rows, key)
    return f"{mean:.3f} +- {error:.3f}" if len(rows) > 1 else f"{mean:.3f}"


def write_then_rename(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file and rename it, so that `file` is never half written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".half-{file.name}")
    write(temporary)
    temporary.replace(file)


def save_result(out: Path, name: str, result: dict) -> Path:
    """Write OUT/data/NAME.json without the networks, and return its path."""
    file = out / "data" / f"{name}.json"
    shown = {key: value for key, value in result.items() if key != "nets"}
    text = json.dumps(shown, default=name_of)
    write_then_rename(file, lambda temporary: temporary.write_text(text))
    return file


def name_of(value: object) -> str:
    """Return what JSON holds in place of an object: the name of a function, or str(object)."""
    return getattr(value, "__name__", str(value))


def title_of(result: dict) -> str:
    """Return the claim of the main figure, or a description where other arms ran."""
    arms = by_arm(result)
    if not {REWARD_ONLY.name, LEARNED.name} <= set(arms):
        return "Each bar shows how one run divides its probability among the shortest paths"
    target, _ = mean_and_error(arms[LEARNED.name], "target_modes")
    few, _ = mean_and_error(arms[REWARD_ONLY.name], "modes")
    many, _ = mean_and_error(arms[LEARNED.name], "modes")
    claim = f"Training on reward only keeps {few:.1f} of the {target:.0f} shortest paths"
    return f"{claim}; annealing with a learned c keeps {many:.1f}"


def draw(result: dict, file: Path) -> None:
    """Draw the probability that each arm gives to each shortest path.

    The arm's mean KL to the target stands above its bars.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # Pyplot would use the backend of a notebook.

    figure = Figure(figsize=(8.8, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    arms = by_arm(result)
    any_arm = next(iter(arms.values()))  # All arms have the same target.
    target = [{"success": row["target_success"], "paths": row["target_paths"]} for row in any_arm]
    groups = {"base": result["bases"], **arms, "exact target": target}
    for place, (name, rows) in enumerate(groups.items()):
        for k, row in enumerate(rows):
            x = place + 0.8 * ((k + 0.5) / len(rows) - 0.5)  # side by side within the group
            bottom = 0.0
            for path_number, share in enumerate(row["paths"]):
                shade = colormaps["Blues_r"](0.05 + 0.8 * path_number / len(row["paths"]))
                axis.bar(x, row["success"] * share, 0.7 / len(rows), bottom, color=shade)
                bottom += row["success"] * share
        if name in arms:
            axis.text(place, 1.03, f"KL {mean_and_error(rows, 'kl')[0]:.2f}", ha="center")
        elif name == "base":  # The bars may be too small to be seen.
            axis.text(place, 0.03, f"{mean_and_error(rows, 'success')[0]:.1g}", ha="center")
    axis.set_title(title_of(result), fontsize=11)
    labels = [f"{name}\n({ORIGIN[name]})" if name in ORIGIN else name for name in groups]
    axis.set_xticks(range(len(groups)), labels, rotation=0 if len(groups) < 10 else 20)
    axis.set_ylim(0, 1.1)
    axis.set_ylabel("probability of the shortest paths\n(one bar per seed, one shade per path)")
    write_then_rename(file, lambda temporary: figure.savefig(temporary, dpi=200))


# ---- 10. The command line -----------------------------------------------------------------------
def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how to run. The scripts in figures/ have them, too."""
    add = parser.add_argument
    add("--seeds", type=int, help="Run this many seeds (default: one per process; 3 on a GPU).")
    add("--first-seed", type=int, default=0, help="Number the seeds from here (default 0).")
    add("--quick", action="store_true", help="Train less, and on one seed by default, as a sketch.")
    text = "Train on this device (default auto: cuda if there is one, otherwise cpu)."
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help=text)
    text = "Run this many processes (default: one per processor, at most 8, or 4 on a GPU)."
    add("--jobs", type=int, help=text)
    text = "Write pictures to this folder and JSON to its subfolder data (default runs/maze)."
    add("--out", type=Path, default=Path("runs/maze"), help=text)


def complete_run_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in the defaults that depend on the machine, and make `seeds` a list."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.jobs is None:
        args.jobs = min(processors(), {"cpu": 8, "cuda": 4, "mps": 1}[args.device])
    if args.seeds is None:
        if args.quick:
            args.seeds = 1
        elif args.device == "cpu":
            args.seeds = args.jobs
        else:
            args.seeds = 3
    if min(args.seeds, args.jobs) < 1 or args.first_seed < 0:
        parser.error("--seeds and --jobs must be at least 1, and --first-seed at least 0.")
    args.seeds = list(range(args.first_seed, args.first_seed + args.seeds))
    try:
        torch.zeros(1, device=args.device)  # This fails if there is no such device.
        args.out.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, AssertionError, OSError) as error:
        reason = str(error).splitlines()[0]
        parser.error(f"cannot use --device {args.device} or --out {args.out}: {reason}")


def read_command_line(argv: list[str] | None) -> tuple[Config, argparse.Namespace]:
    """Return the settings and the flags. `args.arms` are the arms to run."""
    about = "Run DTM on a maze. The head of the file explains the task, the arms and the metrics."
    parser = argparse.ArgumentParser(description=about)
    text = (
        "Answer one question instead of running the main comparison: how many phases (anneal), "
        "which c (cv), which form of the loss (loss), which decoding order (sampler), who chooses "
        "h (ess), or with which c rollouts are used again (replay)?"
    )
    parser.add_argument("--ablate", choices=ABLATIONS, help=text)
    add_run_flags(parser)
    for f in fields(Config):
        flag, text = f"--{f.name.replace('_', '-')}", f"{f.metadata['help']} (default {f.default})."
        choices = {"grid": (4, 5), "walker": DRIFT}.get(f.name)
        parser.add_argument(flag, type=f.type, choices=choices, default=f.default, help=text)
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args(argv)
    cfg = Config(**{f.name: getattr(args, f.name) for f in fields(Config)})
    if cfg.mazes and args.seeds:
        parser.error(f"--mazes {cfg.mazes} already says how many seeds run; leave out --seeds.")
    args.seeds = cfg.mazes or args.seeds
    complete_run_flags(parser, args)
    args.arms = ABLATIONS[args.ablate] if args.ablate else MAIN
    for name, value in asdict(cfg).items():
        if name not in ("walker", "mazes") and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value} is not positive and finite.")
    if cfg.width % 2:
        parser.error(f"--width {cfg.width} is odd; two attention heads divide it.")
    for arm in args.arms:
        phases = arm.phases or cfg.phases
        if min(min(sizes) for sizes in phase_sizes(cfg, phases, arm.decay)) < 1:
            advice = "raise these or lower --phases"
            parser.error(f"{phases} phases need more --steps and --rollouts; {advice}.")
    return cfg, args


def main(argv: list[str] | None = None) -> None:
    """Run the command line, print the table, and write the JSON and the picture."""
    cfg, args = read_command_line(argv)
    args.command = " ".join(["python maze_lab.py", *(sys.argv[1:] if argv is None else argv)])
    name = f"ablate_{args.ablate}" if args.ablate else "main"
    if args.quick:
        name = f"quick_{name}"
    if cfg.grid != 4:
        name = f"{name}_grid{cfg.grid}"
    if cfg.mazes:
        name = f"{name}_mazes"
    if cfg.walker != "away":
        name = f"{name}_{cfg.walker}"
    print(f"Seeds: {len(args.seeds)}. Processes: {args.jobs}. Device: {args.device}.")
    result = experiment(cfg, args.arms, args)
    print(f"\n{format_table(result, COLUMNS)}\nThe run took {result['seconds']:.0f} s.")
    print("The numbers are in", save_result(args.out, name, result))
    draw(result, args.out / f"{name}.png")
    print("The picture is", args.out / f"{name}.png")


if __name__ == "__main__":
    main()
