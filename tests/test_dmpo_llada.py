"""DMPO on LLaDA: its bounds, its groups, the gradient of a step, a run that is stopped."""

import signal

import pytest
import torch
from loop_helpers import given, in_evaluation, in_step, near, records, small_base
from torch.testing import assert_close

import llada_finetune as llada
from figures import dmpo_llada as dmpo
from figures import objectives
from llada_finetune import Ranks


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    yield from small_base(tmp_path_factory.mktemp("base"))


def dmpo_run(base, out, **more) -> llada.Run:
    quick = {"a_end": 2.0, "lr": 0.01, "steps": 4, "clip": 9.0, "batch": 16, "chunk": 64}
    settings = dmpo.SETTINGS | quick | more
    return llada.open_run(given(base, out, **settings), Ranks())


def test_the_bounds_of_a_uniform_model_are_known(base, tmp_path):
    run = dmpo_run(base, tmp_path)
    dmpo.begin_round(run)
    run.model.model["transformer"]["ff_out"].weight.zero_()
    state = run.generator.get_state()
    found = dmpo.bounds(run)
    run.generator.set_state(state)
    expected = torch.zeros(64)
    for part in dmpo.batches(run):  # an empty mask counts 0, as published
        for mask in dmpo.antithetic_masks(run.buffer.data["x1"][part], run):
            expected[part] -= mask.any(1) / 4 * 16 * torch.tensor(24.0).log()
    near(found["log_cur"].float(), expected)
    near(found["log_pre"].float(), expected)


def test_a_round_has_four_whole_groups_and_their_weights(base, tmp_path):
    run = dmpo_run(base, tmp_path)
    dmpo.begin_round(run)
    data = run.buffer.data
    rows = data["row"].view(4, 16)
    assert (rows == rows[:, :1]).all() and len(rows[:, 0].unique()) == 4
    for i in range(4):
        group = slice(16 * i, 16 * (i + 1))
        r = data["r"][group] / 0.04
        d = data["log_pre"][group] - data["log_cur"][group]
        assert_close(data["w"][group], (d + r).softmax(0) - (d - r).softmax(0))


def test_sudokus_reward_is_not_doubled(base, tmp_path, monkeypatch):
    task = llada.TASKS["uneven"]
    monkeypatch.setattr(dmpo, "Sudoku", type(task))
    run = dmpo_run(base, tmp_path)
    dmpo.begin_round(run)
    halved = run.buffer.data["r"].clone()
    texts = [run.text.answer(answer) for answer in run.buffer.data["x1"].tolist()]
    rows = [run.buffer.rows[i] for i in run.buffer.data["row"].tolist()]
    full = [max(0.0, task.reward(text, row)) for text, row in zip(texts, rows, strict=True)]
    assert_close(2 * halved, torch.tensor(full).double())


def test_a_step_descends_the_weighted_cross_entropy_of_the_whole_buffer(base, tmp_path):
    run = dmpo_run(base, tmp_path, dropout=0.0, weight_decay=0.0)
    dmpo.begin_round(run)
    data, params = run.buffer.data, [*run.student.parameters()]
    for p in params:
        torch.nn.init.normal_(p.data, std=0.1)
    state = run.generator.get_state()
    loss = 0.0
    for part in dmpo.batches(run):
        masks = dmpo.antithetic_masks(data["x1"][part], run)
        for i, row in enumerate(part):  # one answer and one state at a time
            prompt = torch.tensor([run.buffer.prompt(int(data["row"][row]))])
            x1 = data["x1"][row : row + 1]
            for mask in masks:
                here = mask[i : i + 1]
                if here.any():
                    ids = torch.cat([prompt, torch.where(here, 23, x1)], 1)
                    logits = run.model.use("student")(ids)[:, -16:].double()
                    hit = logits.log_softmax(-1).gather(-1, x1[..., None])[..., 0]
                    loss = loss - data["w"][row] * hit[here].mean() / 4 / 8
    expected = torch.autograd.grad(loss, params)
    run.generator.set_state(state)
    found = []
    run.adam.register_step_pre_hook(lambda *_: found.extend(p.grad.clone() for p in params))
    dmpo.optimiser_step(run, run.model)
    near(found, [g.float() for g in expected])
    near(torch.tensor(records(tmp_path)[-1]["loss"]), loss.detach().float())


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A run of two rounds that never stopped."""
    run = dmpo_run(base, tmp_path_factory.mktemp("whole"))
    dmpo.tune(run)
    assert any(p.any() for p in run.student.B.values()) and run.state.total == 16
    return run


STOPS = [
    pytest.param(None, 3, 100, 1, id="step 3"),
    pytest.param("evaluate", 0, 100, 0, id="scores at first"),
    pytest.param("answered", 0, 100, 0, id="rollouts of the first round"),
    pytest.param("answered", 1, 100, 1, id="rollouts of the second round"),
    pytest.param("evaluate", 1, 1, 1, id="scores after a round"),
]


@pytest.mark.parametrize("place, call, save_every, phase", STOPS)
def test_a_stopped_run_goes_on_bit_for_bit(base, tmp_path, whole, place, call, save_every, phase):
    stopped = dmpo_run(base, tmp_path, save_every=save_every)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="143"):
        if place:
            later = in_evaluation(patch, place, call, 2)
        else:
            in_step(patch, call, signal.SIGTERM)
        dmpo.tune(stopped)
    assert stopped.state.phase == phase and (place is None or later == [])
    again = dmpo_run(base, tmp_path)
    dmpo.tune(again)
    steps = [[e for e in records(run.out) if e["kind"] == "step"] for run in (again, whole)]
    assert steps[0] == steps[1] and records(tmp_path)[-1] == records(whole.out)[-1]
    if save_every == 1:
        assert records(tmp_path) == records(whole.out)
    assert_close(again.student.state_dict(), whole.student.state_dict(), atol=0, rtol=0)


def test_the_answers_must_split_over_the_ranks(base, tmp_path):
    run = dmpo_run(base, tmp_path)
    run.ranks.size = 3
    with pytest.raises(ValueError, match="64 answers do not split over 3 ranks"):
        dmpo.begin_round(run)


def test_weights_do_not_depend_on_the_share_of_a_rank(base, tmp_path, monkeypatch):
    run = dmpo_run(base, tmp_path)
    dmpo.begin_round(run)
    whole = run.buffer.data
    run.buffer.cursor = 0
    run.ranks.rank, run.ranks.size = 1, 8  # the second of eight: half of the first group

    def second_half(rows):
        return {key: whole[key][8:16] for key in ("row", "x1", "r", "solved")}

    monkeypatch.setattr(run.buffer, "answered", second_half)
    monkeypatch.setattr(dmpo, "bounds", lambda run: {})
    monkeypatch.setattr(run.buffer, "everywhere", whole.get)
    dmpo.begin_round(run)
    assert_close(run.buffer.data["w"], whole["w"][8:16])


def test_weights_are_taken_group_by_group():
    g = torch.Generator().manual_seed(0)
    r, cur, pre = torch.rand(3, 2, 5, generator=g).double()
    found = objectives.dmpo_weights(r, cur, pre, 0.04)
    d = pre - cur
    assert_close(found, (d + r / 0.04).softmax(1) - (d - r / 0.04).softmax(1))
