"""Count what a run on LLaDA-8B costs from its settings: memory, arithmetic and hours.

    python -m figures.llada_cost --task sudoku --gpus 8        counts; needs no weights and no GPU
    python -m figures.llada_cost --bench --out runs/bench      measures, on one rented GPU

The count takes the settings of `llada_finetune.py` and the shape of LLaDA-8B. It assumes that every
prompt has --prompt_length tokens and every completion --gen_length tokens. Completions that end
earlier cost less: --filled gives the share of their blocks that begin before the end. With --ess
the run chooses increments of at most --h, so it needs more phases than are counted. The time that
GPUs wait for each other or for the rewards is not counted.

--tflops is the rate that a GPU attains in this loop, which is less than the peak in its data sheet.
--bench measures it. It makes a model of the same shape with random weights, which takes 16 GB on
disk, and runs one rollout batch and ten optimizer steps of the real loop. Without a GPU it takes
the toy's shape, which only shows that the program works; it has not yet run on a GPU.
"""

import argparse
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Generator

import llada_finetune as finetune
from dtm import check, phases
from figures import toy_llada
from llada.checkpoint import write_file
from llada.distributed import Ranks, run_as_script
from llada.lora import ADAPTED
from llada.model import CONFIG_8B, LLaDA, projection_shape
from llada.tasks import Sudoku

# In this file `cfg` holds the settings of a run and `config` the shape of a model, as in its
# config.json: d is the width, n the number of blocks, mlp the width inside the MLP, and V the
# size of the vocabulary.


# ---- 1. Parameters ------------------------------------------------------------------------------
def block_parameters(config: dict) -> int:
    """Return the number of weights in the linear projections of all blocks."""
    d, mlp = config["d_model"], config["mlp_hidden_size"]
    return config["n_layers"] * (4 * d * d + 3 * d * mlp)


def model_parameters(config: dict) -> int:
    """Return the number of weights of the base model, with its embedding, head and norms."""
    d, n, V = config["d_model"], config["n_layers"], config["vocab_size"]
    return block_parameters(config) + 2 * V * d + (2 * n + 1) * d


def adapter_parameters(cfg: finetune.Config, config: dict) -> int:
    """Return the number of weights of one adapter."""
    widths = [sum(projection_shape(config, name)) for name in ADAPTED[cfg.lora]]
    return config["n_layers"] * cfg.rank * sum(widths)


# ---- 2. Memory ----------------------------------------------------------------------------------
# A run holds the most memory when the backward pass of a micro-batch begins. Rollouts need less:
# beside the weights, a rollout batch of the presets takes 2 to 4 GB.
BYTES = 2  # per number in bfloat16


def count_memory(cfg: finetune.Config, config: dict) -> dict[str, float]:
    """Return GB (10^9 bytes) per GPU at the peak of an optimizer step, by what takes them.

    The count leaves out what one block's backward pass holds for a moment (0.1 to 0.4 GB), the
    CUDA context, workspaces of libraries, and fragmentation. A GPU that is sold with 80 GB has 85
    of these GB.
    """
    trainable = adapter_parameters(cfg, config)
    tokens = cfg.batch * (cfg.prompt_length + cfg.gen_length)
    block_input = BYTES * config["d_model"]
    kept = kept_per_token(cfg, config)
    # With recomputation, every block keeps its input, and one block at a time has all the rest.
    blocks = config["n_layers"]
    per_token = blocks * block_input + kept if cfg.recompute else blocks * kept
    # 16 bytes per logit: student and teacher in bfloat16, and three numbers in float32 in the loss.
    logits = cfg.batch * mean_masks(cfg) * config["vocab_size"]
    held = {
        "base model": BYTES * model_parameters(config),
        # Weights, gradients and two moments in float32, and a copy in bfloat16 for the products.
        "student and AdamW": (4 + 4 + 8 + BYTES) * trainable,
        "teacher": BYTES * trainable,
        "average of students": (4 if cfg.ema else 0) * trainable,
        "activations": tokens * per_token,
        "logits": 16 * logits,
    }
    return {part: count / 1e9 for part, count in held.items()}


def kept_per_token(cfg: finetune.Config, config: dict) -> int:
    """Return how many bytes per token autograd keeps of one block for the backward pass.

    Each norm keeps its input and one more number, in float32. Attention keeps q, k, v and its
    result, and one number per head in float32. The MLP keeps its gate before and after silu, and
    the factor that it gates. An adapted projection keeps its input after dropout, a dropout mask of
    one byte per number, and the product of its input with the adapter's A. With --dropout 0 several
    projections share one input, so that the count is up to 20 % too high.
    """
    d, mlp = config["d_model"], config["mlp_hidden_size"]
    inputs = sum(projection_shape(config, name)[0] for name in ADAPTED[cfg.lora])
    products = cfg.rank * len(ADAPTED[cfg.lora])
    numbers = 4 * d + 3 * mlp + inputs + products
    dropout_masks = inputs if cfg.dropout else 0
    return BYTES * numbers + dropout_masks + 4 * (2 * d + 2 + config["n_heads"])


def mean_masks(cfg: finetune.Config) -> float:
    """Return how many positions of a completion are masked in its active block, on average.

    The head is computed only there.
    """
    return (cfg.block + 1) / 2


# ---- 3. Arithmetic ------------------------------------------------------------------------------
def forward_flop(cfg: finetune.Config, config: dict) -> dict[str, float]:
    """Return the FLOP of a forward pass of one completion and its prompt, by kind of product.

    A product with a matrix of N numbers takes 2 N FLOP per token: N multiplications, N additions.
    """
    d, n, V = config["d_model"], config["n_layers"], config["vocab_size"]
    tokens = cfg.prompt_length + cfg.gen_length
    return {
        "projections": tokens * 2 * block_parameters(config),
        "adapter": tokens * 2 * adapter_parameters(cfg, config),
        "attention": tokens * n * 4 * d * tokens,  # queries with keys, weights with values
        "head": mean_masks(cfg) * 2 * d * V,
    }


def training_flop(cfg: finetune.Config, config: dict) -> float:
    """Return the FLOP of training on one completion: teacher, student, backward pass.

    In the backward pass, a product with frozen weights costs what it costs in the forward pass,
    because only its input has a gradient. A product in the adapter or in attention costs twice as
    much, because both of its factors have one.
    """
    flop = forward_flop(cfg, config)
    forward = sum(flop.values())
    backward = forward + flop["adapter"] + flop["attention"]
    recomputed = forward - flop["head"] if cfg.recompute else 0
    return 2 * forward + backward + recomputed


def completions_per_phase(cfg: finetune.Config, gpus: int) -> int:
    """Return how many completions the teacher samples in a phase, on all GPUs."""
    renewals = (cfg.steps_per_h - 1) // cfg.refresh_steps if cfg.refresh else 0
    return gpus * cfg.completions * (cfg.prompts + renewals * cfg.refresh)


def count_eflop(cfg: finetune.Config, config: dict, gpus: int, filled: float) -> dict[str, float]:
    """Return EFLOP (10^18) of one phase on all GPUs, by part of the loop.

    Blocks after a completion's end are neither decoded nor trained, hence the factor `filled`.
    """
    decoding = filled * cfg.steps * sum(forward_flop(cfg, config).values())
    trained = gpus * cfg.batch * cfg.accum * cfg.steps_per_h
    flop = {
        "rollouts": completions_per_phase(cfg, gpus) * decoding,
        "training": trained * filled * training_flop(cfg, config),
        "validation": cfg.eval_rows * decoding,
    }
    return {part: count / 1e18 for part, count in flop.items()}


def plan(
    cfg: finetune.Config, config: dict, *, gpus: int, tflops: float, filled: float = 1.0
) -> dict:
    """Return what a run costs: parameters, GB per GPU, and EFLOP and hours of its phases.

    gpus    the number of GPUs; each holds the whole model
    tflops  10^12 operations per second that each of them attains
    filled  the mean share of a completion's blocks that begin before its end, in (0, 1]
    """
    check(gpus > 0, f"--gpus {gpus} must be positive")
    check(tflops > 0, f"--tflops {tflops:g} must be positive")
    check(0 < filled <= 1, f"--filled {filled:g} must be a share, above 0 and at most 1")
    count = sum(1 for _ in phases(cfg.a_end, cfg.h))
    memory = count_memory(cfg, config)
    eflop = count_eflop(cfg, config, gpus, filled)
    hours = {part: 1e6 * value / (gpus * tflops * 3600) for part, value in eflop.items()}
    return {
        "parameters": model_parameters(config),
        "trainable": adapter_parameters(cfg, config),
        "GB_per_GPU": memory,
        "GB_per_GPU_in_all": sum(memory.values()),
        "phases": count,
        "steps": count * cfg.steps_per_h,
        "completions": count * completions_per_phase(cfg, gpus),
        "EFLOP_per_phase": eflop,
        "hours_per_phase": hours,
        "hours": count * sum(hours.values()),
    }


# ---- 4. Measured --------------------------------------------------------------------------------
BENCH_STEPS = 10


def bench(cfg: finetune.Config, ranks: Ranks) -> dict:
    """Return seconds, rates and peak memory of one rollout batch and BENCH_STEPS optimizer steps.

    A rate is also given as a share of the rate of a large matrix product, which is the most that
    this machine can reach. The result is written to the file bench.json in the folder cfg.out.
    """
    config = CONFIG_8B if ranks.cuda else toy_llada.SIZE
    settings = bench_settings(cfg)
    make_random_base(Path(settings["model"]), config, ranks)
    add_bench_task(cfg.prompt_length)
    shutil.rmtree(settings["out"], ignore_errors=True)  # an earlier measurement would be resumed
    run = finetune.open_run(settings, ranks)
    if ranks.cuda:
        torch.cuda.reset_peak_memory_stats()  # forget how the weights were made
    finetune.train(run)
    log = [record for record in toy_llada.read_log(run.out) if record["kind"] == "step"]
    since_start = [record["seconds"]["train"] for record in log]
    step = (since_start[-1] - since_start[1]) / (BENCH_STEPS - 2)  # the first two steps warm up
    trained_tokens = cfg.batch * run.cfg.accum * (cfg.prompt_length + cfg.gen_length)
    measured = {  # seconds, tokens
        "rollouts": (log[0]["seconds"]["rollout"], cfg.chunk * cfg.gen_length),
        "training": (BENCH_STEPS * step, BENCH_STEPS * trained_tokens),
    }
    eflop = count_eflop(run.cfg, config, gpus=1, filled=1.0)
    device = torch.cuda.get_device_name() if ranks.cuda else "cpu"
    result = {"device": device, "torch": torch.__version__, "matmul_TFLOP/s": matmul_tflops(ranks)}
    for part, (seconds, tokens) in measured.items():
        rate = 1e6 * eflop[part] / seconds
        shares = {"TFLOP/s": rate, "share_of_matmul": rate / result["matmul_TFLOP/s"]}
        result[part] = {"seconds": seconds, "tokens_per_second": tokens / seconds, **shares}
    result["peak_GB"] = log[-1]["gpu_gb"]
    result["counted_GB"] = sum(count_memory(run.cfg, config).values())
    write_file(Path(cfg.out, "bench.json"), result | {"settings": settings})
    return result


def bench_settings(cfg: finetune.Config) -> dict:
    """Return the settings of a run with one rollout batch, one phase and BENCH_STEPS steps."""
    accum = cfg.chunk // cfg.batch
    check(accum > 0, f"--chunk {cfg.chunk} must be at least --batch {cfg.batch} for --bench")
    changes = {"task": "bench", "model": f"{cfg.out}/base", "out": f"{cfg.out}/run"}
    changes |= {"h": 1.0, "a_end": 1.0, "ess": 0.0, "normalize": "none", "eval_rows": 0}
    changes |= {"prompts": cfg.chunk, "completions": 1, "refresh": 0, "refresh_steps": 0}
    # No completion ends early, so that everything is decoded and trained, as it is counted.
    changes |= {"accum": accum, "steps_per_h": BENCH_STEPS, "past_end": True}
    return asdict(cfg) | changes


def add_bench_task(length: int) -> None:
    """Add the task "bench", whose prompts all have `length` tokens.

    Defining a task makes it known. It is defined in here so that only --bench knows it.
    """

    class Bench(Sudoku):
        def prompt(self, row: dict) -> str:
            return row["puzzle"].ljust(length - 1, "0")  # the tokenizer adds a start token


def make_random_base(folder: Path, config: dict, ranks: Ranks) -> None:
    """Write a checkpoint with random weights and the toy's tokenizer."""
    with ranks.device:
        model = LLaDA(config)
        toy_llada.init_weights(model, Generator(ranks.device).manual_seed(0))
    toy_llada.save_tokenizer(folder, config)
    model.to(ranks.dtype).save_pretrained(folder, files=6)


def matmul_tflops(ranks: Ranks) -> float:
    """Return the rate of a large matrix product, in 10^12 operations per second."""
    size = 8192 if ranks.cuda else 512
    x = torch.randn(size, size, device=ranks.device, dtype=ranks.dtype)
    for _ in range(2):  # the first time warms up
        start = time.perf_counter()
        total = sum((x @ x)[0, 0] for _ in range(20))
        float(total)  # waits for the device
    return 20 * 2 * size**3 / (time.perf_counter() - start) / 1e12


# ---- 5. The command line ------------------------------------------------------------------------
SETTINGS = ("task", "h", "a_end", "steps_per_h", "prompts", "completions", "refresh")
SETTINGS += ("refresh_steps", "chunk", "gen_length", "block", "steps", "prompt_length", "batch")
SETTINGS += ("accum", "ema", "lora", "rank", "dropout", "recompute", "eval_rows")


def main(argv: list[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs (default: 8)")
    text = "TFLOP/s that each GPU attains (default: 400)"
    parser.add_argument("--tflops", type=float, default=400.0, help=text)
    text = "memory of each GPU in GB (default: 80)"
    parser.add_argument("--gpu_gb", type=float, default=80.0, help=text)
    text = "mean share of a completion's blocks that begin before its end (default: 1)"
    parser.add_argument("--filled", type=float, default=1.0, help=text)
    text = "measure on this machine, for which neither these flags nor the schedule matter"
    parser.add_argument("--bench", action="store_true", help=text)
    text = "folder of --bench (default: runs/bench)"
    parser.add_argument("--out", default="runs/bench", help=text)
    finetune.add_settings(parser, only=SETTINGS)
    given = vars(parser.parse_args(argv))
    names = ("gpus", "tflops", "filled", "gpu_gb", "bench")
    gpus, tflops, filled, gpu_gb, measure = (given.pop(name) for name in names)
    cfg = finetune.make_config(**given)
    if measure:
        print_numbers(bench(cfg, Ranks()))
        return
    config = toy_llada.SIZE if cfg.task == "toy" else CONFIG_8B
    found = plan(cfg, config, gpus=gpus, tflops=tflops, filled=filled)
    print(f"{cfg.task} on {gpus} GPUs at {tflops:g} TFLOP/s each\n")
    print_numbers(found)
    total = found["GB_per_GPU_in_all"]
    if total > gpu_gb:
        advice = "add --recompute, or take a smaller --batch with a larger --accum"
        print(f"\n{total:.1f} GB do not fit into the {gpu_gb:g} GB of a GPU: {advice}.")


def print_numbers(numbers: dict, indent: str = "") -> None:
    """Print a line per number, and the numbers of a part below its name."""
    for name, value in numbers.items():
        label = f"{indent}{name.replace('_', ' ')}"
        if isinstance(value, dict):
            print(label)
            print_numbers(value, indent + "  ")
        elif isinstance(value, float):
            print(f"{label:<32}{f'{value:,.2f}' if value >= 1 else f'{value:.2g}':>14}")
        else:
            print(f"{label:<32}{f'{value:,}' if isinstance(value, int) else value:>14}")


if __name__ == "__main__":
    run_as_script(main)
