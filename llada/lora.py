"""Low-rank adapters (LoRA): a projection y = W x becomes y = W x + (alpha / rank) B A dropout(x).

W is frozen; A and B are trained, for the chosen projections of every block. Adapters are saved and
loaded as folders of the library PEFT (huggingface/peft), and `merge` adds one to its base model.

To adapt other projections, add a line to ADAPTED; its name is then a value of --lora.
"""

import os
import shutil
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from dtm import check
from llada.checkpoint import explained, read_json, read_tensors, write_file
from llada.model import PROJECTIONS, projection_shape, shards

# The authors' code asks for seven projections by Llama's names. LLaDA has only four of these names,
# so that four projections were adapted in the authors' runs.
ADAPTED = {"all": [*PROJECTIONS], "paper": ["q_proj", "k_proj", "v_proj", "up_proj"]}


class LoRA(nn.Module):
    """The two factors of every adapted projection, under the keys "layer:projection".

    config       the base model's config.json
    projections  names from `llada.model.PROJECTIONS`
    seed         of the random A; B starts at zero, so that a new adapter changes nothing

    While training, the factors stay in float32: steps of 1e-6 would vanish in bfloat16.
    """

    def __init__(
        self,
        config: dict,
        projections: list[str],
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        unknown = sorted(set(projections) - PROJECTIONS.keys())
        known = ", ".join(PROJECTIONS)
        check(not unknown, f"LoRA cannot adapt {', '.join(unknown)}; a block has {known}")
        check(bool(projections), f"LoRA needs at least one projection out of {known}")
        needs = "LoRA needs a rank of at least 1 and a dropout of at least 0 and below 1"
        check(rank > 0 and 0 <= dropout < 1, f"{needs}, not rank {rank} and dropout {dropout}")
        self.projections = list(projections)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        generator = Generator().manual_seed(seed)  # on the CPU: the same start on every device
        A, B = {}, {}
        for i in range(config["n_layers"]):
            for name in projections:
                inputs, outputs = projection_shape(config, name)
                uniform = 2 * torch.rand(rank, inputs, generator=generator) - 1
                A[f"{i}:{name}"] = nn.Parameter(uniform * inputs**-0.5)
                B[f"{i}:{name}"] = nn.Parameter(torch.zeros(outputs, rank))
        self.A, self.B = nn.ParameterDict(A), nn.ParameterDict(B)

    def block(self, i: int) -> dict[str, tuple]:
        """Return (A, B, scale, dropout) for each adapted projection of block i, by its name."""
        scale, dropout = self.alpha / self.rank, self.dropout if self.training else 0.0
        keys = [f"{i}:{name}" for name in self.projections]
        factors = [(self.A[key], self.B[key], scale, dropout) for key in keys]
        return dict(zip(self.projections, factors, strict=True))

    def peft_tensors(self) -> dict[str, Tensor]:
        """Return the parameters under the names that PEFT gives them."""
        tensors = {}
        for letter, factors in (("A", self.A), ("B", self.B)):
            for key, p in factors.items():
                place = f"base_model.model.model.transformer.blocks.{key.replace(':', '.')}"
                tensors[f"{place}.lora_{letter}.weight"] = p
        return tensors

    @torch.no_grad()
    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Copy tensors with PEFT's names into the parameters; ValueError if they do not fit."""
        parameters = self.peft_tensors()
        unfit = sorted(parameters.keys() ^ tensors.keys())
        for name in parameters.keys() & tensors.keys():
            if parameters[name].shape != tensors[name].shape:
                unfit.append(name)
        first = min(unfit, default="")
        advice = "use the model that it was trained on"
        check(not unfit, f"the adapter does not fit the base model at {first}; {advice}")
        for name, p in parameters.items():
            p.copy_(tensors[name])

    def save(self, folder: Path, base: str) -> None:
        """Write a PEFT folder; it records where the base model is."""
        write_file(folder / "adapter_model.safetensors", self.peft_tensors())
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            # A regular expression, because the bare name ff_out would also adapt the head.
            "target_modules": rf".*blocks\.\d+\.({'|'.join(self.projections)})",
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
        write_file(folder / "adapter_config.json", config)

    @classmethod
    def load(cls, folder: Path, config: dict) -> "LoRA":
        """Return the frozen adapter of a PEFT folder, for a base model with this config.json.

        Raises ValueError if a file is missing or damaged, if the adapter does not fit the base
        model, or if it is a variant of LoRA, which would load without an error and compute
        something else.
        """
        file = Path(folder) / "adapter_config.json"
        saved = read_json(file)
        for key in ("use_dora", "use_rslora", "alpha_pattern", "modules_to_save"):
            advice = "only plain LoRA can be loaded; train the adapter without this option"
            check(not saved.get(key), f"{file}: {key} is {saved.get(key)!r}, but {advice}")
        tensors = dict(read_tensors(Path(folder) / "adapter_model.safetensors"))
        projections = [p for p in PROJECTIONS if any(f".{p}.lora_" in name for name in tensors)]
        with explained(f"{folder} cannot be used", ValueError, KeyError, TypeError):
            dropout = saved.get("lora_dropout", 0.0)
            lora = cls(config, projections, saved["r"], saved["lora_alpha"], dropout)
            lora.fill(tensors)
        return lora.requires_grad_(False).eval()


def base_of(adapter: Path, model: str = "") -> str:
    """Return the base model of an adapter: `model` if it is given, else the one that it records.

    If the given model differs from the recorded one, rank 0 prints a line. This is not an error,
    since the folder may have moved after the adapter was saved.
    """
    file = Path(adapter) / "adapter_config.json"
    recorded = read_json(file).get("base_model_name_or_path") or ""
    check(bool(model or recorded), f"{file} records no base model; add --model FOLDER")
    first_rank = os.environ.get("RANK", "0") == "0"
    if model and recorded and model != recorded and first_rank:
        tqdm.write(
            f"{adapter} was trained on {recorded}; now it is used on {model}, as --model says"
        )
    return model or recorded


def merge(base: Path, adapter: Path, out: Path) -> None:
    """Write a new checkpoint folder with W + (alpha / rank) B A in place of every adapted W.

    The sum is computed in float32 and rounded to the dtype of W. The names of tensors and files are
    those of the base. Raises ValueError if `out` exists or the adapter does not fit the base.
    """
    check(not out.exists(), f"{out} exists already; merge into a new folder")
    lora = LoRA.load(adapter, read_json(base / "config.json"))
    key_of = {f"model.transformer.blocks.{k.replace(':', '.')}.weight": k for k in lora.A}
    temporary = out.with_name(f".half-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for file in base.iterdir():  # config, index, tokenizer, remote code
        if file.suffix in (".json", ".py", ".txt", ".jinja"):
            shutil.copy(file, temporary)
    for file, names in tqdm(shards(base).items(), desc="merge", unit="file"):
        tensors = dict(read_tensors(base / file, names))
        for name in tensors.keys() & key_of.keys():
            key = key_of.pop(name)
            W, change = tensors[name], lora.alpha / lora.rank * (lora.B[key] @ lora.A[key])
            fits = W.is_floating_point() and W.shape == change.shape
            check(fits, f"{base / file}: {name} is {W.dtype} {[*W.shape]}, not {[*change.shape]}")
            tensors[name] = (W.float() + change).to(W.dtype)
        write_file(temporary / file, tensors)
    missing = min(key_of, default="")
    advice = "download the base again"
    check(not missing, f"{base} lacks {missing}, which the adapter changes; {advice}")
    temporary.replace(out)
