"""The picture of the small LLaDA claims what its shipped numbers say."""

import itertools
import json
import statistics
from pathlib import Path

import pytest

from figures import toy_llada

FILE = Path(toy_llada.__file__).parent / "data" / "toy.json"


def solved_at_the_chosen_phase(run: dict) -> float:
    """Return the test score after the phase that solves the most validation puzzles."""
    best, chosen = -1.0, 0
    for record in run["log"]:
        if record.get("split") == "valid" and record["solved"] > best:
            best, chosen = record["solved"], record["phase"]
    [test] = [e for e in run["log"] if e.get("split") == "test" and e["phase"] == chosen]
    return test["solved"]


def test_the_title_states_the_share_of_puzzles_that_each_arm_solves(tmp_path):
    result = json.loads(FILE.read_text())
    shares = {}
    for c in ("learned", "1"):
        runs = [run for run in result["runs"] if run["settings"]["c"] == c]
        shares[c] = 100 * sum(map(solved_at_the_chosen_phase, runs)) / len(runs)
    title = toy_llada.title_of(result)
    learned, one = [int(word.rstrip("%")) for word in title.split() if word.endswith("%")]
    assert learned == pytest.approx(shares["learned"], abs=0.5)
    assert one == pytest.approx(shares["1"], abs=0.5)
    assert shares["learned"] > shares["1"] + 5
    assert toy_llada.draw(result, tmp_path / "toy.png").stat().st_size > 10_000


def test_the_table_of_the_replay_runs_has_their_means_and_errors():
    result = json.loads((FILE.parent / "toy_replay.json").read_text())
    arms = {}
    for run in result["runs"]:
        key = (run["settings"].get("replay", 0), run["settings"]["prompts"])
        arms.setdefault(key, []).append(run)
    assert set(arms) == set(itertools.product((0, 1, 2, 99), (768, 1536)))
    lines = toy_llada.table(result).splitlines()[2:]
    for line, runs in zip(lines, arms.values(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        scores = [solved_at_the_chosen_phase(run) for run in runs]
        error = statistics.stdev(scores) / 5**0.5
        assert cells[1] == "5" and cells[2] == f"{statistics.mean(scores):.3f} ± {error:.3f}"
        norms = []
        for run in runs:
            norm = sorted(e["grad_norm"] for e in run["log"] if e["kind"] == "step")
            norms.append(norm[(len(norm) - 1) // 2])
        assert cells[3].startswith(f"{statistics.mean(norms):.3f}")
