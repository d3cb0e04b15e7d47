"""The transformer of LLaDA, and loading it from a checkpoint.

LLaDA-8B is a Llama without the causal mask: every position attends to every other one, and the
logits at position t predict the token at position t. The tensors have the names of the published
checkpoint, which are OLMo's: attn_out is Llama's output projection, ff_proj its gate projection,
up_proj its up projection, and ff_out its down projection. The head over the vocabulary has the name
ff_out, too, but it does not belong to a layer. `Block` is OLMo's name of a layer; it has nothing to
do with the blocks of tokens in which LLaDA decodes.

The adapters of `llada.lora` are attached to the model: `model.adapters["student"]` holds one, and
`model.use("student")` switches it on.

Source: the model code that GSAI-ML published with LLaDA-8B-Instruct. Padding, as marked by an
attention mask, is never attended to. The published code has done the same since October 2025;
before that it ignored the mask.
"""

import functools
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dtm import check
from llada.checkpoint import explained, read_json, read_tensors, write_file

Device = torch.device | str

# The entries of the published config.json of LLaDA-8B that the code uses.
CONFIG_8B = {
    "model_type": "llada",
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
}
# The linear projections of a block, each with the width of its input and that of its output.
PROJECTIONS = {
    "q_proj": ("model", "model"),
    "k_proj": ("model", "model"),
    "v_proj": ("model", "model"),
    "attn_out": ("model", "model"),
    "ff_proj": ("model", "mlp"),
    "up_proj": ("model", "mlp"),
    "ff_out": ("mlp", "model"),
}


def projection_shape(config: dict, name: str) -> tuple[int, int]:
    """Return (inputs, outputs) of a block's linear projection."""
    width = {"model": config["d_model"], "mlp": config["mlp_hidden_size"]}
    source, target = PROJECTIONS[name]
    return width[source], width[target]


# ---- 1. The transformer -------------------------------------------------------------------------
class RMSNorm(nn.RMSNorm):
    """The root-mean-square norm with a gain.

    x is normalised in float32, and rounded to its own dtype before the gain multiplies it.
    """

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), self.normalized_shape, None, self.eps)
        return self.weight * normed.to(x.dtype)


@functools.lru_cache(8)
@torch.inference_mode(False)  # a tensor made in inference mode could not be used in training
def rotary_angles(T: int, half: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the angles t theta^(-j / half), each (T, half), float32.

    t is a position below T, and j numbers the `half` pairs of coordinates that are rotated. The
    angles are computed on the CPU, so that all devices use the same numbers.
    """
    frequency = 1 / theta ** (torch.arange(half).float() / half)
    angle = torch.arange(T).float()[:, None] * frequency
    return angle.cos().to(device), angle.sin().to(device)


def rotate(u: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return queries or keys u (B, heads, T, d), rotated by their positions.

    cos and sin are (T, d / 2). The rotation is computed in float32 and rounded at its end.
    """
    u1, u2 = u.float().chunk(2, -1)
    return torch.cat([u1 * cos - u2 * sin, u2 * cos + u1 * sin], -1).to(u.dtype)


def add_low_rank(
    x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float
) -> Tensor:
    """Return y + scale B A dropout(x), (..., m).

    x (..., n) is the input of a projection, y (..., m) its output, A is (rank, n), and B (m, rank).
    One call multiplies and adds, which saves memory and rounds only once.
    """
    inner = F.linear(F.dropout(x, dropout), A.to(x.dtype)).flatten(0, -2)
    return torch.addmm(y.flatten(0, -2), inner, B.to(x.dtype).T, alpha=scale).view_as(y)


class Block(nn.Module):
    """One layer: attention over all positions, then a gated MLP. A norm precedes each of them."""

    def __init__(self, config: dict):
        super().__init__()
        self.heads = config["n_heads"]
        self.attn_norm = RMSNorm(config["d_model"], config["rms_norm_eps"])
        self.ff_norm = RMSNorm(config["d_model"], config["rms_norm_eps"])
        for name in PROJECTIONS:
            inputs, outputs = projection_shape(config, name)
            self.add_module(name, nn.Linear(inputs, outputs, bias=False))

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None, lora: dict[str, tuple]
    ) -> Tensor:
        """Return the hidden states after this layer, (B, T, d).

        x         (B, T, d) hidden states before this layer
        cos, sin  from `rotary_angles`
        visible   (B, 1, 1, T) bool: the keys that may be attended to; None: all
        lora      for each adapted projection the arguments of `add_low_rank`, see `LoRA.block`
        """
        u = self.attn_norm(x)
        q = rotate(self.split(self.project("q_proj", u, lora)), cos, sin)
        k = rotate(self.split(self.project("k_proj", u, lora)), cos, sin)
        v = self.split(self.project("v_proj", u, lora))
        u = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + self.project("attn_out", u.transpose(1, 2).flatten(2), lora)
        u = self.ff_norm(x)
        gated = F.silu(self.project("ff_proj", u, lora)) * self.project("up_proj", u, lora)
        return x + self.project("ff_out", gated, lora)

    def project(self, name: str, u: Tensor, lora: dict[str, tuple]) -> Tensor:
        """Return the output of a projection for the input u, with its adapter if it has one."""
        y = getattr(self, name)(u)
        return add_low_rank(u, y, *lora[name]) if name in lora else y

    def split(self, u: Tensor) -> Tensor:
        """Return u (B, T, heads k) as (B, heads, T, k), where k is the width of a head."""
        return u.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class LLaDA(nn.Module):
    """The masked diffusion transformer.

    config     the checkpoint's config.json
    adapters   the `LoRA` of each name; use(name) switches one on, and use(None) switches it off
    recompute  whether the backward pass recomputes each layer instead of keeping its activations
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.recompute = False
        self.active: str | None = None
        d, V = config["d_model"], config["vocab_size"]
        layers = {
            "wte": nn.Embedding(V, d),
            "blocks": nn.ModuleList(Block(config) for _ in range(config["n_layers"])),
            "ln_f": RMSNorm(d, config["rms_norm_eps"]),
            "ff_out": nn.Linear(d, V, bias=False),
        }
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(layers)})
        self.adapters = nn.ModuleDict()

    def use(self, adapter: str | None) -> "LLaDA":
        """Switch to an adapter, or to the base model without any (None), and return the model."""
        known = adapter is None or adapter in self.adapters
        check(known, f"the model has no adapter {adapter!r}, only {[*self.adapters]}")
        self.active = adapter
        return self

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        where: Tensor | None = None,
        hidden: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits (B, T, V), or (M, V) at the M positions of `where`, in row-major order.

        ids             (B, T) int64 tokens
        attention_mask  (B, T) bool or 0/1: False where there is padding; None: no padding
        where           (B, T) bool: the only positions at which the head is computed
        hidden          also return the head's input, (..., d)
        """
        net = self.model["transformer"]
        adapter = self.adapters[self.active] if self.active else None
        visible = None if attention_mask is None else attention_mask.bool()[:, None, None]
        half = self.config["d_model"] // self.config["n_heads"] // 2
        cos, sin = rotary_angles(ids.shape[1], half, self.config["rope_theta"], ids.device)
        x = net["wte"](ids)
        for i, block in enumerate(net["blocks"]):
            inputs = (x, cos, sin, visible, adapter.block(i) if adapter is not None else {})
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
        x = net["ln_f"](x if where is None else x[where])
        return (net["ff_out"](x), x) if hidden else net["ff_out"](x)

    @classmethod
    def from_pretrained(
        cls, source: Path | str, device: Device = "cpu", dtype: torch.dtype = torch.float32
    ) -> "LLaDA":
        """Return the model of a folder or hub id, frozen, in eval mode, in `dtype` on `device`.

        The model is built on the meta device, which takes no memory, and then receives one tensor
        after the other from the files that the checkpoint's index names. Raises ValueError if a
        file is missing or damaged, or if the tensors are not those of LLaDA with this config.json.
        """
        folder = locate(source)
        with explained(f"{folder} is not a LLaDA checkpoint; use another --model", KeyError):
            with torch.device("meta"):
                model = cls(read_json(folder / "config.json"))
        tensors = {}
        for file, names in shards(folder).items():
            for name, t in read_tensors(folder / file, names):
                tensors[name] = t.to(device, dtype)
        unfit = f"{folder} does not hold the tensors of its config.json; download it again"
        with explained(unfit, RuntimeError):
            model.load_state_dict(tensors, strict=True, assign=True)
        return model.requires_grad_(False).eval()

    def save_pretrained(self, folder: Path, files: int = 2) -> None:
        """Write the model without its adapters: `files` files of tensors, an index, config.json."""
        tensors = {k: t for k, t in self.state_dict().items() if not k.startswith("adapters")}
        file_of = {}
        for i, name in enumerate(tensors):
            number = i * files // len(tensors) + 1
            file_of[name] = f"model-{number:05}-of-{files:05}.safetensors"
        for file in sorted(set(file_of.values())):
            content = {name: tensors[name] for name in tensors if file_of[name] == file}
            write_file(folder / file, content)
        size = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": file_of}
        write_file(folder / "model.safetensors.index.json", index)
        # This file comes last, so that a folder that holds it is complete.
        write_file(folder / "config.json", self.config)


# ---- 2. Where a checkpoint lies -----------------------------------------------------------------
def locate(source: str | Path) -> Path:
    """Return the folder of a checkpoint; a hub id (OWNER/NAME) is downloaded on first use."""
    if source and Path(source).is_dir():
        return Path(source)
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source))
    advice = "pass --model FOLDER or OWNER/NAME"
    check(hub_id is not None, f"--model {str(source)!r} is neither a folder nor a hub id; {advice}")
    from huggingface_hub import snapshot_download  # not needed for a local folder

    advice = "check the name and the network, or pass --model FOLDER of a downloaded copy"
    with explained(f"{source} cannot be downloaded: {advice}"):
        wanted = ["*.json", "*.safetensors", "*.py", "*.txt", "*.jinja"]
        return Path(snapshot_download(str(source), allow_patterns=wanted))


def shards(folder: Path) -> dict[str, list[str] | None]:
    """Return the names of the tensors in each file of a checkpoint, as its index says.

    A checkpoint of one file has no index; None stands for all of its tensors.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() and not index.exists():
        return {"model.safetensors": None}
    unusable = f"{index} has no usable weight_map; download it again"
    with explained(unusable, KeyError, AttributeError):
        names: dict[str, list[str]] = {}
        for name, file in read_json(index)["weight_map"].items():
            names.setdefault(file, []).append(name)
    return dict(sorted(names.items()))
