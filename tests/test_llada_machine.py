"""A run and its machine: SIGTERM, the lock on a folder, memory, compilation, other devices."""

import os
import shutil
import signal
import socket

import loop_helpers
import pytest
from loop_helpers import check_same, command, given, in_evaluation, names, records, stop_in_step

import llada_finetune as llada
from llada_finetune import Ranks


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    yield from loop_helpers.small_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A run that never stopped: phases of 8 steps, checkpoints after 3, 6, 8, 9, 12, ..."""
    out = tmp_path_factory.mktemp("whole") / "run"
    llada.main(command(base, out))
    return out


# ---- 1. SIGTERM ---------------------------------------------------------------------------------
@pytest.mark.parametrize("step", [3, 8, 11])
def test_SIGTERM_saves_after_the_present_step_and_leaves(base, tmp_path, whole, step, capsys):
    stop_in_step(step, llada.main, command(base, tmp_path))
    assert names(tmp_path)[-1] == f"step-{step:07}"
    assert f"SIGTERM: saved at step {step}; the same command goes on" in capsys.readouterr().out
    llada.main(command(base, tmp_path))
    check_same(tmp_path, whole)


EVALUATIONS = [
    pytest.param("evaluate", 0, 3, 0, 0, id="scores at a = 0"),
    pytest.param("answered", 0, 9, 0, 0, id="first rollouts"),
    pytest.param("optimiser_step", 0, 1, 2, 0, id="step 1 behind the first rollouts"),
    pytest.param("optimiser_step", 3, 1, 2, 3, id="step 4 behind a renewal"),
    pytest.param("optimiser_step", 4, 1, 2, 4, id="step 5"),
    pytest.param("answered", 2, 3, 0, 6, id="renewal after step 6"),
    pytest.param("evaluate", 1, 5, 0, 8, id="scores after a phase"),
    pytest.param("answered", 3, 20, 0, 8, id="rollouts of the second phase"),
    pytest.param("optimiser_step", 8, 1, 2, 8, id="step 9 behind rollouts"),
]


@pytest.mark.parametrize("place, call, evaluation, more, total", EVALUATIONS)
def test_SIGTERM_ends_with_the_present_network_evaluation(
    base, tmp_path, whole, place, call, evaluation, more, total
):
    """In a step the last pass still runs: in it ranks exchange gradients."""
    words = [*command(base, tmp_path), "--save_every", "100"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="143"):
        later = in_evaluation(patch, place, call, evaluation)
        llada.main(words)
    assert len(later) == more
    assert names(tmp_path)[-1] == f"step-{total:07}"
    llada.main(words)
    check_same(tmp_path, whole)


def test_SIGTERM_is_not_lost_while_ranks_exchange_a_steps_numbers(base, tmp_path, monkeypatch):
    def gather(ranks, t):
        if len(t) == 1 and t.shape[-1] == 4:  # a step's record
            signal.raise_signal(signal.SIGTERM)
        return t

    monkeypatch.setattr(Ranks, "gather", gather)
    with pytest.raises(SystemExit, match="143"):
        llada.main(command(base, tmp_path))
    assert records(tmp_path)[-1]["total"] <= 2


# ---- 2. One process a folder ---------------------------------------------------------------------
def test_a_folder_that_another_process_trains_in_is_refused(base, tmp_path, whole, monkeypatch):
    words = command(base, tmp_path)
    refused = []
    log_step = llada.Run.log_step

    def log_and_start_another(run, *terms, **more):
        log_step(run, *terms, **more)
        if run.state.total == 2:
            refused.append(loop_helpers.child(loop_helpers.__file__, *words))

    monkeypatch.setattr(llada.Run, "log_step", log_and_start_another)
    llada.main(words)
    [other] = refused
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    lines = other.stderr.strip().splitlines()
    assert other.returncode == 1 and len(lines) == 1
    assert f"{tmp_path} is in use by {holder}, which trains there; wait for it" in lines[0]
    check_same(tmp_path, whole)


def test_a_finished_run_is_free_and_folders_do_not_disturb_each_other(base, tmp_path, whole):
    out = shutil.copytree(whole, tmp_path / "finished")
    run = llada.open_run(given(base, tmp_path / "open"), Ranks())
    done = loop_helpers.child(loop_helpers.__file__, "--out", out)
    assert done.returncode == 0 and "done: a = 12" in done.stdout
    llada.main(["--out", str(out)])
    check_same(out, whole)
    assert run.lock.is_locked
    assert (tmp_path / "open" / ".lock-holder").read_text().startswith(f"process {os.getpid()} on")


def test_a_lock_is_given_back_when_training_ends_however_it_ends(base, tmp_path, monkeypatch):
    def fails(*_):
        raise ZeroDivisionError

    run = llada.open_run(given(base, tmp_path), Ranks())
    assert run.lock.is_locked
    monkeypatch.setattr(llada, "optimiser_step", fails)
    with pytest.raises(ZeroDivisionError):
        llada.train(run)
    assert not run.lock.is_locked
