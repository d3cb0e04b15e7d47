"""The demo `python dtm.py`: it needs torch only, and its numbers agree with the functions."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from theory_helpers import close

import dtm

ROOT = Path(__file__).parent.parent.parent
BLOCKED = ["numpy", "matplotlib", "networkx", "tqdm", "safetensors", "tokenizers"]
BLOCKED += ["huggingface_hub", "math_verify", "transformers", "filelock"]


@pytest.fixture(scope="module")
def printed():
    """The lines that the demo prints where no other package can be imported."""
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({BLOCKED!r}))\n"
    code += "runpy.run_path('dtm.py', run_name='__main__')"
    words = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def numbers(line):
    return [float(word) for word in line.split() if word.replace(".", "").strip("-").isdigit()]


def test_the_demo_prints_the_tilted_posterior_of_five_tokens(printed):
    rows = {
        name: line for line in printed for name in ("pi_a  ", "weight w", "/ Z  ") if name in line
    }
    pi_a, w, tilted = [
        torch.tensor(numbers(rows[key])[-5:]) for key in ("pi_a  ", "weight w", "/ Z  ")
    ]
    w = torch.tensor(numbers(rows["weight w"])[:5])
    close(tilted, pi_a * w / (pi_a * w).sum(), atol=1e-3)


@pytest.mark.parametrize("c", [0.0, 0.5, 1.0, 1.805])
def test_D3_the_plain_loops_agree_with_autograd(c):
    pi_a = torch.tensor([0.4, 0.2, 0.2, 0.1, 0.1]).double()
    w = torch.tensor([1, 1, 2, 2, 4]).double()
    logits = pi_a.log().expand(5, 5).clone().requires_grad_()  # one row per sampled token
    dtm.c_dtm_loss(logits, logits, torch.arange(5), w, c).sum().backward()
    gradient = logits.grad
    mean = pi_a @ gradient
    variance = pi_a @ (gradient - mean).square().sum(1)
    best = dtm.best_scalar_c(logits, logits, torch.arange(5), w, share=pi_a.sqrt())

    looped = dtm.one_position(pi_a.tolist(), w.tolist(), c)
    close(torch.tensor(looped["target"]).double(), pi_a * w, atol=1e-7)
    close(torch.tensor(looped["mean"]).double(), mean, atol=1e-7)
    assert looped["variance"] == pytest.approx(variance.item())
    assert looped["best_c"] == pytest.approx(best.item())


def test_D3_the_mean_gradient_does_not_move_with_c_and_the_best_c_has_the_least_variance(printed):
    cells = [
        line.split("|") for line in printed if line.count("|") == 3 and "e" in line.split("|")[1]
    ]
    cells = [row for row in cells if "mean" not in row[1]]
    names = [row[0].strip() for row in cells]
    assert names == ["0", "0.5", "1", "2", "best scalar c", "best c(xt, i)"]
    assert all(float(row[1]) < 1e-12 for row in cells)
    variance = dict(zip(names, [float(row[2]) for row in cells], strict=True))
    assert min(variance, key=variance.get) == "best c(xt, i)"
    numbers_only = [variance[name] for name in names[:4]]
    assert variance["best scalar c"] < min(numbers_only)
    kl, bound = zip(*[map(float, row[3].split("<=")) for row in cells], strict=True)
    assert all(left < right for left, right in zip(kl, bound, strict=True))
