"""The small LLaDA in figures/data/toy: `--play`, `eval` and `merge` run on it from the checkout."""

import json
from pathlib import Path

import pytest
import torch

import llada_finetune as finetune
from figures import toy_llada
from llada.decoding import ChatTokenizer, generate
from llada.lora import LoRA
from llada.model import LLaDA
from llada.tasks import TASKS

ADAPTER = "figures/data/toy/best"


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    """The adapter records its base model by a path from the top of the checkout."""
    monkeypatch.chdir(Path(toy_llada.__file__).parent.parent)


def load(tuned):
    model = LLaDA.from_pretrained(toy_llada.SHIPPED / "base", "cpu", torch.float32)
    if tuned:
        model.adapters["tuned"] = LoRA.load(toy_llada.SHIPPED / "best", model.config)
        model.use("tuned")
    return model


@pytest.mark.parametrize("tuned, number", [(True, 3), *((False, number) for number in range(6))])
def test_each_step_of_play_fills_in_one_cell_and_the_last_is_what_generate_writes(tuned, number):
    """The base model's grids depend on the order in which it fills in the cells."""
    model, tokenizer = load(tuned), ChatTokenizer(toy_llada.SHIPPED / "base")
    puzzle = TASKS["toy"].rows("test")[number]["puzzle"]
    states = toy_llada.fill_in(model, tokenizer, puzzle)
    assert [state.count("_") for state in states] == list(range(16, -1, -1))
    for before, after in zip(states, states[1:], strict=False):
        assert all(b in ("_", a) for b, a in zip(before, after, strict=True))
    prompt = torch.tensor([tokenizer.prompt(puzzle)])
    completion = generate(model, prompt, gen_length=16, block=16, steps=16)[0, 17:]
    assert states[-1] == tokenizer.completion(completion.tolist())


def test_play_prints_the_steps_and_how_many_cells_are_right(capsys):
    toy_llada.main(["--play", "0"])
    lines = capsys.readouterr().out.splitlines()
    row = TASKS["toy"].rows("test")[0]
    assert lines[0].endswith(toy_llada.in_rows(row["puzzle"]))
    step, right, marks = lines[-5:-2]
    base, tuned = step[8:].split("  ")
    assert right[8:].split("  ") == [toy_llada.in_rows(row["solution"])] * 2
    for place, mark in enumerate(marks[8:].ljust(len(step) - 8)):
        assert (mark == "^") == (step[8 + place] != right[8 + place])
    grids = {"base": base.replace(" ", ""), "tuned": tuned.replace(" ", "")}
    for line, (name, grid) in zip(lines[-2:], grids.items(), strict=True):
        empty = [i for i in range(16) if row["puzzle"][i] == "0"]
        right = sum(grid[i] == row["solution"][i] for i in empty)
        assert line == f"The {name} model has {right} of the {len(empty)} empty cells right."


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--play", "256"], "--play 256 is not a puzzle from 0 to 255"),
        (["--play", "--seed", "1"], "leave out the settings"),
        (["--play", "--draw", "runs/a"], "not both"),
    ],
)
def test_wrong_flags_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        toy_llada.main(flags)


def test_eval_scores_the_shipped_adapter_as_the_shipped_figure_does(tmp_path):
    """48 of the 256 test puzzles are enough to tell 0.99 from 0.22."""
    rows = TASKS["toy"].rows("test")[:48]
    puzzles = tmp_path / "puzzles.jsonl"
    puzzles.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--lengths", "16", "--test_data", str(puzzles)]
    finetune.main(["eval", "--adapter", ADAPTER, "--out", str(tmp_path / "tuned"), *flags])
    base = ["--task", "toy", "--model", "figures/data/toy/base"]
    finetune.main(["eval", *base, "--out", str(tmp_path / "base"), *flags])
    solved = {}
    for name in ("tuned", "base"):
        found = json.loads((tmp_path / name / "eval.json").read_text())
        solved[name] = found["lengths"]["16"]["solved"]
    assert solved["tuned"] > 0.9 and solved["base"] < 0.5


def test_merge_writes_a_model_with_the_logits_of_the_adapter(tmp_path):
    finetune.main(["merge", str(tmp_path / "merged"), "--adapter", ADAPTER])
    merged = LLaDA.from_pretrained(tmp_path / "merged", "cpu", torch.float32)
    ids = torch.randint(2, 23, (4, 33), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(merged(ids), load(tuned=True)(ids), rtol=1e-4, atol=1e-4)
