"""A run that stops goes on bit for bit, on one rank and on two; what is amiss is one line."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from unittest.mock import MagicMock

import loop_helpers
import pytest
import torch
from loop_helpers import (
    alone,
    check_same,
    command,
    complaint,
    given,
    in_evaluation,
    in_step,
    names,
    near,
    read_lines,
    records,
    run_whole,
    steady,
    stop_in_step,
    tuned,
)
from torch.testing import assert_close

import dtm
import llada_finetune as llada
from figures import files, toy_llada
from figures.files import checkpoints
from llada_finetune import TASKS, LoRA, Ranks


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    yield from loop_helpers.small_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    return run_whole(base, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def stopped(base, tmp_path_factory):
    """The same, stopped in its second phase."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    stop_in_step(13, llada.main, command(base, out))
    assert names(out) == ["step-0000012", "step-0000013"]
    return out


@pytest.fixture
def copied(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


# ---- 1. The same command goes on ----------------------------------------------------------------
@pytest.mark.parametrize("step, saved", [(2, []), (14, ["step-0000009", "step-0000012"])])
def test_a_killed_run_goes_on_bit_for_bit(base, tmp_path, whole, step, saved):
    words = command(base, tmp_path)
    died = loop_helpers.child(loop_helpers.__file__, *words, DIES_AT=str(step))
    assert died.returncode == -signal.SIGKILL
    assert names(tmp_path) == saved
    assert records(tmp_path)[-1]["total"] == step - 1
    (tmp_path / ".half-step-0000015").mkdir()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "phase": 1, "seconds": {"rollout": 1.0}')
    llada.main(words)
    check_same(tmp_path, whole)


def test_a_run_that_died_before_it_wrote_its_settings_starts_anew(base, tmp_path, whole):
    def write(path, *content):
        assert path.name != "config.json"
        files_write(path, *content)

    files_write = files.write
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(files, "write", write)
        llada.main(command(base, tmp_path))
    llada.main(command(base, tmp_path))
    check_same(tmp_path, whole)


def test_a_run_goes_on_without_its_flags_and_then_changes_no_more(copied, whole):
    llada.main(["train", "--out", str(copied), "--gen_length", "16"])
    check_same(copied, whole)
    llada.main(["--out", str(copied)])
    check_same(copied, whole)


# ---- 2. Checkpoints -----------------------------------------------------------------------------
def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


PARTS = ["rank0.safetensors", "shared.safetensors", "state.json", "manifest.json"]
PARTS += ["adapter/adapter_model.safetensors", "adapter/adapter_config.json"]


@pytest.mark.parametrize("damage", [flip, lambda path: os.truncate(path, 9), Path.unlink])
@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_checkpoint_makes_room_for_the_one_before(copied, part, damage, capsys):
    damage(copied / "step-0000013" / part)
    run = llada.open_run({"out": str(copied)}, Ranks())
    assert run.state.total == records(copied)[-1]["total"] == 12
    assert names(copied) == ["step-0000012"]
    said = capsys.readouterr().out
    assert "is damaged; renamed to step-0000013.damaged, going on before it" in said
    assert f"resumed {copied}/step-0000012: phase 1, step 4" in said


def test_a_copy_of_a_checkpoint_is_neither_resumed_nor_deleted(copied, whole):
    flip(copied / "step-0000013" / "rank0.safetensors")
    for name in ("step-0000004-good", "step-0000099-good"):
        shutil.copytree(copied / "step-0000012", copied / name)
    (copied / "step-0000099.tar").write_text("no folder")
    assert names(copied) == ["step-0000012", "step-0000013"]
    llada.main(["train", "--out", str(copied)])
    check_same(copied, whole)
    left = [path.name for path in copied.glob("step-*[!0-9]")]
    assert {"step-0000004-good", "step-0000099-good", "step-0000099.tar"} <= set(left)


@pytest.mark.parametrize("part", ["state.json", "manifest.json"])
def test_a_run_whose_checkpoints_are_all_damaged_is_left_alone(copied, part):
    log = records(copied)
    for folder in checkpoints(copied):
        (folder / part).unlink()
    assert f"every checkpoint of {copied} is damaged" in complaint("--out", copied)
    assert records(copied) == log


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(base, tmp_path, monkeypatch):
    loss_sum = llada.loss_sum

    def poisoned(run, *args):
        if run.state.total == 5:
            run.student.B["0:v_proj"].data[0, 0] = float("nan")
        return loss_sum(run, *args)

    monkeypatch.setattr(llada, "loss_sum", poisoned)
    message = complaint(*command(base, tmp_path))
    assert "not finite at step 6, rank 0; the last checkpoint is whole" in message
    run = llada.open_run({"out": str(tmp_path)}, Ranks())
    assert run.state.total == 3
    assert all(p.isfinite().all() for p in run.student.parameters())


# ---- 3. What is amiss is one line, with status 1 ------------------------------------------------
def test_changed_settings_are_named_with_their_old_and_new_values(copied, base):
    message = complaint(*command(base, copied), "--h", 5, "--seed", 42, "--ema", 0.7)
    assert f"{copied} holds a run, which keeps its settings" in message
    assert "leave out h (was 9.0, now 5.0), ema (was 0.8, now 0.7), or" in message
    file = copied / "config.json"
    file.write_text(file.read_text().replace('"ema"', '"average"'))
    assert "is of another version" in complaint("--out", copied)


def test_changed_rows_and_a_changed_base_are_refused(base, tmp_path):
    data = tmp_path / "rows.jsonl"
    out = tmp_path / "run"
    model = shutil.copytree(base, tmp_path / "base")
    data.write_text("\n".join(json.dumps(row) for row in TASKS["uneven"].rows("train")))
    llada.open_run(given(model, out, data=str(data)), Ranks())
    data.write_text(data.read_text().partition("\n")[2])
    assert "the content of --data has changed since" in complaint("--out", out)
    changed = llada.LLaDA.from_pretrained(model)
    changed.model["transformer"]["ff_out"].weight.mul_(2)
    changed.save_pretrained(model)
    files.fingerprint.cache_clear()
    assert "the content of --model has changed since" in complaint("--out", out)


BAD = [
    pytest.param("--gen_length 20", "--gen_length 20 must be a multiple", id="length"),
    pytest.param("--model /no/one", "no folder", id="model"),
    pytest.param("--h 50", r"e^(h r) overflows", id="overflow"),
    pytest.param("--data X", "x.jsonl, line 2", id="row"),
]


@pytest.mark.parametrize("words, message", BAD)
def test_bad_input_is_refused_before_any_work(base, tmp_path, words, message):
    x = tmp_path / "x.jsonl"
    x.write_text('{"letters": "12"}\n{"numbers": 12}\n')
    words = ["--task", "uneven", "--model", base, *words.replace("X", str(x)).split()]
    assert message in complaint("--out", tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_an_h_of_0_and_a_full_memory_are_one_line(base, tmp_path, monkeypatch):
    monkeypatch.setattr(dtm, "next_h", lambda *_: 0.0)
    assert "does not lead to a_end" in complaint(*command(base, tmp_path))
    full = MagicMock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB"))
    monkeypatch.setattr(dtm, "sample", full)
    message = complaint(*command(base, tmp_path))
    for words in ("out of device memory", "--batch", "--chunk", "--checkpointing", "same command"):
        assert words in message


# ---- 4. The command line ------------------------------------------------------------------------
FOREIGN = ["eval --lr 1", "eval --c 1", "eval --h 5", "merge OUT --adapter A --task sudoku"]
FOREIGN += ["train --adapter A", "--lengths 16", "train --test_data FILE.jsonl"]


@pytest.mark.parametrize("words", FOREIGN)
def test_a_flag_of_another_action_is_refused(words):
    with pytest.raises(SystemExit, match="2"):
        llada.main(words.split())


@pytest.mark.parametrize("words", ["", "--c learned", "train --c learned"])
def test_no_action_means_train(words, monkeypatch):
    started = MagicMock(side_effect=ZeroDivisionError)
    monkeypatch.setattr(llada, "open_run", started)
    with pytest.raises(ZeroDivisionError):
        llada.main(words.split())
    assert started.call_args[0][0] == ({"c": "learned"} if words else {})


def test_eval_scores_an_adapter_on_its_own_base(whole, base, tmp_path, capsys):
    adapter = whole / "best"
    for one in (adapter, checkpoints(whole)[-1] / "adapter"):
        assert llada.settings_of_run(one, {})["task"] == "uneven"
    assert llada.settings_of_run(adapter, {"task": "sudoku"}) == {}
    llada.main(f"eval --adapter {adapter} --task uneven --lengths 16 24 --out {tmp_path}".split())
    assert "no published table compares" in capsys.readouterr().out
    run = tuned(base, tmp_path)
    run.model.adapters["teacher"] = LoRA.load(adapter, loop_helpers.SIZE)
    texts = [alone(run, row)[1] for row in TASKS["uneven"].rows("test")]
    assert [line["text"] for line in read_lines(tmp_path / "eval-16.jsonl")] == texts
    table = json.loads((tmp_path / "eval.json").read_text())
    assert (table["model"], table["adapter"]) == (str(base), str(adapter))
    assert list(table["lengths"]) == ["16", "24"]
    for length, scores in table["lengths"].items():
        lines = read_lines(tmp_path / f"eval-{length}.jsonl")
        solved = [TASKS["uneven"].correct(line["text"], line["row"]) for line in lines]
        assert scores["n"] == len(lines) == 7
        assert scores["solved"] == pytest.approx(sum(solved) / 7)


def test_eval_of_given_rows_says_nothing_of_tables(base, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"letters": "12"}')
    words = f"eval --task uneven --model {base} --test_data {data} --lengths 16 --out {tmp_path}"
    llada.main(words.split())
    assert "published" not in capsys.readouterr().out
    table = json.loads((tmp_path / "eval.json").read_text())
    assert (table["adapter"], table["lengths"]["16"]["n"]) == (None, 1)


def test_a_toy_run_that_was_stopped_writes_its_result_as_well(base, tmp_path, monkeypatch):
    out = tmp_path / "run"
    rows = TASKS["toy"].rows("test")[:9]
    monkeypatch.setattr(llada, "task_rows", lambda cfg, split: rows)
    monkeypatch.setattr(toy_llada, "make_base", lambda to, *_: shutil.copytree(base, to))  # once
    words = f"--out {out} --prompts 16 --batch 8 --steps_per_h 4 --h 4 --a_end 8 --ess 0".split()
    stop_in_step(6, toy_llada.main, words)
    assert not (out / "result.json").exists()
    toy_llada.main(words)
    tests = [e for e in read_lines(out / "metrics.jsonl") if e.get("split") == "test"]
    assert [e["phase"] for e in tests] == [0, 1, 2]
    assert json.loads((out / "result.json").read_text())["test"] in tests
    assert (out / "toy.png").is_file()


# ---- 5. Two ranks -------------------------------------------------------------------------------
def train(ranks, *where, **more) -> llada.Run:
    run = llada.open_run(given(*where, c="learned", normalize="batch", **more), ranks)
    llada.train(run)
    return run


def uneven_step(run, student, ended: int) -> dict:
    """A step on all of the buffer, `ended` answers of which end at once."""
    run.buffer.data["x1"][:ended, 0] = 1
    run.adam.zero_grad()
    run.state.h, run.cfg.accum = 4.0, len(run.buffer.data["r"]) // 4
    found = {"x1": run.buffer.data["x1"].clone(), "passes": len(llada.masked_answers(run))}
    parameters = [*run.student.parameters()]
    run.adam.register_step_pre_hook(
        lambda *_: found.update(clipped=[p.grad.clone() for p in parameters])
    )
    llada.optimiser_step(run, student)
    return found | {"stepped": [p.detach() for p in parameters]}


def two_ranks(base: Path, out: Path) -> None:
    """What torchrun runs."""
    TASKS["uneven"] = loop_helpers.Uneven()
    ranks = Ranks()
    more = {"dropout": 0.1, "ema": 0.5, "refresh": 4, "refresh_steps": 2}
    run = train(ranks, base, out / "whole", **more)
    found = {"student": run.student.state_dict(), "rows": run.buffer.data["row"].tolist()}
    found["generator"] = run.generator.get_state()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="143"):
        if ranks.rank == 1:
            in_step(patch, 6, signal.SIGTERM)
        train(ranks, base, out / "stopped", **more)
    found["saved"] = names(out / "stopped")
    train(ranks, base, out / "stopped", **more)
    for place, call in (("evaluate", 0), ("answered", 1), ("optimiser_step", 1), ("evaluate", 0)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="143"):
            if ranks.rank == 1:
                in_evaluation(patch, place, call, 1)
            train(ranks, base, out / "evaluations", **more)
    train(ranks, base, out / "evaluations", **more)
    train(ranks, base, out / "blind", eval_rows=0, steps_per_h=1, a_end=4.0)
    run = tuned(base, out, ranks, c="0.7", normalize="batch", checkpointing="on")
    run.buffer.fill(16)
    run.buffer.data["r"] = torch.linspace(0, 1, 16).double() + ranks.rank
    student = llada.parallel(run.model, ranks)
    xt, mask = steady(run.buffer.data["x1"], 23, 8)
    w = run.buffer.weights(4.0).float()
    loss, found["sums"] = llada.loss_sum(run, student, [*range(16)], xt, mask, w)
    (loss / 16).backward()
    found["gradient"] = [p.grad.clone() for p in run.student.parameters()]
    found["data"] = {key: t.clone() for key, t in run.buffer.data.items()}
    found["scores"] = llada.evaluate(run, TASKS["uneven"].rows("test"), 16, out / "eval.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llada, "mask_blockwise", steady)
        found |= uneven_step(run, student, [0, 12][ranks.rank])
    torch.save(found, out / f"{ranks.rank}.pt")


@pytest.fixture(scope="module")
def ranks(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = loop_helpers.child(*torchrun, __file__, base, out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no validation rows: RUN/best is the last phase" in done.stdout
    return out, *[torch.load(out / f"{rank}.pt") for rank in (0, 1)]


def test_two_ranks_share_the_student_but_neither_prompts_nor_noise(ranks):
    _, one, two = ranks
    assert_close(one["student"], two["student"], atol=0, rtol=0)
    assert all(t.any() for t in one["student"].values())
    assert not set(one["rows"]) & set(two["rows"])
    assert not torch.equal(one["generator"], two["generator"])


def test_SIGTERM_at_one_rank_stops_all_and_they_go_on_bit_for_bit(ranks):
    out, one, two = ranks
    assert one["saved"] == two["saved"] == ["step-0000004", "step-0000006"]
    check_same(out / "stopped", out / "whole")
    check_same(out / "evaluations", out / "whole")


def test_without_validation_rows_the_best_is_the_last_phase(ranks, base):
    blind = ranks[0] / "blind"
    [last] = checkpoints(blind)
    best, final = (LoRA.load(f, loop_helpers.SIZE) for f in (blind / "best", last / "adapter"))
    assert_close(best.state_dict(), final.state_dict(), atol=0, rtol=0)
    assert best.base == final.base == (str(base), files.fingerprint(base))


def test_two_ranks_step_and_score_as_one_process(ranks, base, tmp_path):
    out, one, two = ranks
    run = tuned(base, tmp_path, c="0.7", normalize="batch")
    run.buffer.data = {key: torch.cat([t, two["data"][key]]) for key, t in one["data"].items()}
    w = run.buffer.weights(4.0).float()
    xt, mask = steady(run.buffer.data["x1"], 23, 8)
    loss, sums = llada.loss_sum(run, run.model, [*range(32)], xt, mask, w)
    gradient = [*torch.autograd.grad(loss / 32, [*run.student.parameters()])]
    near(one["sums"] + two["sums"], sums)
    near([one["gradient"], two["gradient"]], [gradient, gradient])
    scores = llada.evaluate(run, TASKS["uneven"].rows("test"), 16, tmp_path / "eval.jsonl")
    assert (one["scores"], two["scores"]) == (scores, None)
    assert read_lines(out / "eval.jsonl") == read_lines(tmp_path / "eval.jsonl")


def test_two_ranks_with_different_numbers_of_passes_step_as_one_process(
    ranks, base, tmp_path, monkeypatch
):
    _, one, two = ranks
    assert one["passes"] == 4 > two["passes"]
    assert_close(one["stepped"], two["stepped"], atol=0, rtol=0)
    monkeypatch.setattr(llada, "mask_blockwise", steady)
    run = tuned(base, tmp_path, prompts=32, c="0.7", normalize="batch")
    run.buffer.data = {key: torch.cat([t, two["data"][key]]) for key, t in one["data"].items()}
    run.buffer.data["x1"] = torch.cat([one["x1"], two["x1"]])
    found = uneven_step(run, run.model, 0)
    near(one["clipped"], found["clipped"])


if __name__ == "__main__":
    two_ranks(*map(Path, sys.argv[1:]))
