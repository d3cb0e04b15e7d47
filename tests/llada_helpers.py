"""What the tests of LLaDA share: a tiny checkpoint and adapters made from seeds, comparisons."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Generator

from figures.toy_llada import init_weights
from llada_finetune import LLaDA, LoRA

# The published config.json, at the size of a test.
CONFIG = json.loads("""{"model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": 64,
    "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 128, "mlp_ratio": 4,
    "vocab_size": 512, "embedding_size": 512, "mask_token_id": 500, "eos_token_id": 480,
    "pad_token_id": 480, "rope": true, "rope_theta": 500000.0, "rope_full_precision": true,
    "layer_norm_type": "rms", "rms_norm_eps": 1e-05, "layer_norm_with_affine": true,
    "activation_type": "silu", "block_type": "llama", "include_bias": false, "alibi": false,
    "include_qkv_bias": false, "bias_for_layer_norm": false, "weight_tying": false,
    "attention_layer_norm": false, "input_emb_norm": false, "scale_logits": false,
    "attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0,
    "flash_attention": false, "block_group_size": 1, "multi_query_attention": null,
    "max_sequence_length": 256, "init_fn": "mitchell", "init_std": 0.02, "init_device": "meta",
    "init_cutoff_factor": null, "precision": "amp_bf16", "use_cache": false}""")
# The adapter_config.json of peft 0.21.2: these values, and options that are null.
PEFT = json.loads("""{"peft_type": "LORA", "task_type": "CAUSAL_LM", "peft_version": "0.21.2",
    "base_model_name_or_path": "", "r": 4, "lora_alpha": 6, "lora_dropout": 0.0, "bias": "none",
    "target_modules": ["q_proj"], "init_lora_weights": true, "inference_mode": true,
    "fan_in_fan_out": false, "use_rslora": false, "use_dora": false, "use_qalora": false,
    "qalora_group_size": 16, "lora_bias": false, "ensure_weight_tying": false, "rank_pattern": {},
    "alpha_pattern": {}, "loftq_config": {}, "megatron_core": "megatron.core"}""")
PEFT |= dict.fromkeys(
    """auto_mapping revision exclude_modules modules_to_save layers_to_transform
    layers_pattern layer_replication megatron_config trainable_token_indices target_parameters
    alora_invocation_tokens use_bdlora eva_config corda_config lora_ga_config velora_config
    monteclora_config arrow_config kasa_config""".split()
)
MAPS = ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"]
HEAD = "model.transformer.ff_out.weight"
FILES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"
MASK = CONFIG["mask_token_id"]
EOS = CONFIG["eos_token_id"]  # and pad
PADS = [0, 5, 11]


def random_ids(length: int, seed: int):
    return torch.randint(EOS, (3, length), generator=Generator().manual_seed(seed))


def padded(ids):
    """The rows with 0, 5 and 11 pads on the left, cut to their length; and where no pad is."""
    seen = torch.arange(ids.shape[1]) >= torch.tensor(PADS)[:, None]
    rows = [row.roll(n) for row, n in zip(ids, PADS, strict=True)]
    return torch.stack(rows).where(seen, EOS), seen


HALF = torch.rand(3, 48, generator=Generator().manual_seed(1)) < 0.5
IDS = random_ids(48, seed=1).where(HALF, MASK)


def make_tensors(config: dict = CONFIG, seed: int = 0) -> dict:
    """LLaDA's own initial weights; gains away from 1, and a head that decides clearly."""
    g = Generator().manual_seed(seed)
    tensors = init_weights(LLaDA(config), g).state_dict()
    for t in tensors.values():
        if t.dim() == 1:
            t += 0.25 * torch.randn(t.shape, generator=g)
    tensors[HEAD] *= 3
    return tensors


def write(folder: Path, tensors: dict, config: dict = CONFIG, cut: int = 11) -> Path:
    """Two shards, the first with `cut` tensors; at 11 the last layer straddles both."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    weight_map = {}
    for file, part in zip(FILES, (names[:cut], names[cut:]), strict=True):
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_lora(maps=MAPS, seed: int = 0, dropout: float = 0.0) -> LoRA:
    """Rank 4, alpha 6, with a B that is not zero."""
    lora = LoRA(CONFIG, list(maps), 4, 6.0, dropout, seed)
    g = Generator().manual_seed(100 + seed)
    for b in lora.B.values():
        b.data.normal_(std=0.02, generator=g)
    return lora


def with_lora(folder: Path, lora: LoRA) -> LLaDA:
    model = LLaDA.from_pretrained(folder)
    model.adapters["own"] = lora
    return model.use("own")


def close(actual, expected, atol: float = 5e-5) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=atol, rtol=0)


def same(a: dict, b: dict) -> bool:
    """Equal bit for bit, in values, names and dtypes."""
    if a.keys() != b.keys():
        return False
    return all(t.dtype == b[name].dtype and torch.equal(t, b[name]) for name, t in a.items())


def refused(message: str, call, *given) -> None:
    """A ValueError of one line."""
    with pytest.raises(ValueError, match=message) as error:
        call(*given)
    assert "\n" not in str(error.value)


# ---- second derivations --------------------------------------------------------------------------
def by_hand(config: dict, tensors: dict, ids, seen=None, kept=None, span=slice(None)):
    """Logits (B, T, V), and (layers + 1, B, T, d): what enters each block, and the head.
    Attention as sums over keys, positions as complex rotations. kept: keys and values of all
    positions by layer, renewed in `span`, of which alone are the results."""
    w = {}
    for name, t in tensors.items():
        w[name.removeprefix("model.transformer.").removesuffix(".weight")] = t.double()
    heads = config["n_heads"]
    half = config["d_model"] // heads // 2
    seen = torch.ones_like(ids) if seen is None else seen
    frequency = config["rope_theta"] ** (-torch.arange(half).double() / half)
    angle = torch.arange(ids.shape[1]).double()[span, None, None] * frequency  # (T, 1, half)
    ids = ids[:, span]

    def norm(x, gain):
        mean_square = x.pow(2).mean(-1, keepdim=True)
        return x / (mean_square + config["rms_norm_eps"]).sqrt() * w[gain]

    def split(x, name):
        return (x @ w[name].T).view(*ids.shape, heads, 2 * half)

    def turned(u):
        z = torch.complex(u[..., :half], u[..., half:]) * torch.exp(1j * angle)
        return torch.cat([z.real, z.imag], -1)

    x = w["wte"][ids]
    stream = []
    for i in range(config["n_layers"]):
        stream.append(x)
        b = f"blocks.{i}."
        u = norm(x, b + "attn_norm")
        q = turned(split(u, b + "q_proj"))
        k = turned(split(u, b + "k_proj"))
        v = split(u, b + "v_proj")
        if kept is not None:
            for old, new in zip(kept.setdefault(i, (k, v)), (k, v), strict=True):
                old[:, span] = new
            k, v = kept[i]
        score = torch.einsum("bqhd,bkhd->bhqk", q, k) / (2 * half) ** 0.5
        weight = score.exp() * seen[:, None, None]
        share = weight / weight.sum(-1, keepdim=True)
        u = torch.einsum("bhqk,bkhd->bqhd", share, v)
        x = x + u.reshape(x.shape) @ w[b + "attn_out"].T
        u = norm(x, b + "ff_norm")
        gate = u @ w[b + "ff_proj"].T
        swish = gate / (1 + torch.exp(-gate))
        x = x + (swish * (u @ w[b + "up_proj"].T)) @ w[b + "ff_out"].T
    x = norm(x, "ln_f")
    return x @ w["ff_out"].T, torch.stack([*stream, x])


def commit(row, logits, places, count):
    """Fills the `count` masks that are most confident of their best token, in place. The smallest
    difference, of logits or of log confidences, by which a choice was made."""
    found = []
    gaps = []
    for t in places:
        if row[t] == MASK:
            best, second = logits[t].topk(2).values.tolist()
            gaps.append(best - second)
            found.append((float(logits[t].log_softmax(-1).max()), t, int(logits[t].argmax())))
    found.sort(reverse=True)
    if count < len(found):
        gaps.append(found[count - 1][0] - found[count][0])
    for _, t, token in found[:count]:
        row[t] = token
    return min(gaps)


def sample_by_hand(tensors, prompt, seen, steps, length=32, block=8, cache="off"):
    """The canvas before each step, and the last; temperature 0, by confidence. A block's 8 tokens
    are spread over its steps, the first steps taking one more: 2, 2, 2, 2 or 3, 3, 2. With a cache
    a block's later steps renew keys and values from its begin on (prefix) or its own (dual)."""
    seen = torch.cat([seen, torch.ones(len(prompt), length, dtype=torch.bool)], 1)
    canvas = torch.cat([prompt, torch.full((len(prompt), length), MASK)], 1)
    canvases = [canvas]
    gaps = []
    in_block = steps * block // length
    for start in range(prompt.shape[1], canvas.shape[1], block):
        spans = {"off": slice(None), "prefix": slice(start, None)}
        later = spans.get(cache, slice(start, start + block))
        kept = {}
        for step in range(in_block):
            span = later if step else slice(None)
            logits = torch.zeros(*canvas.shape, CONFIG["vocab_size"]).double()
            logits[:, span], _ = by_hand(CONFIG, tensors, canvas, seen, kept, span)
            canvas = canvas.clone()
            count = block // in_block + (step < block % in_block)
            for row, row_logits in zip(canvas, logits, strict=True):
                gaps.append(commit(row, row_logits, range(start, start + block), count))
            canvases.append(canvas)
    assert min(gaps) > 1e-4, "a choice so close that rounding may decide it"
    return torch.stack(canvases)
