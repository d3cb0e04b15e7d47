"""Checkpoints and adapters on disk: round trips, peft's format, a sentence for what is damaged."""

import json
import math
import re

import llada_helpers as tiny
import pytest
import torch
from llada_helpers import close, refused, same
from safetensors.torch import load_file, save_file

import llada_finetune as llada
from figures import files
from figures.files import fingerprint
from llada_finetune import LLaDA, LoRA, base_of, merge

INDEX = tiny.INDEX
FIRST, SECOND = tiny.FILES
GAIN = "model.transformer.ln_f.weight"
QUERY = "model.transformer.blocks.1.q_proj.weight"  # in the second shard
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    return tiny.write(tmp_path / "base", tiny.make_tensors())


@pytest.fixture
def adapter(tmp_path):
    """A folder as peft writes it; it names no base."""
    tiny.make_lora().save(tmp_path / "adapter", "")
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(tiny.PEFT))
    return tmp_path / "adapter"


def read(file):
    return json.loads(file.read_text())


def change_json(file, **changes):
    file.write_text(json.dumps(read(file) | changes))


def change_tensors(file, changes):
    """Replaces tensors; None takes one out."""
    tensors = load_file(file) | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, file)


# ---- round trips ---------------------------------------------------------------------------------
def test_every_tensor_is_loaded_bit_for_bit_and_frozen(folder):
    weight_map = read(folder / INDEX)["weight_map"]
    assert {file for name, file in weight_map.items() if ".blocks.1." in name} == {FIRST, SECOND}
    model = LLaDA.from_pretrained(folder)
    assert same(model.state_dict(), tiny.make_tensors()) and model.config == tiny.CONFIG
    assert not any(p.requires_grad for p in model.parameters())


def test_a_checkpoint_is_saved_without_adapters(folder, tmp_path):
    tiny.with_lora(folder, tiny.make_lora()).save_pretrained(tmp_path / "copy", shards=3)
    shards = {f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)}
    assert {path.name for path in (tmp_path / "copy").iterdir()} == shards | {INDEX, "config.json"}
    index = read(tmp_path / "copy" / INDEX)
    assert index["metadata"]["total_size"] == 591104
    assert index["weight_map"].keys() == tiny.make_tensors().keys()
    again = LLaDA.from_pretrained(tmp_path / "copy")
    assert same(again.state_dict(), tiny.make_tensors()) and again.config == tiny.CONFIG


def test_one_file_without_an_index(tmp_path):
    tensors = {name: t.bfloat16() for name, t in tiny.make_tensors().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(tiny.CONFIG))
    model = LLaDA.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert same(model.state_dict(), tensors)


# ---- another kind of model -----------------------------------------------------------------------
@pytest.mark.parametrize(
    "key, values",
    [
        pytest.param("model_type", ["other"], id="type"),
        pytest.param("architectures", [["LLaDAMoEModelLM"]], id="mixture of experts"),
        pytest.param("alibi", [True], id="alibi"),
        pytest.param("n_kv_heads", [2], id="grouped heads"),
        pytest.param("weight_tying", [True], id="tied head"),
        pytest.param("include_bias", [True], id="bias"),
        pytest.param("block_type", [None], id="block"),
        pytest.param("embedding_size", [640], id="embedding"),
        pytest.param("d_model", [None, 0], id="width"),
        pytest.param("n_layers", [2.5, True], id="layers"),
        pytest.param("mlp_hidden_size", ["128"], id="a text"),
        pytest.param("rope_theta", [-1.0], id="angles"),
        pytest.param("rope_scaling", [{"type": "linear", "factor": 2.0}], id="scaled angles"),
        pytest.param("quantization_config", [{"load_in_4bit": True}], id="quantised"),
        pytest.param("mask_token_id", [512, -1], id="mask beyond the vocabulary"),
    ],
)
def test_another_kind_of_model_is_refused(folder, key, values):
    for value in values:
        change_json(folder / "config.json", **{key: value})
        refused(f"config.json: {key} is {re.escape(repr(value))}", LLaDA.from_pretrained, folder)


def test_heads_must_divide_the_width(folder):
    change_json(folder / "config.json", n_heads=5, n_kv_heads=5)
    refused("config.json: d_model must be", LLaDA.from_pretrained, folder)


# ---- a broken checkpoint -------------------------------------------------------------------------
@pytest.mark.parametrize("file", ["config.json", INDEX, SECOND])
def test_a_missing_file_is_named(folder, file):
    (folder / file).unlink()
    refused(f"{file} is missing", LLaDA.from_pretrained, folder)


@pytest.mark.parametrize(
    "file, content, message",
    [
        pytest.param("config.json", '{"model_type": "llada", ', "is no JSON object", id="config"),
        pytest.param("config.json", "3", "is no JSON object", id="no object"),
        pytest.param(INDEX, "{}", "has no valid weight_map", id="index"),
        pytest.param(FIRST, "{}", "is missing or is torn", id="shard"),
    ],
)
def test_a_file_with_other_content_is_named(folder, file, content, message):
    (folder / file).write_text(content)
    refused(f"{file} {message}", LLaDA.from_pretrained, folder)


def test_a_torn_shard_is_named(folder):
    whole = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(whole[:-9])
    refused(f"{SECOND} is missing or is torn", LLaDA.from_pretrained, folder)


COUNT = torch.arange(4096.0).view(64, 64)
FP8 = COUNT.to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        pytest.param(tiny.HEAD, COUNT, r"ff_out.* is \(64, 64\).* \(512, 64\)", id="shape"),
        pytest.param(tiny.HEAD, None, f"{SECOND} lacks {tiny.HEAD}", id="not in its file"),
        pytest.param(QUERY, 0 / COUNT, f"{QUERY} has non-finite", id="one nan"),
        pytest.param(QUERY, -1 / COUNT, f"{QUERY} has non-finite", id="one inf"),
        pytest.param(QUERY, COUNT.to(torch.int8), f"{QUERY} is int8; .*unquantised", id="int8"),
        pytest.param(QUERY, FP8, f"{QUERY} is float8_e4m3fn; .*unquantised", id="fp8"),
    ],
)
def test_a_damaged_tensor_is_named(folder, name, tensor, message):
    change_tensors(folder / SECOND, {name: tensor})
    refused(message, LLaDA.from_pretrained, folder)


def test_a_tensor_too_many_or_too_few_is_named(folder):
    weight_map = read(folder / INDEX)["weight_map"]
    change_tensors(folder / SECOND, {"extra": torch.ones(2)})
    change_json(folder / INDEX, weight_map=weight_map | {"extra": SECOND})
    refused("1 tensors .*extra", LLaDA.from_pretrained, folder)
    weight_map.pop(GAIN)
    change_json(folder / INDEX, weight_map=weight_map)
    refused("1 tensors .*ln_f", LLaDA.from_pretrained, folder)


def test_a_hub_id_is_downloaded(folder, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        assert "*.py" in allow_patterns  # of transformers, for which `merge` copies it
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = LLaDA.from_pretrained("some-one/LLaDA_8B.x")
    assert same(model.state_dict(), tiny.make_tensors()) and asked == ["some-one/LLaDA_8B.x"]


def test_what_is_no_source_is_said(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    for source in (tmp_path / "none", "a/b/c", ""):
        refused("is no folder", LLaDA.from_pretrained, source)
    refused("cannot get some/one .*--model", LLaDA.from_pretrained, "some/one")


# ---- adapters in peft's format -------------------------------------------------------------------
@pytest.mark.parametrize("maps", [llada.ADAPTED["paper"], ["ff_out"], tiny.MAPS])
def test_an_adapters_files_follow_peft(folder, tmp_path, maps):
    """Names, shapes, settings; target_modules as peft reads a text; W + alpha / rank B A."""
    lora = tiny.make_lora(maps)
    lora.save(tmp_path, "some/base")
    saved = read(tmp_path / CONFIG)
    tensors = load_file(tmp_path / WEIGHTS)
    named = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6.0}
    assert saved.items() >= (named | {"base_model_name_or_path": "some/base"}).items()
    merged = LLaDA.from_pretrained(folder)
    adapted = set()
    for name, part in merged.named_modules():
        if re.fullmatch(saved["target_modules"], name):
            adapted.add(name)
            a = tensors.pop(f"base_model.model.{name}.lora_A.weight")
            b = tensors.pop(f"base_model.model.{name}.lora_B.weight")
            assert len(a) == b.shape[1] == 4
            part.weight += 6.0 / 4 * b @ a
    first = {f"model.transformer.blocks.0.{name}" for name in maps}
    assert adapted == first | {name.replace(".0.", ".1.") for name in first} and not tensors
    logits = tiny.with_lora(folder, lora)(tiny.IDS)
    close(logits, merged(tiny.IDS))
    assert (logits - LLaDA.from_pretrained(folder)(tiny.IDS)).abs().max() > 0.01


def test_an_adapter_comes_back_bit_for_bit(tmp_path):
    lora = tiny.make_lora(["v_proj", "ff_out"], dropout=0.25)
    lora.save(tmp_path, "some/base", "a fingerprint")
    again = LoRA.load(tmp_path, tiny.CONFIG)
    assert same(again.state_dict(), lora.state_dict()) and not again.training
    assert (again.rank, again.alpha, again.dropout) == (4, 6.0, 0.25)
    assert again.base == ("some/base", "a fingerprint")


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_pefts_own_adapters_are_loaded(adapter, init):
    change_json(adapter / CONFIG, init_lora_weights=init)
    lora = LoRA.load(adapter, tiny.CONFIG)
    assert same(lora.state_dict(), tiny.make_lora().state_dict())
    assert (lora.rank, lora.alpha, lora.dropout) == (4, 6, 0.0)


@pytest.mark.parametrize(
    "key, values",
    [
        pytest.param("init_lora_weights", ["pissa", "pissa_niter_4", "olora"], id="base changed"),
        pytest.param("init_lora_weights", ["eva", "loftq", "corda", None], id="initial weights"),
        pytest.param("alora_invocation_tokens", [[5, 7]], id="alora"),
        pytest.param("use_rslora", [True], id="rslora"),
        pytest.param("use_dora", [True], id="dora"),
        pytest.param("rank_pattern", [{"q_proj": 8}], id="ranks"),
        pytest.param("alpha_pattern", [{"q_proj": 8}], id="alphas"),
        pytest.param("modules_to_save", [["ff_out"]], id="whole modules"),
        pytest.param("fan_in_fan_out", [True], id="transposed"),
        pytest.param("bias", ["all", "lora_only", None], id="bias"),
        pytest.param("peft_type", ["LOHA", None], id="another kind of adapter"),
        pytest.param("a_later_option", [1, "on"], id="unknown key"),
        pytest.param("r", [4.0, "4", 0, True, None], id="rank"),
        pytest.param("lora_alpha", [None, 0, math.nan], id="alpha"),
        pytest.param("lora_dropout", [None, 1.0, "0"], id="dropout"),
    ],
)
def test_what_is_no_plain_lora_is_refused(adapter, key, values):
    for value in values:
        change_json(adapter / CONFIG, **{key: value})
        refused(f"{CONFIG}: {key} (=|is) {re.escape(repr(value))}", LoRA.load, adapter, tiny.CONFIG)


def test_settings_that_are_missing_are_named(adapter):
    for key in ("peft_type", "r", "lora_alpha"):
        rest = {name: value for name, value in tiny.PEFT.items() if name != key}
        (adapter / CONFIG).write_text(json.dumps(rest))
        refused(f"{CONFIG}.* {key}", LoRA.load, adapter, tiny.CONFIG)


def test_an_adapter_of_another_size_or_of_other_maps_does_not_fit(adapter):
    refused("does not fit", LoRA.load, adapter, tiny.CONFIG | {"n_layers": 3})
    refused("does not fit", LoRA.load, adapter, tiny.CONFIG | {"mlp_hidden_size": 96})
    head = "base_model.model.model.transformer.ff_out.lora_A.weight"
    change_tensors(adapter / WEIGHTS, {head: torch.ones(4, 64)})
    refused(f"{WEIGHTS} .*does not fit", LoRA.load, adapter, tiny.CONFIG)
    save_file({"lm_head.lora_A.weight": torch.ones(4, 64)}, adapter / WEIGHTS)
    refused(f"{WEIGHTS} adapts none of", LoRA.load, adapter, tiny.CONFIG)


def test_a_damaged_adapter_is_named(adapter):
    query = "base_model.model.model.transformer.blocks.1.q_proj.lora_B.weight"
    change_tensors(adapter / WEIGHTS, {query: (0 / COUNT)[:, :4].clone()})
    refused(f"{WEIGHTS} has non-finite", LoRA.load, adapter, tiny.CONFIG)
    for file in (WEIGHTS, CONFIG):
        whole = (adapter / file).read_bytes()
        (adapter / file).write_bytes(whole[: len(whole) // 2])
        refused(f"{file} is (missing or is torn|no JSON)", LoRA.load, adapter, tiny.CONFIG)
        (adapter / file).unlink()
        refused(f"{file} is missing", LoRA.load, adapter, tiny.CONFIG)


# ---- fingerprints and bases ----------------------------------------------------------------------
def test_a_fingerprint_is_of_the_numbers_however_they_are_stored(tmp_path):
    narrow = {name: t.bfloat16() for name, t in tiny.make_tensors().items()}
    wide = {name: t.float() for name, t in narrow.items()}
    backwards = {name: narrow[name] for name in reversed(narrow)}
    config = tiny.CONFIG | {"rope_theta": 500000, "dtype": "bfloat16"}
    expected = fingerprint(tiny.write(tmp_path / "a", narrow))
    assert fingerprint(tiny.write(tmp_path / "b", backwards, cut=5)) == expected
    assert fingerprint(tiny.write(tmp_path / "c", wide)) == expected
    assert fingerprint(tiny.write(tmp_path / "d", narrow, config)) == expected


def test_a_fingerprint_changes_with_any_number(tmp_path):
    original = tiny.make_tensors()
    key = QUERY.replace("q_proj", "k_proj")
    swapped = original | {QUERY: original[key], key: original[QUERY]}
    variants = [(original, {}), (swapped, {})]
    for name in (tiny.HEAD, GAIN, QUERY):
        tensors = tiny.make_tensors()
        tensors[name].view(-1)[-1] += 1e-3
        variants.append((tensors, {}))
    for change in ({"rope_theta": 1e4}, {"rms_norm_eps": 1e-6}, {"mask_token_id": 501}):
        variants.append((original, change))
    found = set()
    for i, (tensors, change) in enumerate(variants):
        found.add(fingerprint(tiny.write(tmp_path / str(i), tensors, tiny.CONFIG | change)))
    assert len(found) == len(variants)


@pytest.mark.parametrize("known", ["content", "name"])
def test_an_adapter_is_used_on_its_own_base_only(folder, tmp_path, known):
    """Known by a fingerprint or, as for peft's adapters, by the name of a folder alone."""
    adapter = tmp_path / "adapter"
    tiny.make_lora().save(adapter, str(folder), fingerprint(folder) if known == "content" else "")
    assert base_of(adapter, "") == base_of(adapter, str(folder)) == folder
    copy = tiny.write(tmp_path / "copy", tiny.make_tensors(), cut=3)
    assert base_of(adapter, str(copy)) == copy
    other = tiny.write(tmp_path / "other", tiny.make_tensors(seed=1))
    refused("does not belong to|is another model", base_of, adapter, str(other))


def test_a_base_that_has_changed_or_is_not_there(adapter, folder):
    tiny.make_lora().save(adapter, str(folder), "the fingerprint of another")
    refused("does not belong to", base_of, adapter, "")
    refused("does not belong to", merge, folder, adapter, folder.parent / "out")
    tiny.make_lora().save(adapter, "some/base")
    refused(f"was made on some/base, not on {folder}", base_of, adapter, str(folder))


@pytest.mark.parametrize("name", ["", None])
def test_an_adapter_that_names_no_base_needs_one(adapter, folder, name):
    change_json(adapter / CONFIG, base_model_name_or_path=name)
    refused("names no base model; add --model", base_of, adapter, "")
    assert base_of(adapter, str(folder)) == folder


# ---- merging -------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_adds_the_adapter_in_float32(folder, adapter, tmp_path, dtype):
    expected = {name: t.to(dtype) for name, t in tiny.make_tensors().items()}
    out = tmp_path / "out"
    tiny.write(folder, expected)
    (folder / "tokenizer.json").write_text("{}")
    merge(folder, adapter, out)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "out"}
    for file in (INDEX, "config.json", "tokenizer.json"):
        assert (out / file).read_bytes() == (folder / file).read_bytes()
    lora = tiny.make_lora().requires_grad_(False)
    for key, a in lora.A.items():
        name = f"model.transformer.blocks.{key.replace(':', '.')}.weight"
        expected[name] = (expected[name].float() + 6.0 / 4 * (lora.B[key] @ a)).to(dtype)
    merged = {}
    for file in (FIRST, SECOND):
        merged |= load_file(out / file)
        assert load_file(out / file).keys() == load_file(folder / file).keys()
    assert same(merged, expected)
    gap = LLaDA.from_pretrained(out)(tiny.IDS) - tiny.with_lora(folder, lora)(tiny.IDS)
    assert gap.abs().max() < 5e-5 if dtype == torch.float32 else gap.abs().mean() < 0.05
    refused("exists", merge, folder, adapter, out)


def test_a_merge_that_fails_leaves_nothing_that_looks_whole(folder, adapter, tmp_path, monkeypatch):
    written = []

    def write_one(path, content):
        written.append(path)
        if len(written) == 2:
            raise OSError("no space left on device")
        write(path, content)

    write = files.write
    monkeypatch.setattr(files, "write", write_one)
    with pytest.raises(OSError, match="no space"):
        merge(folder, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    refused(f"{SECOND} is missing", LLaDA.from_pretrained, written[0].parent)
    monkeypatch.undo()
    merge(folder, adapter, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "out"}


def test_merge_refuses_a_broken_base(folder, adapter, tmp_path):
    for damaged in (COUNT.to(torch.int8), 0 / COUNT, COUNT[:32].clone()):
        change_tensors(folder / SECOND, {QUERY: damaged})
        refused(QUERY, merge, folder, adapter, tmp_path / "out")
    weight_map = read(folder / INDEX)["weight_map"]
    weight_map.pop(QUERY)
    change_json(folder / INDEX, weight_map=weight_map)
    refused(QUERY, merge, folder, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
