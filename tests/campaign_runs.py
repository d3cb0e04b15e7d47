"""Runs of the campaign as real processes: killed, damaged, on 1 to 4 ranks. As a script it is a
rank that notes its masks and its student."""

import collections
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import llada_finetune as llada
from figures import files
from tests import loop_helpers
from tests.loop_helpers import TASKS, records

ROOT = Path(__file__).parent.parent
FLAGS = """--task uneven --steps_per_h 8 --a_end 24 --h 9 --ess .4 --c learned --ema .8 --dropout .1
    --refresh 4 --refresh_steps 3 --eval_rows 6""".split()
PHASE, RENEWAL = 8, 3  # steps, as in FLAGS
DISKS = (0, 4, 8, 40, 104, 160, 240)  # kB; 0 is a read-only one
LIMIT = 300  # seconds of a run
DYING = 60  # seconds that ranks have to stop in


class Part:
    """What was tried, how much of it held, and what did not."""

    def __init__(self):
        self.tried = self.held = 0
        self.failures: list[str] = []
        self.notes: dict = {}

    def hold(self, good: object, failure: str) -> None:
        self.tried += 1
        self.held += bool(good)
        if not good:
            self.failures.append(failure[:600])
            if len(self.failures) <= 12:  # the file has them all
                print(f"    FAILED {failure[:300]}", flush=True)


# ---- Runs as processes --------------------------------------------------------------------------
class Process:
    """A `train` command with its output beside its folder, on ranks of torchrun if more than 1."""

    def __init__(self, base: Path, out: Path, ranks: int = 1, *flags: str, **more: str):
        self.out, self.ranks = out, ranks
        self.log = out.with_name(f"{out.name}.log")
        words = [sys.executable]
        if ranks > 1:
            words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        words += [more.pop("script", loop_helpers.__file__), "train", "--model", str(base)]
        more |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with open(self.log, "wb") as log:
            both = {"stdout": log, "stderr": log, "env": os.environ | more}
            self.process = subprocess.Popen([*words, "--out", str(out), *FLAGS, *flags], **both)

    def family(self) -> list[int]:
        """Its process and all that descend from it."""
        children = collections.defaultdict(list)
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = stat.read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            children[int(parent)].append(int(stat.parent.name))
        found = [self.process.pid]
        for pid in found:
            found += children[pid]
        return found

    def workers(self) -> list[int]:
        """The processes that train."""
        return self.family()[1 : self.ranks + 1] if self.ranks > 1 else [self.process.pid]

    def kill(self) -> None:
        """All of it at once, as when the machine goes."""
        for pid in self.family():
            os.kill(pid, signal.SIGKILL)
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
            time.sleep(0.0005)
        return False

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def steps(self) -> int:
        """Records in its log."""
        file = self.out / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.is_file() else 0


def difference(out: Path, whole: Path) -> str:
    """What of a run that ended is not as in the one that was never stopped."""
    names = [path.name for path in files.checkpoints(whole)]
    if [path.name for path in files.checkpoints(out)] != names:
        return f"checkpoints {[path.name for path in files.checkpoints(out)]}, not {names}"
    if records(out) != records(whole):
        return "the log differs"
    for name in (*names, "best"):
        for file in sorted((whole / name).rglob("*.*")):
            twin = out / file.relative_to(whole)
            if not twin.is_file() or twin.read_bytes() != file.read_bytes():
                return f"{file.relative_to(whole)} differs"
    half = [path.name for path in out.glob(".half-step-*")]
    return f"{half[0]} is left" if half else ""


def resumed(base: Path, out: Path, whole: Path, ranks: int = 1) -> str:
    """Ends a run by the same command; what went wrong, if anything."""
    process = Process(base, out, ranks)
    status = process.end()
    return difference(out, whole) if status == 0 else f"status {status}: {process.said()[-300:]}"


# ---- 1. Kills -----------------------------------------------------------------------------------
def moment(out: Path) -> str:
    """Where a killed run stood, by what its folder shows."""
    if not (out / "config.json").is_file():
        return "start"
    if any(out.glob(".half-step-*")):
        return "checkpoint"
    if any(out.glob("best/.half-*")):
        return "best"
    lines = files.read_log(out)
    if not lines:
        return "first evaluation"
    last = lines[-1]
    saved = [int(path.name[5:]) for path in files.checkpoints(out)]
    if not saved:
        return "before the first checkpoint"
    if last["kind"] == "eval":
        return "rollout" if saved[-1] == last["total"] else "boundary"
    step = last["total"] % PHASE
    return "evaluation" if step == 0 else "step or renewal" if step % RENEWAL == 0 else "step"


def kill_once(base: Path, out: Path, ranks: int, delay: float, at_save: bool) -> str:
    """Starts or goes on, kills after a delay (then perhaps at the next save); the moment."""
    process = Process(base, out, ranks)
    due = time.monotonic() + delay
    alive = process.wait_for(lambda: time.monotonic() > due)
    if alive and at_save:
        alive = process.wait_for(lambda: any(out.glob(".half-step-*")))
    if not alive:
        return "ended before"
    process.kill()
    return moment(out)


def kill_often(base: Path, out: Path, ranks: int, delay: float, how: int) -> list[str]:
    """Once, at a save if `how` is 1, twice if it is 2; the moments. What ended before is undone."""
    found: list[str] = []
    while len(found) < (2 if how == 2 else 1):
        found.append(kill_once(base, out, ranks, delay, how == 1))
        if found[-1] == "ended before":
            delay *= 0.9
            found.clear()
            shutil.rmtree(out)
    return found


def kills(part: Part, base: Path, folder: Path, draw: random.Random, size: float) -> None:
    """SIGKILL at random moments, SIGTERM, on 1 and 2 ranks; the same command ends the run."""
    moments = collections.Counter()
    terms = {}
    count = max(2, round(20 * size))
    for ranks in (1, 2):
        whole = folder / f"whole-{ranks}"
        began = time.monotonic()
        process = Process(base, whole, ranks)
        process.wait_for((whole / "config.json").is_file)
        opened = time.monotonic() - began
        part.hold(process.end() == 0, f"{ranks} ranks, never stopped: {process.said()[-300:]}")
        lasted = time.monotonic() - began
        for i in range(count):
            out = folder / f"killed-{ranks}-{i}"
            share = (i + draw.random()) / count
            delay = 0.9 * opened + share * (lasted - 0.9 * opened)
            found = kill_often(base, out, ranks, delay, i % 3)
            moments.update(f"{ranks}: {name}" for name in found)
            wrong = resumed(base, out, whole, ranks)
            part.hold(not wrong, f"{ranks} ranks, kill {i} at {', '.join(found)}: {wrong}")
            shutil.rmtree(out, ignore_errors=True)
        for i in range(max(1, count // 5)):
            terms |= stopped_by_sigterm(part, base, folder / f"term-{ranks}-{i}", whole, draw)
    part.notes = {"moments": dict(sorted(moments.items())), "sigterm_seconds": terms}


def stopped_by_sigterm(
    part: Part, base: Path, out: Path, whole: Path, draw: random.Random
) -> dict[str, float]:
    """Saves and leaves with 143 (torchrun itself: 1), and goes on; the seconds it took."""
    ranks = int(whole.name[-1])
    process = Process(base, out, ranks)
    reached = draw.randrange(1, len(records(whole)) - PHASE)
    process.wait_for(lambda: process.steps() >= reached)
    began = time.monotonic()
    os.kill(draw.choice(process.workers()), signal.SIGTERM)
    status = process.end()
    seconds = round(time.monotonic() - began, 2)
    saved = f"SIGTERM: saved at step {int(files.checkpoints(out)[-1].name[5:])};"
    good = saved in process.said() and (status == 143 if ranks == 1 else "143" in process.said())
    part.hold(good, f"{ranks} ranks, SIGTERM: status {status}, {process.said()[-300:]}")
    wrong = resumed(base, out, whole, ranks)
    part.hold(not wrong, f"{ranks} ranks, SIGTERM at record {reached}: {wrong}")
    return {out.name: seconds}


# ---- 2. Damage ----------------------------------------------------------------------------------
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


def complains(process: Process) -> str:
    """Empty if it ended with status 1 and one sentence; else what it did."""
    status = process.end()
    said = process.said()
    sentence = said.strip().rpartition("\n")[2].rpartition("\r")[2]
    good = status == 1 and "Traceback" not in said and sentence.startswith("loop_helpers: ")
    return "" if good else f"status {status}: {said[-400:]}"


def damage(part: Part, base: Path, folder: Path, draw: random.Random, size: float) -> None:
    """Damaged files of a checkpoint and of a run, a read-only folder, a full disk."""
    whole, stopped = folder / "whole", folder / "stopped"
    Process(base, whole).end()
    Process(base, stopped, DIES_AT="14").end()
    [before, last] = files.checkpoints(stopped)
    paths = [path for path in sorted(last.rglob("*")) if path.is_file()]
    cases = [*itertools.product(paths, (halve, empty, zeros, flip, remove))]
    quick = size < 0.1
    for file, how in cases[:: 6 if quick else 1]:
        name = f"{how.__name__} {file.relative_to(last)}"
        out = shutil.copytree(stopped, folder / "copy", dirs_exist_ok=True)
        how(out / file.relative_to(stopped), draw)
        process = Process(base, out)
        status = process.end()
        said = process.said()
        named = "is damaged; renamed" in said and f"resumed {out / before.name}:" in said
        part.hold(status == 0 and named, f"{name}: status {status}, {said[-300:]}")
        wrong = difference(out, whole)
        part.hold(not wrong, f"{name}: {wrong}")
        shutil.rmtree(out)
    cases = [*itertools.product(("config.json", "metrics.jsonl"), (halve, empty, zeros, flip))]
    for name, how in cases[:: 3 if quick else 1]:
        out = shutil.copytree(stopped, folder / "copy")
        how(out / name, draw)
        process = Process(base, out)
        status = process.end()
        said = process.said().strip().rpartition("\n")[2]
        good = status == 0 or not complains(process)
        part.hold(good, f"{how.__name__} {name}: {process.said()[-400:]}")
        log = f"goes on, its log has {process.steps()} of {len(records(whole))} records"
        part.notes[f"{how.__name__} {name}"] = said[-250:] if status else log
        shutil.rmtree(out)
    disks(part, base, folder, whole, stopped, (0, 4, 40) if quick else DISKS)


def mounted(place: Path, options: str) -> bool:
    """Whether a small file system of its own now lies there."""
    place.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
    return subprocess.run(words, capture_output=True).returncode == 0


def disks(part: Part, base: Path, folder: Path, whole: Path, stopped: Path, sizes: tuple) -> None:
    """Disks that are full at several files of the run, and a read-only one."""
    place = folder / "disk"
    for kilobytes in sizes:
        if not mounted(place, f"size={kilobytes or 9999}k"):
            part.notes["disks"] = "skipped: mount is not permitted"
            return
        try:
            if kilobytes == 0:
                shutil.copytree(stopped, place, dirs_exist_ok=True)
                subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
            what = f"disk of {kilobytes} kB" if kilobytes else "read-only folder"
            wrong = complains(Process(base, place))
            part.hold(not wrong, f"{what}: {wrong}")
            subprocess.run(["mount", "-o", "remount,rw,size=9999k", str(place)], check=True)
            wrong = resumed(base, place, whole)
            part.hold(not wrong, f"{what}, then room: {wrong}")
        finally:
            subprocess.run(["umount", str(place)], check=True)


# ---- 5. Ranks -----------------------------------------------------------------------------------
def as_rank() -> None:
    """A rank of a run that notes the digests of its masks and of its student at the end."""
    masks = []
    mask_blockwise = llada.mask_blockwise

    def noted(*args):
        xt, mask = mask_blockwise(*args)
        masks.append(hashlib.sha256(mask.numpy().tobytes()).hexdigest())
        return xt, mask

    def trained(run):
        train(run)
        weights = [t.numpy().tobytes() for t in run.student.state_dict().values()]
        found = {"masks": masks, "student": hashlib.sha256(b"".join(weights)).hexdigest()}
        (run.out / f"noted-{run.ranks.rank}.json").write_text(json.dumps(found))

    train = llada.train
    llada.mask_blockwise, llada.train = noted, trained
    TASKS["uneven"] = loop_helpers.Uneven()
    llada.main()


def ranks(part: Part, base: Path, folder: Path, draw: random.Random, size: float) -> None:
    """1 to 4 ranks: their masks and students; one that dies."""
    for count in (1, 2, 3, 4):
        out = folder / f"ranks-{count}"
        process = Process(base, out, count, "--a_end", "9", script=__file__)
        part.hold(process.end() == 0, f"{count} ranks: {process.said()[-300:]}")
        noted = [json.loads(path.read_text()) for path in sorted(out.glob("noted-*"))]
        part.hold(len(noted) == count, f"{count} ranks: {len(noted)} ended")
        part.hold(len({n["student"] for n in noted}) == 1, f"{count} ranks: students differ")
        draws = {tuple(n["masks"]) for n in noted}
        part.hold(len(draws) == count, f"{count} ranks: {len(draws)} different series of masks")
    for count, torchrun in itertools.product((2,) if size < 0.1 else (2, 3, 4), (True, False)):
        out = folder / f"dies-{count}-{torchrun}"
        start = torchrun_with_a_death if torchrun else bare_ranks_with_a_death
        seconds, statuses = start(base, out, count, draw)
        words = f"{count} ranks, {'torchrun' if torchrun else 'bare'}, one dies"
        good = seconds < DYING and 0 not in statuses
        part.hold(good, f"{words}: statuses {statuses} after {seconds:.1f} s")
        part.notes[words] = f"{seconds:.1f} s, {statuses}"


def torchrun_with_a_death(base: Path, out: Path, count: int, draw: random.Random) -> tuple:
    """Seconds until all have stopped after one was killed, and torchrun's status."""
    process = Process(base, out, count)
    process.wait_for(lambda: process.steps() > 9)
    family = process.family()
    began = time.monotonic()
    os.kill(draw.choice(process.workers()), signal.SIGKILL)
    statuses = [process.end(DYING)]
    left = [pid for pid in family if Path(f"/proc/{pid}/stat").exists()]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return time.monotonic() - began + DYING * len(left), statuses


def bare_ranks_with_a_death(base: Path, out: Path, count: int, draw: random.Random) -> tuple:
    """The same without torchrun, which would end the others itself; their statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    processes = [Process(base, out, RANK=str(rank), **where) for rank in range(count)]
    processes[0].wait_for(lambda: processes[0].steps() > 9)
    began = time.monotonic()
    processes.pop(draw.randrange(count)).kill()
    statuses = [process.end(DYING) for process in processes]
    return time.monotonic() - began, statuses


if __name__ == "__main__":
    llada.run_as_script(as_rank)
