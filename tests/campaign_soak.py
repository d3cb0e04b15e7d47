"""The soak of the campaign: the toy's task in many short phases, minutes long. As a script it is a
run that notes its memory, its open files and its seconds after every step.

Seconds are those of the processor: other parts run beside this one, and would lengthen a clock's.
"""

import os
import random
import shutil
import statistics
import time
from pathlib import Path

import llada_finetune as llada
from figures import toy_llada
from tests.campaign_runs import Part, Process, read_note

FLAGS = """--task toy --steps_per_h 4 --prompts 16 --batch 8 --accum 1 --chunk 16 --h .05 --ess 0
    --a_end 1e6 --eval_rows 8 --save_every 2 --lr 1e-4 --ema .5 --refresh 4 --refresh_steps 2
    --dropout .1 --rank 4 --alpha 4""".split()
PHASE = 4  # steps, as in FLAGS
ROWS = 200  # prompts
WARM = 0.25  # share of the steps before which nothing is judged
GROWTH = 8.0  # MB of memory from the first judged quarter to the last, at most
SLOWER = 1.25  # seconds of a step in the last quarter, in those of the first, at most
LEAVING = 10  # seconds after SIGTERM


def as_run() -> None:
    """One line a step: total, phase, seconds of the processor and of the clock, MB, handles."""
    log_step = llada.Run.log_step
    page = os.sysconf("SC_PAGE_SIZE") / 1e6
    notes = open(os.environ["NOTES"], "w")

    def noted(run, *terms, **more):
        log_step(run, *terms, **more)
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * page
        handles = len(os.listdir("/proc/self/fd"))
        state = (run.state.total, run.state.phase, time.process_time(), time.monotonic())
        print(*state, memory, handles, file=notes, flush=True)

    def few_rows(*which) -> list[dict]:
        """A buffer keeps every prompt that it has met: few, so that it soon has met all."""
        return task_rows(*which)[:ROWS]

    task_rows = llada.task_rows
    llada.Run.log_step, llada.task_rows = noted, few_rows
    llada.TASKS["toy"] = toy_llada.Toy()
    llada.main()


def slope(x: list[float], y: list[float]) -> float:
    return statistics.linear_regression(x, y).slope


def phases(clock: list[float]) -> list[float]:
    """Seconds a step over a whole phase: rollouts, scores and checkpoints belong to it."""
    return [(b - a) / PHASE for a, b in zip(clock, clock[PHASE:], strict=False)]


def judge(part: Part, lines: list[list[float]], seconds: float) -> None:
    total, phase, processor, clock, memory, handles = map(list, zip(*lines, strict=True))
    warm = int(WARM * len(total))
    quarter = len(total) // 4
    growth = statistics.median(memory[-quarter:]) - statistics.median(memory[warm : warm + quarter])
    took = phases(processor)
    first, last = statistics.median(took[:quarter]), statistics.median(took[-quarter:])
    waited = phases(clock)
    part.notes = {
        "minutes": round((clock[-1] - clock[0]) / 60, 2),
        "steps": int(total[-1]),
        "phases": int(phase[-1]),
        "MB after the warm-up": round(memory[warm], 2),
        "MB at the end": round(memory[-1], 2),
        "MB a 1,000 steps": round(1000 * slope(total[warm:], memory[warm:]), 4),
        "MB of growth, quarter to quarter": round(growth, 3),
        "open handles, least and most": [int(min(handles[warm:])), int(max(handles[warm:]))],
        "processor's ms a step, first quarter": round(1000 * first, 2),
        "processor's ms a step, last quarter": round(1000 * last, 2),
        "clock's ms a step, first quarter": round(1000 * statistics.median(waited[:quarter]), 2),
        "clock's ms a step, last quarter": round(1000 * statistics.median(waited[-quarter:]), 2),
        "seconds from SIGTERM to the end": round(seconds, 2),
    }
    part.hold(growth < GROWTH, f"memory grew by {growth:.2f} MB")
    more = max(handles[-quarter:]) - max(handles[warm : warm + quarter])
    part.hold(more <= 0, f"{more} more open handles")
    part.hold(last < SLOWER * first, f"a step took {first:.4f} s, and {last:.4f} s at the end")
    part.hold(seconds < LEAVING, f"SIGTERM: left after {seconds:.1f} s")


def soak(part: Part, base: Path, folder: Path, draw: random.Random, minutes: float) -> None:
    """A run of that many minutes, ended by SIGTERM; then what it left must load."""
    out, notes = folder / "soak", folder / "notes.txt"
    more = {"NOTES": str(notes), "script": __file__}
    flags = [*FLAGS, "--seed", str(draw.randrange(1000))]
    process = Process(base, out, 1, *flags, **more)
    began = time.monotonic()

    def over() -> bool:
        time.sleep(0.5)
        passed = time.monotonic() - began
        part.progress(passed / 60 / minutes)
        return passed > 60 * minutes

    lasted = process.wait_for(over)
    began = time.monotonic()
    process.process.terminate()
    status = process.end()
    seconds = time.monotonic() - began
    ended = f"status {status}: {process.said()[-600:]}"
    part.hold(lasted and status == 143, f"the soak: {ended}")
    lines = [[float(x) for x in line.split()] for line in notes.read_text().splitlines()]
    part.hold(len(lines) > 40, f"the soak: only {len(lines)} steps")
    if len(lines) > 40:
        judge(part, lines, seconds)
        total = read_note(sorted(out.glob("step-*"))[-1] / "state.json").get("total")
        part.hold(total == lines[-1][0], f"the soak: saved {total} of {lines[-1][0]} steps")
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    llada.run_as_script(as_run)
