"""Ranks of the campaign: the masks and the students of 1 to 4, and one that dies or hangs. As a
script it is a rank that notes its masks and its student, with a time-out of TIMEOUT seconds."""

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path

import llada_finetune as llada
from figures import processes
from tests import loop_helpers
from tests.campaign_runs import Part, Process, at_once, family, with_pid

TIMEOUT = 10  # seconds that ranks wait for one another
MARGIN = 20  # seconds more until all have stopped: torchrun and the ranks have to see it
GRACE = 30  # seconds that torchrun gives a rank that does not react to SIGTERM
SCRIPT = {"script": __file__, "TIMEOUT": str(TIMEOUT)}


# ---- 1. A rank ----------------------------------------------------------------------------------
def short(**_: float) -> timedelta:
    return timedelta(seconds=float(os.environ.get("TIMEOUT", 600)))


def as_rank() -> None:
    masks = []
    mask_blockwise, train = llada.mask_blockwise, llada.train

    def noted(*args):
        xt, mask = mask_blockwise(*args)
        masks.append(hashlib.sha256(mask.numpy().tobytes()).hexdigest())
        return xt, mask

    def trained(run):
        train(run)
        weights = [t.numpy().tobytes() for t in run.student.state_dict().values()]
        found = {"masks": masks, "student": hashlib.sha256(b"".join(weights)).hexdigest()}
        (run.out / f"noted-{run.ranks.rank}.json").write_text(json.dumps(found))

    llada.mask_blockwise, llada.train = noted, trained
    processes.timedelta = short
    llada.TASKS["uneven"] = loop_helpers.Uneven()
    llada.main()


# ---- 2. Ranks that end well ---------------------------------------------------------------------
def masks_and_students(part: Part, base: Path, folder: Path, count: int) -> None:
    out = folder / f"ranks-{count}"
    process = Process(base, out, count, script=__file__)
    part.hold(process.end() == 0, f"{count} ranks: {process.said()[-300:]}")
    noted = [json.loads(path.read_text()) for path in sorted(out.glob("noted-*"))]
    part.hold(len(noted) == count, f"{count} ranks: {len(noted)} ended")
    part.hold(len({n["student"] for n in noted}) == 1, f"{count} ranks: students differ")
    series = {tuple(n["masks"]) for n in noted}
    part.hold(len(series) == count, f"{count} ranks: {len(series)} different series of masks")
    single = [mask for n in noted for mask in set(n["masks"])]
    shared = len(single) - len(set(single))
    part.hold(not shared, f"{count} ranks: {shared} masks of a step are those of another rank")


# ---- 3. One that dies or hangs ------------------------------------------------------------------
def rank_of(pid: int) -> int:
    found = [x for x in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if b"RANK=" in x]
    return int(dict(x.split(b"=", 1) for x in found)[b"RANK"])


class Failing:
    """Ranks of which one gets SIGKILL or SIGSTOP in the middle of a run."""

    def __init__(self, base: Path, out: Path, count: int, torchrun: bool):
        self.out, self.torchrun = out, torchrun
        if torchrun:
            self.processes = [Process(base, out, count, **SCRIPT)]
            return
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
        self.processes = []
        for rank in range(count):
            more = SCRIPT | where | {"RANK": str(rank), "name": f"-{rank}"}
            self.processes.append(Process(base, out, **more))

    def fail(self, victim: int, number: int, reached: int) -> tuple[float, list[int], str]:
        """Seconds until all others have stopped, their statuses and what they said."""
        first = self.processes[0]
        first.wait_for(lambda: first.steps() >= reached)
        limit = TIMEOUT + MARGIN + GRACE * self.torchrun
        workers = [pid for process in self.processes for pid in process.workers()]
        [pid] = [pid for pid in workers if rank_of(pid) == victim]
        others = [p for p in self.processes if self.torchrun or p.process.pid != pid]
        everyone = family(first.process.pid) if self.torchrun else []
        began = time.monotonic()
        with_pid(pid, number)
        statuses = [process.end(limit) for process in others]
        seconds = time.monotonic() - began
        with_pid(pid, signal.SIGKILL)
        left = [pid for pid in everyone[1:] if alive(pid)]
        for process in self.processes:
            process.end(limit)
        for pid in left:
            with_pid(pid, signal.SIGKILL)
        said = "".join(process.said() for process in others)
        return seconds + limit * len(left), statuses, said


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def one_fails(part: Part, base: Path, folder: Path, case: tuple, seed: int) -> None:
    count, torchrun, number = case
    draw = random.Random(seed)
    victim, reached = draw.randrange(count), draw.randrange(1, 20)
    what = "dies" if number == signal.SIGKILL else "hangs"
    words = f"{'torchrun' if torchrun else 'bare'}, rank {victim} of {count} {what}"
    out = folder / words.replace(" ", "-").replace(",", "")
    failing = Failing(base, out, count, torchrun)
    seconds, statuses, said = failing.fail(victim, number, reached)
    limit = MARGIN + (TIMEOUT + GRACE * torchrun if what == "hangs" else 0)
    good = seconds < limit and 0 not in statuses and -signal.SIGKILL not in statuses
    part.hold(good, f"{words}: statuses {statuses} after {seconds:.1f} s")
    named = [x.split(", ") for x in re.findall(r"as rank ([\d, ]+) of \d+ has ended", said)]
    good = named and all(str(victim) in lost for lost in named)
    if torchrun and what == "dies":
        good = good or f"rank      : {victim} " in said
    part.hold(good, f"{words}: its number is not named: {said[-500:]}")
    part.notes[words] = f"{seconds:.1f} s, {statuses}"
    shutil.rmtree(out, ignore_errors=True)


def ranks(part: Part, base: Path, folder: Path, draw: random.Random, size: float) -> None:
    where = (part, base, folder)
    for count in (1, 2) if size < 0.1 else (1, 2, 3, 4):
        masks_and_students(*where, count)
    signals = (signal.SIGKILL, signal.SIGSTOP)
    cases = [*itertools.product((2, 3, 4), (True, False), signals)]
    cases = cases[:4:3] if size < 0.1 else cases
    # Most of the time they wait for a rank that hangs.
    at_once(one_fails, [(*where, case, draw.randrange(10**6)) for case in cases])


if __name__ == "__main__":
    llada.run_as_script(as_rank)
