"""Two ranks train as one process would, and resume bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import loop_helpers
import pytest
import torch
from loop_helpers import (
    check_same,
    command,
    complaint,
    exit_codes,
    names,
    near,
    records,
    small_base,
    steps_on,
    tensors_of,
    tuned,
)
from torch import Tensor

import llada_finetune as finetune
from llada.distributed import Ranks
from llada.tasks import TASKS

KILLED = -signal.SIGKILL
# Each line is one start of a run: the moments at which rank 0 and rank 1 receive signals, their
# exit codes, and the step of the newest checkpoint. A rank that loses the other one fails with 1.
KILLS = [
    ("", "SIGKILL rollout 2", [1, KILLED], None),
    ("SIGKILL step 1", "SIGKILL step 1", [KILLED, KILLED], None),
    ("SIGKILL step 3", "", [KILLED, 1], 2),
    ("", "SIGKILL rename .half-step-0000004/rank1.safetensors", [1, KILLED], 2),
    ("SIGKILL rename step-0000004", "", [KILLED, 1], 2),
]
STOPS = [
    ("", "SIGTERM rollout 2", [143, 143], 0),
    ("SIGINT step 2", "", [130, 130], 2),
    ("SIGINT rollout 1", "SIGTERM rollout 1", [143, 143], 2),
    ("", "SIGTERM step 4", [143, 143], 4),  # the last step of a phase
]
# Two steps on all rollouts of both ranks, without clipping.
STEPS = {"a_end": 2.0, "c": "learned", "normalize": "batch", "clip": 1e9, "batch": 4, "accum": 4}


def short(base: Path, out: Path) -> list[str]:
    """Return the arguments of a run of two phases of four steps, with checkpoints after each 2."""
    more = "--steps_per_h 4 --save_every 2 --refresh_steps 2 --ess 0 --h 3 --normalize batch"
    return [*command(base, out), *more.split()]


def interrupt(base: Path, out: Path, lines: list[tuple]) -> None:
    for one, two, codes, newest in lines:
        assert exit_codes(short(base, out), one, two) == codes, (one, two)
        assert names(out)[-1:] == ([] if newest is None else [f"step-{newest:07}"]), (one, two)


def mask_by_content(x1: Tensor, mask_id: int, block: int, generator=None) -> tuple[Tensor, Tensor]:
    """Mask as `dtm.mask_blockwise` does, with the tokens of a row in the place of randomness."""
    k_less_1 = x1.sum(1, keepdim=True) % x1.shape[1]
    position = torch.arange(x1.shape[1])
    active = x1.shape[1] // block - 1 - k_less_1 // block
    mask = (position // block == active) & (position % block <= k_less_1 % block)
    return torch.where(mask | (position // block > active), mask_id, x1), mask


def two_ranks(argv: list[str]) -> None:
    """Finish the interrupted runs on this rank, and save what the tests compare."""
    base, out = map(Path, argv)
    ranks = Ranks()
    for name in ("uninterrupted", "killed", "stopped"):
        finetune.main(short(base, out / name))
    for argv, message in (
        (["--out", str(out / "alone")], "ran on 1 ranks, but there are 2 now; resume with 1"),
        ([*short(base, out / "few"), "--data", str(out / "row.jsonl")], "2 ranks share 1 prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune.main(argv)
    run = tuned(base, out / "steps", ranks, **STEPS)
    finetune.fill_buffer(run, 16)
    data = {key: t.clone() for key, t in run.buffer.data.items()}
    if ranks.rank == 1:
        data["x1"][:12, 0] = loop_helpers.END  # this rank has fewer micro-batches
    scores = finetune.evaluate_teacher(run, TASKS["uneven"].rows("test"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "mask_blockwise", mask_by_content)
        results = {"data": data, "scores": scores, **vars(steps_on(run, data, 2))}
    torch.save(results, out / f"{ranks.rank}.pt")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    yield from small_base(tmp_path_factory.mktemp("base"))


def die_under_torchrun(argv: list[str]) -> str:
    """Run main(argv) on two ranks, of which one is killed; return what torchrun prints."""
    words = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    words = [sys.executable, *words, loop_helpers.__file__, *argv]
    more = {"PYTHONPATH": os.pathsep.join(sys.path), "RANK_1": "SIGKILL rollout 1"}
    died = subprocess.run(words, env=os.environ | more, capture_output=True, text=True, timeout=200)
    assert died.returncode == 1
    return died.stderr


@pytest.fixture(scope="module")
def ranks(base, tmp_path_factory):
    """Return the folder in which two ranks worked, and the results of either."""
    out = tmp_path_factory.mktemp("ranks")
    interrupt(base, out / "killed", KILLS)
    said = die_under_torchrun(short(base, out / "killed"))
    assert "exitcode  : -9" in said, said[-3000:]
    interrupt(base, out / "stopped", STOPS)
    assert exit_codes(command(base, out / "alone"), "SIGTERM step 1") == [143]
    (out / "row.jsonl").write_text('{"letters": "12"}')
    assert exit_codes([str(base), str(out)], "", "", main=two_ranks) == [0, 0]
    return out, *[torch.load(out / f"{rank}.pt") for rank in (0, 1)]


def test_killed_ranks_resume_bit_for_bit(ranks):
    check_same(ranks[0] / "killed", ranks[0] / "uninterrupted")


def test_a_signal_at_one_rank_stops_both_and_they_resume_bit_for_bit(ranks):
    check_same(ranks[0] / "stopped", ranks[0] / "uninterrupted")


def test_three_ranks_resume_bit_for_bit(base, tmp_path):
    """The sum of three numbers depends on the order in which they are added."""
    uninterrupted, stopped = tmp_path / "uninterrupted", tmp_path / "stopped"
    assert exit_codes([*short(base, uninterrupted), "--a_end", "3"], "", "", "") == [0, 0, 0]
    argv = [*short(base, stopped), "--a_end", "3"]
    assert exit_codes(argv, "", "SIGTERM step 2", "") == [143, 143, 143]
    assert exit_codes(argv, "", "", "") == [0, 0, 0]
    check_same(stopped, uninterrupted)


def test_two_ranks_with_replay_resume_bit_for_bit(base, tmp_path):
    uninterrupted, stopped = tmp_path / "uninterrupted", tmp_path / "stopped"
    assert exit_codes([*short(base, uninterrupted), "--replay", "1"], "", "") == [0, 0]
    argv = [*short(base, stopped), "--replay", "1"]
    assert exit_codes(argv, "", "SIGTERM step 6") == [143, 143]  # in the second phase
    assert exit_codes(argv, "", "") == [0, 0]
    check_same(stopped, uninterrupted)


def test_ranks_share_neither_prompts_nor_random_numbers(ranks, base):
    last = tensors_of(ranks[0] / "uninterrupted" / names(ranks[0] / "uninterrupted")[-1])
    for name in ("generator", "dropout"):
        assert not torch.equal(*[last[f"rank{rank}.safetensors:{name}"] for rank in (0, 1)])
    one, two = (set(results["data"]["row"].tolist()) for results in ranks[1:])
    assert len(one) == len(two) == 16 and not one & two
    streams = [
        Ranks.seed(SimpleNamespace(rank=rank), seed, stream)
        for rank in range(4)
        for seed in (0, 1, 42, 499_999)
        for stream in (0, 1)
    ]
    assert len(set(streams)) == len(streams)


def test_two_ranks_with_different_numbers_of_micro_batches_step_as_one_process(
    ranks, base, tmp_path, monkeypatch
):
    out, one, two = ranks
    assert len(one["rows"]) == 2 * 2 * 4 > len(two["rows"])
    data = {key: torch.cat([t, two["data"][key]]) for key, t in one["data"].items()}
    monkeypatch.setattr(finetune, "mask_blockwise", mask_by_content)
    run = tuned(base, tmp_path, **STEPS | {"prompts": 32, "accum": 8})
    steps = steps_on(run, data, 2)
    for both in zip(steps.gradients, one["gradients"], two["gradients"], strict=True):
        for expected, *of_ranks in zip(*both, strict=True):
            near(of_ranks, [expected] * 2, atol=1e-4, rtol=1e-4)  # c is float32
    for expected, record in zip(records(tmp_path), records(out / "steps"), strict=True):
        assert record.pop("kind") == expected.pop("kind") == "step"
        for key, value in expected.items():
            assert record[key] == pytest.approx(value, rel=1e-4), key


def test_two_ranks_score_as_one_process(ranks, base, tmp_path):
    run = tuned(base, tmp_path, **STEPS)
    scores = finetune.evaluate_teacher(run, TASKS["uneven"].rows("test"))
    assert (ranks[1]["scores"], ranks[2]["scores"]) == (scores, None)


@pytest.mark.parametrize("name, other", [("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")])
def test_half_of_torchruns_variables_is_an_error(base, tmp_path, monkeypatch, name, other):
    monkeypatch.setenv(name, "1")
    message = complaint(*command(base, tmp_path))
    assert f"{name} is set but {other} is not; start several ranks with torchrun" in message
