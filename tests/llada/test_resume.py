"""A run that was killed or stopped resumes bit for bit; what cannot resume is refused."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
from loop_helpers import (
    check_same,
    command,
    complaint,
    exit_codes,
    names,
    read_lines,
    records,
    settings,
    signal_before,
    small_base,
)

import llada_finetune as finetune
from figures import toy_llada
from llada.checkpoint import read_json, write_file
from llada.distributed import Ranks
from llada.tasks import TASKS


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    yield from small_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    """Return the folder of a run that was never stopped."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    finetune.main(command(base, out))
    evaluations = [record for record in records(out) if record["kind"] == "eval"]
    assert [(e["phase"], e["total"]) for e in evaluations] == [(0, 0), (1, 8), (2, 16)]
    return out


@pytest.fixture(scope="module")
def stopped(base, tmp_path_factory):
    """Return the folder of the same run, stopped in its second phase."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    assert exit_codes(command(base, out), "SIGTERM step 13") == [143]
    assert names(out) == ["step-0000012", "step-0000013"]
    return out


@pytest.fixture
def copied(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


# ---- 1. Killed and stopped runs ------------------------------------------------------------------
# Each line is one start of a run: the moment at which it receives signals, its exit code, and the
# step of the newest checkpoint.
KILLED = -signal.SIGKILL
ROLLOUTS = [
    ("SIGKILL rollout 3", KILLED, None),
    ("SIGKILL rollout 6", KILLED, 3),
    ("SIGKILL rollout 8", KILLED, 8),
]
STEPS = [
    ("SIGKILL evaluation 1", KILLED, None),
    ("SIGKILL step 2", KILLED, None),
    ("SIGKILL step 5", KILLED, 3),
    ("SIGKILL evaluation 1", KILLED, 8),
    ("SIGKILL step 9", KILLED, 8),
    ("SIGKILL step 14", KILLED, 12),
]
SAVES = [
    ("SIGKILL rename run/config.json", KILLED, None),
    ("SIGKILL rename best/adapter_config.json", KILLED, None),
    ("SIGKILL unlink 2", KILLED, 8),  # while it deletes the checkpoint of step 3
    ("SIGKILL rename .half-step-0000009/rank0.safetensors", KILLED, 8),
    ("SIGKILL rename .half-step-0000009/adapter/adapter_config.json", KILLED, 8),
    ("SIGKILL rename .half-step-0000012/shared.safetensors", KILLED, 9),
    ("SIGKILL rename .half-step-0000015/state.json", KILLED, 12),
    ("SIGKILL rename step-0000016", KILLED, 15),
]
FIRST_SAVE = [
    ("SIGKILL rename step-0000003", KILLED, None),
    ("SIGTERM step 3", 143, 3),
    ("SIGTERM rollout 1, SIGKILL unlink 2", KILLED, 3),  # while it replaces this checkpoint
    ("SIGTERM rollout 1, SIGKILL rename .half-step-0000003/state.json", KILLED, 3),
]
STOPS = [
    ("SIGINT rollout 2", 130, 0),
    ("SIGTERM rollout 1", 143, 0),  # a second stop in the rollouts of the same step
    ("SIGTERM step 1", 143, 1),
    ("SIGTERM step 3", 143, 3),  # a checkpoint is due as well
    ("SIGINT rollout 1", 130, 3),
    ("SIGTERM step 8", 143, 8),  # the last step of a phase
    ("SIGTERM evaluation 1", 143, 8),  # before this phase becomes RUN/best
    ("SIGTERM rollout 4", 143, 8),  # the last batch: the buffer is complete
    ("SIGINT step 16", 130, 16),
]


@pytest.mark.parametrize(
    "starts",
    [
        pytest.param(ROLLOUTS, id="killed in rollouts"),
        pytest.param(STEPS, id="killed in steps and evaluations"),
        pytest.param(SAVES, id="killed in saves"),
        pytest.param(FIRST_SAVE, id="killed in the first save and while replacing it"),
        pytest.param(STOPS, id="stopped"),
    ],
)
def test_a_run_resumes_bit_for_bit(base, tmp_path, uninterrupted, starts):
    out = tmp_path / "run"
    for moment, code, newest in starts:
        assert exit_codes(command(base, out), moment) == [code], moment
        assert names(out)[-1:] == ([] if newest is None else [f"step-{newest:07}"]), moment
    finetune.main(command(base, out))
    check_same(out, uninterrupted)


def test_a_run_in_a_thread_needs_no_signal_handlers(base, tmp_path, uninterrupted):
    thread = threading.Thread(target=finetune.main, args=(command(base, tmp_path),))
    thread.start()
    thread.join()
    check_same(tmp_path, uninterrupted)


def test_a_toy_run_that_was_stopped_writes_its_result(base, tmp_path, monkeypatch):
    rows = TASKS["toy"].rows("test")[:9]
    monkeypatch.setattr(finetune, "task_rows", lambda cfg, split: rows)
    words = f"--out {tmp_path} --model {base} --prompts 16 --batch 8 --h 4 --a_end 8 --ess 0"
    words = [*words.split(), "--steps_per_h", "4"]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="143"):
        signal_before(patch, "SIGTERM step 6")
        toy_llada.main(words)
    assert not (tmp_path / "result.json").exists()
    toy_llada.main(words)

    tests = [e for e in read_lines(tmp_path / "metrics.jsonl") if e.get("split") == "test"]
    assert [e["phase"] for e in tests] == [0, 1, 2]
    assert json.loads((tmp_path / "result.json").read_text())["test"] in tests
    assert (tmp_path / "toy.png").is_file()


# ---- 2. What may change --------------------------------------------------------------------------
def test_a_run_resumes_without_its_flags_and_then_changes_no_more(copied, uninterrupted):
    finetune.main(["train", "--out", str(copied)])
    check_same(copied, uninterrupted)
    finetune.main(["--out", str(copied)])
    check_same(copied, uninterrupted)


def test_memory_and_bookkeeping_may_change(copied, uninterrupted, base):
    finetune.main([*command(base, copied), "--recompute", "--save_every", "2"])
    check_same(copied, uninterrupted)


def test_the_size_of_a_batch_of_rollouts_may_change(base, tmp_path):
    assert exit_codes(command(base, tmp_path), "SIGTERM rollout 2") == [143]
    finetune.main([*command(base, tmp_path), "--chunk", "3"])
    assert records(tmp_path)[-1]["a"] == 5


# ---- 3. What is refused, and what is torn --------------------------------------------------------
FILES = [
    "rank0.safetensors",
    "shared.safetensors",
    "state.json",
    "adapter/adapter_model.safetensors",
]


def test_a_torn_file_names_itself_and_the_previous_checkpoint_resumes(
    copied, stopped, uninterrupted
):
    newest = copied / "step-0000013"
    for file in FILES:
        for damage in (lambda path: os.truncate(path, 9), Path.unlink):
            damage(newest / file)
            message = complaint("--out", copied)
            assert f"{newest / file} " in message
            assert f"the checkpoint {newest} cannot be read" in message
            assert "delete this folder, and the previous checkpoint is used" in message
            shutil.copy(stopped / newest.name / file, newest / file)
    shutil.rmtree(newest)
    finetune.main(["--out", str(copied)])
    check_same(copied, uninterrupted)


def test_a_file_has_its_old_content_until_the_new_one_is_complete(tmp_path, monkeypatch):
    def write_half(path, text):
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError("no space left on device")

    file = tmp_path / "config.json"
    write_file(file, {"h": 1.0})
    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError):
        write_file(file, {"h": 2.0})
    assert read_json(file) == {"h": 1.0}


def test_changed_settings_are_named_with_their_values(copied, base):
    message = complaint(*command(base, copied), "--h", 5, "--seed", 8, "--ema", 0.7)
    assert f"{copied} holds a run, which keeps its settings" in message
    assert "leave out --h 5.0 (it was started with 9.0), --ema 0.7 (it was" in message
    assert "--task sudoku (it was started with uneven)" in complaint(
        "--out", copied, "--task", "sudoku"
    )


def test_another_number_of_ranks_is_refused(copied, monkeypatch):
    state = copied / "step-0000013" / "state.json"
    state.write_text(state.read_text().replace('"ranks": 1', '"ranks": 2'))
    message = complaint("--out", copied)
    assert f"{copied} ran on 2 ranks, but there are 1 now; resume with 2 ranks" in message


def test_changed_rows_are_refused(base, tmp_path):
    data, out = tmp_path / "rows.jsonl", tmp_path / "run"
    lines = [json.dumps(row) for row in TASKS["uneven"].rows("train")]
    data.write_text("\n".join(lines))
    finetune.open_run(settings(base, out, data=str(data)), Ranks())
    moved = data.rename(tmp_path / "moved.jsonl")
    finetune.open_run({"out": str(out), "data": str(moved)}, Ranks())
    moved.write_text("\n".join(lines[1:]))
    assert "the training rows (--data) have changed since" in complaint(
        "--out", out, "--data", moved
    )


def test_a_run_without_its_settings_is_refused(copied):
    (copied / "config.json").unlink()
    assert "config.json is missing, but" in complaint("--out", copied)


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(base, tmp_path, monkeypatch):
    trained_positions = finetune.trained_positions

    def poisoned(run, batch):
        if run.state.total == 5:
            run.student.B["0:v_proj"].data[0, 0] = float("nan")
        return trained_positions(run, batch)

    monkeypatch.setattr(finetune, "trained_positions", poisoned)
    message = complaint(*command(base, tmp_path))
    assert "loss or gradient of step 6 is not finite" in message
    run = finetune.open_run({"out": str(tmp_path)}, Ranks())
    assert run.state.total == 3
    assert all(p.isfinite().all() for p in run.student.parameters())
