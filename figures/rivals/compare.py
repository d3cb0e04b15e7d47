"""Run every method at the same number of network evaluations, and draw the comparison.

The docstring of the package explains the metrics.

CONTENTS   1 methods   2 accounts   3 a run   4 tuning   5 table and figure   6 command line
"""

import copy
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

import dtm
import figures.rivals
import maze_lab as lab
from figures import command
from figures.command import COLOURS, mean
from figures.rivals import objectives as rivals
from figures.rivals.frontier import FrontierEvaluation, frontier_at, tilt_of_mean
from figures.rivals.objectives import Batch
from maze_lab import MASK

PASSED = 0.9  # the reward at which methods without a target are compared


# ---- 1. Methods ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Method:
    """A row of the table.

    Methods with a target anneal. c-DTM anneals in phases of equal h. For the others the target's
    tilt rises evenly to A over the first `rise` of the rounds, where their authors keep it fixed.
    "One state" in a name says that the method sees only the fully masked state.
    """

    name: str
    lr: float  # chosen by --tune
    objective: Callable[[Batch], Tensor] | None = None  # of a rival, from objectives.py
    arm: lab.Arm | None = None  # of c-DTM
    closed_loop: bool = False  # whether `ClosedLoop` chooses h, for c-DTM
    rounds: int = 128  # chosen by --tune; each round draws its share of the rollouts
    rise: float = 0.5
    decay: float = 1.0  # below 1, early rounds draw more rollouts than late ones: `round_sizes`
    replay: int = 0  # how many earlier rounds' rollouts are used again
    off_policy: bool = False  # whether its loss is right for the rollouts of earlier models, too
    restart: bool = False  # whether the learning rate falls to 0 in each round, as c-DTM's does
    target: bool = True  # whether the method aims at the tilt A
    exact: bool = False  # whether it uses exact likelihoods, which a large model does not have
    measure: Callable[[Batch], tuple] | None = None  # computes log_old and log_base for a round
    prepare: Callable[[Batch], Tensor] | None = None  # computes Batch.weight for a round
    extra: type | None = None  # the network that Batch.extra calls, with an attribute `lr`
    mix: float = 0.0  # the share of the base's logits in those that draw (wd1 with a reference)
    block: int | None = None  # of decoding; 1 decodes from left to right


METHODS = [
    Method("c-DTM, learned c", 7e-3, arm=lab.LEARNED),
    Method("c-DTM, replay", 7e-3, arm=lab.REPLAY),
    Method("c-DTM, closed loop", 7e-3, arm=lab.LEARNED, closed_loop=True),
    Method("c-DTM, c = 1", 7e-3, arm=lab.C_1),
    Method(
        "DMPO, u",
        1e-3,
        rivals.dmpo,
        rounds=2048,
        measure=rivals.bounds_of_round,
        prepare=rivals.dmpo_u,
        off_policy=True,
    ),
    Method(
        "DMPO, u - v (authors' code)",
        4e-4,
        rivals.dmpo,
        rounds=512,
        measure=rivals.bounds_of_round,
        prepare=rivals.dmpo_u_minus_v,
        off_policy=True,
    ),
    Method("TraFL", 2.5e-4, rivals.trafl, decay=0.7, off_policy=True),
    Method("ESPO", 5e-4, rivals.espo, decay=0.7),
    Method(
        "GDSD, ideal",
        8e-3,
        rivals.gdsd_ideal,
        rounds=16,
        rise=1.0,
        decay=0.7,
        restart=True,
        extra=rivals.StateConstants,
    ),
    Method("GDSD, authors' code", 5e-4, rivals.gdsd, target=False),
    Method("UniGRPO, k3", 1e-4, rivals.uni_grpo, target=False),
    Method("UniGRPO, k3 at 1/a", 2e-4, rivals.uni_grpo_k3_at_tilt),
    Method("UniGRPO, k2", 2e-4, rivals.uni_grpo_k2, rounds=64),
    Method("diffu-GRPO, k3 (one state)", 2e-3, rivals.diffu_grpo, target=False),
    Method("diffu-GRPO, k2 (one state)", 1e-3, rivals.diffu_grpo_k2),
    Method("wd1, b = 0 (one state)", 8e-4, rivals.wd1, target=False),
    Method("wd1, b = .04 (one state)", 4e-4, rivals.wd1, target=False, mix=0.04),
    Method("SPG", 2e-4, rivals.spg, target=False),
    Method("JustGRPO", 4e-4, rivals.just_grpo, rounds=64, target=False, block=1),
    Method("ELBO-REINFORCE", 2e-4, rivals.elbo_reinforce, decay=0.7),
    Method("TraFL, exact", 1e-3, rivals.trafl_exact, rounds=256, exact=True, off_policy=True),
    Method(
        "TraFL, exact, replay",
        4e-3,
        rivals.trafl_exact,
        rounds=256,
        replay=32,
        exact=True,
        off_policy=True,
    ),
    Method("exact REINFORCE", 2e-3, rivals.exact_reinforce, rounds=256, exact=True),
]


class ClosedLoop:
    """A schedule of h that makes up for what the student has missed so far (ours).

    It divides what is left from the tilt reached to A into equal steps. The mean reward of a
    phase's rollouts, which are drawn anyway, says which part of the step before was reached. Where
    this estimate is less accurate than a tenth of h, the step counts as reached.
    """

    def __init__(self, a_end: float, phases: int):
        self.a_end = a_end
        self.left = phases
        self.reached = 0.0
        self.before = None

    def __call__(self, a: float, r: Tensor) -> float:
        r = r.cpu().double()
        if self.before is not None:
            self.reached += step_reached(self.before, r, self.h)
        self.h = (self.a_end - self.reached) / self.left
        self.left -= 1
        self.before = r
        return self.h


def step_reached(before: Tensor, now: Tensor, h: float) -> float:
    """Return the s at which weights e^{s r} give the rewards `before` the mean of those `now`."""
    error = (now.var() * (1 / len(now) + 1 / len(before))).sqrt()  # of the two means
    if error > 0.1 * h * now.var():  # one unit of tilt moves the mean by the variance
        return h
    return tilt_of_mean(before, torch.full_like(before, 1 / len(before)), now.mean(), 0.0, 2 * h)


# ---- 2. Accounts --------------------------------------------------------------------------------
class Meter:
    """Counts network evaluations, in passes of the student over one sequence."""

    def __init__(self):
        self.spent = 0.0

    def watch(self, model: nn.Module, cost: float = 1.0) -> Callable:
        """Return the model, with its passes counted at this cost each."""

        def metered(xt: Tensor, *where: Tensor) -> Tensor:
            output = model(xt, *where)
            self.spent += len(xt) * cost * (3 if output.requires_grad else 1)
            return output

        return metered


def multiplications(net: nn.Module) -> int:
    """Return those of one vector through the matrices of a network; embeddings are look-ups."""
    if isinstance(net, lab.MazeNet):
        return multiplications(net.body) + multiplications(net.head)
    return sum(p.numel() for p in net.parameters() if p.dim() == 2)


def relative_cost(small: nn.Module, student: lab.MazeNet, L: int) -> float:
    """Return the cost of a small network's pass over a state, in student passes."""
    return multiplications(small) / (L * multiplications(student))


def budget(cfg: lab.Config, L: int) -> int:
    """Return what c-DTM spends.

    A rollout takes L passes. In a step the student's pass counts 3, and the teacher's 1.
    """
    return cfg.rollouts * L + cfg.steps * cfg.batch * 4


def affordable_steps(cfg: lab.Config, arm: lab.Arm, student: lab.MazeNet, L: int) -> int:
    """Return the steps of a c-DTM arm within the budget: a learned c pays for its own passes."""
    control = lab.make_control(arm, L, torch.device("cpu"))
    if not isinstance(control, lab.LearnedC):
        return cfg.steps
    return int(cfg.steps * 4 / (4 + 3 * relative_cost(control.net, student, L)))


# ---- 3. A run -----------------------------------------------------------------------------------
@dataclass
class Look:
    """What `compete` yields 16 times along a run, for code that measures from outside."""

    a: float  # the target's tilt
    student: lab.MazeNet
    evaluations: float
    seconds: float


def compete(
    method: Method, cfg: lab.Config, maze: lab.Maze, base: lab.MazeNet, seed: int
) -> Iterator[Look]:
    """Train a rival until it has spent what c-DTM spends; the last look is at the end."""
    device = next(base.parameters()).device
    noise = Generator(device).manual_seed(seed)
    torch.manual_seed(seed)  # for the initial weights of an extra network
    meter = Meter()
    student = copy.deepcopy(base)
    net, reference = meter.watch(student), meter.watch(lab.tabulate(base, maze.L))
    optimizer = lab.adam(student)
    extra = None
    if method.extra:
        module = method.extra(maze.L).to(device)
        optimizer.add_param_group({"params": module.parameters(), "lr": module.lr})
        extra = meter.watch(module, relative_cost(module, student, maze.L))
    total = budget(cfg, maze.L)
    clock = time.perf_counter()
    seconds = a = 0.0
    drawn = []  # the rounds whose rollouts are in use
    for k, n in enumerate(round_sizes(method, cfg)):
        h = target_tilt(method, cfg, k) - a
        a += h
        old = meter.watch(copy.deepcopy(student).requires_grad_(False))
        networks = {"net": net, "old": old, "base": reference}
        drawn.append(draw_round(method, maze, n, a=a, h=h, noise=noise, **networks))
        drawn = drawn[-1 - method.replay :]
        whole = joined(drawn)
        if method.prepare:
            whole = replace(whole, weight=method.prepare(whole))
        start, stop, cost = meter.spent, total * (k + 1) / method.rounds, 0.0
        while meter.spent < stop:
            before = meter.spent
            progress = (before - start) / max(stop - start - cost, 1.0)
            weighted = bool(method.replay and method.prepare)
            more = {"extra": extra, "progress": min(1.0, progress)}
            batch = draw_batch(whole, cfg.batch, weighted=weighted, **more)
            loss = method.objective(batch)
            dtm.take_step(optimizer, loss, learning_rate(method, k, progress, meter.spent / total))
            cost = meter.spent - before
        if (k + 1) % max(1, method.rounds // 16) == 0:
            seconds += time.perf_counter() - clock
            yield Look(a, student, meter.spent, seconds)
            clock = time.perf_counter()


def draw_round(
    method: Method,
    maze: lab.Maze,
    n: int,
    *,
    net: Callable,
    old: Callable,
    base: Callable,
    a: float,
    h: float,
    noise: Generator,
) -> Batch:
    """Return the n paths of a round, drawn from the old model, with their rewards and bounds."""
    blank = torch.full((n, maze.L), MASK, device=noise.device)
    sampler = mixture(old, base, method.mix)
    *_, x = dtm.sample(sampler, blank, MASK, block=method.block, generator=noise)
    r = maze.reward(x)
    whole = Batch(
        net=net,
        old=old,
        base=base,
        x=x,
        r=r,
        advantage=r - r.mean(),
        a=a,
        h=h,
        noise=noise,
        start=torch.rand(len(x), generator=noise, device=x.device),
        spread=r.std().item(),
        count=len(x),
    )
    if method.measure:
        log_old, log_base = method.measure(whole)
        whole = replace(whole, log_old=log_old, log_base=log_base)
    return whole


def round_sizes(method: Method, cfg: lab.Config) -> list[int]:
    """Return the number of rollouts of each round.

    With decay < 1, a quarter of the rollouts is divided equally among the rounds, and the rest
    falls by the factor `decay` per sixteenth of the run, as in `maze_lab.phase_sizes`.
    """
    if method.decay == 1:
        return [cfg.rollouts // method.rounds] * method.rounds
    sizes = lab.phase_sizes(cfg, method.rounds, method.decay ** (16 / method.rounds))
    return [n for n, _ in sizes]


def joined(drawn: list[Batch]) -> Batch:
    """Return the rounds as one: the paths of all of them, and the networks of the newest.

    Each path keeps the bounds under the model that drew it.
    """
    if len(drawn) == 1:
        return drawn[0]
    names = ["x", "r", "start"] + ["log_old", "log_base"] * (drawn[0].log_old is not None)
    columns = {name: torch.cat([getattr(b, name) for b in drawn]) for name in names}
    r = columns["r"]
    changes = {"advantage": r - r.mean(), "spread": r.std().item(), "count": len(r)}
    return replace(drawn[-1], **columns, **changes)


def draw_batch(whole: Batch, size: int, weighted: bool = False, **changes) -> Batch:
    """Return random paths of a round, at most `size` of them.

    weighted  draw paths in proportion to the size of their weights, with replacement; each then has
              a weight of the same size, so that the loss has the same mean. Among the many paths
              of a replay, most weights are close to 0.
    """
    if weighted:
        sizes = whole.weight.abs()
        i = sizes.multinomial(size, replacement=True, generator=whole.noise)
    else:
        i = torch.randperm(len(whole.x), generator=whole.noise, device=whole.x.device)[:size]
    for name in ("x", "r", "advantage", "start", "weight"):
        values = getattr(whole, name)
        changes[name] = None if values is None else values[i]
    if weighted:
        changes["weight"] = changes["weight"].sign() * sizes.sum() / size
    return replace(whole, **changes)


def learning_rate(method: Method, k: int, progress: float, spent: float) -> float:
    """Return a rate that falls to 0 over the run, or over each round as in `maze_lab.tilt`."""
    if method.restart:
        return method.lr * (1 - 0.8 * k / method.rounds) * max(0.0, 1 - progress)
    return method.lr * (1 - spent)


def target_tilt(method: Method, cfg: lab.Config, k: int) -> float:
    """Return the tilt of the target in round k."""
    return cfg.a_end * min(1.0, (k + 1) / method.rounds / method.rise)


def mixture(model: Callable, base: Callable, share: float) -> Callable:
    """Return the geometric mixture of two models, as wd1 draws; `share` is that of the base."""
    if share == 0:
        return model

    def mixed(xt: Tensor, where: Tensor | None = None) -> Tensor:
        log_p = model(xt, where).log_softmax(-1)
        return (1 - share) * log_p + share * base(xt, where).log_softmax(-1)

    return mixed


def run_method(cfg: lab.Config, method: Method, base: dict, device: str) -> dict:
    """Run one method on one base model, and return its row of the table."""
    maze, seed = lab.make_maze(cfg, base["seed"]), base["seed"]
    net = base["net"].to(device)
    evaluation = FrontierEvaluation(maze, lab.tabulate(net, maze.L), cfg.a_end)
    trace = []
    if method.arm:
        cfg = replace(cfg, lr=method.lr)
        trace = c_dtm_trace(method, cfg, maze, net, seed=seed, evaluation=evaluation)
    else:
        for look in compete(method, cfg, maze, net, seed):
            table = lab.tabulate(look.student, maze.L)
            trace.append(evaluation.measure(table, look.a))
            trace[-1] |= {"evaluations": look.evaluations, "seconds": look.seconds}
            if method.block == 1:
                trace[-1]["left_to_right"] = evaluation.measure_left_to_right(table)
    row = {"arm": method.name, "seed": seed, **trace[-1], "trace": trace}
    row["at_reward"] = frontier_at(PASSED, in_own_order(trace))
    if method.target:
        row |= {"target_kl": row["kl_end"], "target_kl_reverse": row["kl_reverse"]}
    return row


def c_dtm_trace(
    method: Method,
    cfg: lab.Config,
    maze: lab.Maze,
    net: lab.MazeNet,
    *,
    seed: int,
    evaluation: FrontierEvaluation,
) -> list[dict]:
    """Run a c-DTM arm with as many steps as its budget allows, and return a record per phase."""
    total = budget(cfg, maze.L)
    cfg = replace(cfg, steps=affordable_steps(cfg, method.arm, net, maze.L))
    schedule = lab.make_schedule(method.arm, cfg)
    if method.closed_loop:
        schedule = ClosedLoop(cfg.a_end, cfg.phases)
        cfg = replace(cfg, a_end=math.inf)  # the tilts that it asks for may add up to more than A
    phases = lab.tilt(net, maze, arm=method.arm, cfg=cfg, choose_h=schedule, seed=seed)
    trace, steps = [], 0
    for (_, record), (_, more) in zip(
        lab.follow(phases, evaluation), lab.phase_sizes(cfg, cfg.phases), strict=True
    ):
        steps += more
        trace.append(record | {"evaluations": steps / cfg.steps * total})
    return trace


def row_once(folder: Path, cfg: lab.Config, method: Method, base: dict, device: str) -> dict:
    """Return the row that lies in the folder, or run the method and put its row there.

    So a command that was stopped resumes with the rows that are missing.
    """
    file = folder / f"{method.name.replace('/', ' per ')}, seed {base['seed']}.json"
    if not file.exists():
        text = json.dumps(run_method(cfg, method, base, device))
        lab.write_then_rename(file, lambda temporary: temporary.write_text(text))
    return json.loads(file.read_text())


# ---- 4. Tuning ----------------------------------------------------------------------------------
def variants(method: Method) -> list[Method]:
    """Return the method as it is, and others that differ from it in one or two settings.

    All methods are tried at half and twice their learning rate, and rivals also with half and twice
    their rounds. A rival with a target is tried with more rollouts in early rounds, and an
    off-policy one with a replay of an eighth of the rounds and of all of them. figures/phases.py
    and figures/replay.py study these settings of c-DTM.
    """
    tried = [replace(method, name=f"{method.name} @ {method.lr:.2g}")]

    def add(text: str, **changes) -> None:
        tried.append(replace(tried[0], name=f"{tried[0].name}, {text}", **changes))

    for lr in (method.lr / 2, method.lr * 2):
        tried.append(replace(method, name=f"{method.name} @ {lr:.2g}", lr=lr))
    if method.arm is None:
        for rounds in (method.rounds // 2, method.rounds * 2):
            add(f"{rounds} rounds", rounds=rounds)
        if method.target:
            text, decay = ("more rollouts early", 0.7) if method.decay == 1 else ("equal rounds", 1)
            add(text, decay=decay)
        if method.off_policy and not method.replay:
            for rounds in (method.rounds // 8, method.rounds):
                add(f"replay {rounds}", replay=rounds, decay=1.0)
                add(f"replay {rounds}, more rollouts early", replay=rounds, decay=0.7)
    return tried


def score(method: Method, rows: list[dict]) -> float:
    """Return the score of a method, the smaller the better.

    It is KL(rho_theta || rho_A), or the frontier distance at a reward of .9 for methods without a
    target. It is infinite if the reward of a seed never gets there.
    """
    values = [row["kl_reverse"] if method.target else row["at_reward"] for row in rows]
    if None in values:
        return math.inf
    return sum(values) / len(values)


def compare_variants(result: dict, grid: list[list[Method]]) -> dict[str, float]:
    """Return the score of every variant, and print for each method which one is best."""
    rows, scores = lab.by_arm(result), {}
    for tried in grid:
        found = {variant.name: score(variant, rows[variant.name]) for variant in tried}
        best = min(found, key=found.get)
        verdict = "stays at" if best == tried[0].name else "MOVES to"
        print(f"{verdict} {best}   ({', '.join(f'{value:.3f}' for value in found.values())})")
        scores |= found
    return scores


# ---- 5. The table and the figure ----------------------------------------------------------------
COLUMNS = {
    "target_kl": "KL(A||theta)",
    "target_kl_reverse": "KL(theta||A)",
    "frontier": "to frontier",
    "at_reward": "at reward .9",
    "reward": "reward",
    "success": "success",
    "modes": "paths kept",
    "seconds": "seconds",
}
PALETTE = ["#4477AA", "#66CCEE", "#228833", "#CCBB44", "#EE6677", "#AA3377", "#AA7744"]


def title_of(result: dict) -> str:
    """Return the claim of the figure: which method ends closest to the target."""
    exact = [arm["name"] for arm in result["arms"] if arm["exact"]]
    ends = {
        name: mean(rows, "target_kl_reverse")
        for name, rows in lab.by_arm(result).items()
        if name not in exact and "target_kl_reverse" in rows[0]
    }
    if len(ends) < 2:
        return "These methods spend the same number of network evaluations"
    first = min(ends, key=ends.get)
    return (
        "In KL(model, target), no method without exact likelihoods ends closer to the target\n"
        f'than "{first}": {ends[first]:.3f} nats'
    )


def draw(result: dict, path: Path) -> None:
    """Draw how far the methods with a target end from it, and what reward costs the others."""
    figure, (dots, plane) = command.new_figure(columns=2, height=4.8)
    methods = lab.by_arm(result)
    aimed = [name for name, rows in methods.items() if "target_kl_reverse" in rows[0]]
    aimed.sort(key=lambda name: mean(methods[name], "target_kl_reverse"))
    exact = [arm["name"] for arm in result["arms"] if arm["exact"]]
    for place, name in enumerate(aimed):
        colour = "#777777" if name in exact else COLOURS["rivals"]
        if name.startswith("c-DTM"):
            colour = COLOURS["c = 1"] if name.endswith("c = 1") else COLOURS["learned c"]
        each = [row["target_kl_reverse"] for row in methods[name]]
        dots.plot(each, [place] * len(each), ".", color=colour, alpha=0.5)
        dots.plot(
            mean(methods[name], "target_kl_reverse"), place, "|", ms=14, mew=2.5, color=colour
        )
    dots.set_yticks(range(len(aimed)), aimed)
    dots.set(xscale="log", xlabel="KL(model, target), nats; bars are means")
    dots.set_title("These methods aim at the target", fontsize=10)
    dots.xaxis.set_minor_formatter("")
    dots.invert_yaxis()
    draw_plane(plane, result, {name: rows for name, rows in methods.items() if name not in aimed})
    command.save_figure(figure, title_of(result), path)


def draw_plane(axis, result: dict, methods: dict[str, list[dict]]) -> None:
    """Draw reward against KL to the base along the runs, below the frontier of the tilts."""
    for place, (name, rows) in enumerate(methods.items()):
        traces = [in_own_order(row["trace"]) for row in rows]
        line = [mean_trace(traces, key) for key in ("kl_base", "reward")]
        axis.plot(*line, "o-", ms=2.5, lw=1, color=PALETTE[place % len(PALETTE)], label=name)
    for base in result["bases"]:
        values = torch.tensor(base["reward_distribution"]["values"]).double()
        p = torch.tensor(base["reward_distribution"]["p"]).double()
        a_end = result["config"]["a_end"]
        tilts = [dtm.exact_tilt(p, values, a_end * (i / 20) ** 2) for i in range(41)]  # to 4 A
        costs = [lab.kl(tilt, p) for tilt in tilts]
        label = "the exact tilts of each base" if base is result["bases"][0] else None
        axis.plot(costs, [(t @ values).item() for t in tilts], "k-", lw=0.5, label=label)
    axis.legend(fontsize=8, loc="lower right", frameon=False)
    axis.set(xlabel="KL to the base, nats", ylabel="mean reward", ylim=(0, 1.03), xlim=(0, None))
    axis.set_title("The others have no target", fontsize=10)


def in_own_order(trace: list[dict]) -> list[dict]:
    """Return the records for the order in which the method draws; JustGRPO has its own."""
    return [record.get("left_to_right", record) for record in trace]


def mean_trace(traces: list[list[dict]], key: str) -> list[float]:
    """Return the mean of a metric over the seeds, record by record."""
    return torch.tensor([[record[key] for record in trace] for trace in traces]).mean(0).tolist()


def with_other_order(result: dict) -> dict:
    """Return the result with a second row for JustGRPO, for the order in which it draws."""
    rows, arms = [], list(result["arms"])
    for row in result["rows"]:
        scores = row["trace"][-1].get("left_to_right")
        if scores is None:
            rows.append(row)
            continue
        name = f"{row['arm']}, its order"
        if {"name": name} not in arms:
            arms.append({"name": name})
        shared = {key: row[key] for key in ("seed", "seconds", "at_reward")}
        rows.append(row | {"at_reward": None})
        rows.append({"arm": name, **shared, **scores})
    return result | {"rows": rows, "arms": arms}


# ---- 6. The command line ------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> None:
    parser = command.make_parser(figures.rivals.__doc__)
    text = "Score half and twice each learning rate, and of the rivals half and twice the rounds."
    parser.add_argument("--tune", action="store_true", help=text)
    text = "Run only the method of this name, or those whose name contains it (default: all)."
    parser.add_argument("--only", default="", metavar="TEXT", help=text)
    cfg, args = command.read_flags(parser, argv, "rivals")
    args.name += ("_tuning" if args.tune else "") + ("_only" if args.only else "")
    exact = [method for method in METHODS if args.only == method.name]
    methods = exact or [method for method in METHODS if args.only in method.name]
    if not methods:
        names = "; ".join(method.name for method in METHODS)
        parser.error(f"--only {args.only} is part of no method's name. The names are: {names}.")
    grid = [variants(method) if args.tune else [method] for method in methods]
    runs = sum(grid, [])

    folder = args.out / "data" / f"{args.name}_rows"
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        print(f"The rows in {folder} are used again; delete the folder to run them anew.")
    result = lab.experiment(cfg, runs, args, partial(row_once, folder))
    shutil.rmtree(folder)
    if args.tune:
        result["scores"] = compare_variants(result, grid)
        for row in result["rows"]:
            del row["trace"]
        command.save(result, args)
    else:
        print(lab.format_table(with_other_order(result), COLUMNS))
        command.save(result, args, draw)
