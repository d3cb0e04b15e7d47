"""Discrete Tilt Matching (arXiv 2604.18739): the mathematics, one idea a function, torch only.

A masked diffusion language model writes a sequence by unmasking it position by position. DTM tunes
it to a reward r without sequence likelihoods: it moves the model through tilted laws in small steps
h, and each step is a weighted cross-entropy at partly masked states.

GLOSSARY      shape      meaning                                                     place
V, L, k, M               vocabulary; completion length (no prompt); masks in a row, in the batch
x1            (B, L)     finished sequences, drawn from rho_a
xt, mask      (B, L)     a state: x1 with some positions replaced by MASK; mask: those to train
rho_a(x)      (V**L,)    law of the sequences at tilt a, proportional to rho_0 e^{a r}         (D1)
pi_a(v|xt,i)  (..., V)   unmasking posterior P(x1_i = v | xt) under rho_a            Prop 3.3, (D2)
logits        (..., V)   the student's: softmax pi_theta, law rho_theta; logits_a: the teacher's
e             (..., V)   the one-hot vector of x1_i (never built)
r, h          (B,), one  reward; tilt increment, from a to a + h
w             (B,)       weight e^{h r(x1)}; Z = E_a[w], Z(xt) = E_a[w|xt]; E_a: mean under rho_a
c             as x1      control-variate weight, a number or one a position          Prop 3.3, (D3)

THE ALGORITHM (`tilt` of maze_lab.py and `train` of llada_finetune.py run it)
1. start at a = 0 with teacher = student = the base model
2. draw x1 from the teacher (`sample`), score it, weigh it by w = e^{h r} (`tilt_weight`)
3. mask it (`mask_random` or `mask_blockwise`)
4. step on `mean_over_masked` of `c_dtm_loss`, with student and teacher logits at the masked positions
5. after a phase's budget of steps: a <- a + h, teacher <- student, and again from 2
6. stop at a = a_end (`phases`; `next_h` lets the rewards choose h)

THE MODEL PROTOCOL: model(xt, where=None) returns logits (B, L, V), or, given a boolean (B, L) mask,
those positions' logits (M, V) in row-major order. For the oracles MASK = V, sequences are base-V
numbers, most significant digit first, and laws are flat (V**L,). Half precision is reduced in
float32, float64 in float64. What is bad or not finite raises ValueError. (D1), (D2), ... are
numbered here, (D10) in figures/objectives.py; Prop 3.3 is the paper's number.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor

Numbers = Tensor | float  # one number, or one a row or position
Pair = tuple[Tensor, Tensor]
Noise = Generator | None
Device = torch.device | str | None
ORDERS = ("random", "top_prob", "low_confidence")  # of decoding, see `sample`


def upcast(x: Tensor) -> Tensor:
    """float64 stays; everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def check(ok: bool | Tensor, message: str) -> None:
    if not ok:
        raise ValueError(message)


def finite(x: Tensor, name: str) -> Tensor:
    """x, checked, as it is smaller than the logits: one of -inf would put 0 * -inf into a loss."""
    why = "NaN, inf or huge numbers came in, or no position; ban a token by -1e4, not by -inf"
    check(x.isfinite().all(), f"{name}: the result is not finite: {why}")
    return x


# ---- 1. The tilt --------------------------------------------------------------------------------
def tilt_weight(r: Tensor, h: float, normalize: bool = False, group: Tensor = None) -> Tensor:
    """The weight w (B,) that carries rho_a to rho_{a+h}, for rewards r (B,).
        rho_{a+h}(x) = rho_a(x) e^{h r(x)} / Z,    Z = E_a[e^{h r}]                          (D1)
    normalize: divide by the batch mean or, with group (B,) of prompt ids, by each prompt's mean.
    Not in the paper. Dividing by a prompt's E[w] moves no minimiser (its estimate does, by
    O(1/completions)). With E[w] = 1, c = 1 is near the best at moderate h; raw w outgrow it."""
    log_w = h * upcast(torch.as_tensor(r))
    check(log_w.isfinite().all(), "tilt_weight: h * r is not finite; check the rewards and h")
    if normalize:
        return normalized_exp(log_w, torch.zeros_like(log_w) if group is None else group)
    overflow = f"tilt_weight: e^(h r) overflows {log_w.dtype}; lower h or pass normalize=True"
    check(log_w.exp().isfinite().all(), overflow)
    return log_w.exp()


def normalized_exp(log_w: Tensor, group: Tensor) -> Tensor:
    """e^log_w over its mean, in each group; a group's largest log_w is taken out before exp."""
    check(group.shape == log_w.shape, f"tilt_weight: group {[*group.shape]} must match r")
    ids, which = group.unique(return_inverse=True)
    out = log_w.new_zeros(ids.shape)
    top = out.scatter_reduce(0, which.flatten(), log_w.flatten(), "amax", include_self=False)
    w = (log_w - top[which]).exp()
    mean = out.scatter_reduce(0, which.flatten(), w.flatten(), "mean", include_self=False)
    return w / mean[which]


# ---- 2. The loss --------------------------------------------------------------------------------
def c_dtm_loss(logits: Tensor, logits_a: Tensor, x1: Tensor, w: Tensor, c: Numbers = 1.0) -> Tensor:
    """c-DTM (Prop 3.3): a weighted cross-entropy whose minimiser is the tilted posterior.
        pi_{a+h}(v|xt,i) = E_a[w 1{x1_i = v} | xt] / E_a[w | xt]      posterior identity     (D2)
        T(v) = c pi_a(v) + (w - c) 1{x1_i = v},    loss = - sum_v T(v) log pi_theta(v)       (D3)

    logits, logits_a  (..., V)  student, teacher; dense (B, L, V) or, far cheaper, gathered (M, V)
    x1                (...)     finished tokens, integer
    w, c              broadcast to x1, constants of the graph; returns the loss (...)

    Why c is free: given xt, e has mean pi_a, so E_a[T | xt] = E_a[w e | xt], which is (D2) times
    Z(xt). c moves the variance alone, and may depend on (xt, i) but on nothing of x1 behind the
    masks. A free c asks for exact draws x1 (see `sample`), masks blind to token values, and a
    consistent teacher: pi_a is the posterior of the law that drew x1. A net's conditionals are
    never quite those of one law: c = 0 still tilts the rollouts' law exactly, c > 0 adds a pull
    c (pi_a - that law's posterior), a bias (`python dtm.py` shows it). For c >= 0 one sample's loss
    is unbounded below iff T(x1_i) < 0: w < c (1 - pi_a(x1_i)). Its mean given xt is bounded below
    for a consistent teacher, but not over a finite buffer. r >= 0 (a tilt ignores constants), raw w
    and 0 <= c <= 1 keep T >= 0.
    Official: yuyuanchen0/dtm lightning_module.py l.476-486 (901c244), same value, dense one-hot."""
    w, c = constants(logits, logits_a, x1, w, c)
    logits = upcast(logits)
    log_z = logits.logsumexp(-1)  # (...)  log pi_theta(v) = logits_v - log_z
    hit = logits.gather(-1, x1[..., None].long())[..., 0] - log_z  # (...)  log pi_theta(x1_i)
    pi_a = upcast(logits_a.detach()).softmax(-1)  # (..., V)
    base = (pi_a * logits).sum(-1) - log_z  # (...)  E_{v ~ pi_a} log pi_theta(v)
    return finite(-(c * base + (w - c) * hit), "c_dtm_loss")  # (D3)


def constants(logits: Tensor, logits_a: Tensor, x1: Tensor, w: Tensor, c: Numbers = 1.0) -> Pair:
    """w and c as constants of the graph, once the input of a loss has been checked."""
    shapes = f"{tuple(logits.shape)}, {tuple(logits_a.shape)}, {tuple(x1.shape)}"
    fits = logits.shape == logits_a.shape and logits.shape[:-1] == x1.shape
    check(fits, f"expected logits and logits_a (..., V), x1 (...); got {shapes}")
    V = logits.shape[-1]
    check(((x1 >= 0) & (x1 < V)).all(), f"x1 must hold tokens below V = {V}; is a mask left?")
    dtype = torch.promote_types(logits.dtype, torch.float32)  # that of `upcast`, without its copy
    w = torch.as_tensor(w, dtype=dtype, device=logits.device).detach()
    c = torch.as_tensor(c, dtype=dtype, device=logits.device).detach()
    for name, t in {"w": w, "c": c}.items():
        sizes = zip(t.shape[::-1], x1.shape[::-1], strict=False)
        fits = t.dim() <= x1.dim() and all(size in (1, full) for size, full in sizes)
        shapes = f"{name} {tuple(t.shape)} does not broadcast to x1 {tuple(x1.shape)}"
        check(fits, f"{shapes}; a value per row needs [:, None]")
        check(t.isfinite().all(), f"{name} must be finite; check the rewards and h")
    return w, c


def etm_loss(logits: Tensor, logits_a: Tensor, x1: Tensor, r: Tensor, h: float) -> Tensor:
    """Explicit tilt matching: (D3) to first order in h; r (...) broadcasts like w.
        T = pi_a + h r (e - pi_a),    which is (D3) at w = 1 and c = 1 - h r                 (D4)
    Minimiser, where that is >= 0: pi_a + h Cov_a(r, e | xt), an Euler step, off by O(h^2)."""
    hr = h * upcast(r)
    return c_dtm_loss(logits, logits_a, x1, torch.ones_like(hr), 1 - hr)


def self_consistent_loss(
    logits: Tensor, logits_a: Tensor, x1: Tensor, w: Tensor, c: Numbers = 1.0
) -> Tensor:
    """The fixed-point form with a stop-gradient sg; shapes as `c_dtm_loss`, c > 0.
        E_a[w (e - pi_{a+h}) | xt] = 0    gives    T = pi_a + (w / c - 1)(e - sg pi_theta)   (D5)
    Sample by sample its logit gradient is 1/c times that of `c_dtm_loss`."""
    w, c = constants(logits, logits_a, x1, w, c)
    check((c > 0).all(), "self_consistent_loss: c must be positive")
    to_teacher = c_dtm_loss(logits, logits_a, x1, torch.ones_like(w), c=1.0)  # T = pi_a
    return to_teacher + c_dtm_loss(logits, logits, x1, torch.zeros_like(w), c=1 - w / c)


def mean_over_masked(loss: Tensor, mask: Tensor) -> Tensor:
    """Mean of a dense (B, L) or gathered (M,) loss over each row's trained positions, then over
    rows. Of -log pi_theta(x1_i) under `mask_random` it is one L-th of the order-agnostic bound:
        L E_k E_mask[(1/k) sum_{i masked} -log pi_theta(x1_i|xt)]  >=  -log rho_theta(x1)    (D6)"""
    if loss.shape == mask.shape:
        loss = loss[mask]
    count = mask.sum(-1, keepdim=True)  # (B, 1)
    check(
        (count > 0).all(),
        "mean_over_masked: a row has no masked position, hence no loss; drop that row",
    )
    share = (1 / (count * len(mask)).to(upcast(loss).dtype)).expand(mask.shape)[mask]  # (M,)
    check(
        loss.shape == share.shape, f"mean_over_masked: loss {[*loss.shape]} does not fit the mask"
    )
    return (loss * share).sum()


# ---- 3. The control variate ---------------------------------------------------------------------
def control_variate_targets(logits: Tensor, logits_a: Tensor, x1: Tensor, w: Tensor) -> Pair:
    """Regression target y and weight q, each (...), of the best c(xt, i). Not in the paper.
    The logit gradient of (D3) is g = w (pi_theta - e) + c (e - pi_a). Its mean does not depend on
    c, so the best c(xt, i) minimises E|g|^2, a parabola in c:
        E|g|^2 = E[q (c - y)^2] + const,    q = |e - pi_a|^2,    y = w (e - pi_theta).(e - pi_a) / q
        c*(xt, i) = E[q y | xt, i] / E[q | xt, i]                                            (D7)
    At theta = a (pass logits_a twice) y = w. A small net learns c* from (q * (c - y)**2).mean() on
    each batch after its use; a bad fit costs variance alone, unless it learns x1 by heart."""
    w, _ = constants(logits, logits_a, x1, w)
    token = x1[..., None].long()
    p = upcast(logits.detach()).softmax(-1)  # (..., V)  pi_theta
    p_a = upcast(logits_a.detach()).softmax(-1)  # (..., V)  pi_a
    hit = p.gather(-1, token)[..., 0]  # (...)  pi_theta(x1_i)
    hit_a = p_a.gather(-1, token)[..., 0]  # (...)  pi_a(x1_i)
    q = (1 - 2 * hit_a + p_a.square().sum(-1)).clamp_min(1e-12)  # |e - pi_a|^2 without building e
    y = w * (1 - hit - hit_a + (p * p_a).sum(-1)) / q  # (e - pi_theta).(e - pi_a), likewise
    return finite(y, "control_variate_targets"), q


def best_scalar_c(
    logits: Tensor, logits_a: Tensor, x1: Tensor, w: Tensor, share: Numbers = 1.0
) -> Tensor:
    """The best scalar c: it minimises the variance of the logit gradient of sum share * loss.
        c* = sum share^2 q y / sum share^2 q    with q, y of (D7); `mean_over_masked`: share = 1/k   (D8)
    On its own batch c* correlates with e, a bias of O(1/batch): use the c* of earlier batches."""
    y, q = control_variate_targets(logits, logits_a, x1, w)
    return finite((share**2 * q * y).sum() / (share**2 * q).sum(), "best_scalar_c")


# ---- 4. Annealing -------------------------------------------------------------------------------
def next_h(r: Tensor, ess: float, h_max: float, p: Tensor | None = None) -> float:
    """The largest h <= h_max whose weights keep an effective sample size of at least `ess`.
        ESS(h) = (E e^{h r})^2 / E e^{2 h r},    a share of the sample, in (0, 1]            (D9)
    r (n,) are the teacher's rewards; p (n,), of sum 1, their chances if r lists outcomes, no draws.
    Bisection: log ESS = 2 K(h) - K(2h) falls in h, as the cumulant function K of r is convex."""
    given = f"next_h: needs 0 < ess <= 1 (got {ess:g}), h_max >= 0 (got {h_max:g}), finite rewards"
    check(0 < ess <= 1 and 0 <= h_max < math.inf and r.numel() and r.isfinite().all(), given)
    r = r.detach().double().flatten().cpu()
    r = r - r.max()  # ESS does not change, and no exponential overflows
    log_p = torch.full_like(r, -math.log(len(r))) if p is None else p.detach().double().cpu().log()
    low = 0.0
    high = trial = float(h_max)  # the first trial is h_max itself
    while low < trial:  # until no number lies between
        log_ess = 2 * (log_p + trial * r).logsumexp(0) - (log_p + 2 * (trial * r)).logsumexp(0)
        if log_ess >= math.log(ess) - 1e-12:  # which is more than its rounding
            low = trial
        else:
            high = math.nextafter(trial, 0)  # the largest h that may still do
        trial = low + (high - low) / 2  # low + high might overflow
    return low


def phases(a_end: float, h: float | Callable[[float], float]) -> Iterator[tuple[float, float]]:
    """Yields (a, h) from a = 0 to a + h = a_end, the last h shortened; h: fixed, or a rule h(a)."""
    a = 0.0
    while not a >= a_end * (1 - 1e-9):  # a NaN, too, gets to the check
        step = min(float(h(a) if callable(h) else h), a_end - a)
        stuck = f"phases: the step {step:g} at a = {a:g} does not lead to a_end = {a_end:g}"
        check(step > 1e-9 * a_end, stuck)
        yield a, step
        a += step


# ---- 5. Masking: the interpolants x1 -> xt, blind to token values -------------------------------
def mask_random(x1: Tensor, mask_id: int, generator: Noise = None) -> Pair:
    """xt, mask (B, L): k ~ U{1..L} random positions a row, the states of random-order unmasking."""
    noise = masking_noise(x1, mask_id, generator)
    k_less_1 = torch.randint(x1.shape[1], (len(x1), 1), generator=generator, device=x1.device)
    mask = ranks(noise) <= k_less_1
    return torch.where(mask, mask_id, x1), mask


def mask_blockwise(x1: Tensor, mask_id: int, block: int, generator: Noise = None) -> Pair:
    """Semi-autoregressive xt, mask (B, L), as in the official lightning_module.py (901c244).
    k ~ U{1..L} tokens are to go: the last (k-1) // block blocks are masked, the one before (the
    active block) has (k-1) % block + 1 random masks, marked by `mask`. block must divide L."""
    noise = masking_noise(x1, mask_id, generator)
    L = x1.shape[1]
    check(block > 0 and L % block == 0, f"mask_blockwise: the block {block} must divide {L}")
    k_less_1 = torch.randint(L, (len(x1), 1), generator=generator, device=x1.device)
    block_of = torch.arange(L, device=x1.device) // block  # (L,)
    active = L // block - 1 - k_less_1 // block  # (B, 1)
    mask = ranks(noise.masked_fill(block_of != active, -1)) <= k_less_1 % block
    return torch.where(mask | (block_of > active), mask_id, x1), mask


def masking_noise(x1: Tensor, mask_id: int, generator: Noise) -> Tensor:
    check(x1.dim() == 2 and x1.shape[1] > 0, f"x1 must be (B, L), L >= 1, got {[*x1.shape]}")
    check((x1 != mask_id).all(), f"x1 already holds the mask id {mask_id}; finish it first")
    return torch.rand(x1.shape, generator=generator, device=x1.device)


def ranks(score: Tensor) -> Tensor:
    """The rank of each entry in its row, the largest first."""
    return score.argsort(-1, descending=True).argsort(-1)


# ---- 6. Sampling: xt -> x1 ----------------------------------------------------------------------
@torch.no_grad()
def sample(
    model: Callable,
    xt: Tensor,
    mask_id: int,
    order: str = "random",
    block: int | None = None,
    per_step: int = 1,
    temperature: float = 1.0,
    generator: Noise = None,
    steps: int | None = None,
    ban_mask: bool = True,
) -> Iterator[Tensor]:
    """Unmasks xt (B, L); yields every state, xt first, the finished sample last.
    order     "random": positions at random; an exact draw from rho_theta with the defaults
              "top_prob": the position of the highest top probability, then a draw
              there; a consistent model keeps its law (per_step=1, temperature=1)
              "low_confidence": draw everywhere, commit the draws of highest (noise-free, untempered)
              probability, which sharpens the law. Reference: ML-GSAI/LLaDA generate.py
    block     decode blocks of this many positions from left to right (None: all at once)
    per_step  tokens a step and row; overruled by `steps` a block, of M // steps or one more each
    ban_mask  never draw mask_id (False: what draws it stays masked, as in the reference)"""
    block = xt.shape[1] if block is None else block
    check(order in ORDERS, f"sample: order {order!r} is not one of {', '.join(ORDERS)}")
    least = min(len(xt), per_step, block, 1 if steps is None else steps)
    check(least >= 1, f"sample: rows, per_step, block and steps must be >= 1, got {least}")
    check(temperature >= 0, f"sample: temperature {temperature} must be >= 0")
    place = torch.arange(xt.shape[1], device=xt.device)
    yield xt
    for start in range(0, xt.shape[1], block):
        inside = (place >= start) & (place < start + block)
        left = ((xt == mask_id) & inside).sum(1, keepdim=True)  # (B, 1)  masks of this block
        most = int(left.max())
        for step in range(math.ceil(most / per_step) if steps is None else min(steps, most)):
            quota = per_step if steps is None else left // steps + (step < left % steps)
            where = (xt == mask_id) & inside
            if order == "random":  # chosen first, so that the head computes these alone
                noise = torch.rand(xt.shape, generator=generator, device=xt.device)
                where = where & (ranks(noise.masked_fill(~where, -1)) < quota)
            logits = model(xt, where)  # (M, V)
            if ban_mask and 0 <= mask_id < logits.shape[-1]:
                logits = logits.index_fill(-1, place.new_tensor(mask_id), -torch.inf)
            token = draw(logits, temperature, generator)  # (M,)
            commit = where
            if order != "random":
                p = upcast(logits).softmax(-1)
                sure = p.amax(-1) if order == "top_prob" else p.gather(-1, token[:, None])[:, 0]
                certainty = p.new_full(where.shape, -1).masked_scatter(where, sure)
                commit = where & (ranks(certainty) < quota)
            xt = torch.where(commit, xt.masked_scatter(where, token), xt)
            yield xt


def draw(logits: Tensor, temperature: float, generator: Noise) -> Tensor:
    """Tokens (M,) ~ softmax(logits / temperature) by Gumbel-max. Never in bfloat16: its noise ends
    at 5.5, the usual maximum at V = 126,464 is 11.7: rare tokens would never be drawn."""
    if temperature > 0:
        logits = upcast(logits) / temperature
        logits = logits - torch.empty_like(logits).exponential_(generator=generator).log()
    best, token = logits.max(-1)
    check(best.isfinite().all(), "sample: a drawn logit is not finite; check model and temperature")
    return token


# ---- 7. Exact oracles for small V and L; MASK = V -----------------------------------------------
def all_sequences(V: int, L: int, device: Device = None) -> Tensor:
    """(V**L, L): every sequence, in the order of the flat laws."""
    return torch.cartesian_prod(*[torch.arange(V, device=device)] * L).view(-1, L)


def state_number(xt: Tensor, V: int) -> Tensor:
    """(B,): the row of `all_sequences(V + 1, L)` that holds the state xt (B, L)."""
    return (xt * (V + 1) ** torch.arange(xt.shape[1] - 1, -1, -1, device=xt.device)).sum(-1)


class Table(torch.nn.Module):
    """A model whose logits ((V+1)**L, L, V) stand in a learnable table over all states."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, xt: Tensor, where: Tensor | None = None) -> Tensor:
        state = state_number(xt, V=self.logits.shape[2])[:, None].expand_as(xt)
        place = torch.arange(xt.shape[1], device=xt.device).expand_as(xt)
        if where is None:
            return self.logits[state, place]
        return self.logits[state[where], place[where]]


def exact_marginal(
    model: Callable, V: int, L: int, device: Device = None, choose: Callable | None = None
) -> Tensor:
    """rho_theta (V**L,), float64, differentiable: the law of `sample` in random order.
        reach(all masked) = 1;    reach(xt with x_i = v) += reach(xt) pi_theta(v|xt,i) / k   (D11)
    with k the masks of xt: dynamic programming over states, from k = L down to none. For other
    orders choose(pi (n, k, V)) gives (n, k, V), the chance that masked i is next and becomes v."""
    states = all_sequences(V + 1, L, device)
    worth = state_number(torch.eye(L, dtype=torch.long, device=device), V)  # (L,) of each digit
    token = torch.arange(V, device=device)
    k = (states == V).sum(1)
    reach = (k == L).double()
    for level in range(L, 0, -1):
        for number in (k == level).nonzero()[:, 0].split(2**14):  # in pieces, to save memory
            where = states[number] == V
            p = model(states[number], where).double().softmax(-1).view(-1, level, V)
            p = p / level if choose is None else choose(p)
            row, place = where.nonzero(as_tuple=True)  # (M,) each
            child = number[row, None] + (token - V) * worth[place, None]  # (M, V) state numbers
            flow = reach[number[row], None] * p.flatten(0, 1)  # (M, V)
            reach = reach.index_add(0, child.flatten(), flow.flatten())
    return finite(reach[k == 0], "exact_marginal")


def exact_tilt(rho: Tensor, r: Tensor, a: float) -> Tensor:
    """rho_a ~ rho e^{a r} (D1), float64; rho and r (V**L,)."""
    check(rho.shape == r.shape, f"exact_tilt: {[*rho.shape]} and {[*r.shape]} must share a shape")
    return finite((rho.double().log() + a * r.double()).softmax(0), "exact_tilt")


def exact_posterior(rho: Tensor, xt: Tensor) -> Tensor:
    """pi(v|xt,i) (B, L, V) under rho (V**L,), float64; NaN where rho never reaches xt (B, L).
    P tabulates P(xt) of every state (each axis of rho gets its sum appended); pi is a ratio."""
    L = xt.shape[1]
    V = round(len(rho) ** (1 / L))
    check(V**L == len(rho), f"exact_posterior: {len(rho)} probabilities are not V**{L} for any V")
    P = rho.double().view((V,) * L)
    for axis in range(L):
        P = torch.cat([P, P.sum(axis, keepdim=True)], axis)
    P = P.flatten()
    token = torch.arange(V, device=xt.device)
    here = state_number(xt, V)[:, None, None]
    worth = state_number(torch.eye(L, dtype=torch.long, device=xt.device), V)  # (L,)
    step = torch.where(xt == V, worth, 0)[..., None]  # (B, L, 1)
    joint = P[here + step * (token - V)]  # (B, L, V)  P(xt and x1_i = v), for masked i
    possible = (xt[..., None] == V) | (xt[..., None] == token)  # a known position is one-hot
    return torch.where(possible, joint, 0) / P[here]


def regret_bound(model: Callable, rho: Tensor, r: Tensor, h: float, V: int) -> Pair:
    """KL(rho_{a+h} || rho_theta) <= (L(theta) - L(theta*)) / Z: both sides, exact float64 scalars.
    L(theta): L times the row mean of (D3), in expectation over x1 ~ rho = rho_a and `mask_random`;
    theta*: the posteriors of rho_{a+h}. As E[T | xt] = Z(xt) pi_{a+h}, the right side is
        E_{xt ~ rho_{a+h}}[(L/k) sum_{i masked} KL(pi_{a+h}(.|xt,i) || pi_theta(.|xt,i))]    (D12)
    and exceeds the left by the mean gap of (D6). Tight when all orders agree on a sequence."""
    L = round(math.log(len(rho), V))
    rho_h = exact_tilt(rho, r, h)
    x1 = all_sequences(V, L, rho.device)
    bound = 0.0
    for mask in all_sequences(2, L, rho.device)[1:].bool():  # every set of masked positions
        k = int(mask.sum())
        xt = torch.where(mask, V, x1)
        pi = exact_posterior(rho_h, xt)[:, mask]  # (V**L, k, V)
        log_pi_theta = model(xt)[:, mask].double().log_softmax(-1)
        kl = (torch.xlogy(pi, pi) - pi * log_pi_theta).sum((1, 2))
        bound = bound + torch.where(rho_h > 0, rho_h * kl, 0).sum() / (k * math.comb(L, k))
    rho_theta = exact_marginal(model, V, L, rho.device)
    left = torch.xlogy(rho_h, rho_h / rho_theta).sum()
    return finite(left, "regret_bound"), finite(bound, "regret_bound")


# ---- 8. `python dtm.py`: one tilt of a table, everything enumerated -----------------------------
def main(V: int = 3, L: int = 3, h: float = 3.0) -> None:
    """(D3) at every state (S of them) with every sequence (N) that agrees with it."""
    noise = Generator().manual_seed(0)
    rho = torch.randn(V**L, generator=noise).double().softmax(0)  # (N,)  the teacher's law
    r = torch.rand(V**L, generator=noise).double()
    w = tilt_weight(r, h) / (rho @ tilt_weight(r, h))  # (N,)  so that Z = 1
    x1, states = all_sequences(V, L), all_sequences(V + 1, L)
    teacher = Table(exact_posterior(rho, states).log().clamp_min(-70))
    k = (states == V).sum(1, keepdim=True)
    share = (states == V) / k.clamp_min(1)  # (S, L)  what `mean_over_masked` weighs a position with
    chance = 1 / torch.tensor([L * math.comb(L, n) for n in range(L + 1)]).double()[k]  # of a mask
    agree = ((states[:, None] == x1) | (states == V)[:, None]).all(-1)  # (S, N)
    joint = agree * rho * chance  # (S, N)  how often training meets the two (k = 0: unused)
    given = joint / joint.sum(1, keepdim=True)  # (S, N)  law of x1 at a given state
    logits_a = teacher(states).detach()[:, None].expand(-1, len(x1), L, V)  # (S, N, L, V)
    batch = (logits_a, x1.expand(len(states), -1, L), w[:, None].expand(len(states), -1, L))
    y, q = control_variate_targets(logits_a, *batch)  # (S, N, L) each
    q = q * joint[..., None] * share[:, None] ** 2
    choices = {"0": 0, "0.5": 0.5, "1": 1, "2": 2, "best scalar c": (q * y).sum() / q.sum()}
    choices["best c(xt, i)"] = (q * y).sum(1) / q.sum(1).clamp_min(1e-30)  # (S, L)  (D7)
    print(f"A tilt h = {h:g} on {V}^{L} sequences: gradient at theta = teacher; KL after 60 steps")
    print("            c | mean moved by | variance | KL(rho_h || rho_theta) <= regret / Z")
    means = []
    for name, c in choices.items():
        c = c + torch.zeros(len(states), L).double()
        logits = logits_a.clone().requires_grad_()
        (share[:, None] * c_dtm_loss(logits, *batch, c[:, None])).sum().backward()
        means.append((given[..., None, None] * logits.grad).sum(1, keepdim=True))  # (S, 1, L, V)
        moved = (means[-1] - means[0]).abs().max()
        variance = (joint[..., None, None] * (logits.grad - means[-1]) ** 2).sum()
        runs = [regret_bound(train(teacher, rho, w, c, seed), rho, r, h, V) for seed in range(5)]
        kl, bound = torch.tensor(runs).mean(0)
        print(f"{name:>13} | {moved:13.0e} | {variance:8.4f} | {kl:22.5f} <= {bound:.5f}")
    bias = [f"{bias_of_c(c, tilt_weight(r, h), V, L):.0e} at c = {c}" for c in (0, 0.5, 1)]
    print(f"Inconsistent teacher, raw w: the minimiser is off the tilt by {', '.join(bias)} nats.")


def train(teacher: Table, rho: Tensor, w: Tensor, c: Tensor, seed: int) -> Table:
    """A student after 60 steps of 128 samples, with the control variate c (S, L)."""
    noise = Generator().manual_seed(seed)
    L, V = teacher.logits.shape[1:]
    student = Table(teacher.logits.detach().clone())
    optimiser = torch.optim.Adam(student.parameters(), lr=0.05)
    for i in rho.multinomial(60 * 128, True, generator=noise).split(128):
        x1 = all_sequences(V, L)[i]
        xt, mask = mask_random(x1, V, noise)
        loss = c_dtm_loss(student(xt), teacher(xt), x1, w[i, None], c[state_number(xt, V)])
        optimiser.zero_grad()
        mean_over_masked(loss, mask).backward()
        optimiser.step()
    return student.requires_grad_(False)


def bias_of_c(c: float, w: Tensor, V: int, L: int) -> float:
    """KL from the tilt to the population minimiser of (D3), for a random pi_a, no law's posterior:
    E[T | xt] = E[w e | xt] + c (pi_a - P(x1_i = v | xt))."""
    states = all_sequences(V + 1, L)
    teacher = Table(torch.randn(len(states), L, V, generator=Generator().manual_seed(1)).double())
    rho = exact_marginal(teacher, V, L).detach()  # the law of its rollouts
    rho_h = rho * w / (rho @ w)
    agree = ((states[:, None] == all_sequences(V, L)) | (states == V)[:, None]).all(-1).double()
    z = (agree @ (rho * w) / (agree @ rho))[:, None, None]  # E[w | xt]
    pull = teacher(states).softmax(-1) - exact_posterior(rho, states)
    minimiser = z * exact_posterior(rho_h, states) + c * pull  # (S, L, V), times z
    rho_theta = exact_marginal(Table(minimiser.log()), V, L)
    return (rho_h * (rho_h / rho_theta).log()).sum().item()


if __name__ == "__main__":
    main()
