"""What makes the loop faster changes nothing: ended answers, a trimmed block, passes; caches are as
they are said to be."""


import llada_helpers as tiny
import loop_helpers
import pytest
import torch
from llada_helpers import EOS, MASK
from loop_helpers import tuned
from torch import Generator

import llada_finetune as llada
from llada_finetune import LLaDA, generate

PROMPT = torch.cat([tiny.random_ids(16, seed) for seed in (11, 12)])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    yield from loop_helpers.small_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return LLaDA.from_pretrained(tiny.write(tmp_path_factory.mktemp("tiny"), tiny.make_tensors()))


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
