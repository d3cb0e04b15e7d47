"""What decoding with kept keys and values (`--cache`) does to a whole run of the small LLaDA.

    python -m figures.cache_study --prompts 768 --batch 128     half an hour and more, 2 cores

Fifteen runs of `figures.toy_llada`: rollouts exact, with the prefix kept, with both sides kept; c
learned, or 0 (exact, both sides); blocks of 4, as with one block of 16 both caches are one. Runs of
a seed share their base; flags that are not named here are the runs'. Validation rows are decoded as
the run is; then every best adapter is scored by exact decoding, those of exact runs by each cache.
Runs are kept in --runs, and the same command goes on with those that were stopped.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

import llada_finetune as llada
import maze_lab as lab
from dtm import check
from figures import files, toy_llada

CACHES = {"off": "exact", "prefix": "prefix kept", "dual": "both sides kept"}
CONTROLS = {"learned": "learned c", "0": "c = 0"}
KINDS = [
    ("off", "learned"),
    ("prefix", "learned"),
    ("dual", "learned"),
    ("off", "0"),
    ("dual", "0"),
]
BLOCK = 4


def command_of(run: Path, seed: int, control: str, cache: str, more: list[str]) -> list[str]:
    words = [sys.executable, "-m", "figures.toy_llada", "--seed", str(seed), "--out", str(run)]
    words += ["--block", str(BLOCK), "--c", control, "--cache", cache, *more]
    base = run.parent / f"off-learned-{seed}" / "base"
    return words if cache == "off" and control == "learned" else [*words, "--model", str(base)]


def run_all(runs: Path, seeds: int, jobs: int, more: list[str]) -> list[dict]:
    """Each run in a process of its own with one thread; the bases first."""
    runs.mkdir(parents=True, exist_ok=True)
    waves = [KINDS[:1], KINDS[1:]]
    bar = tqdm(total=seeds * len(KINDS), unit="run")

    def finish(job: tuple[int, str, str]) -> dict:
        seed, cache, control = job
        run = runs / f"{cache}-{control}-{seed}"
        words = command_of(run, seed, control, cache, more)
        with open(runs / f"{run.name}.log", "w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(words, env=environment, stdout=log, stderr=log)
        check(done.returncode == 0, f"{run} failed; see {runs / run.name}.log")
        bar.update()
        return {"cache": cache, "control": control, "seed": seed} | read_run(run)

    rows = []
    for wave in waves:
        todo = [(seed, *kind) for seed in range(seeds) for kind in wave]
        with ThreadPoolExecutor(jobs) as pool:
            rows += pool.map(finish, todo)
    bar.close()
    return rows


def read_run(run: Path) -> dict:
    """Of the phase that validation rows chose, its test rows decoded as the run is; and of all."""
    test = files.read_json(run / "result.json")["test"]
    log = files.read_log(run)
    scores = [record["solved"] for record in log if record.get("split") == "test"]
    return {"solved": test["solved"], "phase": test["phase"], "by_phase": scores}


def score_by_cache(run: Path, caches: list[str]) -> dict[str, float]:
    """Share of test rows that the run's best adapter solves, decoded in each of these ways."""
    settings = files.read_json(run / "config.json")
    given = {name: settings[name] for name in ("task", "model", "block", "seed")}
    rows = toy_llada.Toy().rows("test")
    judge = llada.Run(llada.make_config(**given, out=str(run)), llada.Ranks(), rows, [])
    judge.model.adapters["teacher"] = llada.LoRA.load(run / "best", judge.model.config)
    found = {}
    for cache in caches:
        judge.cfg = replace(judge.cfg, cache=cache)
        found[cache] = llada.evaluate(judge, rows, judge.cfg.gen_length)["solved"]
    return found


def draw(result: dict, path: Path) -> Path:
    """Left: solved by the run's end. Right: the same adapters, decoded in each way."""
    plt = lab.pyplot()
    figure, (end, scored) = plt.subplots(
        1, 2, figsize=(8.8, 3.4), layout="constrained", sharey=True
    )
    for shift, (control, name) in enumerate(CONTROLS.items()):
        colour = lab.COLOURS[4 - 3 * shift]
        for place, cache in enumerate(CACHES):
            runs = [r for r in result["rows"] if (r["cache"], r["control"]) == (cache, control)]
            label = name if place == 0 else None
            x = [place + 0.2 * shift - 0.1] * len(runs)
            end.plot(x, [r["by_cache"]["off"] for r in runs], "o", ms=5, color=colour, label=label)
    for place, cache in enumerate(CACHES):
        exact = [row["by_cache"] for row in result["rows"] if len(row["by_cache"]) == len(CACHES)]
        shares = [by_cache[cache] for by_cache in exact]
        scored.plot([place] * len(shares), shares, "o", ms=5, color=lab.COLOURS[4])
    names = list(CACHES.values())
    end.set(ylabel="test puzzles solved", xlabel="rollouts of the run", xticks=range(3))
    end.set(ylim=(0.8, 1))
    figure.suptitle("A cache costs the small LLaDA less than its seeds differ")
    scored.set(xlabel="decoding of exactly trained adapters", xticks=range(3))
    for axes in (end, scored):
        axes.set_xticklabels(names)
        axes.set_xlim(-0.5, 2.5)
    end.legend(frameon=False)
    return lab.save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Caches in whole runs of the small LLaDA; other flags go to each run.",
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds, from 0 (default 3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (default 2)")
    runs = "folder of the runs (default runs/cache)"
    parser.add_argument("--runs", type=Path, default=Path("runs/cache"), help=runs)
    to = "figure and JSON, without suffix (default figures/cache_study)"
    parser.add_argument("--to", type=Path, default=Path("figures/cache_study"), help=to)
    args, more = parser.parse_known_args(argv)
    check(args.seeds > 0 and args.jobs > 0, "--seeds and --jobs must be positive")
    rows = run_all(args.runs, args.seeds, args.jobs, more)
    for row in rows:
        exact = (row["cache"], row["control"]) == ("off", "learned")
        run = args.runs / f"{row['cache']}-{row['control']}-{row['seed']}"
        row["by_cache"] = score_by_cache(run, [*CACHES] if exact else ["off"])
    command = " ".join(["python -m figures.cache_study", *sys.argv[1:]])
    result = {"command": command, "block": BLOCK, "rows": rows}
    files.write(args.to.with_suffix(".json"), result)
    print("wrote", draw(result, args.to.with_suffix(".png")))


if __name__ == "__main__":
    llada.run_as_script(main)
