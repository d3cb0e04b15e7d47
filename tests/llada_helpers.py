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
