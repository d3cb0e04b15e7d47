"""What README and figures/README.md say is so: commands parse, names exist, code runs."""

import importlib
import inspect
import math
import re
import shlex
import sys
from unittest.mock import MagicMock

import pytest
import torch
from helpers import ROOT, command
from torch import Generator

import dtm
import llada_finetune
import maze_lab as lab

README = (ROOT / "README.md").read_text()
GALLERY = (ROOT / "figures" / "README.md").read_text()


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


# ---- commands ------------------------------------------------------------------------------------
def named_commands():
    """Every command in a code block or span that starts python or torchrun."""
    found = set()
    for text in (README, GALLERY):
        lines = "\n".join(re.findall(r"```\n(.*?)```", text, re.S)).splitlines()
        for line in lines + re.findall(r"`([^`\n]+)`", text):
            for part in line.split("#")[0].split("&&"):
                if part.strip().startswith(("python ", "torchrun ")):
                    found.add(part.strip())
    return sorted(found)


class Started(Exception):
    """The command has been understood and would run now."""


def start(*args, **settings):
    raise Started


def check_lab(words, module, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [module.__file__, *words, "--out", str(tmp_path)])
    for name in ("experiment", "train_base"):
        monkeypatch.setattr(lab, name, start)
    with pytest.raises(Started):
        module.main()


def check_llada(words, monkeypatch):
    """One of the actions would run now, with settings that are in order."""
    actions = {"train": "open_run", "eval": "evaluate_command", "merge": "merge"}
    for name in (*actions.values(), "train", "base_of", "Ranks"):
        monkeypatch.setattr(llada_finetune, name, MagicMock())
    llada_finetune.main(words)
    called = [name for name in actions.values() if getattr(llada_finetune, name).called]
    assert called == [actions[words[0] if words else "train"]]
    for call in llada_finetune.open_run.call_args_list:
        llada_finetune.make_config(**call.args[0])


def check_llada_script(words, module, monkeypatch):
    for name in ("Ranks", "open_run"):
        monkeypatch.setattr(llada_finetune, name, MagicMock())
    for name in ("run_toy", "collect", "plan", "bench", "tune"):
        monkeypatch.setattr(module, name, start, raising=False)
    with pytest.raises(Started):
        module.main(words)


@pytest.mark.parametrize("text", named_commands())
def test_every_named_command_is_understood(text, monkeypatch, tmp_path):
    words = shlex.split(text.replace("SEED", "0"))
    words = [word for word in words if word != "torchrun" and "nproc_per_node" not in word]
    words = words[1:] if words[0] == "python" else words
    script = words[1] if words[0] == "-m" else words[0]
    if script == "pytest":
        assert words[2:] == ["-q", "tests"]  # what runs this
    elif script == "dtm.py":
        assert words == ["dtm.py"]  # run below
    elif script in ("figures.maze_gif", "figures.antibody"):
        assert words[2:] == []  # run at small size in test_figures, test_antibody
    elif script == "llada_finetune.py":
        check_llada(words[1:], monkeypatch)
    elif "llada" in script:
        check_llada_script(words[2:], importlib.import_module(script), monkeypatch)
    elif script == "maze_lab.py":
        check_lab(words[1:], lab, monkeypatch, tmp_path)
    else:
        check_lab(words[2:], importlib.import_module(script), monkeypatch, tmp_path)


def test_there_are_commands_to_check():
    assert len(named_commands()) > 15


def test_every_named_selection_has_tests():
    written = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    tests = re.findall(r"^def (test_\w+)", written, re.M)
    selections = re.findall(r"`pytest -k (.+?)`", README)
    assert len(selections) > 5
    for selection in selections:
        for word in selection.strip('"').split(" or "):  # -k matches a part of a name
            assert any(f"_{word.strip('_')}_" in name for name in tests), word


# ---- names ---------------------------------------------------------------------------------------
def test_pictures_links_and_sections_exist():
    for folder, text in ((ROOT, README), (ROOT / "figures", GALLERY)):
        for link in re.findall(r"\]\(([^)#]+?)(?:#[\w-]+)?\)", text):
            assert (folder / link).is_file(), link
    headings = re.findall(r"^## (.+)$", GALLERY, re.M)
    sections = {heading.lower().replace(" ", "-") for heading in headings}
    used = set(re.findall(r"figures/README\.md#([\w-]+)", README))
    assert len(used) >= 4 and used <= sections


def test_functions_that_the_table_names_exist():
    table = README.split("## With the paper open")[1].split("##")[0]
    names = re.findall(r"`(\w+)`", table)
    assert len(names) > 10 and [name for name in names if not hasattr(dtm, name)] == []


def test_readme_is_short_and_counts_the_lines_right():
    assert len(README.splitlines()) <= 170
    assert max(len(line) for line in README.splitlines()) <= 600
    for file, lines in re.findall(r"^\| `(\w+\.py)` \|.*?\| (\d+) \|", README, re.M):
        assert len((ROOT / file).read_text().splitlines()) == int(lines)


# ---- code ----------------------------------------------------------------------------------------
def test_D3_the_loss_that_readme_prints_is_the_function():
    body = inspect.getsource(dtm.c_dtm_loss).split('"""')[2]
    expected = [line.strip() for line in body.strip().splitlines()]
    printed = next(block for block in code_blocks("python") if "log_z" in block)
    assert [line.strip() for line in printed.strip().splitlines()] == expected


def test_dtm_in_fifteen_lines_tilts_a_model():
    names = {}
    for block in code_blocks("python"):
        if "def tilt(" in block:
            exec(block, names)  # our own README, not anybody's input
    V, L = 3, 2
    model = dtm.Table(torch.zeros((V + 1) ** L, L, V))
    rho_0 = dtm.exact_marginal(model, V, L).detach()
    reward = eval(re.search(r"`(lambda x1: .*?)`", README)[1])  # likewise
    target = dtm.exact_tilt(rho_0, reward(dtm.all_sequences(V, L)), 3.0)
    names["tilt"](model, reward, V, L, a_end=3.0, steps=60, lr=0.03)
    after = dtm.exact_marginal(model, V, L).detach()
    assert lab.kl(target, after) < 0.1 * lab.kl(target, rho_0)


def test_a_task_in_one_class_earns_its_reward(monkeypatch):
    monkeypatch.setattr("figures.tasks.TASKS", {})
    block = next(block for block in code_blocks("python") if "(Task)" in block)
    exec(block, vars(llada_finetune).copy())
    added = llada_finetune.Task.__subclasses__()[-1]()
    row = {"question": "Say no."}
    assert added.prompt(row) == "Say no."
    assert (added.reward("NO", row), added.reward("No", row)) == (1.0, 0.5)


def variance_by_loops(rho, w, c):
    """The demo's variance in plain loops: every state, every sequence that agrees with it."""
    V, L = 3, 3
    x1, total = dtm.all_sequences(V, L), 0.0
    for mask in dtm.all_sequences(2, L)[1:].bool():
        k = int(mask.sum())
        for xt in torch.where(mask, V, x1).unique(dim=0):
            here = ((x1 == xt) | mask).all(1)
            p = rho[here] / rho[here].sum()
            pi_a = dtm.exact_posterior(rho, xt[None])[:, mask]
            logits = pi_a.log().expand(len(p), -1, -1).clone().requires_grad_()
            token, w_here = x1[here][:, mask], w[here, None].expand(-1, k)
            c_here = c
            if c == "best":  # (D7): the q-weighted mean of y over the sequences
                y, q = dtm.state_c_target(logits, logits, token, w_here)
                c_here = (p[:, None] * q * y).sum(0) / (p[:, None] * q).sum(0)
            dtm.c_dtm_loss(logits, logits, token, w_here, c_here).sum().backward()
            gradients = logits.grad / k  # the 1/k of row_mean
            mean = (p[:, None, None] * gradients).sum(0)
            spread = (p[:, None, None] * (gradients - mean) ** 2).sum()
            total += float(rho[here].sum() * spread) / (L * math.comb(L, k))
    return total


def test_the_demo_prints_what_readme_says():
    lines = command("dtm.py").stdout.splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if line.count("|") == 3]
    rows = {row[0]: row[1:] for row in rows}
    names = ["0", "0.5", "1", "2", "best scalar c", "best c(xt, i)"]
    assert list(rows) == names
    assert all(float(row[0]) < 1e-14 for row in rows.values())  # the mean gradient stays

    g = Generator().manual_seed(0)
    rho = torch.randn(27, generator=g).double().softmax(0)
    w = dtm.tilt_weight(torch.rand(27, generator=g).double(), 3.0)
    w = w / (rho @ w)
    variance = {name: float(row[1]) for name, row in rows.items()}
    for name, c in {"0": 0.0, "0.5": 0.5, "1": 1.0, "2": 2.0, "best c(xt, i)": "best"}.items():
        assert variance[name] == pytest.approx(variance_by_loops(rho, w, c), abs=1e-4)
    assert variance["0"] / variance["1"] == pytest.approx(3.4, abs=0.05)
    assert variance["0"] / variance["best c(xt, i)"] == pytest.approx(4.9, abs=0.05)
    assert variance["best c(xt, i)"] < variance["best scalar c"] <= variance["1"]

    for row in rows.values():
        kl, bound = row[2].split("<=")
        assert 0 < float(kl) < float(bound)
    bias = re.findall(r"(\S+) at c = ([\d.]+)", lines[-1])
    assert [c.rstrip(".") for _, c in bias] == ["0", "0.5", "1"]
    assert float(bias[0][0]) < 1e-12 < 1e-5 < float(bias[1][0]) < float(bias[2][0])
