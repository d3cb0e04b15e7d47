"""What the campaign's parts share: the count of what held, runs as real processes, and what of a
run that ended is not as in one that was never stopped."""

import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from figures import files
from tests import loop_helpers
from tests.loop_helpers import records

ROOT = Path(__file__).parent.parent
# Three phases of 8 steps; checkpoints after steps 3, 6, 8, 9, 12, 15, 16, ...
FLAGS = """--task uneven --steps_per_h 8 --a_end 6 --h 9 --ess .4 --c learned --ema .8 --dropout .1
    --refresh 4 --refresh_steps 3 --eval_rows 6""".split()
LIMIT = 300  # seconds of a run
AT_ONCE = 2  # runs; most of one is the import of torch on one core


class Part:
    """What was tried, how much of it held, and what did not. `tell` gets lines and progress."""

    def __init__(self, expected: int = 1, tell: Callable[[object], None] = print):
        self.tried = self.held = 0
        self.failures: list[str] = []
        self.notes: dict = {}
        self.expected = expected  # of `tried`, for the bar alone
        self.tell = tell
        self.lock = threading.Lock()
        self.told = 0.0

    def hold(self, good: object, failure: str) -> None:
        with self.lock:
            self.tried += 1
            self.held += bool(good)
            if not good:
                self.failures.append(failure[:900])
                if len(self.failures) <= 12:  # the file has them all
                    self.tell(f"    FAILED {failure[:500]}")
            self.progress(self.tried / max(1, self.expected))

    def progress(self, share: float) -> None:
        """How much of the part is done; told once a second."""
        if time.monotonic() > self.told + 1:
            self.told = time.monotonic()
            self.tell(min(1.0, share))

    def row(self) -> dict:
        names = ("tried", "held", "failures", "notes")
        return {name: getattr(self, name) for name in names}


def at_once(call: Callable, cases: Iterable[tuple], limit: int = AT_ONCE) -> None:
    """Calls with each case's arguments, a few at the same time; the first error is raised."""
    with ThreadPoolExecutor(limit) as pool:
        for future in [pool.submit(call, *case) for case in cases]:
            future.result()


# ---- Runs as processes --------------------------------------------------------------------------
def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children = collections.defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        children[int(parent)].append(int(stat.parent.name))
    found = [pid]
    for pid in found:
        found += children[pid]
    return found


class Process:
    """A `train` command with its output beside its folder, on ranks of torchrun if more than 1."""

    def __init__(self, base: Path, out: Path, ranks: int = 1, *flags: str, **more: str):
        self.out, self.ranks = out, ranks
        self.log = out.with_name(f"{out.name}{more.pop('name', '')}.log")
        words = [sys.executable]
        if ranks > 1:
            words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        words += [more.pop("script", loop_helpers.__file__), "train", "--model", str(base)]
        more |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with open(self.log, "wb") as log:
            both = {"stdout": log, "stderr": log, "env": os.environ | more}
            self.process = subprocess.Popen([*words, "--out", str(out), *FLAGS, *flags], **both)

    def workers(self) -> list[int]:
        """The processes that train; of torchrun's not all have been started at first."""
        found = family(self.process.pid)
        return found[1 : self.ranks + 1] if self.ranks > 1 else found[:1]

    def kill(self) -> None:
        """All of it at once, as when the machine goes."""
        for pid in family(self.process.pid):
            with_pid(pid, signal.SIGKILL)
        self.process.wait()

    def end(self, limit: float = LIMIT) -> int:
        """The exit status; a run that takes longer is killed."""
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL

    def wait_for(self, ready: Callable[[], object]) -> bool:
        """Whether it was ready before it ended."""
        while self.process.poll() is None:
            if ready():
                return True
            time.sleep(0.002)
        return False

    def said(self) -> str:
        return self.log.read_text(errors="replace").replace("\r", "\n")

    def steps(self) -> int:
        """Records in its log."""
        file = self.out / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.is_file() else 0


def with_pid(pid: int, number: int) -> None:
    """Sends a signal to a process that may have ended meanwhile."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def settings(out: Path) -> dict:
    """Of a run, but for its own place."""
    return files.read_json(out / "config.json") | {"out": ""}


def difference(out: Path, whole: Path) -> str:
    """What of a run that ended is not as in the one that was never stopped. SIGTERM saves where the
    other run does not, so the checkpoint before the last may be another one."""
    names = [path.name for path in files.checkpoints(out)]
    wanted = [path.name for path in files.checkpoints(whole)]
    if len(names) != 2 or names[-1] != wanted[-1]:
        return f"checkpoints {names}, not {wanted}"
    if records(out) != records(whole):
        return f"the log differs: {len(records(out))} records, {len(records(whole))} in the other"
    if settings(out) != settings(whole):
        return "config.json differs"
    for name in (*{*names} & {*wanted}, "best"):
        found = sorted(path.relative_to(whole) for path in (whole / name).rglob("*"))
        if sorted(path.relative_to(out) for path in (out / name).rglob("*")) != found:
            return f"{name} holds other files"
        for file in found:
            if (whole / file).is_file() and (out / file).read_bytes() != (
                whole / file
            ).read_bytes():
                return f"{file} differs"
    half = [str(path.relative_to(out)) for path in out.rglob(".half-*")]
    return f"{half[0]} is left" if half else ""


def resumed(base: Path, out: Path, whole: Path, ranks: int = 1) -> str:
    """Ends a run by the same command; what went wrong, if anything."""
    process = Process(base, out, ranks)
    status = process.end()
    return difference(out, whole) if status == 0 else f"status {status}: {process.said()[-600:]}"


def whole_run(part: Part, base: Path, out: Path, ranks: int = 1, **more: str) -> float:
    """A run that nothing stops; its seconds."""
    began = time.monotonic()
    process = Process(base, out, ranks, **more)
    part.hold(process.end() == 0, f"{ranks} ranks, never stopped: {process.said()[-600:]}")
    return time.monotonic() - began


def complaint(process: Process) -> tuple[str, str]:
    """What is wrong with how it ended (status 1 and one sentence are right), and the sentence."""
    status = process.end()
    said = process.said()
    sentence = said.strip().rpartition("\n")[2]
    script = Path(loop_helpers.__file__).stem
    good = status == 1 and "Traceback" not in said and sentence.startswith(f"{script}: ")
    return "" if good else f"status {status}: {said[-600:]}", sentence


def copied(source: Path, out: Path) -> Path:
    """A run's folder elsewhere, and no lock of another process there."""
    return shutil.copytree(source, out, ignore=shutil.ignore_patterns(".lock*"), dirs_exist_ok=True)


def picked(cases: list, share: float, draw: random.Random) -> list:
    """Some of the cases, spread over their order; at least one."""
    count = max(1, min(len(cases), round(len(cases) * share)))
    return [cases[int((i + draw.random()) / count * len(cases))] for i in range(count)]


def read_note(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}
