"""`dtm.tilt_matching` on a model that others trained: AntiBERTy writes part of an antibody's loop.

    pip install transformers && pip install --no-deps antiberty==0.1.3
    python -m figures.antibody     17 minutes on two cores

The task: 4 residues in the loop CDR-H3 of trastuzumab, a drug against breast cancer, are masked:
C SRWG[GDGF]YAMDY W. The model fills them in, and the reward asks for a loop that dissolves and
lasts (see `reward`). The model is AntiBERTy (Ruffolo, Gray, Sulam 2021, arXiv 2112.07782, MIT
licence), which learned to fill in single residues of antibodies. Its distribution rho_0 is that of
`dtm.sample` in random order. `tilt_matching` trains its biases and layer norms in three phases,
once with c = 0 and once with c = 1.

The reference: the mean reward under rho_a is a ratio of two means over samples of rho_0,
E r e^{a r} / E e^{a r}. The JSON has this estimate, its standard error and the effective number of
samples (ess) at several tilts a. For each arm and seed it also has the mean reward of the model at
the start of each phase (`trace`) and at the end (`reward`).
"""

import argparse
import copy
import functools
import multiprocessing
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

import dtm
import maze_lab as lab
from figures import command

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"  # in the order of the model's vocabulary
L, V, MASK = 4, 20, 20
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *RESIDUES]
CHAIN = "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYL"
CHAIN += "QMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS"  # the heavy chain of trastuzumab
TOKENS = torch.tensor([VOCABULARY.index(word) for word in ["[CLS]", *CHAIN, "[SEP]"]])
START = 1 + CHAIN.index("GDGFYA")  # of the loop, among the tokens
HYDROPATHY = {"I": 4.5, "V": 4.2, "L": 3.8, "F": 2.8, "C": 2.5, "M": 1.9, "A": 1.8, "G": -0.4}
HYDROPATHY |= {"T": -0.7, "S": -0.8, "W": -0.9, "Y": -1.3, "P": -1.6, "H": -3.2, "E": -3.5}
HYDROPATHY |= {"Q": -3.5, "D": -3.5, "N": -3.5, "K": -3.9, "R": -4.5}
LIABILITY = re.compile("(?=N[^P][ST]|N[GS]|D[GS]|C)")
INSTALL = "pip install transformers && pip install --no-deps antiberty==0.1.3"
ARMS = {"c = 0": 0.0, "c = 1": 1.0}
SETTINGS = {"a_end": 9.0, "h": 3.0, "rollouts": 768, "steps": 200, "batch": 32, "lr": 3e-3}
DRAWS = 1024  # loops from each trained model
BASE_PARTS, BASE_DRAWS = 16, 512  # loops from the base model, drawn in so many parts


def reward(x: Tensor) -> Tensor:
    """Return the reward of loops x (n, 4), (n,): hydrophilicity, less 0.1 for each liability.

    Hydrophilicity is the negated mean Kyte-Doolittle hydropathy, scaled to run from 0 (all I) to 1
    (all R), since hydrophobic loops stick to each other. The liabilities are the sites of
    N-glycosylation N-X-S/T (X not P), of deamidation NG and NS, of isomerisation DG and DS, and a
    free cysteine. The residues beside the loop (WG, YA) can neither begin nor end one.
    """
    scale = torch.tensor([(4.5 - HYDROPATHY[residue]) / 9 for residue in RESIDUES])
    loops = ["".join(RESIDUES[v] for v in row) for row in x.tolist()]
    liabilities = torch.tensor([len(LIABILITY.findall(loop)) for loop in loops])
    return scale[x].mean(1) - 0.1 * liabilities


class LoopModel(nn.Module):
    """A BERT under the model protocol of dtm.py; xt (B, 4) are residues 0 to 19, or MASK.

    The rest of the chain is read once, with the loop masked. Its hidden states are constants that
    the loop attends to, so that a state costs 4 tokens instead of 122.
    """

    def __init__(self, bert: nn.Module):
        super().__init__()
        self.bert = bert
        self.token = torch.tensor([VOCABULARY.index(residue) for residue in [*RESIDUES, "[MASK]"]])
        self.place = torch.arange(START, START + L)[None]
        self.chain = []  # for each layer, the hidden states around the loop, (118, width)
        with torch.no_grad():
            masked = TOKENS.index_fill(0, self.place[0], self.token[MASK])
            hidden = bert.bert.embeddings(input_ids=masked[None])
            for layer in bert.bert.encoder.layer:
                self.chain.append(torch.cat([hidden[0, :START], hidden[0, START + L :]]))
                hidden = run_layer(layer, hidden, hidden[0, :0])

    def forward(self, xt: Tensor, where: Tensor | None = None) -> Tensor:
        states, which = xt.unique(dim=0, return_inverse=True)  # each state is read once
        logits = torch.cat([self.fill(part) for part in states.split(256)])[which]
        return logits if where is None else logits[where]

    def fill(self, xt: Tensor) -> Tensor:
        hidden = self.bert.bert.embeddings(input_ids=self.token[xt], position_ids=self.place)
        for layer, chain in zip(self.bert.bert.encoder.layer, self.chain, strict=True):
            hidden = run_layer(layer, hidden, chain)
        return self.bert.cls(hidden)[..., self.token[:V]]  # the logits of the 20 residues


def run_layer(layer: nn.Module, hidden: Tensor, chain: Tensor) -> Tensor:
    """Return the layer's output for hidden (B, T, D), which attends to itself and to the chain."""
    attention = layer.attention.self

    def heads(t: Tensor) -> Tensor:  # (..., heads, T, D / heads)
        return t.unflatten(-1, (attention.num_attention_heads, -1)).transpose(-3, -2)

    query, key, value = (
        heads(project(hidden)) for project in (attention.query, attention.key, attention.value)
    )
    chain_key, chain_value = heads(attention.key(chain)), heads(attention.value(chain))
    # One product for all rows of the batch: the chain is not copied for each of them.
    chain_scores = torch.einsum("bhqd,hkd->bhqk", query, chain_key)
    scores = torch.cat([chain_scores, query @ key.mT], -1) / query.shape[-1] ** 0.5
    chain_share, share = scores.softmax(-1).split([len(chain), hidden.shape[1]], -1)
    mixed = torch.einsum("bhqk,hkd->bhqd", chain_share, chain_value) + share @ value
    hidden = layer.attention.output(mixed.transpose(1, 2).flatten(2), hidden)
    return layer.output(layer.intermediate(hidden), hidden)


@functools.cache
def base_model() -> LoopModel:
    """Return the published model without dropout. None of its package's code runs."""
    from transformers import BertConfig, BertForMaskedLM

    folder = Path(find_spec("antiberty").origin).parent / "trained_models"
    words = (folder / "vocab.txt").read_text().split()
    dtm.check(words == VOCABULARY, "AntiBERTy has another vocabulary; install antiberty==0.1.3")
    folder = folder / "AntiBERTy_md_smooth"
    bert = BertForMaskedLM(BertConfig.from_json_file(folder / "config.json"))
    weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    missing = bert.load_state_dict(weights, strict=False).missing_keys
    dtm.check(not missing, f"AntiBERTy lacks the weights {missing}; install antiberty==0.1.3")
    return LoopModel(bert.eval()).requires_grad_(False)


def draw_rewards(model: LoopModel, n: int, noise: Generator) -> Tensor:
    *_, x1 = dtm.sample(model, torch.full((n, L), MASK), MASK, generator=noise)
    return reward(x1)


def run_base(part: int) -> list[float]:
    """Return rewards of the base model's samples. Arms never use seeds from 1000."""
    return draw_rewards(base_model(), BASE_DRAWS, Generator().manual_seed(1000 + part)).tolist()


def run_arm(name: str, seed: int) -> dict:
    """Return the mean reward of a trained model, and of its rollouts on the way."""
    start, noise, trace = time.time(), Generator().manual_seed(seed), []
    model = copy.deepcopy(base_model())
    for weight in model.parameters():
        weight.requires_grad_(weight.dim() == 1)  # biases and layer norms, 0.2 % of all

    def watch(a: float, rewards: Tensor, model: nn.Module) -> None:
        trace.append({"a": a, "reward": rewards.mean().item()})

    dtm.tilt_matching(
        model, reward, MASK, L, c=ARMS[name], generator=noise, watch=watch, **SETTINGS
    )
    final = draw_rewards(model, DRAWS, noise).mean().item()
    trace.append({"a": SETTINGS["a_end"], "reward": final})
    row = {"arm": name, "seed": seed, "reward": final, "trace": trace}
    return row | {"seconds": time.time() - start}


def tilted_mean(r: Tensor, a: float) -> dict:
    """Return the mean reward under rho_a, from rewards r (n,) of rho_0, by weights e^{a r}."""
    share = (a * r).softmax(0)
    mean = share @ r
    error = (share * (r - mean)).norm()  # of a ratio of two means, by the delta method
    ess = 1 / share.square().sum()
    return {"a": a, "reward": mean.item(), "error": error.item(), "ess": ess.item()}


def experiment(seeds: list[int], jobs: int) -> dict:
    """Return the result: every arm on every seed, and the tilt from samples of the base."""
    start = time.time()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        base = [pool.submit(run_base, part) for part in range(BASE_PARTS)]
        runs = [pool.submit(run_arm, name, seed) for name in ARMS for seed in seeds]
        rows = [run.result() for run in runs]
        r = torch.tensor([x for part in base for x in part.result()], dtype=torch.float64)
    arms = {}
    for name in ARMS:
        finals = [row for row in rows if row["arm"] == name]
        arms[name] = dict(
            zip(("reward", "error"), lab.mean_and_error(finals, "reward"), strict=True)
        )
    tilts = torch.linspace(0, SETTINGS["a_end"], 13).tolist()
    return {
        "seeds": seeds,
        "settings": SETTINGS,
        "tilt": [tilted_mean(r, a) for a in tilts],
        "arms": arms,
        "rows": rows,
        "seconds": time.time() - start,
        "versions": {name: version(name) for name in ("torch", "transformers", "antiberty")},
    }


def title_of(result: dict) -> str:
    target = result["tilt"][-1]["reward"]
    gaps = {name: abs(arm["reward"] - target) for name, arm in result["arms"].items()}
    return (
        f"With c = 1 the trained model ends {gaps['c = 1']:.3f} from the mean reward of the exact "
        f"tilt; with c = 0 it ends {gaps['c = 0']:.3f} away"
    )


def draw(result: dict, path: Path) -> None:
    """Draw the mean reward along the tilt: of each arm, and of rho_a by importance weights."""
    figure, (axis,) = command.new_figure(columns=1, height=3.6)
    points = [[point[key] for point in result["tilt"]] for key in ("a", "reward", "error")]
    a, mean, error = torch.tensor(points)
    axis.plot(a, mean, color="0.5", label="exact tilt, by importance weights")
    axis.fill_between(a, mean - error, mean + error, color="0.85")
    for name in result["arms"]:
        traces = [row["trace"] for row in result["rows"] if row["arm"] == name]
        for points in zip(*traces, strict=True):  # one phase of all seeds
            mean, error = lab.mean_and_error(points, "reward")
            label = f"{name}, {len(traces)} seeds" if points[0]["a"] == 0 else None
            style = {"fmt": "o" if name == "c = 1" else "s", "ms": 5, "capsize": 3}
            style |= {"color": command.COLOURS[name], "label": label}
            axis.errorbar(points[0]["a"], mean, error, **style)
    title = "bars and band: one standard error"
    axis.legend(title=title, frameon=False, loc="lower right")
    axis.set(xlabel="tilt a", ylabel="mean reward of sampled loops")
    command.save_figure(figure, title_of(result), path)


def main(argv: list[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--seeds", type=int, default=5, help="Run this many seeds (default 5).")
    add("--jobs", type=int, default=lab.processors(), help="Run this many processes.")
    text = "Write antibody.png to this folder and the JSON to its subfolder data."
    add("--out", type=Path, default=Path("runs/antibody"), help=f"{text} (default runs/antibody)")
    args = parser.parse_args(argv)
    if not all(find_spec(package) for package in ("transformers", "antiberty")):
        sys.exit(f"This script needs a model that others trained; install it: {INSTALL}")
    result = experiment(list(range(args.seeds)), args.jobs)
    given = sys.argv[1:] if argv is None else argv
    result["command"] = " ".join(["python -m figures.antibody", *given])
    for name, mean in {"exact tilt": result["tilt"][-1], **result["arms"]}.items():
        print(f"{name:>10}: mean reward {mean['reward']:.4f} +- {mean['error']:.4f}")
    print("The numbers are in", lab.save_result(args.out, "antibody", result))
    draw(result, args.out / "antibody.png")
    print("The picture is", args.out / "antibody.png")


if __name__ == "__main__":
    main()
