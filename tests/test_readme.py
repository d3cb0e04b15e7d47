"""What README and the gallery say is so: commands parse, links and names exist, code blocks run."""

import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch import Generator, nn

import dtm
import llada_finetune
import maze_lab
from llada import tasks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
GALLERY = (ROOT / "figures" / "README.md").read_text()


def code_block(word: str) -> str:
    """Return README's Python block that holds this word."""
    [block] = [b for b in re.findall(r"```python\n(.*?)```", README, re.S) if word in b]
    return block


def load(source: str, folder: Path, name: str):
    """Import a piece of README as a module."""
    (folder / f"{name}.py").write_text(source)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


# ---- commands -----------------------------------------------------------------------------------
def named_commands() -> list[str]:
    """Return every command that starts with python or torchrun in a code block or code span."""
    found = set()
    for text in (README, GALLERY):
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
        lines = "\n".join(block for language, block in blocks if not language).splitlines()
        for line in lines + re.findall(r"`([^`\n]+)`", text):
            for part in line.split("#")[0].split("&&"):
                if part.strip().startswith(("python ", "torchrun ")):
                    found.add(part.strip())
    return sorted(found)


class Started(Exception):
    """The command line was accepted, and the work would begin now."""


def start(*args, **settings):
    raise Started


def run_until_started(script: str, words: list[str], monkeypatch, tmp_path) -> None:
    """Call the main function of a script; whatever would take long raises Started instead."""
    module = importlib.import_module(script.removesuffix(".py"))
    if script == "figures.rivals":
        module = importlib.import_module("figures.rivals.compare")
    for name in ("experiment", "train_base"):
        monkeypatch.setattr(maze_lab, name, start)
    for name in ("run_toy", "play", "collect", "plan", "bench", "run_all", "page_data"):
        monkeypatch.setattr(module, name, start, raising=False)
    for name in ("Ranks", "open_run"):
        monkeypatch.setattr(llada_finetune, name, MagicMock())
    writes = any(word in script for word in ("llada", "maze_gif")) is False
    module.main([*words, *(["--out", str(tmp_path)] if writes else [])])


def check_finetune(words: list[str], monkeypatch) -> None:
    """One of the actions would run now, with settings that are accepted."""
    actions = {"train": "open_run", "eval": "evaluate_command", "merge": "merge"}
    for name in (*actions.values(), "train", "base_of", "locate", "Ranks"):
        monkeypatch.setattr(llada_finetune, name, MagicMock())
    llada_finetune.main(words)
    called = [name for name in actions.values() if getattr(llada_finetune, name).called]
    assert called == [actions[words[0] if words else "train"]]
    for call in llada_finetune.open_run.call_args_list:
        llada_finetune.make_config(**call.args[0])


RUN_ELSEWHERE = (
    "dtm.py",
    "figures.maze_gif",
    "figures.antibody",
    "figures.redraw",
    "figures.lesson",
)


@pytest.mark.parametrize("text", named_commands())
def test_every_named_command_is_understood(text, monkeypatch, tmp_path):
    words = shlex.split(text.replace("SEED", "0"))
    words = [word for word in words if word != "torchrun" and "nproc_per_node" not in word]
    words = words[1:] if words[0] == "python" else words
    script, *words = words[1:] if words[0] == "-m" else words
    if script == "pytest":
        assert words == ["-q", "tests"]  # the command that runs this test
    elif script == "llada_finetune.py":
        check_finetune(words, monkeypatch)
    elif script in RUN_ELSEWHERE:
        assert not words or script != "dtm.py"
    else:
        with pytest.raises(Started):
            run_until_started(script, words, monkeypatch, tmp_path)


def test_the_commands_of_both_texts_are_found():
    found = " ".join(named_commands())
    for script in ("maze_lab.py --ablate cv", "figures.phases", "llada_finetune.py eval"):
        assert script in found


def test_every_named_selection_has_tests():
    written = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    tests = re.findall(r"^def (test_\w+)", written, re.M)
    selections = re.findall(r"`pytest -k (\w+)`", README)
    assert len(selections) == 13
    for selection in selections:
        assert any(selection in name for name in tests), selection


# ---- links and names ----------------------------------------------------------------------------
def anchors(text: str) -> set[str]:
    """Return the names under which a code-hosting site links to the headings of a text."""
    headings = re.findall(r"^##+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_files_and_headings():
    for folder, text in ((ROOT, README), (ROOT / "figures", GALLERY)):
        for link, _, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#([\w-]+))?\)", text):
            target = folder / link if link else folder / "README.md"
            assert target.is_file(), link
            assert not anchor or anchor in anchors(target.read_text()), anchor


def test_functions_that_the_table_names_exist():
    table = README.split("## Reading along with the paper")[1].split("\n## ")[0]
    names = re.findall(r"`(\w+)`", table)
    assert len(names) >= 10
    for name in names:
        assert hasattr(dtm, name), name


# ---- code ---------------------------------------------------------------------------------------
def test_D3_the_loss_in_readme_is_that_of_the_function():
    lines = [line.strip() for line in inspect.getsource(dtm.c_dtm_loss).splitlines()]
    printed = [line.strip() for line in code_block("teacher_term").strip().splitlines()]
    start = lines.index(printed[0])
    assert lines[start : start + len(printed)] == printed


class Net(nn.Module):
    """A network of 6 positions and 4 tokens, as the block in README asks for."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6 * 5, 6 * 4)

    def forward(self, xt, where=None):
        logits = self.embed(nn.functional.one_hot(xt, 5).flatten(1).float()).view(-1, 6, 4)
        return logits if where is None else logits[where]


def test_tilt_matching_as_in_readme_raises_the_reward(tmp_path):
    torch.manual_seed(0)
    model = Net()
    source = code_block("tilt_matching").replace("h=1.0)", "h=4.0, steps=40, lr=0.02)")
    *_, before = dtm.sample(model, torch.full((400, 6), 4), 4, generator=Generator().manual_seed(1))
    module = load(f"def use(model):\n{indent(source)}\n    return reward", tmp_path, "own_model")
    reward = module.use(model)
    *_, after = dtm.sample(model, torch.full((400, 6), 4), 4, generator=Generator().manual_seed(1))
    assert reward(after).mean() > reward(before).mean() + 0.2


def indent(source: str) -> str:
    return "\n".join(f"    {line}" for line in source.splitlines())


def test_the_task_of_readme_earns_its_reward(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    source = f"from llada.tasks import Task\n\n\n{code_block('(Task)')}"
    task = load(source, tmp_path, "own_task").Shout()
    row = {"question": "Say no."}
    assert task.prompt(row) == "Say no."
    assert (task.reward("NO", row), task.reward("No", row)) == (1.0, 0.5)
    assert tasks.TASKS["shout"].prompt(row) == "Say no."
