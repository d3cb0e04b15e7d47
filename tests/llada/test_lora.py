"""Adapters: the sum that they add, what they learn, PEFT's folders, and merging."""

import json
import re

import llada_helpers as tiny
import pytest
import torch
import torch.nn.functional as F
from llada_helpers import CONFIG, FILES, IDS, INDEX, WHERE, close, make_lora, refused, same
from safetensors.torch import load_file, save_file
from torch import Generator

import llada.lora
from llada.checkpoint import write_file
from llada.lora import ADAPTED, LoRA, base_of, merge
from llada.model import PROJECTIONS, LLaDA, add_low_rank

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QUERY = "model.transformer.blocks.1.q_proj.weight"  # in the second file of the base
# The adapter_config.json of peft 0.21.2 without the options that have no counterpart here.
PEFT = json.loads("""{"peft_type": "LORA", "task_type": "CAUSAL_LM", "peft_version": "0.21.2",
    "base_model_name_or_path": "", "r": 4, "lora_alpha": 6, "lora_dropout": 0.0, "bias": "none",
    "target_modules": ["q_proj"], "init_lora_weights": true, "inference_mode": true,
    "fan_in_fan_out": false, "use_rslora": false, "use_dora": false, "rank_pattern": {},
    "alpha_pattern": {}, "modules_to_save": null, "layers_to_transform": null}""")


@pytest.fixture
def folder(tmp_path):
    return tiny.write_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path):
    """Write an adapter as PEFT does, which records no base model."""
    make_lora().save(tmp_path / "adapter", "")
    (tmp_path / "adapter" / SETTINGS).write_text(json.dumps(PEFT))
    return tmp_path / "adapter"


# ---- the sum -------------------------------------------------------------------------------------
def factors(dtype):
    """Return x (2, 7, 64), y (2, 7, 96), A and B of rank 8, and their float64 copies."""
    g = Generator().manual_seed(0)
    shapes = ((2, 7, 64), (2, 7, 96), (8, 64), (96, 8))
    tensors = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
    return tensors, [t.double() for t in tensors]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_add_low_rank_is_the_sum_written_out(dropout):
    (x, y, A, B), (x64, y64, A64, B64) = factors(torch.float32)
    torch.manual_seed(3)
    actual = add_low_rank(x, y, A, B, 1.5, dropout)
    torch.manual_seed(3)
    kept = F.dropout(torch.ones_like(x), dropout).double()  # 0 or 1 / (1 - dropout)
    assert (kept == 0).any() == (dropout > 0)
    close(actual, y64 + 1.5 * (kept * x64) @ A64.T @ B64.T, 1e-4)


def test_in_bfloat16_one_call_is_nearer_to_the_sum_than_two():
    (x, y, A, B), (x64, y64, A64, B64) = factors(torch.bfloat16)
    inner = F.linear(x, A)
    exact = y64 + 1.5 * inner.double() @ B64.T
    one = add_low_rank(x, y, A.float(), B.float(), 1.5, 0.0)
    two = y + 1.5 * F.linear(inner, B)
    one_error, two_error = ((t.double() - exact).square().mean().sqrt() for t in (one, two))
    assert one.dtype == torch.bfloat16
    assert one_error < two_error < 0.01 * exact.square().mean().sqrt()
    close(inner, x64 @ A64.T, 0.2)


# ---- adapters on a model -------------------------------------------------------------------------
def test_a_new_adapter_changes_nothing(folder):
    new = LoRA(CONFIG, [*PROJECTIONS], 4, 6.0)
    assert torch.equal(tiny.with_lora(folder, new)(IDS), LLaDA.from_pretrained(folder)(IDS))


def test_two_adapters_on_one_base(folder):
    model = LLaDA.from_pretrained(folder)
    student, teacher = make_lora(seed=1), make_lora(["q_proj"], seed=2)
    expected = {
        "student": tiny.with_lora(folder, student)(IDS),
        "teacher": tiny.with_lora(folder, teacher)(IDS),
        None: model(IDS),
    }
    model.adapters.update({"student": student, "teacher": teacher})
    for name in ("student", "teacher", None, "student"):
        assert torch.equal(model.use(name)(IDS), expected[name])
    for one, another in (("student", "teacher"), ("teacher", None), ("student", None)):
        assert not torch.equal(expected[one], expected[another])


def test_only_the_adapter_in_use_receives_gradients(folder):
    model = LLaDA.from_pretrained(folder)
    student, teacher = make_lora(seed=1), make_lora(["q_proj"], seed=2)
    model.adapters.update({"student": student, "teacher": teacher})
    model.use("student")(IDS).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())
    del model.adapters["student"]
    assert all(p.grad is None for p in model.parameters())


def test_a_float32_adapter_on_a_bfloat16_model(folder):
    model = LLaDA.from_pretrained(folder, dtype=torch.bfloat16)
    model.adapters["own"] = make_lora()
    logits = model.use("own")(IDS)
    gap = (logits - tiny.with_lora(folder, make_lora())(IDS)).abs()
    assert logits.dtype == torch.bfloat16 and gap.mean() < 0.05


def test_dropout_is_for_training_only(folder):
    plain = tiny.with_lora(folder, make_lora())
    dropping = tiny.with_lora(folder, make_lora(dropout=0.3))
    assert not torch.equal(dropping.train()(IDS), plain(IDS))
    assert torch.equal(dropping.eval()(IDS), plain(IDS))


def gradients(folder, *, where, recompute=False, dropout=0.0, seed=3):
    """Return an adapter's gradients in float64, and how often the first block was computed."""
    model = tiny.with_lora(folder, make_lora(dropout=dropout)).double().train()
    model.recompute = recompute
    calls = []
    first = model.model["transformer"]["blocks"][0]
    first.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(seed)
    logits = model(IDS, tiny.padded(IDS)[1], where)
    logits = logits[WHERE] if where is None else logits
    (logits.log_softmax(-1) * torch.linspace(-1, 2, 512).double()).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.adapters["own"].parameters()]), len(calls)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_and_chosen_positions_leave_the_gradients_as_they_are(folder, dropout):
    expected, calls = gradients(folder, where=None, dropout=dropout)
    scale = float(expected.abs().max())
    assert calls == 1
    for recompute in (False, True):
        actual, calls = gradients(folder, where=WHERE, recompute=recompute, dropout=dropout)
        assert calls == 1 + recompute
        close(actual, expected, 1e-10 * scale)
    other, _ = gradients(folder, where=WHERE, recompute=True, dropout=dropout, seed=4)
    assert torch.allclose(other, expected, atol=1e-4 * scale) == (dropout == 0)


@pytest.mark.parametrize("recompute", [False, True])
def test_without_a_chosen_position_every_gradient_is_zero(folder, recompute):
    """A rank with nothing to train still takes part in the exchange of gradients."""
    found, _ = gradients(folder, where=torch.zeros_like(WHERE), recompute=recompute)
    assert len(found) == sum(p.numel() for p in make_lora().parameters()) and not found.any()


def test_an_adapter_that_cannot_be_built_is_refused():
    refused("cannot adapt o_proj; a block has q_proj", LoRA, CONFIG, ["o_proj"], 4, 6.0)
    refused("at least one projection", LoRA, CONFIG, [], 4, 6.0)
    refused("rank 0", LoRA, CONFIG, ["q_proj"], 0, 6.0)
    refused("dropout 1.0", LoRA, CONFIG, ["q_proj"], 4, 6.0, 1.0)


# ---- PEFT's folders ------------------------------------------------------------------------------
@pytest.mark.parametrize("projections", [*ADAPTED.values(), ["ff_out"]])
def test_a_folder_is_what_peft_reads(folder, tmp_path, projections):
    """PEFT adapts the modules whose whole name target_modules matches: W + (alpha / r) B A."""
    lora = make_lora(projections)
    lora.save(tmp_path, "some/base")
    saved = json.loads((tmp_path / SETTINGS).read_text())
    known = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6.0}
    assert saved.items() >= (known | {"base_model_name_or_path": "some/base"}).items()
    tensors = load_file(tmp_path / WEIGHTS)
    merged, adapted = LLaDA.from_pretrained(folder), set()
    for name, module in merged.named_modules():
        if re.fullmatch(saved["target_modules"], name):
            adapted.add(name)
            A = tensors.pop(f"base_model.model.{name}.lora_A.weight")
            B = tensors.pop(f"base_model.model.{name}.lora_B.weight")
            assert len(A) == B.shape[1] == 4
            module.weight += 6.0 / 4 * B @ A
    expected = {f"model.transformer.blocks.{i}.{name}" for i in (0, 1) for name in projections}
    assert adapted == expected and not tensors
    logits = tiny.with_lora(folder, lora)(IDS)
    close(logits, merged(IDS))
    assert (logits - LLaDA.from_pretrained(folder)(IDS)).abs().max() > 0.01


def test_an_adapter_is_loaded_bit_for_bit_and_frozen(tmp_path):
    lora = make_lora(["v_proj", "ff_out"], dropout=0.25)
    lora.save(tmp_path, "some/base")
    again = LoRA.load(tmp_path, CONFIG)
    assert same(again.state_dict(), lora.state_dict())
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert (again.rank, again.alpha, again.dropout) == (4, 6.0, 0.25)


def test_an_adapter_that_peft_wrote_is_loaded(adapter):
    lora = LoRA.load(adapter, CONFIG)
    assert same(lora.state_dict(), make_lora().state_dict())
    assert (lora.rank, lora.alpha, lora.dropout) == (4, 6, 0.0)


def test_a_variant_that_computes_something_else_is_refused(adapter):
    variants = {"use_dora": True, "use_rslora": True}
    variants |= {"alpha_pattern": {"q_proj": 8}, "modules_to_save": ["ff_out"]}
    for key, value in variants.items():
        (adapter / SETTINGS).write_text(json.dumps(PEFT | {key: value}))
        refused(f"{SETTINGS}: {key} is {re.escape(repr(value))}", LoRA.load, adapter, CONFIG)


def test_an_adapter_of_another_size_or_of_other_layers_is_refused(adapter):
    message = "does not fit the base model at "
    refused(f"{message}.*blocks.2.", LoRA.load, adapter, CONFIG | {"n_layers": 3})
    refused(f"{message}.*(ff|up)", LoRA.load, adapter, CONFIG | {"mlp_hidden_size": 96})
    head = "base_model.model.model.transformer.ff_out.lora_A.weight"
    tiny.change_tensors(adapter / WEIGHTS, {head: torch.ones(4, 64)})
    refused(message + re.escape(head), LoRA.load, adapter, CONFIG)
    save_file({"lm_head.lora_A.weight": torch.ones(4, 64)}, adapter / WEIGHTS)
    refused("adapter cannot be used .*at least one projection", LoRA.load, adapter, CONFIG)


def test_a_missing_file_of_an_adapter_is_named(adapter):
    for file in (WEIGHTS, SETTINGS):
        (adapter / file).unlink()
        refused(f"{file} is missing", LoRA.load, adapter, CONFIG)


@pytest.mark.parametrize("recorded", ["some/base", "", None])
def test_the_base_of_an_adapter_is_the_given_one_or_else_the_recorded_one(
    adapter, capsys, recorded
):
    tiny.change_json(adapter / SETTINGS, base_model_name_or_path=recorded)
    if recorded:
        assert base_of(adapter) == base_of(adapter, recorded) == recorded
    else:
        refused("records no base model; add --model", base_of, adapter)
    assert capsys.readouterr().out == ""
    assert base_of(adapter, "a/copy") == "a/copy"
    printed = capsys.readouterr().out
    assert f"trained on {recorded}" in printed if recorded else printed == ""


# ---- merging -------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_adds_the_adapter_in_float32(folder, adapter, tmp_path, dtype):
    expected = {name: t.to(dtype) for name, t in tiny.make_tensors().items()}
    tiny.write_base(folder, expected)
    (folder / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    merge(folder, adapter, out)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "out"}
    for file in (INDEX, "config.json", "tokenizer.json"):
        assert (out / file).read_bytes() == (folder / file).read_bytes()
    lora = make_lora().requires_grad_(False)
    for key, A in lora.A.items():
        name = f"model.transformer.blocks.{key.replace(':', '.')}.weight"
        expected[name] = (expected[name].float() + 6.0 / 4 * (lora.B[key] @ A)).to(dtype)
    merged = {}
    for file in FILES:
        assert load_file(out / file).keys() == load_file(folder / file).keys()
        merged |= load_file(out / file)
    assert same(merged, expected)
    gap = LLaDA.from_pretrained(out)(IDS) - tiny.with_lora(folder, lora)(IDS)
    assert gap.abs().max() < 5e-5 if dtype == torch.float32 else gap.abs().mean() < 0.05
    refused("exists", merge, folder, adapter, out)


def test_a_merge_that_fails_leaves_nothing_that_looks_complete(
    folder, adapter, tmp_path, monkeypatch
):
    written = []

    def write_one(path, content):
        written.append(path)
        if len(written) == 2:
            raise OSError("no space left on device")
        write_file(path, content)

    monkeypatch.setattr(llada.lora, "write_file", write_one)
    with pytest.raises(OSError, match="no space"):
        merge(folder, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    refused(f"{FILES[1]} is missing", LLaDA.from_pretrained, written[0].parent)
    monkeypatch.undo()
    merge(folder, adapter, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "out"}


def test_merge_refuses_a_base_that_the_adapter_does_not_fit(folder, adapter, tmp_path):
    for unfit in (torch.ones(64, 64, dtype=torch.int8), torch.ones(32, 64)):
        tiny.change_tensors(folder / FILES[1], {QUERY: unfit})
        refused(f"{QUERY} is {unfit.dtype}", merge, folder, adapter, tmp_path / "out")
    files = tiny.weight_map(folder)
    del files[QUERY]
    tiny.change_json(folder / INDEX, weight_map=files)
    refused(f"lacks {QUERY}", merge, folder, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
