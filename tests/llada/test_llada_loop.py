"""The loop on a tiny LLaDA: loss, weights, AdamW, phases, rollouts, control variate, evaluation."""

from itertools import groupby, pairwise
from types import SimpleNamespace

import loop_helpers
import pytest
import torch
from loop_helpers import MASK, Uneven, V, alone, near, read_lines, settings, steps_on, tuned
from torch import Generator, Tensor

import dtm
import llada_finetune as finetune
from llada.distributed import Ranks
from llada.lora import LoRA
from llada.tasks import TASKS


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    yield from loop_helpers.small_base(tmp_path_factory.mktemp("base"))


# ---- 1. Whole runs, watched ----------------------------------------------------------------------
def loss_by_rows(run: finetune.Run, batch: finetune.MicroBatch, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums over a micro-batch of the loss (D3) and of KL(pi_a || pi_theta).

    Each completion goes through the model alone, without padding, and the target of each of its
    positions is written out as a distribution over V tokens.
    """
    losses, kls, cs = [], [], iter(c.tolist())
    rows = zip(unpadded(batch), batch.x1, batch.xt, batch.mask, batch.w, strict=True)
    for prompt, x1, xt, mask, w in rows:
        log = {}
        for name in ("teacher", "student"):
            logits = run.model.use(name)(torch.cat([prompt, xt])[None])[0, -len(xt) :]
            log[name] = logits.log_softmax(-1)
        for t in mask.nonzero()[:, 0]:
            c_t, pi_a = next(cs), log["teacher"][t].detach().exp()
            target = c_t * pi_a + (w - c_t) * torch.eye(V)[x1[t]]
            losses.append(-(target * log["student"][t]).sum() / mask.sum())
            kls.append((pi_a * (log["teacher"][t] - log["student"][t])).sum() / mask.sum())
    return torch.stack(losses).sum(), torch.stack(kls).sum()


def unpadded(batch: finetune.MicroBatch) -> list[Tensor]:
    """Return the prompts of a micro-batch without padding."""
    ids, visible = batch.prompts
    return [*ids] if visible is None else [row[v] for row, v in zip(ids, visible, strict=True)]


def copies(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def watched(base, out, **more) -> SimpleNamespace:
    """Train a run in float64, and return it with what happened in each of its steps."""
    run = finetune.open_run(settings(base, out, **more), Ranks())
    run.model.double()
    finetune.begin_phase(run)
    steps, micro_batches, student = [], [], [*run.student.parameters()]
    trained_positions, log_step = finetune.trained_positions, finetune.log_step

    def watch_micro_batch(run, batch):
        at = trained_positions(run, batch)
        loss, kl = loss_by_rows(run, batch, at.c)
        gradient = torch.autograd.grad(loss, student)
        expected = {"loss": loss.item(), "kl": kl.item(), "gradient": gradient}
        micro_batches.append(SimpleNamespace(batch=batch, at=at, **expected))
        return at

    def watch_step(run, *sums, **more):
        step = {"data": run.buffer.data, "micro_batches": [*micro_batches]}
        step |= {"student": copies(run.student), "teacher": copies(run.teacher)}
        steps.append(SimpleNamespace(**step))
        micro_batches.clear()
        log_step(run, *sums, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "trained_positions", watch_micro_batch)
        patch.setattr(finetune, "log_step", watch_step)
        finetune.train(run)
    log = read_lines(out / "metrics.jsonl")
    for step, record in zip(steps, [e for e in log if e["kind"] == "step"], strict=True):
        vars(step).update(record)
    phases = [[*phase] for _, phase in groupby(steps, lambda step: step.phase)]
    assert len(phases) >= 2
    return SimpleNamespace(run=run, cfg=run.cfg, phases=phases, steps=steps, log=log)


BEST = {"c": "best", "normalize": "batch", "ema": 0.6, "ess": 0.5, "h": 2.0, "a_end": 5.0}
LEARNED = {"c": "learned", "normalize": "group", "completions": 2, "prompts": 8}
FOUR = {"lora": "paper", "c": ".5", "ema": 0.9, "order": "random", "recompute": True}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param({"weight_decay": 0.1}, id="raw weights"),
        pytest.param(BEST, id="best scalar c"),
        pytest.param(LEARNED | {"refresh": 3, "refresh_steps": 2}, id="learned c"),
        pytest.param(FOUR | {"prompts": 8, "steps_per_h": 2}, id="four projections"),
    ],
)
def history(base, tmp_path_factory, request):
    return watched(base, tmp_path_factory.mktemp("run"), **request.param)


def place_in_buffer(run: finetune.Run, step: SimpleNamespace) -> list[list[int]]:
    """Return, for each micro-batch of a step, the places of its completions in the buffer."""
    rows = step.data["row"].tolist()
    place = {}
    for i, (row, x1) in enumerate(zip(rows, step.data["x1"].tolist(), strict=True)):
        place[(*run.buffer.prompt(row), None, *x1)] = i
    assert len(place) == len(rows)
    places = []
    for m in step.micro_batches:
        prompts = [prompt.tolist() for prompt in unpadded(m.batch)]
        pairs = zip(prompts, m.batch.x1.tolist(), strict=True)
        places.append([place[(*prompt, None, *x1)] for prompt, x1 in pairs])
    return places


def test_a_step_takes_different_completions(history):
    for step in history.steps:
        taken = sum(place_in_buffer(history.run, step), [])
        assert len(set(taken)) == len(taken) <= history.cfg.batch * history.cfg.accum


def test_D1_the_weights_tilt_by_h_and_are_normalized_as_the_setting_says(history):
    for step in history.steps:
        rows, w = step.data["row"], (step.h * step.data["r"]).exp()
        means = {
            "none": [1.0] * len(w),
            "batch": [float(w.mean())] * len(w),
            "group": [float(w[rows == row].mean()) for row in rows],
        }[history.cfg.normalize]
        for m, places in zip(step.micro_batches, place_in_buffer(history.run, step), strict=True):
            expected = [float(w[i]) / means[i] for i in places]
            assert m.batch.w.tolist() == pytest.approx(expected, rel=1e-6)


def test_D3_the_loss_of_a_step_row_by_row(history):
    drawn = history.cfg.batch * history.cfg.accum
    for step in history.steps:
        for name in ("loss", "kl"):
            expected = sum(getattr(m, name) for m in step.micro_batches) / drawn
            assert getattr(step, name) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_the_student_starts_at_the_teacher_and_follows_AdamW_on_the_clipped_mean_gradient(history):
    cfg, clipped = history.cfg, 0
    for phase in history.phases:
        ps = [p.clone().requires_grad_() for p in phase[0].teacher.values()]
        adam = torch.optim.AdamW(ps, cfg.lr, (0.9, 0.99), 1e-8, cfg.weight_decay)
        for step in phase:
            for p, *gradients in zip(ps, *[m.gradient for m in step.micro_batches], strict=True):
                p.grad = sum(gradients) / (cfg.batch * cfg.accum)
            norm = float(sum(p.grad.square().sum() for p in ps)) ** 0.5
            assert step.grad_norm == pytest.approx(norm, rel=1e-4)
            for p in ps:
                p.grad *= min(1, cfg.clip / norm)
            clipped += norm > cfg.clip
            adam.param_groups[0]["lr"] = step.lr
            adam.step()
            near([*step.student.values()], [p.detach() for p in ps], atol=1e-4)
        rates = [cfg.lr] * (len(phase) - 1) + [cfg.lr_min]  # so short a phase does not rise
        assert [step.lr for step in phase] == pytest.approx(rates)
    assert clipped


def test_the_learning_rate_rises_over_5_and_falls_over_10_percent_of_a_phase():
    cfg = finetune.Config(steps_per_h=100, lr=2.0, lr_min=0.5)
    rise = [0.4, 0.8, 1.2, 1.6]
    fall = [2 - 0.15 * i for i in range(1, 11)]
    rates = [finetune.learning_rate(cfg, i) for i in range(100)]
    assert rates == pytest.approx(rise + [2.0] * 86 + fall)
    assert finetune.learning_rate(finetune.Config(steps_per_h=1, lr=2.0, lr_min=0.5), 0) == 0.5


def test_a_phase_ends_at_the_students_average(history):
    ema = history.cfg.ema
    last = SimpleNamespace(teacher=copies(history.run.teacher))
    for phase, (after, *_) in pairwise([*history.phases, [last]]):
        average = phase[0].teacher
        for step in phase:
            average = {k: ema * t + (1 - ema) * step.student[k] for k, t in average.items()}
        near(after.teacher, average)
        assert (average["B.0:v_proj"] - phase[0].teacher["B.0:v_proj"]).abs().max() > 1e-3


def test_a_refresh_replaces_the_oldest_rollouts(history):
    cfg = history.cfg
    for phase in history.phases:
        for place, (before, now) in enumerate(pairwise(phase), 1):
            due = cfg.refresh > 0 and place % cfg.refresh_steps == 0
            gone = cfg.refresh * cfg.completions if due else 0
            for key, old in before.data.items():
                assert torch.equal(old[gone:], now.data[key][: len(old) - gone])
            assert torch.equal(before.data["x1"], now.data["x1"]) != due
            assert len(now.data["x1"]) == cfg.prompts * cfg.completions


def test_a_phase_begins_with_rollouts_of_its_own(history):
    for before, after in pairwise(history.phases):
        old, new = before[-1].data["row"].tolist(), after[0].data["row"].tolist()
        assert len(old) == len(new) and not set(old) & set(new)


def test_D7_D8_c_is_fitted_to_the_past_steps_of_the_phase_by_least_squares(history):
    """The squared errors are weighted by q share^2, and by .95 per step since; c = 1 at first."""
    for phase in history.phases:
        for age, step in enumerate(phase):
            c = torch.cat([m.at.c for m in step.micro_batches]).double()
            hidden = torch.cat([m.at.hidden for m in step.micro_batches])
            if age == 0 or history.cfg.c not in ("best", "learned"):
                constant = 1.0 if history.cfg.c in ("best", "learned") else float(history.cfg.c)
                near(c, torch.full_like(c, constant))
            else:
                coefficients = fit_c(phase[:age], learned=history.cfg.c == "learned")
                near(c, features(hidden, len(coefficients)) @ coefficients, rtol=1e-3)


def features(hidden: Tensor, count: int) -> Tensor:
    """Return 1 and the hidden state: it is so narrow that c depends on all of it."""
    return torch.cat([torch.ones(len(hidden), 1), hidden], 1)[:, :count].double()


def fit_c(past: list, learned: bool) -> Tensor:
    """Return the ridge regression as ordinary least squares with a row for each penalty."""
    X, Y, weights = [], [], []
    for age, step in enumerate(reversed(past)):
        for m in step.micro_batches:
            y, q = dtm.control_variate_targets(m.at.logits, m.at.logits_a, m.at.x1, m.at.w)
            share = 1 / m.batch.mask.sum(1).repeat_interleave(m.batch.mask.sum(1))
            X.append(features(m.at.hidden, 33 if learned else 1))
            Y.append(y)
            weights.append(0.95**age * q * share**2)
    X, Y, weights = torch.cat(X), torch.cat(Y), torch.cat(weights)
    ridge = 1e-3 * (weights[:, None] * X**2).sum() / X.shape[1]
    penalties = ridge.sqrt() * torch.eye(X.shape[1]).double()[1:]
    rows = torch.cat([weights.sqrt()[:, None] * X, penalties])
    targets = torch.cat([weights.sqrt() * Y, torch.zeros(len(penalties))])
    return torch.linalg.lstsq(rows, targets).solution


def test_D7_the_learned_c_recovers_a_linear_c():
    """With student = teacher the target y is w, here a linear function of the hidden state."""
    noise = Generator().manual_seed(0)
    hidden, other = torch.randn(2, 4000, 8, generator=noise)
    logits, x1 = torch.randn(4000, 6, generator=noise), torch.randint(6, (4000,), generator=noise)
    slope = torch.linspace(-1, 1, 8)
    at = finetune.Positions(
        logits=logits,
        logits_a=logits,
        hidden=hidden,
        x1=x1,
        w=2 + hidden @ slope,
        c=torch.ones(4000),
        share=torch.ones(4000),
    )
    control = finetune.ControlVariate("learned", 8, torch.device("cpu"))
    control.observe(at)
    assert (control(hidden) == 1).all()  # the step that it has just history is no past step
    control.fit(Ranks())
    near(control(other), 2 + other @ slope, atol=0.02)


def test_the_log_says_where_the_run_stands(history):
    length = history.cfg.steps_per_h
    assert [step.total for step in history.steps] == [*range(1, len(history.steps) + 1)]
    assert [step.phase for step in history.steps] == [
        i // length for i in range(len(history.steps))
    ]
    evaluations = [e for e in history.log if e["kind"] == "eval"]
    assert [e["phase"] for e in evaluations] == [*range(len(history.phases) + 1)]
    assert [e["total"] for e in evaluations] == [i * length for i in range(len(evaluations))]
    ends = [phase[0].a + phase[0].h for phase in history.phases]
    assert [e["a"] for e in evaluations] == pytest.approx([0.0, *ends])
    assert [phase[0].a for phase in history.phases] == pytest.approx([0.0, *ends[:-1]])
    assert ends[-1] == pytest.approx(history.cfg.a_end)


def test_the_log_describes_the_buffer(history):
    for step in history.steps:
        r, w = step.data["r"], (step.h * step.data["r"]).exp()
        assert step.reward == pytest.approx(float(r.mean()))
        assert step.reward_sd == pytest.approx(float((r - r.mean()).square().mean()) ** 0.5)
        assert step.ess == pytest.approx(float(w.mean() ** 2 / w.square().mean()))
        assert step.solved == pytest.approx(float(step.data["solved"].mean()))
        bins = [min(9, int(10 * value / Uneven.top)) for value in r.tolist()]
        assert step.reward_hist == [bins.count(i) for i in range(10)]
        c = torch.cat([m.at.c for m in step.micro_batches])
        assert step.c == pytest.approx(float(c.mean()), rel=1e-4)
        assert step.seconds.keys() == {"rollout", "train", "eval", "save"} and step.skipped == 0


def test_D9_h_keeps_the_effective_sample_size(history):
    firsts = [phase[0] for phase in history.phases]
    assert min(step.ess for step in firsts) > history.cfg.ess - 1e-6
    for step in firsts[:-1]:  # the last h is cut at a_end
        assert step.h == history.cfg.h or step.ess == pytest.approx(history.cfg.ess, abs=1e-3)


def test_RUN_best_is_the_first_teacher_that_solves_most_validation_rows(history):
    evaluations = [e for e in history.log if e["kind"] == "eval"]
    best = max(evaluations, key=lambda e: e["solved"])["phase"]
    teachers = [phase[0].teacher for phase in history.phases] + [copies(history.run.teacher)]
    saved = LoRA.load(history.run.out / "best", history.run.model.config)
    near(copies(saved), {k: t.float() for k, t in teachers[best].items()})


# ---- 2. Rollouts ---------------------------------------------------------------------------------
def test_rollouts_are_the_teachers_completions_as_if_each_prompt_were_alone(base, tmp_path):
    task = TASKS["uneven"]
    run = tuned(base, tmp_path, prompts=8, completions=2, temperature=0.0)
    finetune.fill_buffer(run, 8)
    data = run.buffer.data
    rows = data["row"].tolist()
    assert len(set(rows)) == 8 and rows[::2] == rows[1::2]
    for i, number in enumerate(rows):
        row = run.buffer.rows[number]
        completion, text = alone(run, row, ban_mask=True, ends=run.tokenizer.ends)
        assert data["x1"][i].tolist() == completion
        assert float(data["r"][i]) == pytest.approx(max(0.0, task.reward(text, row)))
        assert data["solved"][i] == task.correct(text, row)


def test_prompts_that_are_too_long_are_skipped_and_counted(base, tmp_path):
    run = tuned(base, tmp_path, prompt_length=6)
    fitting = [i for i, row in enumerate(run.buffer.rows) if len(row["letters"]) <= 5]  # and BOS
    taken = run.buffer.next_rows(2 * len(fitting))  # twice around
    assert sorted(taken) == sorted(2 * fitting)
    long = len(run.buffer.rows) - len(fitting)
    assert long < run.buffer.skipped <= 2 * long


# ---- 3. Completions that end ---------------------------------------------------------------------
SHORT = {"gen_length": 4, "block": 2, "steps": 4, "prompts": 6, "batch": 2, "accum": 3}
SHORT |= {"c": "0.7", "a_end": 2.0, "clip": 1e9}
# The end token is 1: in the first block, in the second one, nowhere, first and again later.
ENDED = [[5, 1, 7, 8], [1, 1, 1, 1], [4, 6, 1, 9], [4, 6, 9, 1], [7, 7, 8, 4], [1, 5, 1, 6]]
REACHED = torch.tensor([[1, 1, 0, 0]] * 2 + [[1, 1, 1, 1]] * 3 + [[1, 1, 0, 0]]).bool()
# The masks of `mask_blockwise` and their probabilities: 1, 2, 3 or 4 tokens are still to be drawn.
MASKS = {(2,): 1 / 8, (3,): 1 / 8, (2, 3): 1 / 4, (0,): 1 / 8, (1,): 1 / 8, (0, 1): 1 / 4}


def masked(x1: Tensor, positions: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return xt and mask, (B, L), with the same masked positions in all rows."""
    mask = torch.zeros(x1.shape, dtype=torch.bool)
    mask[:, list(positions)] = True
    hidden = mask.clone()
    hidden[:, positions[0] // 2 * 2 + 2 :] = True  # the blocks to the right
    return torch.where(hidden, MASK, x1), mask


def mask_at(patch: pytest.MonkeyPatch, positions: tuple[int, ...]) -> None:
    patch.setattr(finetune, "mask_blockwise", lambda x1, *_: masked(x1, positions))


def rollouts(x1: list[list[int]]) -> dict[str, Tensor]:
    r = torch.linspace(0, 0.5, len(x1)).double()
    return {"row": torch.arange(len(x1)), "x1": torch.tensor(x1), "r": r, "solved": r.clone()}


def full_gradient(run: finetune.Run, positions: tuple[int, ...]) -> list[Tensor]:
    """Return the gradient of the mean loss; behind the block of the end a position counts 0."""
    loss, data = 0.0, rollouts(ENDED)
    for row, x1, r, reached in zip(data["row"], data["x1"], data["r"], REACHED, strict=True):
        xt, mask = masked(x1[None], positions)
        ids = torch.cat([torch.tensor([run.buffer.prompt(int(row))]), xt], 1)
        logits_a = run.model.use("teacher")(ids)[:, -4:].detach()
        logits = run.model.use("student")(ids)[:, -4:]
        each = dtm.c_dtm_loss(logits, logits_a, x1[None], (2.0 * r).exp(), 0.7)  # (1, L)
        loss = loss + (each * mask * reached).sum() / mask.sum() / len(ENDED)
    return [*torch.autograd.grad(loss, [*run.student.parameters()])]


def test_the_masks_are_those_of_mask_blockwise():
    """8,000 draws: an error of 5 standard errors, .0242 at p = 1/4, has probability 3e-6."""
    x1 = torch.tensor([[4, 5, 6, 7]]).expand(8000, 4)
    xt, _ = dtm.mask_blockwise(x1, MASK, 2, Generator().manual_seed(0))
    states, count = xt.unique(dim=0, return_counts=True)
    shares = dict(zip(map(tuple, states.tolist()), (count / 8000).tolist(), strict=True))
    expected = {tuple(masked(x1[:1], at)[0][0].tolist()): p for at, p in MASKS.items()}
    assert shares == pytest.approx(expected, abs=0.0242)


def test_D3_the_mean_gradient_is_that_of_the_full_loss_up_to_the_block_of_the_end(
    base, tmp_path, monkeypatch
):
    mean, expected = 0.0, 0.0
    for positions, p in MASKS.items():
        run = tuned(base, tmp_path, **SHORT)
        expected += p * flat(full_gradient(run, positions))
        mask_at(monkeypatch, positions)
        [gradient] = steps_on(run, rollouts(ENDED)).gradients
        mean += p * flat(gradient)
    assert (mean - expected).norm() < 1e-5 * expected.norm()


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def test_what_follows_the_block_of_the_end_changes_nothing(base, tmp_path):
    other = torch.where(REACHED, torch.tensor(ENDED), 12).tolist()
    assert other != ENDED
    for seed in range(4):
        runs = [tuned(base, tmp_path, seed=seed, **SHORT) for _ in range(2)]
        one, two = steps_on(runs[0], rollouts(ENDED)), steps_on(runs[1], rollouts(other))
        assert one.rows == two.rows
        assert torch.equal(flat(one.gradients[0]), flat(two.gradients[0]))


def test_completions_without_a_trained_position_are_left_out(base, tmp_path, monkeypatch):
    mask_at(monkeypatch, (2, 3))
    for past_end, rows in ((False, [2, 2, 1, 1]), (True, [2] * 6)):  # of teacher and student
        run = tuned(base, tmp_path, past_end=past_end, **SHORT)
        assert steps_on(run, rollouts(ENDED)).rows == rows


def test_a_step_without_any_trained_position_has_a_zero_gradient(base, tmp_path, monkeypatch):
    mask_at(monkeypatch, (2,))
    run = tuned(base, tmp_path, **SHORT, weight_decay=0.5)
    before = copies(run.student)
    steps_on(run, rollouts([ENDED[i] for i in (0, 1, 5, 0, 1, 5)]))
    [log] = read_lines(tmp_path / "metrics.jsonl")
    assert [log[name] for name in ("grad_norm", "loss", "kl", "c")] == [0, 0, 0, 0]
    near(copies(run.student), {k: p * (1 - log["lr"] * 0.5) for k, p in before.items()})


@pytest.mark.parametrize("c", ["0.7", "learned"])
def test_the_size_of_a_micro_batch_changes_nothing(base, tmp_path, c):
    gradients = []
    for batch in (1, 2, 3, 6):
        sizes = {"batch": batch, "accum": 6 // batch}
        run = tuned(base, tmp_path / str(batch), **SHORT | sizes | {"c": c})
        gradients.append(flat(sum(steps_on(run, rollouts(ENDED), 3).gradients, [])))
        near(gradients[-1], gradients[0], atol=1e-4, rtol=1e-4)  # c is float32


# ---- 4. Evaluation -------------------------------------------------------------------------------
def test_scores_are_those_of_completions_decoded_alone(base, tmp_path):
    task = TASKS["uneven"]
    rows = task.rows("test")
    run = tuned(base, tmp_path)
    how = {"cfg": run.cfg, "tokenizer": run.tokenizer, "ranks": run.ranks}
    model = run.model.use("teacher")
    scores = finetune.evaluate(model, rows, **how, path=tmp_path / "eval.jsonl")

    lines = []
    for row in rows:
        _, text = alone(run, row)
        line = {"row": row, "text": text, "solved": float(task.correct(text, row))}
        line |= {"reward": task.reward(text, row), "cells": [*task.cells(text, row)]}
        lines.append(line)
    assert read_lines(tmp_path / "eval.jsonl") == lines
    assert len({line["text"] for line in lines}) > 3

    expected = {"n": 7}
    for key in ("solved", "reward"):
        each = torch.tensor([line[key] for line in lines]).double()
        expected |= {key: float(each.mean()), f"{key}_se": float(each.std(correction=0)) / 7**0.5}
    right, all_cells = torch.tensor([line["cells"] for line in lines]).double().unbind(1)
    share = right.sum() / all_cells.sum()
    error = (right - share * all_cells).square().mean().sqrt() / all_cells.mean() / 7**0.5
    assert scores == pytest.approx(expected | {"cells": float(share), "cells_se": float(error)})
