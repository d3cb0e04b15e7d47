"""What a run of LLaDA-8B costs, counted before renting and measured on the machine.

    python -m figures.llada_cost --task sudoku --gpus 8      GB, EFLOP and hours, no weights needed
    python -m figures.llada_cost --bench --out runs/bench    one buffer, ten steps on this machine

Counts: a map of n numbers costs 2 n FLOPs a token, a backward pass through the frozen base one
more forward, recomputation another. Every prompt counts as --prompt_length, every answer as long as
--gen_length, unless --filled says which share of its blocks an answer begins before its end: the
others are neither decoded nor trained. --tflops is what a GPU attains, not its data sheet's peak.
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
    choose_pass,
    count_memory,
    count_parameters,
)
from figures.tasks import Sudoku

# ---- 1. Counted ---------------------------------------------------------------------------------
COUNTED = ("model", "h", "a_end", "steps_per_h", "prompts", "completions", "refresh")
COUNTED += ("refresh_steps", "ema", "lora", "rank", "dropout", "eval_rows")


def plan(
    cfg: llada.Config, config: dict, gpus: int, tflops: float, gb: float = 80.0, filled: float = 1.0
) -> dict:
    """Parameters, GB a GPU, EFLOP and hours of a run with settings cfg of a model `config`."""
    check(gpus > 0 and tflops > 0, f"--gpus {gpus} and --tflops {tflops:g} must be positive")
    check(
        gb > 0 and 0 < filled <= 1, f"--gpu_gb {gb:g} must be positive, --filled {filled} a share"
    )
    parameters, trainable = count_parameters(cfg, config)
    batch, recompute = choose_pass(cfg, config, gb)
    memory = count_memory(cfg, config, batch, recompute)
    eflop = count_eflop(cfg, config, gpus, recompute, filled)
    count = sum(1 for _ in phases(cfg.a_end, cfg.h))
    hours = sum(eflop.values()) * 1e6 / (gpus * tflops * 3600)
    return {
        "parameters": parameters,
        "trainable": trainable,
        "answers_a_pass": batch,
        "recomputed": recompute,
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


def forward_flop(cfg: llada.Config, config: dict, computed: int) -> float:
    """Of one answer, `computed` of whose positions run; all are seen. The last block runs keys and
    values there, all else at the active block's masks alone, as do norm and head."""
    d, n, V = config["d_model"], config["n_layers"], config["vocab_size"]
    masks = (cfg.block + 1) / 2  # of the active block, on average
    seen = cfg.prompt_length + cfg.gen_length
    weights = (body_parameters(config) + count_parameters(cfg, config)[1]) / n
    block = 2 * weights + 4 * d * seen
    keys_and_values = 2 * 2 * d * d
    return (n - 1) * computed * block + computed * keys_and_values + masks * (block + 2 * d * V)


def answer_flop(cfg: llada.Config, config: dict, filled: float) -> float:
    """Of decoding an answer, `filled` of whose blocks begin before its end."""
    whole = cfg.prompt_length + cfg.gen_length
    blocks = cfg.gen_length // cfg.block
    total = 0.0
    for i in range(blocks):
        later = {"off": whole, "prefix": cfg.gen_length - i * cfg.block, "dual": cfg.block}
        first = forward_flop(cfg, config, whole)
        rest = (cfg.steps // blocks - 1) * forward_flop(cfg, config, later[cfg.cache])
        total += min(1.0, max(0.0, filled * blocks - i)) * (first + rest)
    return total


def count_eflop(
    cfg: llada.Config, config: dict, gpus: int, recompute: bool, filled: float = 1.0
) -> dict[str, float]:
    """Of one phase, on all GPUs."""
    answer = answer_flop(cfg, config, filled)
    forwards_a_step = 4 if recompute else 3  # teacher, student, backward, recomputed
    trained = gpus * cfg.batch * cfg.accum * cfg.steps_per_h * filled
    forward = forward_flop(cfg, config, cfg.prompt_length + cfg.gen_length)
    return {
        "rollouts": answers_per_phase(cfg, gpus) * answer / 1e18,
        "validation": cfg.eval_rows * answer / 1e18,
        "training": trained * forwards_a_step * forward / 1e18,
    }


# ---- 2. Measured --------------------------------------------------------------------------------
BENCH_SETTINGS = ("chunk", "gen_length", "block", "steps", "prompt_length", "batch", "accum")
BENCH_SETTINGS += ("checkpointing", "compile", "cache", "past_end")


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
    recomputed = run.model.checkpointing
    eflop = count_eflop(run.cfg, config, 1, recomputed)
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
        "counted_gb": sum(count_memory(run.cfg, config, run.batch, recomputed).values()),
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
    memory = "memory of each GPU, GB (default 80)"
    parser.add_argument("--gpu_gb", type=float, default=None, help=memory)
    share = "share of its blocks that an answer begins before its end (default 1)"
    parser.add_argument("--filled", type=float, default=None, help=share)
    measure = "time this machine instead, one process, with random weights of the 8B shape"
    parser.add_argument("--bench", action="store_true", help=measure)
    flags = ("task", "out", *BENCH_SETTINGS, *COUNTED)
    llada.add_settings(parser, only=flags, own={"out": "runs/bench, of --bench"})
    given = vars(parser.parse_args(argv))
    measured = given.pop("bench")
    defaults = {"gpus": 8, "tflops": 400.0, "gpu_gb": 80.0, "filled": 1.0}
    counted = {name: given.pop(name) for name in defaults}
    cfg = llada.make_config(**given)
    if measured:
        odd = [name for name, value in counted.items() if value is not None]
        check(not odd, f"--{', --'.join(odd)} belong to the count, not to --bench")
        odd = sorted(given.keys() & set(COUNTED))
        check(not odd, f"--bench does not depend on --{', --'.join(odd)}; leave them out")
        result = bench(replace(cfg, out=given.get("out", "runs/bench")), llada.Ranks())
    else:
        check("out" not in given, "--out goes with --bench")
        config = toy_llada.SIZE if cfg.task == "toy" else CONFIG_8B
        if cfg.model and Path(cfg.model).is_dir():
            config = files.read_json(Path(cfg.model) / "config.json")
        config = llada.check_model_config(config)
        for name, value in counted.items():
            defaults[name] = defaults[name] if value is None else value
        result = plan(cfg, config, *defaults.values())
    text = json.dumps(result)
    print(json.dumps(json.loads(text, parse_float=four_digits), indent=1))


def four_digits(number: str) -> float:
    return float(f"{float(number):.4g}")


if __name__ == "__main__":
    llada.run_as_script(main)
