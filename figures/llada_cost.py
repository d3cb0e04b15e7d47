"""What a run of LLaDA-8B costs, counted before renting and measured on the machine.

    python -m figures.llada_cost --task sudoku --gpus 8      GB, EFLOP and hours, no weights needed
    python -m figures.llada_cost --bench --out runs/bench    one buffer, ten steps on this machine

Counts: a map of n numbers costs 2 n FLOPs a token, a backward pass through the frozen base one
more forward, recomputation another. Every prompt counts as --prompt_length. --tflops is what a GPU
attains, not its data sheet's peak.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Generator

import llada_finetune as llada
from dtm import check, phases
from figures import files, toy_llada
from figures.llada_shape import (
    CONFIG_8B,
    body_parameters,
    count_memory,
    count_parameters,
)
from figures.tasks import Sudoku

# ---- 1. Counted ---------------------------------------------------------------------------------
COUNTED = ("model", "h", "a_end", "steps_per_h", "prompts", "completions", "refresh")
COUNTED += ("refresh_steps", "ema", "lora", "rank", "dropout", "eval_rows", "cache")


def plan(cfg: llada.Config, config: dict, gpus: int, tflops: float) -> dict:
    """Parameters, GB a GPU, EFLOP and hours of a run with settings cfg of a model `config`."""
    check(gpus > 0 and tflops > 0, f"--gpus {gpus} and --tflops {tflops:g} must be positive")
    parameters, trainable = count_parameters(cfg, config)
    eflop = count_eflop(cfg, config, gpus)
    memory = count_memory(cfg, config)
    count = sum(1 for _ in phases(cfg.a_end, cfg.h))
    hours = sum(eflop.values()) * 1e6 / (gpus * tflops * 3600)
    return {
        "parameters": parameters,
        "trainable": trainable,
        "gb_per_gpu": memory,
        "gb_per_gpu_total": sum(memory.values()),
        "phases": count,
        "steps": count * cfg.steps_per_h,
        "answers_per_phase": answers_per_phase(cfg, gpus),
        "eflop_per_phase": eflop,
        "eflop": count * sum(eflop.values()),
        "hours_per_phase": hours,
        "hours": count * hours,
    }


def answers_per_phase(cfg: llada.Config, gpus: int) -> int:
    renewals = (cfg.steps_per_h - 1) // cfg.refresh_steps if cfg.refresh else 0
    return gpus * cfg.completions * (cfg.prompts + renewals * cfg.refresh)


def count_eflop(cfg: llada.Config, config: dict, gpus: int) -> dict[str, float]:
    """Of one phase, on all GPUs."""
    d, n, V = config["d_model"], config["n_layers"], config["vocab_size"]
    tokens = cfg.prompt_length + cfg.gen_length
    masks = (cfg.block + 1) / 2  # of the active block, on average
    products = 2 * (body_parameters(config) + count_parameters(cfg, config)[1])
    forward = tokens * (products + 4 * d * n * tokens) + 2 * d * V * masks
    forwards_a_step = 4 if cfg.checkpointing else 3  # teacher, student, backward, recomputed
    trained = gpus * cfg.batch * cfg.accum * cfg.steps_per_h
    return {
        "rollouts": answers_per_phase(cfg, gpus) * cfg.steps * forward / 1e18,
        "validation": cfg.eval_rows * cfg.steps * forward / 1e18,
        "training": trained * forwards_a_step * forward / 1e18,
    }


# ---- 2. Measured --------------------------------------------------------------------------------
BENCH_SETTINGS = ("chunk", "gen_length", "block", "steps", "prompt_length", "batch", "accum")
BENCH_SETTINGS += ("checkpointing",)


class Bench(Sudoku):
    """Prompts of the full length."""

    length = 0

    def prompt(self, row: dict) -> str:
        return row["puzzle"].ljust(self.length - 1, "0")


def matmul_rate(ranks: llada.Ranks, n: int) -> float:
    """FLOP a second of a large matrix product; the first round warms up."""
    x = torch.randn(n, n, device=ranks.device, dtype=ranks.dtype)
    clocks = []
    for _ in range(3):
        total = sum((x @ x)[0, 0] for _ in range(20))
        float(total)  # waits for the device
        clocks.append(time.perf_counter())
    return 20 * 2 * n**3 / (clocks[2] - clocks[1])


def make_random_base(folder: Path, config: dict, ranks: llada.Ranks) -> None:
    toy_llada.save_tokenizer(folder, config)
    torch.set_default_dtype(ranks.dtype)
    with ranks.device:
        model = llada.LLaDA(config)
        toy_llada.init_weights(model, Generator(ranks.device).manual_seed(0))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, 6)


def bench(cfg: llada.Config, ranks: llada.Ranks) -> dict:
    """The 8B shape with random weights (on a CPU the toy's, to see that it runs): one buffer rolled
    out, ten steps, checkpoint and resume; rates as shares of a large matrix product's."""
    config = CONFIG_8B if ranks.cuda else toy_llada.SIZE
    rate = matmul_rate(ranks, 8192 if ranks.cuda else 512)
    out = Path(cfg.out)
    if not (out / "base" / "config.json").exists():
        make_random_base(out / "base", config, ranks)
    Bench.length = cfg.prompt_length
    settings = {"task": "bench", "model": str(out / "base"), "out": str(out / "run")}
    settings |= {"h": 5.0, "a_end": 5.0, "steps_per_h": 10, "save_every": 5, "eval_rows": 0}
    settings |= {"refresh": 0, "refresh_steps": 0}
    settings["prompts"] = max(cfg.chunk, cfg.batch * cfg.accum)
    for name in BENCH_SETTINGS:
        settings[name] = getattr(cfg, name)
    run = llada.open_run(settings, ranks)
    check(run.state.total == 0, f"{out} holds a bench already; --out another folder")
    llada.train(run)
    again = llada.open_run(settings, ranks)
    pairs = zip(again.student.parameters(), run.student.parameters(), strict=True)
    check(all(torch.equal(p, q) for p, q in pairs), "the resumed adapter differs")
    log = [record for record in files.read_log(run.out) if record["kind"] == "step"]
    rollout = log[-1]["seconds"]["rollout"]
    step = (log[-1]["seconds"]["train"] - log[1]["seconds"]["train"]) / 8  # the first two warm up
    eflop = count_eflop(run.cfg, config, 1)
    answers = run.cfg.prompts * run.cfg.completions
    result = {
        "device": torch.cuda.get_device_name() if ranks.cuda else "cpu",
        "torch": torch.__version__,
        "matmul_tflops": rate / 1e12,
        "rollout_seconds": rollout,
        "answer_tokens_per_s": answers * cfg.gen_length / rollout,
        "rollout_share_of_matmul": eflop["rollouts"] * 1e18 / rollout / rate,
        "step_seconds": step,
        "step_share_of_matmul": eflop["training"] / 10 * 1e18 / step / rate,
        "peak_gb": log[-1]["gpu_gb"],
        "settings": settings,
    }
    files.write(out / "bench.json", result)
    return result


# ---- 3. Command ---------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="GB, EFLOP and hours of a run.", allow_abbrev=False
    )
    parser.add_argument("--gpus", type=int, default=None, help="number of GPUs (default 8)")
    attained = "TFLOP/s that each GPU attains (default 400)"
    parser.add_argument("--tflops", type=float, default=None, help=attained)
    measure = "time this machine instead, one process, with random weights of the 8B shape"
    parser.add_argument("--bench", action="store_true", help=measure)
    flags = ("task", "out", *BENCH_SETTINGS, *COUNTED)
    llada.add_settings(parser, only=flags, own={"out": "runs/bench, of --bench"})
    given = vars(parser.parse_args(argv))
    measured, gpus, tflops = given.pop("bench"), given.pop("gpus"), given.pop("tflops")
    cfg = llada.make_config(**given)
    if measured:
        check(gpus is None and tflops is None, "--gpus and --tflops belong to the count")
        odd = sorted(given.keys() & set(COUNTED))
        check(not odd, f"--bench does not depend on --{', --'.join(odd)}; leave them out")
        result = bench(replace(cfg, out=given.get("out", "runs/bench")), llada.Ranks())
    else:
        check("out" not in given, "--out goes with --bench")
        config = toy_llada.SIZE if cfg.task == "toy" else CONFIG_8B
        if cfg.model and Path(cfg.model).is_dir():
            config = files.read_json(Path(cfg.model) / "config.json")
        config = llada.check_model_config(config)
        result = plan(cfg, config, 8 if gpus is None else gpus, 400.0 if tflops is None else tflops)
    text = json.dumps(result)
    print(json.dumps(json.loads(text, parse_float=four_digits), indent=1))


def four_digits(number: str) -> float:
    return float(f"{float(number):.4g}")


if __name__ == "__main__":
    llada.run_as_script(main)
