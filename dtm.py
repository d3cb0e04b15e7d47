"""Discrete Tilt Matching (arXiv 2604.18739): the mathematics, one idea per function, torch only.

A masked diffusion language model writes a sequence by unmasking it position by position. DTM tunes it to a
reward r without sequence likelihoods: it moves the model through tilted laws in small steps h, each step
a weighted cross-entropy at partly masked states.

GLOSSARY     shape      meaning                                                         place
V, L                    number of tokens; length of a completion (a prompt is the model's business)
x1           (B, L)     finished sequences, drawn from rho_a                            setting
xt, mask     (B, L)     x1 with some positions replaced by MASK; the positions to train
rho_a(x)     (V**L,)    law of the sequences at tilt a: rho_a ~ rho_0 e^{a r}           tilt, (D1)
pi_a(v|xt,i) (.., V)    unmasking posterior P(x1_i = v | xt) under rho_a                Prop 3.3, (D2)
pi_theta                the student, softmax(logits); pi_a: the frozen teacher, softmax(logits_a)
r, h, w      (B,)       reward; tilt increment; weight w = e^{h r(x1)}, Z = E_a[w]      (D1)
e            (.., V)    the one-hot vector of x1_i (never built)
c            as x1      control-variate weight of c-DTM, a scalar or one per position   Prop 3.3, (D3)

THE ALGORITHM (`maze_lab.py` and `llada_finetune.py` run it)
1. start at a = 0 with teacher = student = the base model
2. draw x1 from the teacher (`sample`), score it, weigh it by w = e^{h r} (`tilt_weight`)
3. mask it (`mask_random` or `mask_blockwise`)
4. step on `row_mean` of `c_dtm_loss`, student and teacher logits at the masked positions
5. repeat 2-4 for a phase's budget, then a <- a + h and teacher <- student
6. stop at a = a_end (`phases`; `next_h` lets h set itself)

THE MODEL PROTOCOL of every function here: model(xt, where=None) returns logits (B, L, V), or, given a
boolean (B, L) mask, those positions' logits (M, V) in row-major order, so that the head runs only where
it is needed. For the oracles MASK = V, sequences are base-V numbers, most significant digit first, and laws
are flat (V**L,). Half precision is reduced in float32, float64 in float64. Bad input raises ValueError.
Equations (D1).. are numbered by this file; names such as Prop 3.3 are the paper's.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor

_wide = lambda x: x if x.dtype == torch.float64 else x.float()

def _need(ok: bool | Tensor, message: str) -> None:
    if not ok:
        raise ValueError(message)

# ---- 1. The tilt ---------------------------------------------------------------------------------
def tilt_weight(r: Tensor, h: float, normalize: bool = False, group: Tensor | None = None) -> Tensor:
    """The weight w (B,) that carries rho_a to rho_{a+h}, for rewards r (B,).
        rho_{a+h}(x) = rho_a(x) e^{h r(x)} / Z,    Z = E_a[e^{h r}]                             (D1)

    `normalize` divides by the batch mean, or by the mean over each prompt's completions if `group` (B,) holds
    prompt ids. E[w] per prompt moves no minimiser (its estimate does, by O(1/completions)), and with E[w] = 1
    the constant c = 1 is near the best at every h; raw weights outgrow it, and raise when they overflow.
    """
    s = h * _wide(torch.as_tensor(r))
    _need(s.isfinite().all(), "tilt_weight: h * r is not finite; check the rewards and h")
    _need(normalize or s.exp().isfinite().all(), f"tilt_weight: e^(h r) overflows {s.dtype}; lower h or pass normalize=True")
    if not normalize:
        return s.exp()
    ids, which = (torch.zeros_like(s) if group is None else group).unique(return_inverse=True)
    _need(which.shape == s.shape, f"tilt_weight: group {tuple(which.shape)} must match r {tuple(s.shape)}")
    top = s.new_full(ids.shape, -torch.inf).scatter_reduce(0, which.flatten(), s.flatten(), "amax")
    w = (s - top[which]).exp()
    return w / s.new_zeros(ids.shape).scatter_reduce(0, which.flatten(), w.flatten(), "mean", include_self=False)[which]

# ---- 2. The loss ---------------------------------------------------------------------------------
def _checked(logits: Tensor, logits_a: Tensor, x1: Tensor, w: Tensor, c: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """The boundary check of the loss family; returns w and c as constants of the graph."""
    _need(logits.shape == logits_a.shape and logits.shape[:-1] == x1.shape, "expected logits and logits_a (..., V), x1 (...);"
          f" got {tuple(logits.shape)}, {tuple(logits_a.shape)}, {tuple(x1.shape)}")
    w, c = (torch.as_tensor(t, dtype=_wide(logits).dtype, device=logits.device).detach() for t in (w, c))
    for name, t in (("w", w), ("c", c)):
        fits = t.dim() <= x1.dim() and all(a in (1, b) for a, b in zip(t.shape[::-1], x1.shape[::-1]))
        _need(fits, f"{name} {tuple(t.shape)} does not broadcast to x1 {tuple(x1.shape)}; a value per row needs [:, None]")
        _need(t.isfinite().all(), f"{name} must be finite")
    _need(((x1 >= 0) & (x1 < logits.shape[-1])).all(), f"x1 must hold tokens below V = {logits.shape[-1]}; is a mask left?")
    return w, c

def c_dtm_loss(logits: Tensor, logits_a: Tensor, x1: Tensor, w: Tensor, c: Tensor | float = 1.0) -> Tensor:
    """c-DTM (Prop 3.3): a weighted cross-entropy whose minimiser is the tilted posterior.

        pi_{a+h}(v|xt,i) = E_a[w 1{x1_i = v} | xt] / E_a[w | xt]          the posterior identity  (D2)
        T(v) = c pi_a(v) + (w - c) 1{x1_i = v},   loss = - sum_v T(v) log pi_theta(v)             (D3)
    logits, logits_a (..., V), x1 (...) integer, w and c broadcastable to x1; returns the loss (...).
    Call it on dense (B, L, V) or, far cheaper, on gathered masked positions (M, V) with w (M,).
    Why c is free: pi_a is the posterior of e, so E_a[e - pi_a | xt] = 0 and E_a[T | xt] = E_a[w e | xt], (D2)
    times Z(xt). c moves the variance alone and may depend on (xt, i), not on x1_i. This needs exact draws x1
    (`sample`, per_step=1, temperature 1), masks blind to token values, and the teacher that drew x1.
    If w < c (say r < 0 at c = 1) a sampled token's weight is negative and that sample's loss unbounded below,
    though not the mean: shift r to be >= 0 (a tilt ignores constants) or lower c.
    Official: yuyuanchen0/dtm lightning_module.py l.476-486 (901c244), the same value from a dense one-hot.
    """
    w, c = _checked(logits, logits_a, x1, w, c)
    hit, base = _log_likelihoods(logits, logits_a, x1)
    return -(c * base + (w - c) * hit)

def _log_likelihoods(logits: Tensor, logits_a: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """log pi_theta(x1_i) and E_{v ~ pi_a} log pi_theta(v), each (...): no second (..., V) target needed."""
    logits = _wide(logits)
    lse = logits.logsumexp(-1)
    hit = logits.gather(-1, x1[..., None].long())[..., 0]
    base = (_wide(logits_a.detach()).softmax(-1) * logits).sum(-1)
    return hit - lse, base - lse

def etm_loss(logits: Tensor, logits_a: Tensor, x1: Tensor, r: Tensor, h: float) -> Tensor:
    """Explicit tilt matching: (D3) to first order in h; r (...) broadcasts like w.
        T = pi_a + h r (e - pi_a),   which is (D3) at w = 1 and c = 1 - h r                        (D4)
    Minimiser: pi_a + h Cov_a(r, e | xt), one Euler step of the tilt, off by O(h^2)."""
    hr = h * torch.as_tensor(r, dtype=_wide(logits).dtype, device=logits.device)
    return c_dtm_loss(logits, logits_a, x1, torch.ones_like(hr), 1 - hr)

def self_consistent_loss(logits: Tensor, logits_a: Tensor, x1: Tensor, w: Tensor, c: Tensor | float = 1.0) -> Tensor:
    """The fixed-point form with a stop-gradient sg; shapes as `c_dtm_loss`, c > 0.
        E_a[w (e - pi_{a+h}) | xt] = 0   gives   T = pi_a + (w / c - 1)(e - sg pi_theta)           (D5)
    Sample by sample its logit gradient is 1/c times that of `c_dtm_loss`: only the printed value differs."""
    w, c = _checked(logits, logits_a, x1, w, c)
    _need((c > 0).all(), "self_consistent_loss: c must be positive")
    (hit, base), (_, own) = _log_likelihoods(logits, logits_a, x1), _log_likelihoods(logits, logits, x1)
    return -(base + (w / c - 1) * (hit - own))

def row_mean(loss: Tensor, mask: Tensor) -> Tensor:
    """Mean over each row's trained positions, then over rows; loss dense (B, L) or gathered (M,), mask (B, L).

    One L-th part of the order-agnostic likelihood bound, as the number k of masks is uniform on 1..L:
        L E_k E_mask[(1/k) sum_{i masked} -log pi_theta(x_i|xt)]  >=  -log rho_theta(x)            (D6)"""
    count, loss = mask.sum(-1, keepdim=True), loss[mask] if loss.shape == mask.shape else loss
    _need((count > 0).all(), "row_mean: a row has no masked position, hence no loss; drop that row")
    share = (1 / (count * len(mask)).to(_wide(loss).dtype)).expand(mask.shape)[mask]
    _need(loss.shape == share.shape, f"row_mean: loss {tuple(loss.shape)} does not fit {len(share)} masked positions")
    return (loss * share).sum()

# ---- 3. The control variate ----------------------------------------------------------------------
def state_c_target(logits: Tensor, logits_a: Tensor, x1: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Regression target y and weight q, each (...), of the best state-dependent c. Not in the paper.
    The logit gradient of (D3) is g = w (pi_theta - e) + c (e - pi_a). Its mean is free of c, so the best
    c(xt, i) minimises E|g|^2, a parabola in c:
        E|g|^2 = E[q (c - y)^2] + const,   q = |e - pi_a|^2,   y = w (e - pi_theta).(e - pi_a) / q
        c*(xt, i) = E[q y | xt, i] / E[q | xt, i]                                                  (D7)
    At theta = a (pass logits_a twice) y = w: c* = E[w |e - pi_a|^2 | xt, i] / E[|e - pi_a|^2 | xt, i].
    A small net learns it from (q * (c - y)**2).mean() on the same batches; a bad fit costs variance alone.
    """
    w, _ = _checked(logits, logits_a, x1, w)
    p, p_a = (_wide(t.detach()).softmax(-1) for t in (logits, logits_a))
    hit, hit_a = (t.gather(-1, x1[..., None].long())[..., 0] for t in (p, p_a))
    q = (1 - 2 * hit_a + p_a.square().sum(-1)).clamp_min(1e-12)  # both dot products without building e
    return w * (1 - hit - hit_a + (p * p_a).sum(-1)) / q, q

def best_c(logits: Tensor, logits_a: Tensor, x1: Tensor, w: Tensor, share: Tensor | float = 1.0) -> Tensor:
    """The scalar c* that minimises the variance of the logit gradient of sum share * loss (`row_mean`: 1/k).
        c* = sum share^2 q y / sum share^2 q    with q, y of (D7)                                  (D8)
    On its own batch c* correlates with e and biases the gradient by O(1/batch): use earlier batches' c*."""
    y, q = state_c_target(logits, logits_a, x1, w)
    return (share**2 * q * y).sum() / (share**2 * q).sum()

# ---- 4. Annealing --------------------------------------------------------------------------------
def next_h(r: Tensor, ess: float, h_max: float, p: Tensor | None = None) -> float:
    """The largest h <= h_max whose weights keep an effective sample size >= ess, as a share of the sample.
        ESS(h) = (E e^{h r})^2 / E e^{2 h r}                                                       (D9)
    r (n,): the teacher's rewards; p (n,): their probabilities when r lists outcomes, not draws. Bisection, as
    log ESS = 2 k(h) - k(2h) falls in h: the cumulant function k of r is convex."""
    _need(0 < ess <= 1 and h_max >= 0 and r.numel() and r.isfinite().all(),
          f"next_h: needs 0 < ess <= 1 (got {ess:g}), h_max >= 0 (got {h_max:g}) and finite rewards")
    r = r.detach().double().flatten().cpu()
    log_p = -torch.full_like(r, len(r)).log() if p is None else p.detach().double().flatten().cpu().log()
    low, high, mid = 0.0, float(h_max), float(h_max)
    for _ in range(60):  # the first trial is h_max itself
        log_ess = 2 * (log_p + mid * r).logsumexp(0) - (log_p + 2 * mid * r).logsumexp(0)
        low, high = (mid, high) if log_ess.exp() >= ess else (low, mid)
        mid = (low + high) / 2
    return low

def phases(a_end: float, h: float | Callable[[float], float]) -> Iterator[tuple[float, float]]:
    """Yields (a, h) from a = 0 until a + h = a_end, the last h shortened; h is fixed or a rule h(a)."""
    a = 0.0
    while a < a_end * (1 - 1e-9):
        step = min(float(h(a) if callable(h) else h), a_end - a)
        _need(step > 1e-9 * a_end, f"phases: the step {step:g} at a = {a:g} does not lead to a_end = {a_end:g}")
        yield a, step
        a += step

# ---- 5. Interpolants: x1 -> xt, blind to token values --------------------------------------------
def _ranks(score: Tensor) -> Tensor:
    """The rank of each entry in its row, the largest first."""
    return score.argsort(-1, descending=True).argsort(-1)

def _noise(x1: Tensor, mask_id: int, generator: Generator | None) -> Tensor:
    _need(x1.dim() == 2 and x1.shape[1] > 0, f"x1 must be (B, L) with L >= 1, got {tuple(x1.shape)}")
    _need((x1 != mask_id).all(), f"x1 already holds the mask id {mask_id}; finish the sequences first")
    return torch.rand(x1.shape, generator=generator, device=x1.device)

def mask_random(x1: Tensor, mask_id: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
    """xt, mask (B, L): per row k ~ U{1..L} positions at random, the states of random-order unmasking."""
    noise = _noise(x1, mask_id, generator)
    mask = _ranks(noise) <= torch.randint(x1.shape[1], (len(x1), 1), generator=generator, device=x1.device)  # k - 1
    return torch.where(mask, mask_id, x1), mask

def mask_blockwise(x1: Tensor, mask_id: int, block: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
    """Semi-autoregressive xt, mask (B, L), as in the official lightning_module.py: k ~ U{1..L} tokens to go.

    The last (k-1)//block blocks are masked; the one before, the active block, has (k-1) % block + 1 random
    masks, which `mask` marks; earlier blocks are clean."""
    noise, L = _noise(x1, mask_id, generator), x1.shape[1]
    _need(block > 0 and L % block == 0, f"mask_blockwise: the block {block} must divide the length {L}")
    k = torch.randint(L, (len(x1), 1), generator=generator, device=x1.device)  # k - 1
    place, active = torch.arange(L, device=x1.device) // block, L // block - 1 - k // block
    mask = _ranks(noise.masked_fill(place != active, -1)) <= k % block
    return torch.where(mask | (place > active), mask_id, x1), mask

def mask_bernoulli(x1: Tensor, mask_id: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
    """xt, mask (B, L): DMPO's states, each position masked with its row's chance .1 + .9 u, u ~ U(0, 1), at least one."""
    noise, u = _noise(x1, mask_id, generator), torch.rand(len(x1), 1, generator=generator, device=x1.device)
    mask = (noise < 0.1 + 0.9 * u) | (noise == noise.amin(1, keepdim=True))
    return torch.where(mask, mask_id, x1), mask

# ---- 6. Sampling: xt -> x1 -----------------------------------------------------------------------
def _draw(logits: Tensor, temperature: float, generator: Generator | None) -> Tensor:
    """Tokens (M,) ~ softmax(logits / temperature) by Gumbel-max. Never in bfloat16: its noise ends at 5.5,
    where 11.7 is the usual maximum at V = 126,464, and temperature 1 becomes a truncated law."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = _wide(logits) / temperature
    return (logits - torch.empty_like(logits).exponential_(generator=generator).log()).argmax(-1)

@torch.no_grad()
def sample(model: Callable, xt: Tensor, mask_id: int, order: str = "random", block: int | None = None, per_step: int = 1,
           temperature: float = 1.0, generator: Generator | None = None, steps: int | None = None,
           ban_mask: bool = True) -> Iterator[Tensor]:
    """Unmasks xt (B, L); yields every canvas, xt first, the finished sample last.

    order     "random": positions at random; with per_step=1 an exact draw from rho_theta
              "state": highest top probability first, drawn once chosen; a consistent model keeps its law
              "confidence": draw everywhere, commit the draws of highest (noise-free, untempered)
              probability, which sharpens the law. Reference: ML-GSAI/LLaDA generate.py
    block     decode blocks of this many positions from left to right (None: all at once)
    per_step  tokens a step and row; or `steps` a block: M masks as M//steps, the first M mod steps one more
    ban_mask  never draw mask_id (False: a position that draws it stays masked, as in the reference)
    The host reads one number a block (how many steps it takes), and nothing inside a step.
    """
    _need(order in ("random", "state", "confidence"), f"sample: order {order!r} is not random, state or confidence")
    block, place = xt.shape[1] if block is None else block, torch.arange(xt.shape[1], device=xt.device)
    _need(min(per_step, block, 1 if steps is None else steps) >= 1 and temperature >= 0,
          f"sample: per_step {per_step}, block {block}, steps {steps} must be >= 1, temperature {temperature} >= 0")
    yield xt
    for start in range(0, xt.shape[1], block):
        inside = (place >= start) & (place < start + block)
        left = ((xt == mask_id) & inside).sum(1, keepdim=True)
        for s in range(min(steps or len(place), -(-int(left.max()) // (1 if steps else per_step)))):
            quota = per_step if steps is None else left // steps + (s < left % steps)
            where = masked = (xt == mask_id) & inside
            if order == "random":  # known before the model runs: its head sees these positions only
                noise = torch.rand(xt.shape, generator=generator, device=xt.device)
                where = masked & (_ranks(noise.masked_fill(~masked, -1)) < quota)
            commit, logits = where, model(xt, where)
            if ban_mask and 0 <= mask_id < logits.shape[-1]:
                logits = logits.clone()
                logits[:, mask_id] = -torch.inf
            token = _draw(logits, temperature, generator)
            if order != "random":
                p = _wide(logits).softmax(-1)
                sure = p.amax(-1) if order == "state" else p.gather(-1, token[:, None])[:, 0]
                commit = masked & (_ranks(p.new_full(xt.shape, -1).masked_scatter(masked, sure)) < quota)
            xt = torch.where(commit, xt.masked_scatter(where, token), xt)
            yield xt

# ---- 7. The sibling: DMPO (yuchen-zhu-zyc/DMPO 96af1a4) ------------------------------------------
def dmpo_weights(r: Tensor, log_cur: Tensor, log_pre: Tensor, alpha: float, c: float = 1.0, s: float = 1.0,
                 baseline: str = "neg", log_theta: Tensor | None = None) -> Tensor:
    """Weights (..., G) of a prompt's G completions, from rewards and log-likelihoods (..., G).
        D = log_pre - log_cur,   u = softmax_G(c (D + r / alpha)),   v = softmax_G(c (D - r / alpha))
        "none" u | "mean" u - 1/G | "unbiased" u - softmax_G(log_theta - log_cur) | "neg" u - s v (D10)
    cur drew the completions, pre is the base, theta the student; in practice the bounds (D6) stand in for
    log-likelihoods. With exact ones u is rho_0 e^{r/alpha} / rho_cur, normalised: tilt 1/alpha in one jump."""
    _need(r.shape == log_cur.shape == log_pre.shape, "dmpo_weights: r, log_cur, log_pre must share a shape (..., G)")
    _need(alpha > 0 and (baseline != "unbiased" or log_theta is not None), "dmpo_weights: alpha <= 0, or no log_theta")
    r, d = _wide(r), _wide(log_pre) - _wide(log_cur)
    u, v = (c * (d + r / alpha)).softmax(-1), (c * (d - r / alpha)).softmax(-1)
    now = (_wide(log_cur if log_theta is None else log_theta) - _wide(log_cur)).softmax(-1)
    less = {"none": 0, "mean": 1 / r.shape[-1], "unbiased": now, "neg": s * v}
    _need(baseline in less, f"dmpo_weights: baseline {baseline!r} is not one of {', '.join(less)}")
    return u - less[baseline]

def dmpo_loss(logits: Tensor, x1: Tensor, weight: Tensor) -> Tensor:
    """-weight log pi_theta(x1_i), shapes as `c_dtm_loss`: (D3) at c = 0. DMPO sums over rows, `row_mean` does not."""
    weight, _ = _checked(logits, logits, x1, weight)
    return -weight * _wide(logits).log_softmax(-1).gather(-1, x1[..., None].long())[..., 0]

# ---- 8. Exact oracles for small V and L; MASK = V ------------------------------------------------
def all_sequences(V: int, L: int, device: torch.device | str | None = None) -> Tensor:
    """(V**L, L): every sequence, in the order of the flat laws."""
    return torch.cartesian_prod(*[torch.arange(V, device=device)] * L).view(-1, L)

def _worth(V: int, L: int, device: torch.device) -> Tensor:
    """(L,): what a digit is worth among masked states, which are base-(V + 1) numbers."""
    return (V + 1) ** torch.arange(L - 1, -1, -1, device=device)

class Table(torch.nn.Module):
    """A model whose logits ((V+1)**L, L, V) stand in a learnable table over all masked states."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, xt: Tensor, where: Tensor | None = None) -> Tensor:
        L, V = self.logits.shape[1:]
        state = (xt * _worth(V, L, xt.device)).sum(-1, keepdim=True).expand_as(xt)
        place = torch.arange(L, device=xt.device).expand_as(xt)
        return self.logits[state, place] if where is None else self.logits[state[where], place[where]]

def exact_marginal(model: Callable, V: int, L: int, device: torch.device | str | None = None,
                   choose: Callable | None = None) -> Tensor:
    """rho_theta (V**L,), float64, differentiable: the law of `sample` in random order, one token a step.
        reach(all masked) = 1;   reach(xt with x_i = v) += reach(xt) pi_theta(v|xt,i) / k         (D11)
    with k the masks of xt: dynamic programming over masked states, from k = L down to none. For other orders
    choose(pi (n, k, V)) gives the chance that the i-th masked position is the next one and becomes v."""
    states = all_sequences(V + 1, L, device)
    k = (states == V).sum(1)
    reach = (k == L).double()
    for level in range(L, 0, -1):
        for number in (k == level).nonzero()[:, 0].split(2**14):
            where = states[number] == V
            p = model(states[number], where).double().softmax(-1).view(-1, level, V)
            p = (p / level if choose is None else choose(p)).flatten(0, 1)  # (M, V)
            row, place = where.nonzero(as_tuple=True)
            child = number[row, None] + (torch.arange(V, device=device) - V) * _worth(V, L, device)[place, None]
            reach = reach.index_add(0, child.flatten(), (reach[number[row], None] * p).flatten())
    return reach[k == 0]

def state_choice(p: Tensor) -> Tensor:
    """`exact_marginal`'s choose, (n, k, V) both, for order="state": the most certain position, then a draw there."""
    return p * torch.nn.functional.one_hot(p.amax(-1).argmax(-1), p.shape[1])[..., None]

def confidence_choice(p: Tensor) -> Tensor:
    """For order="confidence": position i becomes v if it draws v and all others draw tokens less likely than that."""
    below = (p[:, None, None] * (p[:, None, None] < p[..., None, None])).sum(-1)  # (n, i, v, j)
    return p * below.masked_fill(torch.eye(p.shape[1], dtype=torch.bool, device=p.device)[:, None], 1).prod(-1)

def sequence_law(model: Callable, x: Tensor, mask_id: int) -> Tensor:
    """rho_theta (n,) of given sequences x (n, L), float64 on the CPU, differentiable, at any V: (D11) along the 2^L ways
    to know part of x. A state that several sequences share is evaluated once."""
    known = all_sequences(2, x.shape[1], x.device).bool()
    xt, which = torch.where(known[:, None], x, mask_id).flatten(0, 1).unique(dim=0, return_inverse=True)
    logits = torch.cat([model(part).cpu() for part in xt.split(2**14)])
    p = logits.double().softmax(-1)[which.cpu()].gather(-1, x.cpu().repeat(len(known), 1)[..., None]).view(len(known), *x.shape)
    flows = [[p.new_ones(len(x))]] + [[] for _ in known[1:]]
    for s, keep in enumerate(known[:-1]):  # flows[s]: what reaches the states that know this part
        reach, hidden = torch.stack(flows[s]).sum(0), (~keep).nonzero()[:, 0].tolist()
        for i in hidden:
            flows[s + 2 ** (x.shape[1] - 1 - i)].append(reach * p[s, :, i] / len(hidden))
    return torch.stack(flows[-1]).sum(0)

def exact_tilt(rho: Tensor, r: Tensor, a: float) -> Tensor:
    """rho_a ~ rho e^{a r} (D1), float64; rho and r (V**L,)."""
    _need(rho.shape == r.shape, f"exact_tilt: rho {tuple(rho.shape)} and r {tuple(r.shape)} must share a shape")
    return (rho.double().log() + a * r.double()).softmax(0)

def exact_posterior(rho: Tensor, xt: Tensor) -> Tensor:
    """pi(v|xt,i) (B, L, V) under the law rho (V**L,), float64; xt (B, L). NaN where rho never reaches xt.
    Appending to each axis of rho its sum tabulates P(xt) for every masked state; (D2) is their ratio."""
    L, V = xt.shape[1], round(len(rho) ** (1 / xt.shape[1]))
    _need(V**L == len(rho), f"exact_posterior: {len(rho)} probabilities are not V**{L} for any V")
    P = rho.double().view((V,) * L)
    for axis in range(L):
        P = torch.cat([P, P.sum(axis, keepdim=True)], axis)
    worth, v = _worth(V, L, xt.device), torch.arange(V, device=xt.device)
    here = (xt * worth).sum(-1)[:, None, None]
    joint = P.flatten()[here + torch.where(xt == V, worth, 0)[..., None] * (v - V)]
    return torch.where((xt[..., None] == V) | (xt[..., None] == v), joint, 0) / P.flatten()[here]

def regret_bound(model: Callable, rho: Tensor, r: Tensor, h: float, V: int) -> tuple[Tensor, Tensor]:
    """KL(rho_{a+h} || rho_theta) <= (L(theta) - L(theta*)) / Z: both sides, exact float64 scalars.
    L(theta) is L times the row mean of (D3) over x1 ~ rho = rho_a under `mask_random`, theta* the exact
    posteriors of rho_{a+h}. As E[T | xt] = Z(xt) pi_{a+h}, the right side is
        E_{xt ~ rho_{a+h}}[(L / k) sum_{i masked} KL(pi_{a+h}(.|xt,i) || pi_theta(.|xt,i))]        (D12)
    the gap of (D6). Tight when all orders give a sequence the same probability (a consistent model)."""
    L, rho = round(math.log(len(rho), V)), exact_tilt(rho, r, h)
    x, bound = all_sequences(V, L, rho.device), 0.0
    for mask in all_sequences(2, L, rho.device)[1:].bool():
        xt = torch.where(mask, V, x)
        pi, k = exact_posterior(rho, xt)[:, mask], int(mask.sum())
        kl = (torch.xlogy(pi, pi) - pi * model(xt)[:, mask].double().log_softmax(-1)).sum((1, 2))
        bound = bound + torch.where(rho > 0, rho * kl, 0).sum() / (k * math.comb(L, k))
    return torch.xlogy(rho, rho / exact_marginal(model, V, L, rho.device)).sum(), bound

# ---- 9. `python dtm.py`: one tilt of a tabular model ---------------------------------------------
def main() -> None:
    V, L, h, g = 3, 3, 3.0, Generator().manual_seed(0)
    rho, r = torch.randn(V**L, generator=g).double().softmax(0), torch.rand(V**L, generator=g).double()
    rho_h, w = exact_tilt(rho, r, h), tilt_weight(r, h) / (rho * tilt_weight(r, h)).sum()  # so that Z = 1
    teacher = Table(exact_posterior(rho, all_sequences(V + 1, L)).log().clamp_min(-70))
    # Every (x1, mask) of the training law once, with its chance and its weights in the row mean.
    sets, x = all_sequences(2, L)[1:].bool(), all_sequences(V, L)
    n, mask = torch.arange(V**L).repeat(len(sets)), sets.repeat_interleave(V**L, 0)
    xt, share = torch.where(mask, V, x[n]), mask / mask.sum(1, keepdim=True)
    chance = 1 / (L * torch.tensor([math.comb(L, int(k)) for k in mask.sum(1)]).double()[:, None])
    number = lambda xt: (xt * _worth(V, L, xt.device)).sum(1)
    total = lambda t: torch.zeros((V + 1) ** L, *t.shape[1:], dtype=rho.dtype).index_add(0, number(xt), t)
    y, q = state_c_target(teacher(xt), teacher(xt), x[n], w[n, None])
    qy, q = (total(rho[n, None] * chance * share**2 * t) for t in (q * y, q))
    exact = total((chance * share * rho_h[n, None])[..., None] * (teacher(xt).softmax(-1) - exact_posterior(rho_h, xt)))
    print(f"A tilt h = {h:g} of a law on {V}^{L} sequences: gradients at theta = teacher, by enumeration; KL after 60 Adam "
          "steps of 128\nsamples, mean of 5 runs\n        c | gap of mean gradient | gradient variance | KL(rho_h || rho_theta) <= regret / Z")
    for name, c in {"0": 0, "0.5": 0.5, "1": 1, "2": 2, "c*": qy.sum() / q.sum(), "c*(xt,i)": qy / q.clamp_min(1e-30)}.items():
        c, logits, sides = c + 0 * q, teacher(xt).detach().requires_grad_(), torch.zeros(2)
        (share * c_dtm_loss(logits, teacher(xt), x[n], w[n, None], c[number(xt)])).sum().backward()
        mean = total((rho[n, None] * chance)[..., None] * logits.grad)
        variance = (rho[n, None] * chance * logits.grad.square().sum(-1)).sum() - mean.square().sum()
        for seed in range(5):
            g, student = Generator().manual_seed(seed), Table(teacher.logits.detach().clone())
            optimiser = torch.optim.Adam(student.parameters(), 0.05)
            for i in rho.multinomial(60 * 128, True, generator=g).split(128):
                zt, m = mask_random(x[i], V, g)
                optimiser.zero_grad()
                row_mean(c_dtm_loss(student(zt), teacher(zt), x[i], w[i, None], c[number(zt)]), m).backward()
                optimiser.step()
            sides += torch.stack(regret_bound(student, rho, r, h, V)).detach() / 5
        print(f"{name:>9} | {(mean - exact).abs().max():20.0e} | {variance:17.4f} | {sides[0]:22.5f} <= {sides[1]:.5f}")


if __name__ == "__main__":
    main()
