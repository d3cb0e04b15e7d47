"""A run and its machine: SIGTERM, the lock on a folder, memory, compilation, other devices."""

import os
import shutil
import signal
import socket
from pathlib import Path

import loop_helpers
import pytest
import torch
from loop_helpers import (
    Uneven,
    check_same,
    command,
    complaint,
    given,
    in_evaluation,
    names,
    records,
    run_whole,
    stop_in_step,
)
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

import llada_finetune as llada
from figures import files, toy_llada
from figures.files import checkpoints
from figures.llada_shape import (
    ADAPTED,
    CONFIG_8B,
    MAPS,
    choose_pass,
    count_memory,
    count_parameters,
    kept_a_token,
)
from llada_finetune import Ranks


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    yield from loop_helpers.small_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    return run_whole(base, tmp_path_factory.mktemp("whole") / "run")


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
    kept = files.read_json(tmp_path / f"step-{total:07}" / "state.json")
    assert (kept["filled"] == kept["step"]) == (place == "optimiser_step" and call != 4)
    llada.main(words)
    check_same(tmp_path, whole)


@pytest.mark.parametrize("answer", [2, 8, 40], ids=["scores", "rollouts", "later"])
def test_SIGTERM_ends_with_the_present_answers_grade(base, tmp_path, whole, answer):
    graded = []
    grade = Uneven.grade

    def counted(task, text, row):
        graded.append(text)
        if len(graded) == answer:
            signal.raise_signal(signal.SIGTERM)
        return grade(task, text, row)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(Uneven, "grade", counted)
        llada.main(command(base, tmp_path))
    assert len(graded) == answer
    llada.main(command(base, tmp_path))
    check_same(tmp_path, whole)


def test_the_last_scores_are_taken_once_if_SIGTERM_ends_them(base, tmp_path, whole, monkeypatch):
    words = command(base, tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="143"):
        in_evaluation(patch, "evaluate", records(whole)[-1]["phase"], 2)
        llada.main(words)
    llada.main(words)
    monkeypatch.setattr(llada, "evaluate", pytest.fail)
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


# ---- 2. One process a folder --------------------------------------------------------------------
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


# ---- 3. Memory ----------------------------------------------------------------------------------
WIDE = CONFIG_8B | {"d_model": 256, "n_layers": 1, "n_heads": 4, "mlp_hidden_size": 768}
WIDE |= {"vocab_size": 24, "mask_token_id": 23, "eos_token_id": 1, "pad_token_id": 1}


def kept_by_autograd(cfg, dtype) -> tuple[float, int]:
    """Bytes that a block keeps for its backward pass: of a token, and copies of the adapter."""
    block = llada.LLaDA(WIDE).to(dtype).requires_grad_(False).model["transformer"]["blocks"][0]
    lora = llada.LoRA(WIDE, ADAPTED[cfg.lora], cfg.rank, 1.0, cfg.dropout).train()
    x = torch.randn(2, 64, 256, dtype=dtype).requires_grad_()
    turns = llada.angles(64, 32, 1e4, x.device)
    own = [*block.parameters(), *lora.parameters()]
    known = {t.untyped_storage().data_ptr() for t in [*own, *turns]}
    shapes = {p.shape for p in lora.parameters()} | {p.T.shape for p in lora.parameters()}
    tokens, copies = {}, {}
    alive = []  # so that no address comes twice

    def pack(t):
        alive.append(t)
        place = t.untyped_storage().data_ptr()
        if place not in known:
            kind = copies if t.shape in shapes else tokens
            kind[place] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x, *turns, None, lora.block(0))
    return sum(tokens.values()) / 128, sum(copies.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("lora", ["all", "paper"])
def test_what_a_block_keeps_is_counted_from_above(lora, dropout, dtype):
    cfg = llada.Config(lora=lora, dropout=dropout, rank=8)
    measured, copied = kept_by_autograd(cfg, dtype)
    counted = kept_a_token(cfg, WIDE, dtype.itemsize, dtype.itemsize)
    assert measured <= counted <= 1.15 * measured
    trainable = count_parameters(cfg, WIDE)[1]
    assert copied == (2 * trainable if dtype == torch.bfloat16 else 0)


def test_the_adapters_memory_is_that_of_its_numbers_gradients_and_moments():
    cfg = llada.Config(rank=8)
    lora = llada.LoRA(WIDE, ADAPTED["all"], 8, 1.0)
    adam = torch.optim.AdamW(lora.parameters())
    sum(p.sum() for p in lora.parameters()).backward()
    adam.step()
    held = 0
    for p in lora.parameters():
        held += sum(t.nbytes for t in (p, p.grad, *adam.state[p].values()) if t.shape == p.shape)
    wide, narrow = (count_memory(cfg, WIDE, 1, False, size) for size in (4, 2))
    assert wide["student, gradient, AdamW"] == pytest.approx(held / 1e9)
    copy = sum(2 * p.numel() for p in lora.parameters())
    assert narrow["student, gradient, AdamW"] == pytest.approx((held + copy) / 1e9)
    assert narrow["teacher"] == pytest.approx(copy / 1e9)


def counted_gb(cfg, config, batch, recompute, size=2):
    return sum(count_memory(cfg, config, batch, recompute, size).values())


@pytest.mark.parametrize("task", ["sudoku", "countdown"])
def test_the_pass_is_the_largest_that_memory_allows_without_recomputing_if_it_can(task):
    cfg = llada.make_config(task=task)
    seen = set()
    for gb in range(10, 220, 3):
        fitting = {True: 0, False: 0}
        for recompute in fitting:
            for batch in range(1, cfg.batch + 1):
                if counted_gb(cfg, CONFIG_8B, batch, recompute) <= 0.85 * gb:
                    fitting[recompute] = batch
        expected = (fitting[False], False) if fitting[False] else (max(1, fitting[True]), True)
        assert choose_pass(cfg, CONFIG_8B, gb) == expected
        seen.add(expected)
    assert {(1, True), (1, False), (cfg.batch, False)} <= seen
    for kind in ("on", "off"):
        cfg = llada.make_config(task=task, checkpointing=kind)
        assert choose_pass(cfg, CONFIG_8B, 1.0) == (cfg.batch, kind == "on")


def test_a_run_keeps_its_pass_unless_checkpointing_is_given(base, tmp_path, monkeypatch):
    def opened(gb, **more):
        monkeypatch.setattr(Ranks, "memory", lambda _: gb)
        run = llada.open_run({"out": str(tmp_path)} | more, Ranks())
        return run.batch, run.model.checkpointing

    first = given(base, tmp_path, checkpointing="auto")
    cfg = llada.make_config(**first)
    room = [counted_gb(cfg, loop_helpers.SIZE, n, False, 4) / 0.85 for n in (2, 3)]
    assert opened(sum(room) / 2, **first) == (2, False)
    assert opened(100.0) == (2, False)
    assert opened(1e-9) == (2, False)
    assert opened(1e-9, checkpointing="off") == (4, False)
    assert opened(1e-9, checkpointing="auto") == (1, True)
    assert opened(100.0) == (2, False)  # as in its settings


def test_the_smallest_device_decides_and_too_small_a_one_is_said(
    base, tmp_path, monkeypatch, capsys
):
    run = llada.open_run(given(base, tmp_path, checkpointing="auto"), Ranks())
    for others, expected in ((9.0, (4, False)), (1e-9, (1, True))):
        monkeypatch.setattr(Ranks, "memory", lambda _: 9.0)
        monkeypatch.setattr(Ranks, "gather", lambda _, t, others=others: torch.tensor([t, others]))
        capsys.readouterr()
        run.choose_pass(None)
        assert (run.batch, run.model.checkpointing) == expected
        assert ("memory will probably not do" in capsys.readouterr().out) == (others < 1)


def test_no_two_ranks_of_any_runs_draw_the_same_noise(base, tmp_path, monkeypatch):
    drawn = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        for seed in (41, 42, 43):
            run = llada.open_run(given(base, tmp_path / f"{rank}-{seed}", seed=seed), Ranks())
            drawn.append(torch.rand(4, generator=run.generator))
            drawn.append(torch.rand(4))  # as the adapter's dropout
    assert len({tuple(noise.tolist()) for noise in drawn}) == 4 * 3 * 2


def test_a_GPU_that_torch_cannot_use_is_said_unless_it_is_hidden(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", bool)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidia0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ValueError, match="cannot use the GPU.*; update its driver"):
        Ranks()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Ranks().device.type == "cpu"


# ---- 4. Compilation and other devices -----------------------------------------------------------
def compiled(layers: int, counter) -> llada.LLaDA:
    torch._dynamo.reset()
    model = toy_llada.init_weights(
        llada.LLaDA(loop_helpers.SIZE | {"n_layers": layers}), torch.Generator().manual_seed(0)
    ).requires_grad_(False)
    for name in ("student", "teacher"):
        model.adapters[name] = llada.LoRA(model.config, [*MAPS], 4, 8.0).train(name == "student")
    model.adapters["teacher"].requires_grad_(False)
    if counter:
        model.compile_blocks(backend=counter)
    return model


def used(model) -> list:
    """Logits of the student with pads, and of the teacher with a cache."""
    ids = torch.arange(40).view(2, 20) % 20
    where = torch.zeros(2, 20, dtype=torch.bool)
    where[:, 12:15] = True
    seen = torch.arange(20) >= torch.tensor([[0], [3]])
    logits = model.use("student")(ids, seen, where)
    logits.sum().backward()
    found = [logits.detach()]
    cache = llada.Cache(model.config["n_layers"])
    with torch.no_grad():
        for cache.span in (slice(None), slice(12, 16)):
            found.append(model.use("teacher")(ids, None, where, cache=cache))
    return found


def test_one_compilation_serves_all_blocks_but_the_first_and_the_last(monkeypatch):
    monkeypatch.setattr(llada.Cache, "renewed", llada.Cache.renewed)  # compiling changes it
    graphs = []
    for layers in (3, 4):
        counter = CompileCounter()
        assert_close(used(compiled(layers, counter)), used(compiled(layers, None)))
        graphs.append(counter.frame_count)
    assert 0 < graphs[0] == graphs[1] <= 9


def test_compilation_without_a_gpu_is_refused(base, tmp_path):
    message = complaint("train", *command(base, tmp_path)[1:], "--compile")
    assert "--compile needs a GPU" in message


def test_a_checkpoint_of_another_kind_of_device_is_refused(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    folder = checkpoints(out)[-1]
    own = load_file(folder / "rank0.safetensors")
    own |= {"generator": torch.zeros(16, dtype=torch.uint8)}  # as long as a GPU's
    files.write(folder / "rank0.safetensors", own)
    sums = files.read_json(folder / files.MANIFEST)
    sums["rank0.safetensors"] = files.file_digest(folder / "rank0.safetensors")
    files.write(folder / files.MANIFEST, sums)
    assert "began on another kind of device" in complaint("--out", out)
