"""c-DTM against its rivals, on the maze where the answer is known: `python -m figures.rivals`.

All methods start from the same base, draw with the same sampler, and may spend the same number of
network evaluations: a sequence's forward pass counts 1, a backward pass 2 more; the passes of a
teacher, a reference or an old policy count. c-DTM spends L a rollout and 4 a training sequence.
There is no prompt, no end token and one block: what a method does to those falls away.

METRICS beside those of maze_lab.py
    kl_reverse   KL(rho_theta || rho_A), nats; reward and kl_base: E r and KL(rho_theta || rho_0)
    frontier     min_a KL(rho_theta || rho_a): the distance to the frontier of reward against KL to
                 the base, on which the tilts lie; what the same reward would have cost less
    kl_end       KL(rho_A || rho_theta) along the run, where kl is against the current tilt rho_a
    evaluations  network evaluations so far

CONTENTS   1 methods   2 likelihoods   3 objectives   4 DMPO   5 a run   6 table, figure, command
"""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

import dtm
import maze_lab as lab
from dtm import check, wide
from maze_lab import MASK


# ---- 1. Methods ---------------------------------------------------------------------------------
@dataclass
class Method:
    """A row of the table. Whatever has a target anneals: c-DTM in phases, the others by a target
    whose tilt rises to A over the first `rise` of the rounds."""

    name: str
    lr: float  # best of 2e-5, 1e-4, 5e-4, 2e-3, 6e-3 by KL(rho_theta || rho_A), seeds 100 and 101
    arm: lab.Arm | None = None  # of c-DTM
    objective: str = ""  # of a rival, a key of OBJECTIVES
    rounds: int = 128  # a round draws its rollouts anew
    rise: float = 0.5
    baseline: str = ""  # of DMPO


METHODS = [
    Method("c-DTM, learned c", 2e-3, replace(lab.LEARNED, phases=16)),
    Method("c-DTM, c = 1", 2e-3, replace(lab.C_1, phases=16)),
    Method("DMPO, u", 5e-4, objective="dmpo", rounds=16, baseline="none"),
    Method("DMPO, u - v", 1e-4, objective="dmpo", baseline="neg"),
    Method("SPG", 1e-4, objective="spg"),
    Method("diffu-GRPO", 2e-3, objective="diffu_grpo"),
    Method("wd1", 1e-4, objective="wd1"),
    Method("UniGRPO", 1e-4, objective="uni_grpo"),
    Method("ELBO-REINFORCE", 1e-4, objective="elbo_reinforce"),
    Method("exact REINFORCE", 2e-3, objective="exact_reinforce"),
]


# ---- 2. Likelihoods -----------------------------------------------------------------------------
def sequence_law(model: Callable, x: Tensor, mask_id: int) -> Tensor:
    """rho_theta (n,) of given sequences x (n, L), float64 on the CPU, differentiable, at any V:
    (D11) along the 2^L ways to know part of x. A state that several sequences share is evaluated
    once."""
    n, L = x.shape
    known = dtm.all_sequences(2, L, x.device).bool()  # (2^L, L)
    xt = torch.where(known[:, None], x, mask_id)  # (2^L, n, L)
    xt, which = xt.flatten(0, 1).unique(dim=0, return_inverse=True)
    logits = torch.cat([model(part).cpu() for part in xt.split(2**14)])
    p = logits.double().softmax(-1)[which.cpu()]  # (2^L n, L, V)
    p = p.gather(-1, x.cpu().repeat(len(known), 1)[..., None]).view(len(known), n, L)
    flows = [[] for _ in known]  # flows[s]: what reaches the states that know the part s
    flows[0].append(p.new_ones(n))
    for s, keep in enumerate(known[:-1]):
        reach = torch.stack(flows[s]).sum(0)
        hidden = (~keep).nonzero()[:, 0].tolist()
        for i in hidden:
            flows[s + 2 ** (L - 1 - i)].append(reach * p[s, :, i] / len(hidden))
    return torch.stack(flows[-1]).sum(0)


def hidden_logs(model: Callable, x: Tensor, mask: Tensor) -> Tensor:
    """log pi(x_i | x without mask), (B, L); 0 at the visible positions."""
    log_p = model(torch.where(mask, MASK, x)).log_softmax(-1)
    return log_p.gather(-1, x[..., None])[..., 0] * mask


def elbo(model: Callable, x: Tensor, mask: Tensor) -> Tensor:
    """The bound (D6) of log rho(x), (B,), estimated at one state."""
    return x.shape[1] * hidden_logs(model, x, mask).sum(1) / mask.sum(1)


# ---- 3. Objectives: each maps a batch to its loss -----------------------------------------------
@dataclass
class Batch:
    net: Callable  # the student
    old: Callable  # the student at the start of the round, which drew x
    base: Callable
    x: Tensor  # (B, L) paths
    r: Tensor  # (B,) rewards
    advantage: Tensor  # (B,) r less the round's mean
    a: float  # the target's tilt: 1/a weighs the KL to the base
    noise: Generator
    u: Tensor  # (B,) a uniform number of each path, drawn once a round
    part: float  # of the round's budget that is spent
    weight: Tensor  # (B,) of DMPO


def clipped(b: Batch, mask: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Clipped token ratios, with e^d - d - 1 as a loss for the KL to the base, at the same mask."""
    now = hidden_logs(b.net, b.x, mask)
    old = hidden_logs(b.old, b.x, mask)
    d = hidden_logs(b.base, b.x, mask) - now
    ratio = (now - old).exp()
    advantage = b.advantage[:, None]
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.5, 1.5) * advantage)
    gain = gain - (d.exp() - d - 1) / b.a
    return -scale * dtm.row_mean(gain[mask], mask)


def diffu_grpo(b: Batch) -> Tensor:
    """d1 (dllm-reasoning/d1): all of the path is hidden, so it sees the first guesses only."""
    return clipped(b, torch.ones_like(b.x, dtype=torch.bool))


def uni_grpo(b: Batch) -> Tensor:
    """UniGRPO (MMaDA): a share of masks that grows over a round from a random start to all."""
    L = b.x.shape[1]
    start = (b.u * L).floor()  # (B,)
    share = (b.part * (L - start) + start).floor() / L
    noise = torch.rand(b.x.shape, generator=b.noise, device=b.x.device)
    mask = (noise < share[:, None]) | (noise == noise.amin(1, keepdim=True))  # at least one
    return clipped(b, mask, scale=1 / b.r.std().clamp_min(1e-4))


def wd1(b: Batch) -> Tensor:
    """wd1 (xiaohangt/wd1, b = 0 as run): weights softmax(adv) - softmax(-adv); d1's state."""
    logs = hidden_logs(b.net, b.x, torch.ones_like(b.x, dtype=torch.bool)).sum(1)
    weight = b.advantage.softmax(0) - (-b.advantage).softmax(0)
    return -(weight * logs).sum()


def spg(b: Batch) -> Tensor:
    """SPG (facebookresearch/SPG): a lower bound for good paths, half of it an upper bound for bad
    ones; two states a path."""
    beta = 1.5
    masks = torch.stack([dtm.mask_random(b.x, MASK, b.noise)[1] for _ in range(2)])
    logs = torch.stack([hidden_logs(b.net, b.x, mask) for mask in masks])  # (2, B, L)
    share = masks.float().mean(-1, keepdim=True)
    seen = masks.any(0)
    lower = (logs.sum(-1) / masks.sum(-1)).mean(0)
    power = (masks * (beta * logs).exp() / share).mean(0)
    upper = torch.where(seen, power, 1).log().sum(1) / beta / seen.sum(1)
    score = torch.where(b.advantage > 0, lower, (upper + lower) / 2)
    return -(b.advantage * score).mean()


def elbo_reinforce(b: Batch) -> Tensor:
    """REINFORCE with the bound (D6) for the log-likelihood, in the score and, at another state, in
    the KL to the base."""
    masks = [dtm.mask_random(b.x, MASK, b.noise)[1] for _ in range(2)]
    with torch.no_grad():
        gain = b.r - (elbo(b.net, b.x, masks[0]) - elbo(b.base, b.x, masks[0])) / b.a
    return -((gain - gain.mean()) * elbo(b.net, b.x, masks[1])).mean()


def exact_reinforce(b: Batch) -> Tensor:
    """REINFORCE with the exact log-likelihood; at its optimum, rho_a, all gains are the same."""
    x, which, count = b.x.unique(dim=0, return_inverse=True, return_counts=True)
    log_now = sequence_law(b.net, x, MASK).log()
    log_old = sequence_law(b.old, x, MASK).log()
    log_base = sequence_law(b.base, x, MASK).log()
    r = b.r.new_zeros(len(x)).scatter(0, which, b.r).cpu()
    gain = r - (log_now.detach() - log_base) / b.a
    ratio = (log_now.detach() - log_old).exp().clamp(max=2)
    p = count.cpu() / count.sum() * ratio  # drawn from old: the ratio reweighs
    return -(p * (gain - p @ gain / p.sum()) * log_now).sum()


# ---- 4. DMPO (yuchen-zhu-zyc/DMPO 96af1a4) ------------------------------------------------------
def mask_bernoulli(
    x1: Tensor, mask_id: int, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """xt, mask (B, L): DMPO's states, each position masked with its row's chance .1 + .9 u,
    u ~ U(0, 1), at least one."""
    noise = dtm.masking_noise(x1, mask_id, generator)
    u = torch.rand(len(x1), 1, generator=generator, device=x1.device)
    mask = (noise < 0.1 + 0.9 * u) | (noise == noise.amin(1, keepdim=True))
    return torch.where(mask, mask_id, x1), mask


def dmpo_weights(
    r: Tensor,
    log_cur: Tensor,
    log_pre: Tensor,
    alpha: float,
    c: float = 1.0,
    s: float = 1.0,
    baseline: str = "neg",
    log_theta: Tensor | None = None,
) -> Tensor:
    """Weights (..., G) of a prompt's G completions, from rewards and log-likelihoods (..., G).

        D = log_pre - log_cur,   u = softmax_G(c (D + r/alpha)),   v = softmax_G(c (D - r/alpha))
        "none" u | "mean" u - 1/G | "unbiased" u - softmax_G(log_theta - log_cur)            (D10)
        "neg", as shipped: u - s v

    cur drew the completions, pre is the base, theta the student; in practice the bounds (D6) stand
    in for log-likelihoods. With exact ones u is rho_0 e^{r/alpha} / rho_cur, normalised."""
    same = r.shape == log_cur.shape == log_pre.shape
    check(same, "dmpo_weights: r, log_cur, log_pre must share a shape (..., G)")
    known = baseline in ("none", "mean", "unbiased", "neg")
    check(known, f"dmpo_weights: baseline {baseline!r} is not one of none, mean, unbiased, neg")
    check(alpha > 0, f"dmpo_weights: alpha must be positive, not {alpha}")
    check(baseline != "unbiased" or log_theta is not None, "dmpo_weights: no log_theta")
    d = wide(log_pre) - wide(log_cur)
    u = (c * (d + wide(r) / alpha)).softmax(-1)
    if baseline == "mean":
        return u - 1 / r.shape[-1]
    if baseline == "unbiased":
        return u - (wide(log_theta) - wide(log_cur)).softmax(-1)
    if baseline == "neg":
        return u - s * (c * (d - wide(r) / alpha)).softmax(-1)
    return u


def dmpo_loss(logits: Tensor, x1: Tensor, weight: Tensor) -> Tensor:
    """-weight log pi_theta(x1_i), (D3) at c = 0; shapes as `c_dtm_loss`. DMPO sums it over rows."""
    return dtm.c_dtm_loss(logits, logits, x1, weight, c=0.0)


def dmpo(b: Batch) -> Tensor:
    """DMPO: weighted cross-entropy, all of a round's paths one group."""
    mask = mask_bernoulli(b.x, MASK, b.noise)[1]
    loss = -b.weight[:, None] * hidden_logs(b.net, b.x, mask)
    return len(b.x) * dtm.row_mean(loss[mask], mask)


def dmpo_round(
    old: Callable, base: Callable, x: Tensor, r: Tensor, a: float, baseline: str, noise: Generator
) -> Tensor:
    """DMPO's weights (n,) of a round, from bounds (D6) at two antithetic pairs of masks, the same
    for both models."""
    log_old = torch.zeros(len(x), device=x.device)
    log_base = torch.zeros(len(x), device=x.device)
    for _ in range(2):
        first = mask_bernoulli(x, MASK, noise)[1]
        second = ~first | first.all(1, keepdim=True)  # a full mask is its own partner
        for mask in (first, second):
            log_old += elbo(old, x, mask) / 4
            log_base += elbo(base, x, mask) / 4
    return dmpo_weights(r, log_old, log_base, 1 / a, baseline=baseline)


OBJECTIVES = {
    "dmpo": dmpo,
    "spg": spg,
    "diffu_grpo": diffu_grpo,
    "wd1": wd1,
    "uni_grpo": uni_grpo,
    "elbo_reinforce": elbo_reinforce,
    "exact_reinforce": exact_reinforce,
}


# ---- 5. A run, and what it is measured by -------------------------------------------------------
class Meter:
    """Counts network evaluations."""

    spent = 0

    def watch(self, model: nn.Module) -> Callable:
        def metered(xt: Tensor, where: Tensor | None = None) -> Tensor:
            logits = model(xt, where)
            self.spent += len(xt) * (3 if logits.requires_grad else 1)
            return logits

        return metered


def budget(cfg: lab.Config, L: int) -> int:
    """What c-DTM spends: L a rollout; a student's pass forward and back, a teacher's forward."""
    return cfg.rollouts * L + cfg.steps * cfg.batch * 4


class FrontierJudge(lab.Judge):
    """Adds the metrics of this file's head to the lab's."""

    def __init__(self, maze: lab.Maze, base: dtm.Table, a_end: float):
        super().__init__(maze, base)
        self.rho_end = dtm.exact_tilt(self.rho_0, self.r, a_end)

    def measure(self, table: dtm.Table, a: float) -> dict:
        rho = lab.law(table)
        return super().measure(table, a) | {
            "reward": (rho @ self.r.double()).item(),
            "kl_base": lab.kl(rho, self.rho_0),
            "kl_end": lab.kl(self.rho_end, rho),
            "kl_reverse": lab.kl(rho, self.rho_end),
            "frontier": self.frontier(rho),
        }

    def frontier(self, rho: Tensor) -> float:
        """min_a KL(rho || rho_a), at the tilt of the same reward: a difference of KLs to rho_0."""
        values, p = lab.reward_law(self.rho_0, self.r)
        reward = rho @ self.r.double()
        low, high = -1e3, 1e3
        for _ in range(60):
            a = (low + high) / 2
            if dtm.exact_tilt(p, values, a) @ values < reward:
                low = a
            else:
                high = a
        log_z = (p.log() + a * values).logsumexp(0)
        return lab.kl(rho, self.rho_0) - (a * reward - log_z).item()


@dataclass
class Look:
    """At a rival's run, from outside, as with `maze_lab.tilt`."""

    a: float  # the target's tilt
    student: lab.MazeNet
    evaluations: int
    seconds: float


def compete(
    method: Method, cfg: lab.Config, maze: lab.Maze, base: lab.MazeNet, seed: int
) -> Iterator[Look]:
    """A rival, until it has spent what c-DTM spends; 16 looks at it, the last at the end."""
    device = next(base.parameters()).device
    noise = Generator(device).manual_seed(seed)
    meter = Meter()
    student = copy.deepcopy(base)
    net = meter.watch(student)
    reference = meter.watch(lab.tabulate(base, maze.L))
    optimiser = lab.adam(student)
    blank = torch.full((cfg.rollouts // method.rounds, maze.L), MASK, device=device)
    total = budget(cfg, maze.L)
    seconds = 0.0
    for k in range(method.rounds):
        clock = time.perf_counter()
        a = cfg.a_end * min(1.0, (k + 1) / method.rounds / max(method.rise, 1e-9))
        old = meter.watch(copy.deepcopy(student).requires_grad_(False))
        *_, x = dtm.sample(old, blank, MASK, generator=noise)
        r = maze.reward(x)
        u = torch.rand(len(x), generator=noise, device=device)
        start, stop = meter.spent, total * (k + 1) / method.rounds
        weight = r  # read by DMPO alone
        if method.objective == "dmpo":
            weight = dmpo_round(old, reference, x, r, a, method.baseline, noise)
        while meter.spent < stop:
            i = torch.randperm(len(x), generator=noise, device=device)[: cfg.batch]
            part = (meter.spent - start) / (stop - start)
            drawn = (x[i], r[i], r[i] - r.mean())
            batch = Batch(net, old, reference, *drawn, a, noise, u[i], part, weight[i])
            loss = OBJECTIVES[method.objective](batch)
            lab.take_step(optimiser, loss, method.lr * (1 - meter.spent / total))
        seconds += time.perf_counter() - clock
        if (k + 1) % max(1, method.rounds // 16) == 0:
            yield Look(a, student, meter.spent, seconds)


def run_method(cfg: lab.Config, method: Method, base: dict, device: str) -> dict:
    """A row of the table, as `maze_lab.run_arm`."""
    maze = lab.make_maze(cfg, base["seed"])
    net = base["net"].to(device)
    judge = FrontierJudge(maze, lab.tabulate(net, maze.L), cfg.a_end)
    trace = []
    if method.arm is None:
        for look in compete(method, cfg, maze, net, base["seed"]):
            trace.append(judge.measure(lab.tabulate(look.student, maze.L), look.a))
            trace[-1] |= {"evaluations": look.evaluations, "seconds": look.seconds}
    else:
        cfg = replace(cfg, lr=method.lr)
        schedule = lab.make_schedule(method.arm, cfg, judge)
        phases = lab.tilt(net, maze, method.arm, cfg, schedule, base["seed"])
        for _, record in lab.follow(phases, judge):
            share = (len(trace) + 1) / method.arm.phases
            trace.append(record | {"evaluations": round(share * budget(cfg, maze.L))})
    return lab.make_row(method.name, base["seed"], trace)


# ---- 6. Table, figure, command ------------------------------------------------------------------
COLUMNS = {
    "kl": "KL(A||theta)",
    "kl_reverse": "KL(theta||A)",
    "frontier": "to frontier",
    "reward": "reward",
    "success": "success",
    "modes": "eff. paths",
    "seconds": "seconds",
}


def draw(result: dict, path: Path) -> Path:
    """Left: how far each method ends from the target. Right: what its reward costs in KL."""
    plt = lab.pyplot()
    figure, (dots, plane) = plt.subplots(1, 2, figsize=(8.8, 4.4), layout="constrained")
    methods, a_end = lab.by_arm(result), result["config"]["a_end"]
    for place, rows in enumerate(methods.values()):
        colour = lab.COLOURS[place % len(lab.COLOURS)]
        each = [row["kl_reverse"] for row in rows]
        dots.plot(each, [place] * len(each), ".", color=colour, alpha=0.5)
        keys = ("kl_reverse", "kl_base", "reward")
        mean, *spot = [lab.mean_and_error(rows, key)[0] for key in keys]
        dots.plot(mean, place, "|", ms=14, mew=2.5, color=colour)
        plane.plot(*spot, "o", color=colour)
        plane.annotate(f" {place + 1}", spot, color=colour, va="center")
    for base in result["bases"]:
        values = torch.tensor(base["reward_law"]["values"]).double()
        p = torch.tensor(base["reward_law"]["p"]).double()
        tilts = [dtm.exact_tilt(p, values, a_end * (i / 20) ** 2) for i in range(41)]  # to 4 A
        costs = [lab.kl(tilt, p) for tilt in tilts]
        plane.plot(costs, [(tilt @ values).item() for tilt in tilts], "k-", lw=0.8)
    dots.set_yticks(range(len(methods)), [f"{k} {name}" for k, name in enumerate(methods, 1)])
    dots.set(xscale="log", xlabel="KL(rho_theta || rho_A), nats")
    dots.invert_yaxis()
    plane.set_xlim(left=0.9 * min(row["kl_base"] for row in result["rows"]))
    plane.set_ylim(0.9 * min(row["reward"] for row in result["rows"]), 1.02)
    plane.set(xlabel="KL to the base, nats; line: the tilts", ylabel="expected reward")
    ends = {name: lab.mean_and_error(rows, "kl_reverse")[0] for name, rows in methods.items()}
    first, second = sorted(ends, key=ends.get)[:2]
    figure.suptitle(f"Least KL(rho_theta || rho_A): '{first}', then '{second}'")
    return lab.save_figure(figure, path)


def main() -> None:
    about = "c-DTM and its rivals at equal evaluations: 3200 steps, a learning rate a method."
    parser = lab.make_parser(about, without=("phases",))
    cfg, seeds, args = lab.read_settings(parser, preset={"steps": 3200})
    file = args.out / ("quick_rivals.json" if args.quick else "rivals.json")
    if args.plot_only:
        lab.redraw(parser, args, draw)
        return
    methods = [replace(method, lr=args.lr or method.lr) for method in METHODS]
    least = 2 * max(method.rounds for method in methods)
    if cfg.rollouts < least:
        parser.error(f"{least // 2} rounds need at least {least} --rollouts")
    result = lab.experiment(cfg, methods, seeds, args, run_method)
    print(lab.format_table(result, COLUMNS))
    lab.save_result(file, result)
    print("wrote", file, draw(result, file.with_suffix(".png")))


if __name__ == "__main__":
    main()
