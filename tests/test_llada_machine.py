"""A run and its machine: SIGTERM, the lock on a folder, memory, compilation, other devices."""

import signal

import loop_helpers
import pytest
from loop_helpers import check_same, command, names, records, stop_in_step

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


def test_SIGTERM_is_not_lost_while_ranks_exchange_a_steps_numbers(base, tmp_path, monkeypatch):
    def gather(ranks, t):
        if len(t) == 1 and t.shape[-1] == 4:  # a step's record
            signal.raise_signal(signal.SIGTERM)
        return t

    monkeypatch.setattr(Ranks, "gather", gather)
    with pytest.raises(SystemExit, match="143"):
        llada.main(command(base, tmp_path))
    assert records(tmp_path)[-1]["total"] <= 2
