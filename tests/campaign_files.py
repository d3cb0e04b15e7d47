"""Damage of the campaign: files of a checkpoint and of a run, a read-only folder, full disks, two
runs on one folder. The checkpoint before is used and named, or one sentence says what is wrong."""

import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
from pathlib import Path

from figures import files
from tests.campaign_runs import (
    Part,
    Process,
    at_once,
    complaint,
    copied,
    difference,
    picked,
    resumed,
    whole_run,
    with_pid,
)
from tests.loop_helpers import records

DISKS = (0, 4, 8, 40, 104, 160, 200)  # kB; 0 is a read-only one
NAMES = ("config.json", "metrics.jsonl")  # of a run, beside its checkpoints


# ---- 1. Damage ----------------------------------------------------------------------------------
def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def halve(path: Path, _) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path, _) -> None:
    path.write_bytes(b"")


def zeros(path: Path, _) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def remove(path: Path, _) -> None:
    path.unlink()


WAYS = (halve, empty, zeros, flip, remove)


class Damage:
    """Runs that were stopped, damaged and started again, against one that was never stopped."""

    def __init__(self, part: Part, base: Path, folder: Path):
        self.part, self.base, self.folder = part, base, folder
        self.whole, self.stopped = folder / "whole", folder / "stopped"
        self.seconds = whole_run(part, base, self.whole)
        died = Process(base, self.stopped, DIES_AT="14").end()
        part.hold(died == -9, f"a run that dies in step 14: status {died}")

    def checkpoint(self, file: str, how: str, seed: int) -> None:
        """A file of the last checkpoint: the one before is used and named, and nothing differs."""
        [before, last] = files.checkpoints(self.stopped)
        name = f"{how} {last.name}/{file}"
        out = copied(self.stopped, self.folder / name.replace("/", "-"))
        globals()[how](out / last.name / file, random.Random(seed))
        process = Process(self.base, out)
        status = process.end()
        said = process.said()
        named = "is damaged; renamed" in said and f"resumed {out / before.name}:" in said
        good = status == 0 and named and "Traceback" not in said
        self.part.hold(good, f"{name}: status {status}, {said[-300:]}")
        wrong = difference(out, self.whole)
        self.part.hold(not wrong, f"{name}: {wrong}")
        shutil.rmtree(out)

    def of_run(self, name: str, how: str, seed: int) -> None:
        """A file beside the checkpoints: one sentence, or the run goes on to the same weights; then
        the log alone may have lost what was damaged."""
        out = copied(self.stopped, self.folder / f"{how}-{name}")
        globals()[how](out / name, random.Random(seed))
        process = Process(self.base, out)
        wrong, sentence = complaint(process)
        log = ""
        if process.process.returncode == 0:
            wrong = difference(out, self.whole)
            if name == "metrics.jsonl" and wrong.startswith("the log differs"):
                log = f", its log has {process.steps()} of {len(records(self.whole))} records"
                shutil.copy(self.whole / name, out / name)
                wrong = difference(out, self.whole)
            sentence = f"goes on{log}"
        self.part.hold(not wrong, f"{how} {name}: {wrong}")
        with self.part.lock:
            self.part.notes[f"{how} {name}"] = sentence.replace(str(out), "RUN")[:250]
        shutil.rmtree(out)

    def every_checkpoint(self, how: str, seed: int) -> None:
        out = copied(self.stopped, self.folder / f"{how}-all")
        for path in files.checkpoints(out):
            globals()[how](path / "shared.safetensors", random.Random(seed))
        wrong, sentence = complaint(Process(self.base, out))
        good = not wrong and "every checkpoint" in sentence
        self.part.hold(good, f"{how} every checkpoint: {wrong or sentence}")

    # Disks.
    def disk(self, kilobytes: int) -> None:
        """A full one, or (0) a read-only one that holds a run which had been stopped."""
        place = self.folder / f"disk-{kilobytes}"
        if not mounted(place, f"size={kilobytes or 9999}k"):
            self.part.notes["disks"] = "skipped: mount is not permitted"
            return
        try:
            if kilobytes == 0:
                copied(self.stopped, place)
                subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
            what = f"disk of {kilobytes} kB" if kilobytes else "read-only folder"
            wrong, sentence = complaint(Process(self.base, place))
            self.part.hold(not wrong, f"{what}: {wrong}")
            self.part.notes[what] = sentence.replace(str(place), "RUN")[:250]
            subprocess.run(["mount", "-o", "remount,rw,size=9999k", str(place)], check=True)
            wrong = resumed(self.base, place, self.whole)
            self.part.hold(not wrong, f"{what}, then room: {wrong}")
        finally:
            subprocess.run(["umount", "-l", str(place)], check=True)

    # Two runs on one folder.
    def twice(self, reached: int, again: bool) -> None:
        """A second run while the first has `reached` records, in a folder that is new or held a run
        that was stopped: it names the first, which ends as if it had been alone."""
        out = self.folder / f"twice-{reached}-{again}"
        if again:
            copied(self.stopped, out)
        first = Process(self.base, out)
        held = out / ".lock-holder"
        first.wait_for(lambda: held.is_file() and first.steps() >= reached)
        with_pid(first.process.pid, signal.SIGSTOP)  # else it might end before the second looks
        second = Process(self.base, out, name="-second")
        wrong, sentence = complaint(second)
        with_pid(first.process.pid, signal.SIGCONT)
        named = f"process {first.process.pid} on {socket.gethostname()}" in sentence
        words = f"a second run at record {reached}{', resumed' if again else ''}"
        ended = first.end()
        good = not wrong and named and ended == 0
        self.part.hold(good, f"{words}: {wrong or sentence}; the first: status {ended}")
        wrong = difference(out, self.whole)
        self.part.hold(not wrong, f"{words}: the first run: {wrong}")
        self.part.notes["two runs"] = sentence.replace(str(out), "RUN")[:250]
        wrong = resumed(self.base, out, self.whole)  # its lock is gone with it
        self.part.hold(not wrong, f"{words}, then once more: {wrong}")

    def at_the_same_time(self) -> None:
        """Two that start together: one trains, and the other says so."""
        out = self.folder / "together"
        both = [Process(self.base, out, name=f"-{i}") for i in range(2)]
        statuses = sorted(process.end() for process in both)
        said = "".join(process.said() for process in both)
        good = statuses == [0, 1] and said.count("is in use by process") == 1
        self.part.hold(good and "Traceback" not in said, f"two at once: {statuses}, {said[-500:]}")
        wrong = difference(out, self.whole)
        self.part.hold(not wrong, f"two at once: {wrong}")


def mounted(place: Path, options: str) -> bool:
    """Whether a small file system of its own now lies there."""
    place.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
    return subprocess.run(words, capture_output=True).returncode == 0


def damage(part: Part, base: Path, folder: Path, draw: random.Random, size: float) -> None:
    runs = Damage(part, base, folder)
    last = files.checkpoints(runs.stopped)[-1]
    paths = [str(path.relative_to(last)) for path in sorted(last.rglob("*")) if path.is_file()]
    ways = [way.__name__ for way in WAYS]
    share = max(size, 0.15)
    cases = []
    for file, how in picked([*itertools.product(paths, ways)], share, draw):
        cases.append((runs.checkpoint, file, how, draw.randrange(10**6)))
    for name, how in picked([*itertools.product(NAMES, ways)], share, draw):
        cases.append((runs.of_run, name, how, draw.randrange(10**6)))
    for how in picked(["remove", "flip"], share, draw):
        cases.append((runs.every_checkpoint, how, draw.randrange(10**6)))
    for kilobytes in picked([*DISKS], max(size, 0.3), draw):
        cases.append((runs.disk, kilobytes))
    second = [(0, False), (4, False), (20, False), (14, True)]
    for reached, again in picked(second, share, draw):
        cases.append((runs.twice, reached, again))
    cases.append((runs.at_the_same_time,))
    at_once(call_case, cases)


def call_case(call, *arguments: object) -> None:
    call(*arguments)
