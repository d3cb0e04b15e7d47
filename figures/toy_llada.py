"""A small LLaDA on a laptop: made here, tuned by the loop of the 8B model, drawn.

    python -m figures.toy_llada                                    one run, 7 minutes on 2 cores
    torchrun --nproc_per_node=2 -m figures.toy_llada               the same on two processes
    python -m figures.toy_llada --draw runs/learned-? runs/one-?   the figure of six runs

The task is 4 x 4 Sudoku: the prompt is the puzzle, the answer its 16 digits. The base model has
216,640 parameters and is sloppy: it learned from answers in which a row was solved with chance .3
and otherwise filled with its missing digits in ascending order. The runs of the figure, for SEED
0, 1, 2; the second reuses the first one's base:

    python -m figures.toy_llada --seed SEED --out runs/learned-SEED
    python -m figures.toy_llada --seed SEED --c 1 --model runs/learned-SEED/base --out runs/one-SEED

The same command goes on with a run that was stopped.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Threads that wait for each other spin only briefly, so that a busy core does not stop them all.
# torch reads it when it is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "300")

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Generator, Tensor, nn
from tqdm import tqdm

import llada_finetune as llada
import maze_lab as lab
from dtm import check, mask_random, row_mean
from figures import files
from figures.llada_shape import CONFIG_8B
from figures.tasks import Sudoku


class Toy(Sudoku):
    """Easier puzzles, no instructions; the answer is the 16 digits alone."""

    fewest, most = 4, 10  # empty cells
    preset = {
        "model": "",
        "seed": 0,
        "h": 8.0,
        "a_end": 40.0,
        "ess": 0.5,
        "c": "learned",
        "normalize": "batch",
        "steps_per_h": 60,
        "prompts": 1536,
        "refresh": 0,
        "refresh_steps": 0,
        "chunk": 1536,
        "gen_length": 16,
        "block": 16,
        "steps": 16,
        "temperature": 1.0,
        "order": "state",
        "prompt_length": 17,
        "batch": 256,
        "accum": 1,
        "lr": 3e-3,
        "lr_min": 3e-4,
        "weight_decay": 0.0,
        "rank": 16,
        "alpha": 16.0,
        "dropout": 0.0,
        "checkpointing": "off",
        "save_every": 60,
        "eval_rows": 256,
    }

    def prompt(self, row: dict) -> str:
        return row["puzzle"]

    def digits(self, text: str, find: Callable | None = None) -> str:
        return super().digits(f"<answer>{text}</answer>")


# ---- 1. The base model --------------------------------------------------------------------------
CHARACTERS = "?0123456789+-*/()= "
SIZE = CONFIG_8B | {
    "d_model": 64,
    "n_layers": 4,
    "n_heads": 4,
    "mlp_hidden_size": 192,
    "vocab_size": 24,
    "rope_theta": 1000.0,
    "mask_token_id": 23,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
STEPS, BATCH, RATE = 1600, 128, 4e-3  # of pretraining
LAZY = 0.7  # chance that a row of a training answer is filled lazily


@torch.no_grad()
def init_weights(model: llada.LLaDA, generator: Generator) -> llada.LLaDA:
    """LLaDA's "mitchell": normal cut at 3 sd, sd fan_in^-1/2, over sqrt(2 (layer + 1)) for the maps
    into the stream."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            into_stream = re.search(r"blocks\.(\d+)\.(attn_out|ff_out)", name)
            scale = math.sqrt(2 * (int(into_stream[1]) + 1)) if into_stream else 1
            sd = p.shape[1] ** -0.5 / scale
            nn.init.trunc_normal_(p, 0, sd, -3 * sd, 3 * sd, generator=generator)
    return model


def lazy_answer(row: dict) -> str:
    """Every row of the grid gets its missing digits in ascending order."""
    answer = ""
    for start in range(0, 16, 4):
        line = row["puzzle"][start : start + 4]
        missing = iter(sorted(set("1234") - set(line)))
        for digit in line:
            answer += next(missing) if digit == "0" else digit
    return answer


def save_tokenizer(folder: Path, config: dict) -> None:
    """A tokenizer.json of single characters, special tokens at the ids of the config."""
    special = {
        "<|startoftext|>": 0,
        "<|endoftext|>": config["eos_token_id"],
        "<|mdm_mask|>": config["mask_token_id"],
    }
    ids = special | {character: i for i, character in enumerate(CHARACTERS, 2)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(special))
    files.write(folder / "tokenizer.json", tokenizer.to_str(pretty=True))


def encode(texts: list[str], device: torch.device) -> Tensor:
    rows = [[CHARACTERS.index(character) + 2 for character in text] for text in texts]
    return torch.tensor(rows, device=device)


def make_base(folder: Path, seed: int, ranks: llada.Ranks, steps: int = STEPS) -> None:
    """Trains the small LLaDA from nothing and saves it in the checkpoint's format."""
    rows = llada.TASKS["toy"].rows("train")
    prompts = F.pad(encode([row["puzzle"] for row in rows], ranks.device), (1, 0), value=0)
    right = encode([row["solution"] for row in rows], ranks.device)
    lazy = encode([lazy_answer(row) for row in rows], ranks.device)
    model = init_weights(llada.LLaDA(SIZE), Generator().manual_seed(seed)).to(ranks.device)
    trained = nn.parallel.DistributedDataParallel(model) if ranks.size > 1 else model
    adam = torch.optim.AdamW(model.parameters(), RATE, (0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, RATE, steps, pct_start=0.1)
    noise = {"generator": Generator(ranks.device).manual_seed(ranks.seed(seed))}
    noise["device"] = ranks.device
    bar = tqdm(range(steps), "pretraining", unit="step", disable=ranks.rank > 0)
    for _ in bar:
        i = torch.randint(len(rows), (BATCH // ranks.size,), **noise)
        filled_lazily = (torch.rand(len(i), 4, **noise) < LAZY).repeat_interleave(4, 1)
        x1 = torch.where(filled_lazily, lazy[i], right[i])
        xt, mask = mask_random(x1, SIZE["mask_token_id"], noise["generator"])
        logits = trained(*llada.canvas(prompts[i], None, xt, mask))
        row_mean(F.cross_entropy(logits, x1[mask], reduction="none"), mask).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        schedule.step()
        adam.zero_grad()
    if ranks.rank == 0:
        save_tokenizer(folder, SIZE)
        model.save_pretrained(folder)  # config.json comes last
    ranks.wait()


# ---- 2. A run -----------------------------------------------------------------------------------
def run_toy(given: dict, ranks: llada.Ranks) -> None:
    """Makes the base model unless it is there, tunes it, writes RUN/result.json and RUN/toy.png."""
    start = time.perf_counter()
    share = {name: Toy.preset[name] // ranks.size for name in ("prompts", "batch")}
    given = {"task": "toy"} | given
    cfg = llada.make_config(**given)
    if not Path(cfg.out, "config.json").exists():  # a new run
        given = share | given  # as much in all, whatever the number of ranks
        given["model"] = cfg.model or f"{cfg.out}/base"
        if not (cfg.model or Path(given["model"], "config.json").exists()):
            make_base(Path(given["model"]), cfg.seed, ranks)
    ranks.wait()  # all have looked
    run = llada.open_run(given, ranks)
    test = llada.task_rows(run.cfg, "test")

    def score_test(run: llada.Run) -> None:
        scores = llada.evaluate(run, test, run.cfg.gen_length)
        if scores:
            run.log(kind="eval", split="test", phase=run.state.phase, a=run.state.a, **scores)
            run.say(f"a = {run.state.a:6.2f}  test: {llada.show(scores)}")

    llada.train(run, watch=score_test)
    if ranks.rank == 0:
        record = {"minutes": (time.perf_counter() - start) / 60, "torch": torch.__version__}
        finish(run, record | {"threads": torch.get_num_threads(), "ranks": ranks.size})


def finish(run: llada.Run, record: dict) -> None:
    """The phase that the validation rows chose, on the test rows."""
    log = [e for e in files.read_log(run.out) if e.get("split") == "test"]
    best = log[run.state.best_phase]
    files.write(run.out / "result.json", record | {"test": best})
    draw(collect([run.out]), run.out / "toy.png")
    run.say(
        f"solved, held-out solutions: {log[0]['solved']:.3f} -> {best['solved']:.3f} after phase "
        f"{best['phase']}, which the validation rows chose; see {run.out / 'toy.png'}"
    )


# ---- 3. The figure ------------------------------------------------------------------------------
NAMES = {"learned": "learned c", "best": "best scalar c"}
KEPT = ("kind", "split", "phase", "total", "n", "solved", "solved_se", "cells", "cells_se")
KEPT += ("reward", "a", "ess", "kl", "c", "grad_norm")


def collect(runs: list[Path]) -> dict:
    """What the figure needs of the runs' folders."""
    found = []
    for run in runs:
        log = []
        for record in files.read_log(run):
            log.append({key: value for key, value in record.items() if key in KEPT})
        check(bool(log), f"{run} holds no metrics.jsonl; expected the folder of a run")
        settings = files.read_json(run / "config.json")
        found.append({"run": run.name, "settings": settings, "log": log})
    command = " ".join(["python -m figures.toy_llada", *sys.argv[1:]])
    return {"command": command, "runs": found}


def series(run: dict, key: str, kind: str, by: str) -> tuple[list[float], list[float]]:
    """A metric of one run's log: its records of a kind, evaluations of a split or `step`."""
    records = [e for e in run["log"] if key in e and e.get("split", e["kind"]) == kind]
    return [e[by] for e in records], [e[key] for e in records]


def draw(result: dict, path: Path) -> Path:
    """Left: rows solved, phase by phase. Right: the gradient's norm along the run."""
    plt = lab.pyplot()
    records = sum([run["log"] for run in result["runs"]], [])
    split = "test" if any(record.get("split") == "test" for record in records) else "valid"
    figure, (solved, norm) = plt.subplots(1, 2, figsize=(8.8, 3.4), layout="constrained")
    arms = {}
    for run in result["runs"]:
        arms.setdefault(run["settings"]["c"], []).append(run)
    for place, (kind, runs) in enumerate(arms.items()):
        name = NAMES.get(kind, f"c = {kind}")
        colour = lab.COLOURS[4 - 3 * place % len(lab.COLOURS)]
        for run in runs:
            phases, shares = series(run, "solved", split, by="phase")
            solved.plot(phases, shares, "o-", ms=3, lw=1, color=colour)
            norm.plot(*series(run, "grad_norm", "step", by="total"), lw=0.6, color=colour)
        phases, shares = series(runs[0], "solved", split, by="phase")
        drop = 12 if place == 0 else -22
        end = (phases[-1], shares[-1])
        solved.annotate(name, end, (-40, drop), textcoords="offset points", color=colour)
    solved.set(xlabel="phase", ylabel=f"{split} rows solved", ylim=(0, 1.1))
    norm.set(yscale="log", xlabel="optimiser step", ylabel="gradient norm before clipping")
    if set(arms) == {"learned", "1"}:
        count = min(len(runs) for runs in arms.values())
        claim = "A learned c quiets the gradient and solves more puzzles"
        figure.suptitle(f"{claim} ({count} seeds each)")
    return lab.save_figure(figure, path)


# ---- 4. Command ---------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="The whole loop on a small LLaDA, for a laptop.", allow_abbrev=False
    )
    parser.add_argument("--draw", type=Path, nargs="+", metavar="RUN", help="only draw these runs")
    to = "figure of --draw, without suffix (default figures/toy)"
    parser.add_argument("--to", type=Path, default=None, help=to)
    shared = {name: f"{Toy.preset[name]} over all ranks" for name in ("prompts", "batch")}
    own = vars(llada.Config()) | Toy.preset | shared
    own |= {"model": "made in OUT/base", "out": "runs/toy-SEED"}
    llada.add_settings(parser, without=("task",), own=own)
    given = vars(parser.parse_args(argv))
    runs, to = given.pop("draw"), given.pop("to")
    if runs is None:
        check(to is None, "--to goes with --draw")
        run_toy(given, llada.Ranks())
        return
    check(not given, "--draw trains nothing; leave out the settings")
    to = to or Path("figures/toy")
    result = collect(runs)
    files.write(to.with_suffix(".json"), json.dumps(result) + "\n")
    print("wrote", draw(result, to.with_suffix(".png")))


if __name__ == "__main__":
    llada.run_as_script(main)
