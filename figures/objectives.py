"""The rivals' objectives, and ours for comparison: likelihoods, states, estimators, losses.

A policy gradient needs the likelihood of a whole sequence, which a masked diffusion model does not
have. The methods differ in what stands in for it, and in what keeps them near the base.
`figures/rivals.py` runs them. Formulas are those of the public code where there is any, and what we
changed is said at each; what a prompt, an end token or a block would do falls away, for the maze
has none. All of a round's paths are one group.

ANCHORS. What a method converges to if it converges, with the KL to the base weighed by 1/a:
    tilt         rho_a ~ rho_0 e^{a r}, as far as its stand-in is the log-likelihood
    of states    pi(v|xt) ~ pi_0(v|xt) e^{a E[r | xt, v]} at the states it sees: ignores, in a
                 state, the KL still to be paid in later ones
    rational     p ~ p_0 / (const - a r): the optimum of e^d - d - 1 used as a loss, which never
                 concentrates like a tilt; at the states it sees
    none         it stops where all rewards of a group are the same

CONTENTS   1 likelihoods and states   2 a batch   3 clipped ratios   4 without an anchor
           5 anchored at the tilt   6 GDSD   7 DMPO   8 the list
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

import dtm
from dtm import check, wide
from maze_lab import MASK, LearnedC, V


# ---- 1. Likelihoods and states ------------------------------------------------------------------
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
    """log pi(x_i | x without mask), float, of the shape of mask (..., B, L): any number of masks
    for each row of x (B, L); 0 at the visible positions."""
    xt = torch.where(mask, MASK, x)  # (..., B, L)
    log_p = model(xt.flatten(0, -2)).log_softmax(-1).view(*xt.shape, -1)
    return log_p.gather(-1, x.expand(xt.shape)[..., None])[..., 0] * mask


def elbo(model: Callable, x: Tensor, mask: Tensor) -> Tensor:
    """The bound (D6) of log rho(x), (..., B), estimated at each mask (..., B, L)."""
    return x.shape[1] * hidden_logs(model, x, mask).sum(-1) / mask.sum(-1)


def random_masks(x: Tensor, n: int, noise: Generator) -> Tensor:
    """n masks (n, B, L) a row, each of k ~ U{1..L} positions."""
    return torch.stack([dtm.mask_random(x, MASK, noise)[1] for _ in range(n)])


def split_masks(x: Tensor, pairs: int, noise: Generator) -> Tensor:
    """(2 pairs, B, L): masks and their complements, the states of GDSD and ESPO (GaryBall/GDSD,
    ML-GSAI/ESPO). Sizes are spread evenly over 0..L: with one k ~ U{0..L} a batch, row b hides
    k + b (L + 1)/B positions, modulo L + 1. Either half may be empty."""
    B, L = x.shape
    masks = []
    for _ in range(pairs):
        first = torch.randint(L + 1, (1,), generator=noise, device=x.device)
        steps = torch.arange(B, device=x.device) * (L + 1) / B
        count = (first + steps.round().long()) % (L + 1)  # (B,)
        masks += with_complement(x, count[:, None], noise)
    return torch.stack(masks)


def proper_split_masks(x: Tensor, pairs: int, noise: Generator) -> Tensor:
    """(2 pairs, B, L): masks of k ~ U{1..L-1} positions and their complements, neither empty, so
    none is full: how a public port of TraFL reads the paper's pairs of 1 to L hidden positions."""
    B, L = x.shape
    masks = []
    for _ in range(pairs):
        count = torch.randint(1, L, (B, 1), generator=noise, device=x.device)
        masks += with_complement(x, count, noise)
    return torch.stack(masks)


def with_complement(x: Tensor, count: Tensor, noise: Generator) -> list[Tensor]:
    """A mask (B, L) of count (B, 1) random positions, and its complement."""
    mask = dtm.ranks(torch.rand(x.shape, generator=noise, device=x.device)) < count
    return [mask, ~mask]


# ---- 2. A batch ---------------------------------------------------------------------------------
@dataclass
class Batch:
    """What an objective is given: B paths of a round's n, and the networks, each metered."""

    net: Callable  # the student
    old: Callable  # the student at the start of the round, which drew x
    base: Callable
    x: Tensor  # (B, L) paths
    r: Tensor  # (B,) rewards
    advantage: Tensor  # (B,) r less the mean of the round's rewards
    a: float  # the target's tilt in this round: 1/a weighs the KL to the base
    h: float  # how much of it the round adds
    noise: Generator
    start: Tensor  # (B,) a uniform number of each path, drawn once a round
    progress: float  # of the round: 0 in its first step, 1 in its last
    spread: float  # standard deviation of the round's rewards
    count: int  # n, the paths of the round
    weight: Tensor | None = None  # (B,) of DMPO
    extra: Callable | None = None  # what an objective learns beside the student, see EXTRAS

    @property
    def leave_one_out(self) -> Tensor:
        """(B,) r less the mean of the others: `advantage` is (1 - 1/n) times as large."""
        return self.advantage * self.count / (self.count - 1)


# ---- 3. Clipped ratios: diffu-GRPO and UniGRPO --------------------------------------------------
def kl_estimate(log_base: Tensor, log_now: Tensor, estimator: str) -> Tensor:
    """Of KL(theta || base), a term for each drawn token, d = log_base - log_now.

    k3 has its mean, k2 nearly; as a *loss* on fixed samples they differ:
        "k3"   e^d - d - 1    mean gradient of KL(base || theta); optimum "rational"
        "k2"   d^2 / 2        mean gradient of KL(theta || base); optimum "of states"
    """
    d = log_base - log_now
    if estimator == "k3":
        return d.exp() - d - 1
    check(estimator == "k2", f"kl_estimate: {estimator!r} is neither 'k2' nor 'k3'")
    return d.square() / 2


def ppo_gain(log_now: Tensor, log_old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's min(ratio A, clamp(ratio) A)."""
    ratio = (log_now - log_old).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def clipped_loss(
    b: Batch, mask: Tensor, advantage: Tensor, clip: float, estimator: str, beta: float
) -> Tensor:
    """Clipped token ratios and beta times the KL to the base, at the same mask for all networks."""
    now = hidden_logs(b.net, b.x, mask)
    old = hidden_logs(b.old, b.x, mask)
    base = hidden_logs(b.base, b.x, mask)
    gain = ppo_gain(now, old, advantage[:, None], clip)
    gain = gain - beta * kl_estimate(base, now, estimator)
    return -dtm.row_mean(gain[mask], mask)


def diffu_grpo(b: Batch) -> Tensor:
    """d1 (dllm-reasoning/d1): all of the path is hidden, so it sees the first guesses only. Its
    k3 with its beta of .04. Anchor: rational."""
    mask = torch.ones_like(b.x, dtype=torch.bool)
    return clipped_loss(b, mask, b.advantage, clip=0.5, estimator="k3", beta=0.04)


def diffu_grpo_k2(b: Batch) -> Tensor:
    """diffu-GRPO with k2 and 1/a; our change. Anchor: of states, of the one it sees."""
    mask = torch.ones_like(b.x, dtype=torch.bool)
    return clipped_loss(b, mask, b.advantage, clip=0.5, estimator="k2", beta=1 / b.a)


def uni_grpo(b: Batch) -> Tensor:
    """UniGRPO after MMaDA's text, which names neither the estimator nor its coefficient: k3, beta
    .01 and clip .2 are those of a re-implementation, facebookresearch/igpo; Gen-Verse/dLLM-RL has
    the old policy for reference. Advantages over their standard deviation; a mean of each path's
    tokens, where igpo pools them. Anchor: rational."""
    advantage = b.advantage / (b.spread + 1e-4)
    return clipped_loss(b, growing_mask(b), advantage, clip=0.2, estimator="k3", beta=0.01)


def uni_grpo_k3_at_tilt(b: Batch) -> Tensor:
    """UniGRPO with 1/a, in units of its advantage, for beta; our change. Anchor: rational."""
    return uni_grpo_at_tilt(b, "k3")


def uni_grpo_k2(b: Batch) -> Tensor:
    """The same with k2; our change. Anchor: of states."""
    return uni_grpo_at_tilt(b, "k2")


def uni_grpo_at_tilt(b: Batch, estimator: str) -> Tensor:
    scale = 1 / (b.spread + 1e-4)
    settings = {"clip": 0.2, "estimator": estimator, "beta": scale / b.a}
    return clipped_loss(b, growing_mask(b), scale * b.advantage, **settings)


def growing_mask(b: Batch) -> Tensor:
    """UniGRPO's states (B, L): a mask's chance grows over a round, from a path's own start to 1. A
    row that would mask nothing masks the position of its least noise."""
    L = b.x.shape[1]
    start = (b.start * L).floor()  # (B,)
    share = (b.progress * (L - start) + start).floor() / L
    noise = torch.rand(b.x.shape, generator=b.noise, device=b.x.device)
    return (noise < share[:, None]) | (noise == noise.amin(1, keepdim=True))


# ---- 4. Without an anchor: wd1, SPG, JustGRPO ---------------------------------------------------
def wd1(b: Batch) -> Tensor:
    """wd1 (xiaohangt/wd1): weights softmax(advantage) - softmax(-advantage); d1's one state. With
    its reference policy it differs in who draws the paths, see `rivals.Method.mix`; the public code
    of that does not run, and is repaired here. Anchor: none."""
    logs = hidden_logs(b.net, b.x, torch.ones_like(b.x, dtype=torch.bool)).sum(1)
    weight = b.advantage.softmax(0) - (-b.advantage).softmax(0)
    return -(weight * logs).sum()


def spg(b: Batch) -> Tensor:
    """SPG (facebookresearch/SPG, mixture .5, m = 2, beta 1.5): after a lower bound for good paths,
    after its mean with an upper bound for bad ones, each per token; as shipped, without weights for
    a mask's size, neither is a bound. Anchor: none."""
    beta = 1.5
    masks = random_masks(b.x, 2, b.noise)  # (2, B, L)
    logs = hidden_logs(b.net, b.x, masks)
    share = masks.float().mean(-1, keepdim=True)
    seen = masks.any(0)
    lower = (logs.sum(-1) / masks.sum(-1)).mean(0)
    power = (masks * (beta * logs).exp() / share).mean(0)
    upper = torch.where(seen, power, 1).log().sum(1) / beta / seen.sum(1)
    score = torch.where(b.advantage > 0, lower, (upper + lower) / 2)
    return -(b.advantage * score).mean()


def left_to_right_logs(model: Callable, x: Tensor) -> Tensor:
    """log pi(x_t | x before t), (B, L), all else hidden: their sum is the exact log-likelihood of
    a left-to-right sampler. L passes a path."""
    L = x.shape[1]
    hidden = torch.ones(L, L, dtype=torch.bool, device=x.device).triu()  # row t hides t, t+1, ...
    logs = hidden_logs(model, x, hidden[:, None].expand(L, *x.shape))  # (L, B, L)
    return logs.diagonal(dim1=0, dim2=2)


def just_grpo(b: Batch) -> Tensor:
    """JustGRPO (LeapLabTHU/JustGRPO): REINFORCE on the left-to-right likelihood, a mean over paths
    of nonzero advantage. Its one step a round makes its ratio 1 and its clip idle; here a round has
    about three, and still no ratio. Anchor: none."""
    advantage = b.advantage / (b.spread + 1e-4)
    counted = (b.advantage != 0).sum().clamp_min(1)
    logs = left_to_right_logs(b.net, b.x).mean(1)
    return -(advantage * logs).sum() / counted


# ---- 5. Anchored at the tilt: ESPO, TraFL, REINFORCE --------------------------------------------
def espo(b: Batch) -> Tensor:
    """ESPO (ML-GSAI/ESPO): clipped ratio of the bounds of whole paths, k2 of their difference to
    the base, two pairs of complementary masks. beta = 1/a. Anchor: tilt."""
    L = b.x.shape[1]
    masks = split_masks(b.x, 2, b.noise)
    now, old, base = [split_elbo(model, b.x, masks) for model in (b.net, b.old, b.base)]
    gain = ppo_gain(now / L, old / L, b.leave_one_out, clip=0.2)
    return (kl_estimate(base, now, "k2") / (b.a * L) - gain).mean()


def split_elbo(model: Callable, x: Tensor, masks: Tensor) -> Tensor:
    """The bound (D6) of log rho(x), (B,), from `split_masks` (n, B, L): unbiased, for with k ~
    U{0..L} a mask's sum is weighed by (L + 1)/k, an empty one counts 0, and halves are averaged."""
    logs = hidden_logs(model, x, masks).sum(-1)  # (n, B)
    return (x.shape[1] + 1) * (logs / masks.sum(-1).clamp_min(1)).mean(0)


def trajectory_balance(b: Batch, now: Tensor, base: Tensor) -> Tensor:
    """((log p - log p_0 - a A)/L + z)^2, the z of each batch its best: all residuals are equal at
    the tilt alone. With prompts z(q) is a small net, which is learned; here it would be a number.
    """
    residual = (now - base - b.a * b.leave_one_out) / b.x.shape[1]
    return (residual - residual.mean().detach()).square().mean()


def trafl(b: Batch) -> Tensor:
    """TraFL (arXiv 2605.13935, after two public ports, no code of its authors): trajectory balance
    with the bound, two pairs of complementary masks. beta = a/(L (1 - 1/G)). Anchor: tilt, but for
    the fully masked state, which these pairs never show."""
    masks = proper_split_masks(b.x, 2, b.noise)
    now, base = [elbo(model, b.x, masks).mean(0) for model in (b.net, b.base)]
    return trajectory_balance(b, now, base)


def trafl_exact(b: Batch) -> Tensor:
    """TraFL with the exact log-likelihood, 2^L states a path. Ours. Anchor: tilt."""
    x, which = b.x.unique(dim=0, return_inverse=True)
    now = sequence_law(b.net, x, MASK).log()[which.cpu()]
    base = sequence_law(b.base, x, MASK).log()[which.cpu()]
    return trajectory_balance(b, now.to(b.x.device), base.to(b.x.device))


def elbo_reinforce(b: Batch) -> Tensor:
    """REINFORCE with the bound (D6) for the log-likelihood, in the score and, at another state, in
    the KL to the base. Ours. Anchor: tilt."""
    masks = random_masks(b.x, 2, b.noise)
    with torch.no_grad():
        gain = b.r - (elbo(b.net, b.x, masks[0]) - elbo(b.base, b.x, masks[0])) / b.a
    return -((gain - gain.mean()) * elbo(b.net, b.x, masks[1])).mean()


def exact_reinforce(b: Batch) -> Tensor:
    """REINFORCE with the exact log-likelihood and ratios up to 2, 2^L states a path; at its optimum
    all gains are the same. Ours. Anchor: tilt."""
    x, which, count = b.x.unique(dim=0, return_inverse=True, return_counts=True)
    log_now = sequence_law(b.net, x, MASK).log()
    log_old = sequence_law(b.old, x, MASK).log()
    log_base = sequence_law(b.base, x, MASK).log()
    r = b.r.new_zeros(len(x)).scatter(0, which, b.r).cpu()
    gain = r - (log_now.detach() - log_base) / b.a
    ratio = (log_now.detach() - log_old).exp().clamp(max=2)
    p = (count / count.sum()).cpu() * ratio  # drawn from old: the ratio reweighs
    return -(p * (gain - p @ gain / p.sum()) * log_now).sum()


# ---- 6. GDSD ------------------------------------------------------------------------------------
def gdsd(b: Batch, psi: float = 10.0, beta: float = 1e-3, clip: float = 4e-4) -> Tensor:
    """GDSD as shipped (GaryBall/GDSD, GSM8K's settings; its trainer without TLC, where the released
    checkpoints are TLC's, whose S is ESPO's bound): a regression of the sum S of the logs at two
    complementary masks, halved, on the advantage. The clamp lets S move by 4e-4 before the gradient
    ends, and beta anchors it at a tilt of 2 psi K/beta = 40,000. Anchor: none in reach."""
    L = b.x.shape[1]
    masks = split_masks(b.x, 2, b.noise)
    sums = []
    for model in (b.net, b.old, b.base):
        logs = hidden_logs(model, b.x, masks).sum(-1)  # (4, B)
        sums.append(logs.unflatten(0, (2, 2)).mean(1))  # (2, B)
    now, old, base = sums
    moved = (now - old).clamp(math.log(1 - clip), math.log(1 + clip)) / L
    regression = (moved - psi * b.leave_one_out).square().sum(0).mean()
    return regression + beta / L * kl_estimate(base, now, "k2").mean()


def gdsd_ideal(b: Batch) -> Tensor:
    """GDSD's regression as a public note describes it, at one state a path and without its pull to
    the base: log pi - log pi_old = h A - const(xt, i), the constant a small net's (the note centres
    over the vocabulary, which moves the optimum). Least squares: pi ~ pi_old e^{h E[A | xt, v]}, an
    Euler step of the exact tilt. Anchor: tilt, as h -> 0."""
    mask = random_masks(b.x, 1, b.noise)[0]
    moved = hidden_logs(b.net, b.x, mask) - hidden_logs(b.old, b.x, mask)
    constant = b.extra(torch.where(mask, MASK, b.x))
    residual = moved - b.h * b.advantage[:, None] + constant
    return dtm.row_mean(residual.square(), mask)


class StateConstants(nn.Module):
    """A constant (B, L) for each position of a state, by the net of the lab's learned c."""

    def __init__(self, L: int):
        super().__init__()
        self.net = LearnedC(L, torch.device("cpu")).net

    def forward(self, xt: Tensor) -> Tensor:
        return self.net(nn.functional.one_hot(xt, V + 1).flatten(1).float())


EXTRAS = {"gdsd_ideal": (StateConstants, 2e-3)}  # beside the student, with its learning rate


# ---- 7. DMPO (yuchen-zhu-zyc/DMPO 96af1a4) ------------------------------------------------------
def mask_bernoulli(
    x1: Tensor, mask_id: int, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """xt, mask (B, L): DMPO's states, each position masked with its row's chance .1 + .9 u,
    u ~ U(0, 1); none of them with a chance, too, which counts 0 in its loss."""
    noise = dtm.masking_noise(x1, mask_id, generator)
    u = torch.rand(len(x1), 1, generator=generator, device=x1.device)
    mask = noise < 0.1 + 0.9 * u
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


def antithetic_masks(x: Tensor, noise: Generator, mask_id: int = MASK) -> Tensor:
    """Two pairs of masks (4, B, L): draws of `mask_bernoulli` and their complements; either may be
    empty."""
    masks = [mask_bernoulli(x, mask_id, noise)[1] for _ in range(2)]
    return torch.stack([*masks, *[~mask for mask in masks]])


def dmpo(b: Batch) -> Tensor:
    """DMPO: cross-entropy weighed by (D10), summed over the batch, at its R = 4 states a path.
    Anchor: tilt by u; none by u - v, as shipped."""
    masks = antithetic_masks(b.x, b.noise)  # (4, B, L)
    logs = hidden_logs(b.net, b.x, masks).sum(-1) / masks.sum(-1).clamp_min(1)  # (4, B)
    return -(b.weight * logs.mean(0)).sum()


def dmpo_round(
    old: Callable, base: Callable, x: Tensor, r: Tensor, a: float, baseline: str, noise: Generator
) -> Tensor:
    """DMPO's weights (n,) of a round, one group, from bounds (D6) at the same four masks for both
    models; the other one of its pair stands in for an empty mask, which DMPO counts 0."""
    masks = antithetic_masks(x, noise)
    masks |= ~masks.any(-1, keepdim=True)
    log_old, log_base = [elbo(model, x, masks).mean(0) for model in (old, base)]
    return dmpo_weights(r, log_old, log_base, 1 / a, baseline=baseline)


# ---- 8. The list: each maps a Batch to its loss -------------------------------------------------
OBJECTIVES = {
    "dmpo": dmpo,
    "trafl": trafl,
    "trafl_exact": trafl_exact,
    "espo": espo,
    "gdsd": gdsd,
    "gdsd_ideal": gdsd_ideal,
    "uni_grpo": uni_grpo,
    "uni_grpo_k3_at_tilt": uni_grpo_k3_at_tilt,
    "uni_grpo_k2": uni_grpo_k2,
    "diffu_grpo": diffu_grpo,
    "diffu_grpo_k2": diffu_grpo_k2,
    "wd1": wd1,
    "spg": spg,
    "just_grpo": just_grpo,
    "elbo_reinforce": elbo_reinforce,
    "exact_reinforce": exact_reinforce,
}
