"""Files of a run, and its checkpoints.

Every file but metrics.jsonl is written under a temporary name and renamed when it is complete, so
that a name always stands for a complete file, even if the process is killed. (A resume truncates
metrics.jsonl.) A checkpoint is a folder that is renamed in the same way:

    RUN/step-0000123/state.json             where the run stands (`State`)
                     shared.safetensors     what all ranks have in common: teacher, optimizer, ...
                     rank0.safetensors ...  each rank's rollouts and random numbers
                     adapter/               the student, in the format of huggingface/peft

The two newest checkpoints are kept. A run resumes from the newest one, on the same number of ranks.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dtm import check
from llada.distributed import Ranks

KEPT = 2  # checkpoints, so that one remains if the newest is damaged


# ---- 1. Files -----------------------------------------------------------------------------------
@contextlib.contextmanager
def explained(message: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of these kinds (default: all) into a ValueError that begins with `message`."""
    kinds = kinds or (Exception,)
    try:
        yield
    except kinds as error:
        detail = " ".join(str(error).split())[:200]
        raise ValueError(f"{message} ({type(error).__name__}: {detail})") from None


def write_file(path: Path, content: dict | str) -> None:
    """Write a dict of tensors if the name ends in .safetensors, else a string as it is or JSON."""
    temporary = path.with_name(f".half-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        tensors = {name: t.detach().contiguous().cpu() for name, t in content.items()}
        save_file(tensors, temporary, metadata={"format": "pt"})
    else:
        text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
        temporary.write_text(text)
    temporary.replace(path)


def read_json(path: Path) -> dict:
    """Return the object in a JSON file; ValueError if it is missing or holds something else."""
    check(path.is_file(), f"{path} is missing; check that the folder is the right one")
    with explained(f"{path} does not hold a JSON object; restore it", ValueError, TypeError):
        return dict(json.loads(path.read_text()))


def read_tensors(path: Path, names: list[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the value of the given tensors (default: all) of a safetensors file."""
    damaged = f"{path} is missing or damaged; restore it or download it again"
    with explained(damaged, SafetensorError, OSError), safe_open(path, framework="pt") as file:
        for name in file.keys() if names is None else names:
            yield name, file.get_tensor(name)


def digest(content: object) -> str:
    """Return the SHA-256 of a JSON value; a run compares it to detect changed rows."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# ---- 2. The state of a run ----------------------------------------------------------------------
@dataclass
class State:
    """Where a run stands. With the tensors of a checkpoint it determines how the run continues."""

    a: float = 0.0  # the teacher's tilt
    h: float = 0.0  # the increment of the present phase
    phase: int = 0  # the number of finished phases
    step: int = 0  # optimizer steps in the present phase
    total: int = 0  # optimizer steps in all phases
    evaluated: bool = False  # whether the base model has been evaluated on the validation rows
    best: float = -1.0  # the largest share of validation rows solved so far ...
    best_phase: int = 0  # ... and the number of finished phases at that time
    log_bytes: int = 0  # the length of metrics.jsonl
    ranks: int = 1  # the number of processes


# ---- 3. Checkpoints -----------------------------------------------------------------------------
def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first."""
    return sorted(path for path in run.glob("step-*") if re.fullmatch(r"step-\d{7}", path.name))


def save_checkpoint(
    run: Path,
    ranks: Ranks,
    *,
    state: State,
    shared: dict[str, Tensor],
    own: dict[str, Tensor],
    save_adapter: Callable[[Path], None],
) -> None:
    """Write the checkpoint of step `state.total` and delete all but the newest two.

    shared        tensors that are equal on all ranks; rank 0 writes them
    own           tensors of this rank
    save_adapter  writes the student's PEFT folder; rank 0 calls it
    """
    folder = run / f"step-{state.total:07}"
    temporary = run / f".half-{folder.name}"
    if ranks.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)  # an earlier process may have died here
    ranks.barrier()
    write_file(temporary / f"rank{ranks.rank}.safetensors", own)
    if ranks.rank == 0:
        write_file(temporary / "shared.safetensors", shared)
        write_file(temporary / "state.json", asdict(state))
        save_adapter(temporary / "adapter")
    ranks.barrier()  # every rank has written its part
    if ranks.rank == 0:
        found = len([*temporary.glob("rank*.safetensors")])
        advice = "all nodes must see one shared --out folder"
        check(found == ranks.size, f"{temporary} holds {found} of {ranks.size} ranks; {advice}")
        # Deleting is slow, so a folder is renamed first: a process that is killed halfway leaves no
        # part of a folder under the name of a checkpoint.
        outdated = [renamed(folder)] if folder.exists() else []  # saved at this step before
        temporary.replace(folder)
        outdated += [renamed(old) for old in checkpoints(run)[:-KEPT]]
        for old in outdated:
            shutil.rmtree(old)
    ranks.barrier()  # no rank leaves before the checkpoint is complete


def renamed(folder: Path) -> Path:
    """Rename a checkpoint so that it no longer counts as one, and return the new name."""
    return folder.replace(folder.with_name(f".half-{folder.name}-outdated"))


def load_checkpoint(run: Path, ranks: Ranks) -> tuple[State, dict, dict, dict] | None:
    """Return state, shared tensors, own tensors and the student's tensors of the newest checkpoint.

    None if there is no checkpoint yet. ValueError names a damaged file, and says how to go back to
    the previous checkpoint.
    """
    if ranks.rank == 0:  # remove what a killed process left behind
        for half in run.glob(".half-step-*"):
            shutil.rmtree(half)
    ranks.barrier()
    newest = max((folder.name for folder in checkpoints(run)), default="step--1")
    step = torch.tensor([int(newest.removeprefix("step-"))], device=ranks.device)
    everywhere = ranks.gather(step).tolist()
    apart = f"the ranks see different checkpoints in {run}: {everywhere}"
    check(len(set(everywhere)) == 1, f"{apart}; wait until the shared folder is up to date")
    if everywhere[0] < 0:
        return None
    folder = run / newest
    advice = "try again; if that fails, delete this folder, and the previous checkpoint is used"
    unreadable = f"the checkpoint {folder} cannot be read; {advice}"
    with explained(unreadable, ValueError, TypeError):
        state = State(**read_json(folder / "state.json"))
        shared = dict(read_tensors(folder / "shared.safetensors"))
        student = dict(read_tensors(folder / "adapter" / "adapter_model.safetensors"))
    message = f"{run} ran on {state.ranks} ranks, but there are {ranks.size} now"
    check(state.ranks == ranks.size, f"{message}; resume with {state.ranks} ranks")
    with explained(unreadable, ValueError):
        own = dict(read_tensors(folder / f"rank{ranks.rank}.safetensors"))
    return state, shared, own, student


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the names prefix + name."""
    return {prefix + name: t for name, t in tensors.items()}


def without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with the prefix, under the rest of their names."""
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
