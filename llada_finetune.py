"""Discrete Tilt Matching on LLaDA-8B: the loss of `dtm.py` in one plain PyTorch loop that also runs whole on a laptop.

    python llada_finetune.py --toy                                    a small LLaDA, made here, on 2 CPU cores
    python llada_finetune.py --task sudoku --plan --gpus 8            memory, FLOPs and hours before renting
    torchrun --nproc_per_node=8 llada_finetune.py --task sudoku       the full run; on several nodes add torchrun's
                        --nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500
    torchrun --nproc_per_node=8 llada_finetune.py --resume RUN        goes on where RUN stopped
    python llada_finetune.py --task sudoku --eval --adapter RUN/best  test rows at lengths 256 and 512
    python llada_finetune.py --merge OUT --adapter RUN/best           a whole checkpoint with the original names

THE ALGORITHM (`train`), symbols and equations (D1).. as in `dtm.py`
1. a = 0; teacher = student = base model, each with an adapter (LoRA) that is zero
2. the teacher answers prompts; its answers x1 and their rewards r are the buffer (`Buffer.fill`)
3. a step: mask rows of the buffer (`mask_blockwise`), get both models' logits at the active block's masks, AdamW on
   `c_dtm_loss` (D3) with w = e^{h r}; now and then renew a part of the buffer
4. after steps_per_h steps: a <- a + h, teacher <- student or its average; back to 2 until a = a_end

FOUR FACTS ABOUT LLADA: attention sees both sides, and logits at position t predict token t. Padding is EOS on the left;
masks are honoured here, where the release attends to the pads. "o_proj", "gate_proj" and "down_proj" name nothing in it,
so released code adapts four maps of seven (`--lora paper`). The mask is an ordinary id that sampling can draw: rollouts
ban it. RANDOMNESS: a generator per rank (seed + rank) draws masks and tokens, torch's own, seeded alike, the adapter's
dropout. DEVICE AND DTYPE: see `Ranks`. Files are safetensors, JSON and JSONL, written beside their name and renamed.
"""

import argparse
import ast
import contextlib
import csv
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import dtm
from dtm import c_dtm_loss, mask_blockwise, mask_random, phases, row_mean, tilt_weight
from figures import objectives  # for --objective dmpo


def need(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@contextlib.contextmanager
def told(message: str, *kinds: type[Exception]):
    """Says in one sentence what errors of these kinds (none given: all of them) mean to the user."""
    try:
        yield
    except kinds or Exception as e:
        raise ValueError(
            f"{message} ({type(e).__name__}: {' '.join(str(e).split())[:80]})"
        ) from None


def write(path: Path, content: dict | list | str) -> None:
    """Tensors (*.safetensors), text, or JSON; beside its name, then renamed, so that no reader meets half a file."""
    half = path.with_name(f".half-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(
            {k: t.detach().contiguous().cpu() for k, t in content.items()},
            half,
            metadata={"format": "pt"},
        )
    else:
        half.write_text(
            content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
        )
    half.replace(path)


def read_json(path: Path) -> dict:
    need(path.is_file(), f"{path} is missing; is this the right folder?")
    with told(f"{path} is no JSON object; restore it", ValueError, TypeError):
        return dict(json.loads(path.read_text()))


# ---- 1. The model --------------------------------------------------------------------------------
SIZES = dict(
    d_model=4096,
    n_layers=32,
    n_heads=32,
    mlp_hidden_size=12288,
    vocab_size=126464,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    mask_token_id=126336,
    eos_token_id=126081,
    pad_token_id=126081,
)
FIXED = dict(
    model_type="llada",
    block_type="llama",
    activation_type="silu",
    layer_norm_type="rms",
    rope=True,
    include_bias=False,
    bias_for_layer_norm=False,
    weight_tying=False,
    attention_dropout=0.0,
    residual_dropout=0.0,
    embedding_dropout=0.0,
)
USUAL = dict(
    architectures=["LLaDAModelLM"],
    alibi=False,
    attention_layer_norm=False,
    input_emb_norm=False,
    scale_logits=False,
    include_qkv_bias=False,
    block_group_size=1,
    layer_norm_with_affine=True,
    multi_query_attention=None,
)
CONFIG_8B = SIZES | FIXED | USUAL
# A block's linear maps with their (rows, columns): ff_proj is Llama's gate, up_proj its up, ff_out its down map.
MAPS = {
    "q_proj": "dd",
    "k_proj": "dd",
    "v_proj": "dd",
    "attn_out": "dd",
    "ff_proj": "md",
    "up_proj": "md",
    "ff_out": "dm",
}
sizes = lambda config, name: tuple(
    config["d_model" if s == "d" else "mlp_hidden_size"] for s in MAPS[name]
)
PAPER = ["q_proj", "k_proj", "v_proj", "up_proj"]  # what released code really adapts
ADAPTED = {"all": [*MAPS], "paper": PAPER}


def check_config(config: dict) -> dict:
    """Refuses what this model does not compute (LLaDA-MoE also says `llada`). Keys of USUAL may be missing."""
    same = {"n_kv_heads": config.get("n_heads"), "embedding_size": config.get("vocab_size")}
    for key, value in (FIXED | USUAL | same).items():
        got = config.get(key, None if key in FIXED else value)
        need(
            got == value or got is None and key in same,
            f"config.json: {key} is {got!r}, only {value!r} is supported (LLaDA-8B, LLaDA-1.5)",
        )
    for key, value in SIZES.items():
        got, kinds = config.get(key), (int,) if type(value) is int else (int, float)
        need(
            type(got) in kinds and (got > 0 or got == 0 and key.endswith("_id")),
            f"config.json: {key} is {got!r}, no positive {kinds[-1].__name__}",
        )
    need(
        config["d_model"] % (2 * config["n_heads"]) == 0,
        "config.json: d_model must be an even multiple of n_heads",
    )
    return config


class RMSNorm(nn.RMSNorm):
    def forward(
        self, x: Tensor
    ) -> Tensor:  # float32, rounded to the stream's dtype before the gain
        return self.weight * F.rms_norm(x.float(), self.normalized_shape, None, self.eps).to(
            x.dtype
        )


@functools.lru_cache(8)
def angles(T: int, half: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin (T, half), float32, of the angles t theta^(-i / half); counted on the CPU, so that all devices agree."""
    turn = torch.arange(T).float()[:, None] * (1 / theta ** (torch.arange(half).float() / half))
    return turn.cos().to(device), turn.sin().to(device)


def rotate(u: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on u (B, heads, T, d), half-split, in float32; cos, sin (T, d / 2)."""
    u1, u2 = u.float().chunk(2, -1)
    return torch.cat([u1 * cos - u2 * sin, u2 * cos + u1 * sin], -1).to(u.dtype)


class Block(nn.Module):
    """Llama's block without the causal mask, under OLMo's names."""

    def __init__(self, config: dict, index: int):
        super().__init__()
        self.index, self.heads = index, config["n_heads"]
        self.attn_norm, self.ff_norm = (
            RMSNorm(config["d_model"], config["rms_norm_eps"]) for _ in range(2)
        )
        for name in MAPS:
            self.add_module(name, nn.Linear(*sizes(config, name)[::-1], bias=False))

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None, lora: "LoRA | None"
    ) -> Tensor:
        def mapped(name: str, u: Tensor) -> Tensor:
            y = getattr(self, name)(u)
            return y if lora is None else lora(f"{self.index}:{name}", u, y)

        u = self.attn_norm(x)
        q, k, v = (
            mapped(f"{name}_proj", u).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in "qkv"
        )
        u = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, attn_mask=visible
        )
        x = x + mapped("attn_out", u.transpose(1, 2).flatten(2))
        u = self.ff_norm(x)
        return x + mapped("ff_out", F.silu(mapped("ff_proj", u)) * mapped("up_proj", u))


class LLaDA(nn.Module):
    """The transformer of ML-GSAI/LLaDA; its state dict has the checkpoint's names, adapters aside.
    model(ids (B, T) int64, attention_mask (B, T) bool or 0/1 (None: no padding, no cost), where (B, T) bool) -> logits (B, T, V), or
    (M, V) at `where` in row-major order: final norm and head run only there; hidden=True adds the head's input. use("student"),
    use("teacher") put an adapter on, use(None) takes it off; `checkpointing` recomputes blocks."""

    def __init__(self, config: dict):
        super().__init__()
        self.config, self.checkpointing, self.active = check_config(config), False, None
        d, V, eps = config["d_model"], config["vocab_size"], config["rms_norm_eps"]
        self.model = nn.ModuleDict(
            {
                "transformer": nn.ModuleDict(
                    {
                        "wte": nn.Embedding(V, d),
                        "blocks": nn.ModuleList(
                            Block(config, i) for i in range(config["n_layers"])
                        ),
                        "ln_f": RMSNorm(d, eps),
                        "ff_out": nn.Linear(d, V, bias=False),
                    }
                )
            }
        )
        self.adapters = nn.ModuleDict()  # beside the base, not in it: --shard cuts the base alone

    def use(self, adapter: str | None) -> "LLaDA":
        need(adapter is None or adapter in self.adapters, f"no adapter is called {adapter!r}")
        self.active = adapter
        return self

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        where: Tensor | None = None,
        hidden: bool = False,
    ):
        net, lora = self.model["transformer"], self.adapters[self.active] if self.active else None
        visible = (
            None if attention_mask is None else attention_mask.bool()[:, None, None]
        )  # keys; a pad's own row is garbage
        turn = angles(
            ids.shape[1],
            self.config["d_model"] // self.config["n_heads"] // 2,
            self.config["rope_theta"],
            ids.device,
        )
        x, rest = net["wte"](ids), (*turn, visible, lora)
        for block in net["blocks"]:
            again = self.checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, *rest, use_reentrant=False) if again else block(x, *rest)
        x = net["ln_f"](x if where is None else x[where])
        return (net["ff_out"](x), x) if hidden else net["ff_out"](x)

    @torch.no_grad()
    def init_weights(self, generator: Generator) -> "LLaDA":
        """LLaDA's "mitchell": normal cut at 3 sd, sd fan_in^-1/2, over sqrt(2 (layer + 1)) for the maps into the stream."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                out = re.search(r"blocks\.(\d+)\.(attn_out|ff_out)", name)
                sd = p.shape[1] ** -0.5 / math.sqrt(2 * (int(out[1]) + 1) if out else 1)
                nn.init.trunc_normal_(p, 0, sd, -3 * sd, 3 * sd, generator=generator)
        return self

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        shard: bool = False,
    ) -> "LLaDA":
        """The frozen model of a folder or hub id in `dtype` on `device`, built on the meta device and filled tensor by tensor from the
        files that the index names, however they are cut; `shard` cuts the model over the ranks. Raises ValueError for a missing, torn
        or misshapen file and for a config.json of another kind of model."""
        folder = locate(source)
        with torch.device("meta"):
            model = cls(read_json(folder / "config.json")).requires_grad_(False)
        if shard:  # FSDP2 on the frozen base, a block at a time; adapters come later and stay whole
            from torch.distributed.fsdp import fully_shard

            for part in (*model.model["transformer"]["blocks"], model):
                fully_shard(part)
        wanted, filled = model.state_dict(), {}
        for file, names in shards(folder).items():
            for name, t in read_shard(folder / file, names):
                cut, t = wanted.get(name, t), t.to(device, dtype)
                need(
                    t.shape == cut.shape,
                    f"{folder / file}: {name} is {(*t.shape,)}, config.json asks for {(*cut.shape,)}; they do not fit",
                )
                filled[name] = (
                    dist.tensor.distribute_tensor(t, cut.device_mesh, cut.placements)
                    if hasattr(cut, "placements")
                    else t
                )
        odd = wanted.keys() ^ filled.keys()
        need(
            not odd,
            f"{folder}: {len(odd)} tensors are missing or not of this config.json, such as {min(odd, default='')}; download again",
        )
        model.load_state_dict(filled, assign=True)
        return model.requires_grad_(False).eval()

    def save_pretrained(self, folder: Path, shards: int = 2) -> None:
        """config.json, shards and their index in the original's format, without adapters."""
        tensors = {k: t for k, t in self.state_dict().items() if not k.startswith("adapters")}
        files = {
            k: f"model-{i * shards // len(tensors) + 1:05}-of-{shards:05}.safetensors"
            for i, k in enumerate(tensors)
        }
        for file in set(files.values()):
            write(folder / file, {k: t for k, t in tensors.items() if files[k] == file})
        total = {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())}
        write(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": files})
        write(folder / "config.json", self.config)


# ---- 2. The checkpoint's files -------------------------------------------------------------------
def locate(source: str | Path) -> Path:
    """A folder, or the local copy of a hub id such as GSAI-ML/LLaDA-8B-Instruct, downloaded on first use."""
    if source and Path(source).is_dir():
        return Path(source)
    need(
        re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)) is not None,
        f"--model {source!r} is no folder and no hub id (OWNER/NAME)",
    )
    from huggingface_hub import snapshot_download

    with told(
        f"cannot get {source} from the hub: check name and network, or pass --model FOLDER of a downloaded copy; the same loop "
        "without one: python llada_finetune.py --toy"
    ):  # the hub's client fails in dozens of ways that all mean the same
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))


def shards(folder: Path) -> dict[str, list[str] | None]:
    """File -> names of its tensors, from the index; without one the single file -> None, for all that it holds."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists() and not index.exists():
        return {single.name: None}
    files = read_json(index).get("weight_map")
    need(
        files and isinstance(files, dict) and {*map(type, files.values())} == {str},
        f"{index} has no valid weight_map; download it again",
    )
    lost = [file for file in files.values() if not (folder / file).is_file()]
    need(not lost, f"{folder / min(lost, default='')} is missing; download it again")
    return {file: [k for k in files if files[k] == file] for file in sorted(set(files.values()))}


def read_shard(path: Path, names: list[str] | None = None):
    """Yields (name, tensor), one at a time."""
    with (
        told(f"{path} is missing or is torn; get it again", SafetensorError, OSError),
        safe_open(path, framework="pt") as file,
    ):
        lost = set(names or []) - set(file.keys())
        need(
            not lost,
            f"{path} lacks {min(lost, default='')}, although the index puts it there; download it again",
        )
        for name in names or file.keys():
            yield name, file.get_tensor(name)


# ---- 3. LoRA: two adapters on one base -----------------------------------------------------------
class LoRA(nn.Module):
    """y -> y + (alpha / rank) B A dropout(x) for every adapted map, keyed "layer:map"; B is zero at first (huggingface/peft).
    In training it is float32: steps of 1e-6 vanish in bfloat16."""

    def __init__(
        self,
        config: dict,
        maps: list[str],
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        need(
            bool(maps) and set(maps) <= MAPS.keys(),
            f"LoRA: {maps} must name maps of a block: {', '.join(MAPS)}",
        )
        need(
            rank > 0 and 0 <= dropout < 1,
            f"LoRA: rank {rank} must be positive and dropout {dropout} in [0, 1)",
        )
        self.maps, self.rank, self.alpha, self.dropout, g = (
            list(maps),
            rank,
            alpha,
            dropout,
            Generator().manual_seed(seed),
        )
        shapes = {
            f"{i}:{name}": sizes(config, name) for i in range(config["n_layers"]) for name in maps
        }
        draw = lambda width: (
            (2 * torch.rand(rank, width, generator=g) - 1) * width**-0.5
        )  # on the CPU: all ranks start alike
        self.A = nn.ParameterDict(
            {k: nn.Parameter(draw(width)) for k, (_, width) in shapes.items()}
        )
        self.B = nn.ParameterDict(
            {k: nn.Parameter(torch.zeros(out, rank)) for k, (out, _) in shapes.items()}
        )

    def forward(self, key: str, x: Tensor, y: Tensor) -> Tensor:
        if key not in self.A:
            return y
        x = F.dropout(x, self.dropout, self.training)
        return y + self.alpha / self.rank * F.linear(
            F.linear(x, self.A[key].to(x.dtype)), self.B[key].to(x.dtype)
        )

    def peft(self) -> dict[str, Tensor]:
        """The tensors under peft's names on the original model class."""
        stem = "base_model.model.model.transformer.blocks."
        return {
            f"{stem}{k.replace(':', '.')}.lora_{n}.weight": p
            for n in "AB"
            for k, p in getattr(self, n).items()
        }

    def save(self, folder: Path, base: str) -> None:
        """A PEFT folder. Its targets are a regex, as the bare name ff_out would also adapt the head."""
        write(folder / "adapter_model.safetensors", self.peft())
        write(
            folder / "adapter_config.json",
            dict(
                peft_type="LORA",
                task_type="CAUSAL_LM",
                base_model_name_or_path=base,
                r=self.rank,
                lora_alpha=self.alpha,
                lora_dropout=self.dropout,
                target_modules=rf".*blocks\.\d+\.({'|'.join(self.maps)})",
                bias="none",
                inference_mode=True,
                init_lora_weights=True,
                fan_in_fan_out=False,
                modules_to_save=None,
            ),
        )

    @classmethod
    def load(cls, folder: Path, config: dict) -> "LoRA":
        """A PEFT folder that adapts nothing but a block's maps."""
        saved, tensors = (
            read_json(folder / "adapter_config.json"),
            dict(read_shard(folder / "adapter_model.safetensors")),
        )
        odd = [
            k for k in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if saved.get(k)
        ]
        need(not odd, f"{folder}: {', '.join(odd)} in adapter_config.json is not supported")
        need(
            all(type(saved.get(k)) in (int, float) for k in ("r", "lora_alpha")),
            f"{folder}: adapter_config.json lacks r or lora_alpha",
        )
        maps = [m for m in MAPS if any(f".{m}.lora_" in k for k in tensors)]
        lora = cls(config, maps, saved["r"], saved["lora_alpha"], saved.get("lora_dropout", 0))
        shapes = lambda d: {k: t.shape for k, t in d.items()}
        need(
            shapes(lora.peft()) == shapes(tensors),
            f"{folder}: the adapter does not fit the base model",
        )
        for k, p in lora.peft().items():
            p.data.copy_(tensors[k])
        return lora.requires_grad_(False).eval()

    follow = (
        nn.Module.load_state_dict
    )  # takes over, in place, the values of an adapter or of its average; the base is not touched


def merge(base: Path, adapter: Path, out: Path) -> None:
    """W + (alpha / rank) B A, added in float32, rounded to the checkpoint's dtype, shard by shard, under the original names."""
    need(not out.exists(), f"{out} exists; --merge writes a new folder")
    lora = LoRA.load(adapter, check_config(read_json(base / "config.json")))
    half = out.with_name(f".half-{out.name}")
    place = {f"model.transformer.blocks.{k.replace(':', '.')}.weight": k for k in lora.A}
    shutil.rmtree(half, ignore_errors=True)
    keep = (".json", ".py", ".txt", ".jinja")  # config, index, tokenizer, remote code
    shutil.copytree(
        base,
        half,
        ignore=lambda _, names: [name for name in names if Path(name).suffix not in keep],
    )
    for file, names in tqdm(shards(base).items(), desc="merge", unit="shard"):
        tensors = dict(read_shard(base / file, names))
        for name in tensors.keys() & place.keys():
            delta = lora.alpha / lora.rank * (lora.B[place[name]] @ lora.A[place[name]])
            tensors[name] = (tensors[name].float() + delta).to(tensors[name].dtype)
        write(half / file, tensors)
    half.replace(out)


# ---- 4. Text in, text out ------------------------------------------------------------------------
class Text:
    """A checkpoint's tokenizer and chat template."""

    def __init__(self, folder: Path, config: dict):
        from tokenizers import Tokenizer

        with told(
            f"{folder / 'tokenizer.json'} is missing or is torn; copy it from the original checkpoint"
        ):  # it raises nothing narrower
            self.tok = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.chat = (
            self.tok.token_to_id("<|start_header_id|>") is not None
        )  # LLaDA-8B-Base has no chat tokens
        self.ends = {config["eos_token_id"], self.tok.token_to_id("<|eot_id|>")}

    def prompt(self, text: str) -> list[int]:
        """One user turn and the assistant's header, or the bare text for a base model; BOS is in the template."""
        turn = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        full = "<|startoftext|>" + (turn if self.chat else "{}").replace("{}", text.strip())
        return self.tok.encode(full, add_special_tokens=False).ids

    def answer(self, ids: list[int]) -> str:
        """The reply up to the first EOS or end of turn."""
        return self.tok.decode(
            list(itertools.takewhile(lambda t: t not in self.ends, ids)), skip_special_tokens=True
        )


def pad_left(
    prompts: list[list[int]], pad_id: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor | None]:
    """ids (B, P) and attention mask (B, P), None when nothing is padded: decided once a batch, on the host."""
    width, pads = max(map(len, prompts)), [max(map(len, prompts)) - len(p) for p in prompts]
    ids = torch.tensor([[pad_id] * n + p for n, p in zip(pads, prompts)], device=device)
    return ids, torch.arange(width, device=device) >= torch.tensor(pads, device=device)[
        :, None
    ] if any(pads) else None


def canvas(
    ids: Tensor, pad: Tensor | None, xt: Tensor, where: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The model's arguments for prompts (`pad_left`) with answers xt (B, L) and the positions `where` (B, L) whose logits are wanted."""
    seen = None if pad is None else F.pad(pad.bool(), (0, xt.shape[1]), value=True)
    return torch.cat([ids, xt], 1), seen, F.pad(where, (ids.shape[1], 0))


@torch.no_grad()
def generate(
    model: Callable,
    prompt_ids: Tensor,
    gen_length: int,
    block: int,
    steps: int,
    temperature: float = 0.0,
    attention_mask: Tensor | None = None,
    generator: Generator | None = None,
    order: str = "confidence",
    ban_mask: bool = False,
) -> Tensor:
    """Prompts (B, P) int64, mask (B, P) -> ids (B, P + gen_length), in `steps` network evaluations and gen_length / block blocks.
    ML-GSAI/LLaDA generate.py (b7e6c35) without guidance, on `dtm.sample`. Differences: float32 confidence and noise, head at
    the block's masks only, a mask id in the prompt stays. `ban_mask` never draws the mask id; `order` as in `dtm.sample`."""
    need(
        gen_length > 0 and block > 0 and gen_length % block == 0,
        f"the answer length {gen_length} must be a multiple of the block {block}",
    )
    blocks, mask_id = gen_length // block, model.config["mask_token_id"]
    need(
        steps >= blocks and steps % blocks == 0,
        f"{steps} steps must be a multiple of the {blocks} blocks",
    )
    pad = None if attention_mask is None or attention_mask.all() else attention_mask
    answer = lambda yt, where: model(*canvas(prompt_ids, pad, yt, where))
    yt = prompt_ids.new_full((len(prompt_ids), gen_length), mask_id)
    *_, yt = dtm.sample(
        answer, yt, mask_id, order, block, 1, temperature, generator, steps // blocks, ban_mask
    )
    return torch.cat([prompt_ids, yt], 1)


def by_length(items, size: int, key: Callable) -> list[list[int]]:
    """Batches of `size` of near length: little padding, and none (hence no attention mask) where lengths are equal."""
    items = sorted(items, key=key)
    return [items[i : i + size] for i in range(0, len(items), size)]


def decode(
    model: LLaDA,
    prompts: list[list[int]],
    gen_length: int,
    chunk: int,
    generator: Generator,
    quiet: bool = True,
    **how,
) -> Tensor:
    """Answers (N, gen_length) to N prompts, in their order, `chunk` of near length at once; `how`: the rest of `generate`."""
    x1 = torch.empty(len(prompts), gen_length, dtype=torch.long, device=generator.device)
    for part in tqdm(
        by_length(range(len(prompts)), chunk, key=lambda i: len(prompts[i])),
        "decoding",
        disable=quiet,
        leave=False,
    ):
        ids, pad = pad_left([prompts[i] for i in part], model.config["pad_token_id"], x1.device)
        x1[part] = generate(model, ids, gen_length, attention_mask=pad, generator=generator, **how)[
            :, ids.shape[1] :
        ]
    return x1


# ---- 5. Tasks: rewards, prompts, rows ------------------------------------------------------------
FORMAT = (
    "Think first, then answer, in exactly this form with each tag on its own line:\n"
    "<reasoning>\nyour reasoning\n</reasoning>\n<answer>\nyour answer\n</answer>\n\n"
)


def last_box(text: str) -> str | None:
    """The content of the last \\boxed{...} whose braces balance."""
    for found in reversed([*re.finditer(r"\\boxed\s*\{", text)]):
        depth = itertools.accumulate(
            ({"{": 1, "}": -1}.get(c, 0) for c in text[found.end() :]), initial=1
        )
        if end := next((i for i, d in enumerate(depth) if d == 0), None):
            return text[found.end() : found.end() + end - 1].strip()
    return None


def extract(text: str, box_anywhere: bool = False) -> str | None:
    """The one rule for rewards and metrics: the last whole <answer>, or the last box inside it; `box_anywhere` (GSM8K, MATH)
    falls back on the last box of the text. None where there is no answer."""
    inside = re.findall("<answer>((?:(?!</?answer>).)*)</answer>", text, re.S)
    if not inside:
        return last_box(text) if box_anywhere else None
    box = last_box(inside[-1])
    return inside[-1].strip() if box is None else box


def arithmetic(text: str) -> tuple[Fraction, list[int]] | None:
    """Value and numbers of an expression in integers, + - * / and parentheses, exactly; None for anything else. The text is
    parsed, never run; in 100 characters without powers nothing can grow large."""
    signs, numbers = (
        {ast.Add: "__add__", ast.Sub: "__sub__", ast.Mult: "__mul__", ast.Div: "__truediv__"},
        [],
    )

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant):
            numbers.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        return getattr(value(node.left), signs[type(node.op)])(value(node.right))

    with contextlib.suppress(
        ValueError,
        SyntaxError,
        KeyError,
        AttributeError,
        ZeroDivisionError,
        MemoryError,
        RecursionError,
    ):
        need(
            len(text) <= 100 and re.fullmatch(r"[0-9+\-*/()\s]+", text) is not None,
            "not arithmetic",
        )
        return value(ast.parse(" ".join(text.split()), mode="eval").body), numbers
    return None


LATEX = {
    r"\times": "*",
    r"\cdot": "*",
    r"\div": "/",
    r"\left": "",
    r"\right": "",
    "$": "",
    "×": "*",
    "÷": "/",
    "−": "-",
}


def countdown_reward(text: str, row: dict) -> float:
    """0 without an answer tag, 0.1 for a wrong expression, 1 if every number is used once and the value is the target."""
    for latex, plain in LATEX.items():
        text = text.replace(latex, plain)
    if (answer := extract(text)) is None:
        return 0.0
    got = arithmetic(answer.split("=")[0])
    return (
        1.0 if got and got[0] == row["target"] and sorted(got[1]) == sorted(row["numbers"]) else 0.1
    )


sudoku_digits = lambda text: re.sub("[^0-9]", "", extract(text) or "")[:16].ljust(16, "0")
UNITS = [
    [*u]
    for i in range(4)
    for u in (
        range(4 * i, 4 * i + 4),
        range(i, 16, 4),
        [i // 2 * 8 + i % 2 * 2 + j for j in (0, 1, 4, 5)],
    )
]


def sudoku_cells(text: str, row: dict) -> tuple[int, int]:
    """(right, all) of the cells that were empty, against the stored solution."""
    grid, empty = sudoku_digits(text), [i for i in range(16) if row["puzzle"][i] == "0"]
    return sum(grid[i] == row["solution"][i] for i in empty), len(empty)


def sudoku_solved(text: str, row: dict) -> bool:
    """A valid grid that keeps the clues, be it the stored solution or not."""
    grid = sudoku_digits(text)
    return all(c in ("0", d) for c, d in zip(row["puzzle"], grid)) and all(
        {grid[i] for i in u} == {*"1234"} for u in UNITS
    )


def sudoku_reward(text: str, row: dict) -> float:
    right, cells = sudoku_cells(text, row)
    return 2 * right / cells if cells else 2.0 * sudoku_solved(text, row)


def number(text: str | None) -> Fraction | None:
    """An integer, decimal or fraction, with a sign, commas between thousands, $ or %; None for anything else."""
    plain = re.sub(
        r"^([-+]?)\s*\\?\$\s*|\s*\\?[$%]$",
        r"\1",
        (text or "").strip().replace("{,}", ",").removesuffix("."),
    )
    whole = r"([0-9]{1,3}(,[0-9]{3}){1,9}|[0-9]{1,30})"
    fits = re.fullmatch(
        rf"[-+]?({whole}(\.[0-9]{{1,30}})?|\.[0-9]{{1,30}}|{whole}/0*[1-9][0-9]{{0,30}})", plain
    )
    return Fraction(plain.replace(",", "")) if fits else None


def gsm8k_correct(text: str, row: dict) -> bool:
    got = number(extract(text, box_anywhere=True))
    return got is not None and got == number(str(row["answer"]).rpartition("####")[2])


def gsm8k_reward(text: str, row: dict) -> float:
    """At most 4: 0.125 per tag that stands once and alone in its line, less 0.001 per character after the last; soft and strict
    format 0.5 each (in the d1 family they exclude each other, and . misses newlines); a number 0.5; the right one 2."""
    tags = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
    score = 0.125 * sum(
        text.count(t) == 1 and re.search(rf"^[ \t]*{t}[ \t]*$", text, re.M) is not None
        for t in tags
    )
    score -= 0.001 * len(text.rpartition("</answer>")[2].strip()) if "</answer>" in text else 0
    score += 0.5 * (
        re.search(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", text, re.S) is not None
    )
    score += 0.5 * (
        re.fullmatch(
            r"<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>", text.strip(), re.S
        )
        is not None
    )
    return max(
        0.0, score + 0.5 * (number(extract(text)) is not None) + 2.0 * gsm8k_correct(text, row)
    )


def heavy(text: str) -> bool:
    """Whether it has powers or factorials that could fill the memory; math-verify would not come back from them."""
    grow = most = 1
    for power in re.finditer(r"([)}]?)\s*\^\s*", text):
        rest = text[power.end() :]
        part = (
            last_box(r"\boxed" + rest)
            if rest.startswith("{")
            else re.match(r"\([^)]*|\w*", rest)[0]
        )
        if part is None or "^" in part:
            return True
        grow = (grow if power[1] else 1) * math.prod(
            max(1, int(n)) for n in re.findall("[0-9]+", part)
        )  # (b^m)^n: m n
        most = max(most, grow)
    return most > 10**6 or "!" in text or r"\boxed" in text


def math_correct(text: str, row: dict) -> bool:
    """The same string, or the same for math-verify; a gold answer may be a whole solution with its box."""
    got, gold = extract(text, box_anywhere=True) or "", last_box(row["answer"]) or row["answer"]
    if not got or len(got) > 300 or "".join(got.split()) == "".join(gold.split()):
        return 0 < len(got) <= 300
    if heavy(got) or last_box(rf"\boxed{{{got}}}") != got:
        return False
    from math_verify import parse, verify

    with contextlib.suppress(
        Exception
    ):  # whatever the algebra system makes of a model's text, it is no right answer
        return bool(verify(parse(rf"\boxed{{{gold}}}"), parse(rf"\boxed{{{got}}}")))
    return False


def math_reward(text: str, row: dict) -> float:
    """At most 3: 2 if right, and 1 / 0.75 / 0.5 / 0.25 for answer tags with a box / tags / a box / neither."""
    return (
        2.0 * math_correct(text, row)
        + 0.25
        + 0.5 * (extract(text) is not None)
        + 0.25 * (last_box(text) is not None)
    )


@functools.cache
def sudoku_grids() -> list[str]:
    """All 288 grids in a fixed random order: 176 for training, 24 for validation, 88 for testing."""
    fits = lambda g: all(
        len({g[i] for i in u if i < len(g)}) == sum(i < len(g) for i in u) for u in UNITS
    )
    grids = [""]
    for _ in range(4):
        grids = [
            g + r
            for g in grids
            for r in map("".join, itertools.permutations("1234"))
            if fits(g + r)
        ]
    return random.Random(0).sample(grids, 288)


@functools.cache
def sudoku_rows(split: str, fewest: int = 7, most: int = 12) -> list[dict]:
    """20,000 or 256 puzzles, all different, with one solution and `fewest` to `most` empty cells; splits share no solution."""
    grids, draw, rows = sudoku_grids(), random.Random(split), {}
    pool = {"train": grids[:176], "valid": grids[176:200], "test": grids[200:]}[split]
    table = torch.tensor([[*map(int, g)] for g in grids], dtype=torch.int8)
    while len(rows) < (20000 if split == "train" else 256):
        solution, holes = draw.choice(pool), set(draw.sample(range(16), draw.randint(fewest, most)))
        clues = [i for i in range(16) if i not in holes]
        if (table[:, clues] == table[grids.index(solution), clues]).all(1).sum() == 1:
            puzzle = "".join("0" if i in holes else d for i, d in enumerate(solution))
            rows[puzzle] = {"puzzle": puzzle, "solution": solution}
    return [*rows.values()]


def sudoku_worked(row: dict) -> str:
    """The answer of a worked example: the rows, then the cell with the fewest candidates again and again, then the grid."""
    grid, lines = (
        [*row["puzzle"]],
        ["Rows: " + " | ".join(row["puzzle"][i : i + 4] for i in range(0, 16, 4))],
    )
    while "0" in grid:
        left = {
            i: {*"1234"} - {grid[j] for u in UNITS if i in u for j in u}
            for i in range(16)
            if grid[i] == "0"
        }
        i = min(left, key=lambda i: len(left[i]))
        grid[i] = row["solution"][i]
        lines.append(
            f"Row {i // 4 + 1}, column {i % 4 + 1}: "
            + (f"only {grid[i]} is left." if len(left[i]) == 1 else f"try {grid[i]}; it works out.")
        )
    return (
        "<reasoning>\n" + "\n".join(lines) + f"\n</reasoning>\n<answer>\n{''.join(grid)}\n</answer>"
    )


def sudoku_prompt(row: dict) -> str:
    ask = "Question: Solve the following Sudoku puzzle: {}\nAnswer:"
    shots = "".join(
        f"{ask.format(r['puzzle'])}\n{sudoku_worked(r)}\n\n" for r in sudoku_rows("train")[:3]
    )
    return (
        f"{FORMAT}Solve a 4x4 Sudoku, given row by row as 16 digits with 0 for an empty cell. Every row, column and 2x2 box must "
        f"hold 1, 2, 3 and 4. Answer with the 16 digits of the full grid.\n\n{shots}{ask.format(row['puzzle'])}"
    )


def countdown_prompt(row: dict) -> str:
    return (
        f"{FORMAT}Use only the numbers {row['numbers']} to make exactly {row['target']}. Use each number once, with + - * / and parentheses. "
        "Put just the expression, no equals sign, between the answer tags. Example: [2, 3, 4] and 5 give\n<answer>\n2*4-3\n</answer>"
    )


@functools.cache
def countdown_problems() -> list[dict]:
    """20,512 different solvable problems, 3 numbers and a target in 1..100."""
    draw, rows = random.Random(0), {}
    while len(rows) < 20512:
        a, b, c = numbers = [draw.randint(1, 100) for _ in range(3)]
        p, q = draw.choices("+-*/", k=2)
        got = arithmetic(draw.choice((f"({a}{p}{b}){q}{c}", f"{a}{p}({b}{q}{c})")))
        if got and got[0].denominator == 1 and 1 <= got[0] <= 100:
            rows[(*sorted(numbers), got[0])] = {
                "numbers": draw.sample(numbers, 3),
                "target": int(got[0]),
            }
    return [*rows.values()]


def cut(rows: list[dict], split: str) -> list[dict]:
    """Training rows without a fixed tenth of them (at most 256), which is the validation split."""
    rows = random.Random(0).sample(rows, len(rows))
    return (
        rows[: min(256, len(rows) // 10)] if split == "valid" else rows[min(256, len(rows) // 10) :]
    )


def hub_rows(train: tuple, test: tuple, split: str) -> list[dict]:
    """Rows of hub data sets (name, part, split, question's column, answer's column)."""
    name, part, piece, question, answer = test if split == "test" else train
    with told(
        f"cannot get {name} from the hub: check the network, pip install datasets, or pass --data FILE.jsonl"
    ):
        from datasets import load_dataset

        got = [
            {"question": r[question], "answer": r[answer]}
            for r in load_dataset(name, part, split=piece)
        ]
    return got if split == "test" else cut(got, split)


class Task(NamedTuple):
    """rows(split) with split "train", "valid" or "test"; prompt(row); reward(text, row) in [0, top]; correct(text, row); `keys`:
    what a row's keys may be called in a file; cells(text, row) -> (right, all), if an answer has parts."""

    rows: Callable[[str], list[dict]]
    prompt: Callable[[dict], str]
    reward: Callable[[str, dict], float]
    correct: Callable[[str, dict], bool]
    top: float
    keys: dict[str, tuple[str, ...]]
    cells: Callable[[str, dict], tuple[int, int]] | None = None


GRID = {"puzzle": ("puzzle", "Puzzle"), "solution": ("solution", "Solution")}
ASK = {"question": ("question", "problem"), "answer": ("answer", "solution")}
SUM = {"numbers": ("numbers", "nums", "input"), "target": ("target", "output")}
BOX = "You are a math expert. Put the final answer in \\boxed{} between the answer tags.\n\n"
countdown_rows = lambda split: countdown_problems()[
    {"test": slice(256), "valid": slice(256, 512), "train": slice(512, None)}[split]
]
gsm8k_rows = functools.partial(
    hub_rows,
    *(("openai/gsm8k", "main", split, "question", "answer") for split in ("train", "test")),
)
math_rows = functools.partial(
    hub_rows,
    ("ankner/math-500", None, "train", "problem", "solution"),
    ("HuggingFaceH4/MATH-500", None, "test", "problem", "answer"),
)
tagged = lambda score: lambda text, row: score(f"<answer>{text}</answer>", row)
TASKS = {
    "sudoku": Task(
        sudoku_rows, sudoku_prompt, sudoku_reward, sudoku_solved, 2.0, GRID, sudoku_cells
    ),
    "countdown": Task(
        countdown_rows,
        countdown_prompt,
        countdown_reward,
        lambda text, row: countdown_reward(text, row) == 1,
        1.0,
        SUM,
    ),
    "gsm8k": Task(
        gsm8k_rows, lambda row: FORMAT + row["question"], gsm8k_reward, gsm8k_correct, 4.0, ASK
    ),
    "math": Task(
        math_rows, lambda row: FORMAT + BOX + row["question"], math_reward, math_correct, 3.0, ASK
    ),
    # The laptop's: easier puzzles, no instructions, the answer is the 16 digits alone.
    "toy": Task(
        lambda split: sudoku_rows(split, 4, 10),
        lambda row: row["puzzle"],
        tagged(sudoku_reward),
        tagged(sudoku_solved),
        2.0,
        GRID,
        tagged(sudoku_cells),
    ),
}


def tidy(task: str, raw: dict) -> dict:
    """A record of a file as a row; raises one of several errors if it is none."""
    row = {
        key: next(raw[n] for n in names if raw.get(n) not in (None, ""))
        for key, names in TASKS[task].keys.items()
    }
    if task == "countdown":
        numbers = (
            row["numbers"]
            if isinstance(row["numbers"], list)
            else re.findall(r"[^\s,\[\]]+", row["numbers"])
        )
        row = {"numbers": [int(str(n)) for n in numbers], "target": int(str(row["target"]))}
        good = 1 <= len(numbers) <= 6 and min(row["numbers"]) >= 0
    elif "puzzle" in row:
        kinds = re.fullmatch("[0-4]{16}", row["puzzle"]) and re.fullmatch(
            "[1-4]{16}", row["solution"]
        )
        good = kinds is not None and sudoku_solved(f"<answer>{row['solution']}</answer>", row)
    else:
        good = isinstance(row["question"], str) and bool(row["answer"].strip())
        good = good and (task == "math" or number(row["answer"].rpartition("####")[2]) is not None)
    need(good, "not a row")
    return row


def read_rows(path: str, task: str) -> list[dict]:
    """The rows of a .jsonl or .csv file in UTF-8; the first line that is none is named."""
    need(
        Path(path).is_file() and Path(path).suffix in (".jsonl", ".csv"),
        f"no data file {path!r}; expected FILE.jsonl or FILE.csv",
    )
    rows = []
    with open(path, encoding="utf-8", newline="") as file:
        table = csv.DictReader(file) if path.endswith(".csv") else map(json.loads, file)
        try:
            for raw in table:
                rows.append(tidy(task, raw))
        except (ValueError, TypeError, KeyError, AttributeError, StopIteration, csv.Error):
            line = getattr(table, "line_num", len(rows) + 1)
            raise ValueError(
                f"{path}, line {line}: no {task} row; expected {', '.join(TASKS[task].keys)}"
            ) from None
    need(bool(rows), f"{path} holds no rows")
    return rows


# ---- 6. Settings ---------------------------------------------------------------------------------
# name: help, then the release's value for Sudoku and, where they differ, for Countdown, for GSM8K and MATH (none was
# published: these are ours, Countdown's with room for longer prompts and larger rewards) and for the toy (ours).
SETTINGS = {
    "task": ("one of " + ", ".join(TASKS), "sudoku", "countdown", "", "toy"),
    "model": ("checkpoint folder or hub id", "GSAI-ML/LLaDA-8B-Instruct", None, None, ""),
    "out": ("folder of the run; empty: runs/TASK-SEED", ""),
    "seed": ("rank k uses seed + k", 42, None, None, 0),
    "objective": (
        "dtm, or its sibling dmpo: target p_base e^{r / 0.04}, constant learning rate, AdamW kept; a counts rounds",
        "dtm",
    ),
    "data": ("training rows, FILE.jsonl or FILE.csv; empty: generated here or from the hub", ""),
    "test_data": ("test rows, likewise", ""),
    "h": ("tilt increment of a phase; the largest one if --ess is set", 5.0, 6.0, 2.0, 8.0),
    "a_end": ("tilt at which the run ends", 100.0, 100.0, 30.0, 40.0),
    "ess": (
        "h by effective sample size of the weights, a share in (0, 1); 0: h fixed",
        0.0,
        None,
        None,
        0.5,
    ),
    "c": (
        "control variate: a number, star (best scalar) or learned (c(xt, i), linear in the teacher's hidden state)",
        "1",
        None,
        None,
        "learned",
    ),
    "normalize": (
        "weights over their mean: none, batch (all ranks' buffers) or group (the answers to one prompt)",
        "none",
        None,
        None,
        "batch",
    ),
    "steps_per_h": ("optimiser steps of a phase", 256, 1200, 300, 60),
    "prompts": ("buffer of a rank: prompts", 80, 40, 40, 1536),
    "completions": ("buffer: answers to a prompt", 1, 6, 6, 1),
    "refresh": ("buffer: prompts renewed at a time", 20, 10, 10, 0),
    "refresh_steps": ("buffer: steps between renewals; 0: none", 32, 25, 25, 0),
    "chunk": ("answers decoded at once", 16, 30, 30, 1536),
    "batch": ("answers in a forward pass", 4, 12, 6, 256),
    "accum": ("forward passes of an optimiser step", 16, 8, 16, 1),
    "gen_length": ("tokens of an answer", 256, None, None, 16),
    "block": ("tokens of a block, in decoding and masking", 32, None, None, 16),
    "steps": ("network evaluations of a rollout", 128, None, None, 16),
    "temperature": ("of rollouts", 0.0, 1.0, 1.0, 1.0),
    "order": (
        "of rollouts: confidence (the release's), state or random (the model's law, at one token a step)",
        "confidence",
        None,
        None,
        "state",
    ),
    "prompt_length": (
        "longest prompt, tokens; longer ones are skipped and counted",
        1132,
        172,
        700,
        17,
    ),
    "lr": ("learning rate, reached after 5 % of a phase", 3e-6, 4e-6, 4e-6, 3e-3),
    "lr_min": (
        "learning rate after the linear fall over the last 10 % of a phase",
        1e-6,
        2e-6,
        2e-6,
        3e-4,
    ),
    "weight_decay": ("AdamW's, with betas .9, .99", 0.1, None, None, 0.0),
    "clip": ("largest gradient norm", 1.0, 2.0, 2.0, 1.0),
    "ema": (
        "decay a step of the student's average, which then becomes teacher and student; 0: off",
        0.0,
        0.95,
        0.95,
        0.0,
    ),
    "lora": (
        "adapted maps: all seven of a block, or paper (the four that released code adapts)",
        "all",
    ),
    "rank": ("LoRA rank", 128, None, None, 16),
    "alpha": ("LoRA alpha; the adapter is scaled by alpha / rank", 64.0, None, None, 16.0),
    "dropout": ("LoRA dropout", 0.05, None, None, 0.0),
    "checkpointing": (
        "recompute activations: a third more time, far less memory",
        True,
        None,
        None,
        False,
    ),
    "shard": ("cut the frozen base over the ranks (FSDP2)", False),
    "save_every": ("optimiser steps between checkpoints", 100, None, None, 60),
    "eval_rows": (
        "validation rows decoded after a phase, to choose RUN/best",
        128,
        None,
        None,
        256,
    ),
}
PRESETS = {
    task: {
        k: v[column] if len(v) > column and v[column] is not None else v[1]
        for k, v in SETTINGS.items()
    }
    | {"task": task}
    for task, column in {"sudoku": 1, "countdown": 2, "gsm8k": 3, "math": 3, "toy": 4}.items()
}
DMPO = dict(
    h=1.0,
    ess=0.0,
    c="0",
    steps_per_h=8,
    prompts=4,
    completions=16,
    refresh=0,
    batch=4,
    accum=2,
    temperature=0.2,
    lr=1e-6,
    lr_min=1e-6,
    clip=0.2,
    ema=0.0,
)  # yuchen-zhu-zyc/DMPO: groups of 16, rounds of 8 steps on frozen weights


def settings(task: str, **given) -> SimpleNamespace:
    """The task's preset with the given changes, checked."""
    need(task in PRESETS, f"--task {task}: expected one of {', '.join(PRESETS)}")
    cfg = SimpleNamespace(
        **PRESETS[task] | (DMPO if given.get("objective") == "dmpo" else {}) | given
    )
    cfg.out, blocks = cfg.out or f"runs/{task}-{cfg.seed}", cfg.gen_length // max(1, cfg.block)
    zero = [key for key, values in SETTINGS.items() if 0 in values] + [
        "eval_rows",
        "lr_min",
    ]  # may be 0, as some preset's is
    for key, choices in dict(
        objective="dtm dmpo",
        normalize="none batch group",
        lora="all paper",
        order="confidence state random",
    ).items():
        need(
            getattr(cfg, key) in choices.split(),
            f"--{key} {getattr(cfg, key)}: expected one of {choices}",
        )
    for key, value in vars(cfg).items():
        good = (
            isinstance(value, (str, bool))
            or math.isfinite(value)
            and (value > 0 or key in zero and value == 0)
        )
        need(good, f"--{key} {value} must be positive")
    same = (
        all(path and Path(path).is_file() for path in (cfg.data, cfg.test_data))
        and Path(cfg.data).read_bytes() == Path(cfg.test_data).read_bytes()
    )
    for ok, message in (
        (max(cfg.ess, cfg.dropout, cfg.ema) < 1, "--ess, --dropout and --ema must lie in [0, 1)"),
        (
            re.fullmatch(r"\d*\.?\d+|star|learned", cfg.c),
            f"--c {cfg.c}: expected a number >= 0, star or learned",
        ),
        (
            cfg.gen_length % cfg.block == 0,
            f"--gen_length {cfg.gen_length} must be a multiple of --block {cfg.block}",
        ),
        (
            blocks and cfg.steps % blocks == 0,
            f"--steps {cfg.steps} must be a multiple of the {blocks} blocks",
        ),
        (
            cfg.batch * cfg.accum <= cfg.prompts * cfg.completions,
            f"a step draws batch x accum = {cfg.batch * cfg.accum} different answers, "
            f"the buffer holds prompts x completions = {cfg.prompts * cfg.completions}; lower --batch or --accum",
        ),
        (cfg.refresh <= cfg.prompts, f"--refresh {cfg.refresh} exceeds --prompts {cfg.prompts}"),
        (
            cfg.objective == "dtm" or cfg.completions > 1 and not cfg.refresh,
            "dmpo needs --completions above 1 and --refresh 0",
        ),
        (cfg.objective == "dtm" or cfg.c == "0", "dmpo has no control variate; leave out --c"),
        (not same, "--data and --test_data hold the same rows"),
    ):
        need(bool(ok), message)
    return cfg


def task_rows(cfg: SimpleNamespace, split: str) -> list[dict]:
    if split == "test":
        return read_rows(cfg.test_data, cfg.task) if cfg.test_data else TASKS[cfg.task].rows(split)
    return cut(read_rows(cfg.data, cfg.task), split) if cfg.data else TASKS[cfg.task].rows(split)


# ---- 7. Ranks ------------------------------------------------------------------------------------
class Ranks:
    """This process among torchrun's, its device and dtype: NCCL and bfloat16 on GPUs, gloo and float32 on CPUs."""

    def __init__(self):
        self.rank, self.size, local = (
            int(os.environ.get(k, v))
            for k, v in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        self.cuda, count = torch.cuda.is_available(), torch.cuda.device_count()
        need(
            not self.cuda or local < count,
            f"no GPU for local rank {local}; start at most {count} ranks on this node",
        )
        self.device, self.dtype = (
            (torch.device("cuda", local), torch.bfloat16)
            if self.cuda
            else (torch.device("cpu"), torch.float32)
        )
        if self.cuda:
            torch.cuda.set_device(self.device)
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.cuda else "gloo")
        self.wait = dist.barrier if self.size > 1 else lambda: None

    def gather(self, t: Tensor) -> Tensor:
        """The tensors of all ranks, of one shape, one after the other."""
        parts = [t] if self.size == 1 else [torch.empty_like(t) for _ in range(self.size)]
        if self.size > 1:
            dist.all_gather(parts, t.contiguous())
        return torch.cat(parts)


# ---- 8. The buffer -------------------------------------------------------------------------------
class Buffer:
    """A rank's rollouts: prompts `row` (N,), answers x1 (N, L), rewards r and `solved` (N,); for dmpo also log_cur and log_pre (N,)."""

    def __init__(
        self,
        cfg: SimpleNamespace,
        ranks: Ranks,
        text: Text,
        rows: list[dict],
        generator: Generator,
        pad_id: int,
    ):
        need(
            len(rows) >= ranks.size,
            f"{ranks.size} ranks share {len(rows)} prompts; start fewer ranks or give more rows",
        )
        self.cfg, self.ranks, self.text, self.rows, self.generator, self.pad_id = (
            cfg,
            ranks,
            text,
            rows,
            generator,
            pad_id,
        )
        self.mine = random.Random(cfg.seed).sample(range(len(rows)), len(rows))[
            ranks.rank :: ranks.size
        ]  # ranks share no prompt
        self.cursor, self.skipped, self.data = 0, 0, {}
        self.prompt = functools.cache(lambda row: text.prompt(TASKS[cfg.task].prompt(rows[row])))

    def take(self, count: int) -> list[int]:
        """This rank's next prompts; those that are too long are skipped and counted, never cut."""
        taken, missed = [], 0
        while len(taken) < count:
            row, self.cursor = self.mine[self.cursor % len(self.mine)], self.cursor + 1
            fits = len(self.prompt(row)) <= self.cfg.prompt_length
            taken, missed, self.skipped = (
                taken + [row] * fits,
                0 if fits else missed + 1,
                self.skipped + (not fits),
            )
            need(
                missed < len(self.mine),
                f"every prompt is longer than --prompt_length {self.cfg.prompt_length} tokens; raise it",
            )
        return taken

    def prompts(self, rows: list[int]) -> tuple[Tensor, Tensor | None]:
        return pad_left([self.prompt(row) for row in rows], self.pad_id, self.ranks.device)

    def fill(self, model: LLaDA, count: int) -> None:
        """The teacher answers `count` new prompts; the oldest answers make room. Negative rewards count as 0, as in the release."""
        cfg, rows, old = (
            self.cfg,
            [row for row in self.take(count) for _ in range(self.cfg.completions)],
            self.data,
        )
        x1 = decode(
            model.eval().use("teacher"),
            [*map(self.prompt, rows)],
            cfg.gen_length,
            cfg.chunk,
            self.generator,
            block=cfg.block,
            steps=cfg.steps,
            temperature=cfg.temperature,
            order=cfg.order,
            ban_mask=True,
        )
        task, pairs = (
            TASKS[cfg.task],
            [(self.text.answer(answer), self.rows[row]) for answer, row in zip(x1.tolist(), rows)],
        )
        new = {
            "row": torch.tensor(rows),
            "x1": x1,
            "r": torch.tensor([max(0.0, task.reward(*pair)) for pair in pairs]).double(),
            "solved": torch.tensor([task.correct(*pair) for pair in pairs]).double(),
        }
        new |= self.likelihoods(model, rows, x1) if cfg.objective == "dmpo" else {}
        self.data = {k: torch.cat([old[k][len(rows) :], t]) if old else t for k, t in new.items()}

    @torch.no_grad()
    def likelihoods(self, model: LLaDA, rows: list[int], x1: Tensor) -> dict[str, Tensor]:
        """Bounds (D6) of the log-likelihoods under teacher (cur) and base (pre): two antithetic pairs of masks, the same for both."""
        logs = {
            "log_cur": torch.zeros(len(rows)).double(),
            "log_pre": torch.zeros(len(rows)).double(),
        }
        for part in by_length(
            range(len(rows)), self.cfg.batch, key=lambda i: len(self.prompt(rows[i]))
        ):
            prompts, y, mask_id = (
                self.prompts([rows[i] for i in part]),
                x1[part],
                model.config["mask_token_id"],
            )
            for _, first in (
                objectives.mask_bernoulli(y, mask_id, self.generator) for _ in range(2)
            ):
                for mask in (
                    first,
                    ~first | first.all(1, keepdim=True),
                ):  # a full mask is its own partner
                    for log, adapter in zip(logs.values(), ("teacher", None)):
                        logits = model.use(adapter)(
                            *canvas(*prompts, torch.where(mask, mask_id, y), mask)
                        ).float()
                        nll = torch.zeros(mask.shape, device=y.device).masked_scatter(
                            mask, F.cross_entropy(logits, y[mask], reduction="none")
                        )
                        log[part] -= (y.shape[1] / 4 * nll.sum(1) / mask.sum(1)).double().cpu()
        return logs

    def weights(self, h: float) -> Tensor:
        """(N,): e^{h r} (D1), normalised if asked for; or a group's dmpo weights (D10), times its size."""
        cfg, r = self.cfg, self.data["r"]
        if cfg.objective == "dmpo":
            groups = [self.data[k].view(-1, cfg.completions) for k in ("r", "log_cur", "log_pre")]
            return cfg.completions * objectives.dmpo_weights(*groups, 0.04).flatten()
        if cfg.normalize == "batch":
            return tilt_weight(self.everywhere("r"), h, True)[self.ranks.rank * len(r) :][: len(r)]
        return tilt_weight(r, h, cfg.normalize == "group", self.data["row"])

    def everywhere(self, key: str) -> Tensor:
        """(ranks N,): a column of all ranks' buffers."""
        return self.ranks.gather(self.data[key].to(self.ranks.device)).cpu()


# ---- 9. The control variate ----------------------------------------------------------------------
class ControlVariate:
    """c of (D3) at the masked positions: a number, the scalar c* (D8), or c(xt, i) (D7). Both are least-squares fits of
    `state_c_target` over past steps, with forgetting: c* to phi = 1; "learned" to 64 more, fixed random projections of the
    teacher's final hidden state (or itself, if it is no wider). More numbers would learn a buffer's w by heart."""

    def __init__(self, kind: str, width: int, device: torch.device):
        self.fitted, k = kind in ("star", "learned"), min(width, 64)
        self.constant = 1.0 if self.fitted else float(kind)
        project = (
            torch.eye(k)
            if k == width
            else torch.randn(width, k, generator=Generator().manual_seed(0)) * width**-0.5
        )
        self.project, n = project.to(device), 1 + k * (kind == "learned")
        self.seen, self.new = (
            torch.zeros(n, n + 1, device=device, dtype=torch.float64) for _ in range(2)
        )

    def phi(self, hidden: Tensor) -> Tensor:
        return F.pad(hidden.float() @ self.project, (1, 0), value=1.0)[:, : len(self.seen)]

    def __call__(self, hidden: Tensor) -> Tensor:
        G, b = self.seen[:, :-1], self.seen[:, -1]
        if not (self.fitted and G.any()):
            return torch.full((len(hidden),), self.constant, device=hidden.device)
        ridge = (
            1e-3 * G.trace() / len(b) * (torch.arange(len(b), device=b.device) > 0)
        )  # on all but the mean: a poor fit falls back on c*
        return self.phi(hidden) @ torch.linalg.solve(G + ridge.diag(), b).float()

    def see(
        self, hidden: Tensor, logits: Tensor, logits_a: Tensor, x1: Tensor, w: Tensor, share: Tensor
    ) -> None:
        """Adds a batch's normal equations; share (M,) is the 1/k that `row_mean` gives a position."""
        if self.fitted:
            (y, q), phi = dtm.state_c_target(logits, logits_a, x1, w), self.phi(hidden)
            self.new += ((q * share**2)[:, None] * phi).T.double() @ torch.cat(
                [phi, y[:, None].float()], 1
            ).double()

    def fit(self, ranks: Ranks) -> None:
        """At the end of a step, so that c never depends on the batch it serves; the same on all ranks."""
        if self.fitted:
            self.seen, self.new = (
                0.95 * self.seen + ranks.gather(self.new[None]).sum(0),
                torch.zeros_like(self.new),
            )


# ---- 10. A run and its checkpoints ---------------------------------------------------------------
class Run:
    """Model, adapters, optimiser, buffer, generators and counters: all that a run's future depends on."""

    def __init__(self, cfg: SimpleNamespace, ranks: Ranks, rows: list[dict]):
        need(not cfg.shard or ranks.size > 1, "--shard needs torchrun and more than one rank")
        self.cfg, self.ranks, self.out, folder = cfg, ranks, Path(cfg.out), locate(cfg.model)
        self.say = tqdm.write if ranks.rank == 0 else lambda line: None
        self.text = Text(folder, read_json(folder / "config.json"))
        self.model = LLaDA.from_pretrained(folder, ranks.device, ranks.dtype, cfg.shard)
        config, maps, seed = self.model.config, ADAPTED[cfg.lora], cfg.seed + ranks.rank
        self.model.checkpointing = cfg.checkpointing
        self.student, self.teacher = (
            LoRA(config, maps, cfg.rank, cfg.alpha, cfg.dropout, cfg.seed).to(ranks.device)
            for _ in range(2)
        )
        self.teacher.eval().to(ranks.dtype).requires_grad_(
            False
        )  # what the matrix products would round it to in any case
        self.model.adapters.update({"student": self.student, "teacher": self.teacher})
        self.generator = Generator(ranks.device).manual_seed(seed)
        torch.manual_seed(seed)
        self.buffer = Buffer(cfg, ranks, self.text, rows, self.generator, config["pad_token_id"])
        self.state = {
            "phase": 0,
            "step": 0,
            "total": 0,
            "h": [],
            "best": -1.0,
            "best_phase": 0,
            "ranks": ranks.size,
        }
        self.adam = torch.optim.AdamW(
            self.student.parameters(), cfg.lr, (0.9, 0.99), 1e-8, cfg.weight_decay
        )
        self.open_phase()
        trainable = sum(p.numel() for p in self.student.parameters())
        self.say(
            f"LoRA on {', '.join(maps)}: {trainable:,} trainable parameters; {ranks.size} rank(s), {ranks.device.type}, {str(ranks.dtype)[6:]}"
        )

    def open_phase(self) -> None:
        """A new optimiser (not for dmpo), average and control variate."""
        for p in self.student.parameters():
            if self.cfg.objective == "dtm" or not self.adam.state[p]:
                self.adam.state[p] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        self.ema = (
            {k: p.detach().clone() for k, p in self.student.named_parameters()}
            if self.cfg.ema
            else {}
        )
        self.control = ControlVariate(self.cfg.c, self.model.config["d_model"], self.ranks.device)

    def log(self, **record) -> None:
        if self.ranks.rank == 0:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(record | {"total": self.state["total"]}) + "\n")

    def shared(self) -> dict[str, Tensor]:
        """What all ranks have in common; the tensors themselves, so that `load` can fill them."""
        parts = {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "ema": self.ema,
            "adam": {
                f"{k}.{name}": t
                for k, p in self.student.named_parameters()
                for name, t in self.adam.state[p].items()
            },
        }
        return {f"{part}.{k}": t for part, tensors in parts.items() for k, t in tensors.items()} | {
            "control": self.control.seen
        }

    def save(self) -> None:
        """RUN/step-N, renamed when every rank has written its part over what a killed run may have left; the last two are kept."""
        name, own = (
            f"step-{self.state['total']:07}",
            {f"buffer.{k}": t for k, t in self.buffer.data.items()},
        )
        half, own["cursor"] = (
            self.out / f".half-{name}",
            torch.tensor([self.buffer.cursor, self.buffer.skipped]),
        )
        own |= {
            "generator": self.generator.get_state(),
            "torch": (torch.cuda if self.ranks.cuda else torch).get_rng_state(),
        }
        write(half / f"rank{self.ranks.rank}.safetensors", own)
        if self.ranks.rank == 0:
            self.student.save(half / "adapter", self.cfg.model)
            write(half / "shared.safetensors", self.shared())
            write(half / "state.json", self.state)
        self.ranks.wait()
        if self.ranks.rank == 0:
            half.replace(self.out / name)
            for old in checkpoints(self.out)[:-2]:
                shutil.rmtree(old)

    @torch.no_grad()
    def load(self) -> None:
        """Goes back to the last checkpoint; the log forgets what came after it."""
        last = checkpoints(self.out)[-1]
        self.state = read_json(last / "state.json")
        need(
            self.state["ranks"] == self.ranks.size,
            f"{self.out} ran on {self.state['ranks']} ranks, now there are {self.ranks.size}; resume with as many",
        )
        saved, own = (
            dict(read_shard(last / "shared.safetensors")),
            dict(read_shard(last / f"rank{self.ranks.rank}.safetensors")),
        )
        for name, t in self.shared().items():
            t.copy_(saved[name])
        self.buffer.data = {
            k[7:]: t.to(self.ranks.device) if k == "buffer.x1" else t
            for k, t in own.items()
            if k.startswith("buffer.")
        }
        self.buffer.cursor, self.buffer.skipped = own["cursor"].tolist()
        self.generator.set_state(own["generator"])
        (torch.cuda if self.ranks.cuda else torch).set_rng_state(own["torch"])
        if self.ranks.rank == 0:
            write(
                self.out / "metrics.jsonl",
                "".join(
                    json.dumps(r) + "\n"
                    for r in read_log(self.out)
                    if r["total"] <= self.state["total"]
                ),
            )
        self.say(f"resumed {last}: phase {self.state['phase']}, step {self.state['step']}")


checkpoints = lambda out: sorted(out.glob("step-*"))


def read_log(out: Path) -> list[dict]:
    """The records of a run; a killed one may end in half a line."""
    need(
        (out / "metrics.jsonl").is_file(),
        f"{out} holds no metrics.jsonl; expected the folder of a run",
    )
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().split("\n")[:-1]]


def parallel(model: LLaDA, ranks: Ranks) -> nn.Module:
    """DDP on the student's adapter; the base is frozen and the same everywhere, or cut by FSDP2, and nothing DDP should touch."""
    if ranks.size == 1:
        return model
    DDP = nn.parallel.DistributedDataParallel
    DDP._set_params_and_buffers_to_ignore_for_model(
        model, [name for name, p in model.named_parameters() if not p.requires_grad]
    )
    return DDP(model)


# ---- 11. The loop --------------------------------------------------------------------------------
def learning_rate(cfg: SimpleNamespace, step: int) -> float:
    """Rises over 5 % of a phase and falls linearly to lr_min over the last 10 %; constant for dmpo, whose rounds are short."""
    left, n = cfg.steps_per_h - step - 1, cfg.steps_per_h
    fall = max(0.0, 1 - left / (0.1 * n))
    return (
        cfg.lr
        if cfg.objective == "dmpo"
        else min(1.0, (step + 1) / (0.05 * n)) * (cfg.lr + (cfg.lr_min - cfg.lr) * fall)
    )


def loss_terms(run: Run, student: nn.Module, part: list[int], w: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of one forward pass over the buffer's rows `part` with weights w (B,); beside it [loss, KL(pi_a || pi_theta), mean c]."""
    model, data, g, mask_id = (
        run.model,
        run.buffer.data,
        run.generator,
        run.model.config["mask_token_id"],
    )
    prompts, x1, dmpo = (
        run.buffer.prompts(data["row"][part].tolist()),
        data["x1"][part],
        run.cfg.objective == "dmpo",
    )
    xt, mask = (
        objectives.mask_bernoulli(x1, mask_id, g)
        if dmpo
        else mask_blockwise(x1, mask_id, run.cfg.block, g)
    )  # mask: the active block's
    args = canvas(*prompts, xt, mask)
    with torch.no_grad():
        logits_a, hidden = model.use("teacher")(*args, hidden=True)
    model.use("student")
    logits, x1, w = student(*args), x1[mask], w[:, None].expand_as(mask)[mask]
    c = run.control(hidden)
    loss = row_mean(c_dtm_loss(logits, logits_a, x1, w, c), mask)  # dmpo_loss is its c = 0
    with torch.no_grad():
        share = (1 / mask.sum(1, keepdim=True)).expand_as(mask)[mask]
        run.control.see(hidden, logits, logits_a, x1, w, share)
        kl = F.kl_div(
            logits.float().log_softmax(-1),
            logits_a.float().log_softmax(-1),
            reduction="none",
            log_target=True,
        ).sum(-1)
        return loss, torch.stack([loss, row_mean(kl, mask), c.mean()]).double()


def train(run: Run, valid: list[dict], test: list[dict] | None = None) -> None:
    """The algorithm, in the order of the head of this file. Validation rows choose RUN/best; test rows are only reported."""
    cfg, ranks, state, buffer, model, top = (
        run.cfg,
        run.ranks,
        run.state,
        run.buffer,
        run.model,
        TASKS[run.cfg.task].top,
    )
    student, asked, seconds, clock = (
        parallel(model, ranks),
        itertools.count(),
        dict(rollout=0.0, train=0.0, eval=0.0),
        time.perf_counter(),
    )

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name], clock = seconds[name] + time.perf_counter() - clock, time.perf_counter()

    def next_h(a: float) -> float:
        """h of the phase at tilt a, from fresh rollouts of its teacher; a resumed run repeats its past."""
        if (n := next(asked)) == len(state["h"]):
            buffer.data = {}
            buffer.fill(model, cfg.prompts)
            state["h"].append(
                dtm.next_h(buffer.everywhere("r"), cfg.ess, cfg.h) if cfg.ess else cfg.h
            )
            lap("rollout")
        return state["h"][n]

    def look(a: float) -> None:
        for split, rows in (("valid", valid), ("test", test)):
            if rows and (got := evaluate(run, rows, cfg.gen_length)):  # on rank 0
                run.log(kind="eval", split=split, phase=state["phase"], a=a, **got)
                run.say(f"a = {a:6.2f} {split:>5}: " + show(got))
                if split == "valid" and got["solved"] > state["best"]:
                    state.update(best=got["solved"], best_phase=state["phase"])
                    run.teacher.save(run.out / "best", cfg.model)
        lap("eval")

    if state["total"] == 0 and not state["h"]:
        look(0.0)
    for n, (a, h) in enumerate(phases(cfg.a_end, next_h)):
        if n < state["phase"]:  # a resumed run's past
            continue
        bar = tqdm(
            range(state["step"], cfg.steps_per_h),
            f"a {a:.1f} of {cfg.a_end:g}",
            unit="step",
            disable=ranks.rank > 0,
            dynamic_ncols=True,
        )
        for step in bar:
            if step and cfg.refresh and cfg.refresh_steps and step % cfg.refresh_steps == 0:
                buffer.fill(model, cfg.refresh)
                lap("rollout")
            w = buffer.weights(h).to(ranks.device, torch.float32)
            picks = torch.randperm(len(w), generator=run.generator, device=ranks.device)[
                : cfg.batch * cfg.accum
            ].tolist()
            lengths = [len(buffer.prompt(row)) for row in buffer.data["row"].tolist()]
            parts = by_length(picks, cfg.batch, key=lengths.__getitem__) * (
                4 if cfg.objective == "dmpo" else 1
            )  # dmpo: 4 states a row
            run.student.train()
            sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)
            for i, part in enumerate(parts):
                with (
                    student.no_sync()
                    if ranks.size > 1 and i + 1 < len(parts)
                    else contextlib.nullcontext()
                ):
                    loss, terms = loss_terms(run, student, part, w[part])
                    (loss / len(parts)).backward()
                sums += terms / len(parts)
            norm = float(nn.utils.clip_grad_norm_(run.student.parameters(), cfg.clip))
            need(
                math.isfinite(norm) and bool(sums.isfinite().all()),
                f"the loss is not finite at step {state['total'] + 1}, rank {ranks.rank}, prompts "
                f"{sorted({int(buffer.data['row'][i]) for i in picks})}; the last checkpoint is untouched. Try a lower --lr or --h, or --normalize batch",
            )
            run.adam.param_groups[0]["lr"] = learning_rate(cfg, step)
            run.adam.step()
            run.adam.zero_grad()
            run.control.fit(ranks)
            for name, p in run.student.named_parameters() if cfg.ema else ():
                run.ema[name].lerp_(p.detach(), 1 - cfg.ema)
            state.update(step=step + 1, total=state["total"] + 1)
            r, (loss, kl, c), before = (
                buffer.everywhere("r"),
                ranks.gather(sums[None]).mean(0).tolist(),
                seconds["train"],
            )
            lap("train")
            tokens = ranks.size * sum(lengths[i] + cfg.gen_length for part in parts for i in part)
            run.log(
                kind="step",
                phase=n,
                a=a,
                h=h,
                loss=loss,
                kl=kl,
                c=c,
                ess=1 / float(tilt_weight(r, h, True).square().mean()),
                reward=float(r.mean()),
                reward_sd=float(r.std(correction=0)),
                reward_hist=torch.histc(r, 10, 0, top).int().tolist(),
                solved=float(buffer.everywhere("solved").mean()),
                grad_norm=norm,
                lr=learning_rate(cfg, step),
                skipped=buffer.skipped,
                seconds=seconds,
                tokens_per_s=tokens / (seconds["train"] - before),
                gpu_gb=torch.cuda.max_memory_allocated() / 1e9 if ranks.cuda else 0.0,
            )
            bar.set_postfix(
                loss=f"{loss:.3g}", reward=f"{float(r.mean()):.3f}", h=f"{h:.2f}", refresh=False
            )
            if state["total"] % cfg.save_every == 0 and step + 1 < cfg.steps_per_h:
                run.save()
        for adapter in (
            run.teacher,
            run.student,
        ):  # the boundary: teacher <- student or its average
            adapter.follow(run.ema or run.student.state_dict())
        run.open_phase()
        state.update(phase=n + 1, step=0)
        look(a + h)
        run.save()


# ---- 12. Evaluation ------------------------------------------------------------------------------
def evaluate(
    run: Run, rows: list[dict], gen_length: int, path: Path | None = None, temperature: float = 0.0
) -> dict | None:
    """Decodes every row once with the teacher's adapter, by confidence, at the rollouts' tokens a step. Scores with standard errors
    on rank 0, None elsewhere; `path` receives the answers as JSONL in the order of the rows."""
    cfg, ranks, task = run.cfg, run.ranks, TASKS[run.cfg.task]
    # Every rank decodes as many, so that sharded ranks keep step; the repeats at the end count once.
    mine = [
        i % len(rows)
        for i in range(ranks.rank, -(-len(rows) // ranks.size) * ranks.size, ranks.size)
    ]
    prompts, g = (
        [run.text.prompt(task.prompt(rows[i])) for i in mine],
        Generator(ranks.device).manual_seed(cfg.seed + ranks.rank),
    )
    steps = max(gen_length // cfg.block, gen_length * cfg.steps // cfg.gen_length)
    ids = decode(
        run.model.eval().use("teacher"),
        prompts,
        gen_length,
        cfg.chunk,
        g,
        ranks.rank > 0,
        block=cfg.block,
        steps=steps,
        temperature=temperature,
    )
    ids = ranks.gather(ids[None]).transpose(0, 1).flatten(0, 1)[: len(rows)].tolist()
    if ranks.rank:
        return None
    graded = [
        row | {"text": t, "solved": float(task.correct(t, row)), "reward": task.reward(t, row)}
        for t, row in zip(map(run.text.answer, ids), rows)
    ]
    if path:
        write(path, "".join(json.dumps(line) + "\n" for line in graded))
    parts = {k: [(line[k], 1) for line in graded] for k in ("solved", "reward")}
    parts |= {"cells": [task.cells(line["text"], line) for line in graded]} if task.cells else {}
    got = {"n": len(rows)}
    for (
        k,
        pairs,
    ) in (
        parts.items()
    ):  # pooled over cells; the error counts rows, as a puzzle's cells stand or fall together
        part, whole = torch.tensor(pairs).double().unbind(1)
        share = part.sum() / whole.sum()
        got |= {
            k: float(share),
            f"{k}_se": float(
                (part - share * whole).std(correction=0) / len(rows) ** 0.5 / whole.mean()
            ),
        }
    return got


show = lambda got: (
    ", ".join(
        f"{k} {got[k]:.3f} +- {got[k + '_se']:.3f}"
        for k in ("solved", "cells", "reward")
        if k in got
    )
    + f" (n = {got['n']})"
)

# ---- 13. The laptop's LLaDA ----------------------------------------------------------------------
CHARS = "?0123456789+-*/()= "
TOY = CONFIG_8B | dict(
    d_model=64,
    n_layers=4,
    n_heads=4,
    mlp_hidden_size=192,
    vocab_size=24,
    rope_theta=1000.0,
    mask_token_id=23,
    eos_token_id=1,
    pad_token_id=1,
)
SLOPPY = dict(steps=1600, batch=128, lr=4e-3, lazy=0.7)


def lazy(row: dict) -> str:
    """A lazy solver's answer: every row gets its missing digits in ascending order."""
    lines = [row["puzzle"][i : i + 4] for i in range(0, 16, 4)]
    spare = [iter(sorted({*"1234"} - {*line})) for line in lines]
    return "".join(next(left) if c == "0" else c for line, left in zip(lines, spare) for c in line)


def save_tokenizer(folder: Path, config: dict) -> None:
    """A tokenizer.json of single characters, special tokens at the ids of the config."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    special = {
        "<|startoftext|>": 0,
        "<|endoftext|>": config["eos_token_id"],
        "<|mdm_mask|>": config["mask_token_id"],
    }
    tok = Tokenizer(
        models.WordLevel(special | {c: i for i, c in enumerate(CHARS, 2)}, unk_token="?")
    )
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    tok.add_special_tokens(list(special))
    write(folder / "tokenizer.json", tok.to_str(pretty=True))


def make_toy(folder: Path, seed: int, ranks: Ranks, steps: int = SLOPPY["steps"]) -> None:
    """A small LLaDA, trained on puzzles whose rows are each filled lazily with chance .7, saved in the checkpoint's format."""
    rows, g = TASKS["toy"].rows("train"), Generator(ranks.device).manual_seed(seed + ranks.rank)
    encode = lambda texts: torch.tensor(
        [[CHARS.index(c) + 2 for c in text] for text in texts], device=ranks.device
    )
    prompt, right, wrong = (
        encode(r["puzzle"] for r in rows),
        encode(r["solution"] for r in rows),
        encode(map(lazy, rows)),
    )
    prompt = F.pad(prompt, (1, 0), value=0)  # <|startoftext|>
    model = LLaDA(TOY).init_weights(Generator().manual_seed(seed)).to(ranks.device)
    trained = nn.parallel.DistributedDataParallel(model) if ranks.size > 1 else model
    adam = torch.optim.AdamW(model.parameters(), SLOPPY["lr"], (0.9, 0.98))
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, SLOPPY["lr"], steps, pct_start=0.1)
    for _ in tqdm(
        range(steps), "pretraining the toy", unit="step", disable=ranks.rank > 0, dynamic_ncols=True
    ):
        i = torch.randint(
            len(rows), (SLOPPY["batch"] // ranks.size,), generator=g, device=ranks.device
        )
        x1 = torch.where(
            (
                torch.rand(len(i), 4, generator=g, device=ranks.device) < SLOPPY["lazy"]
            ).repeat_interleave(4, 1),
            wrong[i],
            right[i],
        )
        xt, mask = mask_random(x1, TOY["mask_token_id"], g)
        row_mean(
            F.cross_entropy(
                trained(*canvas(prompt[i], None, xt, mask)), x1[mask], reduction="none"
            ),
            mask,
        ).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        rate.step()
        adam.zero_grad()
    if ranks.rank == 0:
        save_tokenizer(folder, TOY)
        model.save_pretrained(folder)
    ranks.wait()


def toy(cfg: SimpleNamespace, ranks: Ranks) -> None:
    """Make the model, save it, load it back, tune it, report the phase that the validation rows chose."""
    start, test = time.perf_counter(), task_rows(cfg, "test")
    if not (
        Path(cfg.model) / "config.json"
    ).exists():  # --model BASE reuses the base of another run
        make_toy(Path(cfg.model), cfg.seed, ranks)
    run = start_run(cfg, ranks)
    for temperature in (0.0, 1.0):
        if got := evaluate(run, test, cfg.gen_length, temperature=temperature):
            run.say(f"base, test rows, temperature {temperature:g}: {show(got)}")
            run.log(kind="base", temperature=temperature, **got)
    train(run, task_rows(cfg, "valid")[: cfg.eval_rows], test)
    if ranks.rank == 0:
        curve, minutes = (
            [r for r in read_log(run.out) if r["kind"] == "eval" and r["split"] == "test"],
            (time.perf_counter() - start) / 60,
        )
        best = curve[run.state["best_phase"]]
        write(
            run.out / "result.json",
            {
                "minutes": minutes,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "ranks": ranks.size,
                "test": best,
            },
        )
        run.say(
            f"solved, held-out solutions: {curve[0]['solved']:.3f} -> {best['solved']:.3f} after phase {best['phase']}, which the validation rows "
            f"chose; {minutes:.1f} minutes"
        )


# ---- 14. Before renting, on the machine, afterwards ----------------------------------------------
def plan(cfg: SimpleNamespace, config: dict, gpus: int, tflops: float) -> dict:
    """Parameters, GB a GPU, EFLOP and hours. `tflops` is what a GPU attains, not its data sheet's peak. A map of n numbers costs 2 n
    FLOPs a token; a backward pass through the frozen base costs one more forward. Every prompt counts as --prompt_length."""
    need(gpus > 0 and tflops > 0, f"--gpus {gpus} and --tflops {tflops:g} must be positive")
    d, m, n, V = (config[k] for k in ("d_model", "mlp_hidden_size", "n_layers", "vocab_size"))
    body, T, masks = (
        n * (4 * d * d + 3 * d * m),
        cfg.prompt_length + cfg.gen_length,
        (cfg.block + 1) / 2,
    )
    total, trainable = (
        body + 2 * V * d + (2 * n + 1) * d,
        n * cfg.rank * sum(sum(sizes(config, k)) for k in ADAPTED[cfg.lora]),
    )
    forward = T * (2 * (body + trainable) + 4 * d * n * T) + 2 * d * V * masks
    fills = (cfg.steps_per_h - 1) // cfg.refresh_steps if cfg.refresh and cfg.refresh_steps else 0
    answers, count = (
        gpus * cfg.completions * (cfg.prompts + fills * cfg.refresh),
        sum(1 for _ in phases(cfg.a_end, cfg.h)),
    )
    eflop = {
        "rollouts": answers * cfg.steps * forward / 1e18,
        "validation": cfg.eval_rows * cfg.steps * forward / 1e18,
        "training": gpus
        * cfg.batch
        * cfg.accum
        * cfg.steps_per_h
        * (4 if cfg.checkpointing else 3)
        * forward
        / 1e18,
    }
    block = (
        cfg.batch * T * 2 * (30 * d + 7 * m)
    )  # bytes kept for a block's backward pass: a count by hand, to be measured
    memory = {
        "base": 2 * total / (gpus if cfg.shard else 1),
        "student, gradient, AdamW": 16 * trainable,
        "teacher": 2 * trainable,
        "average": 4 * trainable if cfg.ema else 0,
        "activations": block + cfg.batch * T * 2 * d * n if cfg.checkpointing else block * n,
        "logits": cfg.batch * masks * V * 24,
    }
    hours = sum(eflop.values()) * 1e6 / (gpus * tflops * 3600)
    return {
        "parameters": total,
        "trainable": trainable,
        "gb_per_gpu": {k: v / 1e9 for k, v in memory.items()},
        "gb_per_gpu_total": sum(memory.values()) / 1e9,
        "phases": count,
        "steps": count * cfg.steps_per_h,
        "answers_per_phase": answers,
        "eflop_per_phase": eflop,
        "eflop": count * sum(eflop.values()),
        "hours_per_phase": hours,
        "hours": count * hours,
    }


def bench(cfg: SimpleNamespace, ranks: Ranks) -> dict:
    """The 8B shape with random weights (on a CPU the toy's, to see that it runs): checkpoint written and read, one buffer rolled out, ten
    steps, checkpoint and resume; FLOP rates by `plan` as shares of what a large matrix product attains here."""
    config, n, out = (CONFIG_8B, 8192, Path(cfg.out)) if ranks.cuda else (TOY, 1024, Path(cfg.out))
    x, clocks = torch.randn(n, n, device=ranks.device, dtype=ranks.dtype), []
    for _ in range(3):  # the first round warms up
        float(sum((x @ x)[0, 0] for _ in range(20)))  # float() waits for the device
        clocks.append(time.perf_counter())
    rate = 20 * 2 * n**3 / (clocks[2] - clocks[1])
    save_tokenizer(out / "base", config)
    torch.set_default_dtype(ranks.dtype)
    with ranks.device:
        LLaDA(config).init_weights(Generator(ranks.device).manual_seed(0)).save_pretrained(
            out / "base", 6
        )
    torch.set_default_dtype(torch.float32)
    TASKS["bench"] = TASKS["sudoku"]._replace(
        prompt=lambda row: row["puzzle"].ljust(cfg.prompt_length - 1, "0")
    )
    cfg = SimpleNamespace(
        **vars(cfg)
        | dict(
            task="bench",
            model=str(out / "base"),
            out=str(out / "run"),
            a_end=cfg.h,
            steps_per_h=10,
            save_every=5,
            refresh=0,
            prompts=max(cfg.chunk, cfg.batch * cfg.accum),
        )
    )
    run = start_run(cfg, ranks)
    train(run, [])
    again = resumed(Path(cfg.out), {}, ranks)
    need(
        all(
            torch.equal(p, q) for p, q in zip(again.student.parameters(), run.student.parameters())
        ),
        "the resumed adapter differs",
    )
    log, cost = read_log(run.out), plan(cfg, config, 1, 1.0)["eflop_per_phase"]
    rollout, step = (
        log[-1]["seconds"]["rollout"],
        (log[-1]["seconds"]["train"] - log[1]["seconds"]["train"]) / 8,
    )  # the first two warm up
    got = {
        "device": torch.cuda.get_device_name() if ranks.cuda else "cpu",
        "torch": torch.__version__,
        "matmul_tflops": rate / 1e12,
        "rollout_seconds": rollout,
        "answer_tokens_per_s": cfg.prompts * cfg.completions * cfg.gen_length / rollout,
        "rollout_share_of_matmul": cost["rollouts"] * 1e18 / rollout / rate,
        "step_seconds": step,
        "tokens_per_s": cfg.batch * cfg.accum * (cfg.prompt_length + cfg.gen_length) / step,
        "step_share_of_matmul": cost["training"] * 1e17 / step / rate,
        "peak_gb": log[-1]["gpu_gb"],
        "settings": vars(cfg),
    }
    write(out / "bench.json", got)
    return got


PANELS = {
    "solved": "share solved",
    "cells": "share of empty cells right",
    "reward": "mean reward of the buffer",
    "a": "tilt a",
    "ess": "effective sample size, share",
    "kl": "KL(teacher || student), nats",
    "c": "mean c",
    "grad_norm": "gradient norm",
}


def plot(runs: list[Path], to: Path) -> None:
    """The runs' logs, a colour for each c, means over runs in bold: TO.png, drawn from TO.json."""
    from matplotlib.figure import Figure

    keys = {"kind", "split", "phase", "total", "n", "solved_se", "cells_se", *PANELS}
    log = lambda run: [{k: v for k, v in record.items() if k in keys} for record in read_log(run)]
    table = [
        {"run": run.name, "settings": read_json(run / "config.json"), "log": log(run)}
        for run in runs
    ]
    write(
        to.with_suffix(".json"),
        json.dumps({"command": "python llada_finetune.py " + " ".join(sys.argv[1:]), "runs": table})
        + "\n",
    )
    fig, split = (
        Figure((16, 7), layout="constrained"),
        "test" if any(e.get("split") == "test" for r in table for e in r["log"]) else "valid",
    )
    colours = dict(
        zip(
            sorted({r["settings"]["c"] for r in table}),
            itertools.cycle(("#d55e00", "#0072b2", "#009e73", "#cc79a7")),
        )
    )
    for axis, (key, title) in zip(fig.subplots(2, 4).flat, PANELS.items()):
        x, kind = ("phase", split) if key in ("solved", "cells") else ("total", "step")
        for c, colour in colours.items():
            runs = [r["log"] for r in table if r["settings"]["c"] == c]
            lines = [
                [(e[x], e[key]) for e in log if key in e and e.get("split", e["kind"]) == kind]
                for log in runs
            ]
            for line in filter(None, lines):
                axis.plot(*zip(*line), color=colour, lw=0.8, alpha=0.6)
            if x == "phase" and all(lines):
                mean = [sum(p[1] for p in points) / len(lines) for points in zip(*lines)]
                axis.plot(
                    mean,
                    color=colour,
                    lw=2.5,
                    marker="o",
                    label=f"c: {c}, mean of {len(lines)} runs",
                )
                axis.legend(loc="lower right", title=f"{split} rows")
        axis.set(title=title, xlabel={"phase": "phase", "total": "optimiser step"}[x])
        axis.set_ylim(*(0, 1.02) if x == "phase" else (min(0, axis.get_ylim()[0]),))
        axis.grid(alpha=0.3)
    fig.savefig(to.with_suffix(".png"), dpi=100)


# ---- 15. Command line ----------------------------------------------------------------------------
def start_run(cfg: SimpleNamespace, ranks: Ranks) -> Run:
    """A new run in a folder that no other run uses."""
    need(
        not Path(cfg.out, "config.json").exists(),
        f"{cfg.out} holds a run: --resume {cfg.out} goes on with it, --out FOLDER starts another",
    )
    run = Run(cfg, ranks, task_rows(cfg, "train"))
    ranks.wait()
    if ranks.rank == 0:
        write(run.out / "config.json", vars(cfg))
    return run


def resumed(out: Path, given: dict, ranks: Ranks) -> Run:
    saved = read_json(out / "config.json")
    changed = [
        f"{k} (was {saved.get(k)!r}, now {v!r})" for k, v in given.items() if saved.get(k) != v
    ]
    need(
        not changed,
        f"a resumed run keeps its settings; leave out {', '.join(changed)} or start a new run",
    )
    need(bool(checkpoints(out)), f"{out} has no checkpoint yet; start anew with another --out")
    cfg = SimpleNamespace(**saved | {"out": str(out)})
    run = Run(cfg, ranks, task_rows(cfg, "train"))
    run.load()
    return run


def test_table(cfg: SimpleNamespace, ranks: Ranks, adapter: str | None, lengths: list[int]) -> None:
    """The test rows at temperature 0: scores in RUN/eval.json, answers beside it."""
    need(
        all(length % cfg.block == 0 for length in lengths),
        f"--lengths {lengths} must be multiples of --block {cfg.block}",
    )
    rows = task_rows(cfg, "test")
    run, table = Run(cfg, ranks, rows), {}
    if adapter:
        run.model.adapters["teacher"] = LoRA.load(Path(adapter), run.model.config).to(
            ranks.device, ranks.dtype
        )
    for length in lengths:
        if got := evaluate(run, rows, length, run.out / f"eval-{length}.jsonl"):
            table[length] = got
            run.say(f"{cfg.task}, {length} tokens: {show(got)}")
            write(run.out / "eval.json", {"model": cfg.model, "adapter": adapter, "lengths": table})


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description="Discrete Tilt Matching on LLaDA. Without an action it trains; settings not given come from the task's preset."
    )
    p.add_argument(
        "--toy",
        action="store_true",
        help="the whole loop on a small LLaDA that is made here, for a laptop",
    )
    p.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    p.add_argument(
        "--eval",
        action="store_true",
        help="decode the test rows with --adapter, or with the base model",
    )
    p.add_argument("--adapter", metavar="DIR", help="PEFT folder, such as RUN/best")
    p.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        metavar="L",
        help="answer lengths of --eval in tokens (gen_length and twice that)",
    )
    p.add_argument(
        "--merge",
        metavar="OUT",
        help="write --model with --adapter merged in, as a whole checkpoint",
    )
    p.add_argument(
        "--plan",
        action="store_true",
        help="print parameters, GB, EFLOP and hours; needs neither weights nor GPU",
    )
    p.add_argument("--gpus", type=int, default=8, help="number of GPUs for --plan (8)")
    p.add_argument(
        "--tflops",
        type=float,
        default=400.0,
        help="TFLOP/s that each GPU attains, for --plan (400)",
    )
    p.add_argument(
        "--bench", action="store_true", help="time the 8B shape with random weights on this machine"
    )
    p.add_argument("--plot", metavar="RUN", nargs="+", help="draw the logs of runs")
    p.add_argument("--to", metavar="NAME", help="figure of --plot, without suffix (RUN/metrics)")
    group = p.add_argument_group(
        "settings; in brackets the value for sudoku (countdown, gsm8k and math, toy where they differ)"
    )
    for name, (text, value, *others) in SETTINGS.items():
        kind = (
            {"action": argparse.BooleanOptionalAction}
            if isinstance(value, bool)
            else {"type": type(value), "metavar": "X"}
        )
        shown = " ".join(str(v) for v in (value, *others) if v not in (None, ""))
        group.add_argument(
            *{f"--{name}": 0, f"--{name.replace('_', '-')}": 0},
            default=argparse.SUPPRESS,
            help=f"{text} [{shown}]".replace("%", "%%"),
            **kind,
        )
    args = p.parse_args(argv)
    given = {k: v for k, v in vars(args).items() if k in SETTINGS}
    if args.plot:
        return plot([Path(r) for r in args.plot], Path(args.to or f"{args.plot[0]}/metrics"))
    ranks = Ranks()
    if args.resume:
        run = resumed(Path(args.resume), given, ranks)
        return train(
            run,
            task_rows(run.cfg, "valid")[: run.cfg.eval_rows],
            task_rows(run.cfg, "test") if run.cfg.task == "toy" else [],
        )
    if args.toy:  # the same buffer and batch in all, whatever the number of ranks
        share = {k: PRESETS["toy"][k] // ranks.size for k in ("prompts", "batch")}
        cfg = settings(**share | given | {"task": "toy"})
        cfg.model = cfg.model or f"{cfg.out}/base"
        return toy(cfg, ranks)
    cfg = settings(**{"task": "sudoku"} | given)
    if args.plan:
        local = (
            TOY
            if cfg.task == "toy"
            else read_json(Path(cfg.model) / "config.json")
            if Path(cfg.model).is_dir()
            else CONFIG_8B
        )
        got = json.dumps(plan(cfg, check_config(local), args.gpus, args.tflops))
        return print(
            json.dumps(json.loads(got, parse_float=lambda x: float(f"{float(x):.4g}")), indent=1)
        )
    if args.bench:
        return print(json.dumps(bench(cfg, ranks), indent=1))
    if args.merge:
        need(bool(args.adapter), "--merge needs --adapter DIR")
        return merge(locate(cfg.model), Path(args.adapter), Path(args.merge))
    if args.eval:
        return test_table(
            cfg, ranks, args.adapter, args.lengths or [cfg.gen_length, 2 * cfg.gen_length]
        )
    train(
        start_run(cfg, ranks),
        task_rows(cfg, "valid")[: cfg.eval_rows],
        task_rows(cfg, "test") if cfg.task == "toy" else [],
    )


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError as e:
        sys.exit(
            f"out of device memory ({str(e)[:90]}): lower --batch (training) or --chunk (decoding), keep --checkpointing, or --shard over "
            "several GPUs; the last checkpoint is whole, --resume goes on from it"
        )
    except (ValueError, OSError) as e:
        sys.exit(f"llada_finetune: {e}")
    except KeyboardInterrupt:
        sys.exit("stopped; --resume RUN goes on from the last checkpoint")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
