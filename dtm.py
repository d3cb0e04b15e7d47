"""Discrete Tilt Matching (DTM, arXiv 2604.18739): the mathematics, in torch and nothing else.

A MASKED DIFFUSION MODEL is a network that fills in masked tokens. It writes a sequence of L tokens
in L steps: it starts from L masks, and each step picks a masked position at random and draws a
token there from the softmax of the network's logits. To train it, one masks random tokens of a
finished sequence, and the network learns to predict them from the tokens that are left.

    sampling   _ _ _ _   ->   _ B _ _   ->   _ B _ A   ->   C B _ A   ->   C B D A
    masking    C B D A   ->   C _ D _        The loss trains the predictions at the two masks.

DTM takes such a model and a reward r(x) for finished sequences. The base model writes a sequence x
with some probability rho_0(x). DTM trains it until it writes x with a probability proportional to
rho_0(x) e^{A r(x)}, for a number A that the user chooses. This distribution rho_A is rho_0 tilted
by A, and the number A is called the tilt. rho_A prefers a high reward, and it does not change the
relative probabilities of sequences with equal reward. DTM never computes the probability of a whole
sequence, which would be a sum over L! orders.

GLOSSARY. The equations (D1) to (D13) stand beside the functions below; (D10) is in
figures/rivals/objectives.py.
V, L, B         the size of the vocabulary, the length of a sequence, the size of a batch
r       (B,)    the reward r(x1) of each sequence
rho_a           the distribution of sequences at tilt a, proportional to rho_0 e^{a r}         (D1)
h               the increment of the tilt in a phase (a round of the algorithm): from a to a + h
teacher         a frozen model that draws sequences x1 from rho_a; its logits are called logits_a
student         the model that is trained towards rho_{a+h}; its logits are called logits
x1      (B, L)  finished sequences of tokens 0 to V - 1, drawn from the teacher
xt      (B, L)  states: x1 with some tokens replaced by the mask token, whose number mask_id is V or
                an unused number below V
mask    (B, L)  True at the masked positions that enter the loss: k of them in one sequence, M in
                the batch. If the masks are random, these are all masked positions; if sequences
                are written in blocks from left to right, those of the block that is being filled.
E_a             the mean over x1 drawn from rho_a and over the masking that turns x1 into xt
pi_a    (V,)    the posterior pi_a(v | xt, i), the probability of x1_i = v given xt if x1 was drawn
                from rho_a; the teacher computes it as softmax(logits_a) at position i of xt
pi_theta (V,)   the student's posterior, softmax(logits)
rho_theta       the distribution of the sequences that the student writes in random order
e       (V,)    the one-hot vector of the token x1_i, which the code never builds
w, Z            the weight e^{h r(x1)} of a sequence; its mean Z = E_a[w]; Z(xt) = E_a[w | xt]
c               the coefficient of the control variate pi_a - e: one number, or one per position; a
                control variate is a term with mean zero that is added to reduce the variance
T       (V,)    the target of the loss, w e + c (pi_a - e) = c pi_a + (w - c) e
loss            at a position, - sum_v T(v) log pi_theta(v)                                    (D3)

"Prop. 3.3" cites the paper. "Ours" marks what we added to the paper's method. The method with a
control variate is called c-DTM.

THE ALGORITHM, which `tilt_matching` runs below
1. The student is the base model, and the tilt a is 0.
2. The teacher is a frozen copy of the student. It draws sequences x1, each with a weight e^{h r}.
3. Some tokens of a batch of x1 are masked, which gives xt.
4. The student takes a gradient step on the loss (D3) at the masked positions.
5. After some repetitions of 3 and 4 the phase ends: a becomes a + h, and the next starts with 2.
6. The algorithm ends when a reaches its final value A.

THE MODEL PROTOCOL. model(xt) returns the logits at all positions, (B, L, V). With a boolean mask
(B, L), model(xt, mask) returns those where it is True, (M, V), row by row.

PRECISION AND CHECKS. Sums over the vocabulary run in float32 for logits in half precision, and in
float64 for logits in float64. Wrong shapes raise ValueError. The losses do not check values, since
a GPU waits for every such check; the training loop checks once per step that the loss is finite.
"""

import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor, nn

# The decoding orders of `sample`: at random positions; where the model is most certain first; or
# LLaDA's, which draws a token everywhere and keeps the most probable ones.
ORDERS = ("random", "top_prob", "low_confidence")


def check(ok: bool | Tensor, message: str) -> None:
    """Raise ValueError with this message unless ok is true."""
    if not ok:
        raise ValueError(message)


def upcast(x: Tensor) -> Tensor:
    """Return x in float64 if that is its type, and else in float32."""
    return x if x.dtype == torch.float64 else x.float()


# ---- 1. The algorithm ---------------------------------------------------------------------------
# The six steps in one function, for any model that follows the protocol above. `maze_lab.tilt`
# is the same loop with measurements, and `llada_finetune.train` the same loop on many GPUs.
def tilt_matching(
    model: nn.Module,
    reward: Callable[[Tensor], Tensor],
    mask_id: int,
    length: int,
    *,
    a_end: float = 8.0,
    h: float = 1.0,
    c: float = 1.0,
    rollouts: int = 1024,
    steps: int = 200,
    batch: int = 128,
    lr: float = 1e-3,
    normalize: bool = True,
    generator: Generator | None = None,
    watch: Callable[[float, Tensor, nn.Module], None] | None = None,
) -> nn.Module:
    """Train the model in place until it samples from the tilt rho_A, and return it.

    model       the base model; parameters that require no gradient stay as they are
    reward      takes finished sequences (n, length), integers, and returns their rewards (n,)
    a_end, h, c the final tilt A, its increment in each phase, the coefficient of (D3)
    rollouts    the number of sequences that the teacher draws in each phase
    steps       the number of gradient steps in each phase, on `batch` of these sequences each
    lr          the peak of the learning rate, which falls to 0 in a phase; later peaks are lower
    normalize   divide the weights of a phase by their mean, see `tilt_weight`
    generator   the source of randomness, on the model's device (None: a new one with seed 0)
    watch       is called as watch(a, rewards, model) at the end of each phase: a is the tilt at the
                start of it, rewards are those of the teacher's sequences, and model is the student

    Raise ValueError if no parameter can be trained, or if a reward or a loss is not finite.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    check(trained, "tilt_matching: no parameter requires a gradient; call model.requires_grad_()")
    device = trained[0].device
    generator = generator or Generator(device).manual_seed(0)
    optimizer = torch.optim.Adam(trained, betas=(0.9, 0.99))
    blank = torch.full((rollouts, length), mask_id, device=device)
    for a, increment in phases(a_end, h):  # steps 1, 5 and 6
        teacher = copy.deepcopy(model).eval().requires_grad_(False)  # step 2
        # `sample` yields every state on the way; the last one is finished, (rollouts, L).
        *_, x1 = sample(teacher, blank, mask_id, generator=generator)
        rewards = torch.as_tensor(reward(x1), device=device)
        got = f"tilt_matching: the reward returned the shape {[*rewards.shape]}"
        check(rewards.shape == (rollouts,), f"{got}; return one number per row of x1")
        w = tilt_weight(rewards, increment, normalize)  # (rollouts,)
        peak = lr * (1 - 0.8 * a / a_end)  # later phases use a smaller peak
        for step in range(steps):
            rows = torch.randint(rollouts, (batch,), generator=generator, device=device)
            xt, mask = mask_random(x1[rows], mask_id, generator)  # step 3
            w_masked = w[rows, None].expand(mask.shape)[mask]  # (M,)
            with torch.no_grad():
                logits_a = teacher(xt, mask)  # (M, V)
            loss = c_dtm_loss(model(xt, mask), logits_a, x1[rows][mask], w_masked, c)  # step 4
            take_step(optimizer, mean_over_masked(loss, mask), peak * (1 - step / steps))
        if watch:
            watch(a, rewards, model)
    return model


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    """Take a step with the gradient clipped to norm 1; ValueError if the loss is not finite."""
    value = loss.item()  # a GPU waits here, once per step
    advice = "lower lr or h; to forbid a token, give it the logit -1e4, since -inf makes a loss NaN"
    check(math.isfinite(value), f"the loss of this step is {value}; {advice}")
    group = optimizer.param_groups[0]
    group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


# ---- 2. The tilt --------------------------------------------------------------------------------
# To tilt a distribution means to multiply it by an exponential of the reward. Tilts add up: a tilt
# by h of the tilt by a is the tilt by a + h, so that many small steps lead to a large tilt.
def tilt_weight(r: Tensor, h: float, normalize: bool = False) -> Tensor:
    """Return the weights that carry rho_a to rho_{a+h}, (B,), for the rewards r (B,).

        rho_{a+h}(x) = rho_a(x) e^{h r(x)} / Z,    Z = E_a[e^{h r}]                          (D1)

    normalize  return w / mean(w) instead of w = e^{h r} (ours); it cannot overflow

    Raise ValueError if h r or a weight is not finite.

    Why normalize: the best c is about E_a[w], so that c = 1 is close to the best for normalized
    weights and a moderate h. A constant factor of the weights does not move the minimiser of the
    loss. But mean(w) is computed from the same n samples as the loss and is not independent of
    them. This moves the minimiser of the expected loss by O(1/n).
    """
    log_w = h * upcast(torch.as_tensor(r))  # (B,)
    check(log_w.isfinite().all(), "tilt_weight: h * r is not finite; check the rewards and h")
    if not normalize:
        w = log_w.exp()
        overflow = f"tilt_weight: e^(h r) overflows {w.dtype}; lower h or pass normalize=True"
        check(w.isfinite().all(), overflow)
        return w
    w = (log_w - log_w.max()).exp()
    # `scatter_reduce` adds in the order of the batch. w.mean() rounds differently, and the numbers
    # in the tables of this project were computed with this rounding.
    one_group = torch.zeros_like(w, dtype=torch.long)
    return w / w.new_zeros(1).scatter_reduce(0, one_group, w, "mean", include_self=False)


# ---- 3. The loss --------------------------------------------------------------------------------
# The posteriors of rho_{a+h} are ratios of two means under rho_a, by Bayes' rule. A cross-entropy
# with the right target learns these ratios from samples of rho_a.
#
#     pi_{a+h}(v | xt, i) = E_a[w 1{x1_i = v} | xt] / E_a[w | xt]                            (D2)
#     loss = - sum_v T(v) log pi_theta(v),    T = c pi_a + (w - c) e                         (D3)
#
# (D2) is Bayes' rule. Let P(xt | x1) be the probability that the masking turns x1 into xt. Then
#     rho_{a+h}(x1 | xt) = P(xt | x1) rho_{a+h}(x1) / (the sum of the numerator over all x1)
#                        = P(xt | x1) rho_a(x1) w(x1) / (the sum of the numerator)      by (D1)
#                        = rho_a(x1 | xt) w(x1) / E_a[w | xt]
# after numerator and denominator are divided by the sum of P(xt | x1) rho_a(x1) over all x1. The
# sum of the last line over all x1 with x1_i = v is (D2).
#
# The minimiser of a cross-entropy is its mean target, normalised. With S = sum_v E_a[T(v) | xt],
#     E_a[loss | xt] = - sum_v E_a[T(v) | xt] log pi_theta(v)
#                    = S KL(E_a[T | xt] / S || pi_theta) + a term that does not depend on pi_theta,
# which is smallest at pi_theta = E_a[T | xt] / S, provided that E_a[T | xt] >= 0.
#
# c does not move the minimiser. Given xt, the token x1_i is distributed as pi_a. So E_a[e | xt] is
# pi_a, the control variate c (pi_a - e) has mean zero, and E_a[T | xt] = E_a[w e | xt]. This is
# Z(xt) pi_{a+h} by (D2). But c changes the variance of the loss, see section 4. The number c may
# depend on xt and i, but not on the tokens behind the masks.
#
# DTM assumes a consistent teacher: softmax(logits_a) is the posterior E_a[e | xt] of the
# distribution that x1 was drawn from. A network satisfies this only approximately. Example: there
# are two positions and two tokens. The teacher tosses a coin for the first token, whether the
# second is known or not. For the second it tosses a coin if the first is unknown; otherwise it
# copies the first. In random order, in which it draws the second token first with probability 1/2,
# it writes 00, 01, 10, 11 with probabilities 3/8, 1/8, 1/8, 3/8. Under this distribution the second
# token equals the first with probability 3/4; the teacher's posterior says 1, so it is not
# consistent. With c = 0 the logits of the teacher do not enter, and the minimiser is still the tilt
# of the distribution that drew x1. Otherwise, let p be the teacher's posterior, and E the mean
# under that distribution. The teacher's error is p - E[e | xt], and the mean target is off by c
# times this error. The minimiser is the mean target divided by E[w | xt], the sum of its entries,
# provided that no entry is negative. So the minimiser is off by c / E[w | xt] times the teacher's
# error: the student inherits this share of it.
#
# The corruption is what turns x1 into xt, here the masking. The derivations use only that P(xt |
# x1) is the same at every tilt: given x1, the corruption must not depend on a. It may depend on x1
# in any way, and so on the reward of x1. So the loss, with any c, is also right for block
# diffusion, which masks a part of one block of positions and all later blocks, and for
# uniform-state diffusion, which replaces tokens by random ones, if the teacher computes the
# posterior of x1_i given xt under that corruption.
#
# T can be negative. Let c >= 0. If w < c (1 - pi_a(x1_i)), then T(x1_i) < 0, and the loss of this
# sample goes to minus infinity as pi_theta(x1_i) goes to 0. Otherwise it is bounded below. For a
# consistent teacher, E_a[loss | xt] is bounded below, but an average over finitely many samples
# need not be. T >= 0 always holds for r >= 0, weights that are not normalised, and 0 <= c <= 1. To
# make r >= 0, add a constant to the reward; the tilt stays the same.
def c_dtm_loss(
    logits: Tensor, logits_a: Tensor, x1: Tensor, w: Tensor | float, c: Tensor | float = 1.0
) -> Tensor:
    """Return the loss of c-DTM (Prop. 3.3) at each position; its minimiser is the tilted posterior.

        loss = - sum_v T(v) log pi_theta(v),    T = c pi_a + (w - c) e                       (D3)

    logits, logits_a  (..., V): the student's and the teacher's, either at all positions, (B, L, V),
                      or at the masked positions only, (M, V), which is far cheaper
    x1                (...), integers: the token that was masked at each position
    w, c              numbers, or tensors that broadcast to x1; no gradient flows into them

    Raise ValueError if the shapes do not fit.
    Source: lightning_module.py, lines 476-486, in the authors' code (github.com/yuyuanchen0/dtm,
    commit 901c244). It has the same value and builds one-hot vectors.
    """
    w, c = as_constants(logits, logits_a, x1, w=w, c=c)
    logits = upcast(logits)  # (..., V)
    # log_z is subtracted once from the sum over v. A sum of log_softmax would subtract it V times,
    # with a rounding error 3 to 40 times as large for V = 126,464 in float32.
    log_z = logits.logsumexp(-1)  # (...)     log pi_theta(v) = logits(v) - log_z
    log_p_x1 = logits.gather(-1, x1[..., None].long())[..., 0] - log_z  # (...)  log pi_theta(x1_i)
    pi_a = upcast(logits_a.detach()).softmax(-1)  # (..., V)
    teacher_term = (pi_a * logits).sum(-1) - log_z  # (...)  sum_v pi_a(v) log pi_theta(v)
    return -(c * teacher_term + (w - c) * log_p_x1)  # (...)  (D3)


def as_constants(
    logits: Tensor, logits_a: Tensor, x1: Tensor, **values: Tensor | float
) -> list[Tensor | float]:
    """Return the values detached from the graph, in at least float32, if all shapes fit."""
    shapes = f"{tuple(logits.shape)}, {tuple(logits_a.shape)}, {tuple(x1.shape)}"
    fits = logits.shape == logits_a.shape and logits.shape[:-1] == x1.shape
    check(fits, f"expected logits and logits_a (..., V) and x1 (...), but got {shapes}")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    constants = []
    for name, value in values.items():
        if isinstance(value, Tensor):
            sizes = zip(value.shape[::-1], x1.shape[::-1], strict=False)
            fits = value.dim() <= x1.dim() and all(size in (1, full) for size, full in sizes)
            shapes = f"{name} {tuple(value.shape)} does not broadcast to x1 {tuple(x1.shape)}"
            check(fits, f"{shapes}; give it one value per position, or per row as [:, None]")
            value = value.detach().to(logits.device, dtype)
        constants.append(value)
    return constants


def etm_loss(logits: Tensor, logits_a: Tensor, x1: Tensor, r: Tensor, h: float) -> Tensor:
    """Return the loss of explicit tilt matching, (...): (D3) to first order in h.

        T = pi_a + h r (e - pi_a),    computed by (D3) with w = 1 and c = 1 - h r            (D4)

    r is the reward, (...), which broadcasts to x1; the other arguments are those of `c_dtm_loss`.
    This c depends on the tokens behind the masks, so it is not a control variate: it moves the
    minimiser to pi_a + h Cov_a(r, e | xt), with the covariance under E_a, provided that no entry
    of this sum is negative. This is an Euler step of the tilt, with an error O(h^2).
    """
    hr = h * upcast(r)
    return c_dtm_loss(logits, logits_a, x1, 1.0, 1 - hr)


def self_consistent_loss(
    logits: Tensor, logits_a: Tensor, x1: Tensor, w: Tensor | float, c: Tensor | float = 1.0
) -> Tensor:
    """Return the loss of the self-consistent form, (...).

        T = pi_a + (w / c - 1)(e - sg pi_theta),    where sg stops the gradient              (D5)

    Its mean gradient with respect to the logits is -(1/c) E_a[w (e - pi_theta) | xt], if the
    teacher is consistent. Where this is zero, pi_theta is (D2). c is positive; the other arguments
    are those of `c_dtm_loss`. The gradient with respect to the logits is, sample by sample, 1/c
    times that of `c_dtm_loss`.
    """
    w, c = as_constants(logits, logits_a, x1, w=w, c=c)
    to_teacher = c_dtm_loss(logits, logits_a, x1, w=1.0, c=1.0)  # T = pi_a
    # (D3) with the student in the teacher's place, T = (w / c - 1)(e - sg pi_theta)
    correction = c_dtm_loss(logits, logits, x1, w=0.0, c=1 - w / c)
    return to_teacher + correction


def mean_over_masked(loss: Tensor, mask: Tensor) -> Tensor:
    """Average the loss over the masked positions of each row, then over rows; return a scalar.

    loss  (B, L) at all positions, or (M,) at the masked positions
    mask  (B, L), boolean, True at the masked positions that are trained

    Raise ValueError if a row has no such position.

    Why each row is averaged first: take masks from `mask_random`, k per row, and the loss -log
    pi_theta(x1_i). Then L times the expectation of this mean is an upper bound on -log rho_theta:
        L E_k E_mask[(1/k) sum_{i masked} -log pi_theta(x1_i | xt)]  >=  -log rho_theta(x1)  (D6)
    """
    if loss.shape == mask.shape:
        loss = loss[mask]
    count = mask.sum(-1, keepdim=True)  # (B, 1)
    check((count > 0).all(), "mean_over_masked: a row has no masked position; drop that row")
    share = (1 / (count * len(mask)).to(upcast(loss).dtype)).expand(mask.shape)[mask]  # (M,)
    fits = loss.shape == share.shape
    check(fits, f"mean_over_masked: the loss {[*loss.shape]} has no entry per masked position")
    return (loss * share).sum()


# ---- 4. The control variate ---------------------------------------------------------------------
# The mean gradient does not depend on c, and its variance is a quadratic function of c. The best c
# can be computed or learned from samples; both are ours.
def control_variate_targets(
    logits: Tensor, logits_a: Tensor, x1: Tensor, w: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return the target y and the weight q of a regression that learns the best c, each (...).

        q = |e - pi_a|^2,    y = w <e - pi_theta, e - pi_a> / q
        c*(xt, i) = E_a[q y | xt, i] / E_a[q | xt, i]                                        (D7)

    The arguments are those of `c_dtm_loss`.

    Why: the gradient of (D3) with respect to the logits is g = w (pi_theta - e) + c (e - pi_a). Its
    mean does not depend on c, so the c that minimises E|g|^2 minimises the variance, too, and
        E|g|^2 = E[q (c - y)^2] + a term that does not depend on c.
    To learn c*(xt, i), first compute the loss of a batch with the present c, and only then update c
    to reduce the mean of q (c - y)^2 on that batch. With a consistent teacher a bad fit only adds
    variance. With the teacher's logits in place of the student's, y = w.
    """
    (w,) = as_constants(logits, logits_a, x1, w=w)
    token = x1[..., None].long()
    pi_theta = upcast(logits.detach()).softmax(-1)  # (..., V)
    pi_a = upcast(logits_a.detach()).softmax(-1)  # (..., V)
    pi_theta_x1 = pi_theta.gather(-1, token)[..., 0]  # (...)
    pi_a_x1 = pi_a.gather(-1, token)[..., 0]  # (...)
    q = (1 - 2 * pi_a_x1 + pi_a.square().sum(-1)).clamp_min(1e-12)  # |e - pi_a|^2, expanded
    y = w * (1 - pi_theta_x1 - pi_a_x1 + (pi_theta * pi_a).sum(-1)) / q
    return y, q


def best_scalar_c(
    logits: Tensor, logits_a: Tensor, x1: Tensor, w: Tensor | float, share: Tensor | float = 1.0
) -> Tensor:
    """Return the number c that minimises the variance of the gradient, a scalar.

        c* = sum share^2 q y / sum share^2 q,    with q and y of (D7)                        (D8)

    "The gradient" is that of sum(share * loss) with respect to the logits; share, (...), is the
    weight of each position in that sum, 1/(k B) for `mean_over_masked`. The other arguments are
    those of `c_dtm_loss`.

    Use the c* of earlier batches: on its own batch, c* depends on e, which biases the gradient by
    O(1/batch).
    """
    y, q = control_variate_targets(logits, logits_a, x1, w)
    return (share**2 * q * y).sum() / (share**2 * q).sum()


# ---- 5. Annealing and replay --------------------------------------------------------------------
# With a large h only a few samples have a weight that matters, so the tilt is reached in phases.
# Their increments h are equal, or are chosen from the rewards of the samples. The sequences of
# earlier phases can be used again, with weights that depend on their rewards only.
def next_h(r: Tensor, ess: float, h_max: float, p: Tensor | None = None) -> float:
    """Return the largest h <= h_max whose weights keep an effective sample size of at least ess.

        ESS(h) = (E e^{h r})^2 / E e^{2 h r}, a share of the sample in (0, 1]                (D9)

    r    (n,), the rewards of samples
    ess  the bound, above 0 and at most 1
    p    (n,), probabilities that sum to 1, if r lists the possible rewards instead of samples

    Raise ValueError if a reward is not finite, or ess or h_max is out of range.

    How: by bisection. log ESS = 2 K(h) - K(2 h) falls in h, because the cumulant generating
    function K(h) = log E[e^{h r}] is convex.
    """
    ok = 0 < ess <= 1 and 0 <= h_max < math.inf and r.numel() and r.isfinite().all()
    got = f"got ess {ess:g} and h_max {h_max:g}"
    check(ok, f"next_h: needs 0 < ess <= 1, 0 <= h_max < inf and finite rewards, but {got}")
    r = r.detach().cpu().double().flatten()  # on the CPU, since MPS has no float64
    r = r - r.max()  # the ESS does not change, and no exponential overflows
    log_p = torch.full_like(r, -math.log(len(r))) if p is None else p.detach().cpu().double().log()
    low = 0.0
    high = trial = float(h_max)
    # At every moment h = low satisfies the bound, and every h above high violates it.
    while low < trial:  # until no floating-point number lies between low and high
        log_ess = 2 * (log_p + trial * r).logsumexp(0) - (log_p + 2 * (trial * r)).logsumexp(0)
        if log_ess >= math.log(ess) - 1e-12:  # 1e-12 is more than the rounding error
            low = trial
        else:
            high = math.nextafter(trial, 0)
        trial = low + (high - low) / 2  # low + high might overflow
    return low


def phases(a_end: float, h: float | Callable[[float], float]) -> Iterator[tuple[float, float]]:
    """Yield the tilt a and the increment h of each phase, from a = 0 until a + h = a_end.

    a_end  the final tilt, at least 0; to lower a reward, negate it
    h      the increment, or a function that returns it for each a; the last one is shortened

    Raise ValueError if an increment does not lead towards a_end.
    """
    check(not a_end < 0, f"phases: a_end {a_end:g} is negative; negate the reward instead")
    a = 0.0
    while not a >= a_end * (1 - 1e-9):  # if a is NaN, the check below finds it
        step = min(float(h(a) if callable(h) else h), a_end - a)
        stuck = f"phases: the step {step:g} at a = {a:g} does not lead to a_end = {a_end:g}"
        check(step > 1e-9 * a_end, f"{stuck}; choose a larger h")
        yield a, step
        a += step


def replay_weights(rewards: list[Tensor], tilts: list[float], a: float) -> Tensor:
    """Return the weights u (n,) that let rollouts of several phases stand for rollouts at tilt a.

        u(x) = e^{a r(x)} / sum_j (n_j / n) e^{a_j r(x) - f_j},  divided by its mean         (D13)

    Here f_j estimates log E_0[e^{a_j r}], with the mean under rho_0, plus a constant that is the
    same for all j. It solves
        e^{f_j} = (1/n) sum_x e^{a_j r(x)} / sum_l (n_l / n) e^{a_l r(x) - f_l},
    where the sum runs over all n rollouts x.

    rewards  one tensor (n_j,) per phase, the rewards of its rollouts; n = sum_j n_j
    tilts    one number per phase, the tilt a_j of the teacher that drew its rollouts
    a        the tilt at which the rollouts are used, usually that of the latest phase

    The weights have the order of torch.cat(rewards). Pick the rollouts of a batch with probability
    proportional to u, or multiply the loss of each one by u. Raise ValueError if there are no
    rollouts, if the lists differ in length, if a number is not finite, or if the tilts are so far
    apart that the rewards of the phases hardly overlap. Ours.

    Why: a rollout that is picked from all n at random has the distribution m(x) = sum_j (n_j / n)
    rho_{a_j}(x), and rho_{a_j} = rho_0 e^{a_j r} / E_0[e^{a_j r}]. In rho_a / m the unknown rho_0
    cancels; what remains is u, up to a factor, which dividing by the mean removes. So with E_m for
    the mean under m, E_m[u g] = E_a[g] for every function g, and E_m[u T | xt] is E_a[T | xt] times
    a positive number that depends on xt only: the minimiser of the loss stays where it is. With g =
    e^{(a_j - a) r}, E_a[g] is E_0[e^{a_j r}] / E_0[e^{a r}]; with the mean over the rollouts in
    place of E_m, this is the equation for f_j. Since u is computed from the rollouts that it
    weights, weighted means have a bias of O(1/n).

    What it assumes: phase j drew from rho_{a_j}, and the teacher's posterior is that of rho_a. The
    weights do not repair a model that missed its tilt: they depend on the reward only, so they
    never change the distribution of x given r. If a teacher missed its tilt, the weighted rollouts
    do not match its posterior, and the control variate no longer has mean zero.
    """
    check(len(rewards) == len(tilts), "replay_weights: give one tilt per list of rewards")
    check(sum(map(len, rewards)) > 0, "replay_weights: there are no rollouts")
    r = torch.cat(rewards).detach()
    tilt = torch.tensor([*tilts, a], dtype=torch.float64)
    ok = r.isfinite().all() and tilt.isfinite().all()
    check(ok, "replay_weights: a reward or a tilt is not finite")
    # Rollouts with equal rewards have equal weights, so the sums run over the R distinct rewards.
    value, which, count = r.cpu().double().unique(return_inverse=True, return_counts=True)
    log_part = (count.double() / len(r)).log()  # (R,)
    exponent = value[:, None] * tilt[:-1]  # (R, phases)
    share = torch.tensor([len(x) / len(r) for x in rewards], dtype=torch.float64)  # n_j / n
    log_m = log_mixture(exponent, share, log_part.exp())  # (R,)  log(m / rho_0)
    log_u = a * value - log_m
    return (log_u - (log_u + log_part).logsumexp(0)).exp()[which].to(r.device, upcast(r).dtype)


def log_mixture(exponent: Tensor, phase_share: Tensor, reward_share: Tensor) -> Tensor:
    """Return log sum_j (n_j / n) e^{a_j r - f_j}, (R,), for the f_j of `replay_weights`.

    exponent      (R, phases), a_j r for each of the R distinct rewards r
    phase_share   (phases,), n_j / n
    reward_share  (R,), the share p_r of all rollouts that have the reward r

    The f_j minimise sum_r p_r log sum_j (n_j / n) e^{a_j r - f_j} + sum_j (n_j / n) f_j. This is a
    convex function, and its gradient is zero where the equation for f_j holds. Fifty iterations of
    that equation give a starting point. Newton's method follows; a step that does not lower the
    function is halved. Raise ValueError if this does not converge.
    """

    def log_mixture_at(f: Tensor) -> Tensor:
        return (phase_share.log() + exponent - f).logsumexp(1)

    def objective(f: Tensor) -> Tensor:
        return reward_share @ log_mixture_at(f) + phase_share @ f

    f = reward_share @ exponent
    for _ in range(50):
        f = (reward_share.log()[:, None] + exponent - log_mixture_at(f)[:, None]).logsumexp(0)
    for _ in range(100):
        p = (phase_share.log() + exponent - f - log_mixture_at(f)[:, None]).exp()  # (R, phases)
        gradient = phase_share - reward_share @ p
        if gradient.abs().max() < 1e-13:
            break
        hessian = (reward_share @ p).diag() - p.T @ (reward_share[:, None] * p)
        step = torch.linalg.pinv(hessian, rtol=1e-13, hermitian=True) @ gradient
        size, least = 1.0, objective(f)
        while size > 1e-9 and objective(f - size * step) > least + 1e-13 * (1 + least.abs()):
            size /= 2
        f = f - size * step
    close = gradient.abs().max() < 1e-6
    check(close, "replay_weights: the rewards of the phases hardly overlap; use smaller steps h")
    return log_mixture_at(f)


# ---- 6. Masking: from x1 to xt ------------------------------------------------------------------
# The student should be trained on the states that it meets when it samples. Both maskings look
# only at the positions of the tokens, not at their values.
def mask_random(
    x1: Tensor, mask_id: int, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Return xt and mask, each (B, L): every row of x1 (B, L) with k random masks.

    k is uniform on 1, ..., L in each row. These are the states of sampling in random order.
    Raise ValueError if x1 contains mask_id already.
    """
    noise = masking_noise(x1, mask_id, generator)
    k_less_1 = torch.randint(x1.shape[1], (len(x1), 1), generator=generator, device=x1.device)
    mask = ranks(noise) <= k_less_1
    return torch.where(mask, mask_id, x1), mask


def mask_blockwise(
    x1: Tensor, mask_id: int, block: int, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Return xt and mask, each (B, L), for sampling by blocks from left to right.

    The active block is the one that is being filled: blocks before it are known, and blocks after
    it are masked. Example: for C B D A in blocks of 2, k = 3 masks give C _ _ _ or _ B _ _. The
    first block is the active one here, and only its mask is True in `mask`. In general the number k
    of masks is uniform on 1, ..., L in each row. The last (k - 1) // block blocks are masked
    completely. The block before them is the active one, and (k - 1) % block + 1 random positions of
    it are masked.
    Raise ValueError if the length `block` does not divide L, or x1 contains mask_id already.
    Source: lightning_module.py in the authors' code (commit 901c244).
    """
    noise = masking_noise(x1, mask_id, generator)
    L = x1.shape[1]
    check(block > 0 and L % block == 0, f"mask_blockwise: the block {block} must divide {L}")
    k_less_1 = torch.randint(L, (len(x1), 1), generator=generator, device=x1.device)
    block_of = torch.arange(L, device=x1.device) // block  # (L,)
    active = L // block - 1 - k_less_1 // block  # (B, 1)
    mask = ranks(noise.masked_fill(block_of != active, -1)) <= k_less_1 % block
    return torch.where(mask | (block_of > active), mask_id, x1), mask


def masking_noise(x1: Tensor, mask_id: int, generator: Generator | None) -> Tensor:
    """Return uniform random numbers (B, L), by which the masked positions are chosen."""
    check(x1.dim() == 2 and x1.shape[1] > 0, f"x1 must be (B, L) with L >= 1, not {[*x1.shape]}")
    check((x1 != mask_id).all(), f"x1 already holds the mask id {mask_id}; finish it first")
    return torch.rand(x1.shape, generator=generator, device=x1.device)


def ranks(score: Tensor) -> Tensor:
    """Return the rank of each entry in its row; the largest entry has rank 0."""
    return score.argsort(-1, descending=True).argsort(-1)


# ---- 7. Sampling: from xt to x1 -----------------------------------------------------------------
# Sampling fills the masks of xt, a few at a time. The order says which ones are next:
#   random          Positions are chosen at random. With one token per step and temperature 1 this
#                   draws exactly from rho_theta. The loss assumes that x1 is a draw from the
#                   distribution whose posteriors the teacher computes.
#   top_prob        The position whose most probable token has the highest probability is next, and
#                   a token is drawn there. The choice depends on xt alone, so by the chain rule of
#                   probability this, too, draws from rho_theta if the model is consistent.
#   low_confidence  Tokens are drawn at all masks, and the one with the highest probability stays.
#                   This is LLaDA's low-confidence remasking. The choice depends on the drawn
#                   tokens. This favours probable ones: the result is not a draw from rho_theta.
@torch.no_grad()
def sample(
    model: Callable,
    xt: Tensor,
    mask_id: int,
    order: str = "random",
    block: int | None = None,
    per_step: int = 1,
    temperature: float = 1.0,
    generator: Generator | None = None,
    steps: int | None = None,
    ban_mask: bool = True,
) -> Iterator[Tensor]:
    """Yield every state (B, L) while the masks of xt are filled, from xt to the finished sequences.

    block        the length of the blocks, which are filled from left to right (None: one block)
    per_step     the number of tokens that each sequence receives in a step, if steps is None
    steps        the number of steps per block; its masks are divided evenly among them
    temperature  tokens are drawn from softmax(logits / temperature); 0 takes the most probable one
    ban_mask     never draw mask_id; if False, a position where it is drawn stays masked

    Raise ValueError for an argument out of range and, at the end, if any logit was not finite.
    Source: LLaDA's generate.py (github.com/ML-GSAI/LLaDA).
    """
    block = xt.shape[1] if block is None else block
    check(order in ORDERS, f"sample: order {order!r} is not one of {', '.join(ORDERS)}")
    least = min(len(xt), per_step, block, 1 if steps is None else steps)
    check(least >= 1, f"sample: rows, per_step, block and steps must be at least 1, not {least}")
    check(temperature >= 0, f"sample: temperature {temperature} must be at least 0")
    place = torch.arange(xt.shape[1], device=xt.device)
    all_finite = torch.ones((), dtype=torch.bool, device=xt.device)
    yield xt
    for start in range(0, xt.shape[1], block):
        inside = (place >= start) & (place < start + block)
        left = ((xt == mask_id) & inside).sum(1, keepdim=True)  # (B, 1)  masks of this block
        most = int(left.max())
        for step in range(math.ceil(most / per_step) if steps is None else min(steps, most)):
            quota = per_step if steps is None else left // steps + (step < left % steps)
            where = (xt == mask_id) & inside
            if order == "random":  # the positions are chosen first: the model computes no others
                noise = torch.rand(xt.shape, generator=generator, device=xt.device)
                where = where & (ranks(noise.masked_fill(~where, -1)) < quota)
            logits = model(xt, where)  # (M, V)
            if ban_mask and 0 <= mask_id < logits.shape[-1]:
                logits = logits.index_fill(-1, place.new_tensor(mask_id), -torch.inf)
            noisy_logit, token = draw(logits, temperature, generator)  # (M,) each
            all_finite = all_finite & noisy_logit.isfinite().all()
            commit = where
            if order != "random":
                p = upcast(logits).softmax(-1)  # (M, V)
                p = p.amax(-1) if order == "top_prob" else p.gather(-1, token[:, None])[:, 0]
                confidence = p.new_full(where.shape, -1).masked_scatter(where, p)  # (B, L)
                commit = where & (ranks(confidence) < quota)
            xt = torch.where(commit, xt.masked_scatter(where, token), xt)
            yield xt
    check(all_finite, "sample: a logit was NaN or infinite; check the model and the temperature")


def draw(logits: Tensor, temperature: float, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """Return the largest noisy logits, (M,), and the tokens that have them, (M,).

    The argmax of logits / temperature plus Gumbel noise is a draw from softmax(logits /
    temperature). This noise is -log(-log u), where u is uniform on (0, 1) and -log u exponential.
    It is never computed in bfloat16: there u is at most 1 - 2^-8, and the noise at most 5.54. The
    usual maximum of the noise over V = 126,464 tokens is 11.7, so that rare tokens would never be
    drawn.
    """
    if temperature > 0:
        logits = upcast(logits) / temperature
        exponential = torch.empty_like(logits).exponential_(generator=generator)
        smallest = torch.finfo(logits.dtype).tiny  # some devices draw 0, whose log is infinite
        logits = logits - exponential.clamp_min(smallest).log()
    return logits.max(-1)


# ---- 8. Exact oracles ---------------------------------------------------------------------------
# For small V and L everything can be enumerated in float64, and the tests compare with it. Here
# mask_id is V, a sequence is a number in base V with the most significant digit first, and a
# distribution is a vector (V**L,) in the order of these numbers.
def all_sequences(V: int, L: int, device: torch.device | str | None = None) -> Tensor:
    """Return every sequence in the order of its number, (V**L, L)."""
    return torch.cartesian_prod(*[torch.arange(V, device=device)] * L).view(-1, L)


def state_number(xt: Tensor, V: int) -> Tensor:
    """Return for each state in xt (B, L) its row number in `all_sequences(V + 1, L)`, (B,)."""
    return (xt * (V + 1) ** torch.arange(xt.shape[1] - 1, -1, -1, device=xt.device)).sum(-1)


class Table(nn.Module):
    """A model that looks its logits up in a learnable table, ((V + 1)**L, L, V), of all states."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, xt: Tensor, where: Tensor | None = None) -> Tensor:
        state = state_number(xt, V=self.logits.shape[2])[:, None].expand_as(xt)
        place = torch.arange(xt.shape[1], device=xt.device).expand_as(xt)
        if where is None:
            return self.logits[state, place]
        return self.logits[state[where], place[where]]


def exact_marginal(
    model: Callable,
    V: int,
    L: int,
    device: torch.device | str | None = None,
    choose: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return rho_theta (V**L,), float64, the distribution of `sample`; it is differentiable.

    Let reach(s) be the probability that the sampler visits the state s; it starts in the state with
    L masks. Any other state s is reached by filling in one of its known positions i last. The state
    before, xt, is s with position i masked, and has k masks. So
        reach(s) = sum_i reach(xt) pi_theta(s_i | xt, i) / k                                 (D11)
    This is computed for all states with L masks, then with L - 1, and so on down to the finished
    sequences.

    choose  another decoding order: it takes the posteriors at the k masks, (n, k, V), and returns
            the probability that a mask is next and becomes v, (n, k, V); None: the random order

    Raise ValueError if the result is not finite.
    """
    states = all_sequences(V + 1, L, device)
    digit = state_number(torch.eye(L, dtype=torch.long, device=device), V)  # (L,) place values
    token = torch.arange(V, device=device)
    k = (states == V).sum(1)
    reach = (k == L).double()
    for level in range(L, 0, -1):
        for number in (k == level).nonzero()[:, 0].split(2**14):  # in pieces, to save memory
            where = states[number] == V
            p = model(states[number], where).double().softmax(-1).view(-1, level, V)
            p = p / level if choose is None else choose(p)
            row, place = where.nonzero(as_tuple=True)  # (M,) each
            # If the mask, the digit V, becomes the token, the number of the state changes by this.
            child = number[row, None] + (token - V) * digit[place, None]  # (M, V)
            flow = reach[number[row], None] * p.flatten(0, 1)  # (M, V)
            reach = reach.index_add(0, child.flatten(), flow.flatten())
    return finite(reach[k == 0], "exact_marginal")


def finite(x: Tensor, name: str) -> Tensor:
    """Return x, or raise ValueError if it is not finite."""
    cause = "the input held NaN, infinite or huge numbers; ban a token by the logit -1e4"
    check(x.isfinite().all(), f"{name}: the result is not finite; {cause}")
    return x


def exact_tilt(rho: Tensor, r: Tensor, a: float) -> Tensor:
    """Return the tilt of rho (V**L,) by a, proportional to rho e^{a r}, (V**L,), float64 (D1).

    Raise ValueError if rho and r differ in shape or the result is not finite.
    """
    check(rho.shape == r.shape, f"exact_tilt: {[*rho.shape]} and {[*r.shape]} must share a shape")
    return finite((rho.double().log() + a * r.double()).softmax(0), "exact_tilt")


def exact_posterior(rho: Tensor, xt: Tensor) -> Tensor:
    """Return the posteriors P(x1_i = v | xt) under rho (V**L,), (B, L, V), float64.

    They are NaN where rho gives xt (B, L) the probability 0. Raise ValueError if the size of rho is
    not V**L for any V.

    How: P(x1_i = v | xt) = P(xt with x_i = v) / P(xt). To tabulate P(xt) for every state, the sum
    over each axis of rho is appended to it as entry V. Index V thus means a masked position.
    """
    L = xt.shape[1]
    V = round(len(rho) ** (1 / L))
    check(V**L == len(rho), f"exact_posterior: {len(rho)} probabilities are not V**{L} for any V")
    P = rho.double().view((V,) * L)
    for axis in range(L):
        P = torch.cat([P, P.sum(axis, keepdim=True)], axis)
    P = P.flatten()  # ((V + 1)**L,)
    token = torch.arange(V, device=xt.device)
    here = state_number(xt, V)[:, None, None]
    digit = state_number(torch.eye(L, dtype=torch.long, device=xt.device), V)  # (L,) place values
    step = torch.where(xt == V, digit, 0)[..., None]  # (B, L, 1)
    joint = P[here + step * (token - V)]  # (B, L, V)  P(xt with x_i = v), where i is masked
    possible = (xt[..., None] == V) | (xt[..., None] == token)  # a known token has one value
    return torch.where(possible, joint, 0) / P[here]


def regret_bound(
    model: Callable, rho: Tensor, r: Tensor, h: float, V: int
) -> tuple[Tensor, Tensor]:
    """Return both sides of KL(rho_{a+h} || rho_theta) <= (loss - least loss) / Z, exact scalars.

    It says that a student whose loss is close to the least loss (its regret is small) is close to
    the tilt as a distribution of whole sequences.
    rho (V**L,) is rho_a, and r (V**L,) holds the rewards. The loss is L times `mean_over_masked` of
    (D3), in expectation over x1 ~ rho_a and `mask_random`. The posteriors of rho_{a+h} attain the
    least loss. As E_a[T | xt] = Z(xt) pi_{a+h}, the right side is
        E[(L/k) sum_{i masked} KL(pi_{a+h}(.|xt,i) || pi_theta(.|xt,i))]                     (D12)
    with the expectation over x1 ~ rho_{a+h} and `mask_random`: the factor Z(xt) / Z turns the mean
    under rho_a into this one. The right side exceeds the left one by the
    gap in (D6), averaged over x1. They are equal if the student gives a sequence the same
    probability in every order of sampling. Raise ValueError if a side is not finite.
    """
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


# ---- 9. The demo: `python dtm.py` ---------------------------------------------------------------
# The first part is one masked position with five tokens, which a pocket calculator can check. The
# second part does the same for all 27 sequences of three tokens, in every state, and then trains.
def main() -> None:
    print_one_position()
    print()
    print_all_states()


def one_position(pi_a: list[float], w: list[float], c: float) -> dict:
    """Return the mean target, the mean gradient, its variance and the best c for one position.

    pi_a and w hold a number for each token. The gradient is that of (D3) with respect to the logits
    of a student that equals the teacher; its variance is the sum over the components.
    """
    V = len(pi_a)
    mean_target, mean_gradient = [0.0] * V, [0.0] * V
    mean_square = numerator = denominator = 0.0
    for token in range(V):  # the teacher draws it with probability pi_a[token]
        q = 0.0
        for v in range(V):
            e = 1 if v == token else 0
            target = c * pi_a[v] + (w[token] - c) * e
            gradient = w[token] * pi_a[v] - target  # the sum of the target is w[token]
            mean_target[v] += pi_a[token] * target
            mean_gradient[v] += pi_a[token] * gradient
            mean_square += pi_a[token] * gradient**2
            q += (e - pi_a[v]) ** 2
        numerator += pi_a[token] * q * w[token]
        denominator += pi_a[token] * q
    variance = mean_square - sum(g**2 for g in mean_gradient)
    best_c = numerator / denominator  # (D7), where y = w
    return {"target": mean_target, "mean": mean_gradient, "variance": variance, "best_c": best_c}


def print_one_position() -> None:
    """Print a tilt of one posterior on five tokens A to E, number by number."""
    r, pi_a, h = [0, 0, 1, 1, 2], [0.4, 0.2, 0.2, 0.1, 0.1], math.log(2)
    w = [math.exp(h * reward) for reward in r]
    Z = sum(p * weight for p, weight in zip(pi_a, w, strict=True))
    tilted = [p * weight / Z for p, weight in zip(pi_a, w, strict=True)]

    def line(name: str, numbers: list[float], end: str = "") -> None:
        print(f"{name:>28}" + "".join(f"{x:8.3f}" for x in numbers) + end)

    print("1. One masked position, h = log 2: each unit of reward doubles the weight.")
    print(f"{'token v':>28}" + "".join(f"{letter:>8}" for letter in "ABCDE"))
    line("reward r", r)
    line("weight w = e^{h r}", w, f"    Z = sum_v pi_a w = {Z:.3f}")
    line("teacher's posterior pi_a", pi_a)
    line("tilted posterior pi_a w / Z", tilted)
    print("The target T = c pi_a + (w - c) e, with c = 1, if the teacher draws ...")
    for token, letter in enumerate("ABCDE"):
        target = [pi_a[v] + (w[token] - 1) * (v == token) for v in range(5)]
        line(f"{letter} (probability {pi_a[token]:g})", target)
    at_1 = one_position(pi_a, w, c=1.0)
    line("mean target", at_1["target"], "    = Z times the tilted posterior")
    print("The gradient at the teacher: its mean and, last, its variance (a sum over v), for ...")
    names = {"c = 0": 0.0, "c = 0.5": 0.5, "c = 1": 1.0}
    names[f"best c = {at_1['best_c']:.3f}"] = at_1["best_c"]
    for name, c in names.items():
        at_c = one_position(pi_a, w, c)
        line(name, at_c["mean"], f"{at_c['variance']:12.3f}")


class Enumeration:
    """One tilt by h of a random distribution: every sequence x1 (N of them) in every state (S)."""

    def __init__(self, V: int = 3, L: int = 3, h: float = 3.0):
        noise = Generator().manual_seed(0)
        self.V, self.L, self.h = V, L, h
        self.rho = torch.randn(V**L, generator=noise).double().softmax(0)  # (N,)  rho_a
        self.r = torch.rand(V**L, generator=noise).double()  # (N,)
        w = tilt_weight(self.r, h)
        self.w = w / (self.rho @ w)  # (N,)  with Z = 1
        x1, self.states = all_sequences(V, L), all_sequences(V + 1, L)
        self.teacher = Table(exact_posterior(self.rho, self.states).log().clamp_min(-70))
        hidden = self.states == V  # (S, L)
        k = hidden.sum(1, keepdim=True)
        self.share = hidden / k.clamp_min(1)  # (S, L)  the 1/k of `mean_over_masked`
        mask_probability = 1 / torch.tensor([L * math.comb(L, n) for n in range(L + 1)]).double()[k]
        agree = ((self.states[:, None] == x1) | hidden[:, None]).all(-1)  # (S, N)
        self.joint = (
            agree * self.rho * mask_probability
        )  # (S, N)  probability that training meets the pair
        logits_a = self.teacher(self.states).detach()[:, None].expand(-1, len(x1), L, V)
        w_all = self.w[:, None].expand(len(self.states), -1, L)  # (S, N, L)
        self.batch = (logits_a, x1.expand(len(self.states), -1, L), w_all)

    def values_of_c(self) -> dict[str, Tensor]:
        """Return six choices of c, each (S, L): four numbers, that of (D8), and that of (D7)."""
        y, q = control_variate_targets(self.batch[0], *self.batch)  # (S, N, L) each
        q = q * self.joint[..., None] * self.share[:, None] ** 2
        values = {"0": 0, "0.5": 0.5, "1": 1, "2": 2, "best scalar c": (q * y).sum() / q.sum()}
        values["best c(xt, i)"] = (q * y).sum(1) / q.sum(1).clamp_min(1e-30)
        return {name: c + torch.zeros(self.share.shape).double() for name, c in values.items()}

    def gradient(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean gradient of the logits in each state, (S, 1, L, V), and its variance."""
        logits = self.batch[0].clone().requires_grad_()
        loss = c_dtm_loss(logits, *self.batch, c[:, None])  # (S, N, L)
        (self.share[:, None] * loss).sum().backward()
        given_state = self.joint / self.joint.sum(1, keepdim=True)  # (S, N)
        mean = (given_state[..., None, None] * logits.grad).sum(1, keepdim=True)
        return mean, (self.joint[..., None, None] * (logits.grad - mean) ** 2).sum()

    def train(self, c: Tensor, seed: int) -> Table:
        """Return a student after 60 steps on 128 samples each."""
        noise = Generator().manual_seed(seed)
        student = Table(self.teacher.logits.detach().clone())
        optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
        for i in self.rho.multinomial(60 * 128, True, generator=noise).split(128):
            x1 = all_sequences(self.V, self.L)[i]
            xt, mask = mask_random(x1, self.V, noise)
            c_here = c[state_number(xt, self.V)]  # (B, L)
            loss = c_dtm_loss(student(xt), self.teacher(xt), x1, self.w[i, None], c_here)
            optimizer.zero_grad()
            mean_over_masked(loss, mask).backward()
            optimizer.step()
        return student.requires_grad_(False)

    def bias(self, c: float) -> float:
        """Return KL from the tilt to the minimiser of (D3), in nats, for an inconsistent teacher.

        Its logits are random, so that pi_a is the posterior of no distribution. The minimiser is
        proportional to E[T | xt] = E[w e | xt] + c (pi_a - P(x1_i = v | xt)). The weights are raw.
        """
        V, L, states = self.V, self.L, self.states
        logits = torch.randn(len(states), L, V, generator=Generator().manual_seed(1)).double()
        teacher = Table(logits)
        w = tilt_weight(self.r, self.h)
        rho = exact_marginal(teacher, V, L).detach()  # the distribution that it samples from
        rho_h = rho * w / (rho @ w)
        hidden = (states == V)[:, None]
        agree = ((states[:, None] == all_sequences(V, L)) | hidden).all(-1).double()
        z = (agree @ (rho * w) / (agree @ rho))[:, None, None]  # E[w | xt]
        mismatch = teacher(states).softmax(-1) - exact_posterior(rho, states)
        minimiser = z * exact_posterior(rho_h, states) + c * mismatch  # (S, L, V), up to a factor
        rho_theta = exact_marginal(Table(minimiser.log()), V, L)
        return (rho_h * (rho_h / rho_theta).log()).sum().item()


def print_all_states() -> None:
    """Print, for each c, how it changes the gradient and how far 60 steps get."""
    tilt = Enumeration()
    V, L, h = tilt.V, tilt.L, tilt.h
    print(
        f"2. A tilt h = {h:g} on {V}^{L} sequences: gradient at theta = teacher; KL after 60 steps"
    )
    print("Column 2 is the largest change of the mean gradient against c = 0.")
    print("            c | mean change | variance | KL(rho_{a+h} || rho_theta) <= regret / Z")
    first = None
    for name, c in tilt.values_of_c().items():
        mean, variance = tilt.gradient(c)
        first = mean if first is None else first
        moved = (mean - first).abs().max()
        runs = [regret_bound(tilt.train(c, seed), tilt.rho, tilt.r, h, V) for seed in range(5)]
        kl, bound = torch.tensor(runs).mean(0)
        print(f"{name:>13} | {moved:11.0e} | {variance:8.4f} | {kl:26.5f} <= {bound:.5f}")
    bias = [f"{tilt.bias(c):.0e} at c = {c}" for c in (0, 0.5, 1)]
    print(f"Inconsistent teacher, raw w: the minimiser is off the tilt by {', '.join(bias)} nats.")


if __name__ == "__main__":
    main()
