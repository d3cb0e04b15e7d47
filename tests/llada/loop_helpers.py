"""The tests of the loop share a tiny base model, a small task, and runs that are stopped.

As a script under torchrun this file is llada_finetune.py with the small task. The environment
variable RANK_1 holds the moment at which rank 1 receives a signal; see `signal_before`.
"""

import json
import multiprocessing
import os
import random
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Generator, Tensor
from torch.testing import assert_close
from tqdm import tqdm

import llada_finetune as finetune
from figures import toy_llada
from llada.checkpoint import checkpoints, read_json
from llada.decoding import generate
from llada.distributed import Ranks, run_as_script
from llada.model import LLaDA
from llada.tasks import TASKS, Task

torch.set_num_threads(1)
SIZE = toy_llada.SIZE | {"d_model": 32, "n_layers": 1, "n_heads": 2, "mlp_hidden_size": 48}
# What a process would do at first use is done at import, once for all processes of `exit_codes`.
with torch.device("meta"):
    LLaDA(SIZE)
tqdm.get_lock()
V, MASK, END = SIZE["vocab_size"], SIZE["mask_token_id"], SIZE["eos_token_id"]


# ---- 1. A task and a base model ------------------------------------------------------------------
class Uneven(Task):
    """Prompts of several lengths. The reward counts the characters that stand in the prompt."""

    top = 2.0
    generated = True
    columns = {"letters": ("letters",)}
    preset = {"h": 4.0, "a_end": 8.0, "steps_per_h": 4, "save_every": 3, "eval_rows": 4}
    preset |= {"prompts": 16, "refresh": 0, "refresh_steps": 0, "batch": 4, "accum": 2}
    preset |= {"chunk": 5, "gen_length": 16, "block": 8, "steps": 8, "temperature": 1.0}
    preset |= {"lr": 0.01, "rank": 4, "alpha": 8.0, "dropout": 0.0}

    def rows(self, split: str) -> list[dict]:
        draw = random.Random(split)
        lengths = draw.choices(range(3, 10), k={"train": 80, "valid": 8, "test": 7}[split])
        return [{"letters": "".join(draw.choices("0123456789+-*/", k=k))} for k in lengths]

    def prompt(self, row: dict) -> str:
        return row["letters"]

    def cells(self, text: str, row: dict) -> tuple[int, int]:
        return sum(character in row["letters"] for character in text), len(text)

    def reward(self, text: str, row: dict) -> float:
        return min(self.top, (self.cells(text, row)[0] - 1) / 7.5)

    def correct(self, text: str, row: dict) -> bool:
        return self.cells(text, row)[0] >= 4


TASKS.pop("uneven")  # only `small_base` registers it, because other tests look at every task


def small_base(folder: Path) -> Iterator[Path]:
    """Yield the folder of a base model, while the task is registered and GPUs are hidden.

    Completions differ from prompt to prompt, and a third of them ends in the first block.
    """
    toy_llada.save_tokenizer(folder, SIZE)
    model = toy_llada.init_weights(LLaDA(SIZE), Generator().manual_seed(0))
    for p in model.requires_grad_(False).parameters():
        p.mul_(2)
    head = model.model["transformer"]["ff_out"].weight
    head[[END, 20]] = head[[20, END]]  # the end token becomes as probable as the blank was
    model.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "uneven", Uneven())
        patch.setattr(torch.cuda, "is_available", bool)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield folder


def settings(base: Path, out: Path, **more) -> dict:
    return {"task": "uneven", "model": str(base), "out": str(out)} | more


def tuned(base: Path, out: Path, ranks: Ranks | None = None, **more) -> finetune.Run:
    """Return a run without validation rows whose student and teacher differ from the base model.

    Everything is in float64 but the weights w and the control variate, which are float32.
    """
    cfg = finetune.make_config(**settings(base, out, **more))
    run = finetune.build_run(cfg, ranks or Ranks(), TASKS["uneven"].rows("train"), [])
    run.model.double()
    for i, p in enumerate([*run.student.parameters(), *run.teacher.parameters()]):
        torch.nn.init.normal_(p.data, std=0.1, generator=Generator().manual_seed(i))
    finetune.begin_phase(run)  # an optimizer and an average of these weights
    return run


def steps_on(run: finetune.Run, data: dict[str, Tensor], count: int = 1) -> SimpleNamespace:
    """Train the last `count` steps of a phase whose h is a_end; each draws all of these rollouts.

    Returns `gradients`, clipped, a list of tensors per step, and `rows`, the number of completions
    in each network evaluation.
    """
    assert len(data["r"]) == run.cfg.batch * run.cfg.accum
    run.buffer.data = data
    run.state.evaluated, run.state.h = True, run.cfg.a_end
    run.state.step = run.cfg.steps_per_h - count
    parameters = [*run.student.parameters()]
    steps = SimpleNamespace(gradients=[], rows=[])
    run.optimizer.register_step_pre_hook(
        lambda *_: steps.gradients.append([p.grad.clone() for p in parameters])
    )
    hook = run.model.register_forward_pre_hook(lambda _, inputs: steps.rows.append(len(inputs[0])))
    finetune.train(run)
    hook.remove()
    return steps


def near(actual, expected, **tolerance) -> None:
    assert_close(actual, expected, **({"atol": 1e-6, "rtol": 1e-5} | tolerance))


def alone(run: finetune.Run, row: dict, **how) -> tuple[list[int], str]:
    """Return the teacher's completion at temperature 0 of one prompt, without batch and padding."""
    ids = torch.tensor([run.tokenizer.prompt(row["letters"])])
    completion = generate(run.model.use("teacher"), ids, 16, 8, 8, **how)[0, -16:].tolist()
    return completion, run.tokenizer.completion(completion)


# ---- 2. What a run leaves ------------------------------------------------------------------------
def read_lines(path: Path) -> list[dict]:
    return [json.loads(x, parse_constant=pytest.fail) for x in path.read_text().splitlines()]


def records(out: Path) -> list[dict]:
    """Return the log of a run without the seconds."""
    return [record | {"seconds": 0} for record in read_lines(out / "metrics.jsonl")]


def names(out: Path) -> list[str]:
    return [path.name for path in checkpoints(out)]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return every tensor in the files of a folder, under the names file:tensor."""
    tensors = {}
    for path in sorted(folder.rglob("*.safetensors")):
        tensors |= {f"{path.relative_to(folder)}:{k}": t for k, t in load_file(path).items()}
    return tensors


def state_of(folder: Path) -> dict:
    """Return where a run stands, without the size of the log, which depends on its seconds."""
    return read_json(folder / "state.json") | {"log_bytes": 0}


def check_same(out: Path, reference: Path) -> None:
    """Compare two finished runs bit for bit: the log, the last checkpoint and RUN/best.

    The tensors are weights, averages, AdamW's moments, control variate, rollouts and generators.
    """
    assert records(out) == records(reference)
    last = names(reference)[-1]
    assert names(out)[-1] == last
    assert state_of(out / last) == state_of(reference / last)
    for folder in (last, "best"):
        assert_close(tensors_of(out / folder), tensors_of(reference / folder), atol=0, rtol=0)
    assert not [*out.glob(".half-*")]


# ---- 3. Runs that are stopped --------------------------------------------------------------------
FLAGS = """--task uneven --seed 8 --steps_per_h 8 --a_end 5 --h 9 --ess .4 --c learned --lr .02
    --ema .8 --dropout .1 --refresh 11 --refresh_steps 3 --eval_rows 8 --batch 2 --accum 4"""


def command(base: Path, out: Path) -> list[str]:
    """Return the arguments of a run of two phases. It saves after steps 3, 6, 8, 9, 12, 15, 16.

    Sixteen prompts are completed in four batches of rollouts, and eleven renewed ones in three.
    """
    return ["train", "--model", str(base), "--out", str(out), *FLAGS.split()]


# What is watched, and at which place it is: which call of this process, which step, which path.
MOMENTS: dict[str, tuple[object, str, Callable[..., object]]] = {
    "rollout": (finetune.Buffer, "complete_pending", lambda call, *inputs: call),
    "evaluation": (finetune, "evaluate", lambda call, *inputs: call),
    "step": (finetune, "log_step", lambda call, run, *inputs: run.state.total),
    "rename": (Path, "replace", lambda call, path, target: Path(target)),
    "unlink": (os, "unlink", lambda call, *inputs: call),
}


def signal_before(patch: pytest.MonkeyPatch, moment: str) -> None:
    """Send this process a signal just before a place of the run: moment = "SIGTERM step 5".

    rollout 3, evaluation 1  the third batch of rollouts, the first evaluation of this process
    step 5                   step 5 of the run is logged; AdamW has moved already
    rename a/b               a file or folder gets this name, because it is complete
    unlink 2                 the second file that this process deletes
    """
    number, kind, which = moment.split()
    owner, name, place_of = MOMENTS[kind]
    original, calls = getattr(owner, name), []

    def watched(*inputs, **more):
        calls.append(name)
        place = place_of(len(calls), *inputs)
        if place.match(which) if isinstance(place, Path) else place == int(which):
            os.kill(os.getpid(), signal.Signals[number])
        return original(*inputs, **more)

    patch.setattr(owner, name, watched)


def one_process(moment: str, main: Callable, argv: list[str], torchrun: dict[str, str]) -> None:
    """Run main(argv) with the variables that torchrun would set and the signals of `moment`."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": ""} | torchrun
    TASKS["uneven"] = Uneven()
    for signal_and_place in filter(None, moment.split(", ")):
        signal_before(pytest.MonkeyPatch(), signal_and_place)
    run_as_script(lambda: main(argv))


def exit_codes(argv: list[str], *moments: str, main: Callable = finetune.main) -> list[int]:
    """Run main(argv) on one rank per moment and return the exit codes of the ranks.

    A moment says which signals its rank receives and where, such as "SIGTERM step 5, SIGKILL
    unlink 2"; see `signal_before`. The rank of an empty moment receives none.
    """
    context = multiprocessing.get_context("forkserver")  # imports torch once for all processes
    context.set_forkserver_preload(["loop_helpers"])
    shared = {"WORLD_SIZE": str(len(moments)), "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared["MASTER_PORT"] = str(free.getsockname()[1])
    processes = []
    for rank, moment in enumerate(moments):
        variables = shared | {"RANK": str(rank)} if len(moments) > 1 else {}
        processes.append(context.Process(target=one_process, args=(moment, main, argv, variables)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for the import in the fork server
        for process in processes:
            process.start()
    for process in processes:
        process.join(200)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def complaint(*words: object) -> str:
    """Return the one line that a command prints before it exits with 1."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(sys, "argv", ["llada_finetune.py", *map(str, words)])
        run_as_script(finetune.main)
    assert isinstance(left.value.code, str) and "\n" not in left.value.code
    return left.value.code


if __name__ == "__main__":
    moment = os.environ["RANK_1"] if os.environ["RANK"] == "1" else ""
    one_process(moment, finetune.main, sys.argv[1:], {})
