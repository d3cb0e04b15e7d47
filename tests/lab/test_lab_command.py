"""The command line of the lab, end to end."""

import json
from itertools import pairwise

import pytest
import torch
from lab_helpers import ROOT, SMALL, InThisProcess, command, mean

import maze_lab as lab

TINY = "--quick --steps 16 --rollouts 128 --phases 2 --base-steps 8 --batch 16 --layers 1".split()
KEYS = {"arm", "seed", "kl", "success", "target_success", "modes", "target_modes", "seconds"}
SEVEN = ["reward only", "one jump", "c = 0", "c = 1", "best scalar c", "learned c", "replay"]
NOT_NEEDED = "safetensors tokenizers huggingface_hub math_verify filelock pytest hypothesis".split()


def test_the_lab_runs_end_to_end_with_its_own_packages_only(tmp_path):
    """The packages that only LLaDA and the tests need fail on import, in all processes.

    MPLBACKEND is what a notebook leaves behind, of a package that is not installed.
    """
    blocked, out = tmp_path / "blocked", tmp_path / "out"
    blocked.mkdir()
    for name in NOT_NEEDED:
        (blocked / f"{name}.py").write_text("raise ModuleNotFoundError(__name__)\n")
    environment = {"PYTHONPATH": str(blocked), "MPLBACKEND": "module://no_such_backend.inline"}
    ran = command("maze_lab.py", *TINY, "--jobs", 2, "--first-seed", 3, "--out", out, **environment)
    assert ran.returncode == 0, ran.stderr
    result = json.loads((out / "data" / "quick_main.json").read_text())
    assert [arm["name"] for arm in result["arms"]] == SEVEN
    assert [(row["arm"], row["seed"]) for row in result["rows"]] == [(name, 3) for name in SEVEN]
    assert all(set(row) >= KEYS and row["arm"] in ran.stdout for row in result["rows"])
    annealed = [row["trace"] for row in result["rows"] if row["arm"] != "one jump"]
    for a, b in pairwise(annealed):  # all annealed arms have one schedule
        assert [record["h"] for record in a] == [record["h"] for record in b]
    assert (out / "quick_main.png").stat().st_size > 5_000


def test_the_table_has_means_and_standard_errors(tmp_path):
    rows = [{"arm": "x", "kl": value, "success": None} for value in (1.0, 2.0, 6.0)]
    table = lab.format_table({"arms": [{"name": "x"}], "rows": rows}, {"kl": "", "success": ""})
    assert table.splitlines()[1].split() == ["x", "3.000", "+-", "1.528", "-"]


def test_a_run_that_fails_says_why_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(lab, "make_maze", lambda cfg, seed=0: SMALL)
    with pytest.raises(SystemExit, match="The run stopped: .*overflows"):
        lab.main([*TINY, "--ablate", "cv", "--a-end", "1e9", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_only_by_a_complete_one(tmp_path):
    file = tmp_path / "data" / "x.json"
    lab.write_then_rename(file, lambda path: path.write_text("old"))

    def stop_half_way(path):
        path.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.write_then_rename(file, stop_half_way)
    assert file.read_text() == "old"
    lab.write_then_rename(file, lambda path: path.write_text("new"))
    assert file.read_text() == "new" and list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    "args, word",
    [
        (["--seeds", "0"], "--seeds"),
        (["--first-seed", "-1"], "--first-seed"),
        (["--jobs", "-1"], "--jobs"),
        (["--lr", "nan"], "--lr"),
        (["--a-end", "-1"], "--a-end"),
        (["--batch", "x"], "--batch"),
        (["--steps", "3"], "phases"),
        (["--grid", "7"], "--grid"),
        (["--walker", "drunk"], "--walker"),
        (["--ablate", "colour"], "--ablate"),
        (["--mazes", "2", "--seeds", "3"], "--mazes"),
        (["--out", str(ROOT / "README.md")], "README.md"),
    ],
)
def test_flags_that_cannot_be_used_are_refused_by_name(args, word, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        lab.main(["--out", str(tmp_path), *args])
    assert stopped.value.code == 2 and word in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_missing_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        lab.main(["--out", str(tmp_path), "--device", "cuda"])
    assert "--device cuda" in capsys.readouterr().err.splitlines()[-1]


def test_defaults_follow_the_machine(tmp_path, monkeypatch):
    """On a CPU: one seed per processor. On a GPU: three seeds in up to four processes."""
    monkeypatch.setattr(lab, "processors", lambda: 6)
    _, args = lab.read_command_line(["--device", "cpu", "--out", str(tmp_path)])
    assert args.jobs == 6 and args.seeds == [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)  # as if the GPU answered
    _, args = lab.read_command_line(["--out", str(tmp_path)])
    assert args.device == "cuda" and args.jobs == 4 and args.seeds == [0, 1, 2]


def test_the_main_figure_claims_what_the_shipped_numbers_say():
    result = json.loads((ROOT / "figures" / "data" / "main.json").read_text())
    arms = lab.by_arm(result)
    assert lab.title_of(result) == (
        "Training on reward only keeps 1.9 of the 5 shortest paths; "
        "annealing with a learned c keeps 4.8"
    )
    kept = {name: mean(rows, "modes") for name, rows in arms.items()}
    assert min(kept, key=kept.get) == "reward only"
    assert kept["reward only"] == pytest.approx(1.9, abs=0.05)
    assert kept["learned c"] == pytest.approx(4.8, abs=0.05)
    kls = {name: mean(rows, "kl") for name, rows in arms.items()}
    assert min(kls, key=kls.get) == "replay"
