"""What the tests of LLaDA's loop share: a tiny base, a small task, runs that die, what they left.
As a script it is llada_finetune.py with that task; SIGKILL comes in the middle of step DIES_AT."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Generator
from torch.testing import assert_close

import llada_finetune as llada
from figures import toy_llada
from figures.files import checkpoints
from llada_finetune import TASKS, Ranks

near = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=1e-3)
torch.set_num_threads(1)
SIZE = toy_llada.SIZE | {"d_model": 32, "n_layers": 1, "n_heads": 2, "mlp_hidden_size": 48}


class Uneven(llada.Task):
    """Prompts of several lengths; rewarded are an answer's characters that stand in its prompt."""

    top = 2.0
    generated = True
    columns = {"letters": ("letters",)}
    preset = dict(h=4, a_end=8, steps_per_h=4, prompts=16, refresh=0, refresh_steps=0, chunk=5)
    preset |= dict(gen_length=16, block=8, steps=8, temperature=1, batch=4, accum=2, lr=0.01)
    preset |= dict(rank=4, alpha=8, dropout=0, checkpointing="off", save_every=3, eval_rows=4)

    def rows(self, split: str) -> list[dict]:
        draw = random.Random(split)
        lengths = draw.choices(range(3, 10), k={"train": 80, "valid": 8, "test": 7}[split])
        return [{"letters": "".join(draw.choices("0123456789+-*/", k=k))} for k in lengths]

    def prompt(self, row: dict) -> str:
        return row["letters"]

    def cells(self, text: str, row: dict) -> tuple[int, int]:
        return sum(character in row["letters"] for character in text), len(text)

    def reward(self, text: str, row: dict) -> float:
        return (self.cells(text, row)[0] - 1) / 7.5

    def correct(self, text: str, row: dict) -> bool:
        return self.cells(text, row)[0] >= 4


TASKS.pop("uneven")  # known in `small_base` alone: other tests look at every task


def small_base(folder: Path):
    """A base whose answers differ from prompt to prompt; every third of them ends in its first
    block. Bit for bit means on the CPU."""
    toy_llada.save_tokenizer(folder, SIZE)
    model = toy_llada.init_weights(llada.LLaDA(SIZE), Generator().manual_seed(0))
    for p in model.requires_grad_(False).parameters():
        p.mul_(2)
    head = model.model["transformer"]["ff_out"].weight
    head[[1, 20]] = head[[20, 1]]  # the end token is as likely as the blank was
    model.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "uneven", Uneven())
        patch.setattr(torch.cuda, "is_available", bool)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        handler = signal.getsignal(signal.SIGTERM)
        yield folder
        signal.signal(signal.SIGTERM, handler)


def given(base: Path, out: Path, **more) -> dict:
    return {"task": "uneven", "model": str(base), "out": str(out)} | more


def tuned(base: Path, out: Path, ranks: Ranks | None = None, **more) -> llada.Run:
    """A run whose two adapters are not zero."""
    cfg = llada.make_config(**given(base, out, **more))
    run = llada.Run(cfg, ranks or Ranks(), TASKS["uneven"].rows("train"), [])
    for i, p in enumerate([*run.student.parameters(), *run.teacher.parameters()]):
        torch.nn.init.normal_(p.data, std=0.1, generator=Generator().manual_seed(i))
    return run


def alone(run: llada.Run, row: dict, **how) -> tuple[list[int], str]:
    """The teacher's answer at temperature 0, without batch and padding."""
    ids = torch.tensor([run.text.prompt(row["letters"])])
    out = llada.generate(run.model.use("teacher"), ids, 16, 8, 8, **how)[0].tolist()
    return out[-16:], run.text.answer(out[-16:])


def read_lines(path: Path) -> list[dict]:
    return [json.loads(x, parse_constant=pytest.fail) for x in path.read_text().splitlines()]


def records(out: Path) -> list[dict]:
    return [record | {"seconds": 0} for record in read_lines(out / "metrics.jsonl")]


def steady(x1, mask_id, block, generator=None):
    """`mask_blockwise` by a row's tokens instead of chance; later blocks are hidden too."""
    k = x1.sum(1, keepdim=True) % x1.shape[1]
    place = torch.arange(x1.shape[1])
    active = x1.shape[1] // block - 1 - k // block
    mask = (place // block == active) & (place % block <= k % block)
    return torch.where(mask | (place // block > active), mask_id, x1), mask


def in_step(patch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Sends this process a signal in step `step`: AdamW has moved, nothing is recorded."""
    log_step = llada.Run.log_step

    def send_and_log(run, *terms, **more):
        if run.state.total == step:
            os.kill(os.getpid(), number)
        log_step(run, *terms, **more)

    patch.setattr(llada.Run, "log_step", send_and_log)


def in_evaluation(patch: pytest.MonkeyPatch, place: str, call: int, evaluation: int) -> list:
    """Sends this process SIGTERM in the network evaluation of that number in that call of `place`,
    both from 0. Returns a list that receives the network evaluations begun after it."""
    owner = llada.Buffer if place == "answered" else llada
    function, forward = getattr(owner, place), llada.LLaDA.forward
    calls, inside, later = [], [], []

    def noted_call(*given):
        calls.append(place)
        inside.append(0)
        try:
            return function(*given)
        finally:
            inside.clear()

    def noted_forward(model, *given, **more):
        if calls[-1:] == ["sent"]:
            later.append(place)
        if inside and len(calls) == call + 1 and inside[0] == evaluation:
            calls.append("sent")
            signal.raise_signal(signal.SIGTERM)
        if inside:
            inside[0] += 1
        return forward(model, *given, **more)

    patch.setattr(owner, place, noted_call)
    patch.setattr(llada.LLaDA, "forward", noted_forward)
    return later


class Watched(llada.Run):
    """Remembers where student and teacher stood when a phase began, and what its steps did."""

    phases = ()

    def begin_phase(self):
        super().begin_phase()
        phase = SimpleNamespace(steps=[], memory={**self.adam.state})
        phase.student = deepcopy(self.student.state_dict())
        phase.teacher = deepcopy(self.teacher.state_dict())
        self.phases += (phase,)
        self.passes = []  # of the present step

    def log(self, **record):
        super().log(**record)
        if record["kind"] == "step":
            student = deepcopy(self.student.state_dict())
            step = SimpleNamespace(**record, passes=self.passes, student=student)
            step.drawn = self.buffer.drawn
            self.phases[-1].steps.append(step)
            self.passes = []


class Noted(llada.Buffer):
    def draw(self, count):
        self.drawn = super().draw(count)
        return self.drawn


def noted(run, student, part, xt, mask, w):
    loss, sums = loss_sum(run, student, part, xt, mask, w)
    gradient = torch.autograd.grad(loss, [*run.student.parameters()], retain_graph=True)
    note = SimpleNamespace(part=part, mask=mask, w=w, data=run.buffer.data, gradient=gradient)
    run.passes.append(note)
    return loss, sums


loss_sum = llada.loss_sum


def watch(patch: pytest.MonkeyPatch) -> None:
    """From here on a run notes its phases, and their steps with the passes of each."""
    patch.setattr(llada, "Run", Watched)
    patch.setattr(llada, "Buffer", Noted)
    patch.setattr(llada, "loss_sum", noted)


FLAGS = """--task uneven --steps_per_h 8 --a_end 12 --h 9 --ess .4 --c learned --ema .8 --dropout .1
    --refresh 4 --refresh_steps 3 --eval_rows 6 --batch 2 --accum 4""".split()


def command(base, out) -> list[str]:
    return ["train", "--model", str(base), "--out", str(out), *FLAGS]


def run_whole(base: Path, out: Path) -> Path:
    """A run that never stops: phases of 8 steps, checkpoints after 3, 6, 8, 9, 12, ..."""
    llada.main(command(base, out))
    assert records(out)[-1]["phase"] >= 2
    return out


def stop_in_step(step: int, main, words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="143"):
        in_step(patch, step, signal.SIGTERM)
        main(words)


def complaint(*words) -> str:
    """What a command says before it exits with 1."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["llada_finetune.py", *map(str, words)])
        llada.run_as_script(llada.main)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


def names(out):
    return [path.name for path in checkpoints(out)]


def check_same(out, whole):
    """The log; weights, averages, AdamW's moments, buffer and generators at the end; RUN/best."""
    assert records(out) == records(whole)
    assert names(out)[-1] == names(whole)[-1]
    for folder in (names(whole)[-1], "best"):
        for path in (whole / folder).rglob("*.safetensors"):
            other = load_file(out / path.relative_to(whole))
            assert_close(other, load_file(path), atol=0, rtol=0)


def child(*words: object, **more: str) -> subprocess.CompletedProcess:
    more |= {"PYTHONPATH": str(Path(llada.__file__).parent), "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, *[str(word) for word in words]]
    return subprocess.run(words, env=os.environ | more, capture_output=True, text=True, timeout=300)


if __name__ == "__main__":
    TASKS["uneven"] = Uneven()
    in_step(pytest.MonkeyPatch(), int(os.environ.get("DIES_AT", 0)), signal.SIGKILL)
    llada.run_as_script(llada.main)
