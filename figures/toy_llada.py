"""A small LLaDA on a laptop: made here, tuned by the loop of the 8B model, drawn.

    python -m figures.toy_llada                                    one run, 9 minutes on 2 cores
    torchrun --nproc_per_node=2 -m figures.toy_llada               the same on two processes
    python -m figures.toy_llada --draw runs/learned-? runs/one-?   the figure of ten runs
    python -m figures.toy_llada --play                             watch two shipped models, 4 s

The task is 4 x 4 Sudoku: the prompt is the puzzle, the completion its 16 digits. The base model has
216,640 parameters and makes mistakes on purpose: in its training data each row of the grid was
solved with probability 0.3, and otherwise filled with its missing digits in ascending order. The
figure's runs, for SEED from 0 to 4; the second one reuses the base model of the first:

    python -m figures.toy_llada --seed SEED --out runs/learned-SEED
    python -m figures.toy_llada --seed SEED --c 1 --model runs/learned-SEED/base --out runs/one-SEED

The same command resumes a run that was stopped.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from pathlib import Path

# Threads that wait for each other spin only briefly, so that one busy core does not stop them all.
# OpenMP reads this when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "300")

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Generator, Tensor, nn
from tqdm import tqdm

import llada_finetune as finetune
from dtm import check, mask_random, mean_over_masked, sample
from figures import command
from llada.checkpoint import read_json, write_file
from llada.decoding import ChatTokenizer, PromptedModel, model_inputs
from llada.distributed import Ranks, run_as_script
from llada.lora import LoRA
from llada.model import CONFIG_8B, LLaDA
from llada.tasks import TASKS, Toy

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
LAZY = 0.7  # probability that a row of a training grid is filled in ascending order


@torch.no_grad()
def init_weights(model: LLaDA, generator: Generator) -> LLaDA:
    """Draw LLaDA's own initial weights ("mitchell") and return the model.

    They are normal, cut at three standard deviations of fan_in^-1/2, which is divided by
    sqrt(2 (layer + 1)) for the projections into the residual stream.
    """
    for name, p in model.named_parameters():
        if p.dim() == 2:
            residual = re.search(r"blocks\.(\d+)\.(attn_out|ff_out)", name)
            scale = math.sqrt(2 * (int(residual[1]) + 1)) if residual else 1
            sd = p.shape[1] ** -0.5 / scale
            nn.init.trunc_normal_(p, 0, sd, -3 * sd, 3 * sd, generator=generator)
    return model


def lazy_grid(row: dict) -> str:
    """Return the grid with the missing digits of each row filled in in ascending order."""
    answer = ""
    for start in range(0, 16, 4):
        line = row["puzzle"][start : start + 4]
        missing = iter(sorted(set("1234") - set(line)))
        for digit in line:
            answer += next(missing) if digit == "0" else digit
    return answer


def save_tokenizer(folder: Path, config: dict) -> None:
    """Write a tokenizer.json of single characters, with the special tokens of the config."""
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
    write_file(folder / "tokenizer.json", tokenizer.to_str(pretty=True))


def encode(texts: list[str], device: torch.device) -> Tensor:
    rows = [[CHARACTERS.index(character) + 2 for character in text] for text in texts]
    return torch.tensor(rows, device=device)


def make_base(folder: Path, seed: int, ranks: Ranks, steps: int = STEPS) -> None:
    """Train the small LLaDA from nothing and save it in the format of the public checkpoint."""
    rows = TASKS["toy"].rows("train")
    prompts = F.pad(encode([row["puzzle"] for row in rows], ranks.device), (1, 0), value=0)
    right = encode([row["solution"] for row in rows], ranks.device)
    lazy = encode([lazy_grid(row) for row in rows], ranks.device)
    model = init_weights(LLaDA(SIZE), Generator().manual_seed(seed)).to(ranks.device)
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
        logits = trained(*model_inputs((prompts[i], None), xt, mask))
        mean_over_masked(F.cross_entropy(logits, x1[mask], reduction="none"), mask).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        schedule.step()
        adam.zero_grad()
    if ranks.rank == 0:
        save_tokenizer(folder, SIZE)
        model.save_pretrained(folder)  # config.json comes last
    ranks.barrier()


# ---- 2. A run -----------------------------------------------------------------------------------
def run_toy(given: dict, ranks: Ranks) -> None:
    """Make the base model unless it is there, tune it, and write the result and its figure."""
    start = time.perf_counter()
    given = {"task": "toy"} | given
    cfg = finetune.make_config(**given)
    if not Path(cfg.out, "config.json").exists():  # a new run
        # The number of rollouts and completions per step is the same for any number of ranks.
        per_rank = {name: Toy.preset[name] // ranks.size for name in ("prompts", "batch")}
        given = per_rank | given
        given["model"] = cfg.model or f"{cfg.out}/base"
        if not (cfg.model or Path(given["model"], "config.json").exists()):
            make_base(Path(given["model"]), cfg.seed, ranks)
    ranks.barrier()  # every rank has looked for the file
    run = finetune.open_run(given, ranks)
    test = finetune.task_rows(run.cfg, "test")

    def score_test(run: finetune.Run) -> None:
        scores = finetune.evaluate_teacher(run, test)
        if scores:
            record = {"phase": run.state.phase, "total": run.state.total, "a": run.state.a}
            run.log.write(kind="eval", split="test", **record, **scores)
            finetune.say(ranks, f"a = {run.state.a:6.2f}        test: {finetune.show(scores)}")

    finetune.train(run, watch=score_test)
    if ranks.rank == 0:
        record = {"minutes": (time.perf_counter() - start) / 60, "torch": torch.__version__}
        finish(run, record | {"threads": torch.get_num_threads(), "ranks": ranks.size})


def finish(run: finetune.Run, record: dict) -> None:
    """Write and print the test score of the phase that the validation rows chose."""
    log = [e for e in read_log(run.out) if e.get("split") == "test"]
    best = log[run.state.best_phase]
    write_file(run.out / "result.json", record | {"test": best})
    draw(collect([run.out]), run.out / "toy.png")
    finetune.say(
        run.ranks,
        f"solved test puzzles: {log[0]['solved']:.3f} before and {best['solved']:.3f} after phase "
        f"{best['phase']}, which the validation puzzles chose; see {run.out / 'toy.png'}",
    )


# ---- 3. The figure ------------------------------------------------------------------------------
NAMES = {"learned": "learned c", "best": "best scalar c"}
KEPT = {  # by the kind of a record
    "step": ("kind", "total", "grad_norm"),
    "eval": ("kind", "split", "phase", "total", "a", "n", "solved", "solved_se", "reward"),
}


def read_log(run: Path) -> list[dict]:
    """Return the records of a run's metrics.jsonl."""
    file = run / "metrics.jsonl"
    check(file.is_file(), f"{file} is missing; name the folder of a run")
    return [json.loads(line) for line in file.read_text().splitlines()]


def collect(runs: list[Path]) -> dict:
    """Return what the figure needs of the runs' folders."""
    found = []
    for run in runs:
        records = read_log(run)
        log = [{k: record[k] for k in KEPT[record["kind"]]} for record in records]
        seconds = [record["seconds"]["rollout"] for record in records if record["kind"] == "step"]
        settings = read_json(run / "config.json")
        more = {"settings": settings, "rollout_seconds": seconds[-1] if seconds else 0.0}
        found.append({"run": run.name, **more, "log": log})
    command = " ".join(["python -m figures.toy_llada", *sys.argv[1:]])
    return {"command": command, "runs": found}


def series(run: dict, key: str, kind: str) -> list[float]:
    """Return a metric along one run: at its test evaluations, or at its optimizer steps."""
    return [e[key] for e in run["log"] if e.get("split", e["kind"]) == kind]


def median_of(runs: list[dict], key: str, kind: str) -> Tensor:
    """Return the median over runs of a metric, up to the end of the shortest run."""
    return torch.tensor([*zip(*[series(run, key, kind) for run in runs], strict=False)]).median(1)[
        0
    ]


def by_arm(result: dict) -> dict[str, list[dict]]:
    """Return the runs of each arm under its name: c, and what differs from the preset."""
    arms = {}
    for run in result["runs"]:
        settings = run["settings"]
        name = NAMES.get(settings["c"], f"c = {settings['c']}")
        if settings.get("replay"):
            name += f", replay {settings['replay']}"
        if settings["prompts"] != Toy.preset["prompts"]:
            name += f", {settings['prompts']} rollouts"
        arms.setdefault(name, []).append(run)
    return arms


def table(result: dict) -> str:
    """Return a Markdown table with one line per arm: means and standard errors over its runs."""
    titles = ("test puzzles solved", "median gradient norm", "seconds of rollouts")
    lines = [f"| arm | runs | {' | '.join(titles)} |", "|---|--:|--:|--:|--:|"]
    for name, runs in by_arm(result).items():
        norms = [float(torch.tensor(series(run, "grad_norm", "step")).median()) for run in runs]
        seconds = [run["rollout_seconds"] for run in runs]
        cells = [name, str(len(runs))]
        for values, digits in ((best_scores(runs), 3), (norms, 3), (seconds, 0)):
            error = torch.tensor(values).std() / len(values) ** 0.5
            cells.append(f"{sum(values) / len(values):.{digits}f} ± {error:.{digits}f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def best_scores(runs: list[dict]) -> list[float]:
    """Return the test score of each run at the phase that its validation rows chose."""
    scores = []
    for run in runs:
        valid, test = series(run, "solved", "valid"), series(run, "solved", "test")
        valid = valid[: len(test)]  # A run in progress may lack the last test score.
        scores.append(test[valid.index(max(valid))])
    return scores


def title_of(result: dict) -> str:
    """Return the claim of the figure where both of its arms are there."""
    arms = by_arm(result)
    if set(arms) != {"learned c", "c = 1"}:
        return "Puzzles solved and norm of the gradient along the run"
    learned, one = [sum(s) / len(s) for s in map(best_scores, (arms["learned c"], arms["c = 1"]))]
    return f"A learned c solves {learned:.0%} of the test puzzles and c = 1 solves {one:.0%}"


def draw(result: dict, path: Path) -> Path:
    """Draw the puzzles solved by phase, and the gradient's norm along the run."""
    figure, (solved, norm) = command.new_figure(columns=2, height=3.4)
    for name, runs in by_arm(result).items():
        look = {"color": command.COLOURS.get(name, "#0072B2"), "lw": 2}
        for run in runs:
            solved.plot(series(run, "solved", "test"), "o", ms=4, alpha=0.4, color=look["color"])
        middle = median_of(runs, "solved", "test")
        solved.plot(middle, label=f"{name}, median of {len(runs)}", **look)
        middle = median_of(runs, "grad_norm", "step")
        window = min(31, len(middle))
        smooth = middle.unfold(0, window, 1).median(1)[0]
        steps = torch.arange(len(smooth)) + window // 2
        norm.plot(steps, smooth, label=name, **look)
    solved.set(xlabel="phase", ylabel="share of the test puzzles solved", ylim=(0, 1.05))
    solved.legend(frameon=False, loc="lower right")
    solved.set_title("Each dot is one run after one phase", fontsize=10)
    norm.set(yscale="log", xlabel="optimizer step", ylabel="gradient norm before clipping")
    norm.set_title("Running median over runs and 31 steps", fontsize=10)
    norm.legend(frameon=False)
    command.save_figure(figure, title_of(result), path)
    return path


# ---- 4. Play ------------------------------------------------------------------------------------
SHIPPED = Path(__file__).parent / "data" / "toy"  # the base model and the best adapter of seed 0


def fill_in(model: LLaDA, tokenizer: ChatTokenizer, puzzle: str) -> list[str]:
    """Return the model's 17 states from masks to a grid, 16 characters each, "_" for a mask.

    As in an evaluation, the most probable digit of the most certain position is filled in next.
    """
    prompt = torch.tensor([tokenizer.prompt(puzzle)])
    mask_id = SIZE["mask_token_id"]
    prompted = PromptedModel(model, (prompt, None), 16, tokenizer.ends)
    blank = torch.full((1, 16), mask_id)
    states = sample(prompted, blank, mask_id, order="low_confidence", temperature=0.0)
    characters = {mask_id: "_"} | {i: character for i, character in enumerate(CHARACTERS, 2)}
    with torch.no_grad():
        return ["".join(characters.get(i, "?") for i in xt[0].tolist()) for xt in states]


def in_rows(digits: str) -> str:
    """Return 16 characters as four rows that are separated by spaces."""
    return " ".join(digits[i : i + 4] for i in range(0, 16, 4))


def wrong_cells(grid: str, solution: str) -> str:
    """Return 16 characters: ^ where a cell is not that of the solution, and else a space."""
    return "".join(
        " " if cell == right else "^" for cell, right in zip(grid, solution, strict=True)
    )


def play(number: int, pause: float) -> None:
    """Print how the base and the tuned model fill in a test puzzle, one line per step.

    number   which of the 256 test puzzles
    pause    the time between two lines, in seconds
    """
    rows = TASKS["toy"].rows("test")
    check(0 <= number < len(rows), f"--play {number} is not a puzzle from 0 to {len(rows) - 1}")
    row, tokenizer = rows[number], ChatTokenizer(SHIPPED / "base")
    model = LLaDA.from_pretrained(SHIPPED / "base", "cpu", torch.float32)
    base = fill_in(model, tokenizer, row["puzzle"])
    model.adapters["tuned"] = LoRA.load(SHIPPED / "best", model.config)
    model.use("tuned")
    tuned = fill_in(model, tokenizer, row["puzzle"])
    print(f"Test puzzle {number}, row by row, 0 is empty: {in_rows(row['puzzle'])}")
    print("Each model writes the whole grid, so it copies the given digits, too.")
    print(f"{'step':>5}   {'base model':21}tuned model")
    for step, states in enumerate(zip(base, tuned, strict=True)):
        print(f"{step:5}   {'  '.join(map(in_rows, states))}", flush=True)
        time.sleep(pause)
    print(f"{'right':>5}   {'  '.join([in_rows(row['solution'])] * 2)}")
    marks = [wrong_cells(states[-1], row["solution"]) for states in (base, tuned)]
    print(f"{'wrong':>5}   {'  '.join(map(in_rows, marks))}".rstrip())
    for name, states in (("base", base), ("tuned", tuned)):
        right, empty = TASKS["toy"].count_right(states[-1], row)
        print(f"The {name} model has {right} of the {empty} empty cells right.")


# ---- 5. Command ---------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="The whole loop on a small LLaDA, for a laptop.", allow_abbrev=False
    )
    text = "only draw the figure of these runs, DIR/toy.png, and write DIR/data/toy.json"
    parser.add_argument("--draw", type=Path, nargs="+", metavar="RUN", help=text)
    text = "watch a base and a tuned model that are in figures/data/toy fill in test puzzle N, "
    text += "0 to 255 (default: 0)"
    parser.add_argument("--play", type=int, nargs="?", const=0, metavar="N", help=text)
    text = "folder for --draw (default: figures)"
    parser.add_argument("--to", type=Path, metavar="DIR", help=text)
    shared = {name: f"{Toy.preset[name]} over all ranks" for name in ("prompts", "batch")}
    own = vars(finetune.Config()) | Toy.preset | shared
    own |= {"model": "made in OUT/base", "out": "runs/toy-SEED"}
    finetune.add_settings(parser, without=("task",), defaults=own)
    given = vars(parser.parse_args(argv))
    runs, folder, puzzle = given.pop("draw"), given.pop("to"), given.pop("play")
    check(runs is None or puzzle is None, "use --draw or --play, not both")
    check(runs is not None or folder is None, "--to goes with --draw")
    trains = runs is None and puzzle is None
    check(trains or not given, "--draw and --play train nothing; leave out the settings")
    if trains:
        run_toy(given, Ranks())
        return
    if puzzle is not None:
        play(puzzle, pause=0.1 if sys.stdout.isatty() else 0.0)
        return
    folder = folder or Path("figures")
    result = collect(runs)
    print(table(result))
    write_file(folder / "data" / "toy.json", json.dumps(result) + "\n")
    print("wrote", draw(result, folder / "toy.png"))


if __name__ == "__main__":
    run_as_script(main)
