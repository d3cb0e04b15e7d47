"""The model, its files and its adapters: against the public code's arrays (data/), a second derivation, and broken files."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Generator

import llada_finetune as llada
from llada_finetune import CONFIG_8B, LLaDA, LoRA, generate, merge, plan, settings

TINY = Path(__file__).parent / "data" / "tiny"
R = {k: torch.from_numpy(v) for k, v in np.load(TINY.parent / "reference.npz").items()}
MODEL, IDS, PADDED, SEEN = (
    LLaDA.from_pretrained(TINY),
    R["input_ids"],
    R["pad_input_ids"],
    R["pad_attention_mask"],
)
WHERE = torch.rand(IDS.shape, generator=Generator().manual_seed(0)) < 0.3
SMALL = CONFIG_8B | dict(
    d_model=48,
    n_layers=3,
    n_heads=3,
    mlp_hidden_size=40,
    vocab_size=50,
    rope_theta=77.0,
    rms_norm_eps=1e-3,
)
ALL = ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"]
FILES, HEAD = (
    [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)],
    "model.transformer.ff_out.weight",
)
INDEX = "model.safetensors.index.json"

close = lambda actual, expected, atol=5e-5: torch.testing.assert_close(
    actual, expected, atol=atol, rtol=0
)
same = lambda a, b: (
    a.keys() == b.keys()
    and all(torch.equal(t, b[k]) and t.dtype == b[k].dtype for k, t in a.items())
)


def adapter(maps=ALL, seed=0, **given):
    lora = LoRA(MODEL.config, list(maps), 4, 6.0, seed=seed, **given)
    [
        torch.nn.init.normal_(b.data, std=0.02, generator=Generator().manual_seed(100 * seed + i))
        for i, b in enumerate(lora.B.values())
    ]
    return lora


def tuned(**adapters):
    """A fresh tiny model; one adapter is put on."""
    model = LLaDA.from_pretrained(TINY)
    model.adapters.update(adapters)
    return model.use([*adapters, None][0])


# ---- parity with the public code -----------------------------------------------------------------
def test_logits_and_hidden_states():
    inputs, model = [], tuned()
    [
        b.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        for b in model.model["transformer"]["blocks"]
    ]
    logits, hidden = model(IDS, hidden=True)
    close(logits, R["logits"])
    close(torch.stack([*inputs, hidden]), R["hidden_states"])
    logits, hidden = MODEL(IDS, where=WHERE, hidden=True)
    close(logits, R["logits"][WHERE])
    close(hidden, R["hidden_states"][2][WHERE])


def test_padding():
    for mask in (SEEN, SEEN.bool(), SEEN.float()):
        close(MODEL(PADDED, mask), R["pad_logits_masked"])
    close(MODEL(PADDED), R["pad_logits_ignored"])
    close(MODEL(IDS, torch.ones_like(IDS)), R["logits"])
    ids, seen = llada.pad_left([row[-n:].tolist() for row, n in zip(IDS, (48, 43, 37))], 480)
    close(MODEL(ids, seen)[2, 11:], MODEL(IDS[2:, -37:])[0])  # a padded row is the row


def test_bfloat16():
    logits = LLaDA.from_pretrained(TINY, dtype=torch.bfloat16)(IDS)
    gap = (logits.float() - R["logits_bf16_as_f32"]).abs()
    assert logits.dtype == torch.bfloat16 and gap.mean() <= 0.04 and gap.max() <= 0.4
    x = (
        3 * torch.randn(5, 64, generator=Generator().manual_seed(0))
    ).bfloat16()  # what the gap is too wide to see
    norm, wide, angle = (
        llada.RMSNorm(64, 1e-5).bfloat16(),
        x.double(),
        torch.linspace(0, 4000, 5 * 32).view(5, 32),
    )
    norm.weight.data.copy_(torch.linspace(0.5, 1.7, 64))
    assert torch.equal(
        norm(x),
        norm.weight * (wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()).bfloat16(),
    )
    z = torch.complex(wide[:, :32], wide[:, 32:]) * torch.exp(1j * angle.double())
    assert (
        llada.rotate(x, angle.cos(), angle.sin()) == torch.cat([z.real, z.imag], -1).bfloat16()
    ).float().mean() > 0.99


@pytest.mark.parametrize(
    "prompt, seen, steps, out",
    [
        ("gen_prompt", None, 16, "gen_out"),
        ("gen_prompt", None, 12, "gen_out_steps12"),
        ("genpad_prompt", None, 16, "genpad_out_ignored"),
        ("genpad_prompt", "genpad_attention_mask", 16, "genpad_out_masked"),
    ],
)
def test_generations_token_for_token(prompt, seen, steps, out):
    for kind in (torch.bool, torch.int64) if seen else (None,):
        assert torch.equal(
            generate(MODEL, R[prompt], 32, 8, steps, attention_mask=seen and R[seen].to(kind)),
            R[out],
        )


def test_every_canvas_and_an_idle_mask_is_dropped():
    calls = []
    spy = lambda ids, mask=None, where=None: calls.append((ids, mask)) or MODEL(ids, mask, where)
    spy.config = MODEL.config
    out = generate(spy, R["gen_prompt"], 32, 8, 16, attention_mask=torch.ones_like(R["gen_prompt"]))
    assert torch.equal(torch.stack([ids for ids, _ in calls] + [out]), R["gen_states"]) and all(
        mask is None for _, mask in calls
    )


# ---- a second derivation -------------------------------------------------------------------------
def by_hand(config, tensors, ids, seen):
    """Attention as sums over keys, positions as complex rotations, float64."""
    t = {
        k.removeprefix("model.transformer.").removesuffix(".weight"): v.double()
        for k, v in tensors.items()
    }
    (B, T), H, half = ids.shape, config["n_heads"], config["d_model"] // config["n_heads"] // 2
    turn = torch.exp(
        1j
        * torch.arange(T).double()[:, None]
        * config["rope_theta"] ** (-torch.arange(half).double() / half)
    )[:, None]
    norm = lambda x, g: x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * t[g]
    cut = lambda x, w: (x @ t[w].T).view(B, T, H, 2 * half)
    turned = lambda u: torch.cat(
        [*torch.view_as_real(torch.complex(u[..., :half], u[..., half:]) * turn).unbind(-1)], -1
    )
    x = t["wte"][ids]
    for b in (f"blocks.{i}." for i in range(config["n_layers"])):
        u = norm(x, b + "attn_norm")
        score = torch.einsum(
            "bqhd,bkhd->bhqk", turned(cut(u, b + "q_proj")), turned(cut(u, b + "k_proj"))
        ) / math.sqrt(2 * half)
        share = (
            score.exp()
            * seen[:, None, None]
            / (score.exp() * seen[:, None, None]).sum(-1, keepdim=True)
        )
        x = (
            x
            + torch.einsum("bhqk,bkhd->bqhd", share, cut(u, b + "v_proj")).reshape(B, T, -1)
            @ t[b + "attn_out"].T
        )
        u = norm(x, b + "ff_norm")
        gate = u @ t[b + "ff_proj"].T
        x = x + (gate / (1 + torch.exp(-gate)) * (u @ t[b + "up_proj"].T)) @ t[b + "ff_out"].T
    return norm(x, "ln_f") @ t["ff_out"].T


def test_the_forward_pass_at_another_size():
    model, g = (
        LLaDA(SMALL).init_weights(Generator().manual_seed(1)).requires_grad_(False),
        Generator().manual_seed(0),
    )
    [
        p.add_(torch.randn(p.shape, generator=g), alpha=0.3 * (p.dim() == 1))
        for p in model.parameters()
    ]
    ids, seen = (
        torch.randint(50, (3, 21), generator=g),
        torch.arange(21) >= torch.tensor([[0], [4], [9]]),
    )
    for n in (7, 21, 7):  # the table of angles grows
        close(
            model(ids[:, :n]).double(),
            by_hand(SMALL, model.state_dict(), ids[:, :n], torch.ones(3, n)),
            1e-4,
        )
    close(model(ids, seen).double(), by_hand(SMALL, model.state_dict(), ids, seen), 1e-4)


# ---- files ---------------------------------------------------------------------------------------
def test_round_trips_bit_for_bit(tmp_path):
    original = {k: t for file in FILES for k, t in load_file(TINY / file).items()}
    assert same(MODEL.state_dict(), original) and not any(
        p.requires_grad for p in MODEL.parameters()
    )
    tuned(student=adapter()).save_pretrained(tmp_path / "a", shards=3)
    assert len([*(tmp_path / "a").glob("model-*-of-00003.safetensors")]) == 3 and not [
        *tmp_path.rglob(".half*")
    ]
    again, index = (
        LLaDA.from_pretrained(tmp_path / "a"),
        json.loads((tmp_path / "a" / INDEX).read_text()),
    )
    assert same(again.state_dict(), original) and again.config == json.loads(
        (TINY / "config.json").read_text()
    )
    assert (
        index["metadata"]["total_size"] == 591104 and index["weight_map"].keys() == original.keys()
    )
    shutil.copytree(
        TINY, tmp_path / "b", ignore=lambda *_: [*FILES, INDEX]
    )  # one file without an index
    save_file(
        half := {k: t.bfloat16() for k, t in original.items()}, tmp_path / "b" / "model.safetensors"
    )
    assert same(LLaDA.from_pretrained(tmp_path / "b", dtype=torch.bfloat16).state_dict(), half)


in_shard = lambda change: lambda f: save_file(change(load_file(f / FILES[1])), f / FILES[1])
in_json = lambda name, change: (
    lambda f: (f / name).write_text(json.dumps(change(json.loads((f / name).read_text()))))
)
in_map = lambda change: in_json(INDEX, lambda index: {"weight_map": change(index["weight_map"])})
KEYS = dict(
    alibi=True,
    model_type="other",
    architectures=["LLaDAMoEModelLM"],
    n_kv_heads=2,
    weight_tying=True,
    d_model=None,
    include_bias=True,
    block_type=None,
    embedding_size=640,
    n_layers=2.5,
    mlp_hidden_size="128",
)
BROKEN = {
    f"config.json: {k} ": in_json("config.json", lambda c, k=k, v=v: {**c, k: v})
    for k, v in KEYS.items()
}
BROKEN |= {
    "config.json: d_model must be": in_json(
        "config.json", lambda c: c | dict(n_heads=5, n_kv_heads=5)
    ),
    "config.json is no JSON object": lambda f: (f / "config.json").write_text(
        '{"model_type": "llada", '
    ),
    "config.json is missing": lambda f: (f / "config.json").unlink(),
    "index.json is missing": lambda f: (f / INDEX).unlink(),
    "weight_map": lambda f: (f / INDEX).write_text("{}"),
    "00002-of-00002.* is missing": lambda f: (f / FILES[1]).unlink(),
    "00002-of-00002.* is torn": lambda f: (f / FILES[1]).write_bytes(
        (f / FILES[1]).read_bytes()[:-9]
    ),
    "00001-of-00002.* is torn": lambda f: (f / FILES[0]).write_bytes(b"{}"),
    r"ff_out.* is \(511, 64\).* \(512, 64\)": in_shard(lambda t: t | {HEAD: t[HEAD][1:].clone()}),
    "00002-of-00002.* lacks model.transformer.ff_out": in_shard(lambda t: t.pop(HEAD) is None or t),
    "1 tensors .*ln_f": in_map(lambda m: m.pop("model.transformer.ln_f.weight") and m),
    "1 tensors .*extra": lambda f: [
        in_shard(lambda t: t | {"extra": torch.ones(2)})(f),
        in_map(lambda m: m | {"extra": FILES[1]})(f),
    ],
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_checkpoint_is_refused(message, tmp_path):
    BROKEN[message](shutil.copytree(TINY, tmp_path / "tiny"))
    with pytest.raises(ValueError, match=message) as error:
        LLaDA.from_pretrained(tmp_path / "tiny")
    assert "\n" not in str(error.value)


def test_sources(tmp_path, monkeypatch):
    asked, hub = [], "huggingface_hub.snapshot_download"
    monkeypatch.setattr(hub, lambda name, **_: asked.append(name) or str(TINY))
    assert same(
        LLaDA.from_pretrained("some-one/LLaDA_8B.x").state_dict(), MODEL.state_dict()
    ) and asked == ["some-one/LLaDA_8B.x"]
    monkeypatch.setattr(
        hub, lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no route\nto host"))
    )
    for source, message in {
        tmp_path / "none": "no folder",
        "a/b/c": "no folder",
        "some/one": "cannot get some/one .*--model",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            LLaDA.from_pretrained(source)
        assert "\n" not in str(error.value)


# ---- LoRA ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("maps", [llada.PAPER, ["ff_out"], ALL])
def test_an_adapters_files_follow_peft(tmp_path, maps):
    lora, shapes = (
        adapter(maps),
        dict.fromkeys(ALL, (64, 64)) | dict(ff_proj=(64, 128), up_proj=(64, 128), ff_out=(128, 64)),
    )
    assert torch.equal(
        tuned(x=LoRA(MODEL.config, maps, 4, 6.0))(IDS), MODEL(IDS)
    )  # a fresh one changes nothing
    lora.save(tmp_path, "some/base")
    config, tensors = (
        json.loads((tmp_path / "adapter_config.json").read_text()),
        load_file(tmp_path / "adapter_model.safetensors"),
    )
    names = {f"model.transformer.blocks.{i}.{m}": shapes[m] for i in (0, 1) for m in maps}
    assert {
        n for n, _ in MODEL.named_modules() if re.fullmatch(config["target_modules"], n)
    } == names.keys()  # as peft reads a string
    want = {
        f"base_model.model.{n}.lora_{x}.weight": s
        for n, (i, o) in names.items()
        for x, s in (("A", (4, i)), ("B", (o, 4)))
    }
    assert {k: tuple(t.shape) for k, t in tensors.items()} == want
    assert (
        config.items()
        >= dict(
            peft_type="LORA",
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=6.0,
            base_model_name_or_path="some/base",
        ).items()
    )
    plain, logits, again = tuned(), tuned(x=lora)(IDS), LoRA.load(tmp_path, MODEL.config)
    for n in names:  # what peft computes: W + alpha / r B A
        a, b = (tensors[f"base_model.model.{n}.lora_{x}.weight"] for x in "AB")
        plain.get_submodule(n).weight += 6.0 / 4 * b @ a
    close(logits, plain(IDS))
    assert (logits - MODEL(IDS)).abs().max() > 0.01
    assert torch.equal(tuned(x=again)(IDS), logits) and same(again.state_dict(), lora.state_dict())
    with pytest.raises(ValueError, match="does not fit"):
        LoRA.load(tmp_path, SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge(tmp_path, dtype):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(TINY, base) if dtype == torch.float32 else LLaDA.from_pretrained(
        TINY, dtype=dtype
    ).save_pretrained(base, 3)
    (base / "tokenizer.json").write_text("{}")
    adapter().save(tmp_path / "adapter", "")
    merge(base, tmp_path / "adapter", out)
    assert {p.name for p in base.iterdir()} == {p.name for p in out.iterdir()} and len(
        [*tmp_path.iterdir()]
    ) == 3
    assert all(p.read_bytes() == (out / p.name).read_bytes() for p in base.glob("*.json"))
    for old, new in ((load_file(p), load_file(out / p.name)) for p in base.glob("*.safetensors")):
        assert {k: t.dtype for k, t in new.items()} == dict.fromkeys(old, dtype)
        assert {k for k in old if torch.equal(old[k], new[k])} == {
            k for k in old if not re.search(r"_proj|attn_out|\d\.ff_out", k)
        }
    gap = (LLaDA.from_pretrained(out)(IDS) - tuned(x=adapter())(IDS)).abs()
    assert gap.max() < 5e-5 if dtype == torch.float32 else gap.mean() < 0.05
    with pytest.raises(ValueError, match="exists"):
        merge(base, tmp_path / "adapter", out)


def test_two_adapters_on_one_base():
    model = tuned(
        student=adapter(seed=1), teacher=adapter(["q_proj"], seed=2).requires_grad_(False)
    )
    base, logits = {k: p for k, p in model.named_parameters() if not k.startswith("adapters")}, {}
    before = {k: p.data_ptr() for k, p in base.items()}
    for name in ("student", "teacher", None, "student"):
        want = MODEL if name is None else tuned(x=model.adapters[name])
        assert torch.equal(logits.setdefault(name, model.use(name)(IDS)), want(IDS))
    assert not torch.equal(logits["student"], logits["teacher"]) and not torch.equal(
        logits["teacher"], logits[None]
    )
    model.use("student")(IDS).square().mean().backward()
    assert all(
        p.grad is not None and p.grad.abs().max() > 0
        for p in model.adapters["student"].parameters()
    )
    assert all(p.grad is None for p in [*base.values(), *model.adapters["teacher"].parameters()])
    model.adapters["teacher"].follow(dict(adapter(["q_proj"], seed=3).named_parameters()))
    assert torch.equal(model.use("teacher")(IDS), tuned(x=adapter(["q_proj"], seed=3))(IDS))
    assert {k: p.data_ptr() for k, p in base.items()} == before and same(base, MODEL.state_dict())
    for message, bad in (
        ("adapter", lambda: model.use("x")),
        ("o_proj", lambda: adapter(["o_proj"])),
        ("rank", lambda: adapter(dropout=1)),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_gives_the_same_gradients(dropout):
    def gradients(again, seed):
        model, calls = tuned(x=adapter(dropout=dropout)), []
        model.model["transformer"]["blocks"][0].register_forward_pre_hook(
            lambda *_: calls.append(1)
        )
        model.checkpointing = again
        model.adapters["x"].train()
        torch.manual_seed(seed)
        model(IDS, SEEN, WHERE).square().mean().backward()
        assert len(calls) == 1 + again and torch.equal(
            model.eval()(IDS), tuned(x=adapter())(IDS)
        )  # dropout in training only
        return torch.cat([p.grad.flatten() for p in model.adapters["x"].parameters()])

    want = gradients(False, 3)
    close(gradients(True, 3), want, 1e-6)
    assert torch.allclose(gradients(True, 4), want, atol=1e-4) == (dropout == 0)


# ---- 8B ------------------------------------------------------------------------------------------
def test_parameters_and_plan():
    with torch.device("meta"):
        sizes = {k: p.numel() for k, p in LLaDA(CONFIG_8B).named_parameters()}
    assert (
        len(sizes) == 291
        and sum(sizes.values()) == 8_015_581_184 == sizes[HEAD] * 2 + 6_979_588_096
    )
    for task, rollouts, training in (("countdown", 347, 300), ("sudoku", 98, 170)):
        got = plan(settings(task, checkpointing=False), CONFIG_8B, 8, 400.0)
        eflop = {k: got["phases"] * v for k, v in got["eflop_per_phase"].items()}
        assert (got["parameters"], got["trainable"], round(got["gb_per_gpu"]["base"], 2)) == (
            8_015_581_184,
            335_544_320,
            16.03,
        )
        assert eflop["rollouts"] == pytest.approx(rollouts, rel=0.15) and eflop[
            "training"
        ] == pytest.approx(training, rel=0.15)
        assert got["hours"] == pytest.approx(
            sum(eflop.values()) * 1e18 / (8 * 400e12) / 3600, rel=0.02
        )
    assert plan(settings("sudoku", lora="paper"), CONFIG_8B, 8, 400.0)["trainable"] == 167_772_160
