"""c-DTM against its rivals, on the maze where the answer is known: `python -m figures.rivals`.

    python -m figures.rivals --seeds 5    a table and a figure, about half an hour on 2 cores
    python -m figures.rivals --tune --first-seed 100 --seeds 4
                                          half and twice each learning rate, and of the rivals each
                                          number of rounds, on seeds that the table does not have

All methods start from the same base, draw with the same sampler at temperature 1, and may spend the
same number of network evaluations: a sequence's forward pass counts 1, a backward pass 2 more. The
passes of a teacher, a reference, an old policy count; a small net counts by its multiplications, a
look-up in a table as the pass it stands for. Every row is kept in OUT/rivals_rows until the command
ends: a stopped one goes on where it was.

METRICS beside those of maze_lab.py
    kl_reverse   KL(rho_theta || rho_A), nats; reward and kl_base: E r and KL(rho_theta || rho_0)
    frontier     min_a KL(rho_theta || rho_a): the distance to the frontier of reward against KL to
                 the base, on which the tilts lie; the KL that the same reward could have saved
    at_reward    the frontier distance where the reward passes .9, between two looks: the score of
                 methods without a target, which go on past any tilt
    kl_end       KL(rho_A || rho_theta) along the run, where kl is against the current tilt rho_a
    target_kl, target_kl_reverse   kl_end and kl_reverse at the end, of methods that have a target
    evaluations  network evaluations so far

CONTENTS   1 methods   2 accounts   3 a run   4 rows that stay   5 tuning   6 table and figure
           7 command
"""

import copy
import hashlib
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
import maze_lab as lab
from figures import closed_loop, frontier, objectives
from figures.closed_loop import ClosedLoop
from figures.frontier import FrontierJudge, frontier_at
from figures.objectives import EXTRAS, OBJECTIVES, Batch
from maze_lab import MASK

PASSED = 0.9  # the reward at which methods without a target are compared


# ---- 1. Methods ---------------------------------------------------------------------------------
@dataclass
class Method:
    """A row of the table; "one state": it sees the fully masked one alone. Whatever has a target
    anneals: c-DTM in phases of equal h, the others by a target whose tilt rises evenly to A over
    the first `rise` of the rounds, where their authors keep it fixed; for methods without a target
    that tilt means nothing."""

    name: str
    lr: float  # chosen by --tune
    arm: lab.Arm | None = None  # of c-DTM
    objective: str = ""  # of a rival, a key of OBJECTIVES
    rounds: int = 128  # tuned, too; a round draws its share of the rollouts, one group
    rise: float = 0.5
    restart: bool = False  # the learning rate falls to 0 in each round, as in c-DTM's phases
    target: bool = True  # is given the tilt; "Anchor" in objectives.py says where it ends
    closed: bool = False  # c-DTM with `ClosedLoop` for its h
    baseline: str = ""  # of DMPO
    mix: float = 0.0  # share of the base's logits in the rollouts' (wd1 with its reference)
    block: int | None = None  # of decoding; 1: from left to right


METHODS = [
    Method("c-DTM, learned c", 7e-3, lab.LEARNED),
    Method("c-DTM, closed loop", 7e-3, lab.LEARNED, closed=True),
    Method("c-DTM, c = 1", 7e-3, lab.C_1),
    Method("DMPO, u", 1e-3, objective="dmpo", rounds=2048, baseline="none"),
    Method("DMPO, u - v (as shipped)", 4e-4, objective="dmpo", rounds=512, baseline="neg"),
    Method("TraFL", 2.5e-4, objective="trafl"),
    Method("ESPO", 5e-4, objective="espo"),
    Method("GDSD, ideal", 8e-3, objective="gdsd_ideal", rounds=16, rise=1.0, restart=True),
    Method("GDSD, as shipped", 5e-4, objective="gdsd", target=False),
    Method("UniGRPO, k3", 1e-4, objective="uni_grpo", target=False),
    Method("UniGRPO, k3 at 1/a", 2e-4, objective="uni_grpo_k3_at_tilt"),
    Method("UniGRPO, k2", 2e-4, objective="uni_grpo_k2", rounds=64),
    Method("diffu-GRPO, k3 (one state)", 2e-3, objective="diffu_grpo", target=False),
    Method("diffu-GRPO, k2 (one state)", 1e-3, objective="diffu_grpo_k2"),
    Method("wd1, b = 0 (one state)", 8e-4, objective="wd1", target=False),
    Method("wd1, b = .04 (one state)", 4e-4, objective="wd1", target=False, mix=0.04),
    Method("SPG", 2e-4, objective="spg", target=False),
    Method("JustGRPO", 4e-4, objective="just_grpo", rounds=64, target=False, block=1),
    Method("ELBO-REINFORCE", 2e-4, objective="elbo_reinforce"),
    Method("TraFL, exact", 1e-3, objective="trafl_exact", rounds=256),
    Method("exact REINFORCE", 2e-3, objective="exact_reinforce", rounds=256),
]


# ---- 2. Accounts --------------------------------------------------------------------------------
class Meter:
    """Counts network evaluations, in passes of the student over one sequence."""

    spent = 0.0

    def watch(self, model: nn.Module, cost: float = 1.0) -> Callable:
        def metered(xt: Tensor, *where: Tensor) -> Tensor:
            output = model(xt, *where)
            self.spent += len(xt) * cost * (3 if output.requires_grad else 1)
            return output

        return metered


def multiplications(net: nn.Module) -> int:
    """Of one vector through the matrices of a net; embeddings are looked up."""
    if isinstance(net, lab.MazeNet):
        return multiplications(net.body) + multiplications(net.head)
    return sum(p.numel() for p in net.parameters() if p.dim() == 2)


def small_cost(small: nn.Module, student: lab.MazeNet, L: int) -> float:
    """What a pass of a small net over a state costs, of a student's pass over its L positions."""
    return multiplications(small) / (L * multiplications(student))


def budget(cfg: lab.Config, L: int) -> int:
    """What c-DTM spends: L a rollout; a student's pass forward and back, a teacher's forward."""
    return cfg.rollouts * L + cfg.steps * cfg.batch * 4


def affordable_steps(cfg: lab.Config, arm: lab.Arm, student: lab.MazeNet, L: int) -> int:
    """The steps of a c-DTM arm within the budget: a learned c costs a pass forward and back."""
    control = lab.make_control(arm, L, torch.device("cpu"))
    if not isinstance(control, lab.LearnedC):
        return cfg.steps
    return int(cfg.steps * 4 / (4 + 3 * small_cost(control.net, student, L)))


# ---- 3. A run -----------------------------------------------------------------------------------
@dataclass
class Look:
    """At a rival's run, from outside, as with `maze_lab.tilt`."""

    a: float  # the target's tilt
    student: lab.MazeNet
    evaluations: float
    seconds: float


def compete(
    method: Method, cfg: lab.Config, maze: lab.Maze, base: lab.MazeNet, seed: int
) -> Iterator[Look]:
    """A rival, until it has spent what c-DTM spends; 16 looks at it, the last at the end."""
    device = next(base.parameters()).device
    noise = Generator(device).manual_seed(seed)
    torch.manual_seed(seed)  # for the first weights of what an objective learns beside
    meter = Meter()
    student = copy.deepcopy(base)
    net = meter.watch(student)
    reference = meter.watch(lab.tabulate(base, maze.L))
    optimiser = lab.adam(student)
    extra = None
    if method.objective in EXTRAS:
        make, lr = EXTRAS[method.objective]
        module = make(maze.L).to(device)
        optimiser.add_param_group({"params": module.parameters(), "lr": lr})
        extra = meter.watch(module, small_cost(module, student, maze.L))
    blank = torch.full((cfg.rollouts // method.rounds, maze.L), MASK, device=device)
    total = budget(cfg, maze.L)
    clock = time.perf_counter()
    seconds = a = 0.0
    for k in range(method.rounds):
        h = target_tilt(method, cfg, k) - a
        a += h
        old = meter.watch(copy.deepcopy(student).requires_grad_(False))
        drawn_by = mixture(old, reference, method.mix)
        *_, x = dtm.sample(drawn_by, blank, MASK, block=method.block, generator=noise)
        r = maze.reward(x)
        start = torch.rand(len(x), generator=noise, device=device)
        weight = r  # read by DMPO alone
        if method.objective == "dmpo":
            weight = objectives.dmpo_round(old, reference, x, r, a, method.baseline, noise)
        whole = Batch(
            net, old, reference, x, r, r - r.mean(), a, h, noise, start, 0.0, r.std().item(), len(x)
        )
        begin, stop, cost = meter.spent, total * (k + 1) / method.rounds, 0.0
        while meter.spent < stop:
            i = torch.randperm(len(x), generator=noise, device=device)[: cfg.batch]
            progress = (meter.spent - begin) / max(stop - begin - cost, 1.0)
            parts = {"x": x[i], "r": r[i], "advantage": whole.advantage[i], "start": start[i]}
            parts |= {"weight": weight[i], "extra": extra, "progress": min(1.0, progress)}
            before = meter.spent
            loss = OBJECTIVES[method.objective](replace(whole, **parts))
            lab.take_step(optimiser, loss, learning_rate(method, k, progress, meter.spent / total))
            cost = meter.spent - before
        if (k + 1) % max(1, method.rounds // 16) == 0:
            seconds += time.perf_counter() - clock
            yield Look(a, student, meter.spent, seconds)
            clock = time.perf_counter()


def learning_rate(method: Method, k: int, progress: float, spent: float) -> float:
    """Falls to 0 over the run, or as in `maze_lab.tilt`."""
    if method.restart:
        return method.lr * (1 - 0.8 * k / method.rounds) * max(0.0, 1 - progress)
    return method.lr * (1 - spent)


def target_tilt(method: Method, cfg: lab.Config, k: int) -> float:
    """The tilt of the target in round k."""
    return cfg.a_end * min(1.0, (k + 1) / method.rounds / max(method.rise, 1e-9))


def mixture(model: Callable, base: Callable, share: float) -> Callable:
    """Logits of which `share` are the base's: the geometric mixture of the two, as wd1 draws."""
    if share == 0:
        return model

    def mixed(xt: Tensor, where: Tensor | None = None) -> Tensor:
        log_p = model(xt, where).log_softmax(-1)
        return (1 - share) * log_p + share * base(xt, where).log_softmax(-1)

    return mixed


def run_method(cfg: lab.Config, method: Method, base: dict, device: str) -> dict:
    """A row of the table, as `maze_lab.run_arm`."""
    maze = lab.make_maze(cfg, base["seed"])
    net = base["net"].to(device)
    judge = FrontierJudge(maze, lab.tabulate(net, maze.L), cfg.a_end)
    trace = []
    if method.arm is None:
        for look in compete(method, cfg, maze, net, base["seed"]):
            table = lab.tabulate(look.student, maze.L)
            trace.append(judge.measure(table, look.a))
            trace[-1] |= {"evaluations": look.evaluations, "seconds": look.seconds}
            if method.block == 1:
                trace[-1]["left_to_right"] = judge.left_to_right(table)
    else:
        steps = affordable_steps(cfg, method.arm, net, maze.L)
        own = replace(cfg, lr=method.lr, steps=steps)
        schedule = lab.make_schedule(method.arm, own, judge)
        if method.closed:
            schedule = ClosedLoop(cfg.a_end, cfg.phases)
            own = replace(own, a_end=math.inf)  # what is asked for may exceed A
        phases = lab.tilt(net, maze, method.arm, own, schedule, base["seed"])
        for _, record in lab.follow(phases, judge):
            done = lab.shares(own, cfg.phases)[: len(trace) + 1]
            share = sum(count for _, count in done) / own.steps
            trace.append(record | {"evaluations": share * budget(cfg, maze.L)})
    row = {"arm": method.name, "seed": base["seed"], **trace[-1], "trace": trace}
    row["at_reward"] = frontier_at(PASSED, in_own_order(trace))
    if method.target:
        row |= {"target_kl": row["kl_end"], "target_kl_reverse": row["kl_reverse"]}
    return row


# ---- 4. Rows that stay --------------------------------------------------------------------------
def kept(folder: Path, cfg: lab.Config, method: Method, base: dict, device: str) -> dict:
    """`run_method`, unless its row lies in the folder already: same settings, same code."""
    file = folder / f"{fingerprint(cfg, method, base['seed'], device)}.json"
    if file.exists():
        return json.loads(file.read_text())
    row = run_method(cfg, method, base, device)
    lab.save_result(file, row)
    return row


def fingerprint(*settings) -> str:
    """Of the settings, and of the code that a row depends on."""
    modules = (dtm, lab, objectives, frontier, closed_loop)
    sources = [Path(module.__file__).read_text() for module in modules]
    own = Path(__file__).read_text().partition("# ---- 2.")[2].partition("# ---- 4.")[0]
    text = "\n".join([*map(repr, settings), torch.__version__, *sources, own])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_all(cfg: lab.Config, methods: list[Method], seeds: list[int], args) -> dict:
    """`maze_lab.experiment`, its rows kept in a folder until all are there."""
    folder = args.out / "rivals_rows"
    folder.mkdir(exist_ok=True)
    return lab.experiment(cfg, methods, seeds, args, partial(kept, folder))


# ---- 5. Tuning ----------------------------------------------------------------------------------
def variants(method: Method) -> list[Method]:
    """The method at its learning rate, at half and at twice of it; a rival at half and twice its
    rounds, too. The phases of c-DTM are the subject of figures/phases.py."""
    rates = [method.lr, method.lr / 2, method.lr * 2]
    tried = [replace(method, name=f"{method.name} @ {lr:.2g}", lr=lr) for lr in rates]
    if method.arm is None:
        for rounds in (method.rounds // 2, method.rounds * 2):
            tried.append(replace(tried[0], name=f"{tried[0].name}, {rounds} rounds", rounds=rounds))
    return tried


def score(method: Method, rows: list[dict]) -> float:
    """The smaller the better: KL(rho_theta || rho_A), or the frontier distance at a reward of .9
    for methods without a target; infinite where a seed never gets there."""
    values = [row["kl_reverse"] if method.target else row["at_reward"] for row in rows]
    if None in values:
        return float("inf")
    return sum(values) / len(values)


def tune(cfg: lab.Config, grid: list[list[Method]], seeds: list[int], args) -> dict:
    """Rows of every variant, and for each method its scores; prints who should move."""
    result = run_all(cfg, sum(grid, []), seeds, args)
    rows = lab.by_arm(result)
    result["scores"] = {}
    for tried in grid:
        scores = {variant.name: score(variant, rows[variant.name]) for variant in tried}
        best = min(scores, key=scores.get)
        found = ", ".join(f"{value:.3f}" for value in scores.values())
        print(f"{'stays' if best == tried[0].name else 'MOVES'} {best}   ({found})")
        result["scores"] |= scores
    for row in result["rows"]:
        del row["trace"]
    return result


# ---- 6. Table and figure ------------------------------------------------------------------------
COLUMNS = {
    "target_kl": "KL(A||theta)",
    "target_kl_reverse": "KL(theta||A)",
    "frontier": "to frontier",
    "at_reward": "at reward .9",
    "reward": "reward",
    "success": "success",
    "modes": "eff. paths",
    "seconds": "seconds",
}


def draw(result: dict, path: Path) -> Path:
    """Left: how far the methods with a target end from it. Right: what reward costs in KL."""
    plt = lab.pyplot()
    figure, (dots, plane) = plt.subplots(1, 2, figsize=(8.8, 4.6), layout="constrained")
    methods = lab.by_arm(result)
    aimed = [name for name, rows in methods.items() if "target_kl_reverse" in rows[0]]
    ends = {name: lab.mean_and_error(methods[name], "target_kl_reverse")[0] for name in aimed}
    aimed.sort(key=ends.get)
    for place, name in enumerate(aimed):
        colour = lab.COLOURS[4] if name.startswith("c-DTM") else lab.COLOURS[6]
        each = [row["target_kl_reverse"] for row in methods[name]]
        dots.plot(each, [place] * len(each), ".", color=colour, alpha=0.5)
        dots.plot(ends[name], place, "|", ms=14, mew=2.5, color=colour)
    dots.set_yticks(range(len(aimed)), aimed)
    dots.set(xscale="log", xlabel="KL(rho_theta || rho_A), nats", title="with a target")
    dots.xaxis.set_minor_formatter("")
    dots.invert_yaxis()
    draw_plane(plane, result, {name: rows for name, rows in methods.items() if name not in aimed})
    if aimed:
        figure.suptitle(f"Nearest in KL(rho_theta || rho_A): {'; then '.join(aimed[:2])}")
    return lab.save_figure(figure, path)


def draw_plane(axis, result: dict, methods: dict[str, list[dict]]) -> None:
    """Reward against KL to the base along the runs, below the frontier on which the tilts lie."""
    for place, (name, rows) in enumerate(methods.items()):
        traces = [in_own_order(row["trace"]) for row in rows]
        way = [mean_of_looks(traces, key) for key in ("kl_base", "reward")]
        colour = lab.COLOURS[place % len(lab.COLOURS)]
        axis.plot(*way, "o-", ms=2.5, lw=1, color=colour, label=name)
    for base in result["bases"]:
        values = torch.tensor(base["reward_law"]["values"]).double()
        p = torch.tensor(base["reward_law"]["p"]).double()
        a_end = result["config"]["a_end"]
        tilts = [dtm.exact_tilt(p, values, a_end * (i / 20) ** 2) for i in range(41)]  # to 4 A
        costs = [lab.kl(tilt, p) for tilt in tilts]
        axis.plot(costs, [(tilt @ values).item() for tilt in tilts], "k-", lw=0.5)
    axis.legend(fontsize=8, loc="lower right")
    axis.set(xlabel="KL to the base, nats; black: the tilts", ylabel="expected reward")
    axis.set(title="without: along the run", ylim=(0, 1.03), xlim=(0, None))


def in_own_order(trace: list[dict]) -> list[dict]:
    """The looks at a run, by the law of the order in which it draws (JustGRPO's is its own)."""
    return [look.get("left_to_right", look) for look in trace]


def mean_of_looks(traces: list[list[dict]], key: str) -> list[float]:
    """The mean over seeds at each look."""
    looks = torch.tensor([[record[key] for record in trace] for trace in traces])
    return looks.mean(0).tolist()


def with_other_order(result: dict) -> dict:
    """JustGRPO once more, scored by the law of the order in which it draws."""
    rows, names = [], {}  # names in the order in which they come
    for row in result["rows"]:
        scores = row["trace"][-1].get("left_to_right")
        if scores is None:
            rows.append(row)
            continue
        name = f"{row['arm']}, its order"
        names[name] = True
        shared = {key: row[key] for key in ("seed", "seconds", "at_reward")}
        rows.append(row | {"at_reward": None})
        rows.append({"arm": name, **shared, **scores})
    arms = [*result["arms"], *[{"name": name} for name in names]]
    return result | {"rows": rows, "arms": arms}


# ---- 7. Command ---------------------------------------------------------------------------------
def main() -> None:
    about = "c-DTM and its rivals at equal evaluations; the file's head explains the scores."
    parser = lab.make_parser(about, without=("lr",))
    parser.add_argument("--tune", action="store_true", help="half and twice each rate, and rounds")
    parser.add_argument("--only", help="methods whose name contains this (default: all)")
    cfg, seeds, args = lab.read_settings(parser, preset={})
    part = "rivals_tuning" if args.tune else "rivals"
    part += "_only" if args.only else ""
    file = args.out / f"{'quick_' if args.quick else ''}{part}.json"
    if args.plot_only:
        lab.redraw(parser, args, draw)
        return
    methods = [method for method in METHODS if (args.only or "") in method.name]
    if not methods:
        parser.error(f"--only {args.only}: no method of that name")
    grid = [variants(method) if args.tune else [method] for method in methods]
    least = 2 * max(method.rounds for method in sum(grid, []))
    if cfg.rollouts < least:
        parser.error(f"{least // 2} rounds need at least {least} --rollouts")
    if args.tune:
        lab.save_result(file, tune(cfg, grid, seeds, args))
        print("wrote", file)
        return  # the rows stay: whoever moves goes on from here
    result = run_all(cfg, methods, seeds, args)
    lab.save_result(file, result)
    print("wrote", file, draw(result, file.with_suffix(".png")))
    print(lab.format_table(with_other_order(result), COLUMNS))
    if not args.only:
        shutil.rmtree(args.out / "rivals_rows")


if __name__ == "__main__":
    main()
