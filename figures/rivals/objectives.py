"""The objectives of the rivals, and ours for comparison: each one maps a Batch to its loss.

A policy gradient needs the likelihood of a whole sequence, which a masked diffusion model does not
have. The methods differ in what replaces it, and in what keeps them close to the base model. The
formulas are those of the public code where there is any; each docstring says what we changed. What
concerns prompts, end tokens and blocks is left out, because the maze has none of them. All paths of
a round form one group.

ANCHORS. Each docstring names the distribution at which the method ends if it converges, where 1/a
weights the KL to the base:
    tilt          rho_a ~ rho_0 e^{a r}, if the replacement is the log-likelihood
    of states     pi(v|xt) ~ pi_0(v|xt) e^{a E[r | xt, v]} at the states that the method sees. In a
                  state it ignores the KL that later states will cost.
    rational      p ~ p_0 / (const - a r) at the states that the method sees. This is the optimum of
                  e^d - d - 1 as a loss, and it never concentrates like a tilt.
    none          the method stops where all rewards of a group are equal

CONTENTS   1 likelihoods and masks   2 a batch   3 clipped ratios   4 without an anchor
           5 anchored at the tilt   6 GDSD   7 DMPO
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

import dtm
from dtm import check, upcast
from maze_lab import MASK, LearnedC, V


# ---- 1. Likelihoods and masks -------------------------------------------------------------------
def sequence_law(model: Callable, x: Tensor, mask_id: int) -> Tensor:
    """Return rho_theta of the sequences x (n, L), float64 (n,), on the CPU, differentiable.

    This is (D11) of dtm.py along the 2^L ways to know some of the positions of x, for a vocabulary
    of any size. States that several sequences share are evaluated once.
    """
    n, L = x.shape
    device, x = x.device, x.cpu()
    known = dtm.all_sequences(2, L).bool()  # (2^L, L)
    xt = torch.where(known[:, None], x, mask_id)  # (2^L, n, L)
    xt, which = xt.flatten(0, 1).unique(dim=0, return_inverse=True)
    logits = torch.cat([model(rows.to(device)).cpu() for rows in xt.split(2**14)])
    p = logits.double().softmax(-1)[which]  # (2^L n, L, V)
    p = p.gather(-1, x.repeat(len(known), 1)[..., None]).view(len(known), n, L)
    flows = [[] for _ in known]  # flows[s] lists what reaches the states that know the positions s
    flows[0].append(p.new_ones(n))
    for s, keep in enumerate(known[:-1]):
        reach = torch.stack(flows[s]).sum(0)
        hidden = (~keep).nonzero()[:, 0].tolist()
        for i in hidden:
            flows[s + 2 ** (L - 1 - i)].append(reach * p[s, :, i] / len(hidden))
    return torch.stack(flows[-1]).sum(0)


def hidden_logs(model: Callable, x: Tensor, mask: Tensor) -> Tensor:
    """Return log pi(x_i | x with the mask) at the masked positions, and 0 elsewhere.

    x is (B, L). The mask is (..., B, L), any number of masks per row, and so is the result.
    """
    xt = torch.where(mask, MASK, x)  # (..., B, L)
    log_p = model(xt.flatten(0, -2)).log_softmax(-1).view(*xt.shape, -1)
    return log_p.gather(-1, x.expand(xt.shape)[..., None])[..., 0] * mask


def elbo(model: Callable, x: Tensor, mask: Tensor) -> Tensor:
    """Return the bound (D6) of log rho(x), (..., B), estimated at each mask (..., B, L)."""
    return x.shape[1] * hidden_logs(model, x, mask).sum(-1) / mask.sum(-1)


def random_masks(x: Tensor, n: int, noise: Generator) -> Tensor:
    """Return n masks per row, (n, B, L), each of k ~ U{1..L} random positions."""
    return torch.stack([dtm.mask_random(x, MASK, noise)[1] for _ in range(n)])


def split_masks(x: Tensor, pairs: int, noise: Generator) -> Tensor:
    """Return masks and their complements, (2 pairs, B, L), as GDSD and ESPO draw them.

    The sizes are spread evenly over 0..L: with one k ~ U{0..L} per batch, row b masks
    k + b (L + 1)/B positions, modulo L + 1. A mask and a complement may be empty.
    Source: GaryBall/GDSD and ML-GSAI/ESPO.
    """
    B, L = x.shape
    masks = []
    for _ in range(pairs):
        first = torch.randint(L + 1, (1,), generator=noise, device=x.device)
        steps = torch.arange(B, device=x.device) * (L + 1) / B
        count = (first + steps.round().long()) % (L + 1)  # (B,)
        masks += with_complement(x, count[:, None], noise)
    return torch.stack(masks)


def proper_split_masks(x: Tensor, pairs: int, noise: Generator) -> Tensor:
    """Return masks of k ~ U{1..L-1} positions and their complements, (2 pairs, B, L).

    None is empty, so none is full. This is how a public port of TraFL reads the paper's pairs of
    1 to L masked positions.
    """
    B, L = x.shape
    masks = []
    for _ in range(pairs):
        count = torch.randint(1, L, (B, 1), generator=noise, device=x.device)
        masks += with_complement(x, count, noise)
    return torch.stack(masks)


def with_complement(x: Tensor, count: Tensor, noise: Generator) -> list[Tensor]:
    """Return a mask (B, L) of count (B, 1) random positions, and its complement."""
    mask = dtm.ranks(torch.rand(x.shape, generator=noise, device=x.device)) < count
    return [mask, ~mask]


# ---- 2. A batch ---------------------------------------------------------------------------------
@dataclass
class Batch:
    """An objective gets B of a round's n paths, and the networks."""

    net: Callable  # the student
    old: Callable  # the student at the start of the round, which drew x
    base: Callable
    x: Tensor  # (B, L) paths
    r: Tensor  # (B,) rewards
    advantage: Tensor  # (B,) r minus the mean of the round's rewards
    a: float  # the target's tilt in this round; 1/a weights the KL to the base
    h: float  # the step of the tilt that this round adds
    noise: Generator
    start: Tensor  # (B,) a uniform number per path, drawn once per round
    spread: float  # the standard deviation of the round's rewards
    count: int  # n
    progress: float = 0.0  # of the round: 0 in its first step, 1 in its last
    log_old: Tensor | None = None  # (B,) what Method.measure returned for the round, if the
    log_base: Tensor | None = None  # method needs it: bounds (D6) under `old` and under `base`
    weight: Tensor | None = None  # (B,) what Method.prepare returned for the round
    extra: Callable | None = None  # a network that the objective trains beside the student

    @property
    def leave_one_out(self) -> Tensor:
        """r minus the mean reward of the other paths; `advantage` is (1 - 1/n) times as large."""
        return self.advantage * self.count / (self.count - 1)


# ---- 3. Clipped ratios: diffu-GRPO and UniGRPO --------------------------------------------------
def kl_estimate(log_base: Tensor, log_now: Tensor, estimator: str) -> Tensor:
    """Return a term for each drawn token that estimates KL(theta || base).

    With d = log_base - log_now, k3 has this KL as its mean and k2 has it nearly. As losses on fixed
    samples they differ:
        "k3"   e^d - d - 1    its mean gradient is that of KL(base || theta); optimum "rational"
        "k2"   d^2 / 2        its mean gradient is that of KL(theta || base); optimum "of states"
    """
    d = log_base - log_now
    if estimator == "k3":
        return d.exp() - d - 1
    check(estimator == "k2", f"kl_estimate: the estimator {estimator!r} is neither 'k2' nor 'k3'")
    return d.square() / 2


def ppo_gain(log_now: Tensor, log_old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Return PPO's min(ratio A, clamp(ratio) A)."""
    ratio = (log_now - log_old).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def clipped_loss(
    b: Batch, mask: Tensor, advantage: Tensor, *, clip: float, estimator: str, beta: float
) -> Tensor:
    """Return minus the clipped gain of each token, plus beta times its KL estimate to the base.

    All networks see the same mask.
    """
    now = hidden_logs(b.net, b.x, mask)
    old = hidden_logs(b.old, b.x, mask)
    base = hidden_logs(b.base, b.x, mask)
    gain = ppo_gain(now, old, advantage[:, None], clip)
    gain = gain - beta * kl_estimate(base, now, estimator)
    return -dtm.mean_over_masked(gain[mask], mask)


def diffu_grpo(b: Batch) -> Tensor:
    """diffu-GRPO masks the whole path, so it trains only the first guess at each position.

    It uses k3 with beta = 0.04. Anchor: rational. Source: dllm-reasoning/d1.
    """
    mask = torch.ones_like(b.x, dtype=torch.bool)
    return clipped_loss(b, mask, b.advantage, clip=0.5, estimator="k3", beta=0.04)


def diffu_grpo_k2(b: Batch) -> Tensor:
    """diffu-GRPO with k2 and beta = 1/a, our change. Anchor: of states, at the one it sees."""
    mask = torch.ones_like(b.x, dtype=torch.bool)
    return clipped_loss(b, mask, b.advantage, clip=0.5, estimator="k2", beta=1 / b.a)


def uni_grpo(b: Batch) -> Tensor:
    """UniGRPO divides the advantages by their standard deviation and trains at growing masks.

    MMaDA's text names neither the estimator nor its coefficient. k3, beta = 0.01 and clip = 0.2 are
    those of a re-implementation, facebookresearch/igpo; Gen-Verse/dLLM-RL takes the old policy as
    the reference. We average over the tokens of each path, where igpo pools all tokens.
    Anchor: rational.
    """
    advantage = b.advantage / (b.spread + 1e-4)
    return clipped_loss(b, growing_mask(b), advantage, clip=0.2, estimator="k3", beta=0.01)


def uni_grpo_k3_at_tilt(b: Batch) -> Tensor:
    """UniGRPO with beta = 1/a in units of its advantage, our change. Anchor: rational."""
    return uni_grpo_at_tilt(b, "k3")


def uni_grpo_k2(b: Batch) -> Tensor:
    """UniGRPO with beta = 1/a and k2, our change. Anchor: of states."""
    return uni_grpo_at_tilt(b, "k2")


def uni_grpo_at_tilt(b: Batch, estimator: str) -> Tensor:
    scale = 1 / (b.spread + 1e-4)
    settings = {"clip": 0.2, "estimator": estimator, "beta": scale / b.a}
    return clipped_loss(b, growing_mask(b), scale * b.advantage, **settings)


def growing_mask(b: Batch) -> Tensor:
    """Return UniGRPO's mask (B, L).

    The probability of a mask grows over the round, from each path's own start to 1. A row that
    would mask nothing masks the position with its smallest noise.
    """
    L = b.x.shape[1]
    start = (b.start * L).floor()  # (B,)
    share = (b.progress * (L - start) + start).floor() / L
    noise = torch.rand(b.x.shape, generator=b.noise, device=b.x.device)
    return (noise < share[:, None]) | (noise == noise.amin(1, keepdim=True))


# ---- 4. Without an anchor: wd1, SPG, JustGRPO ---------------------------------------------------
def wd1(b: Batch) -> Tensor:
    """wd1 weights each path by softmax(advantage) - softmax(-advantage), and masks the whole path.

    The variant with a reference policy differs in who draws the paths, see `Method.mix`. The public
    code of that variant stops with an error, and we repaired it. Anchor: none.
    Source: xiaohangt/wd1.
    """
    logs = hidden_logs(b.net, b.x, torch.ones_like(b.x, dtype=torch.bool)).sum(1)
    weight = b.advantage.softmax(0) - (-b.advantage).softmax(0)
    return -(weight * logs).sum()


def spg(b: Batch) -> Tensor:
    """SPG scores good paths by a lower bound, and bad paths by its mean with an upper bound.

    Both are per token, with mixture 0.5, m = 2 masks and beta = 1.5. The authors' code does not
    weight the masks by their size, so neither is a bound there or here. Anchor: none.
    Source: facebookresearch/SPG.
    """
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
    """Return log pi(x_t | x before t), (B, L), with all later positions masked.

    Their sum is the exact log-likelihood of a left-to-right sampler. It takes L passes per path.
    """
    L = x.shape[1]
    hidden = torch.ones(L, L, dtype=torch.bool, device=x.device).triu()  # row t masks t, t+1, ...
    logs = hidden_logs(model, x, hidden[:, None].expand(L, *x.shape))  # (L, B, L)
    return logs.diagonal(dim1=0, dim2=2)


def just_grpo(b: Batch) -> Tensor:
    """JustGRPO is REINFORCE on the left-to-right likelihood, a mean over paths with an advantage.

    Its authors take one step per round, so that the ratio is 1 and the clip never acts. Here a
    round has about three steps, still without a ratio. Anchor: none. Source: LeapLabTHU/JustGRPO.
    """
    advantage = b.advantage / (b.spread + 1e-4)
    counted = (b.advantage != 0).sum().clamp_min(1)
    logs = left_to_right_logs(b.net, b.x).mean(1)
    return -(advantage * logs).sum() / counted


# ---- 5. Anchored at the tilt: ESPO, TraFL, REINFORCE --------------------------------------------
def espo(b: Batch) -> Tensor:
    """ESPO clips the ratio of the bounds (D6) of whole paths, and adds k2 of their KL to the base.

    It uses two pairs of complementary masks. We set beta = 1/a. Anchor: tilt.
    Source: ML-GSAI/ESPO.
    """
    L = b.x.shape[1]
    masks = split_masks(b.x, 2, b.noise)
    now, old, base = [split_elbo(model, b.x, masks) for model in (b.net, b.old, b.base)]
    gain = ppo_gain(now / L, old / L, b.leave_one_out, clip=0.2)
    return (kl_estimate(base, now, "k2") / (b.a * L) - gain).mean()


def split_elbo(model: Callable, x: Tensor, masks: Tensor) -> Tensor:
    """Return an unbiased estimate of the bound (D6) of log rho(x), (B,), from `split_masks`.

    As k ~ U{0..L}, the sum at a mask of size k is weighted by (L + 1)/k. An empty mask counts 0.
    """
    logs = hidden_logs(model, x, masks).sum(-1)  # (n, B)
    return (x.shape[1] + 1) * (logs / masks.sum(-1).clamp_min(1)).mean(0)


def trajectory_balance(b: Batch, now: Tensor, base: Tensor) -> Tensor:
    """Return the mean of ((log p - log p_0 - a A)/L + z)^2, with the best z of each batch.

    All residuals are equal only at the tilt. With prompts z(q) is a small network that is learned;
    here it would be one number.
    """
    residual = (now - base - b.a * b.leave_one_out.to(now.device)) / b.x.shape[1]
    return (residual - residual.mean().detach()).square().mean()


def trafl(b: Batch) -> Tensor:
    """TraFL is trajectory balance with the bound (D6), at two pairs of complementary masks.

    beta = a/(L (1 - 1/G)) for a group of G paths. Anchor: tilt, except at the fully masked state,
    which these pairs never show. Source: arXiv 2605.13935 and two public ports, as there is no code
    by its authors.
    """
    masks = proper_split_masks(b.x, 2, b.noise)
    now, base = [elbo(model, b.x, masks).mean(0) for model in (b.net, b.base)]
    return trajectory_balance(b, now, base)


def trafl_exact(b: Batch) -> Tensor:
    """TraFL with the exact log-likelihood, which takes 2^L states per path (ours). Anchor: tilt."""
    x, which = b.x.cpu().unique(dim=0, return_inverse=True)
    x = x.to(b.x.device)
    now = sequence_law(b.net, x, MASK).log()[which]
    base = sequence_law(b.base, x, MASK).log()[which]
    return trajectory_balance(b, now, base)  # float64, on the CPU


def elbo_reinforce(b: Batch) -> Tensor:
    """REINFORCE with the bound (D6) in place of the log-likelihood (ours). Anchor: tilt.

    One mask gives the score, and another one the KL to the base, so that their errors do not
    correlate.
    """
    masks = random_masks(b.x, 2, b.noise)
    with torch.no_grad():
        gain = b.r - (elbo(b.net, b.x, masks[0]) - elbo(b.base, b.x, masks[0])) / b.a
    return -((gain - gain.mean()) * elbo(b.net, b.x, masks[1])).mean()


def exact_reinforce(b: Batch) -> Tensor:
    """REINFORCE with the exact log-likelihood, which takes 2^L states per path (ours).

    Ratios to the policy that drew the paths are clamped at 2. At the optimum all gains are equal.
    Anchor: tilt.
    """
    x, which, count = b.x.cpu().unique(dim=0, return_inverse=True, return_counts=True)
    r = b.r.new_zeros(len(x), device="cpu").scatter(0, which, b.r.cpu())
    x = x.to(b.x.device)
    log_now, log_old, log_base = [
        sequence_law(model, x, MASK).log() for model in (b.net, b.old, b.base)
    ]
    gain = r - (log_now.detach() - log_base) / b.a
    ratio = (log_now.detach() - log_old).exp().clamp(max=2)
    p = (count / count.sum()) * ratio
    return -(p * (gain - p @ gain / p.sum()) * log_now).sum()


# ---- 6. GDSD ------------------------------------------------------------------------------------
def gdsd(b: Batch, psi: float = 10.0, beta: float = 1e-3, clip: float = 4e-4) -> Tensor:
    """GDSD regresses the sum of the logs at two complementary masks, halved, on the advantage.

    The settings are those of the authors' code for GSM8K, by its trainer without TLC; their
    checkpoints come from the trainer with TLC, whose sum is ESPO's bound. The clamp lets the sum
    move by 4e-4 before the gradient ends, and beta anchors it at a tilt of 2 psi K/beta = 40,000
    for K = 2 masks. Anchor: none within reach. Source: GaryBall/GDSD.
    """
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
    """GDSD's regression as a public note describes it, at one state per path.

    It asks for log pi - log pi_old = h A - const(xt, i). A small network learns the constant, where
    the note centres over the vocabulary, which moves the optimum. The pull to the base is left out.
    The least-squares solution is pi ~ pi_old e^{h E[A | xt, v]}, an Euler step of the exact tilt.
    Anchor: tilt, as h -> 0.
    """
    mask = random_masks(b.x, 1, b.noise)[0]
    moved = hidden_logs(b.net, b.x, mask) - hidden_logs(b.old, b.x, mask)
    constant = b.extra(torch.where(mask, MASK, b.x))
    residual = moved - b.h * b.advantage[:, None] + constant
    return dtm.mean_over_masked(residual.square(), mask)


class StateConstants(nn.Module):
    """A constant (B, L) for each position of a state, by the network of the lab's learned c."""

    lr = 2e-3

    def __init__(self, L: int):
        super().__init__()
        self.net = LearnedC(L, torch.device("cpu")).net

    def forward(self, xt: Tensor) -> Tensor:
        return self.net(nn.functional.one_hot(xt, V + 1).flatten(1).float())


# ---- 7. DMPO (yuchen-zhu-zyc/DMPO 96af1a4) ------------------------------------------------------
def antithetic_masks(x: Tensor, noise: Generator) -> Tensor:
    """Return DMPO's four masks per path, (4, B, L): two masks and their complements.

    Each position is masked with its row's probability .1 + .9 u, where u ~ U(0, 1). A mask and a
    complement may be empty.
    """
    masks = []
    for _ in range(2):
        uniform = torch.rand(x.shape, generator=noise, device=x.device)
        u = torch.rand(len(x), 1, generator=noise, device=x.device)
        masks.append(uniform < 0.1 + 0.9 * u)
    return torch.stack([*masks, *[~mask for mask in masks]])


def dmpo(b: Batch) -> Tensor:
    """DMPO is a cross-entropy with the weights (D10), summed over the batch.

    It takes four masks per path, and an empty mask counts 0. Anchor: tilt with the weights u, and
    none with u - v.
    """
    masks = antithetic_masks(b.x, b.noise)  # (4, B, L)
    logs = hidden_logs(b.net, b.x, masks).sum(-1) / masks.sum(-1).clamp_min(1)  # (4, B)
    return -(b.weight * logs.mean(0)).sum()


def dmpo_u(b: Batch) -> Tensor:
    """Return the weights u (n,) of a round, without DMPO's baseline."""
    return dmpo_weights(b.r, b.log_old, b.log_base, alpha=1 / b.a)[0]


def dmpo_u_minus_v(b: Batch) -> Tensor:
    """Return the weights u - v (n,) of a round, as the authors' code does."""
    u, v = dmpo_weights(b.r, b.log_old, b.log_base, alpha=1 / b.a)
    return u - v


def dmpo_weights(
    r: Tensor, log_old: Tensor, log_base: Tensor, *, alpha: float
) -> tuple[Tensor, Tensor]:
    """Return DMPO's weights u and v for one group of G paths, (G,) each.

        D = log_base - log_old,    u = softmax(D + r/alpha),    v = softmax(D - r/alpha)     (D10)

    r, log_old and log_base (G,) are the rewards, and the log-likelihoods under the model that drew
    the paths and under the base. With exact log-likelihoods u is rho_0 e^{r/alpha} / rho_old,
    normalized over the group. In practice the bounds (D6) replace them.
    """
    d = upcast(log_base) - upcast(log_old)
    return (d + upcast(r) / alpha).softmax(-1), (d - upcast(r) / alpha).softmax(-1)


def bounds_of_round(b: Batch) -> list[Tensor]:
    """Return the bounds (D6) under the old model and the base, (n,) each, at the same four masks.

    Where a mask is empty, the full mask replaces it.
    """
    masks = antithetic_masks(b.x, b.noise)
    masks |= ~masks.any(-1, keepdim=True)
    return [elbo(model, b.x, masks).mean(0) for model in (b.old, b.base)]
