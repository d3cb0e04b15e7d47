"""What a LLaDA's config.json may say, and the memory that tuning such a model takes."""

import json

from dtm import check

# ---- 1. The shape -------------------------------------------------------------------------------
# The published config.json, as far as the forward pass depends on it.
SIZES = json.loads("""{"d_model": 4096, "n_layers": 32, "n_heads": 32, "mlp_hidden_size": 12288,
    "vocab_size": 126464, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "mask_token_id": 126336,
    "eos_token_id": 126081, "pad_token_id": 126081}""")
FIXED = json.loads("""{"model_type": "llada", "block_type": "llama", "activation_type": "silu",
    "layer_norm_type": "rms", "rope": true, "include_bias": false, "bias_for_layer_norm": false,
    "weight_tying": false, "attention_dropout": 0.0, "residual_dropout": 0.0,
    "embedding_dropout": 0.0}""")
MAY_BE_MISSING = json.loads("""{"architectures": ["LLaDAModelLM"], "alibi": false,
    "attention_layer_norm": false, "input_emb_norm": false, "scale_logits": false,
    "include_qkv_bias": false, "block_group_size": 1, "layer_norm_with_affine": true,
    "multi_query_attention": null, "rope_scaling": null, "quantization_config": null}""")
CONFIG_8B = SIZES | FIXED | MAY_BE_MISSING
# A block's linear maps: outputs and inputs, d or m(lp_hidden_size). Llama calls ff_proj gate and
# ff_out down; the head is called ff_out, too.
MAPS = {"q_proj": "dd", "k_proj": "dd", "v_proj": "dd", "attn_out": "dd"}
MAPS |= {"ff_proj": "md", "up_proj": "md", "ff_out": "dm"}
ADAPTED = {"all": [*MAPS], "paper": ["q_proj", "k_proj", "v_proj", "up_proj"]}


def map_shape(config: dict, name: str) -> tuple[int, int]:
    width = {"d": config["d_model"], "m": config["mlp_hidden_size"]}
    outputs, inputs = MAPS[name]
    return width[outputs], width[inputs]


def check_model_config(config: dict) -> dict:
    """Refuses what this model does not compute (LLaDA-MoE, too, calls itself llada)."""
    given = {"n_kv_heads": config.get("n_heads"), "embedding_size": config.get("vocab_size")}
    for key, value in (FIXED | MAY_BE_MISSING | given).items():
        got = config.get(key, None if key in FIXED else value)
        same = got == value or (got is None and key in given)
        only = f"only {value!r} is supported (LLaDA-8B, LLaDA-1.5)"
        check(same, f"config.json: {key} is {got!r}, {only}")
    for key, value in SIZES.items():
        got, kind = config.get(key), type(value)
        number = type(got) is int or (type(got) is float and kind is float)
        good = number and (0 <= got < config["vocab_size"] if key.endswith("_id") else got > 0)
        check(good, f"config.json: {key} is {got!r}, no {kind.__name__} in its range")
    even = config["d_model"] % (2 * config["n_heads"]) == 0
    check(even, "config.json: d_model must be an even multiple of n_heads")
    return config


# ---- 2. Memory ----------------------------------------------------------------------------------
# Of the settings cfg (`llada_finetune.Config`) of a run on a model of this config.json.
def body_parameters(config: dict) -> int:
    """Those of the blocks' maps."""
    d, mlp = config["d_model"], config["mlp_hidden_size"]
    return config["n_layers"] * (4 * d * d + 3 * d * mlp)


def count_parameters(cfg, config: dict) -> tuple[int, int]:
    """Those of the whole model, and those of the adapter."""
    d, n, V = config["d_model"], config["n_layers"], config["vocab_size"]
    total = body_parameters(config) + 2 * V * d + (2 * n + 1) * d
    widths = [sum(map_shape(config, name)) for name in ADAPTED[cfg.lora]]
    return total, n * cfg.rank * sum(widths)


def count_memory(cfg, config: dict, batch: int, recompute: bool, size: int = 2) -> dict[str, float]:
    """GB on a device in a forward pass of `batch` answers, in numbers of `size` bytes, to which the
    student is copied. What passes through while a block runs counts as much as what it keeps."""
    d, n, V = config["d_model"], config["n_layers"], config["vocab_size"]
    total, trainable = count_parameters(cfg, config)
    tokens = batch * (cfg.prompt_length + cfg.gen_length)
    block = tokens * kept_a_token(cfg, config, size)
    kept = block + tokens * size * d * n if recompute else block * n
    return {
        "base": size * total / 1e9,
        "student, gradient, AdamW": (16 + (size if size < 4 else 0)) * trainable / 1e9,
        "teacher": size * trainable / 1e9,
        "average": (4 * trainable if cfg.ema else 0) / 1e9,
        "activations": (kept + block) / 1e9,
        "logits": batch * (cfg.block + 1) / 2 * V * 24 / 1e9,
    }


def kept_a_token(cfg, config: dict, size: int, mask_size: int = 1) -> int:
    """Bytes that autograd keeps of a token in a block: norms their input in float32; attention q,
    k, v and its result; the MLP its gate before and after silu, and the other factor; an adapted
    map its input, what A makes of it, and the mask of its dropout, in numbers of `mask_size` bytes
    (on a CPU: `size`); a norm and a head one number each in float32."""
    d, mlp = config["d_model"], config["mlp_hidden_size"]
    inputs = sum(map_shape(config, name)[1] for name in ADAPTED[cfg.lora])
    dropped = mask_size * inputs if cfg.dropout else 0
    inner = cfg.rank * len(ADAPTED[cfg.lora])
    numbers = 4 * d + 3 * mlp + inputs + inner
    return 2 * 4 * d + size * numbers + dropped + 4 * (2 + config["n_heads"])


SAFE = 0.85  # share of a device's memory that a run may count on; nothing of this ran on a GPU yet


def choose_pass(cfg, config: dict, gb: float, size: int = 2) -> tuple[int, bool]:
    """Answers in a forward pass, at most cfg.batch, and whether its activations are recomputed:
    not at all if a device of `gb` GB can hold them, as recomputation is a fourth of the work."""
    if cfg.checkpointing != "auto":
        return cfg.batch, cfg.checkpointing == "on"
    for recompute in (False, True):
        for batch in range(cfg.batch, 0, -1):
            if sum(count_memory(cfg, config, batch, recompute, size).values()) <= SAFE * gb:
                return batch, recompute
    return 1, True
