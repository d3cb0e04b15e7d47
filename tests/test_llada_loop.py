"""The loop on tiny models: what it records, a killed run that goes on bit for bit, two ranks against one, and one line for bad input."""

import ast
import itertools
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Generator
from torch.testing import assert_close

import dtm
import llada_finetune as llada
from llada_finetune import TASKS, ControlVariate, Ranks

FILE, TORCHRUN = (
    Path(llada.__file__),
    [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
)
SIZE = llada.TOY | dict(d_model=32, n_layers=1, n_heads=2, mlp_hidden_size=48)
STEP = set(
    "kind total phase a h loss kl c ess reward reward_sd reward_hist grad_norm lr skipped seconds tokens_per_s gpu_gb".split()
)
CHILD = dict(
    capture_output=True,
    text=True,
    timeout=300,
    env=os.environ
    | dict(PYTHONPATH=str(FILE.parent), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
)
read = lambda path: [*map(json.loads, path.read_text().splitlines())]
records = lambda out: [
    {k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s")}
    for r in read(out / "metrics.jsonl")
]
values = lambda module: {k: p.detach().clone() for k, p in module.named_parameters()}
near = lambda a, b: assert_close(a, b, atol=1e-5, rtol=1e-3)


def small(base, out, task="toy", **given):
    usual = dict(
        model=str(base),
        out=str(out),
        data=f"{base}/{task}.jsonl",
        seed=3,
        prompts=16,
        completions=1,
        chunk=5,
        batch=4,
        accum=2,
        steps_per_h=4,
        h=4.0,
        ess=0.0,
        a_end=8.0,
        normalize="none",
        refresh=0,
        ema=0.0,
        dropout=0.0,
        save_every=3,
        rank=4,
        alpha=8.0,
        lr=0.01,
        gen_length=16,
        block=8,
        steps=8,
        temperature=1.0,
        prompt_length=999,
    )
    return llada.settings(task, **usual | {"c": "0" if "objective" in given else "1"} | given)


def tuned(base, out, ranks=None, task="countdown", **given):
    """A run whose two adapters are not zero, by default on prompts of several lengths."""
    run = llada.Run(small(base, out, task, **given), ranks or Ranks(), read(base / f"{task}.jsonl"))
    for i, p in enumerate([*run.student.parameters(), *run.teacher.parameters()]):
        torch.nn.init.normal_(p.data, std=0.2, generator=Generator().manual_seed(i))
    return run


def alone(run, row, **more):
    """The teacher's answer at temperature 0, without batch and padding, and its reward."""
    ids = torch.tensor([run.text.prompt(TASKS["countdown"].prompt(row))])
    x1 = llada.generate(run.model.use("teacher"), ids, 16, 8, 8, **more)[0, ids.shape[1] :].tolist()
    return x1, run.text.answer(x1), TASKS["countdown"].reward(run.text.answer(x1), row)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llada.save_tokenizer(folder, SIZE)
    model = llada.LLaDA(SIZE).init_weights(Generator().manual_seed(0)).requires_grad_(False)
    [
        p.mul_(3) for name, p in model.named_parameters() if "_proj" in name or "_out" in name
    ]  # answers that differ from prompt to prompt
    model.save_pretrained(folder)
    problems = [{"numbers": [7 * i, i + 1, 90 - i], "target": 1 + i * i % 97} for i in range(80)]
    for task, rows in {
        "toy": TASKS["toy"].rows("valid")[:80],
        "test": TASKS["toy"].rows("test")[:9],
        "countdown": problems,
    }.items():
        (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.MonkeyPatch.context() as patch:  # bit for bit, hence on the CPU
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield folder


# ---- the loop ------------------------------------------------------------------------------------
def expected_weights(cfg, data, h):
    per, w = lambda t: t.view(-1, cfg.completions), torch.exp(h * data["r"])
    if cfg.objective == "dmpo":
        up, down = (
            per(torch.exp(data["log_pre"] - data["log_cur"] + sign * data["r"] / 0.04))
            for sign in (1, -1)
        )
        return (up / up.mean(1, keepdim=True) - down / down.mean(1, keepdim=True)).flatten()
    return (
        w
        / {
            "none": 1,
            "batch": w.mean(),
            "group": per(w).mean(1).repeat_interleave(cfg.completions),
        }[cfg.normalize]
    )


@pytest.mark.parametrize(
    "given",
    [
        dict(weight_decay=0.1),
        dict(c="star", normalize="batch", ema=0.6, ess=0.7, h=6.0, order="random"),
        dict(
            c="learned",
            normalize="group",
            prompts=8,
            completions=2,
            refresh=3,
            refresh_steps=2,
            dropout=0.1,
            order="confidence",
        ),
        dict(objective="dmpo", prompts=4, completions=4),
        dict(
            task="countdown",
            c=".5",
            ema=0.9,
            prompts=8,
            steps_per_h=2,
            lora="paper",
            checkpointing=True,
        ),
    ],
)
def test_the_loop(base, tmp_path, given, monkeypatch):
    cfg = small(base, tmp_path, **given)
    run, terms = llada.start_run(cfg, Ranks()), llada.loss_terms
    path, ends, grads, rates, open_phase = [values(run.student)], [], [], [], run.open_phase
    run.adam.register_step_post_hook(
        lambda adam, *_: (
            path.append(values(run.student)) or rates.append(adam.param_groups[0]["lr"])
        )
    )

    def checked(run, student, part, w):
        h = min(run.state["h"][-1], cfg.a_end - sum(run.state["h"][:-1]))
        near(w, expected_weights(cfg, run.buffer.data, h)[part].float())
        got = terms(run, student, part, w)
        grads.append(
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        got[0], [*run.student.parameters()], retain_graph=True
                    )
                ]
            )
        )
        return got

    def boundary():
        average = path[0]
        for now in path[1:]:
            average = {k: cfg.ema * t + (1 - cfg.ema) * now[k] for k, t in average.items()}
        assert_close([values(run.teacher), values(run.student)], [average, average])
        open_phase()
        assert len(path) == cfg.steps_per_h + 1 and {
            bool(s["exp_avg"].any()) for s in run.adam.state.values()
        } == {cfg.objective == "dmpo"}
        path[:] = [average]
        ends.append(torch.cat([t.flatten() for t in average.values()]))

    run.open_phase = boundary
    monkeypatch.setattr(llada, "loss_terms", checked)
    llada.train(run, run.buffer.rows[:4])
    log, r, n, count = tmp_path / "metrics.jsonl", run.buffer.data["r"], cfg.steps_per_h, len(ends)
    steps, evals = ([e for e in read(log) if e["kind"] == kind] for kind in ("step", "eval"))
    assert count >= 2 and (ends[0] - ends[1]).abs().max() > 1e-3
    assert all(e.keys() >= STEP for e in steps) and not any(
        odd in log.read_text() for odd in ("NaN", "Infinity")
    )
    assert [(e["total"], e["phase"]) for e in steps] == [
        (i * n + j + 1, i) for i in range(count) for j in range(n)
    ]
    assert [(e["phase"], e["split"], e["n"]) for e in evals] == [
        (i, "valid", 4) for i in range(count + 1)
    ]
    tilts = [*{e["phase"]: (e["a"], e["a"] + e["h"]) for e in steps}.values()]
    assert [a for a, _ in tilts] + [cfg.a_end] == pytest.approx([0.0] + [b for _, b in tilts])
    assert (steps[n]["kl"] < 1e-6) == (cfg.dropout == 0) and steps[n - 1][
        "kl"
    ] > 1e-6  # a phase starts at its teacher
    means = (
        torch.stack(grads)
        .view(len(steps), cfg.accum * (4 if cfg.objective == "dmpo" else 1), -1)
        .mean(1)
    )  # over a step's passes
    near(means.norm(dim=1), torch.tensor([e["grad_norm"] for e in steps]))
    assert (
        rates
        == [e["lr"] for e in steps]
        == [llada.learning_rate(cfg, i) for _ in range(count) for i in range(n)]
    )
    near(
        torch.tensor([steps[-1]["reward"], steps[-1]["reward_sd"]]).double(),
        torch.stack([r.mean(), r.std(correction=0)]),
    )
    assert (
        sum(steps[-1]["reward_hist"]) == len(r) == cfg.prompts * cfg.completions
        and 0 <= r.min()
        and r.max() <= TASKS[cfg.task].top
    )
    w = torch.exp(steps[-1]["h"] * r)
    assert (
        steps[-1]["ess"] == pytest.approx(float(w.mean() ** 2 / w.square().mean()))
        and min(e["ess"] for e in steps) > cfg.ess - 1e-6
    )
    assert not cfg.ess or all(
        e["h"] == cfg.h or e["ess"] == pytest.approx(cfg.ess, abs=1e-3) for e in steps[:-n]
    )
    assert [e["c"] == 1 for e in steps[:2]] == [cfg.c in ("1", "star", "learned"), cfg.c == "1"]
    best = max(evals, key=lambda e: e["solved"])
    assert (run.state["best_phase"], run.state["best"]) == (best["phase"], best["solved"]) and (
        tmp_path / "best"
    ).is_dir()


def test_learning_rate():
    rate = lambda n, **more: [
        llada.learning_rate(small("", "", steps_per_h=n, lr=2.0, lr_min=0.5, **more), i)
        for i in range(n)
    ]
    assert rate(100) == pytest.approx(
        [0.4, 0.8, 1.2, 1.6] + [2.0] * 86 + [2 - 0.15 * i for i in range(1, 11)]
    )
    assert rate(1)[0] == 0.5 and rate(30, objective="dmpo", completions=2) == [2.0] * 30


def test_the_teacher_fills_the_buffer(base, tmp_path):
    run = tuned(base, tmp_path, prompts=4, completions=2, temperature=0.0)
    run.buffer.fill(run.model, 4)
    old = {k: t.clone() for k, t in run.buffer.data.items()}
    assert len(set(old["row"].tolist())) == 4 and torch.equal(old["row"][::2], old["row"][1::2])
    for row, x1, r in zip(old["row"], old["x1"].tolist(), old["r"]):
        assert alone(run, run.buffer.rows[row], ban_mask=True)[::2] == (x1, r)
    run.buffer.fill(run.model, 1)
    assert all(torch.equal(t[:6], old[k][2:]) and len(t) == 8 for k, t in run.buffer.data.items())
    assert run.buffer.data["row"][7] not in old["row"]
    run.model.model["transformer"][
        "ff_out"
    ].weight.zero_()  # a uniform model: both bounds are -16 log 24
    bounds = run.buffer.likelihoods(run.model, [1, 2, 3], run.buffer.data["x1"][:3])
    near([bounds["log_cur"], bounds["log_pre"]], [-16 * torch.full((3,), 24.0).double().log()] * 2)


def test_prompts_that_are_too_long_are_skipped_and_counted():
    text, rows = (
        SimpleNamespace(prompt=lambda text: [0] * len(text)),
        [{"puzzle": "0" * n} for n in (3, 9, 5, 7)],
    )
    buffer = lambda longest, ranks=Ranks(): llada.Buffer(
        small("", "", prompt_length=longest), ranks, text, rows, Generator(), 1
    )
    some = buffer(5)
    assert (
        {len(rows[i]["puzzle"]) for i in some.take(6)} == {3, 5}
        and some.skipped in (4, 5, 6)
        and some.cursor == 6 + some.skipped
    )
    with pytest.raises(ValueError, match="every prompt is longer than --prompt_length 2"):
        buffer(2).take(1)
    with pytest.raises(ValueError, match="5 ranks share 4 prompts"):
        buffer(5, SimpleNamespace(rank=0, size=5))


# ---- a step --------------------------------------------------------------------------------------
def steady(x1, mask_id, block, generator=None):
    """A mask that depends on a row's tokens alone; later blocks are hidden too."""
    k, place = x1.sum(1, keepdim=True) % x1.shape[1], torch.arange(x1.shape[1])
    active = x1.shape[1] // block - 1 - k // block
    mask = (place // block == active) & (place % block <= k % block)
    return torch.where(mask | (place // block > active), mask_id, x1), mask


def test_the_loss_of_a_step_row_by_row(base, tmp_path, monkeypatch):
    monkeypatch.setattr(llada, "mask_blockwise", steady)
    run, part, loss, kl, hidden = tuned(base, tmp_path, c="0.7"), [4, 0, 3, 5, 7, 8, 11], 0, 0, 0
    run.buffer.fill(run.model, 16)
    w, data, params = torch.linspace(0.1, 2.0, 16), run.buffer.data, [*run.student.parameters()]
    got, terms = llada.loss_terms(run, run.model, part, w[part])
    for i in part:
        xt, mask = steady(x1 := data["x1"][i : i + 1], 23, 8)
        ids, hidden = (
            torch.cat([torch.tensor([run.buffer.prompt(int(data["row"][i]))]), xt], 1),
            hidden + (xt == 23).sum() - mask.sum(),
        )
        p, q = (
            run.model.use(name)(ids)[:, -16:][mask].double().log_softmax(-1)
            for name in ("student", "teacher")
        )
        target = 0.7 * q.exp() + (w[i] - 0.7) * torch.eye(24)[x1[mask]]
        loss, kl = (
            loss - (target * p).sum(-1).mean() / len(part),
            kl + (q.exp() * (q - p)).sum(-1).mean() / len(part),
        )
    near(terms, torch.stack([loss, kl, torch.tensor(0.7).double()]).detach())
    near(torch.autograd.grad(got, params), torch.autograd.grad(loss, params))
    assert hidden > 0  # some rows had later blocks


def batch_of(seed, n=4000):
    g = Generator().manual_seed(seed)
    logits, x1, share = (
        torch.randn(2, n, 6, generator=g),
        torch.randint(6, (n,), generator=g),
        1 / torch.randint(1, 5, (n,), generator=g),
    )
    return (
        torch.randn(n, 8, generator=g),
        *logits,
        x1,
        (1 + 3 * seed) * torch.rand(n, generator=g),
        share,
    )


def test_star_is_best_c_and_learned_recovers_a_linear_c():
    star, learned = (ControlVariate(kind, 8, torch.device("cpu")) for kind in ("star", "learned"))
    (one, two), c = (batch_of(0), batch_of(1)), lambda u: 2 + u @ torch.linspace(-1, 1, 8)
    star.see(*one)
    learned.see(*one[:2], one[1], one[3], c(one[0]), one[5])  # at theta = a the target is w
    assert all(
        (control(one[0]) == 1).all() and control.fit(Ranks()) is None for control in (star, learned)
    )  # 1 until the fit
    near(star(two[0]), dtm.best_c(*one[1:]).expand(4000))
    assert_close(learned(two[0]), c(two[0]), atol=0.02, rtol=0)
    star.see(*two)
    star.fit(Ranks())
    (y, q), (z, p) = (dtm.state_c_target(*b[1:5]) for b in (one, two))
    q, p = 0.95 * q * one[5] ** 2, p * two[5] ** 2  # with forgetting
    near(star(one[0])[0], ((q * y).sum() + (p * z).sum()) / (q.sum() + p.sum()))


@pytest.mark.parametrize("c", ["star", "learned"])
def test_c_never_depends_on_the_batch_that_it_serves(base, tmp_path, c):
    means = []
    for scale in (1.0, 50.0):
        run = tuned(base, tmp_path, c=c)
        run.buffer.fill(run.model, 6)
        for i, w in enumerate((torch.linspace(0, 2, 4), scale * torch.ones(4), torch.ones(4))):
            run.generator.manual_seed(i)
            means.append(llada.loss_terms(run, run.model, [0, 1, 2, 3], w)[1][2].item())
            run.control.fit(Ranks())
    assert means[0] == means[3] == 1 and means[1] == means[4] != 1 and means[2] != means[5]


# ---- a killed run --------------------------------------------------------------------------------
DIES = """import itertools, os, llada_finetune
fit, steps = llada_finetune.ControlVariate.fit, itertools.count(1)
llada_finetune.ControlVariate.fit = lambda *args: (fit(*args), next(steps) == 14 and os.kill(os.getpid(), 9))
llada_finetune.main()"""


def test_a_killed_run_goes_on_bit_for_bit(base, tmp_path, monkeypatch):
    monkeypatch.setattr(llada, "make_toy", lambda *_: pytest.fail("--model names a base already"))
    flags = (
        f"--toy --model {base} --data {base}/toy.jsonl --test_data {base}/test.jsonl --prompts 16 --batch 4 --accum 2 --steps_per_h 8 "
        "--save_every 3 --refresh 4 --refresh_steps 3 --c learned --ema .8 --dropout .1 --ess .4 --h 9 --a_end 20 --rank 4 --lr .01 "
        "--eval_rows 6 --out"
    ).split()
    whole, out = tmp_path / "whole", tmp_path / "killed"
    llada.main([*flags, str(whole)])
    assert subprocess.run([sys.executable, "-c", DIES, *flags, str(out)], **CHILD).returncode == -9
    assert [p.name for p in llada.checkpoints(out)] == ["step-0000009", "step-0000012"] and records(
        out
    )[-1]["total"] == 13
    changed = subprocess.run(
        [
            sys.executable,
            str(FILE),
            "--resume",
            str(out),
            "--h",
            "5",
            "--seed",
            "0",
            "--ema",
            "0.7",
        ],
        **CHILD,
    )
    assert (
        changed.returncode == 1
        and changed.stderr.count("\n") == 1
        and "h (was 9.0, now 5.0), ema (was 0.8, now 0.7)" in changed.stderr
    )
    (out / ".half-step-0000015").mkdir()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "phase": 1, "seconds": {"rollout": 1.0}')
    llada.main(["--resume", str(out)])
    steps = [p.name for p in llada.checkpoints(whole)]
    assert (
        len(steps) == 2
        and [p.name for p in llada.checkpoints(out)] == steps
        and int(steps[1][5:]) >= 24
    )
    for path in (
        p.relative_to(whole) for folder in (*steps, "best") for p in (whole / folder).rglob("*.*")
    ):
        assert (out / path).read_bytes() == (whole / path).read_bytes(), path
    assert records(out) == records(whole)


# ---- two ranks -----------------------------------------------------------------------------------
def two_ranks(base, out):
    """What torchrun runs: a whole run, the same over a cut base, one that stops and goes on; a step; an evaluation."""
    ranks, more = (
        Ranks(),
        dict(c="learned", normalize="batch", dropout=0.1, ema=0.5, refresh=4, refresh_steps=2),
    )
    fit, steps, found = ControlVariate.fit, itertools.count(1), {}
    for name in ("whole", "cut", "stopped"):
        run = llada.start_run(
            small(base, out / name, shard=name == "cut", checkpointing=name == "cut", **more), ranks
        )
        with suppress(ZeroDivisionError):
            ControlVariate.fit = (
                fit if name != "stopped" else lambda *args: fit(*args) if next(steps) < 8 else 1 / 0
            )
            llada.train(run, run.buffer.rows[:4])
        found[name] = (
            values(run.student),
            run.buffer.data["row"].tolist(),
            run.generator.get_state(),
        )
    ControlVariate.fit = fit
    llada.train(run := llada.resumed(out / "stopped", {}, ranks), run.buffer.rows[:4])
    llada.mask_blockwise, run = steady, tuned(base, out, ranks, c="0.7", normalize="batch")
    run.buffer.fill(run.model, 16)
    run.buffer.data["r"] = torch.linspace(0, 1, 16).double() + ranks.rank
    loss, terms = llada.loss_terms(
        run,
        student := llada.parallel(run.model, ranks),
        [*range(16)],
        run.buffer.weights(4.0).float(),
    )
    loss.backward()
    found |= {
        "data": run.buffer.data,
        "terms": terms,
        "grad": [p.grad for p in student.module.adapters["student"].parameters()],
    }
    found["scores"] = llada.evaluate(run, run.buffer.rows[:7], 16, out / "eval.jsonl")
    torch.save(found, out / f"{ranks.rank}.pt")


def test_two_ranks(base, tmp_path, monkeypatch):
    done = subprocess.run([*TORCHRUN, __file__, str(base), str(tmp_path)], **CHILD)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for (student, rows, drawn), (other, more, second) in (
        (one[name], two[name]) for name in ("whole", "cut")
    ):
        assert_close(student, other, atol=0, rtol=0)
        assert (
            all(t.any() for t in student.values())
            and not {*rows} & {*more}
            and not torch.equal(drawn, second)
        )
    logs = [
        [e for e in records(tmp_path / name) if e["kind"] == "step"]
        for name in ("whole", "cut", "stopped")
    ]
    near(
        *(
            torch.tensor([[e[k] for k in ("loss", "kl", "c", "grad_norm")] for e in log])
            for log in logs[:2]
        )
    )
    assert logs[0] == logs[2] and len(logs[0]) == 8
    for file in ("shared", "rank0", "rank1"):
        assert (
            len(
                {
                    (tmp_path / name / "step-0000008" / f"{file}.safetensors").read_bytes()
                    for name in ("whole", "stopped")
                }
            )
            == 1
        ), file
    monkeypatch.setattr(llada, "mask_blockwise", steady)
    run = tuned(
        base, tmp_path / "alone", c="0.7", normalize="batch"
    )  # one process with the rows of both
    run.buffer.data = {k: torch.cat([t, two["data"][k]]) for k, t in one["data"].items()}
    loss, terms = llada.loss_terms(run, run.model, [*range(32)], run.buffer.weights(4.0).float())
    near((one["terms"] + two["terms"]) / 2, terms)
    near(
        [one["grad"], two["grad"]], [[*torch.autograd.grad(loss, [*run.student.parameters()])]] * 2
    )
    rows, scores = (
        run.buffer.rows[:7],
        llada.evaluate(run, run.buffer.rows[:7], 16, tmp_path / "alone.jsonl"),
    )
    answers, want = (
        read(tmp_path / "eval.jsonl"),
        [{**row, **dict(zip(("text", "reward"), alone(run, row)[1:]))} for row in rows],
    )
    assert (
        one["scores"] == scores
        and two["scores"] is None
        and answers == read(tmp_path / "alone.jsonl")
    )
    assert [a | w for a, w in zip(answers, want, strict=True)] == answers and len(
        {a["text"] for a in answers}
    ) > 3  # in the rows' order
    assert (scores["n"], scores["reward"]) == (7, pytest.approx(sum(w["reward"] for w in want) / 7))


# ---- bad input -----------------------------------------------------------------------------------
TAIL = compile(
    ast.Module(ast.parse(FILE.read_text()).body[-1].body, []), str(FILE), "exec"
)  # what runs as a script


def complaint(*argv, **given):
    """What the command line says before it exits with 1."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(
            sys,
            "argv",
            [
                str(FILE),
                *map(str, argv),
                *(f"--{k}={v}" for k, v in given.items() if not isinstance(v, bool)),
            ],
        )
        exec(TAIL, vars(llada))
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


def test_bad_input_is_one_line(base, tmp_path, monkeypatch):
    cfg, x, out = vars(small(base, tmp_path / "run")), tmp_path / "x.jsonl", tmp_path / "run"
    x.write_text((base / "toy.jsonl").read_text() + '\n{"puzzle": "1"}\n')
    for message, given in {
        "gen_length 20 must be a multiple": {"gen_length": 20},
        "the same rows": {"data": x, "test_data": x},
        "batch x accum = 40": {"batch": 20},
        "x.jsonl, line 81": {"data": x},
        "no folder": {"model": "/no/one"},
    }.items():
        assert message in complaint(**cfg | given) and not out.exists()
    assert "config.json is missing" in complaint("--resume", out)
    monkeypatch.setattr(dtm, "next_h", lambda *_: 0.0)
    assert "does not lead to a_end" in complaint(**cfg | {"ess": 0.9})
    (out / ".half-step-0000003").mkdir()
    assert f"{out} has no checkpoint" in complaint(
        "--resume", out
    ) and f"{out} holds a run: --resume" in complaint(**cfg)
    monkeypatch.setattr(
        dtm,
        "sample",
        lambda *_, **__: (_ for _ in ()).throw(
            torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB")
        ),
    )
    message = complaint(**cfg | {"out": tmp_path / "other"})
    assert all(
        knob in message
        for knob in (
            "out of device memory",
            "--batch",
            "--chunk",
            "--checkpointing",
            "--shard",
            "--resume",
        )
    )


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(base, tmp_path, monkeypatch):
    terms, calls = llada.loss_terms, itertools.count()

    def poisoned(run, *args):
        run.student.B["0:v_proj"].data[0, 0] += (
            float("nan") if next(calls) == 10 else 0
        )  # the first half of step 6
        return terms(run, *args)

    monkeypatch.setattr(llada, "loss_terms", poisoned)
    message = complaint(**vars(small(base, tmp_path, steps_per_h=8)))
    run = llada.resumed(tmp_path, {}, Ranks())
    assert "not finite at step 6, rank 0, prompts [" in message
    assert run.state["total"] == 3 and all(p.isfinite().all() for p in run.student.parameters())
    assert {*json.loads(message[message.index("[") : message.index("]") + 1])} <= {
        *run.buffer.data["row"].tolist()
    }


if __name__ == "__main__":
    two_ranks(*map(Path, sys.argv[1:]))
