"""The forward pass equals a second derivation in float64, and rounds where the authors' does."""

import llada_helpers as tiny
import pytest
import torch
from llada_helpers import CONFIG, IDS, PADS, WHERE, by_hand, close, padded
from torch import Generator

from llada.model import CONFIG_8B, LLaDA, RMSNorm, rotary_angles, rotate

OTHER = CONFIG | {"d_model": 48, "n_layers": 3, "n_heads": 3, "mlp_hidden_size": 40}
OTHER |= {"vocab_size": 50, "rope_theta": 77.0, "rms_norm_eps": 1e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_base(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(folder):
    return LLaDA.from_pretrained(folder)


# ---- the forward pass ----------------------------------------------------------------------------
def test_logits_and_the_inputs_of_all_blocks_are_those_by_hand(model):
    logits, stream = by_hand(CONFIG, model.state_dict(), IDS)
    entered = []
    for block in model.model["transformer"]["blocks"]:
        block.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    actual, hidden = model(IDS, hidden=True)
    close(actual, logits)
    close(torch.stack([*entered, hidden]), stream)


def test_last_norm_and_head_are_computed_at_the_chosen_positions_only(model):
    logits, stream = by_hand(CONFIG, model.state_dict(), IDS)
    shapes = []
    for name in ("ln_f", "ff_out"):
        layer = model.model["transformer"][name]
        layer.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    actual, hidden = model(IDS, where=WHERE, hidden=True)
    close(actual, logits[WHERE])
    close(hidden, stream[-1][WHERE])
    assert shapes == [(int(WHERE.sum()), 64)] * 2


def test_another_size_at_several_lengths():
    tensors = tiny.make_tensors(OTHER, seed=1)
    model = LLaDA(OTHER).requires_grad_(False)
    model.load_state_dict(tensors)
    ids = IDS[:, :21] % 50
    for length in (7, 21, 7):
        close(model(ids[:, :length]), by_hand(OTHER, tensors, ids[:, :length])[0])
    visible = torch.arange(21) >= torch.tensor([[0], [4], [9]])
    close(model(ids, visible), by_hand(OTHER, tensors, ids, visible)[0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_no_position_attends_to_masked_padding(model, dtype):
    ids, visible = padded(IDS)
    logits, _ = by_hand(CONFIG, model.state_dict(), ids, visible)
    close(model(ids, visible.to(dtype)), logits)


def test_without_a_mask_positions_attend_to_padding(model):
    ids, _ = padded(IDS)
    close(model(ids), by_hand(CONFIG, model.state_dict(), ids)[0])
    close(model(IDS, torch.ones_like(IDS)), model(IDS))


def test_a_padded_row_has_the_logits_of_the_row_alone(model):
    logits = model(*padded(IDS))
    for i, n in enumerate(PADS):
        close(logits[i, n:], model(IDS[i : i + 1, : 48 - n])[0])


def test_angles_that_inference_mode_computed_serve_training(folder):
    rotary_angles.cache_clear()
    model = LLaDA.from_pretrained(folder)
    with torch.inference_mode():
        expected = model(IDS)
    model.requires_grad_()
    logits = model(IDS)
    logits.sum().backward()
    assert torch.equal(logits, expected)
    assert rotary_angles.cache_info().misses == 1


def test_an_unknown_adapter_is_refused(model):
    tiny.refused("no adapter 'student'", model.use, "student")


# ---- bfloat16 ------------------------------------------------------------------------------------
def test_bfloat16_logits_are_near_those_by_hand(folder):
    """The standard deviation of the logits is 3."""
    model = LLaDA.from_pretrained(folder, dtype=torch.bfloat16)
    logits = model(IDS)
    gap = (logits - by_hand(CONFIG, model.state_dict(), IDS)[0]).abs()
    assert logits.dtype == torch.bfloat16
    assert gap.mean() <= 0.04 and gap.max() <= 0.4


def float64_and_bfloat16():
    """Return the same numbers (5, 64) in both dtypes."""
    x = 3 * torch.randn(5, 64, generator=Generator().manual_seed(0))
    return x.bfloat16().double(), x.bfloat16()


def test_the_norm_is_rounded_before_the_gain():
    x, rounded = float64_and_bfloat16()
    norm = RMSNorm(64, 1e-5).bfloat16()
    norm.weight.data.copy_(torch.linspace(0.5, 1.7, 64))
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(norm(rounded), norm.weight * normed.bfloat16())


def test_the_rotation_is_rounded_at_its_end():
    x, rounded = float64_and_bfloat16()
    angle = torch.linspace(0, 4000, 5 * 32).view(5, 32)
    z = torch.complex(x[:, :32], x[:, 32:]) * torch.exp(1j * angle.double())
    expected = torch.cat([z.real, z.imag], -1).bfloat16()
    actual = rotate(rounded, angle.cos(), angle.sin())
    assert (actual == expected).float().mean() > 0.99  # float32 cosines move a few over an edge


# ---- the published size --------------------------------------------------------------------------
def test_the_8b_model_has_8_015_581_184_parameters_in_291_tensors():
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in LLaDA(CONFIG_8B).named_parameters()}
    assert len(sizes) == 291
    assert sum(sizes.values()) == 8_015_581_184 == 2 * sizes[tiny.HEAD] + 6_979_588_096
