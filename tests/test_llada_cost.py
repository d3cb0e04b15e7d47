"""What a run costs: counts against the published ones, a bench at small size, flags in order."""

import json
import signal

import pytest
import torch

import llada_finetune as llada
from figures import llada_cost, toy_llada
from figures.llada_shape import CONFIG_8B
from llada_finetune import make_config


@pytest.mark.parametrize(
    "task, rollouts, training",
    [
        pytest.param("countdown", 347, 300, id="countdown"),
        pytest.param("sudoku", 98, 170, id="sudoku"),
    ],
)
def test_the_counts_are_those_of_the_official_runs(task, rollouts, training):
    """EFLOP as counted for the official runs, which recompute nothing."""
    found = llada_cost.plan(make_config(task=task, checkpointing="off"), CONFIG_8B, 8, 400.0)
    eflop = {key: found["phases"] * value for key, value in found["eflop_per_phase"].items()}
    assert eflop["rollouts"] == pytest.approx(rollouts, rel=0.15)
    assert eflop["training"] == pytest.approx(training, rel=0.15)
    hours = sum(eflop.values()) * 1e18 / (8 * 400e12) / 3600
    assert found["hours"] == pytest.approx(hours, rel=0.02)


@pytest.mark.parametrize("lora, expected", [("all", 335_544_320), ("paper", 167_772_160)])
def test_parameters_are_those_of_the_modules(lora, expected):
    cfg = make_config(lora=lora)
    total, trainable = llada_cost.count_parameters(cfg, CONFIG_8B)
    with torch.device("meta"):
        model = llada.LLaDA(CONFIG_8B)
    assert total == sum(p.numel() for p in model.parameters()) == 8_015_581_184
    assert trainable == expected
    small = llada.LoRA(toy_llada.SIZE, llada.ADAPTED[lora], cfg.rank, 1.0)
    counted = llada_cost.count_parameters(cfg, toy_llada.SIZE)[1]
    assert counted == sum(p.numel() for p in small.parameters())


def test_memory_counts_the_base_in_bfloat16():
    found = llada_cost.plan(make_config(), CONFIG_8B, 8, 400.0)
    assert found["gb_per_gpu"]["base"] == pytest.approx(2 * 8_015_581_184 / 1e9)
    assert found["gb_per_gpu_total"] == pytest.approx(sum(found["gb_per_gpu"].values()))
    less = llada_cost.plan(make_config(checkpointing="on"), CONFIG_8B, 8, 400.0)
    more = llada_cost.plan(make_config(checkpointing="off"), CONFIG_8B, 8, 400.0)
    assert more["gb_per_gpu"]["activations"] > 5 * less["gb_per_gpu"]["activations"]


def test_the_hours_follow_memory_ends_and_caches():
    """Recomputation is a fourth forward pass; answers that end in the middle cost half; a cache
    cheapens rollouts alone, `dual` more than `prefix`."""

    def plan(gb=80.0, filled=1.0, **more):
        return llada_cost.plan(make_config(**more), CONFIG_8B, 8, 400.0, gb, filled)

    large, small, half = plan(), plan(gb=35.0), plan(filled=0.5)
    assert (large["recomputed"], small["recomputed"]) == (False, True)
    assert large["gb_per_gpu_total"] <= 68 and small["gb_per_gpu_total"] <= 29.75
    training = [found["eflop_per_phase"]["training"] for found in (large, small)]
    assert training[1] == pytest.approx(training[0] * 4 / 3)
    assert half["eflop"] == pytest.approx(large["eflop"] / 2)
    prefix, dual = plan(cache="prefix"), plan(cache="dual")
    rollouts = [found["eflop_per_phase"]["rollouts"] for found in (large, prefix, dual)]
    assert 5 < rollouts[0] / rollouts[1] < 8 and 10 < rollouts[0] / rollouts[2] < 13
    assert dual["eflop_per_phase"]["training"] == pytest.approx(training[0])


def test_a_bench_rolls_out_trains_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    small = {"prompt_length": 20, "gen_length": 8, "block": 8, "steps": 8, "chunk": 4}
    words = [f"--{name}={value}" for name, value in (small | {"batch": 2, "accum": 1}).items()]
    handler = signal.getsignal(signal.SIGTERM)
    llada_cost.main(["--bench", "--out", str(tmp_path), *words])
    assert signal.getsignal(signal.SIGTERM) == handler  # training gives it back
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["step_seconds"] > 0 < written["rollout_seconds"]
    assert written["settings"]["steps_per_h"] == 10
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("{") :])["device"] == "cpu"
    with pytest.raises(ValueError, match="holds a bench already"):
        llada_cost.main(["--bench", "--out", str(tmp_path), *words])


@pytest.mark.parametrize(
    "words, message",
    [
        pytest.param(["--bench", "--h", "3"], "does not depend on --h", id="a count's flag"),
        pytest.param(["--bench", "--gpus", "2"], "belong to the count", id="gpus"),
        pytest.param(["--out", "x"], "goes with --bench", id="a bench's flag"),
        pytest.param(["--gpus", "0"], "must be positive", id="no GPU"),
        pytest.param(["--task", "chess"], "expected one of", id="no task"),
        pytest.param(["--tflops", "0"], "must be positive", id="no rate"),
        pytest.param(["--filled", "2"], "2.0 a share", id="more than all"),
        pytest.param(["--bench", "--filled", "1"], "belong to the count", id="filled"),
    ],
)
def test_no_flag_is_ignored(words, message):
    with pytest.raises(ValueError, match=message):
        llada_cost.main(words)
