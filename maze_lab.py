"""The maze lab: Discrete Tilt Matching where every number can be known exactly.

    python maze_lab.py                 five arms, from nothing to figures; --seeds 5 makes README's table
    python maze_lab.py --ablate cv     one question at a time: anneal, cv, loss, sampler, ess; method: DTM against its rivals
    python maze_lab.py --mazes 512     one model for many mazes, which it reads as prompts, judged on mazes it has not seen
    python maze_lab.py --gif           figures/maze.gif; -h lists the rest

THE TASK. A sequence is a path through a grid maze: L moves from {0 up, 1 right, 2 down, 3 left}; a move
into a wall or off the grid is a bump, and the walker stays. The reward is the progress made,
r = 1 - dist(end, goal) / dist(start, goal). L is the length of a shortest path, so r = 1 exactly on the
optimal paths: they are the modes, and "no collapse" means to keep them all. The default maze has 5:

    S . # #     S start, G goal, # wall; L = 6. "right down down right down right" is [1, 2, 2, 1, 2, 1]
    . . . .     and ends on G with r = 1; [1, 1, 1, 1, 1, 1] bumps five times, ends beside S, r = 1/6.
    . . . #     The model reads moves and masks (token 4) only: maze and reward are not in its input, so
    . # . G     the answer cannot leak.

THE BASE rho_0 is a small masked diffusion transformer trained on a noisy walker that drifts away from the
goal. THE TARGET is rho_A ~ rho_0 e^{A r}. All 5^6 = 15,625 masked states fit in one batch, so both laws and
the distance between them are computed, not estimated. Larger grids (`--grid 5`) say what they sample.

THE METRICS (`rows` of the JSON)
    kl        KL(rho_A || rho_theta) in nats, the score: 0 is the exact tilt
    success   rho_theta(r = 1); modes: e^entropy of rho_theta given r = 1, the effective number of optimal
              paths; target_success, target_modes: rho_A's; kl_modes: KL between the laws given r = 1
    found     expected number of different optimal paths among 64 draws; target_found: rho_A's
    reward, kl_base, kl_reverse, kl_end   E r, KL(rho_theta || rho_0), KL(rho_theta || rho_A), KL(rho_A || rho_theta)
    waste     min_a KL(rho_theta || rho_a): the distance to the frontier of reward against KL to the base
    evaluations, seconds   sequences through a network (backward counts 2), seconds without measuring
    phase_kl, phase_bound, ess   of one phase, from its teacher's own law: both sides of (D12), share of the rollouts
    grad_var  variance over x1 of the logit gradient at a given (xt, i), theta = teacher, over (E w)^2, by
              enumeration; mean over states, positions and phases
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import random
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import networkx as nx
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

import dtm

V, MASK = 4, 4
MOVES = {(-1, 0): 0, (0, 1): 1, (1, 0): 2, (0, -1): 3}  # up, right, down, left
EXACT_STATES = 5**6  # as many masked states are enumerated; larger grids are sampled
TOWARDS = {"away": False, "towards": True, "goal": None}
HELD = 8  # mazes kept out of training
DRAWS = 64  # sequences among which `found` counts optimal paths
BUFFER_ESS = 0.975  # the effective sample size that "buffer" keeps in a phase

def option(default, help):
    return field(default=default, metadata={"help": help})

@dataclass
class Config:
    grid: int = option(4, "side of the maze in cells; above 4 the KL is sampled")
    walker: str = option("away", "base walker: away drifts up and left, from the goal; towards drifts to it (one jump will do), goal too, by the shortest way")
    a_end: float = option(32.0, "final tilt A, per unit of reward")
    rollouts: int = option(32768, "sequences drawn per arm, all phases together")
    steps: int = option(6400, "gradient steps per arm, all phases together")
    phases: int = option(32, "annealing phases")
    batch: int = option(128, "sequences per gradient step")
    lr: float = option(5e-3, "peak learning rate of a phase, which falls linearly to 0; --ablate method: for all, instead of each one's own")
    base_steps: int = option(800, "gradient steps of the base model")
    base_batch: int = option(512, "walks per gradient step of the base model")
    base_lr: float = option(3e-3, "peak learning rate of the base model")
    width: int = option(32, "model width, in layers of 2 heads")
    layers: int = option(2, "layers of the model")
    mazes: int = option(0, "train on so many random mazes, read as prompts, and judge on others; 0: one maze, in no prompt")

PRESETS = {  # what differs from Config for a question; "large" is --mazes with --grid above 4, for a GPU
    "method": {"steps": 3200},
    "mazes": {"walker": "goal", "a_end": 12.0, "width": 48, "base_steps": 3000, "base_batch": 128, "base_lr": 6e-3, "phases": 4,
              "rollouts": 16384, "steps": 2400, "lr": 3e-3},
    "large": {"walker": "goal", "a_end": 20.0, "width": 128, "layers": 4, "base_steps": 20000, "base_lr": 1e-3, "phases": 8,
              "rollouts": 262144, "steps": 16000, "batch": 512, "lr": 1e-3}}
QUICK = {"base_steps": 150, "base_batch": 256, "steps": 480, "phases": 8, "rollouts": 8192}

@dataclass
class Arm:
    """One way from rho_0 to rho_A. All arms share the base, the number of rollouts and of gradient steps."""
    name: str
    c: str | float = "state"  # control variate: a number, "star" (running best_c) or "state" (learned c(xt, i))
    normalize: bool | str = True  # weights divided by their mean over the buffer, or over the paths of one "prompt"
    schedule: str = "ess"  # "ess": equal exact ESS a phase; "equal": equal h; "buffer": ESS of the rollouts
    phases: int | None = None  # None: Config.phases
    loss: str = "implicit"  # "implicit": c-DTM; "explicit": ETM; "self": self-consistent; or a key of RIVALS
    order: str = "random"  # decoding order of the rollouts
    lr: float | None = None  # None: Config.lr
    bound: bool = False  # measure both sides of (D12) in every phase
    ramp: float = 0.5  # rivals: share of the rounds over which the target's tilt rises; 0: none
    each: int = 1  # rollouts of a prompt

ARMS = {
    None: [Arm("one_jump", "star", phases=1), Arm("c0", 0.0, False), Arm("c1", 1.0, False), Arm("cstar", "star"), Arm("state")],
    "anneal": [*[Arm(f"K = {k}", phases=k, bound=True) for k in (1, 2, 4, 8, 16, 32)], Arm("adaptive", schedule="buffer", bound=True)],
    "cv": [Arm("c = 0", 0.0, False), Arm("c = 0.5", 0.5, False), Arm("c = 1", 1.0, False), Arm("c = 1, w / mean", 1.0),
           Arm("c*", "star"), Arm("c(xt, i)")],
    "loss": [Arm("explicit", 1.0, False, loss="explicit"), Arm("implicit", 1.0, False), Arm("self-consistent", 1.0, False, loss="self")],
    "sampler": [Arm(order, order=order) for order in ("random", "state", "confidence")],
    # Learning rates: the best of 2e-5, 1e-4, 5e-4, 2e-3, 6e-3 by KL(rho_theta || rho_A) on seeds 100 and 101.
    "method": [Arm("c-DTM, c(xt, i)", phases=16, lr=2e-3), Arm("c-DTM, c = 1", 1.0, False, phases=16, lr=2e-3),
               Arm("DMPO, u", "none", loss="dmpo", phases=16, lr=5e-4), Arm("DMPO, u - v", "neg", loss="dmpo", phases=128, lr=1e-4),
               *[Arm(name, loss=loss, phases=128, lr=lr) for name, loss, lr in (
                   ("SPG", "spg", 1e-4), ("diffu-GRPO", "diffu_grpo", 2e-3), ("wd1", "wd1", 1e-4), ("UniGRPO", "uni_grpo", 1e-4),
                   ("ELBO-REINFORCE", "elbo_reinforce", 1e-4), ("exact REINFORCE", "exact_reinforce", 2e-3))]],
    "mazes": [Arm(name, c, by, "equal", each=8) for name, c, by in (
        ("raw", 1.0, False), ("by buffer", 1.0, True), ("by prompt", 1.0, "prompt"))],
    "ess": [Arm("equal h", schedule="equal"), Arm("ESS, exact"), Arm("ESS, rollouts", schedule="buffer")],
}


# ---- 1. The maze ---------------------------------------------------------------------------------
class Maze:
    """Walls (rows of 0 and 1) with a start and a goal. next (cells, 4): where each move leads; progress (cells,): the reward of
    ending there; paths (K, L): the optimal paths as moves; policy (cells, 4): the walker, weight 2 against 1 for
    its drift (down and right, up and left, or, None, by the shortest way to the goal) and 0.3 for a bump. prompted: the cells that a model must
    read: none, for it knows the one maze (`Mazes` differ)."""
    prompted = 0

    def __init__(self, walls: list[list[int]], towards: bool | None = False, start: tuple = (0, 0), goal: tuple | None = None):
        self.walls, self.n = walls, len(walls)
        cells, goal = [(i, j) for i in range(self.n) for j in range(self.n)], goal or (self.n - 1, self.n - 1)
        graph = nx.grid_2d_graph(self.n, self.n).subgraph([cell for cell in cells if not walls[cell[0]][cell[1]]])
        far = nx.single_source_shortest_path_length(graph, goal)
        self.L, self.start, self.goal = far[start], start[0] * self.n + start[1], goal[0] * self.n + goal[1]
        routes = nx.all_shortest_paths(graph, start, goal)
        self.paths = torch.tensor(sorted([MOVES[b[0] - a[0], b[1] - a[1]] for a, b in zip(p, p[1:])] for p in routes))
        self.next, weight = torch.arange(self.n**2)[:, None].repeat(1, 4), torch.full((self.n**2, 4), 0.3)
        for (i, j), (move, k) in ((cell, m) for cell in graph for m in MOVES.items()):
            if (i + move[0], j + move[1]) in graph:
                self.next[i * self.n + j, k] = (i + move[0]) * self.n + j + move[1]
                good = (k in (1, 2)) == towards if towards is not None else far.get((i + move[0], j + move[1]), 0) < far.get((i, j), 0)
                weight[i * self.n + j, k] = 2.0 if good else 1.0
        self.policy = weight / weight.sum(1, keepdim=True)
        self.progress = torch.tensor([1 - far.get(cell, self.L) / self.L for cell in cells])

    def begin(self, n: int, generator: Generator, each: int = 1) -> Tensor:
        """The start cells (n,) of n paths."""
        return torch.full((n,), self.start, device=generator.device)

    def cells(self, x1: Tensor, start: Tensor | None = None) -> Tensor:
        """The cells (B, L + 1) on the paths x1 (B, L), start included."""
        visited = [torch.full_like(x1[:, 0], self.start) if start is None else start]
        for move in x1.T:
            visited.append(self.next[visited[-1], move])
        return torch.stack(visited, 1)

    def reward(self, x1: Tensor, start: Tensor | None = None) -> Tensor:
        return self.progress[self.cells(x1.cpu(), None if start is None else start.cpu())[:, -1]].to(x1.device)

    def walks(self, n: int, generator: Generator, start: Tensor | None = None) -> Tensor:
        """n paths (n, L) of the noisy walker, the training data of the base model."""
        cell, moves = self.begin(n, generator) if start is None else start, []
        for _ in range(self.L):
            moves.append(self.policy[cell].multinomial(1, generator=generator)[:, 0])
            cell = self.next[cell, moves[-1]]
        return torch.stack(moves, 1)

    def walk_law(self, x1: Tensor) -> Tensor:
        """The walker's probability (B,) of the paths x1, float64."""
        return self.policy[self.cells(x1)[:, :-1], x1].double().prod(1)

class Mazes(Maze):
    """Several mazes of one L, side by side: maze k has the cells k n^2 to (k + 1) n^2. prompt (mazes, n^2): 4 x cell + (0 free, 1 wall,
    2 start, 3 goal), what a model reads in front of a path."""
    def __init__(self, mazes: list[Maze], device: str):
        self.mazes, self.L, self.n, self.prompted = mazes, mazes[0].L, mazes[0].n, mazes[0].n ** 2
        self.next = torch.cat([maze.next + k * self.n**2 for k, maze in enumerate(mazes)])
        self.progress, self.policy = (torch.cat([getattr(maze, name) for maze in mazes]) for name in ("progress", "policy"))
        self.start = torch.tensor([maze.start + k * self.n**2 for k, maze in enumerate(mazes)], device=device)
        self.prompt = torch.stack([torch.tensor(maze.walls).flatten() for maze in mazes]) + 4 * torch.arange(self.n**2)
        for row, maze in zip(self.prompt, mazes):
            row[maze.start] += 2
            row[maze.goal] += 3
        self.prompt = self.prompt.to(device)

    def begin(self, n: int, generator: Generator, each: int = 1) -> Tensor:
        """As above, from random mazes, `each` paths a maze."""
        which = torch.randint(len(self.mazes), (n // each,), generator=generator, device=generator.device)
        return self.start.to(generator.device)[which].repeat_interleave(each)

def make_maze(cfg: Config, device: str = "cpu") -> Maze:
    """`--mazes` random ones, or the default 4 x 4 maze; other sides have pillars with streets between them (5 x 5: 8 moves, 6 optimal paths)."""
    if cfg.mazes:
        return Mazes(draw_mazes(cfg.grid, TOWARDS[cfg.walker], cfg.mazes + HELD)[:cfg.mazes], device)
    pillars = [[int(i % 2 == j % 2 == 1 and max(i, j) < cfg.grid - 1) for j in range(cfg.grid)] for i in range(cfg.grid)]
    return Maze([[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]] if cfg.grid == 4 else pillars, TOWARDS[cfg.walker])

@cache
def draw_mazes(n: int, towards: bool | None, count: int) -> list[Maze]:
    """Random n x n mazes from a corner to the opposite one, 2 to 8 optimal paths of 2 n - 2 moves, no two with the same walls; always the same."""
    draw, found, cells = random.Random(0), {}, [(i, j) for i in range(n) for j in range(n)]
    while len(found) < count:
        shut, start = draw.sample(cells, draw.randint(n // 2, 3 * n // 2)), (draw.choice((0, n - 1)), draw.choice((0, n - 1)))
        goal = (n - 1 - start[0], n - 1 - start[1])
        walls = [[int((i, j) in shut) for j in range(n)] for i in range(n)]
        if str(walls) not in found and not {start, goal} & {*shut}:
            graph = nx.grid_2d_graph(n, n).subgraph([cell for cell in cells if cell not in shut])
            if nx.single_source_shortest_path_length(graph, goal).get(start) == 2 * n - 2:
                maze = Maze(walls, towards, start, goal)
                found |= {str(walls): maze} if 2 <= len(maze.paths) <= 8 else {}
    return list(found.values())

# ---- 2. The model and its base training ----------------------------------------------------------
class MazeNet(nn.Module):
    """A bidirectional transformer over partly masked paths, after a prompt if there is one; the model protocol of dtm.py."""
    def __init__(self, L: int, cfg: Config, cells: int = 0):
        super().__init__()
        self.embed, self.L = nn.Embedding(L * (V + 1), cfg.width), L  # one vector per (position, token)
        self.read = nn.Embedding(4 * cells, cfg.width) if cells else None
        layer = nn.TransformerEncoderLayer(cfg.width, 2, 4 * cfg.width, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, cfg.layers, norm=nn.LayerNorm(cfg.width), enable_nested_tensor=False)
        self.head = nn.Linear(cfg.width, V)

    def forward(self, xt: Tensor, where: Tensor | None = None, prompt: Tensor | None = None) -> Tensor:
        x = self.embed(xt + (V + 1) * torch.arange(self.L, device=xt.device))
        x = x if prompt is None else torch.cat([self.read(prompt.expand(len(x), -1)), x], 1)
        x = self.body(x)[:, -self.L:]
        return self.head(x if where is None else x[where])

class StateBaseline(nn.Sequential):
    """The learned control variate c(xt, i), (B, L): a small net on the one-hot state, and prompt, that starts near 1."""
    def __init__(self, L: int, cells: int = 0, hidden: int = 64):
        super().__init__(nn.Linear(L * (V + 1) + 4 * cells, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, L))

    def forward(self, xt: Tensor, prompt: Tensor | None = None) -> Tensor:
        state = F.one_hot(xt, V + 1).flatten(1)
        return 1 + super().forward((state if prompt is None else torch.cat([state, F.one_hot(prompt % 4, 4).flatten(1)], 1)).float())

def ask(model: nn.Module, maze: Maze, start: Tensor):
    """The model of paths that begin at the cells start (B,): it reads their mazes, if there are several."""
    return partial(model, prompt=maze.prompt[start // maze.n**2]) if maze.prompted else model

def load(weights: dict, cfg: Config, maze: Maze, device: str) -> MazeNet:
    net = MazeNet(maze.L, cfg, maze.prompted)
    net.load_state_dict(weights)
    return net.to(device)

blank = lambda maze, n, device: torch.full((n, maze.L), MASK, device=device)
adam = lambda model: torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=next(model.parameters()).device.type != "mps")

def take_step(optimiser: torch.optim.Adam, loss: Tensor, lr: float) -> None:
    optimiser.param_groups[0]["lr"] = lr
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimiser.param_groups[0]["params"], 1.0)
    optimiser.step()

def train_base(maze: Maze, cfg: Config, seed: int, device: str, tick) -> MazeNet:
    """rho_0 by denoising cross-entropy on fresh walks, which is (D3) with w = 1 and c = 0."""
    torch.manual_seed(seed)  # initial weights are all that torch draws without a named generator
    net, walker, masker = MazeNet(maze.L, cfg, maze.prompted).to(device), Generator().manual_seed(seed), Generator(device).manual_seed(seed)
    optimiser = adam(net)
    for step in range(cfg.base_steps):
        start = maze.begin(cfg.base_batch, walker)
        x1 = maze.walks(cfg.base_batch, walker, start).to(device)
        xt, mask = dtm.mask_random(x1, MASK, masker)
        loss = dtm.row_mean(F.cross_entropy(ask(net, maze, start)(xt, mask), x1[mask], reduction="none"), mask)
        take_step(optimiser, loss, cfg.base_lr * min(1, (step + 1) / 50) * (1 - step / cfg.base_steps))
        tick(cfg.base_batch)
    return net

# ---- 3. Measuring: exactly, on the CPU in float64, where it can be -------------------------------
@torch.no_grad()
def tabulate(net: nn.Module, L: int, device: str) -> dtm.Table:
    """The net as a table over all 5^L masked states: one forward pass each, look-ups afterwards."""
    return dtm.Table(torch.cat([net(x) for x in dtm.all_sequences(V + 1, L, device).split(2**11)])).requires_grad_(False)

@torch.no_grad()
def gradient_variance(teacher: dtm.Table, rho: Tensor, w: Tensor, c) -> float:
    """grad_var of the docstring, from the gradient (c - w)(e - pi_a) of (D3) at theta = a. c: a number, a function
    xt -> (B, L), or "best", the exact c*(xt, i) of (D7)."""
    L, total = teacher.logits.shape[1], 0.0
    x, worth, w = dtm.all_sequences(V, L), (V + 1) ** torch.arange(L - 1, -1, -1), w.double()
    for mask in dtm.all_sequences(2, L)[1:].bool():
        k, xt = int(mask.sum()), torch.where(mask, V, x)
        state = (xt * worth).sum(1).unique(return_inverse=True)[1]
        e = F.one_hot(x[:, mask], V) - teacher(xt)[:, mask].double().softmax(-1)  # e - pi_a
        p, q = rho[:, None], e.square().sum(-1)
        sums = lambda t: torch.zeros(V ** (L - k), *t.shape[1:], dtype=t.dtype).index_add(0, state, t)
        best = sums(p * q * w[:, None]) / sums(p * q).clamp_min(1e-300) if c == "best" else None
        g = ((best[state] if c == "best" else c(xt)[:, mask] if callable(c) else c) - w[:, None])[..., None] * e
        squares = p[:, 0] @ g.square().sum((1, 2)) - (sums(p[..., None] * g).square().sum((1, 2)) / sums(rho).clamp_min(1e-300)).sum()
        total += squares.item() / (k * L * math.comb(L, k))
    return total / (rho * w).sum().item() ** 2

kl_of = lambda p, q: torch.xlogy(p, p / q).sum().item()

class Meter:
    """Counts the network evaluations of a method: 1 for a sequence's forward pass, 2 more if it goes backward."""
    spent = 0

    def watch(self, model: nn.Module) -> nn.Module:
        def count(model: nn.Module, args: tuple, logits: Tensor) -> None:
            self.spent += len(args[0]) * (3 if logits.requires_grad else 1)
        model.register_forward_hook(count)
        return model

class Judge:
    """Measures models against the tilts of one base: exactly up to EXACT_STATES masked states, else from samples."""
    def __init__(self, maze: Maze, base: nn.Module, device: str, seed: int, goal: float = 0.0):
        self.maze, self.base, self.device, self.exact, self.goal = maze, base, device, (V + 1) ** maze.L <= EXACT_STATES, goal
        self.generator = Generator(device).manual_seed(10**6 + seed)  # the judge's own noise
        self.base_paths = dtm.sequence_law(base, maze.paths.to(device), MASK)
        if self.exact:
            self.x = dtm.all_sequences(V, maze.L)
            self.r, self.rho_0 = maze.reward(self.x), self.law(tabulate(base, maze.L, device))
            self.best = [(self.x == path).all(1).nonzero().item() for path in maze.paths]

    def freeze(self, net: nn.Module, cfg: Config) -> nn.Module:
        """A copy of net for look-ups: as a table where its states can be listed."""
        copy = load(net.state_dict(), cfg, self.maze, self.device)
        return tabulate(copy, self.maze.L, self.device) if self.exact else copy.requires_grad_(False)

    def law(self, table: dtm.Table) -> Tensor:
        return dtm.exact_marginal(dtm.Table(table.logits.cpu()), V, self.maze.L).detach()

    def occupancy(self, x: Tensor, p: Tensor) -> list[float]:
        """The share of paths that touch each cell."""
        return (p[:, None] * F.one_hot(self.maze.cells(x), self.maze.n**2).amax(1)).sum(0).tolist()

    def waste(self, rho: Tensor) -> float:
        """min_a KL(rho || rho_a), nats: how far rho lies beyond the KL to the base that its expected reward costs at least. The
        minimum is at the tilt of that reward, and equals KL(rho || rho_0) - KL(rho_a || rho_0) there."""
        values, which = self.r.double().unique(return_inverse=True)
        p, q = (torch.zeros_like(values).index_add(0, which, t) for t in (self.rho_0, rho))
        low, high = -1e3, 1e3
        for _ in range(60):
            a = (low + high) / 2
            low, high = (a, high) if dtm.exact_tilt(p, values, a) @ values < q @ values else (low, a)
        return kl_of(rho, self.rho_0) - (a * q @ values - (p.log() + a * values).logsumexp(0)).item()

    @torch.no_grad()
    def __call__(self, net: nn.Module, a: float, table: dtm.Table | None = None) -> dict:
        """All metrics of net against rho_a. Success, modes and kl_modes are exact at any size, since r = 1 only on
        the optimal paths; the KL is sampled above EXACT_STATES, by importance sampling with exact likelihoods."""
        if self.exact:
            rho, target = self.law(table or tabulate(net, self.maze.L, self.device)), dtm.exact_tilt(self.rho_0, self.r, a)
            end = dtm.exact_tilt(self.rho_0, self.r, self.goal)
            paths, goal, kl, kl_se, ess, occupancy = rho[self.best], target[self.best].sum(), kl_of(target, rho), 0.0, 1.0, self.occupancy(self.x, rho)
            more = {"reward": (rho @ self.r.double()).item(), "kl_base": kl_of(rho, self.rho_0), "kl_end": kl_of(end, rho),
                    "kl_reverse": kl_of(rho, end), "waste": self.waste(rho)}
        else:
            x = list(dtm.sample(net, blank(self.maze, 512, self.device), MASK, generator=self.generator))[-1]
            r = self.maze.reward(x).cpu().double()
            log_w = dtm.sequence_law(self.base, x, MASK).log() + a * r - dtm.sequence_law(net, x, MASK).log()
            share, log_z = log_w.softmax(0), log_w.logsumexp(0) - math.log(len(x))
            kl = ((share * log_w).sum() - log_z).item()
            kl_se, ess = (share * (log_w - log_z - kl)).square().sum().sqrt().item(), 1 / share.square().sum().item() / len(x)
            paths, goal = dtm.sequence_law(net, self.maze.paths.to(self.device), MASK), (share * (r == 1)).sum()
            occupancy, more = self.occupancy(x.cpu(), torch.full((len(x),), 1 / len(x))), {"reward": r.mean().item()}
        q, p = paths / paths.sum(), self.base_paths / self.base_paths.sum()  # r is constant there: rho_a given r = 1 is rho_0's
        found = lambda law: (1 - (1 - law) ** DRAWS).sum().item()
        return {"a": a, "kl": kl, "kl_se": kl_se, "kl_ess": ess, "success": paths.sum().item(), "target_success": goal.item(),
                "modes": torch.special.entr(q).sum().exp().item(), "target_modes": torch.special.entr(p).sum().exp().item(),
                "kl_modes": kl_of(p, q), "paths": q.tolist(), "target_paths": p.tolist(), "occupancy": occupancy,
                "found": found(paths), "target_found": found(p * goal)} | more

class Jury(Judge):
    """The mean of judges, each of one maze that the model reads: `held` out of training ("train_": of the training mazes)."""
    def __init__(self, maze: Mazes, held: Mazes, base: nn.Module, device: str, seed: int):
        self.maze, self.base, self.device, self.exact, self.judges = maze, base, device, False, []
        for key, mazes, count in (("", held, len(held.mazes)), ("train_", maze, len(held.mazes) // 2)):
            for start, one in zip(mazes.start[:count], mazes.mazes):
                reads = partial(ask, maze=mazes, start=start[None])
                self.judges.append((key, reads, Judge(one, reads(base), device, seed)))

    def __call__(self, net: nn.Module, a: float, table: None = None) -> dict:
        seen = {}
        for key, reads, judge in self.judges:
            for name, x in judge(reads(net), a).items():
                if not isinstance(x, list):
                    seen.setdefault(key + name, []).append(x)
        return {name: sum(x) / len(x) for name, x in seen.items()} | {"each": {name: seen[name] for name in ("kl", "success", "found")}}

def make_judge(cfg: Config, net: nn.Module, device: str, seed: int) -> Judge:
    maze = make_maze(cfg, device)
    if not cfg.mazes:
        return Judge(maze, net, device, seed, cfg.a_end)
    return Jury(maze, Mazes(draw_mazes(cfg.grid, TOWARDS[cfg.walker], cfg.mazes + HELD)[cfg.mazes:], device), net, device, seed)

# ---- 4. Tilting ----------------------------------------------------------------------------------
def equal_ess(rho_0: Tensor, r: Tensor, a_end: float, phases: int) -> list[float]:
    """Steps h that reach a_end in `phases` phases of one effective sample size, by bisection on that size. Only the
    law of the reward matters, so it runs on the reward's values."""
    values, which = r.double().unique(return_inverse=True)
    p = torch.zeros_like(values).index_add(0, which, rho_0)
    low, high, steps = 1e-6, 1.0, [a_end / phases] * phases  # equal steps where no size above 1e-6 will do
    for _ in range(25):
        mid = (low + high) / 2
        rule = lambda a: dtm.next_h(values, mid, a_end - a, p=dtm.exact_tilt(p, values, a))
        trial = [h for _, (_, h) in zip(range(phases + 1), dtm.phases(a_end, rule))]
        low, high, steps = (mid, high, trial) if len(trial) <= phases else (low, mid, steps)
    return steps

def tilt(judge: Judge, arm: Arm, cfg: Config, seed: int, tick, net: MazeNet | None = None):
    """DTM from rho_0 to rho_A, the six lines of dtm.py; `net`, if given, starts as rho_0. Yields the metrics after each phase."""
    maze, device, count, meter = judge.maze, judge.device, arm.phases or cfg.phases, Meter()
    net, g = meter.watch(net or load(judge.base.state_dict(), cfg, maze, device)), Generator(device).manual_seed(seed)
    torch.manual_seed(seed)
    baseline, star = StateBaseline(maze.L, maze.prompted).to(device), 1.0
    # Adam's state lives on over the phases; the release clears it, which here costs steps at each start.
    optimiser, baseline_optimiser, steps, lr = adam(net), adam(baseline), cfg.steps // count, arm.lr or cfg.lr
    teacher, done, seconds, clock = meter.watch(judge.freeze(net, cfg)), 0, 0.0, time.time()
    x1 = r = begin = None
    schedule = arm.schedule if judge.exact or arm.schedule != "ess" else "buffer"
    planned = iter(equal_ess(judge.rho_0, judge.r, cfg.a_end, count)) if schedule == "ess" else None
    def next_step(a: float) -> float:
        """Draws the rollouts of the coming phase, then says its h, for which "buffer" looks at their rewards."""
        nonlocal x1, r, begin, clock
        clock, begin = time.time(), maze.begin(cfg.rollouts // count, g, arm.each)
        x1 = list(dtm.sample(ask(teacher, maze, begin), blank(maze, len(begin), device), MASK, order=arm.order, generator=g))[-1]
        r = maze.reward(x1, begin)
        if schedule == "buffer":  # the last phase takes what is left
            return cfg.a_end - a if done == count - 1 else max(dtm.next_h(r, BUFFER_ESS, cfg.a_end - a), 0.1 * cfg.a_end / count)
        return next(planned) if schedule == "ess" else cfg.a_end / count
    for a, h in dtm.phases(cfg.a_end, next_step):
        w = dtm.tilt_weight(r, h, bool(arm.normalize), begin if arm.normalize == "prompt" else None)
        for step in range(steps):
            i = torch.randint(len(x1), (cfg.batch,), generator=g, device=device)
            xt, mask = dtm.mask_random(x1[i], MASK, g)
            student, frozen, control = (ask(model, maze, begin[i]) for model in (net, teacher, baseline))
            logits, logits_a, target = student(xt, mask), frozen(xt, mask), x1[i][mask]
            w_i, r_i, share = (t[:, None].expand(mask.shape)[mask] for t in (w[i], r[i], 1 / mask.sum(1)))
            c = control(xt)[mask] if arm.c == "state" else star if arm.c == "star" else arm.c
            form = {"implicit": dtm.c_dtm_loss, "self": dtm.self_consistent_loss, "explicit": dtm.etm_loss}[arm.loss]
            loss = form(logits, logits_a, target, *((r_i, h) if arm.loss == "explicit" else (w_i, c)))
            take_step(optimiser, dtm.row_mean(loss, mask), lr * (1 - step / steps))
            if arm.c == "star":
                star = 0.9 * star + 0.1 * dtm.best_c(logits, logits_a, target, w_i, share).item()
            if arm.c == "state":
                y, q = dtm.state_c_target(logits_a, logits_a, target, w_i)
                take_step(baseline_optimiser, dtm.row_mean(q * (c - y).square(), mask), 2e-3)
            tick(cfg.batch)
        old, teacher, done, seconds = teacher, meter.watch(judge.freeze(net, cfg)), done + 1, seconds + time.time() - clock
        if not judge.exact and done % 8 and a + h < 0.999 * cfg.a_end:
            continue  # a sampled measurement costs as much as a phase
        record = judge(load(net.state_dict(), cfg, maze, device), a + h, teacher if judge.exact else None)  # a copy: the meter rests
        record |= {"h": h, "grad_var": None, "evaluations": meter.spent, "seconds": seconds}
        record["ess"] = (w.mean().square() / w.square().mean()).item()
        if judge.exact and arm.bound:  # this phase alone: from the teacher's law, not from rho_a
            sides = dtm.regret_bound(dtm.Table(teacher.logits.cpu()), judge.law(old), judge.r, h, V)
            record["phase_kl"], record["phase_bound"] = (t.item() for t in sides)
        if judge.exact and arm.loss == "implicit" and done % 4 == 1:  # a quarter of the phases is enough for its mean
            w = dtm.tilt_weight(judge.r, h) / (dtm.tilt_weight(r, h).mean().cpu() if arm.normalize else 1.0)
            c = {"state": lambda xt: baseline(xt.to(device)).cpu(), "star": star}.get(arm.c, arm.c)
            record["grad_var"] = gradient_variance(dtm.Table(old.logits.cpu()), judge.law(old), w, c)
        yield record

# ---- 5. The rivals: the same base, sampler, rollouts and network evaluations ---------------------
# Each maps a batch b to its loss: b.net, b.old (which drew the round's rollouts), b.base; paths b.x (B, L) with rewards b.r,
# b.adv = b.r - mean; a is the target's tilt, so 1/a weighs the KL to the base. There is no prompt and no end token, and a path
# is one block: what a method does to those falls away.
def hidden_logs(model: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """log pi(x_i | x without mask), (B, L); 0 at the visible positions."""
    return model(torch.where(mask, MASK, x)).log_softmax(-1).gather(-1, x[..., None])[..., 0] * mask

def clipped(b, mask: Tensor, scale=1.0) -> Tensor:
    """Clipped token ratios with the estimate e^d - d - 1 of the KL to the base, at the same mask; `scale` for both."""
    now, old, base = (hidden_logs(model, b.x, mask) for model in (b.net, b.old, b.base))
    ratio, adv, d = (now - old).exp(), b.adv[:, None], base - now
    gain = torch.minimum(ratio * adv, ratio.clamp(0.5, 1.5) * adv) - (d.exp() - d - 1) / b.a
    return -scale * dtm.row_mean(gain[mask], mask)

def diffu_grpo(b) -> Tensor:
    """d1 (dllm-reasoning/d1): all of the path is hidden, so it sees the model's first guesses only."""
    return clipped(b, torch.ones_like(b.x, dtype=torch.bool))

def uni_grpo(b) -> Tensor:
    """UniGRPO (MMaDA): a share of masks that grows over a round from a random start to all; normalised advantage."""
    start = (b.u * b.x.shape[1]).floor()
    share = (b.part * (b.x.shape[1] - start) + start).floor() / b.x.shape[1]
    noise = torch.rand(b.x.shape, generator=b.g, device=b.x.device)
    return clipped(b, (noise < share[:, None]) | (noise == noise.amin(1, keepdim=True)), 1 / b.r.std().clamp_min(1e-4))

def wd1(b) -> Tensor:
    """wd1 (xiaohangt/wd1): weights softmax(adv) - softmax(-adv) over the batch, state of diffu-GRPO; no target."""
    hidden = hidden_logs(b.net, b.x, torch.ones_like(b.x, dtype=torch.bool))
    return -((b.adv.softmax(0) - (-b.adv).softmax(0)) * hidden.sum(1)).sum()

def spg(b) -> Tensor:
    """SPG (facebookresearch/SPG): a lower bound for good paths, half of it an upper bound (beta = 1.5) for bad ones; two states
    a path; no target."""
    masks = torch.stack([dtm.mask_random(b.x, MASK, b.g)[1] for _ in range(2)])
    logs, tau = torch.stack([hidden_logs(b.net, b.x, mask) for mask in masks]), masks.float().mean(-1, keepdim=True)
    lower, seen = (logs.sum(-1) / masks.sum(-1)).mean(0), masks.any(0)
    upper = torch.where(seen, (masks * (1.5 * logs).exp() / tau).mean(0), 1).log().sum(1) / 1.5 / seen.sum(1)
    return -(b.adv * torch.where(b.adv > 0, lower, (upper + lower) / 2)).mean()

def elbo_reinforce(b) -> Tensor:
    """REINFORCE with the bound (D6) for the log-likelihood, in the score and, at another state, in the KL to the base."""
    masks = [dtm.mask_random(b.x, MASK, b.g)[1] for _ in range(2)]
    bound = lambda model, mask: b.x.shape[1] * hidden_logs(model, b.x, mask).sum(1) / mask.sum(1)
    with torch.no_grad():
        gain = b.r - (bound(b.net, masks[0]) - bound(b.base, masks[0])) / b.a
    return -((gain - gain.mean()) * bound(b.net, masks[1])).mean()

def exact_reinforce(b) -> Tensor:
    """REINFORCE with the exact log-likelihood; at its optimum, the tilt rho_a, the gain is the same for all paths."""
    x, which, n = b.x.unique(dim=0, return_inverse=True, return_counts=True)
    now = dtm.sequence_law(b.net, x, MASK).log()
    old, base, r = dtm.sequence_law(b.old, x, MASK).log(), dtm.sequence_law(b.base, x, MASK).log(), b.r.new_zeros(len(x)).scatter(0, which, b.r).cpu()
    gain, p = r - (now.detach() - base) / b.a, n.cpu() / n.sum() * (now.detach() - old).exp().clamp(max=2)
    return -(p * (gain - p @ gain / p.sum()) * now).sum()

def dmpo(b) -> Tensor:
    """DMPO (yuchen-zhu-zyc/DMPO): (D3) at c = 0 with weights (D10), all of a round's paths one group."""
    mask = dtm.mask_bernoulli(b.x, MASK, b.g)[1]
    return -len(b.x) * dtm.row_mean((b.weight[:, None] * hidden_logs(b.net, b.x, mask))[mask], mask)

RIVALS = {f.__name__: f for f in (diffu_grpo, uni_grpo, wd1, spg, elbo_reinforce, exact_reinforce, dmpo)}

def compete(judge: Judge, arm: Arm, cfg: Config, seed: int, tick):
    """A rival, until it has spent what c-DTM spends. The target's tilt rises over the first half of the rounds. Yields the metrics
    16 times."""
    maze, device, rounds, meter = judge.maze, judge.device, arm.phases or cfg.phases, Meter()
    net, g = meter.watch(load(judge.base.state_dict(), cfg, maze, device)), Generator(device).manual_seed(seed)
    base, optimiser, seconds = meter.watch(judge.freeze(judge.base, cfg)), adam(net), 0.0
    budget = cfg.rollouts * maze.L + cfg.steps * cfg.batch * 4  # c-DTM: a student's pass forward and back, a teacher's forward
    for k in range(rounds):
        clock, a = time.time(), cfg.a_end * min(1.0, (k + 1) / rounds / (arm.ramp or 1e-9))
        old = meter.watch(load(net.state_dict(), cfg, maze, device).requires_grad_(False))
        x = list(dtm.sample(old, blank(maze, cfg.rollouts // rounds, device), MASK, generator=g))[-1]
        r, u, start, stop = maze.reward(x), torch.rand(len(x), generator=g, device=device), meter.spent, budget * (k + 1) / rounds
        weight = dmpo_round(old, base, x, r, a, arm.c, g) if arm.loss == "dmpo" else r
        while meter.spent < stop:
            i = torch.randperm(len(x), generator=g, device=device)[:cfg.batch]
            b = SimpleNamespace(net=net, old=old, base=base, x=x[i], r=r[i], adv=r[i] - r.mean(), u=u[i], weight=weight[i], a=a, g=g,
                                part=(meter.spent - start) / (stop - start))
            take_step(optimiser, RIVALS[arm.loss](b), (arm.lr or cfg.lr) * (1 - meter.spent / budget))
        seconds += time.time() - clock
        tick(cfg.steps * cfg.batch // rounds)
        if (k + 1) % max(1, rounds // 16) == 0:
            yield judge(load(net.state_dict(), cfg, maze, device), a) | {"h": 0.0, "grad_var": None, "evaluations": meter.spent, "seconds": seconds}

def dmpo_round(old: nn.Module, base: nn.Module, x: Tensor, r: Tensor, a: float, baseline: str, g: Generator) -> Tensor:
    """DMPO's weights (n,) of a round, from bounds (D6) at two antithetic pairs of masks, the same for both models."""
    logs = [torch.zeros(len(x), device=x.device) for _ in range(2)]
    for _, first in (dtm.mask_bernoulli(x, MASK, g) for _ in range(2)):
        for mask in (first, ~first | first.all(1, keepdim=True)):  # a full mask is its own partner
            for log, model in zip(logs, (old, base)):
                log += x.shape[1] / 4 * hidden_logs(model, x, mask).sum(1) / mask.sum(1)
    return dtm.dmpo_weights(r, *logs, 1 / a, baseline=baseline)

# ---- 6. Running: bases first, then every (arm, seed), one to a core ------------------------------
def start_worker(counter) -> None:
    start_worker.counter = counter  # the training rows done, behind the progress bar
    torch.set_num_threads(1)  # two workers of one thread beat one worker of two

def count_up(rows: int) -> None:
    with start_worker.counter.get_lock():
        start_worker.counter.value += rows

def base_task(cfg: Config, seed: int, device: str, tick=count_up) -> dict:
    maze = make_maze(cfg, device)
    judge = make_judge(cfg, net := train_base(maze, cfg, seed, device, tick), device, seed)
    info = {"seed": seed, "exact": judge.exact, "weights": {k: t.cpu() for k, t in net.state_dict().items()}} | judge(net, 0.0)
    if judge.exact:
        walk, target = maze.walk_law(judge.x), dtm.exact_tilt(judge.rho_0, judge.r, cfg.a_end)
        tilts = [dtm.exact_tilt(judge.rho_0, judge.r, cfg.a_end * (i / 20) ** 2) for i in range(41)]  # to 4 A
        info |= {"kl_walker": kl_of(walk, judge.rho_0), "target_occupancy": judge.occupancy(judge.x, target),
                 "need": (target.square() / judge.rho_0).sum().item() / 2 / cfg.rollouts,
                 "frontier": [(kl_of(p, judge.rho_0), (p @ judge.r.double()).item()) for p in tilts]}
    return info

def arm_task(cfg: Config, seed: int, device: str, weights: dict, arm: Arm, tick=count_up) -> dict:
    judge = make_judge(cfg, load(weights, cfg, make_maze(cfg, device), device), device, seed)
    trace = list((compete if arm.loss in RIVALS else tilt)(judge, arm, cfg, seed, tick))
    known = [p["grad_var"] for p in trace if p["grad_var"] is not None]
    end = trace[-1] | {"grad_var": sum(known) / len(known) if known else None}
    flat = [{k: v for k, v in p.items() if not isinstance(v, (list, dict))} for p in trace]
    return {"arm": arm.name, "seed": seed} | end | {"trace": flat}

def run(tasks: list, jobs: int, bar: tqdm):
    """Yields the results of task() as they end: in this process, or in `jobs` processes of one thread each."""
    if jobs == 1:
        yield from (task(tick=bar.update) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    counter, seen = context.Value("q", 0), bar.n
    with ProcessPoolExecutor(min(jobs, len(tasks)), context, start_worker, (counter,)) as pool:
        waiting = {pool.submit(task) for task in tasks}
        while waiting:
            ended, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            bar.update(seen + counter.value - bar.n)
            yield from (future.result() for future in ended)

def experiment(cfg: Config, ablate: str | None, arms: list[Arm], seeds: list[int], device: str, jobs: int) -> dict:
    """Every arm on every seed's own base; prints a line as soon as it is known and returns all there is to draw."""
    start, bases, rows, maze = time.time(), [], [], make_maze(cfg)
    work = len(seeds) * (cfg.base_steps * cfg.base_batch + len(arms) * cfg.steps * cfg.batch)
    with tqdm(total=work, unit="row", unit_scale=True, smoothing=0.05) as bar:
        for b in run([partial(base_task, cfg, s, device) for s in seeds], jobs, bar):
            bases.append(b)
            bar.write(f"seed {b['seed']}: base success {b['success']:.5f}" + (
                f"; sum rho_A^2 / rho_0 over twice the rollouts: {b['need']:.3f}, {'annealing is needed' if b['need'] > 0.01 else 'one jump may do'} "
                "(line: .01)" if b["exact"] else ""))
        for row in run([partial(arm_task, cfg, b["seed"], device, b["weights"], arm) for arm in arms[::-1] for b in bases], jobs, bar):
            rows.append(row)
            error = "" if row["kl_se"] == 0 else f" +- {row['kl_se']:.3f} (trust it if its sample is large: ESS {row['kl_ess']:.0%})"
            bar.write(f"seed {row['seed']} {row['arm']:>16}: KL {row['kl']:.3f}{error}, success {row['success']:.3f} of "
                      f"{row['target_success']:.3f}, effective optimal paths {row['modes']:.2f} of {row['target_modes']:.2f}, {row['seconds']:.0f} s")
    names, cpuinfo = [arm.name for arm in arms], Path("/proc/cpuinfo")
    cpu = [line.split(": ")[1] for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else []) if "model name" in line]
    bases.sort(key=lambda b: b["seed"])
    judge = Judge(maze, load(bases[0]["weights"], cfg, maze, "cpu"), "cpu", 0) if bases[0]["exact"] else None
    return {
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), "ablate": ablate, "exact": bases[0]["exact"],
        "seeds": seeds, "seconds": time.time() - start, "config": asdict(cfg), "arms": [asdict(arm) for arm in arms],
        "machine": {"cpu": (cpu or [platform.machine()])[0], "cores": os.cpu_count(), "processes": jobs, "device": device},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "networkx": nx.__version__},
        "walls": getattr(maze, "walls", None), "extra": exact_teachers(judge, cfg, ablate) if judge else [],
        "bases": [{k: v for k, v in b.items() if k != "weights"} for b in bases],
        "rows": sorted(rows, key=lambda row: (names.index(row["arm"]), row["seed"])),
    }

def exact_teachers(judge: Judge, cfg: Config, ablate: str) -> list[dict]:
    """At three tilts of one base, with the exact posteriors of rho_a as the teacher. "cv": grad_var of each arm against
    h, with the exact best c for a learned one. "sampler": KL(rho_a || law of each decoding order, a token a step)."""
    out, orders = [], (("random", None), ("state", dtm.state_choice), ("confidence", dtm.confidence_choice))
    for a in (0.0, 0.4 * cfg.a_end, 0.8 * cfg.a_end):
        rho = dtm.exact_tilt(judge.rho_0, judge.r, a)
        pi = dtm.exact_posterior(rho, dtm.all_sequences(V + 1, judge.maze.L)).nan_to_num(1 / V)
        teacher = dtm.Table(pi.clamp_min(1e-30).log()).requires_grad_(False)
        for order, choose in orders if ablate == "sampler" else ():
            law = dtm.exact_marginal(teacher, V, judge.maze.L, choose=choose)
            out.append({"a": a, "name": order, "y": kl_of(rho, law), "success": law[judge.best].sum().item(),
                        "sequences": torch.special.entr(law).sum().exp().item()})
        for h in (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0) if ablate == "cv" else ():
            w = dtm.tilt_weight(judge.r.double(), h)
            zero, half, one, best = (gradient_variance(teacher, rho, w, c) for c in (0.0, 0.5, 1.0, "best"))
            slope, bend = 4 * half - 3 * zero - one, 2 * zero - 4 * half + 2 * one  # a parabola in c, from three points
            mean = (rho * w).sum().item()  # c = 1 on normalised weights is c = E w on raw ones
            variances = (zero, half, one, zero + slope * mean + bend * mean**2, zero - slope**2 / (4 * bend), best)
            out += [{"a": a, "x": h, "name": arm.name, "y": y} for arm, y in zip(ARMS["cv"], variances)]
    return out

# ---- 7. Reporting: tables and figures read the result (or its JSON) alone ------------------------
COLUMNS = {"kl": "KL, nats", "success": "success", "target_success": "its target", "modes": "eff. paths", "target_modes": "their target",
           "kl_modes": "KL of paths", "grad_var": "grad. variance"}
COLOURS = ("#000000", "#D55E00", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#999999", "#882255", "#BBAA00")  # colour-blind safe

def values(result: dict, arm: str, key: str) -> tuple[list, float, float]:
    """An arm's values over the seeds, their mean and its standard error (NaN for one seed or no values)."""
    x = [row[key] for row in rows_of(result, arm)]
    t = torch.tensor([math.nan if v is None else v for v in x], dtype=torch.float64)
    return x, t.mean().item(), t.std().item() / math.sqrt(len(t)) if len(t) > 1 else math.nan

def table(result: dict) -> str:
    sampled, held = result["config"]["grid"] > 4, f", mean of {HELD} held-out mazes" * (result["ablate"] == "mazes")
    how = ("KL and target success from 512 samples a seed, the rest exact" if sampled else "all exact") + held
    lines = [f"Mean +- standard error over {len(result['seeds'])} seeds; {how}.", " " * 16 + "".join(f"{t:>17}" for t in COLUMNS.values())]
    show = lambda m, se: "-" if m != m else f"{m:.0f}" if m > 99 else f"{m:.3f}" + (f" +- {se:.3f}" if se == se else "")
    for arm in (arm["name"] for arm in result["arms"]):
        lines.append(f"{arm:>16}" + "".join(f"{show(*values(result, arm, key)[1:]):>17}" for key in COLUMNS))
    return "\n".join(lines)

def write(path: Path, save) -> None:
    """save(a temporary path), then rename: nobody reads half a file."""
    half = path.with_name(f".half-{path.name}")
    save(half)
    half.replace(path)

def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 130, "legend.frameon": False})
    return plt

def draw(result: dict, stem: Path) -> list[Path]:
    """All figures of a result; returns their paths."""
    plt, out = pyplot(), []
    panels = partial(plt.subplots, layout="constrained")
    kinds = {None: (draw_arms, draw_occupancy, draw_paths), "method": (draw_methods,), "mazes": (draw_held,), "anneal": (draw_arms, draw_bound)}
    for kind in (*kinds.get(result["ablate"], (draw_arms,)), *[draw_exact] * bool(result["extra"])):
        suffix, figure = kind(result, panels)
        out.append(stem.with_name(stem.name + suffix + ".png"))
        write(out[-1], lambda path: figure.savefig(path, format="png"))
        plt.close(figure)
    return out

looks = lambda result: {arm["name"]: look for arm, look in zip(result["arms"], zip(COLOURS, "os^vDP*X<>"))}  # name -> colour, marker
rows_of = lambda result, arm: [row for row in result["rows"] if row["arm"] == arm]

def bars(axis, result: dict, key: str, shift: float = 0.0, width: float = 0.6, **look) -> None:
    """Means with standard errors, and each seed."""
    for i, (arm, (colour, _)) in enumerate(looks(result).items()):
        each, mean, se = values(result, arm, key)
        axis.bar(i + shift, mean, width, yerr=se if se == se else 0, capsize=3, color=colour, alpha=0.4, **look if i == 0 else look | {"label": None})
        axis.plot([i + shift] * len(each), each, "o", ms=4, color=colour)
        axis.text(i + shift + 0.08, mean, f"{mean:.2g}", va="bottom")
    axis.set_xticks(range(len(result["arms"])), looks(result), rotation=20)

def draw_arms(result: dict, panels):
    """The final KL, and success and KL along the tilt."""
    figure, axes = panels(1, 3, figsize=(12, 3.6))
    bars(axes[0], result, "kl")
    for arm, (colour, _) in looks(result).items():
        for k, (row, base) in enumerate(zip(rows_of(result, arm), result["bases"])):
            trace = [base, *row["trace"]]
            for axis, key in zip(axes[1:], ("success", "kl")):
                axis.plot([p["a"] for p in trace], [p[key] for p in trace], "o-"[len(trace) > 2 :], ms=4, lw=1, color=colour, label=arm if k == 0 else None)
    goal = target_trace(result)
    axes[1].plot([p["a"] for p in goal], [p["target_success"] for p in goal], "k--", label="target rho_a")
    axes[0].set(ylabel="KL(rho_A || rho_theta), nats", title=f"final KL: mean, s.e., each of {len(result['bases'])} seeds")
    axes[1].set(xlabel="tilt a", ylabel="rho_theta(r = 1)", ylim=(0, 1), title="success along the tilt, each seed")
    axes[2].set(xlabel="tilt a", ylabel="KL(rho_a || rho_theta), nats", ylim=(0, None), title="distance to the tilt along the way")
    axes[1].legend()
    return "_anneal" if result["ablate"] is None else "", figure

def target_trace(result: dict) -> list[dict]:
    """The first base and the longest trace on it: where the target's success is known."""
    first = result["bases"][0]
    return [first, *max((row["trace"] for row in result["rows"] if row["seed"] == first["seed"]), key=len)]

def draw_occupancy(result: dict, panels):
    base = result["bases"][0]
    target = {"occupancy": base.get("target_occupancy"), "success": target_trace(result)[-1]["target_success"]}
    heats = {"base": base} | ({"exact target": target} if result["exact"] else {}) | {arm: rows_of(result, arm)[0] for arm in looks(result)}
    figure, axes = panels(1, len(heats), figsize=(13, 2.6))
    for axis, (name, data) in zip(axes, heats.items()):
        image = show_maze(axis, torch.tensor(result["walls"]), data["occupancy"])
        axis.set_title(f"{name}\nsuccess {data['success']:.2g}")
    figure.colorbar(image, ax=axes, label="share of paths through")
    return "_maze", figure

def show_maze(axis, walls: Tensor, occupancy: list[float]):
    heat = torch.tensor(occupancy).view_as(walls).where(walls == 0, math.nan)
    axis.set(facecolor="#b04030", xticks=[], yticks=[])
    for letter, cell in (("S", 0), ("G", len(walls) - 1)):
        axis.text(cell, cell, letter, ha="center", va="center", weight="bold", bbox={"fc": "white", "ec": "none", "pad": 1.5})
    return axis.imshow(heat.numpy(), vmin=0, vmax=1, cmap="cividis")

def draw_paths(result: dict, panels):
    figure, axes = panels(1, len(result["arms"]), figsize=(13, 2.8), sharey=True)
    for axis, (arm, (colour, _)) in zip(axes, looks(result).items()):
        shares, goals = (torch.tensor([row[key] for row in rows_of(result, arm)]).numpy() for key in ("paths", "target_paths"))
        axis.bar(range(shares.shape[1]), shares.mean(0), color=colour, alpha=0.4)
        axis.plot(shares.T, "o", ms=3, color=colour)
        axis.plot(goals.mean(0), "k_", ms=18, mew=2, label="target")
        axis.set(title=f"{arm}\n{values(result, arm, 'modes')[1]:.2f} effective of {values(result, arm, 'target_modes')[1]:.2f}",
                 xlabel="optimal path", xticks=range(shares.shape[1]), ylim=(0, 0.8))
    axes[0].set_ylabel("probability given success")
    axes[0].legend()
    return "_paths", figure

def draw_exact(result: dict, panels):
    tilts = sorted({p["a"] for p in result["extra"]})
    figure, axes = panels(1, len(tilts), figsize=(12, 3.2), sharey=True)
    for axis, (a, (arm, (colour, _))) in ((axis, (a, look)) for axis, a in zip(axes, tilts) for look in looks(result).items()):
        points = [p for p in result["extra"] if p["a"] == a and p["name"] == arm]
        axis.set(title=f"exact teacher at a = {a:g}", xlabel="tilt increment h" if len(points) > 1 else "decoding order")
        if len(points) > 1:
            axis.loglog([p["x"] for p in points], [p["y"] for p in points], "o-", ms=3, color=colour, label=arm)
            axis.legend(fontsize=7)
        else:
            axis.bar_label(axis.bar(arm, points[0]["y"], color=colour, alpha=0.6), fmt="%.2f")
    axes[0].set_ylabel("gradient variance over (E w)^2" if len(points) > 1 else "KL(rho_a || law of the order), nats")
    return "_exact", figure

def draw_methods(result: dict, panels):
    """Distances at the end; the reward-KL plane with its frontier; KL against evaluations and seconds."""
    figure, ((dots, plane), (cost, clock)) = panels(2, 2, figsize=(12, 9.5))
    for k, base in enumerate(result["bases"]):
        plane.plot(*zip(*base["frontier"]), "k-", lw=0.8, label="tilts of the base: nobody is above" if k == 0 else None)
    for i, (arm, (colour, marker)) in enumerate(looks(result).items()):
        rows = rows_of(result, arm)
        for key, y, face in (("kl", i - 0.15, colour), ("waste", i + 0.15, "white")):
            each, mean, _ = values(result, arm, key)
            dots.plot(each, [y] * len(each), marker, ms=4, color=colour, mfc=face, alpha=0.6)
            dots.plot([mean] * 2, [y - 0.15, y + 0.15], color=colour, lw=2.5)
        plane.plot([row["kl_base"] for row in rows], [row["reward"] for row in rows], marker, ms=5, color=colour, label=arm)
        plane.plot([p["kl_base"] for p in rows[0]["trace"]], [p["reward"] for p in rows[0]["trace"]], "-", lw=0.6, color=colour)
        for axis, key, unit in ((cost, "evaluations", 1e6), (clock, "seconds", 1)):
            x, y = (torch.tensor([[p[name] for p in row["trace"]] for row in rows]).double().mean(0) for name in (key, "kl_end"))
            axis.semilogy((x / unit).tolist(), y.tolist(), marker + "-", ms=4, lw=1, color=colour, label=arm)
    dots.set_yticks(range(len(result["arms"])), looks(result))
    dots.set(xscale="log", xlabel="nats", title=f"full: KL(rho_A || rho_theta); hollow: distance to the frontier;\nline: mean of {len(result['bases'])} seeds")
    dots.invert_yaxis()
    dots.grid(axis="x", alpha=0.3)
    plane.set(xlabel="KL(rho_theta || rho_0), nats", ylabel="expected reward", ylim=(0, 1.02), xlim=(0, 11), title="reward against KL to the base; thin: first seed's way")
    plane.legend(fontsize=7, loc="lower right")
    for axis, label in ((cost, "network evaluations, millions (backward = 2)"), (clock, "seconds of one process")):
        axis.set(xlabel=label, ylabel="KL(rho_A || rho_theta), nats", xlim=(0, None), title="mean over seeds")
    return "", figure

def draw_bound(result: dict, panels):
    """(D12) along a run, and what the number of phases does."""
    figure, (way, ratio, final, size) = panels(1, 4, figsize=(15, 3.6))
    mean = lambda rows, key: torch.tensor([[p[key] for p in row["trace"]] for row in rows]).double().mean(0).tolist()
    for arm, (colour, marker) in looks(result).items():
        rows = rows_of(result, arm)
        count = sum(len(row["trace"]) for row in rows) / len(rows)
        own = [sum(p["phase_kl"] for p in row["trace"]) for row in rows]
        share = [sum(p["ess"] for p in row["trace"]) / len(row["trace"]) for row in rows]
        final.errorbar(count, *values(result, arm, "kl")[1:], fmt=marker, color=colour, capsize=3, label=f"{arm}")
        final.plot(count, sum(own) / len(own), marker, mfc="white", color=colour)
        size.plot(count, sum(share) / len(share), marker, color=colour)
        if arm in ("K = 8", "K = 16", "K = 32"):
            tilts, (own, bound) = mean(rows, "a"), (mean(rows, key) for key in ("phase_kl", "phase_bound"))
            ratio.plot(tilts, [b / k for k, b in zip(own, bound)], marker + "-", ms=4, color=colour, label=arm)
            if arm == "K = 16":
                for key, y, style in (("regret / Z of the phase, (D12)", bound, "--"), ("KL of the phase", own, ":"), ("KL to rho_a", mean(rows, "kl"), "-")):
                    way.plot(tilts, y, style, color=colour, label=key)
    way.set(title="K = 16", xlabel="tilt a", ylabel="nats", ylim=(0, 1.4 * way.get_ylim()[1]))
    ratio.set(title="bound over KL, by phase", xlabel="tilt a", ylim=(0, None))
    final.set(title="full: final KL; hollow: sum over the phases", xlabel="phases", ylabel="nats", yscale="log")
    size.set(title="effective sample size of a phase", xlabel="phases", ylabel="share of the rollouts", ylim=(0, 1.02))
    for axis in (final, size):
        axis.set_xscale("log", base=2)
    for axis in (way, ratio, final):
        axis.legend(fontsize=7)
    return "_bound", figure

def draw_held(result: dict, panels):
    """Training and held-out mazes, side by side."""
    figure, axes = panels(1, 3, figsize=(13, 3.8))
    titles = {"kl": "KL(rho_A || rho_theta), nats", "success": "success = share of shortest paths", "found": f"optimal paths among {DRAWS} draws"}
    for axis, (key, title) in zip(axes, titles.items()):
        bars(axis, result, f"train_{key}", -0.2, 0.36, hatch="//", label="training mazes")
        bars(axis, result, key, 0.2, 0.36, label="held-out mazes")
        if key != "kl":  # the arms' base is the same
            axis.axhline(values(result, result["arms"][0]["name"], f"target_{key}")[1], color="k", ls="--", label="exact tilt of the base, held-out")
        axis.set(title=title, ylim=(0, None))
    axes[1].legend(fontsize=7, loc="center right")
    return "", figure

def animate(cfg: Config, seed: int, device: str, path: Path) -> None:
    """--gif: mazes filling in, in random order: each canvas and where its finished path may yet lead, by the exact law."""
    plt = pyplot()
    from matplotlib.animation import FuncAnimation, PillowWriter
    maze, g, laws, canvases = make_maze(cfg), Generator(device).manual_seed(seed), {}, {}
    with tqdm(total=cfg.base_steps * cfg.base_batch + 2 * cfg.steps * cfg.batch, unit="row", unit_scale=True) as bar:
        base = train_base(maze, cfg, seed, device, bar.update)
        judge = Judge(maze, base, device, seed)
        for name, arm in (("base", None), ("one jump", ARMS[None][0]), ("annealed", ARMS[None][-1])):
            net = load(base.state_dict(), cfg, maze, device)
            list(tilt(judge, arm, cfg, seed, bar.update, net)) if arm else None
            laws[name] = judge.law(tabulate(net, maze.L, device))
            canvases[name] = list(dtm.sample(net, blank(maze, 6, device), MASK, generator=g))
    figure, axes = plt.subplots(1, 3, figsize=(6.6, 2.9), layout="constrained")
    def frame(k: int) -> None:
        episode, step = divmod(k, maze.L + 3)
        for axis, name in zip(axes, laws):
            axis.clear()
            xt = canvases[name][min(step, maze.L)][episode].cpu()
            p = laws[name] * ((judge.x == xt) | (xt == MASK)).all(1)
            show_maze(axis, torch.tensor(maze.walls), judge.occupancy(judge.x, p / p.sum()))
            axis.set_title(f"{name}, success {laws[name][judge.best].sum():.2g}")
            axis.set_xlabel(" ".join("↑→↓←?"[v] for v in xt), fontsize=14)
    write(path, lambda half: FuncAnimation(figure, frame, 6 * (maze.L + 3)).save(half, PillowWriter(fps=3)))

# ---- 8. The command line -------------------------------------------------------------------------
def main() -> None:
    parser = argparse.ArgumentParser(description="DTM on a maze, every number exact; the top of the file explains the metrics.")
    questions = [name for name in ARMS if name not in (None, "mazes")]
    parser.add_argument("--ablate", choices=questions, help="the arms of one question (default: the five main arms)")
    parser.add_argument("--seeds", type=int, help="seeds, each with its own base model (default: one per process, 1 with --quick)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of the seeds (default 0)")
    parser.add_argument("--quick", action="store_true", help=f"under 45 s on 2 cores: {QUICK}")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default auto")
    parser.add_argument("--jobs", type=int, help="processes (default: the cores, at most 8; 1 on cuda and mps)")
    parser.add_argument("--gif", action="store_true", help="draw OUT/maze.gif: base, one jump and annealed model of the first seed, filling in")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder for figures and JSON (default figures)")
    parser.add_argument("--plot-only", action="store_true", help="redraw the figures of every JSON in --out")
    for f in fields(Config):
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=f.type, help=f"{f.metadata['help']} (default {f.default})",
                            choices=TOWARDS if f.name == "walker" else None)
    args = parser.parse_args()
    if args.plot_only:
        found = [(file, result) for file in sorted(args.out.glob("*.json")) if "arms" in (result := json.loads(file.read_text()))]
        print(*(path for file, result in found for path in draw(result, file.with_suffix(""))), sep="\n")
        return None if found else parser.error(f"no JSON in {args.out}: run the lab first, or point --out at its folder")
    args.ablate = "mazes" if args.mazes and not args.ablate else args.ablate
    given = {f.name: getattr(args, f.name) for f in fields(Config) if getattr(args, f.name) is not None}
    preset = "large" if args.mazes and (args.grid or 0) > 4 else args.ablate
    cfg = Config(**PRESETS.get(preset, {}) | (QUICK if args.quick else {}) | given)
    auto = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = auto if args.device == "auto" else args.device
    jobs = args.jobs if args.jobs is not None else min(8, os.cpu_count() or 1) if device == "cpu" else 1
    seeds = args.seeds if args.seeds is not None else 1 if args.quick else jobs
    numbers, arms = {"seeds": seeds, "jobs": jobs, **asdict(cfg)}, [replace(arm, lr=args.lr or arm.lr) for arm in ARMS[args.ablate]]
    most, rounds = (max((arm.phases or cfg.phases for arm in arms if (arm.loss in RIVALS) == rival), default=1) for rival in (False, True))
    wrong = [f"--{name.replace('_', '-')} must be positive and finite, not {x}" for name, x in numbers.items()
             if name != "walker" and not (0 < x < math.inf or name == "mazes" and x == 0)]
    wrong += ["--mazes N goes with its own arms, without --ablate"] * (bool(cfg.mazes) != (args.ablate == "mazes"))
    wrong += [f"{rounds} rounds need at least {2 * rounds} --rollouts"] * (cfg.rollouts < 2 * rounds)
    wrong += [f"{most} phases need at least {most} --steps and --rollouts"] * (min(cfg.steps, cfg.rollouts) < most)
    wrong += [f"--width {cfg.width} must be even, for two attention heads"] * (cfg.width % 2)
    wrong += [f"--grid {cfg.grid} must be at least 4, where mazes have several optimal paths"] * (cfg.grid < 4)
    try:
        parser.error(wrong[0]) if wrong else None
        torch.zeros(1, device=device)
        args.out.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, AssertionError, OSError) as error:
        parser.error(f"--device {device} or --out {args.out} cannot be used: {str(error).splitlines()[0]}")
    print(f"device {device}, float32, laws in float64; {jobs} processes, {seeds} seeds, {cfg.phases} phases to A = {cfg.a_end:g}")
    if args.gif:
        return animate(cfg, args.first_seed, device, args.out / "maze.gif")
    result = experiment(cfg, args.ablate, arms, list(range(args.first_seed, args.first_seed + seeds)), device, jobs)
    print(f"\n{table(result)}\n{seeds} seeds in {result['seconds']:.0f} s")
    parts = (args.quick and "quick", f"ablate_{args.ablate}" if args.ablate else "main", cfg.grid != 4 and f"grid{cfg.grid}")
    stem = args.out / "_".join(part for part in (*parts, cfg.walker != "away" and cfg.walker) if part)
    write(stem.with_suffix(".json"), lambda path: path.write_text(json.dumps(result)))
    print("wrote", *[stem.with_suffix(".json"), *draw(result, stem)])


if __name__ == "__main__":
    main()
