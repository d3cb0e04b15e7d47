"""The loop on tiny models: weights, optimiser, phases, log; the buffer; c; scores; settings."""

import math
from itertools import pairwise
from types import SimpleNamespace

import loop_helpers
import pytest
import torch
from loop_helpers import alone, given, near, read_lines, steady, tuned
from torch import Generator
from torch.testing import assert_close

import dtm
import llada_finetune as llada
from llada_finetune import TASKS, ControlVariate, LoRA, Ranks, learning_rate


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    yield from loop_helpers.small_base(tmp_path_factory.mktemp("base"))


# ---- 1. Four runs, each phase and step of them noted ---------------------------------------------
BEST = {"c": "best", "normalize": "batch", "ema": 0.6, "ess": 0.7, "h": 6.0, "order": "random"}
LEARNED = {"c": "learned", "normalize": "group", "completions": 2, "dropout": 0.1}
PAPER = {"c": ".5", "ema": 0.9, "lora": "paper", "checkpointing": "on", "steps_per_h": 2}
RUNS = [
    pytest.param({"weight_decay": 0.1}, id="raw weights"),
    pytest.param(BEST, id="best scalar c"),
    pytest.param(LEARNED | {"prompts": 8, "refresh": 3, "refresh_steps": 2}, id="learned c"),
    pytest.param(PAPER | {"prompts": 8}, id="paper's maps"),
]


@pytest.fixture(scope="module", params=RUNS)
def seen(base, tmp_path_factory, request):
    with pytest.MonkeyPatch.context() as patch:
        loop_helpers.watch(patch)
        run = llada.open_run(given(base, tmp_path_factory.mktemp("run"), **request.param), Ranks())
        llada.train(run)
    assert len(run.phases) > 2  # the last one is empty
    return run


def test_D1_a_step_takes_different_answers_with_weights_that_tilt(seen):
    cfg = seen.cfg
    for step in sum([phase.steps for phase in seen.phases], []):
        drawn, taken = step.drawn, sum([note.part for note in step.passes], [])
        assert len(set(drawn)) == len(drawn) == cfg.batch * cfg.accum
        assert taken == [i for i in drawn if i in taken]  # the others are masked past their end
        assert len(taken) == sum(int(note.mask.any(1).sum()) for note in step.passes)
        for note in step.passes:
            w = torch.exp(step.h * note.data["r"])
            of_prompts = w.view(-1, cfg.completions).mean(1).repeat_interleave(cfg.completions)
            means = {"none": torch.ones_like(w), "batch": w.mean(), "group": of_prompts}
            near(note.w, (w / means[cfg.normalize])[note.part].float())


def test_a_refresh_renews_the_oldest_answers_every_refresh_steps(seen):
    cfg = seen.cfg
    for phase in seen.phases:
        for place, (before, now) in enumerate(pairwise(phase.steps), 1):
            due = bool(cfg.refresh) and place % cfg.refresh_steps == 0
            gone = cfg.refresh * cfg.completions if due else 0
            old, new = (step.passes[0].data["x1"] for step in (before, now))
            assert torch.equal(old[gone:], new[: len(old) - gone])
            assert torch.equal(old, new) != due
            assert len(new) == cfg.prompts * cfg.completions


def test_a_phase_begins_with_rollouts_of_its_own(seen):
    for before, after in pairwise(seen.phases[:-1]):
        old, new = (step.passes[0].data for step in (before.steps[-1], after.steps[0]))
        assert len(old["x1"]) == len(new["x1"]) and not torch.equal(old["row"], new["row"])


def test_the_student_is_AdamWs_on_the_clipped_mean_gradient_of_a_steps_answers(seen):
    cfg = seen.cfg
    for phase in seen.phases:
        ps = [p.clone().requires_grad_() for p in phase.student.values()]
        adam = torch.optim.AdamW(ps, cfg.lr, (0.9, 0.99), 1e-8, cfg.weight_decay)
        for place, step in enumerate(phase.steps):
            gradients = [note.gradient for note in step.passes]
            for p, *parts in zip(ps, *gradients, strict=True):
                p.grad = torch.stack(parts).sum(0) / (cfg.batch * cfg.accum)
            norm = torch.nn.utils.clip_grad_norm_(ps, cfg.clip)
            adam.param_groups[0]["lr"] = learning_rate(cfg, place)
            adam.step()
            near(norm, torch.tensor(step.grad_norm))
            near([p.detach() for p in ps], [*step.student.values()], atol=1e-4)


def test_the_learning_rate_rises_over_5_and_falls_over_10_percent_of_a_phase(seen):
    cfg = llada.Config(steps_per_h=100, lr=2.0, lr_min=0.5)
    rise = [0.4, 0.8, 1.2, 1.6]
    fall = [2 - 0.15 * i for i in range(1, 11)]
    assert [learning_rate(cfg, i) for i in range(100)] == pytest.approx(rise + [2.0] * 86 + fall)
    assert learning_rate(llada.Config(steps_per_h=1, lr=2.0, lr_min=0.5), 0) == 0.5
    for phase in seen.phases[:-1]:
        expected = [learning_rate(seen.cfg, i) for i in range(seen.cfg.steps_per_h)]
        assert [step.lr for step in phase.steps] == expected


def test_a_phase_ends_at_the_students_average_and_AdamW_starts_anew(seen):
    ema = seen.cfg.ema
    for phase, after in pairwise(seen.phases):
        average = phase.student
        for step in phase.steps:
            now = step.student
            average = {key: ema * t + (1 - ema) * now[key] for key, t in average.items()}
        assert_close(after.teacher, average)
        assert_close(after.student, average)
        assert after.memory == {}
        name = "B.0:v_proj"
        assert (after.student[name] - phase.student[name]).abs().max() > 1e-3


def test_a_phase_begins_at_its_teacher_and_with_c_of_1(seen):
    for number, phase in enumerate(seen.phases[:-1]):
        first, second, *_ = phase.steps
        alike = number == 0 or seen.cfg.dropout == 0  # at first B = 0: nothing is dropped
        assert (first.kl < 1e-6) == alike
        assert phase.steps[-1].kl > 1e-6
        assert (first.c == 1) == (seen.cfg.c in ("1", "best", "learned"))
        assert (second.c == 1) == (seen.cfg.c == "1")


KEYS = """kind total phase a h loss kl c ess reward reward_sd reward_hist solved grad_norm lr
    skipped seconds gpu_gb""".split()


def test_the_log_tells_where_the_run_stands(seen):
    log = read_lines(seen.out / "metrics.jsonl")
    steps = [e for e in log if e["kind"] == "step"]
    evals = [e for e in log if e["kind"] == "eval"]
    assert all(e.keys() == set(KEYS) for e in steps)
    assert [e["total"] for e in steps] == list(range(1, len(steps) + 1))
    assert [e["phase"] for e in steps] == [i // seen.cfg.steps_per_h for i in range(len(steps))]
    assert [e["phase"] for e in evals] == list(range(len(seen.phases)))
    assert {(e["split"], e["n"]) for e in evals} == {("valid", 4)}
    firsts = [phase.steps[0] for phase in seen.phases[:-1]]
    ends = [step.a + step.h for step in firsts]
    assert [step.a for step in firsts] + [seen.cfg.a_end] == pytest.approx([0.0] + ends)


def test_the_log_describes_the_buffer(seen):
    last = seen.phases[-2].steps[-1]
    r = seen.buffer.data["r"]
    w = torch.exp(last.h * r)
    assert last.reward == pytest.approx(float(r.mean()), rel=1e-3)
    assert last.reward_sd == pytest.approx(float(r.std(correction=0)), rel=1e-3)
    assert last.ess == pytest.approx(float(w.mean() ** 2 / w.square().mean()))
    assert last.solved == pytest.approx(float(seen.buffer.data["solved"].mean()))
    assert last.reward_hist == torch.histc(r, 10, 0, TASKS["uneven"].top).tolist()
    assert sum(last.reward_hist) == len(r) == seen.cfg.prompts * seen.cfg.completions
    assert 0 <= r.min() < r.max() <= TASKS["uneven"].top


def test_D9_h_keeps_the_effective_sample_size(seen):
    firsts = [phase.steps[0] for phase in seen.phases[:-1]]
    assert min(step.ess for step in firsts) > seen.cfg.ess - 1e-6
    for step in firsts[:-1]:  # the last h is shortened
        assert step.h == seen.cfg.h or step.ess == pytest.approx(seen.cfg.ess, abs=1e-3)


def test_the_best_adapter_is_the_first_that_solves_most_validation_rows(seen):
    evals = [e for e in read_lines(seen.out / "metrics.jsonl") if e["kind"] == "eval"]
    best = max(evals, key=lambda e: e["solved"])
    saved = LoRA.load(seen.out / "best", seen.model.config)
    assert (seen.state.best_phase, seen.state.best) == (best["phase"], best["solved"])
    assert_close(saved.state_dict(), seen.phases[best["phase"]].teacher, atol=0, rtol=0)


# ---- 2. The buffer ------------------------------------------------------------------------------
def test_the_teacher_fills_the_buffer_as_if_each_prompt_were_alone(base, tmp_path):
    run = tuned(base, tmp_path, prompts=8, completions=2, temperature=0.0)
    buffer = run.buffer
    buffer.fill(4)
    old = {key: t.clone() for key, t in buffer.data.items()}
    rows = old["row"].tolist()
    assert len(set(rows)) == 4 and rows[::2] == rows[1::2]
    for i, number in enumerate(rows):
        row = buffer.rows[number]
        answer, text = alone(run, row, ban_mask=True)
        assert old["x1"][i].tolist() == answer
        assert float(old["r"][i]) == pytest.approx(max(0.0, TASKS["uneven"].reward(text, row)))
        assert old["solved"][i] == TASKS["uneven"].correct(text, row)
    buffer.fill(1)
    for key, t in buffer.data.items():
        assert torch.equal(t[:-2], old[key][2:])
    assert int(buffer.data["row"][-1]) not in rows


def buffer_of(lengths: list[int], longest: int, ranks=None) -> llada.Buffer:
    rows = [{"letters": "0" * n} for n in lengths]
    cfg = llada.make_config(task="uneven", prompt_length=longest)
    return llada.Buffer(cfg, ranks or Ranks(), SimpleNamespace(prompt=list), None, rows)


def test_prompts_that_are_too_long_are_skipped_and_counted(base):
    some = buffer_of([3, 9, 5, 7], longest=5)
    taken = [len(some.rows[i]["letters"]) for i in some.next_rows(6)]
    assert sorted(taken) == [3, 3, 3, 5, 5, 5]
    assert some.skipped in (4, 5, 6)
    assert some.cursor == 6 + some.skipped
    with pytest.raises(ValueError, match="every prompt is longer than --prompt_length 2"):
        buffer_of([3, 9, 5, 7], longest=2).next_rows(1)
    with pytest.raises(ValueError, match="5 ranks share 4 prompts"):
        buffer_of([3, 9, 5, 7], longest=5, ranks=SimpleNamespace(rank=0, size=5))


# ---- 3. A step, and c ---------------------------------------------------------------------------
def test_D3_the_loss_of_a_step_row_by_row(base, tmp_path):
    run = tuned(base, tmp_path, c="0.7")
    run.buffer.fill(16)
    data = run.buffer.data
    part = [4, 0, 3, 5, 7, 8, 11]
    w = torch.linspace(0.1, 2.0, 16)
    losses = []
    kls = []
    for i in part:
        x1 = data["x1"][i : i + 1]
        xt, mask = steady(x1, 23, 8)
        prompt = torch.tensor([run.buffer.prompt(int(data["row"][i]))])
        logs = []
        for name in ("student", "teacher"):
            logits = run.model.use(name)(torch.cat([prompt, xt], 1))[:, -16:]
            logs.append(logits[mask].double().log_softmax(-1))
        log_p, log_a = logs
        target = 0.7 * log_a.exp() + (w[i] - 0.7) * torch.eye(24)[x1[mask]]
        losses.append(-(target * log_p).sum(-1).mean())
        kls.append((log_a.exp() * (log_a - log_p)).sum(-1).mean())
    xt, mask = steady(data["x1"][part], 23, 8)
    assert (xt == 23).sum() > mask.sum()  # some rows had later blocks
    loss = torch.stack(losses).sum()
    kl = torch.stack(kls).sum()
    got, sums = llada.loss_sum(run, run.model, part, xt, mask, w[part])
    positions = mask.sum().double()
    near(sums, torch.stack([loss, kl, 0.7 * positions, positions]).detach())
    parameters = [*run.student.parameters()]
    near(torch.autograd.grad(got, parameters), torch.autograd.grad(loss, parameters))


def batch_of(seed, n=4000):
    """hidden, logits, logits_a, x1, w, share"""
    g = Generator().manual_seed(seed)
    logits, logits_a = torch.randn(2, n, 6, generator=g)
    x1 = torch.randint(6, (n,), generator=g)
    share = 1 / torch.randint(1, 5, (n,), generator=g)
    hidden = torch.randn(n, 8, generator=g)
    w = (1 + 3 * seed) * torch.rand(n, generator=g)
    return hidden, logits, logits_a, x1, w, share


def test_D8_the_best_scalar_c_is_that_of_past_steps_with_forgetting():
    control = ControlVariate("best", 8, torch.device("cpu"))
    one, two = (batch_of(seed) for seed in (0, 1))
    control.observe(*one)
    assert (control(one[0]) == 1).all()  # until the fit
    control.fit(Ranks())
    near(control(two[0]), dtm.best_c(*one[1:]).expand(4000))
    control.observe(*two)
    control.fit(Ranks())
    y1, q1 = dtm.state_c_target(*one[1:5])
    y2, q2 = dtm.state_c_target(*two[1:5])
    q1 = 0.95 * q1 * one[5] ** 2
    q2 = q2 * two[5] ** 2
    near(control(one[0])[0], ((q1 * y1).sum() + (q2 * y2).sum()) / (q1.sum() + q2.sum()))


def test_D7_the_learned_c_recovers_a_linear_c():
    control = ControlVariate("learned", 8, torch.device("cpu"))
    hidden, logits, _, x1, _, share = batch_of(0)
    other = batch_of(1)[0]
    slope = torch.linspace(-1, 1, 8)
    control.observe(hidden, logits, logits, x1, 2 + hidden @ slope, share)  # theta = a: y = w
    assert (control(hidden) == 1).all()
    control.fit(Ranks())
    assert_close(control(other), 2 + other @ slope, atol=0.02, rtol=0)


@pytest.mark.parametrize("c", ["best", "learned"])
def test_c_never_depends_on_the_batch_that_it_serves(base, tmp_path, c):
    means = []
    for scale in (1.0, 50.0):
        run = tuned(base, tmp_path, c=c)
        run.buffer.fill(6)
        for i, w in enumerate([torch.linspace(0, 2, 4), scale * torch.ones(4), torch.ones(4)]):
            noise = Generator().manual_seed(i)
            xt, mask = dtm.mask_blockwise(run.buffer.data["x1"][:4], 23, 8, noise)
            _, sums = llada.loss_sum(run, run.model, [0, 1, 2, 3], xt, mask, w)
            means.append(float(sums[2] / sums[3]))
            run.control.fit(Ranks())
    assert means[0] == means[3] == 1
    assert means[1] == means[4] != 1
    assert means[2] != means[5]


# ---- 4. Scores ----------------------------------------------------------------------------------
def test_scores_are_those_of_answers_decoded_alone(base, tmp_path):
    task = TASKS["uneven"]
    run = tuned(base, tmp_path)
    rows = task.rows("test")
    scores = llada.evaluate(run, rows, 16, tmp_path / "eval.jsonl")
    lines = []
    for row in rows:
        _, text = alone(run, row)
        solved = float(task.correct(text, row))
        line = {"row": row, "text": text, "solved": solved, "reward": task.reward(text, row)}
        lines.append(line | {"cells": [*task.cells(text, row)]})
    assert read_lines(tmp_path / "eval.jsonl") == lines
    assert len({line["text"] for line in lines}) > 3
    assert scores["n"] == len(rows) == 7
    for key in ("solved", "reward"):
        of_rows = torch.tensor([line[key] for line in lines]).double()
        assert scores[key] == pytest.approx(float(of_rows.mean()))
        assert scores[f"{key}_se"] == pytest.approx(float(of_rows.std(correction=0)) / 7**0.5)
    right, whole = torch.tensor([line["cells"] for line in lines]).double().unbind(1)
    share = right.sum() / whole.sum()
    error = (right - share * whole).square().mean().sqrt() / whole.mean() / 7**0.5
    assert (scores["cells"], scores["cells_se"]) == pytest.approx((float(share), float(error)))


# ---- 5. Settings --------------------------------------------------------------------------------
PUBLISHED = dict(a_end=100, seed=42, c="1", gen_length=256, block=32, steps=128, rank=128, alpha=64)
PUBLISHED |= dict(weight_decay=0.1, dropout=0.05, save_every=100, order="confidence", ess=0)
SUDOKU = dict(h=5, steps_per_h=256, prompts=80, completions=1, refresh=20, refresh_steps=32, ema=0)
SUDOKU |= dict(chunk=16, batch=4, accum=16, lr=3e-6, lr_min=1e-6, clip=1, temperature=0)
SUDOKU |= dict(prompt_length=1132, normalize="none")
COUNTDOWN = dict(h=6, steps_per_h=1200, prompts=40, completions=6, refresh=10, refresh_steps=25)
COUNTDOWN |= dict(chunk=30, batch=12, accum=8, lr=4e-6, lr_min=2e-6, clip=2, temperature=1)
COUNTDOWN |= dict(prompt_length=172, normalize="none", ema=0.95)
PRESETS = [("sudoku", SUDOKU, 2, 512, 20), ("countdown", COUNTDOWN, 1, 768, 17)]


@pytest.mark.parametrize("task, settings, top, answers_a_step, phases", PRESETS)
def test_presets_are_the_published_ones(task, settings, top, answers_a_step, phases):
    cfg = llada.make_config(task=task)
    expected = PUBLISHED | settings
    assert {name: getattr(cfg, name) for name in expected} == expected
    assert (TASKS[task].top, 8 * cfg.batch * cfg.accum) == (top, answers_a_step)
    assert len([*dtm.phases(cfg.a_end, cfg.h)]) == phases
    assert llada.make_config(task=task, seed=7).out == f"runs/{task}-7"


BAD = [
    ("task", ["chess"]),
    ("normalize", ["all"]),
    ("lora", ["none"]),
    ("order", ["left"]),
    ("c", ["-1", "x", "nan", "1;", ""]),
    ("lr", [-1e-6, 0.0, math.inf, math.nan]),
    ("h", [0.0, math.nan]),
    ("batch", [0, -4, 21]),
    ("accum", [0, 81]),
    ("seed", [-1]),
    ("ess", [1.0, -0.1]),
    ("dropout", [1.0]),
    ("ema", [1.0, 1.5]),
    ("temperature", [-1.0, math.inf]),
    ("rank", [0]),
    ("clip", [0.0]),
    ("gen_length", [100, 0]),
    ("block", [0, 512, 48]),
    ("steps", [0, 100, 4]),
    ("refresh", [81, -1, 0]),
    ("eval_rows", [-1]),
]


@pytest.mark.parametrize("name, values", BAD)
def test_a_bad_setting_is_named(name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"--{name}\b"):
            llada.make_config(**{"batch": 1, name: value})
