"""Files as a run reads and writes them: safetensors, JSON and text, written beside their name and
renamed, so that a name always stands for a whole file; and where a base model's tensors lie.

Every error is one sentence that says what is wrong and what to do."""

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dtm import check
from figures.llada_shape import SIZES, check_model_config


# ---- 1. Any file ---------------------------------------------------------------------------------
@contextlib.contextmanager
def explained(message: str, *kinds: type[Exception]):
    """Says in one sentence what errors of these kinds (none given: all) mean to the user."""
    kinds = kinds or (Exception,)
    try:
        yield
    except kinds as error:
        detail = " ".join(str(error).split())[:80]
        raise ValueError(f"{message} ({type(error).__name__}: {detail})") from None


def write(path: Path, content: dict | str, metadata: dict | None = None) -> None:
    """Tensors (*.safetensors), text, or JSON; beside its name, then renamed. metadata: one pair,
    as safetensors would write two in an order of chance."""
    half = path.with_name(f".half-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        tensors = {name: t.detach().contiguous().cpu() for name, t in content.items()}
        save_file(tensors, half, metadata=metadata or {"format": "pt"})
    elif isinstance(content, str):
        half.write_text(content)
    else:
        half.write_text(json.dumps(content, indent=1) + "\n")
    half.replace(path)


def read_json(path: Path) -> dict:
    check(path.is_file(), f"{path} is missing; is this the right folder?")
    with explained(f"{path} is no JSON object; restore it", ValueError, TypeError):
        return dict(json.loads(path.read_text()))


def digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def file_digest(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def read_tensors(path: Path, names: list[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    with explained(f"{path} is missing or is torn; get it again", SafetensorError, OSError):
        with safe_open(path, framework="pt") as file:
            lost = sorted(set(names or []) - set(file.keys()))
            what = f"{path} lacks {lost[0] if lost else ''}, although the index puts it there"
            check(not lost, f"{what}; download it again")
            for name in names or file.keys():
                yield name, file.get_tensor(name)


# ---- 2. A base model's files --------------------------------------------------------------------
def locate(source: str | Path) -> Path:
    """A folder, or the local copy of a hub id, downloaded on first use."""
    if source and Path(source).is_dir():
        return Path(source)
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)) is not None
    check(hub_id, f"--model {str(source)!r} is no folder and no hub id (OWNER/NAME)")
    from huggingface_hub import snapshot_download

    advice = "check name and network, or pass --model FOLDER of a downloaded copy"
    laptop = "the same loop without one: python -m figures.toy_llada"
    with explained(f"cannot get {source} from the hub: {advice}; {laptop}"):
        wanted = ["*.json", "*.safetensors", "*.py", "*.txt", "*.jinja"]
        files = snapshot_download(str(source), allow_patterns=wanted)
    return Path(files)


def shard_names(folder: Path) -> dict[str, list[str] | None]:
    """File -> names of its tensors, from the index; without one, the single file -> None (all)."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() and not index.exists():
        return {"model.safetensors": None}
    weight_map = read_json(index).get("weight_map")
    good = isinstance(weight_map, dict) and weight_map
    good = good and all(isinstance(file, str) for file in weight_map.values())
    check(bool(good), f"{index} has no valid weight_map; download it again")
    names: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        check((folder / file).is_file(), f"{folder / file} is missing; download it again")
        names.setdefault(file, []).append(name)
    return dict(sorted(names.items()))


def base_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors, one at a time."""
    for file, names in shard_names(folder).items():
        yield from shard_tensors(folder / file, names)


def shard_tensors(file: Path, names: list[str] | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a shard; ValueError: quantised or damaged ones."""
    for name, t in read_tensors(file, names):
        plain = t.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        kind = f"{name} is {str(t.dtype).removeprefix('torch.')}"
        check(plain, f"{file}: {kind}; use an unquantised checkpoint")
        finite = bool(t.isfinite().all())
        check(finite, f"{file}: {name} has non-finite numbers; download it again")
        yield name, t


@functools.cache
def fingerprint(folder: Path) -> str:
    """Of what a base model computes, however its files are cut, and in whichever dtype they hold
    the same numbers."""
    config = check_model_config(read_json(folder / "config.json"))
    sizes = [type(value)(config[key]) for key, value in SIZES.items()]  # 500000 is 500000.0
    total = hashlib.sha256(json.dumps(sizes).encode())
    sums = {}
    for name, t in base_tensors(folder):
        sums[name] = hashlib.sha256(t.float().contiguous().numpy()).hexdigest()
    total.update(json.dumps(sorted(sums.items())).encode())
    return total.hexdigest()


# ---- 3. An adapter's file ------------------------------------------------------------------------
# What adapter_config.json may hold: these values, what changes nothing, and whatever is off.
PLAIN = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False}
HARMLESS = """base_model_name_or_path r lora_alpha lora_dropout target_modules exclude_modules
    task_type inference_mode auto_mapping peft_version megatron_core qalora_group_size""".split()


def check_peft_config(saved: dict, file: str) -> None:
    """An allow-list: an adapter saved with anything else would be read as what it is not."""
    for key, value in saved.items():
        if key == "init_lora_weights":  # pissa, olora and others change the base model as well
            plain = value is True or value is False or value == "gaussian"
        elif key in PLAIN:
            plain = value == PLAIN[key]
        else:
            plain = key in HARMLESS or not value
        check(plain, f"{file}: {key} = {value!r} is not supported; save a plain LoRA adapter")
    check("peft_type" in saved, f"{file} lacks peft_type; is it a PEFT folder?")
    rank, alpha, dropout = (saved.get(key, 0.0) for key in ("r", "lora_alpha", "lora_dropout"))
    check(type(rank) is int and rank > 0, f"{file}: r is {rank!r}, no positive whole number")
    number = type(alpha) in (int, float) and 0 < alpha < math.inf
    check(number, f"{file}: lora_alpha is {alpha!r}, no positive number")
    share = type(dropout) in (int, float) and 0 <= dropout < 1
    check(share, f"{file}: lora_dropout is {dropout!r}, no number in [0, 1)")


# ---- 4. A run's folder ---------------------------------------------------------------------------
MANIFEST = "manifest.json"  # a checkpoint's files and their SHA-256


def checkpoints(out: Path) -> list[Path]:
    """The folders called step-NNNNNNN, in order."""
    found = [path for path in out.glob("step-*") if re.fullmatch(r"step-\d{7}", path.name)]
    return sorted(path for path in found if path.is_dir())


def damaged_file(folder: Path) -> str:
    """The first file that is not as the manifest says; empty if all are."""
    try:
        sums = read_json(folder / MANIFEST)
    except ValueError:
        return MANIFEST
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file() or file_digest(path) != expected:
            return name
    return ""


def read_log(out: Path) -> list[dict]:
    """The records of a run; a killed one may end in half a line."""
    if not (out / "metrics.jsonl").is_file():
        return []
    with explained(f"{out / 'metrics.jsonl'} is damaged; mend or remove it", ValueError):
        lines = (out / "metrics.jsonl").read_text().split("\n")[:-1]
        records = [json.loads(line) for line in lines]
        for record in records:
            good = isinstance(record, dict) and isinstance(record.get("total"), int)
            check(good and "kind" in record, f"no record of a run: {str(record)[:40]}")
        return records


def lock_folder(out: Path) -> FileLock:
    """A lock on the folder of a run, held until it is released or the process ends, however it
    ends. ValueError names the host and the process that hold it."""
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock", is_singleton=True)
    holder = out / ".lock-holder"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        name = holder.read_text() if holder.is_file() else "another process"
        what = f"{out} is in use by {name}, which trains there; wait for it, or stop it"
        raise ValueError(f"{what}, or take another --out") from None
    write(holder, f"process {os.getpid()} on {socket.gethostname()}")
    return lock
