"""What the benchmarks of LLaDA share: a base of a scaled shape, what released code does with it,
and variants run in turn in one process.

The shape is Sudoku's, scaled: 8 layers of width 256, prompts of 283 tokens, answers of 64 in blocks
of 8, LoRA of rank 16 on all seven maps. Its V keeps the head's share of the 8B model's work.
"""

import argparse
import contextlib
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import llada_finetune as llada
from dtm import check
from figures import llada_cost, toy_llada

SIZE = toy_llada.SIZE | {"d_model": 256, "n_layers": 8, "mlp_hidden_size": 768, "vocab_size": 8192}
SIZE |= {"mask_token_id": 8191}
PROMPT, ANSWER, BLOCK = 283, 64, 8
SETTINGS = {"task": "bench", "lora": "all", "rank": 16, "alpha": 8.0, "dropout": 0.05}
SETTINGS |= {"gen_length": ANSWER, "block": BLOCK, "steps": 16, "prompt_length": PROMPT}
SETTINGS |= {"prompts": 16, "refresh": 0, "refresh_steps": 0, "chunk": 16, "batch": 4, "accum": 4}
SETTINGS |= {"eval_rows": 0, "temperature": 1.0, "order": "confidence", "c": "1"}


def load_earlier(folder: Path):
    """The llada_finetune.py of a checkout of an earlier revision, on this one's other modules."""
    file = folder / "llada_finetune.py"
    check(file.is_file(), f"{file} is missing; --against takes the checkout of another revision")
    spec = importlib.util.spec_from_file_location("earlier", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_run(module, folder: Path, **more) -> llada.Run:
    """A run of the scaled shape; its adapters are not zero."""
    ranks = module.Ranks()
    if not (folder / "base" / "config.json").exists():
        llada_cost.make_random_base(folder / "base", SIZE, llada.Ranks())
    llada_cost.Bench.length = PROMPT
    settings = SETTINGS | {"model": str(folder / "base"), "out": str(folder / "run")} | more
    rows = llada.TASKS["bench"].rows("train")
    run = module.Run(module.make_config(**settings), ranks, rows, [])
    for i, p in enumerate([*run.student.parameters(), *run.teacher.parameters()]):
        torch.nn.init.normal_(p.data, std=0.02, generator=Generator(p.device).manual_seed(i))
    return run


# ---- What released code computes ----------------------------------------------------------------
def two_products(
    x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float
) -> Tensor:
    """`llada.low_rank` as in huggingface/peft."""
    inner = F.linear(F.dropout(x, dropout), A.to(x.dtype))
    return y + scale * F.linear(inner, B.to(x.dtype))


@contextlib.contextmanager
def peft_products():
    ours = llada.low_rank
    llada.low_rank = two_products
    try:
        yield
    finally:
        llada.low_rank = ours


def released_logits(model: llada.LLaDA, ids: Tensor, start: int) -> Tensor:
    """Every block and the final norm at all positions, the head at those from `start` on."""
    net = model.model["transformer"]
    adapter = model.adapters[model.active]
    half = model.config["d_model"] // model.config["n_heads"] // 2
    cos, sin = llada.angles(ids.shape[1], half, model.config["rope_theta"], ids.device)
    x = net["wte"](ids)
    for i, block in enumerate(net["blocks"]):
        given = (x, cos, sin, None, adapter.block(i))
        if model.checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, *given, use_reentrant=False)
        else:
            x = block(*given)
    return net["ff_out"](net["ln_f"](x)[:, start:])


# ---- Floors -------------------------------------------------------------------------------------
# Seconds of a machine that does nothing but the counted products, at a large product's rate.
def floor_of_answers(cfg: llada.Config, rows: int, filled: float, rate: float) -> float:
    return rows * llada_cost.answer_flop(cfg, SIZE, filled) / rate


def floor_of_step(cfg: llada.Config, recompute: bool, filled: float, rate: float) -> float:
    counted = llada_cost.count_eflop(cfg, SIZE, 1, recompute, filled)["training"]
    return counted * 1e18 / cfg.steps_per_h / rate


# ---- The command --------------------------------------------------------------------------------
def make_parser(about: str, file: str) -> argparse.ArgumentParser:
    """The flags that benchmarks of LLaDA share."""
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    earlier = "checkout of another revision, timed as well"
    parser.add_argument("--against", type=Path, metavar="FOLDER", help=earlier)
    place = f"folder of {file} (default figures)"
    parser.add_argument("--out", type=Path, default=Path("figures"), help=place)
    return parser


def prepare(args: argparse.Namespace) -> None:
    check(args.rounds > 1 and args.threads > 0, "--rounds must be 2 or more, --threads positive")
    torch.set_num_threads(args.threads)


def about(**more) -> dict:
    """Command and machine, for a result's JSON."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    words = {"command": " ".join([f"python -m tests.{Path(sys.argv[0]).stem}", *sys.argv[1:]])}
    words |= {"machine": f"{platform.platform()}, {os.cpu_count()} cores, GPU {gpu}"}
    return words | {"torch": torch.__version__, "threads": torch.get_num_threads()} | more


# ---- Variants in turn ---------------------------------------------------------------------------
def seconds_in_turn(variants: dict[str, Callable], rounds: int, cuda: bool) -> dict[str, list]:
    """Seconds of each variant, one after the other, `rounds` times after one that warms up."""
    found = {name: [] for name in variants}
    for i in tqdm(range(rounds + 1), "rounds", leave=False):
        for name, call in variants.items():
            clock = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
            if i > 0:
                found[name].append(time.perf_counter() - clock)
    return found


def report(found: dict[str, list], baseline: str, floors: dict[str, float]) -> list[dict]:
    """Median seconds, and how many times faster than the baseline: quartiles over rounds. floors:
    the least seconds of a variant, where they were counted."""
    rows = []
    for name, seconds in found.items():
        ratios = [b / s for b, s in zip(found[baseline], seconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        row = {"variant": name, "seconds": statistics.median(seconds)}
        row |= {"times_faster": middle, "quartiles": [low, high], "floor": floors.get(name)}
        rows.append(row)
        share = f"{floors[name] / row['seconds']:.2f} of it counted" if name in floors else ""
        print(f"{row['seconds']:8.3f} s  {middle:6.2f} [{low:.2f}, {high:.2f}]  {name}  {share}")
    return rows
