"""DTM on a masked language model that others trained: AntiBERTy writes an antibody's loop.

    pip install transformers && pip install --no-deps antiberty==0.1.3
    python -m figures.antibody     16 minutes on 2 idle cores; no other script needs the packages

THE TASK. The heavy chain of trastuzumab, a drug against breast cancer, with 8 residues of its loop
CDR-H3 hidden: C SR[WGGDGFYA]MDY W. A sequence is one filling; its reward asks for a loop that
dissolves and lasts (see `reward`). There are 20^8 fillings: laws are no longer enumerated, but the
probability of a given filling is still exact, by (D11) over the 2^8 ways to know part of it.

THE MODEL. AntiBERTy (Ruffolo, Gray, Sulam 2021, arXiv 2112.07782; MIT licence) learned to fill in
residues of antibodies, never to write: its conditionals are no one law's, and the base rho_0 is by
definition the law of `dtm.sample` in random order. Its last layers are tuned, in one jump: the
weights of the whole tilt leave more than half of the rollouts (`ess`).

THE METRICS (`rows` of the JSON; *_se: standard errors of sampling)
    reward      E_theta r;  liable, distinct: shares of loops with a liability, of different loops
    frequencies (8, 20): residues by position;  seconds: of the tuning alone
    kl_reverse  KL(rho_theta || rho_A), nats, from `log_ratio`: exact log-probabilities but for Z
`bases` and `tilt`: the same of rho_0, and of rho_A from rollouts of rho_0 by weights e^{A r}, whose
effective sample size is ess.
"""

import argparse
import copy
import functools
import math
import multiprocessing
import os
import platform
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

import dtm
import maze_lab as lab
from dtm import c_dtm_loss, mask_random, phases, row_mean, sample, tilt_weight
from figures.objectives import sequence_law

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"  # in the order of the model's vocabulary
L, V, MASK = 8, 20, 20
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *RESIDUES]
CHAIN = "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYL"
CHAIN += "QMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS"
TOKENS = torch.tensor([VOCABULARY.index(word) for word in ["[CLS]", *CHAIN, "[SEP]"]])
START = 1 + CHAIN.index("WGGDGFYA")  # of the loop, among the tokens
PACKAGES = {"transformers": "transformers", "antiberty": "--no-deps antiberty==0.1.3"}
HYDROPATHY = {"I": 4.5, "V": 4.2, "L": 3.8, "F": 2.8, "C": 2.5, "M": 1.9, "A": 1.8, "G": -0.4}
HYDROPATHY |= {"T": -0.7, "S": -0.8, "W": -0.9, "Y": -1.3, "P": -1.6, "H": -3.2, "E": -3.5}
HYDROPATHY |= {"Q": -3.5, "D": -3.5, "N": -3.5, "K": -3.9, "R": -4.5}
LIABILITY = re.compile("(?=N[^P][ST]|N[GS]|D[GS]|C)")
ARMS = ["c = 0", "c = 1", "learned c"]


@dataclass
class Config:
    a_end: float = 6.0  # the tilt A, per unit of reward
    h: float = 6.0  # tilt increment of a phase
    rollouts: int = 1536  # of a phase
    steps: int = 90  # of a phase
    batch: int = 64
    lr: float = 1.5e-4
    layers: int = 3  # the last ones of 8 are tuned
    judged: int = 512  # draws from the tuned model
    laws: int = 32  # of these, with their exact probability
    base: int = 4096  # rollouts of the base, for log Z and the tilt


QUICK = {"rollouts": 128, "steps": 10, "judged": 64, "laws": 4, "base": 256}


# ---- The task -----------------------------------------------------------------------------------
def reward(x: Tensor) -> Tensor:
    """r (n,) in [0, 1] of loops x (n, 8): hydrophilicity, halved for each known liability.
    Hydrophilicity is the mean Kyte-Doolittle hydropathy, turned round and scaled from 0 (all I) to
    1 (all R): hydrophobic loops stick to each other. Liabilities, by a residue where one begins:
    N-glycosylation N-X-S/T (X not P), deamidation NG NS, isomerisation DG DS, a free cysteine.
    The frame around the loop (SR, MDY) can neither begin nor end one, so the loop tells all."""
    scale = torch.tensor([(4.5 - HYDROPATHY[residue]) / 9 for residue in RESIDUES])
    halvings = torch.tensor([len(LIABILITY.findall(loop)) for loop in letters(x)])
    return scale[x].mean(1) * 0.5**halvings


def letters(x: Tensor) -> list[str]:
    return ["".join(RESIDUES[v] for v in row) for row in x.tolist()]


# ---- The model ----------------------------------------------------------------------------------
class LoopModel(nn.Module):
    """A BERT under the model protocol of dtm.py: xt (B, L) are the residues 0 to 19 of the loop, or
    MASK. The frame is read once, by the base and with the loop hidden; its hidden states are then
    constants which the loop attends to. So a state costs 8 tokens, not 121."""

    def __init__(self, bert: nn.Module):
        super().__init__()
        self.bert = bert
        self.token = torch.tensor([VOCABULARY.index(residue) for residue in [*RESIDUES, "[MASK]"]])
        self.place = torch.arange(START, START + L)[None]
        self.frame = []  # (1, T, D) a layer
        with torch.no_grad():
            hidden = TOKENS.index_fill(0, self.place[0], self.token[MASK])
            h = bert.bert.embeddings(input_ids=hidden[None])
            for layer in bert.bert.encoder.layer:
                self.frame.append(torch.cat([h[:, :START], h[:, START + L :]], 1))
                h = read(layer, h, h[:, :0])

    def forward(self, xt: Tensor, where: Tensor | None = None) -> Tensor:
        states, which = xt.unique(dim=0, return_inverse=True)  # each is read once
        logits = torch.cat([self.fill(part) for part in states.split(256)])[which]
        return logits if where is None else logits[where]

    def fill(self, xt: Tensor) -> Tensor:
        h = self.bert.bert.embeddings(input_ids=self.token[xt], position_ids=self.place)
        for layer, frame in zip(self.bert.bert.encoder.layer, self.frame, strict=True):
            h = read(layer, h, frame)
        return self.bert.cls(h)[..., self.token[:V]]  # no other token is ever drawn


def read(layer: nn.Module, h: Tensor, frame: Tensor) -> Tensor:
    """One layer for h (B, T, D), which attends to itself and to the frame (1, T', D)."""
    attention = layer.attention.self

    def heads(t: Tensor) -> Tensor:
        split = t.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
        return split.expand(len(h), -1, -1, -1)

    keys = torch.cat([heads(attention.key(frame)), heads(attention.key(h))], 2)
    values = torch.cat([heads(attention.value(frame)), heads(attention.value(h))], 2)
    mixed = F.scaled_dot_product_attention(heads(attention.query(h)), keys, values)
    h = layer.attention.output(mixed.transpose(1, 2).flatten(2), h)
    return layer.output(layer.intermediate(h), h)


def load_bert() -> nn.Module:
    """The published weights, as data: no code of their package runs."""
    from transformers import BertConfig, BertForMaskedLM

    folder = Path(find_spec("antiberty").origin).parent / "trained_models"
    dtm.check((folder / "vocab.txt").read_text().split() == VOCABULARY, "another vocabulary")
    bert = BertForMaskedLM(BertConfig.from_json_file(folder / "AntiBERTy_md_smooth/config.json"))
    file = folder / "AntiBERTy_md_smooth/pytorch_model.bin"
    weights = torch.load(file, map_location="cpu", weights_only=True)
    missing = bert.load_state_dict(weights, strict=False).missing_keys
    dtm.check(not missing, f"the weights of AntiBERTy lack {missing}")
    return bert.eval()  # without dropout


@functools.cache
def base_model() -> LoopModel:
    return LoopModel(load_bert()).requires_grad_(False)


@torch.no_grad()
def frame_kl(model: LoopModel, x: Tensor, noise: Generator) -> float:
    """What the constant frame costs: KL, nats a masked residue, from the whole model's guess."""
    xt, mask = mask_random(x, MASK, noise)
    tokens = TOKENS.repeat(len(x), 1)
    tokens[:, model.place[0]] = model.token[xt]
    whole = model.bert(input_ids=tokens).logits[:, model.place[0]][..., model.token[:V]]
    p, q = whole[mask].log_softmax(-1), model(xt, mask).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


# ---- The loop -----------------------------------------------------------------------------------
def tilt(model: LoopModel, control, cfg: Config, noise: Generator) -> None:
    """README's `tilt`, with a control variate and the lab's step; tunes the model in place."""
    optimiser = lab.adam(model)
    for _, h in phases(cfg.a_end, cfg.h):
        teacher = copy.deepcopy(model).requires_grad_(False)
        x1 = draw_loops(teacher, cfg.rollouts, noise)
        w = tilt_weight(reward(x1), h, normalize=True)
        for step in range(cfg.steps):
            i = torch.randint(len(x1), (cfg.batch,), generator=noise)
            xt, mask = mask_random(x1[i], MASK, noise)
            token, w_i, c = x1[i][mask], lab.spread(w[i], mask), control(xt, mask)
            logits, logits_a = model(xt, mask), teacher(xt, mask)
            loss = c_dtm_loss(logits, logits_a, token, w_i, c)
            lab.take_step(optimiser, row_mean(loss, mask), cfg.lr * (1 - step / cfg.steps))
            control.learn(c, logits.detach(), logits_a, token, w_i, mask)


def draw_loops(model: LoopModel, n: int, noise: Generator) -> Tensor:
    *_, x1 = sample(model, torch.full((n, L), MASK), MASK, generator=noise)
    return x1


class LearnedC(lab.LearnedC):
    """The lab's c(xt, i), for 20 tokens."""

    def __init__(self, seed: int, hidden: int = 64):
        noise = Generator().manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(L * (V + 1), hidden), nn.ReLU(), nn.Linear(hidden, L))
        for weight in self.net.parameters():
            nn.init.normal_(weight, std=0.05, generator=noise)
        self.optimiser = lab.adam(self.net)

    def __call__(self, xt: Tensor, mask: Tensor) -> Tensor:
        return (1 + self.net(F.one_hot(xt, V + 1).flatten(1).float()))[mask]


# ---- The judge ----------------------------------------------------------------------------------
def run_base(n: int, part: int) -> Tensor:
    """Rollouts of the base, (n, L); the seeds of the arms stay below 1000."""
    return draw_loops(base_model(), n, Generator().manual_seed(1000 + part))


def run_arm(cfg: Config, arm: str, seed: int) -> dict:
    noise = Generator().manual_seed(seed)
    control = LearnedC(seed) if arm == "learned c" else lab.FixedC(float(arm[4:]))
    model = copy.deepcopy(base_model())
    model.bert.bert.encoder.layer[-cfg.layers :].requires_grad_(True)
    clock = time.perf_counter()
    tilt(model, control, cfg, noise)
    row = {"arm": arm, "seed": seed, "seconds": time.perf_counter() - clock}
    x = draw_loops(model, cfg.judged, noise)
    ratio = log_ratio(model, base_model(), x[: cfg.laws], cfg.a_end)
    return row | describe(x) | {"log_ratio": ratio.tolist()}


def describe(x: Tensor, w: Tensor | None = None) -> dict:
    """What draws x (n, L), with weights w (n,), tell of their law."""
    w = torch.ones(len(x)) if w is None else w
    r, p = reward(x), w / w.sum()
    mean = p @ r
    liable = torch.tensor([bool(LIABILITY.search(loop)) for loop in letters(x)]).float()
    return {
        "reward": mean.item(),
        "reward_se": (p * (r - mean)).norm().item(),
        "liable": (p @ liable).item(),
        "ess": 1 / p.square().sum().item(),
        "distinct": len(x.unique(dim=0)) / len(x),
        "frequencies": (p[:, None, None] * F.one_hot(x, V)).sum(0).tolist(),
    }


@torch.no_grad()
def log_ratio(model, base, x: Tensor, a: float, reward=reward, mask_id: int = MASK) -> Tensor:
    """log rho_a + log Z - log rho_theta (n,), exact but for log Z, of sequences x (n, L)."""
    log_p = sequence_law(model, x, mask_id).log()
    return sequence_law(base, x, mask_id).log() + a * reward(x) - log_p


def kl_reverse(ratio: Tensor, log_z: float) -> tuple[float, float]:
    """KL(rho_theta || rho_a) with its standard error, from `log_ratio` of draws of rho_theta.
    Where R = log rho_a - log rho_theta, E e^R = 1; so e^R - 1 - R has the mean of -R, less variance
    where R is small, and, to first order, no error from that of log Z."""
    gap = (ratio - log_z).expm1() - (ratio - log_z)
    return gap.mean().item(), gap.std().item() / math.sqrt(len(gap))


def log_mean(w: Tensor) -> tuple[float, float]:
    """log E w with its standard error, by the delta method."""
    return w.mean().log().item(), (w.std() / w.mean()).item() / math.sqrt(len(w))


def experiment(cfg: Config, seeds: list[int], jobs: int) -> dict:
    """Every arm on every seed, and the base's rollouts in parts, a process a core."""
    start = time.time()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,))  # one thread each
    try:
        parts = [pool.submit(run_base, cfg.base // 8, part) for part in range(8)]
        arms = [pool.submit(run_arm, cfg, arm, seed) for seed in seeds for arm in ARMS]
        bar = tqdm([*parts, *arms], unit="run", smoothing=0)
        done = [future.result() for future in bar]
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, too, nothing more is begun
    x, rows = torch.cat(done[:8]), done[8:]
    w = (cfg.a_end * reward(x)).exp()
    log_z, log_z_se = log_mean(w)
    for row in rows:
        ratio = torch.tensor(row["log_ratio"], dtype=torch.float64)
        row["kl_reverse"], row["kl_reverse_se"] = kl_reverse(ratio, log_z)
    base = describe(x)
    base["kl_reverse"] = log_z - cfg.a_end * base["reward"]  # KL(rho_0 || rho_A)
    base["frame_kl"] = frame_kl(base_model(), x[:64], Generator().manual_seed(0))
    return {
        "seeds": seeds,
        "seconds": time.time() - start,
        "config": asdict(cfg),
        "arms": [{"name": arm} for arm in ARMS],
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "device": "cpu"},
        "versions": {name: version(name) for name in ("torch", *PACKAGES)},
        "bases": [base],
        "tilt": describe(x, w) | {"log_z": log_z, "log_z_se": log_z_se},
        "rows": sorted(rows, key=lambda row: (ARMS.index(row["arm"]), row["seed"])),
    }


# ---- Figure and command -------------------------------------------------------------------------
COLUMNS = {"reward": "reward", "kl_reverse": "KL(theta||A)", "liable": "with a liability"}


def draw(result: dict, path: Path) -> Path:
    """Left: mean rewards, with the standard error of the seeds. Right: what the loops look like."""
    plt = lab.pyplot()
    figure = plt.figure(figsize=(8.8, 4.2), layout="constrained")
    grid = figure.add_gridspec(3, 2)
    dots, arms = figure.add_subplot(grid[:, 0]), lab.by_arm(result)
    base, tilted = result["bases"][0], result["tilt"]
    above = {"textcoords": "offset points", "ha": "center"}
    groups = {"base": [base], "tilt by weights": [tilted], **arms}
    for place, (name, rows) in enumerate(groups.items()):
        mean, error = lab.mean_and_error(rows, "reward")
        error = error if len(rows) > 1 else rows[0]["reward_se"]
        if name != "tilt by weights":
            distance = lab.mean_and_error(rows, "kl_reverse")[0]
            dots.annotate(f"KL {distance:.2f}", (mean, place), (0, 8), **above)
        dots.errorbar(mean, place, xerr=error, fmt="o", capsize=4, color=lab.COLOURS[place])
    dots.axvline(tilted["reward"], color=lab.COLOURS[1], lw=0.8, zorder=0)
    dots.set_yticks(range(len(groups)), groups)
    dots.set(xlabel="mean reward; KL(rho_theta || rho_A), nats", ylim=(4.6, -0.6))
    dots.margins(x=0.1)
    nearest = min(arms, key=lambda name: lab.mean_and_error(arms[name], "kl_reverse")[0])
    tuned = torch.tensor([row["frequencies"] for row in arms[nearest]]).mean(0)
    logos = {"base": base["frequencies"], "tilt by weights": tilted["frequencies"], nearest: tuned}
    for place, (name, frequencies) in enumerate(logos.items()):
        axis = figure.add_subplot(grid[place, 1])
        draw_logo(axis, name, torch.as_tensor(frequencies))
    axis.set_xlabel("trastuzumab's own residues")
    end = lab.mean_and_error(arms[nearest], "reward")[0]
    share = (end - base["reward"]) / (tilted["reward"] - base["reward"])
    rise = f"from {base['reward']:.2f} to {end:.2f}, {share:.0%} of the way to the tilt's"
    figure.suptitle(f"Tuning lifts the mean reward {rise}")
    return lab.save_figure(figure, path)


def draw_logo(axis, title: str, p: Tensor) -> None:
    """Letters as high as their frequency p (L, V): hydrophilic ones, in blue, at the bottom,
    hydrophobic ones, in orange, on top."""
    from matplotlib.patches import PathPatch
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D

    for place, heights in enumerate(p.tolist()):
        bottom = 0.0
        for residue in sorted(RESIDUES, key=HYDROPATHY.get):
            height = heights[RESIDUES.index(residue)]
            if height > 0.005:  # a lower one could not be seen
                outline = TextPath((0, 0), residue, size=1)
                box = outline.get_extents()
                fit = Affine2D().translate(-box.x0, -box.y0)
                fit.scale(0.9 / box.width, height / box.height).translate(place - 0.45, bottom)
                outline = fit.transform_path(outline)
                axis.add_patch(PathPatch(outline, lw=0, color=shade(residue)))
            bottom += height
    axis.set(xlim=(-0.5, len(p) - 0.5), ylim=(0, 1), yticks=(0, 1))
    axis.set_xticks(range(len(p)), CHAIN[START - 1 :][: len(p)])
    axis.set_title(title, fontsize=10, loc="left")


def shade(residue: str) -> str:
    if HYDROPATHY[residue] < -3:
        return lab.COLOURS[6]
    return lab.COLOURS[1] if HYDROPATHY[residue] > 1.5 else lab.COLOURS[7]


def main() -> None:
    parser = argparse.ArgumentParser(description="DTM on AntiBERTy, a published antibody model.")
    add = parser.add_argument
    add("--seeds", type=int, help="runs per arm, from seed 0 on (default 3, with --quick 1)")
    add("--quick", action="store_true", help=f"a sketch in two minutes: {QUICK}")
    add("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default 2)")
    add("--out", type=Path, default=Path("figures"), help="folder of results (default figures)")
    add("--plot-only", action="store_true", help="only draw the results in --out again")
    args = parser.parse_args()
    args.script = "python -m figures.antibody"
    if args.seeds is None:
        args.seeds = 1 if args.quick else 3
    if args.plot_only:
        lab.redraw(parser, args, draw)
        return
    check_settings(parser, args)
    cfg = Config(**QUICK if args.quick else {})
    try:
        result = experiment(cfg, list(range(args.seeds)), args.jobs)
    except ValueError as error:
        sys.exit(f"stopped: {error}")
    result["command"] = " ".join([args.script, *sys.argv[1:]])
    file = args.out / ("quick_antibody.json" if args.quick else "antibody.json")
    lab.save_result(file, result)
    for name, law in {"base": result["bases"][0], "tilt": result["tilt"]}.items():
        print(f"{name}: reward {law['reward']:.3f} +- {law['reward_se']:.3f}", end="; ")
    print(f"{result['seconds']:.0f} s; each arm's mean +- standard error over its seeds:")
    print(lab.format_table(result, COLUMNS).partition("\n")[2])
    print("wrote", file, draw(result, file.with_suffix(".png")))


def check_settings(parser: argparse.ArgumentParser, args) -> None:
    """What cannot be stops here, with one sentence."""
    missing = [f"pip install {PACKAGES[name]}" for name in PACKAGES if not find_spec(name)]
    if missing:
        parser.error(f"this script alone needs a published model: {' && '.join(missing)}")
    if not (0 < args.seeds <= 1000 and args.jobs > 0):
        parser.error("--seeds must be 1 to 1000, and --jobs at least 1")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error}")


if __name__ == "__main__":
    main()
