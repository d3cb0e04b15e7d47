"""The notebook figures/lesson.ipynb: it runs without any other file and prints what it shows."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from figures.lesson import DTM, NOTEBOOK, code_cells, packed_file


@pytest.fixture(scope="module")
def notebook():
    return json.loads(NOTEBOOK.read_text())


def numbers(text):
    return torch.tensor([float(x) for x in re.findall(r"-?\d+\.\d+", text)])


def shown(notebook):
    """Return the text that the committed notebook shows below its cells."""
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", [])]
    return "".join("".join(o["text"]) for o in outputs if o["output_type"] == "stream")


def test_the_notebook_holds_the_present_dtm(notebook):
    assert packed_file(notebook) == DTM.read_bytes(), "run python -m figures.lesson"


def test_the_notebook_has_at_most_60_lines_of_code(notebook):
    lines = [line for cell in code_cells(notebook) for line in cell.splitlines() if line.strip()]
    assert len(lines) <= 60


def test_the_cells_run_in_an_empty_folder_and_print_what_the_notebook_shows(notebook, tmp_path):
    script = "\n\n".join(code_cells(notebook))
    (tmp_path / "lesson.py").write_text(script)
    environment = {"MPLBACKEND": "Agg", "PYTHONPATH": ""}
    run = subprocess.run(
        [sys.executable, "lesson.py"],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "dtm.py").read_bytes() == DTM.read_bytes()
    printed, expected = numbers(run.stdout), numbers(shown(notebook))
    # Training amplifies rounding, which differs between machines; the exact parts agree closely.
    torch.testing.assert_close(printed[:-2], expected[:-2], rtol=0.1, atol=5e-3)
    torch.testing.assert_close(printed[-2:], expected[-2:], rtol=0.05, atol=0.15)


def test_the_numbers_in_the_notebook_show_what_its_text_says(notebook):
    success_base, success_target, *rest = numbers(shown(notebook)).tolist()
    before, right, left = (rest[i : i + 5] for i in (0, 5, 10))
    mean_0, variance_0 = rest[15:20], rest[20]
    mean_1, variance_1 = rest[21:26], rest[26]
    kl_before, kl_after = rest[27:]
    assert success_base < 0.001 < 0.9 < success_target  # "less than once in 1,000 words"
    assert right == left != before  # (D2)
    assert mean_0 == mean_1 and variance_1 < variance_0 / 2
    assert kl_after < 0.05 * kl_before  # "nearly all of the divergence is gone"
