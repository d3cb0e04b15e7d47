"""What a run costs: the counts of `figures.llada_cost` against torch's own accounts."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from figures import llada_cost, toy_llada
from llada.lora import ADAPTED, LoRA
from llada.model import CONFIG_8B, LLaDA, rotary_angles
from llada.tasks import TASKS
from llada_finetune import make_config

# Wide blocks, because numbers per token that do not depend on the width are not counted.
WIDE = CONFIG_8B | {"d_model": 256, "n_layers": 6, "n_heads": 4, "mlp_hidden_size": 768}
WIDE |= {"vocab_size": 24, "mask_token_id": 23, "eos_token_id": 1, "pad_token_id": 1}
TASKS_8B = ("sudoku", "countdown", "gsm8k", "math")
BOTH = pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
EITHER_ADAPTER = pytest.mark.parametrize("lora", ["all", "paper"])


def student(cfg, config):
    """Return a frozen base model of a shape, with an adapter that is trained."""
    model = LLaDA(config).requires_grad_(False)
    model.adapters["student"] = LoRA(config, ADAPTED[cfg.lora], cfg.rank, 1.0, cfg.dropout).train()
    model.recompute = cfg.recompute
    return model.use("student")


def tokens_and_mask(cfg, rows):
    """Return tokens (rows, T) of prompts and completions, and a mask with one position per row."""
    ids = torch.arange(rows * (cfg.prompt_length + cfg.gen_length)).view(rows, -1) % 20
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[:, -1] = True
    return ids, where


def adapted_inputs(cfg, config):
    """Return the sum of the widths of the inputs of a block's adapted projections."""
    model = LLaDA(config).model["transformer"]["blocks"][0]
    return sum(getattr(model, name).in_features for name in ADAPTED[cfg.lora])


# ---- 1. Parameters ------------------------------------------------------------------------------
@EITHER_ADAPTER
def test_parameters_are_those_of_the_modules(lora):
    with torch.device("meta"):
        model = LLaDA(CONFIG_8B)
    assert llada_cost.model_parameters(CONFIG_8B) == sum(p.numel() for p in model.parameters())
    cfg = make_config(lora=lora)
    adapter = LoRA(WIDE, ADAPTED[lora], cfg.rank, 1.0)
    counted = llada_cost.adapter_parameters(cfg, WIDE)
    assert counted == sum(p.numel() for p in adapter.parameters())


# ---- 2. Memory ----------------------------------------------------------------------------------
def bytes_kept_by_a_block(cfg):
    """Return how many bytes per token autograd saves of one block for its backward pass.

    Left out are the block's weights, the rotary angles, and the adapter's copies in bfloat16.
    """
    model = student(cfg, WIDE).to(torch.bfloat16)
    adapter = model.adapters["student"].float()
    block = model.model["transformer"]["blocks"][0]
    x = torch.randn(2, 64, 256, dtype=torch.bfloat16).requires_grad_()
    angles = rotary_angles(64, 32, 1e4, x.device)
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *angles]}
    copies = {shape for p in adapter.parameters() for shape in (p.shape, p.T.shape)}
    saved, alive = {}, []

    def pack(t):
        alive.append(t)  # so that no address is used twice
        place = t.untyped_storage().data_ptr()
        if place not in known and t.shape not in copies:
            saved[place] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x, *angles, None, adapter.block(0))
    return sum(saved.values()) / 128


@EITHER_ADAPTER
def test_what_a_block_keeps_is_what_autograd_saves(lora):
    cfg = make_config(lora=lora, rank=8)
    measured = bytes_kept_by_a_block(cfg)
    measured -= adapted_inputs(cfg, WIDE)  # a CPU keeps a dropout mask in 2 bytes, a GPU in 1
    assert llada_cost.kept_per_token(cfg, WIDE) == pytest.approx(measured, rel=0.01)
    shared = make_config(lora=lora, rank=8, dropout=0.0)
    counted, measured = llada_cost.kept_per_token(shared, WIDE), bytes_kept_by_a_block(shared)
    assert measured <= counted <= 1.2 * measured


def peak_bytes(model, ids, where):
    """Return the most memory that the CPU's allocator holds in a forward and a backward pass."""
    model(ids, None, where).sum().backward()  # gradients exist from now on
    with torch.profiler.profile(profile_memory=True) as profile:
        model(ids, None, where).sum().backward()
    events = profile.profiler.kineto_results.events()
    changes = torch.tensor([e.nbytes() for e in events if e.name() == "[memory]"])
    return int(changes.cumsum(0).max())


@BOTH
def test_activations_are_the_peak_of_the_allocator(recompute):
    """The peak also holds the gradients inside one block, which is one of only six here."""
    size = {"prompt_length": 224, "gen_length": 32, "block": 32, "steps": 32, "batch": 4}
    cfg = make_config(rank=8, recompute=recompute, **size)
    model = student(cfg, WIDE).to(torch.bfloat16)
    model.adapters["student"].float()
    measured = peak_bytes(model, *tokens_and_mask(cfg, rows=4))
    counted = 1e9 * llada_cost.count_memory(cfg, WIDE)["activations"]
    counted += 2 * llada_cost.adapter_parameters(cfg, WIDE)  # the copy in bfloat16
    counted += 1024 * adapted_inputs(cfg, WIDE) * (1 if recompute else 6)  # dropout masks, as above
    assert counted <= measured <= (1.25 if recompute else 1.05) * counted


def test_adapter_gradient_and_moments_are_those_of_AdamW():
    cfg = make_config(rank=8)
    adapter = LoRA(WIDE, ADAPTED["all"], 8, 1.0)
    adam = torch.optim.AdamW(adapter.parameters())
    sum(p.sum() for p in adapter.parameters()).backward()
    adam.step()
    held = 0
    for p in adapter.parameters():
        held += sum(t.nbytes for t in (p, p.grad, *adam.state[p].values()) if t.shape == p.shape)
    copy = sum(p.to(torch.bfloat16).nbytes for p in adapter.parameters())
    memory = llada_cost.count_memory(cfg, WIDE)
    assert memory["student and AdamW"] == pytest.approx((held + copy) / 1e9)
    assert memory["teacher"] == pytest.approx(copy / 1e9)


@pytest.mark.parametrize("task", TASKS_8B)
def test_presets_fit_80_GB_and_with_recomputation_32_GB(task):
    kept, recomputed = (
        sum(llada_cost.count_memory(make_config(task=task, recompute=flag), CONFIG_8B).values())
        for flag in (False, True)
    )
    assert 0.8 * 80 < kept < 0.9 * 80 and recomputed < 0.9 * 32


# ---- 3. Arithmetic ------------------------------------------------------------------------------
def measured_flop(cfg, layers):
    """Return FLOP of a forward pass and of training on one completion, first by torch's counter."""
    config = toy_llada.SIZE | {"n_layers": layers}
    model, inputs = student(cfg, config), tokens_and_mask(cfg, rows=1)
    # The counter knows the products of this attention only.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            model(inputs[0], None, inputs[1])
        forward = counter.get_total_flops()
        model(inputs[0], None, inputs[1]).sum().backward()
    counted = sum(llada_cost.forward_flop(cfg, config).values())
    return forward, counter.get_total_flops(), counted, llada_cost.training_flop(cfg, config)


@BOTH
@EITHER_ADAPTER
def test_flop_are_those_of_torchs_counter(lora, recompute):
    """Training is compared by what one more block costs, because the first block of a model has no
    gradient to pass on. When torch recomputes a block, it leaves out the last product, whose result
    nobody needs, so that the count is too high there.
    """
    size = {"prompt_length": 12, "gen_length": 4, "block": 1, "steps": 4, "rank": 8}
    cfg = make_config(lora=lora, recompute=recompute, **size)
    two, three = measured_flop(cfg, layers=2), measured_flop(cfg, layers=3)
    forward, training, counted_forward, counted_training = zip(two, three, strict=True)
    assert counted_forward == forward
    measured, counted = training[1] - training[0], counted_training[1] - counted_training[0]
    assert measured <= counted <= (1.06 if recompute else 1) * measured


def test_hours_follow_the_settings():
    """Completions that end in the middle halve the hours, and so does twice the rate. Recomputation
    adds a forward pass to the three of training."""

    def plan(tflops=400.0, filled=1.0, **settings):
        cfg = make_config(**settings)
        return llada_cost.plan(cfg, CONFIG_8B, gpus=8, tflops=tflops, filled=filled)

    found, again = plan(), plan(recompute=True)
    assert plan(filled=0.5)["hours"] == pytest.approx(found["hours"] / 2)
    assert plan(tflops=800.0)["hours"] == pytest.approx(found["hours"] / 2)
    kept, recomputed = (part["EFLOP_per_phase"]["training"] for part in (found, again))
    assert 1.30 < recomputed / kept < 1.34
    assert again["EFLOP_per_phase"]["rollouts"] == found["EFLOP_per_phase"]["rollouts"]


def test_completions_per_phase_are_those_that_the_loop_samples():
    cfg = make_config(steps_per_h=97, refresh_steps=32, refresh=20, prompts=80, completions=3)
    prompts = cfg.prompts + sum(cfg.refresh for step in range(1, 97) if step % 32 == 0)
    assert llada_cost.completions_per_phase(cfg, gpus=2) == 2 * 3 * prompts


# ---- 4. The command -----------------------------------------------------------------------------
def test_the_command_prints_the_plan_and_says_what_does_not_fit(capsys):
    llada_cost.main(["--task", "countdown", "--gpus", "4"])
    printed = capsys.readouterr().out
    cfg = make_config(task="countdown")
    found = llada_cost.plan(cfg, CONFIG_8B, gpus=4, tflops=400.0)
    assert f"{found['hours']:.2f}" in printed and f"{found['steps']:,}" in printed
    assert "do not fit" not in printed
    llada_cost.main(["--task", "countdown", "--gpu_gb", "48"])
    assert "do not fit into the 48 GB of a GPU: add --recompute" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["--gpus 0", "--tflops 0", "--filled 2", "--task chess"])
def test_impossible_flags_are_refused_by_name(words):
    with pytest.raises(ValueError, match=words):
        llada_cost.main(words.split())


def test_the_bench_runs_the_loop_twice_in_one_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(TASKS, "bench", TASKS["sudoku"])  # removed again after this test
    words = "--bench --prompt_length 20 --gen_length 8 --block 8 --steps 8 --chunk 4 --batch 2"
    for _ in range(2):
        llada_cost.main([*words.split(), "--out", str(tmp_path)])
        result = json.loads((tmp_path / "bench.json").read_text())
        assert min(result[part]["seconds"] for part in ("rollouts", "training")) > 0
        assert (tmp_path / "run" / "step-0000010").is_dir()
    assert "share of matmul" in capsys.readouterr().out
