"""What makes the loop faster changes nothing: ended answers, a trimmed block, passes; caches are as
they are said to be."""

import llada_helpers as tiny
import loop_helpers
import pytest
import torch
from llada_helpers import EOS, MASK, close
from loop_helpers import tuned
from torch import Generator
from torch.testing import assert_close

import llada_finetune as llada
from dtm import c_dtm_loss, mask_blockwise
from llada_finetune import LLaDA, generate

PROMPT = torch.cat([tiny.random_ids(16, seed) for seed in (11, 12)])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    yield from loop_helpers.small_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny"), tiny.make_tensors())


@pytest.fixture(scope="module")
def model(folder):
    return LLaDA.from_pretrained(folder)


# ---- 1. Decoding stops at a row's end ------------------------------------------------------------
def stop_of(answer: list[int], ends: list[int], block: int = 8) -> int:
    """Where the block of the first end token stops."""
    for t, token in enumerate(answer):
        if token in ends:
            return (t // block + 1) * block
    return len(answer)


def counted(model, call):
    """What a call returns, and the rows of each network evaluation in it."""
    rows = []
    hook = model.register_forward_pre_hook(lambda _, given: rows.append(given[0]))
    found = call()
    hook.remove()
    return found, rows


def test_reached_is_what_a_loop_finds():
    x1 = torch.randint(10, (60, 12), generator=Generator().manual_seed(0))
    for ends in ([1], [4, 7], [], [12]):
        expected = [[t < stop_of(row, ends, 3) for t in range(12)] for row in x1.tolist()]
        found = llada.reached(x1, 3, torch.tensor(ends, dtype=torch.long))
        assert found.tolist() == expected


@pytest.mark.parametrize("order", ["confidence", "state", "random"])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_an_answer_with_ends_is_the_answer_without_up_to_its_ends_block(model, order, temperature):
    def answers(*ends):
        noise = Generator().manual_seed(1)
        how = (temperature, None, noise, order, True, ends)
        return generate(model, PROMPT, 32, 8, 16, *how)[:, 16:]

    whole = answers().tolist()

    def stops_at(token):
        return [stop_of(answer, [EOS, token]) for answer in whole]

    end = max(range(EOS), key=lambda token: len(set(stops_at(token))))
    stops = stops_at(end)
    assert len(set(stops)) > 2
    found, rows = counted(model, lambda: answers(EOS, end))
    for got, answer, stop in zip(found.tolist(), whole, stops, strict=True):
        assert got == answer[:stop] + [EOS] * (32 - stop)
    alive = [sum(stop > begin for stop in stops) for begin in (0, 8, 16, 24) for _ in range(4)]
    assert [len(ids) for ids in rows] == [count for count in alive if count]


def test_when_all_answers_have_ended_the_model_is_called_no_more(model):
    ends = [EOS, *range(EOS)]
    found, rows = counted(model, lambda: generate(model, PROMPT, 32, 8, 16, ends=ends))
    assert len(rows) == 4
    assert (found[:, 24:] == EOS).all() and (found[:, 16:24] != MASK).all()


def test_decoding_knows_the_tokenizers_ends_unless_it_goes_past_them(base, tmp_path):
    run = tuned(base, tmp_path, chunk=12)
    prompts = [run.buffer.prompt(i) for i in range(12)]
    run.model.use("teacher")
    found = {}
    for past_end in (False, True):
        run.cfg.past_end = past_end
        noise = Generator().manual_seed(0)
        how = (run.model, run.text, prompts, run.cfg, noise)
        x1, rows = counted(run.model, lambda how=how: llada.decode(*how, ban=True))
        found[past_end] = x1.tolist(), [len(ids) for ids in rows]
    whole = found[True][0]
    assert found[True][1] == [12] * 8
    stops = [stop_of(answer, run.text.ends) for answer in whole]
    assert found[False][1] == [12] * 4 + [stops.count(16)] * 4 and 0 < stops.count(8) < 12
    cut = [a[:stop] + run.text.ends[:1] * (16 - stop) for a, stop in zip(whole, stops, strict=True)]
    assert found[False][0] == cut


# ---- 2. The loss of answers that end -------------------------------------------------------------
SHORT = {"gen_length": 4, "block": 2, "steps": 4, "prompts": 6, "batch": 2, "accum": 3, "c": "0.7"}
# The end token is 1: in the first block, in the second, nowhere, first and later ones.
ANSWERS = [[5, 1, 7, 8], [1, 1, 1, 1], [4, 6, 1, 9], [4, 6, 9, 1], [7, 7, 8, 4], [1, 5, 1, 6]]
REACHED = torch.tensor([[1, 1, 0, 0]] * 2 + [[1, 1, 1, 1]] * 3 + [[1, 1, 0, 0]]).bool()
# The masks of `mask_blockwise` with their probabilities: k = 1, 2, 3, 4 tokens are to go.
MASKS = [
    ((2,), 1 / 8),
    ((3,), 1 / 8),
    ((2, 3), 1 / 4),
    ((0,), 1 / 8),
    ((1,), 1 / 8),
    ((0, 1), 1 / 4),
]


def masked(x1, places):
    """xt and mask, alike in all rows."""
    mask = torch.zeros(x1.shape, dtype=torch.bool)
    mask[:, places] = True
    hidden = mask.clone()
    hidden[:, places[0] // 2 * 2 + 2 :] = True  # the blocks behind
    return torch.where(hidden, 23, x1), mask


def short_run(base, out, answers=ANSWERS, **more):
    """A run in float64 with these answers in its buffer; all are drawn in a step."""
    run = tuned(base, out, **SHORT | more)
    run.model.double()
    count = len(answers)
    run.buffer.data = {"row": torch.arange(count), "x1": torch.tensor(answers)}
    run.buffer.data |= {key: torch.linspace(0, 1, count).double() for key in ("r", "solved")}
    return run


def gradient_of_a_step(run, w):
    """Of the mean loss over the buffer's answers, as `optimiser_step` computes it; and the rows of
    its passes."""
    parts = []
    loss = 0.0
    run.student.train()
    for part, xt, mask in llada.masked_answers(run):
        loss = loss + llada.loss_sum(run, run.model, part, xt, mask, w[part])[0] / len(w)
        parts.append(part)
    return torch.autograd.grad(loss, [*run.student.parameters()]), parts


def gradient_in_full(run, places, w):
    """Every answer goes through the model, alone and in full; a position counts 1 up to its end's
    block and 0 behind it."""
    loss = 0.0
    for i, answer in enumerate(run.buffer.data["x1"]):
        xt, mask = masked(answer[None], places)
        prompt = torch.tensor([run.buffer.prompt(i)])
        ids = torch.cat([prompt, xt], 1)
        logits_a = run.model.use("teacher")(ids)[:, -4:].detach()
        logits = run.model.use("student")(ids)[:, -4:]
        each = c_dtm_loss(logits, logits_a, answer[None], w[i], 0.7)  # (1, L)
        loss = loss + (each * mask * REACHED[i]).sum() / mask.sum() / len(w)
    return torch.autograd.grad(loss, [*run.student.parameters()])


def same_gradient(actual, expected):
    """To a millionth of its length."""
    a, b = (torch.cat([g.flatten() for g in part]) for part in (actual, expected))
    assert (a - b).norm() <= 1e-6 * b.norm() > 0


def test_the_masks_are_those_of_mask_blockwise():
    x1 = torch.tensor([[4, 5, 6, 7]]).expand(8000, 4)
    xt, _ = mask_blockwise(x1, 23, 2, Generator().manual_seed(0))
    states, count = xt.unique(dim=0, return_counts=True)
    found = dict(zip(map(tuple, states.tolist()), (count / 8000).tolist(), strict=True))
    expected = {tuple(masked(x1[:1], list(at))[0][0].tolist()): p for at, p in MASKS}
    assert found == pytest.approx(expected, abs=0.02)


def test_D3_the_mean_gradient_is_that_of_the_full_loss_up_to_the_ends_block(
    base, tmp_path, monkeypatch
):
    run = short_run(base, tmp_path)
    w = torch.linspace(0.5, 2.0, 6)
    mean = [torch.zeros_like(p) for p in run.student.parameters()]
    expected = [torch.zeros_like(p) for p in run.student.parameters()]
    for places, p in MASKS:
        monkeypatch.setattr(llada, "mask_blockwise", lambda x1, *_, at=places: masked(x1, [*at]))
        here, parts = gradient_of_a_step(run, w)
        taken = sorted(sum(parts, []))
        assert taken == ([2, 3, 4] if places[0] > 1 else [*range(6)])
        for total, g in zip(mean, here, strict=True):
            total += p * g
        for total, g in zip(expected, gradient_in_full(run, [*places], w), strict=True):
            total += p * g
    same_gradient(mean, expected)


def test_what_stands_behind_the_ends_block_changes_nothing(base, tmp_path):
    other = torch.where(REACHED, torch.tensor(ANSWERS), 12).tolist()
    w = torch.linspace(0.5, 2.0, 6)
    for seed in range(4):
        found = []
        for answers in (ANSWERS, other):
            run = short_run(base, tmp_path, answers)
            run.generator.manual_seed(seed)
            found.append(gradient_of_a_step(run, w))
        assert found[0][1] == found[1][1]
        assert_close(found[0][0], found[1][0], atol=0, rtol=0)


def test_past_the_end_is_trained_as_published_if_asked_for(base, tmp_path, monkeypatch):
    run = short_run(base, tmp_path, past_end=True)
    monkeypatch.setattr(llada, "mask_blockwise", lambda x1, *_: masked(x1, [2]))
    assert sorted(sum(gradient_of_a_step(run, torch.ones(6))[1], [])) == [*range(6)]


def test_answers_without_a_mask_are_left_out_of_the_passes(base, tmp_path, monkeypatch):
    run = short_run(base, tmp_path)
    monkeypatch.setattr(llada, "mask_blockwise", lambda x1, *_: masked(x1, [2, 3]))
    gradient = gradient_in_full(run, [2, 3], run.buffer.weights(run.state.h))
    _, rows = counted(run.model, lambda: llada.optimiser_step(run, run.model))
    assert [len(ids) for ids in rows] == [2, 2, 1, 1]  # teacher and student, three answers of six
    log = loop_helpers.read_lines(tmp_path / "metrics.jsonl")[-1]
    assert log["c"] == pytest.approx(0.7)
    assert log["grad_norm"] == pytest.approx(float(sum(g.square().sum() for g in gradient)) ** 0.5)


def test_a_step_without_any_mask_steps_with_a_zero_gradient(base, tmp_path, monkeypatch):
    run = short_run(base, tmp_path, [ANSWERS[i] for i in (0, 1, 5, 0, 1, 5)], weight_decay=0.5)
    monkeypatch.setattr(llada, "mask_blockwise", lambda x1, *_: masked(x1, [2]))
    before = {name: p.detach().clone() for name, p in run.student.named_parameters()}
    _, rows = counted(run.model, lambda: llada.optimiser_step(run, run.model))
    assert [len(ids) for ids in rows] == [1, 1]
    log = loop_helpers.read_lines(tmp_path / "metrics.jsonl")[-1]
    assert (log["total"], log["grad_norm"], log["loss"], log["kl"], log["c"]) == (1, 0, 0, 0, 0)
    shrunk = {name: p * (1 - log["lr"] * 0.5) for name, p in before.items()}
    assert_close(dict(run.student.named_parameters()), shrunk)


@pytest.mark.parametrize("kind", ["0.7", "learned"])
def test_neither_masks_nor_gradients_depend_on_the_passes(base, tmp_path, kind):
    found = []
    for batch in (1, 2, 4, 6):
        run = short_run(base, tmp_path, c=kind)
        for step in range(3):  # c is fitted to the first
            run.batch = batch
            run.generator.manual_seed(step)
            xt, mask = (torch.cat(t) for t in [*zip(*llada.masked_answers(run), strict=True)][1:])
            run.generator.manual_seed(step)
            gradient, parts = gradient_of_a_step(run, torch.linspace(0.5, 2.0, 6))
            assert all(len(part) <= batch for part in parts)
            run.control.fit(run.ranks)
        found.append((xt, mask, sum(parts, []), gradient))
    for xt, mask, taken, gradient in found[1:]:
        assert torch.equal(xt, found[0][0]) and torch.equal(mask, found[0][1])
        assert taken == found[0][2]
        same_gradient(gradient, found[0][3])


# ---- 3. A trimmed last block, LoRA's sum in one call ---------------------------------------------
IDS, SEEN = tiny.padded(tiny.IDS)
SOME = SEEN & (torch.rand(3, 48, generator=Generator().manual_seed(5)) < 0.3)
RAGGED = SOME.clone()
RAGGED[0, 9:] = False
FEW = SOME.clone()
FEW[1] = False
FEW[2, :46] = False
WANTED = [
    pytest.param(SOME, id="some"),
    pytest.param(RAGGED, id="ragged"),
    pytest.param(FEW, id="a row without any"),
    pytest.param(SEEN, id="all but pads"),
]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("where", WANTED)
def test_a_trimmed_last_block_gives_the_full_ones_logits_and_gradients(folder, where, recompute):
    model = tiny.with_lora(folder, tiny.make_lora()).double().train()
    model.checkpointing = recompute
    parameters = [*model.adapters["own"].parameters()]
    widths = []
    last = model.model["transformer"]["blocks"][-1]
    last.ff_out.register_forward_pre_hook(lambda _, given: widths.append(given[0].shape[1]))
    full = model(IDS, SEEN, hidden=True)
    trimmed = model(IDS, SEEN, where, hidden=True)
    assert widths == [48, int(where.sum(1).max())]
    found = []
    for logits, hidden in ([t[where] for t in full], trimmed):
        assert logits.shape == (int(where.sum()), 512)
        scale = torch.linspace(-1, 2, 512).double()
        loss = (logits.log_softmax(-1) * scale).sum() + hidden.square().sum()
        gradient = torch.autograd.grad(loss, parameters)
        found.append([logits.detach(), hidden.detach(), *gradient])
    assert all(t.any() for t in found[0])
    for actual, expected in zip(found[1], found[0], strict=True):
        close(actual, expected, 1e-6 * max(1.0, float(expected.abs().max())))


def test_no_position_is_wanted(folder):
    model = tiny.with_lora(folder, tiny.make_lora())
    logits, hidden = model(IDS, SEEN, torch.zeros_like(SEEN), hidden=True)
    assert logits.shape == (0, 512) and hidden.shape == (0, 64)
    logits.sum().backward()
    assert not any(p.grad.any() for p in model.adapters["own"].parameters())


def maps(dtype):
    """x, W x, A, B of a map, 2 x 7 inputs of 64; and their float64 copies."""
    g = Generator().manual_seed(0)
    shapes = ((2, 7, 64), (2, 7, 96), (8, 64), (96, 8))
    tensors = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
    return tensors, [t.double() for t in tensors]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_low_rank_is_the_sum_written_out(dropout):
    (x, y, A, B), (x64, y64, A64, B64) = maps(torch.float32)
    torch.manual_seed(3)
    found = llada.low_rank(x, y, A, B, 1.5, dropout)
    torch.manual_seed(3)
    kept = torch.nn.functional.dropout(torch.ones_like(x), dropout).double()
    assert (kept == 0).any() == (dropout > 0)
    close(found, y64 + 1.5 * (kept * x64) @ A64.T @ B64.T, 1e-4)
    again = llada.low_rank(x, y, A, B, 1.5, dropout)
    assert torch.equal(found, again) == (dropout == 0)


def test_in_bfloat16_one_call_is_nearer_to_the_sum_than_two():
    (x, y, A, B), (x64, y64, A64, B64) = maps(torch.bfloat16)
    inner = torch.nn.functional.linear(x, A)
    exact = y64 + 1.5 * inner.double() @ B64.T
    found = llada.low_rank(x, y, A.float(), B.float(), 1.5, 0.0)
    two = y + 1.5 * torch.nn.functional.linear(inner, B)
    one_error, two_error = ((t.double() - exact).square().mean().sqrt() for t in (found, two))
    assert found.dtype == torch.bfloat16
    assert one_error < two_error < 0.01 * exact.square().mean().sqrt()
    close(inner, x64 @ A64.T, 0.2)


# ---- 4. Caches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("steps", [16, 12])
@pytest.mark.parametrize("pads", [False, True])
def test_a_cache_keeps_what_the_first_step_of_a_block_computed(model, cache, steps, pads):
    """Of two layers, so that what is kept grows old."""
    prompt, seen = tiny.padded(PROMPT[:3]) if pads else (PROMPT[:3], torch.ones(3, 16).bool())
    expected = tiny.sample_by_hand(model.state_dict(), prompt, seen, steps, cache=cache)[-1]
    widths = []
    table = model.model["transformer"]["wte"]
    hook = table.register_forward_pre_hook(lambda _, given: widths.append(given[0].shape[1]))
    found = generate(model, prompt, 32, 8, steps, attention_mask=seen, cache=cache)
    hook.remove()
    assert torch.equal(found, expected)
    later = {"prefix": [32, 24, 16, 8], "dual": [8] * 4}[cache]
    assert widths == sum([[48] + [width] * (steps // 4 - 1) for width in later], [])


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_rows_that_end_leave_the_cache_of_the_others(model, cache):
    whole = generate(model, PROMPT, 32, 8, 16, cache=cache)[:, 16:].tolist()
    end = max(range(EOS), key=lambda t: len({stop_of(a, [EOS, t]) for a in whole}))
    stops = [stop_of(answer, [EOS, end]) for answer in whole]
    assert len(set(stops)) > 2
    found = generate(model, PROMPT, 32, 8, 16, ends=[EOS, end], cache=cache)[:, 16:]
    cut = [a[:stop] + [EOS] * (32 - stop) for a, stop in zip(whole, stops, strict=True)]
    assert found.tolist() == cut


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cache_is_exact_where_nothing_in_it_grows_old(model, base, tmp_path, cache):
    """A block in one step; or one layer, whose keys and values are those of tokens."""
    for order in ("confidence", "random"):

        def answers(cache, model, *size, order=order, prompt=PROMPT):
            noise = Generator().manual_seed(0)
            return generate(model, prompt, *size, 0.7, None, noise, order, True, (), cache)

        for size in ((32, 8, 4), (16, 16, 1)):
            assert torch.equal(answers(cache, model, *size), answers("off", model, *size))
        one = tuned(base, tmp_path).model.use("teacher")
        found = [answers(kind, one, 16, 8, 8, prompt=PROMPT % 20) for kind in (cache, "off")]
        assert torch.equal(*found)
