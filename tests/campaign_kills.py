"""Kills of the campaign: SIGKILL and SIGTERM at moments of every kind and at random times. As a
script it is a run that counts its moments and, at the one that MOMENT names, ends there."""

import atexit
import collections
import functools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import llada_finetune as llada
from figures import files
from tests import loop_helpers
from tests.campaign_runs import (
    Part,
    Process,
    at_once,
    difference,
    family,
    read_note,
    resumed,
    whole_run,
    with_pid,
)

FIRST, LATER = "evaluation at a = 0", "evaluation later"
EARLY, AGAIN, ANY = "before the first checkpoint", "resuming", "any time"
TORN = "settings or log half written"
# How many of each kind at full size, for each number of ranks; 20 at named moments and some more.
KILLS = {EARLY: 2, "rollout": 3, "step": 3, "boundary": 3, "checkpoint": 6, FIRST: 1, LATER: 2}
KILLS |= {TORN: 2, AGAIN: 2, ANY: 4}
TERMS = {"rollout": 4, "step": 4, "boundary": 3, "checkpoint": 3, FIRST: 2, LATER: 4, ANY: 3}
OPENING = 12  # moments at least while a run is resumed: its lock, its state, its log
PATIENCE = 10  # seconds from SIGTERM to the end
PASSES = 4  # network evaluations after it: a step's last pass, and the one under way
SCORING = 1  # the same in an evaluation, which has more to come


# ---- 1. A run that ends itself ------------------------------------------------------------------
class Moments:
    """Counts the moments of each kind in this rank. MOMENT is "kind,number,rank,how"; how: `rank`
    kills this process, `machine` all of the run, `term` sends SIGTERM to this process."""

    def __init__(self):
        self.kind, number, rank, self.how = os.environ.get("MOMENT", ",0,0,").split(",")
        self.rank = int(os.environ.get("RANK", 0))
        self.number = int(number) if self.rank == int(rank) else 0
        self.place = "opening"
        self.early = True  # no checkpoint is written or read yet
        self.counts = collections.Counter()
        self.note = {"rank": self.rank}
        self.passes = 0  # network evaluations since SIGTERM

    def write(self) -> None:
        self.note |= {"counts": self.counts, "passes": self.passes, "place": self.place}
        Path(f"{os.environ['NOTES']}-{self.rank}.json").write_text(json.dumps(self.note))

    def reach(self, what: str, spoil: Callable[[], None] | None = None) -> None:
        """A moment. What `spoil` does would be half done when the process is killed here."""
        kinds = [self.place]
        kinds += [EARLY] if self.early else []
        kinds += [TORN] if self.place == "opening" and what.endswith("half written") else []
        for kind in kinds:
            self.counts[kind] += 1
            if kind == self.kind and self.counts[kind] == self.number:
                self.end(what, spoil)

    def end(self, what: str, spoil: Callable[[], None] | None) -> None:
        if spoil and self.how != "term":
            spoil()
        self.note |= {"what": f"{self.place}: {what}", "time": time.time()}
        self.write()
        if self.how == "machine" and "TORCHELASTIC_RUN_ID" in os.environ:
            for pid in family(os.getppid()):
                if pid != os.getpid():
                    with_pid(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGTERM if self.how == "term" else signal.SIGKILL)

    def within(self, owner: object, name: str, place: str = "") -> None:
        """What happens in this function is of this kind; its begin and end are moments."""
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def call(*args, **more):
            before = self.place
            self.place = place or before
            if name == "evaluate":
                self.place = LATER if args[0].state.phase else FIRST
            self.reach(f"{name} begins")
            result = inner(*args, **more)
            self.reach(f"{name} ends")
            if name in ("save", "load"):
                self.early = False
            self.place = before
            return result

        setattr(owner, name, call)

    def watch(self) -> None:
        """Wraps what a run does. A kind holds also for what is called from there."""
        self.within(files, "lock_folder")
        for name in ("load", "mark"):
            self.within(llada.Run, name)
        self.within(llada.Run, "fill_buffer", "rollout")
        self.within(llada.Buffer, "fill")
        self.within(llada, "optimiser_step", "step")
        self.within(llada.Run, "log_step")
        self.within(llada.Run, "end_phase", "boundary")
        self.within(llada, "score_phase", "boundary")
        self.within(llada, "evaluate")
        self.within(llada.Run, "save", "checkpoint")
        self.within(llada.Run, "keep_best", "checkpoint")
        llada.LLaDA.forward = self.counting_passes(llada.LLaDA.forward)
        llada.Run.log = self.counting_lines(llada.Run.log)
        Path.replace = self.counting_renames(Path.replace)
        shutil.rmtree = self.counting_removals(shutil.rmtree)

    def counting_passes(self, inner: Callable) -> Callable:
        def forward(model, *args, **more):
            self.reach("network evaluation")
            self.passes += "time" in self.note
            return inner(model, *args, **more)

        return forward

    def counting_lines(self, inner: Callable) -> Callable:
        def log(run, **record):
            def half_a_line() -> None:
                with open(run.out / "metrics.jsonl", "a") as file:
                    file.write('{"kind": "step", "phase": 1, "seco')

            self.reach("half a line of the log", half_a_line if self.rank == 0 else None)
            inner(run, **record)
            self.reach("a line of the log is written")

        return log

    def counting_renames(self, inner: Callable) -> Callable:
        def replace(path: Path, target: Path) -> Path:
            name = path.name.removeprefix(".half-")
            if path.is_file():
                torn = functools.partial(os.truncate, path, path.stat().st_size // 2)
                self.reach(f"{name} half written", torn)
            self.reach(f"{name} before its rename")
            result = inner(path, target)
            self.reach(f"{name} after its rename")
            return result

        return replace

    def counting_removals(self, inner: Callable) -> Callable:
        def rmtree(path: Path, *args, **more) -> None:
            def first_file() -> None:
                """The manifest, without which a folder does not count."""
                (Path(path) / files.MANIFEST).unlink(missing_ok=True)

            if Path(path).is_dir():
                self.reach(f"{Path(path).name} half removed", first_file)
                inner(path, *args, **more)

        return rmtree


def as_run() -> None:
    moments = Moments()
    moments.watch()
    atexit.register(moments.write)
    llada.TASKS["uneven"] = loop_helpers.Uneven()
    llada.main()


# ---- 2. Cases -----------------------------------------------------------------------------------
def plan(kinds: dict[str, int], size: float, counts: list[dict], draw: random.Random) -> list:
    """(kind, number of the moment, rank) of each case, spread evenly over a kind's moments."""
    cases = []
    for kind, most in kinds.items():
        many = max(1, round(most * size))
        for i in range(many):
            rank = 0 if kind == TORN else (i + draw.randrange(2)) % len(counts)
            share = (i + draw.random()) / many
            where = "step" if kind in (AGAIN, ANY) else kind
            number = 1 + int(share * counts[rank][where])
            if kind in (FIRST, LATER) and i % 2 == 0:  # in the first half of an evaluation
                length = counts[rank][FIRST]
                number -= (number - 1) % length - draw.randint(1, length // 2)
            cases.append((kind, number, rank))
    return cases


class Case:
    """One run that is stopped, and goes on by the same command."""

    def __init__(self, part: Part, base: Path, whole: Path, seconds: float, name: str):
        self.part, self.base, self.whole, self.seconds = part, base, whole, seconds
        self.ranks = int(whole.name[-1])
        self.out = whole.with_name(name)
        self.draw = random.Random(name)
        self.words = f"{self.ranks} ranks, {name}"

    def start(self, moment: str) -> Process:
        more = {"MOMENT": moment, "NOTES": str(self.out), "script": __file__}
        return Process(self.base, self.out, self.ranks, **more)

    def noted(self, rank: int = 0) -> dict:
        return read_note(Path(f"{self.out}-{rank}.json"))

    def goes_on(self, where: str) -> None:
        wrong = resumed(self.base, self.out, self.whole, self.ranks)
        self.part.hold(not wrong, f"{self.words} at {where}: {wrong}")
        shutil.rmtree(self.out, ignore_errors=True)

    def count(self, signal_name: str, where: str) -> None:
        moments = self.part.notes.setdefault(f"{signal_name}, {self.ranks} ranks", {})
        moments[where] = moments.get(where, 0) + 1

    def kill(self, kind: str, number: int, rank: int) -> None:
        """SIGKILL of the machine, or of one rank, whose death torchrun sees."""
        how = "rank" if self.ranks == 2 and self.draw.random() < 0.3 else "machine"
        if kind == ANY:
            where = self.kill_any_time()
        else:
            where = self.kill_at(f"{'step' if kind == AGAIN else kind},{number},{rank},{how}", rank)
        if kind == AGAIN:
            again = f"opening,{self.draw.randint(1, OPENING)},0,machine"
            again = again if rank or number % 2 else f"{TORN},2,0,machine"  # the log
            where += f", then {self.kill_at(again, 0)}"
        with self.part.lock:
            self.count("SIGKILL", kind)
        self.goes_on(where)

    def kill_at(self, moment: str, rank: int) -> str:
        Path(f"{self.out}-{rank}.json").unlink(missing_ok=True)
        process = self.start(moment)
        status = process.end()
        where = self.noted(rank).get("what", "")
        good = status != 0 and where
        self.part.hold(good, f"{self.words}, {moment}: status {status}, {process.said()[-300:]}")
        return where

    def kill_any_time(self) -> str:
        delay = self.draw.random() * self.seconds
        process = self.start(",0,0,")
        began = time.monotonic()
        process.wait_for(lambda: time.monotonic() > began + delay)
        process.kill()
        return f"{delay:.2f} s"

    def terminate(self, kind: str, number: int, rank: int) -> None:
        """SIGTERM: saves, and leaves with 143 (of torchrun: 1) within seconds."""
        if kind == ANY:
            where = self.terminate_any_time()
        else:
            where = self.terminate_at(f"{kind},{number},{rank},term", rank)
        with self.part.lock:
            self.count("SIGTERM", kind)
        self.goes_on(where)

    def terminate_at(self, moment: str, rank: int) -> str:
        process = self.start(moment)
        status = process.end()
        note, said = self.noted(rank), process.said()
        where, words = note.get("what", ""), f"{self.words}, {moment}, {note.get('what')}"
        good = status == 143 if self.ranks == 1 else "exitcode  : 143" in said
        last = note.get("passes") == 0 and "done: a =" in said
        done = status == 0 and last  # it came when nothing was left to do
        ended = f"status {status}, {said[-300:]}"
        self.part.hold(where and (good or done), f"{words}: {ended}")
        saved = [int(path.name[5:]) for path in files.checkpoints(self.out)][-1:]
        good = saved and f"SIGTERM: saved at step {saved[0]};" in said
        self.part.hold(good or done, f"{words}: the last checkpoint is {saved}, {ended}")
        self.took(words, time.time() - note.get("time", 0))
        passes = note.get("passes", 99)
        most = SCORING if moment.startswith("evaluation") else PASSES
        late = f"{words}: {passes} network evaluations after SIGTERM"
        self.part.hold(passes <= most, late)
        return where

    def took(self, words: str, seconds: float) -> None:
        self.part.hold(seconds < PATIENCE, f"{words}: left after {seconds:.1f} s")
        with self.part.lock:
            name = f"longest seconds after SIGTERM, {self.ranks} ranks"
            longest = self.part.notes.get(name, 0)
            self.part.notes[name] = round(max(seconds, longest), 2)

    def terminate_any_time(self) -> str:
        """A rank or torchrun itself, at a random time; before the loop nothing is saved."""
        delay = self.draw.random() * self.seconds
        process = self.start(",0,0,")
        began = time.monotonic()
        process.wait_for(lambda: time.monotonic() > began + delay)
        whom = self.draw.choice([process.process.pid, *process.workers()])
        began = time.monotonic()
        with_pid(whom, signal.SIGTERM)
        status = process.end()
        self.took(f"{self.words} after {delay:.2f} s", time.monotonic() - began)
        known = status in (143, -signal.SIGTERM, 0) if self.ranks == 1 else status in (0, 1, -15)
        self.part.hold(known, f"{self.words} after {delay:.2f} s: status {status}")
        return f"{delay:.2f} s"


def kills(part: Part, base: Path, folder: Path, draw: random.Random, size: float) -> None:
    """SIGKILL and SIGTERM at moments of every kind, on 1 and 2 ranks."""
    for ranks in (1, 2):
        whole = folder / f"whole-{ranks}"
        notes = {"NOTES": str(whole), "script": __file__}
        seconds = whole_run(part, base, whole, ranks, **notes)
        plain = folder / f"plain-{ranks}"
        whole_run(part, base, plain, ranks)
        wrong = difference(plain, whole)
        part.hold(not wrong, f"{ranks} ranks, two whole runs: {wrong}")
        counts = [read_note(Path(f"{whole}-{rank}.json"))["counts"] for rank in range(ranks)]
        part.notes[f"moments of a run, {ranks} ranks"] = counts[0]
        cases = []
        for name, kinds in (("kill", KILLS), ("term", TERMS)):
            for i, moment in enumerate(plan(kinds, size, counts, draw)):
                case = Case(part, base, whole, seconds, f"{name}-{ranks}-{i}")
                cases.append((case.kill if name == "kill" else case.terminate, *moment))
        if size < 0.1 and ranks == 2:
            cases = cases[::3]
        at_once(call_case, cases)


def call_case(call: Callable, *moment: object) -> None:
    call(*moment)


if __name__ == "__main__":
    llada.run_as_script(as_run)
