"""The tests of the model share a tiny checkpoint and adapters made from seeds, comparisons,
and second derivations of the forward pass and of the sampler."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Generator

from llada.lora import LoRA
from llada.model import CONFIG_8B, PROJECTIONS, LLaDA

# The published config.json at the size of a test, with a key that the forward pass does not need.
CONFIG = CONFIG_8B | {
    "d_model": 64,
    "n_layers": 2,
    "n_heads": 4,
    "mlp_hidden_size": 128,
    "vocab_size": 512,
    "mask_token_id": 500,
    "eos_token_id": 480,
    "pad_token_id": 480,
    "max_sequence_length": 256,
}
GAIN = "model.transformer.ln_f.weight"
HEAD = "model.transformer.ff_out.weight"
FILES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"
MASK = CONFIG["mask_token_id"]
EOS = CONFIG["eos_token_id"]  # this is also the padding
PADS = [0, 5, 11]


# ---- tokens --------------------------------------------------------------------------------------
def random_ids(length, seed):
    """Return three rows of tokens below the special ones, (3, length)."""
    return torch.randint(EOS, (3, length), generator=Generator().manual_seed(seed))


def padded(ids):
    """Return the rows with 0, 5 and 11 pads on the left, cut to their length, and their mask."""
    visible = torch.arange(ids.shape[1]) >= torch.tensor(PADS)[:, None]
    rows = [row.roll(n) for row, n in zip(ids, PADS, strict=True)]
    return torch.stack(rows).where(visible, EOS), visible


HALF = torch.rand(3, 48, generator=Generator().manual_seed(1)) < 0.5
IDS = random_ids(48, seed=1).where(HALF, MASK)
WHERE = torch.rand(3, 48, generator=Generator().manual_seed(0)) < 0.3


# ---- a tiny checkpoint and its adapters ----------------------------------------------------------
def make_tensors(config=CONFIG, seed=0):
    """Return normal weights, gains away from 1, and a head whose logits differ clearly."""
    g = Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LLaDA(config).named_parameters()}
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=g)
        tensors[name] = 1 + 0.25 * noise if len(shape) == 1 else noise * shape[1] ** -0.5
    tensors[HEAD] *= 3
    return tensors


def write_base(folder, tensors=None, config=CONFIG):
    """Write a checkpoint in two files, which share the last layer, and return its folder."""
    tensors = make_tensors() if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    names = [*tensors]
    file_of = {}
    for file, part in zip(FILES, (names[:11], names[11:]), strict=True):
        save_file({name: tensors[name] for name in part}, folder / file)
        file_of |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weight_map(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"]


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(file, changes):
    """Replace or add tensors of a file; None removes one."""
    tensors = load_file(file) | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, file)


def make_lora(projections=tuple(PROJECTIONS), seed=0, dropout=0.0):
    """Return an adapter of rank 4 and alpha 6 whose B is not zero."""
    lora = LoRA(CONFIG, [*projections], 4, 6.0, dropout, seed)
    g = Generator().manual_seed(100 + seed)
    for B in lora.B.values():
        B.data.normal_(std=0.02, generator=g)
    return lora


def with_lora(folder, lora):
    model = LLaDA.from_pretrained(folder)
    model.adapters["own"] = lora
    return model.use("own")


# ---- comparisons ---------------------------------------------------------------------------------
def close(actual, expected, atol=5e-5):
    torch.testing.assert_close(actual.double(), expected.double(), atol=atol, rtol=0)


def same(a, b):
    """Return whether names, dtypes and values are equal, bit for bit."""
    equal = a.keys() == b.keys()
    return equal and all(t.dtype == b[k].dtype and torch.equal(t, b[k]) for k, t in a.items())


def refused(message, call, *given, **named):
    """Assert that the call raises a ValueError of one line that matches the message."""
    with pytest.raises(ValueError, match=message) as error:
        call(*given, **named)
    assert "\n" not in str(error.value)


# ---- second derivations --------------------------------------------------------------------------
def by_hand(config, tensors, ids, visible=None):
    """Return logits (B, T, V) and what enters each block and the head, (layers + 1, B, T, d).

    Everything is float64. Attention is a sum over keys, and a position is a complex rotation.
    """
    w = {}
    for name, t in tensors.items():
        w[name.removeprefix("model.transformer.").removesuffix(".weight")] = t.double()
    heads = config["n_heads"]
    half = config["d_model"] // heads // 2
    visible = torch.ones_like(ids) if visible is None else visible
    frequency = config["rope_theta"] ** (-torch.arange(half).double() / half)
    angle = torch.arange(ids.shape[1]).double()[:, None, None] * frequency  # (T, 1, half)

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
        score = torch.einsum("bqhd,bkhd->bhqk", q, k) / (2 * half) ** 0.5
        weight = score.exp() * visible[:, None, None]
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
    """Fill, in place, the `count` masks of a row that are most confident of their best token.

    Return the smallest difference, of logits or of log confidences, by which a choice was made.
    """
    candidates = []
    gaps = []
    for t in places:
        if row[t] == MASK:
            best, second = logits[t].topk(2).values.tolist()
            gaps.append(best - second)
            confidence = float(logits[t].log_softmax(-1).max())
            candidates.append((confidence, t, int(logits[t].argmax())))
    candidates.sort(reverse=True)
    if count < len(candidates):
        gaps.append(candidates[count - 1][0] - candidates[count][0])
    for _, t, token in candidates[:count]:
        row[t] = token
    return min(gaps)


def sample_by_hand(tensors, prompt, visible, steps, length=32, block=8):
    """Return prompt and completion before each step and at the end, (states, B, T).

    This is low-confidence remasking at temperature 0. A block's 8 tokens are spread over its steps,
    of which the first take one token more: 2, 2, 2, 2 or 3, 3, 2.
    """
    visible = torch.cat([visible, torch.ones(len(prompt), length, dtype=torch.bool)], 1)
    state = torch.cat([prompt, torch.full((len(prompt), length), MASK)], 1)
    states = [state]
    gaps = []
    in_block = steps * block // length
    for start in range(prompt.shape[1], state.shape[1], block):
        for step in range(in_block):
            logits, _ = by_hand(CONFIG, tensors, state, visible)
            state = state.clone()
            count = block // in_block + (step < block % in_block)
            for row, row_logits in zip(state, logits, strict=True):
                gaps.append(commit(row, row_logits, range(start, start + block), count))
            states.append(state)
    assert min(gaps) > 1e-4, "a choice is so close that rounding may decide it; take another seed"
    return torch.stack(states)
