"""Decoding: the sampler against plain loops, completions that end, prompts and text."""

import math
from types import SimpleNamespace

import llada_helpers as tiny
import pytest
import torch
from llada_helpers import EOS, MASK, refused
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Generator

import dtm
from llada.decoding import ChatTokenizer, before_the_end, by_length, generate, pad_left
from llada.model import LLaDA
from llada_finetune import Config, complete

PROMPT = tiny.random_ids(16, seed=11)
PROMPTS = torch.cat([PROMPT, tiny.random_ids(16, seed=12)])  # six rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_base(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(folder):
    return LLaDA.from_pretrained(folder)


def recorded(model):
    """Return the model as a function, and the list of (ids, attention mask) of its calls."""
    calls = []

    def spy(ids, attention_mask=None, where=None):
        calls.append((ids, attention_mask))
        return model(ids, attention_mask, where)

    spy.config = model.config
    return spy, calls


# ---- the sampler ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "steps, pads, dtype",
    [
        pytest.param(16, False, None, id="16 steps"),
        pytest.param(12, False, None, id="12 steps"),
        pytest.param(32, False, None, id="one token per step"),
        pytest.param(16, True, None, id="padding is attended to"),
        pytest.param(16, True, torch.bool, id="padding is masked"),
        pytest.param(16, True, torch.int64, id="padding is masked by 0 and 1"),
    ],
)
def test_every_state_of_a_generation_is_that_of_plain_loops(model, steps, pads, dtype):
    prompt, visible = tiny.padded(PROMPT)
    if not pads:
        prompt, visible = PROMPT, torch.ones_like(visible)
    seen = visible if dtype else torch.ones_like(visible)
    expected = tiny.sample_by_hand(model.state_dict(), prompt, seen, steps)
    spy, calls = recorded(model)
    mask = visible.to(dtype) if dtype else None
    out = generate(spy, prompt, 32, 8, steps, attention_mask=mask)
    assert torch.equal(torch.stack([ids for ids, _ in calls] + [out]), expected)


def test_an_attention_mask_that_hides_nothing_is_dropped(model):
    spy, calls = recorded(model)
    out = generate(spy, PROMPT, 32, 8, 16, attention_mask=torch.ones_like(PROMPT))
    assert all(mask is None for _, mask in calls)
    assert torch.equal(out, generate(model, PROMPT, 32, 8, 16))


def test_a_mask_token_may_be_drawn_unless_it_is_banned(model):
    """A position that draws the mask token stays masked, as in LLaDA's code; rollouts ban it."""
    tensors = model.state_dict()
    tensors[tiny.HEAD][MASK] *= 2
    visible = torch.ones_like(PROMPT, dtype=torch.bool)
    expected = tiny.sample_by_hand(tensors, PROMPT, visible, 16)[-1]
    assert 0 < (expected == MASK).sum() < 3 * 32
    assert torch.equal(generate(model, PROMPT, 32, 8, 16), expected)
    assert not (generate(model, PROMPT, 32, 8, 16, ban_mask=True) == MASK).any()


def test_a_mask_token_in_the_prompt_stays(model):
    prompt = PROMPT.clone()
    prompt[:, 3] = MASK
    assert torch.equal(generate(model, prompt, 32, 8, 16)[:, :16], prompt)


def test_generate_is_sample_on_the_completion(model):
    """Temperature, order and generator are those of the call."""

    def behind_the_prompt(xt, where):
        return model(torch.cat([PROMPT, xt], 1))[:, 16:][where]

    how = {"order": "top_prob", "temperature": 0.7, "ban_mask": True}
    blank = torch.full((3, 32), MASK)
    noise = {"generator": Generator().manual_seed(5)}
    *_, x1 = dtm.sample(behind_the_prompt, blank, MASK, block=8, steps=4, **how, **noise)
    noise = {"generator": Generator().manual_seed(5)}
    out = generate(model, PROMPT, 32, 8, 16, **how, **noise)
    assert torch.equal(out, torch.cat([PROMPT, x1], 1))


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(model, number):
    model.state_dict()[tiny.HEAD][7, 0] = number
    refused("not finite", generate, model, PROMPT, 32, 8, 16)


@pytest.mark.parametrize("length, steps", [(30, 16), (0, 16), (32, 15), (32, 2), (32, 0)])
def test_lengths_that_do_not_fit_are_refused(model, length, steps):
    refused("must be a positive multiple", generate, model, PROMPT, length, 8, steps)


# ---- completions that end ------------------------------------------------------------------------
def stop_of(completion, ends, block=8):
    """Return the position where the block of the first end token stops."""
    for t, token in enumerate(completion):
        if token in ends:
            return (t // block + 1) * block
    return len(completion)


def test_before_the_end_is_what_a_loop_finds():
    x1 = torch.randint(10, (60, 12), generator=Generator().manual_seed(0))
    for ends in ([1], [4, 7], [], [12]):
        expected = [[t < stop_of(row, ends, 3) for t in range(12)] for row in x1.tolist()]
        actual = before_the_end(x1, 3, torch.tensor(ends, dtype=torch.long))
        assert actual.tolist() == expected


@pytest.mark.parametrize("order", dtm.ORDERS)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_ends_change_nothing_up_to_the_block_of_the_first_end(model, order, temperature):
    """The rest is the first end token, and completions that have ended are not computed."""

    def completions(model, ends):
        noise = Generator().manual_seed(1)
        how = {"temperature": temperature, "order": order, "ban_mask": True}
        return generate(model, PROMPTS, 32, 8, 16, generator=noise, ends=ends, **how)[:, 16:]

    full = completions(model, ()).tolist()
    stops_at = [[stop_of(row, [EOS, token]) for row in full] for token in range(EOS)]
    end = max(range(EOS), key=lambda token: len(set(stops_at[token])))
    stops = stops_at[end]
    assert len(set(stops)) > 2
    spy, calls = recorded(model)
    actual = completions(spy, (EOS, end)).tolist()
    assert actual == [r[:stop] + [EOS] * (32 - stop) for r, stop in zip(full, stops, strict=True)]
    running = [sum(stop > begin for stop in stops) for begin in (0, 8, 16, 24) for _ in range(4)]
    assert [len(ids) for ids, _ in calls] == [count for count in running if count]


def test_when_all_completions_have_ended_the_model_is_not_called_again(model):
    spy, calls = recorded(model)
    out = generate(spy, PROMPTS, 32, 8, 16, ends=[EOS, *range(EOS)])
    assert len(calls) == 4
    assert (out[:, 24:] == EOS).all() and (out[:, 16:24] != MASK).all()


@pytest.mark.parametrize("past_end", [False, True])
def test_rollouts_of_padded_prompts_are_those_of_each_prompt_alone(model, past_end):
    """They are decoded in eval mode, with the tokenizer's ends unless the run goes past them."""
    model.adapters["own"] = tiny.make_lora(dropout=0.5)
    model.use("own").eval()
    prompts = [PROMPT[0, :n].tolist() for n in (9, 16, 3, 16, 4)]
    alone = [generate(model, torch.tensor([p]), 16, 8, 8)[0, len(p) :].tolist() for p in prompts]
    ends = [EOS, alone[0][0]]
    x1 = complete(
        model.train(),
        prompts,
        cfg=Config(gen_length=16, block=8, steps=8, past_end=past_end),
        tokenizer=SimpleNamespace(ends=ends),
        generator=None,
        ban_mask=False,
    )
    stops = [16 if past_end else stop_of(row, ends) for row in alone]
    assert past_end or stops[0] == 8
    expected = [row[:stop] + [EOS] * (16 - stop) for row, stop in zip(alone, stops, strict=True)]
    assert x1.tolist() == expected


# ---- prompts and text ----------------------------------------------------------------------------
def test_prompts_are_padded_on_the_left():
    ids, mask = pad_left([[5, 6, 7], [8]], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]
    assert pad_left([[5, 6], [7, 8]], pad_id=9)[1] is None


def test_batches_hold_every_prompt_once_sorted_by_length():
    lengths = torch.randint(30, (23,), generator=Generator().manual_seed(0)).tolist()
    batches = by_length([[0] * n for n in lengths], 5)
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
    order = [i for batch in batches for i in batch]
    assert sorted(order) == [*range(23)]
    assert [lengths[i] for i in order] == sorted(lengths)


SPECIAL = ["<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"]
CHAT = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def tokenizer_with(folder, special):
    """Write a tokenizer of single characters; the end of text has number 1."""
    ids = {word: i for i, word in enumerate([*special, *map(chr, range(32, 127)), "\n"])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"eos_token_id": 1}')
    return ChatTokenizer(folder), ids


def test_a_chat_models_prompt_is_one_user_turn(tmp_path):
    tokenizer, ids = tokenizer_with(tmp_path, SPECIAL + CHAT)
    start, stop, eot = (ids[word] for word in CHAT)

    def spelled(text):
        return [ids[character] for character in text]

    user = [start, *spelled("user"), stop, *spelled("\n\n2 {}?"), eot]
    assistant = [start, *spelled("assistant"), stop, *spelled("\n\n")]
    assert tokenizer.prompt(" 2 {}?\n") == [0, *user, *assistant]
    assert tokenizer.ends == [1, eot]
    for end in (1, eot):
        assert tokenizer.completion([*spelled("4\n"), 2, *spelled("5"), end, 2, 9]) == "4\n5"


def test_a_base_models_prompt_is_the_bare_text(tmp_path):
    tokenizer, ids = tokenizer_with(tmp_path, SPECIAL)
    assert tokenizer.prompt(" 2?\n") == [0, ids["2"], ids["?"]]
    assert tokenizer.ends == [1]


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path):
    refused("tokenizer.json is missing or damaged", ChatTokenizer, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    refused("tokenizer.json is missing or damaged", ChatTokenizer, tmp_path)
