"""The command line of llada_finetune.py: settings, bad input, eval and merge."""

import math
from unittest.mock import MagicMock

import pytest
import torch
from loop_helpers import (
    SIZE,
    alone,
    command,
    complaint,
    read_lines,
    small_base,
    tensors_of,
    tuned,
)
from torch.testing import assert_close

import dtm
import llada_finetune as finetune
from llada.checkpoint import checkpoints, read_json
from llada.lora import LoRA
from llada.tasks import TASKS


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    yield from small_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """Return the folder of a run of one phase without validation rows."""
    out = tmp_path_factory.mktemp("run")
    finetune.main([*command(base, out), "--a_end", "2", "--eval_rows", "0"])
    return out


# ---- 1. Settings ---------------------------------------------------------------------------------
AUTHORS = """a_end=100 seed=42 c=1 gen_length=256 block=32 steps=128 rank=128 alpha=64 dropout=0.05
    weight_decay=0.1 save_every=100 order=low_confidence normalize=none ess=0 """
SUDOKU = """h=5 steps_per_h=256 prompts=80 completions=1 refresh=20 refresh_steps=32 chunk=16
    batch=4 accum=16 lr=3e-6 lr_min=1e-6 clip=1 temperature=0 prompt_length=1132 ema=0"""
COUNTDOWN = """h=6 steps_per_h=1200 prompts=40 completions=6 refresh=10 refresh_steps=25 chunk=30
    batch=12 accum=8 lr=4e-6 lr_min=2e-6 clip=2 temperature=1 prompt_length=172 ema=0.95"""
PRESETS = [("sudoku", SUDOKU, 2, 512, 20), ("countdown", COUNTDOWN, 1, 768, 17)]


@pytest.mark.parametrize("task, task_settings, top, completions_per_step, phases", PRESETS)
def test_the_presets_are_the_authors_settings(
    task, task_settings, top, completions_per_step, phases
):
    cfg = finetune.make_config(task=task)
    for name, value in (pair.split("=") for pair in (AUTHORS + task_settings).split()):
        actual = getattr(cfg, name)
        assert type(actual)(value) == actual, name
    assert (TASKS[task].top, 8 * cfg.batch * cfg.accum) == (top, completions_per_step)
    assert len([*dtm.phases(cfg.a_end, cfg.h)]) == phases


BAD = {
    "task": ["chess"],
    "normalize": ["all", "group"],
    "lora": ["none"],
    "order": ["left"],
    "c": ["-1", "x", "nan", "1;", ""],
    "lr": [-1e-6, 0.0, math.inf, math.nan],
    "h": [0.0, math.nan],
    "batch": [0, -4, 81],
    "accum": [0, 81],
    "seed": [-1],
    "ess": [1.0, -0.1],
    "dropout": [1.0],
    "ema": [1.0, 1.5],
    "temperature": [-1.0, math.inf],
    "rank": [0],
    "clip": [0.0],
    "gen_length": [100, 0],
    "block": [0, 512, 48],
    "steps": [0, 100, 4],
    "refresh": [81, -1, 0],
    "eval_rows": [-1],
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_setting_is_named(name):
    for value in BAD[name]:
        with pytest.raises(ValueError, match=rf"--{name}\b"):
            finetune.make_config(**{"batch": 1, name: value})


# ---- 2. Bad input --------------------------------------------------------------------------------
INPUT = {
    "--gen_length 20": "--gen_length 20 must be a positive multiple of --block 8",
    "--model /no/one": "--model '/no/one' is neither a folder nor a hub id",
    "--h 50 --ess 0 --a_end 100": "overflows",
    "--data rows.jsonl": "rows.jsonl, line 2",
}


@pytest.mark.parametrize("words", INPUT)
def test_bad_input_is_one_line_before_any_work(base, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"letters": "12"}\n{"numbers": 12}\n')
    assert INPUT[words] in complaint(*command(base, tmp_path / "run"), *words.split())
    assert not (tmp_path / "run").exists()


def test_a_fault_in_training_is_one_line(base, tmp_path, monkeypatch):
    words = command(base, tmp_path)
    message = complaint(*words, "--prompt_length", 2, "--out", tmp_path / "other")
    assert "every prompt is longer than --prompt_length 2 tokens; raise it" in message
    with monkeypatch.context() as patch:
        patch.setattr(dtm, "next_h", lambda *_: 0.0)
        assert "h = 0 at a = 0 does not lead to --a_end 5; lower --ess" in complaint(*words)
    full = MagicMock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB"))
    monkeypatch.setattr(dtm, "sample", full)
    message = complaint(*words)
    assert "in training add --recompute" in message
    assert "another run with a smaller --batch, a larger --accum and another --out" in message


FOREIGN = ["eval --lr 1", "eval --c 1", "merge OUT --adapter A --task sudoku", "train --adapter A"]
FOREIGN += ["--lengths 16", "train --test_data FILE.jsonl", "train --gen 16"]


@pytest.mark.parametrize("words", FOREIGN)
def test_a_flag_of_another_command_is_refused(words):
    with pytest.raises(SystemExit, match="2"):
        finetune.main(words.split())


@pytest.mark.parametrize("words", ["", "--c learned", "train --c learned"])
def test_no_command_means_train(words, monkeypatch):
    started = MagicMock(side_effect=ZeroDivisionError)
    monkeypatch.setattr(finetune, "open_run", started)
    with pytest.raises(ZeroDivisionError):
        finetune.main(words.split())
    assert started.call_args[0][0] == ({"c": "learned"} if words else {})


# ---- 3. RUN/best, eval and merge -----------------------------------------------------------------
def test_without_validation_rows_RUN_best_is_the_last_phase(run):
    last = tensors_of(checkpoints(run)[-1] / "adapter")
    assert_close(tensors_of(run / "best"), last, atol=0, rtol=0)


def test_eval_scores_an_adapter_on_its_own_base(run, base, tmp_path, capsys):
    """It finds the task, the base model and the length in the folder of the run."""
    task = TASKS["uneven"]
    finetune.main(["eval", "--adapter", str(run / "best"), "--out", str(tmp_path)])
    assert "no published table can be compared" in capsys.readouterr().out
    assert finetune.settings_near(run / "best", {"task": "sudoku"}) == {}
    reference = tuned(base, tmp_path)
    reference.model.adapters["teacher"] = LoRA.load(run / "best", SIZE)
    texts = [alone(reference, row)[1] for row in task.rows("test")]
    assert [line["text"] for line in read_lines(tmp_path / "eval-16.jsonl")] == texts
    table = read_json(tmp_path / "eval.json")
    assert (table["model"], table["adapter"]) == (str(base), str(run / "best"))
    for length, scores in table["lengths"].items():
        lines = read_lines(tmp_path / f"eval-{length}.jsonl")
        assert scores["n"] == len(lines) == 7
        solved = [task.correct(line["text"], line["row"]) for line in lines]
        assert scores["solved"] == pytest.approx(sum(solved) / 7)
    assert [*table["lengths"]] == ["16", "32"]


def test_eval_of_given_rows(base, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"letters": "12"}')
    words = f"eval --task uneven --model {base} --test_data {data} --lengths 16 --out {tmp_path}"
    finetune.main(words.split())
    assert "published" not in capsys.readouterr().out
    table = read_json(tmp_path / "eval.json")
    assert (table["adapter"], table["lengths"]["16"]["n"]) == (None, 1)


def test_a_merged_model_completes_as_the_base_with_its_adapter(run, base, tmp_path):
    merged = tmp_path / "merged"
    finetune.main(["merge", str(merged), "--adapter", str(run / "best")])
    texts = []
    for words in (["--adapter", run / "best"], ["--model", merged], ["--model", base]):
        out = tmp_path / str(len(texts))
        words = ["eval", *words, "--task", "uneven", "--lengths", 16, "--out", out]
        finetune.main([str(word) for word in words])
        texts.append([line["text"] for line in read_lines(out / "eval-16.jsonl")])
    assert texts[0] == texts[1] != texts[2]
    assert "exists already; merge into a new folder" in complaint(
        "merge", merged, "--adapter", run / "best"
    )
