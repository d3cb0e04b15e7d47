"""LLaDA's forward pass, adapters and sampler against second derivations: a forward pass by hand in
float64, and a sampler of plain loops."""

import math
from types import SimpleNamespace

import llada_helpers as tiny
import pytest
import torch
from llada_helpers import by_hand, close, refused, same, sample_by_hand
from torch import Generator

import dtm
import llada_finetune as llada
from figures.llada_shape import CONFIG_8B
from llada_finetune import LLaDA, LoRA, generate

OTHER = {"d_model": 48, "n_layers": 3, "n_heads": 3, "n_kv_heads": 3, "mlp_hidden_size": 40}
OTHER |= {"vocab_size": 50, "embedding_size": 50, "rope_theta": 77.0, "rms_norm_eps": 1e-3}
OTHER = tiny.CONFIG | OTHER | {"mask_token_id": 49, "eos_token_id": 1, "pad_token_id": 1}
WHERE = torch.rand(3, 48, generator=Generator().manual_seed(0)) < 0.3
PROMPT = tiny.random_ids(16, seed=11)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny"), tiny.make_tensors())


@pytest.fixture
def model(folder):
    return LLaDA.from_pretrained(folder)


# ---- the forward pass ----------------------------------------------------------------------------
def test_logits_and_the_stream_are_those_by_hand(model):
    logits, stream = by_hand(tiny.CONFIG, model.state_dict(), tiny.IDS)
    entered = []
    for block in model.model["transformer"]["blocks"]:
        block.register_forward_pre_hook(lambda _, given: entered.append(given[0]))
    actual, hidden = model(tiny.IDS, hidden=True)
    close(actual, logits)
    close(torch.stack([*entered, hidden]), stream)


def test_norm_and_head_run_at_the_chosen_positions_only(model):
    logits, stream = by_hand(tiny.CONFIG, model.state_dict(), tiny.IDS)
    sizes = []
    for name in ("ln_f", "ff_out"):
        part = model.model["transformer"][name]
        part.register_forward_pre_hook(lambda _, given: sizes.append(tuple(given[0].shape)))
    actual, hidden = model(tiny.IDS, where=WHERE, hidden=True)
    close(actual, logits[WHERE])
    close(hidden, stream[-1][WHERE])
    assert sizes == [(int(WHERE.sum()), 64)] * 2


def test_another_size_and_a_table_of_angles_that_grows():
    tensors = tiny.make_tensors(OTHER, seed=1)
    model = LLaDA(OTHER).requires_grad_(False)
    model.load_state_dict(tensors)
    ids = tiny.IDS[:, :21] % 50
    for length in (7, 21, 7):
        close(model(ids[:, :length]), by_hand(OTHER, tensors, ids[:, :length])[0])
    seen = torch.arange(21) >= torch.tensor([[0], [4], [9]])
    close(model(ids, seen), by_hand(OTHER, tensors, ids, seen)[0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masked_pads_are_not_seen(model, dtype):
    ids, seen = tiny.padded(tiny.IDS)
    logits, _ = by_hand(tiny.CONFIG, model.state_dict(), ids, seen)
    close(model(ids, seen.to(dtype)), logits)


def test_pads_without_a_mask_are_seen(model):
    ids, _ = tiny.padded(tiny.IDS)
    close(model(ids), by_hand(tiny.CONFIG, model.state_dict(), ids)[0])
    close(model(tiny.IDS, torch.ones_like(tiny.IDS)), model(tiny.IDS))


def test_a_padded_row_is_the_row(model):
    rows = [row[n:].tolist() for row, n in zip(tiny.IDS, tiny.PADS, strict=True)]
    ids, seen = llada.pad_left(rows, tiny.EOS)
    logits = model(ids, seen)
    for row, n in enumerate(tiny.PADS):
        close(logits[row, n:], model(tiny.IDS[row : row + 1, n:])[0])


# ---- bfloat16 ------------------------------------------------------------------------------------
def test_bfloat16_logits_are_near_those_by_hand(folder):
    """The logits' standard deviation is 3."""
    model = LLaDA.from_pretrained(folder, dtype=torch.bfloat16)
    logits = model(tiny.IDS)
    gap = (logits - by_hand(tiny.CONFIG, model.state_dict(), tiny.IDS)[0]).abs()
    assert logits.dtype == torch.bfloat16
    assert gap.mean() <= 0.04 and gap.max() <= 0.4


def wide_and_narrow():
    """The same numbers in float64 and in bfloat16."""
    x = 3 * torch.randn(5, 64, generator=Generator().manual_seed(0))
    return x.bfloat16().double(), x.bfloat16()


def test_the_norm_is_rounded_before_the_gain():
    x, rounded = wide_and_narrow()
    norm = llada.RMSNorm(64, 1e-5).bfloat16()
    norm.weight.data.copy_(torch.linspace(0.5, 1.7, 64))
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(norm(rounded), norm.weight * normed.bfloat16())


def test_the_rotation_is_rounded_at_its_end():
    x, rounded = wide_and_narrow()
    angle = torch.linspace(0, 4000, 5 * 32).view(5, 32)
    z = torch.complex(x[:, :32], x[:, 32:]) * torch.exp(1j * angle.double())
    expected = torch.cat([z.real, z.imag], -1).bfloat16()
    actual = llada.rotate(rounded, angle.cos(), angle.sin())
    assert (actual == expected).float().mean() > 0.99


# ---- adapters ------------------------------------------------------------------------------------
def test_a_new_adapter_changes_nothing(folder, model):
    logits = tiny.with_lora(folder, LoRA(tiny.CONFIG, tiny.MAPS, 4, 6.0))(tiny.IDS)
    assert torch.equal(logits, model(tiny.IDS))


def test_two_adapters_on_one_base(folder, model):
    student = tiny.make_lora(seed=1)
    teacher = tiny.make_lora(["q_proj"], seed=2).requires_grad_(False)
    expected = {
        "student": tiny.with_lora(folder, student)(tiny.IDS),
        "teacher": tiny.with_lora(folder, teacher)(tiny.IDS),
        None: model(tiny.IDS),
    }
    model.adapters.update({"student": student, "teacher": teacher})
    for name in ("student", "teacher", None, "student"):
        assert torch.equal(model.use(name)(tiny.IDS), expected[name])
    for one, another in (("student", "teacher"), ("teacher", None), ("student", None)):
        assert not torch.equal(expected[one], expected[another])


def test_an_adapter_learns_and_nothing_else_changes(folder, model):
    base = dict(model.named_parameters())
    places = {name: p.data_ptr() for name, p in base.items()}
    student = tiny.make_lora(seed=1)
    teacher = tiny.make_lora(["q_proj"], seed=2).requires_grad_(False)
    model.adapters.update({"student": student, "teacher": teacher})
    model.use("student")(tiny.IDS).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())
    assert all(p.grad is None for p in [*base.values(), *teacher.parameters()])
    later = tiny.make_lora(["q_proj"], seed=3)
    teacher.load_state_dict(later.state_dict())
    assert torch.equal(model.use("teacher")(tiny.IDS), tiny.with_lora(folder, later)(tiny.IDS))
    assert {name: p.data_ptr() for name, p in base.items()} == places
    assert same(base, tiny.make_tensors())


def test_a_float32_adapter_on_a_bfloat16_model(folder):
    model = LLaDA.from_pretrained(folder, dtype=torch.bfloat16)
    model.adapters["own"] = tiny.make_lora()
    logits = model.use("own")(tiny.IDS)
    gap = (logits - tiny.with_lora(folder, tiny.make_lora())(tiny.IDS)).abs()
    assert logits.dtype == torch.bfloat16 and gap.mean() < 0.05


@pytest.mark.parametrize(
    "message, maps, rank, dropout",
    [
        pytest.param("o_proj", ["o_proj"], 4, 0.0, id="a map that LLaDA does not have"),
        pytest.param("maps", [], 4, 0.0, id="no map"),
        pytest.param("rank", ["q_proj"], 0, 0.0, id="rank"),
        pytest.param("dropout", ["q_proj"], 4, 1.0, id="dropout"),
    ],
)
def test_an_adapter_that_cannot_be(message, maps, rank, dropout):
    refused(message, LoRA, tiny.CONFIG, maps, rank, 6.0, dropout)


def test_an_unknown_adapter_cannot_be_put_on(model):
    refused("adapter", model.use, "student")


def gradients(folder, checkpointing, dropout, seed):
    """An adapter's gradients, and how often the first block was computed."""
    model = tiny.with_lora(folder, tiny.make_lora(dropout=dropout))
    model.checkpointing = checkpointing
    model.train()
    calls = []
    first = model.model["transformer"]["blocks"][0]
    first.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(seed)
    model(tiny.IDS, tiny.padded(tiny.IDS)[1], WHERE).square().mean().backward()
    found = torch.cat([p.grad.flatten() for p in model.adapters["own"].parameters()])
    return found, len(calls)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_gives_the_same_gradients(folder, dropout):
    expected, once = gradients(folder, False, dropout, seed=3)
    actual, twice = gradients(folder, True, dropout, seed=3)
    assert (once, twice) == (1, 2)
    close(actual, expected, 1e-6)
    others, _ = gradients(folder, True, dropout, seed=4)
    assert torch.allclose(others, expected, atol=1e-4) == (dropout == 0)


def test_dropout_is_for_training_only(folder):
    plain = tiny.with_lora(folder, tiny.make_lora())
    dropping = tiny.with_lora(folder, tiny.make_lora(dropout=0.3))
    assert not torch.equal(dropping.train()(tiny.IDS), plain(tiny.IDS))
    assert torch.equal(dropping.eval()(tiny.IDS), plain(tiny.IDS))


def test_the_8b_model_has_8_015_581_184_parameters():
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in LLaDA(CONFIG_8B).named_parameters()}
    assert len(sizes) == 291
    assert sum(sizes.values()) == 8_015_581_184 == 2 * sizes[tiny.HEAD] + 6_979_588_096


def test_only_sizes_differ_from_the_8b_model():
    differing = {key for key, value in CONFIG_8B.items() if tiny.CONFIG.get(key) != value}
    sizes = {"d_model", "n_layers", "n_heads", "mlp_hidden_size", "vocab_size"}
    assert differing == sizes | {"mask_token_id", "eos_token_id", "pad_token_id"}


# ---- the sampler ---------------------------------------------------------------------------------
def recorded(model):
    """The model as a function, and the canvases and masks that it is called with."""
    calls = []

    def spy(ids, attention_mask=None, where=None):
        calls.append((ids, attention_mask))
        return model(ids, attention_mask, where)

    spy.config = model.config
    return spy, calls


@pytest.mark.parametrize(
    "steps, pads, dtype",
    [
        pytest.param(16, False, None, id="16 steps"),
        pytest.param(12, False, None, id="12 steps"),
        pytest.param(32, False, None, id="a token a step"),
        pytest.param(16, True, None, id="pads are seen"),
        pytest.param(16, True, torch.bool, id="pads are masked"),
        pytest.param(16, True, torch.int64, id="pads are masked by 0 and 1"),
    ],
)
def test_every_canvas_of_a_generation(model, steps, pads, dtype):
    prompt, seen = tiny.padded(PROMPT) if pads else (PROMPT, torch.ones(3, 16, dtype=torch.bool))
    visible = seen if dtype else torch.ones_like(seen)
    expected = sample_by_hand(model.state_dict(), prompt, visible, steps)
    spy, calls = recorded(model)
    mask = seen.to(dtype) if dtype else None
    out = generate(spy, prompt, 32, 8, steps, attention_mask=mask)
    assert torch.equal(torch.stack([ids for ids, _ in calls] + [out]), expected)


def test_a_mask_that_hides_nothing_is_dropped(model):
    spy, calls = recorded(model)
    out = generate(spy, PROMPT, 32, 8, 16, attention_mask=torch.ones_like(PROMPT))
    assert all(mask is None for _, mask in calls)
    assert torch.equal(out, generate(model, PROMPT, 32, 8, 16))


def test_a_mask_may_be_drawn_unless_it_is_banned(model):
    """What draws the mask stays masked, as in the reference; rollouts ban it."""
    tensors = model.state_dict()
    tensors[tiny.HEAD][tiny.MASK] *= 2
    expected = sample_by_hand(tensors, PROMPT, torch.ones(3, 16, dtype=torch.bool), 16)[-1]
    assert 0 < (expected == tiny.MASK).sum() < expected.numel()
    assert torch.equal(generate(model, PROMPT, 32, 8, 16), expected)
    assert not (generate(model, PROMPT, 32, 8, 16, ban_mask=True) == tiny.MASK).any()


def test_a_mask_in_the_prompt_stays(model):
    prompt = PROMPT.clone()
    prompt[:, 3] = tiny.MASK
    assert torch.equal(generate(model, prompt, 32, 8, 16)[:, :16], prompt)


def test_generate_is_sample_on_the_answer(model):
    """With temperature, order and generator handed on."""

    def answer(xt, where):
        return model(*llada.canvas(PROMPT, None, xt, where))

    how = {"order": "state", "block": 8, "temperature": 0.7, "steps": 4, "ban_mask": True}
    noise = Generator().manual_seed(5)
    *_, x1 = dtm.sample(answer, torch.full((3, 32), tiny.MASK), tiny.MASK, generator=noise, **how)
    noise = Generator().manual_seed(5)
    out = generate(model, PROMPT, 32, 8, 16, 0.7, None, noise, "state", True)
    assert torch.equal(out, torch.cat([PROMPT, x1], 1))


def test_answers_come_in_the_order_of_their_prompts(model):
    prompts = [PROMPT[0, :n].tolist() for n in (9, 16, 3, 16, 4)]
    cfg = llada.Config(gen_length=16, block=8, steps=8, chunk=2)
    text = SimpleNamespace(ends=[])
    answers = llada.decode(model.train(), text, prompts, cfg, Generator())
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = generate(model, torch.tensor([prompt]), 16, 8, 8)
        assert torch.equal(answer, alone[0, len(prompt) :])


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_logits_that_are_not_finite_stop_it(model, number):
    model.state_dict()[tiny.HEAD][7, 0] = number
    refused("not finite", generate, model, PROMPT, 32, 8, 16)


@pytest.mark.parametrize("length, steps", [(30, 16), (32, 15), (32, 2)])
def test_lengths_that_do_not_fit(model, length, steps):
    refused("must be a multiple of", generate, model, PROMPT, length, 8, steps)
