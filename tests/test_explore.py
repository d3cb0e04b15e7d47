"""The page figures/explore.html has the formulas of dtm.py and the numbers of main.json."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Generator

import dtm
from figures import explore

PAGE = explore.HERE / "explore.html"
RESULT = json.loads((explore.HERE / "data" / "main.json").read_text())


def part(name):
    """Return the content of the page's script element with this id."""
    [text] = re.findall(rf'<script id="{name}"[^>]*>(.*?)</script>', PAGE.read_text(), re.S)
    return text


def run_in_page(expression, tmp_path):
    """Return the value of a JavaScript expression that uses the formulas of the page."""
    script = f"{part('formulas')}; const answer = JSON.stringify({expression});"
    if shutil.which("node"):
        (tmp_path / "script.js").write_text(script + "console.log(answer);")
        command = ["node", str(tmp_path / "script.js")]
    else:
        browsers = ("chromium", "chromium-browser", "google-chrome")
        browser = next(filter(shutil.which, browsers), None)
        if browser is None:
            pytest.skip("The formulas of explore.html need node or Chromium to run.")
        page = tmp_path / "page.html"
        page.write_text(f"<body><script>{script}document.body.textContent = answer</script>")
        command = [browser, "--headless", "--no-sandbox", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    answer = re.sub("<.*?>", "", done.stdout)  # --dump-dom prints the page.
    return json.loads(answer)


def test_the_gradient_of_widget_b_is_that_of_the_loss(tmp_path):
    """The mean and the variance, against the gradients that autograd finds for (D3)."""
    noise = Generator().manual_seed(0)
    pi = torch.rand(5, generator=noise, dtype=torch.float64).softmax(0)
    w = torch.rand(5, generator=noise, dtype=torch.float64) * 3
    for c in (0.0, 1.0, 2.5):
        shown = run_in_page(f"onePosition({pi.tolist()}, {w.tolist()}, {c})", tmp_path)
        logits = pi.log().repeat(5, 1).requires_grad_()  # one copy for each sampled token
        dtm.c_dtm_loss(logits, pi.log().repeat(5, 1), torch.arange(5), w, c).sum().backward()
        mean = pi @ logits.grad
        variance = pi @ ((logits.grad - mean) ** 2).sum(1)
        torch.testing.assert_close(torch.tensor(shown["mean"]).double(), mean)
        assert shown["variance"] == pytest.approx(float(variance), rel=1e-6)


def test_the_best_c_of_widget_b_is_that_of_the_demo_and_has_the_least_variance(tmp_path):
    pi, rewards = explore.POSITION["pi"], explore.POSITION["rewards"]
    w = torch.tensor(rewards).mul(0.7).exp().tolist()
    of_c = f"c => onePosition({pi}, {w}, c)"
    best = run_in_page(f"({of_c})(0).bestC", tmp_path)
    assert best == pytest.approx(dtm.one_position(pi, w, 0.0)["best_c"], rel=1e-12)
    around = [best + shift for shift in (-0.1, 0, 0.1)]
    below, least, above = run_in_page(f"{around}.map({of_c}).map(x => x.variance)", tmp_path)
    assert least < below and least < above


def test_the_exact_tilt_of_widget_a_is_the_target_of_the_main_experiment(tmp_path):
    base = RESULT["bases"][3]
    trace = next(row["trace"] for row in RESULT["rows"] if row["seed"] == base["seed"])
    rewards = base["reward_distribution"]
    tilts = [record["a"] for record in trace]
    shown = run_in_page(
        f"{tilts}.map(a => tiltedRewards({rewards['values']}, {rewards['p']}, a).at(-1))", tmp_path
    )
    assert shown == pytest.approx([record["target_success"] for record in trace], rel=1e-6)


def test_the_divergence_of_the_base_model_from_its_tilt_is_the_one_over_all_paths(tmp_path):
    """The page needs the distribution of the rewards only: equal rewards have equal ratios."""
    p = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25]).double()
    r = torch.tensor([0.0, 0.5, 0.5, 1.0, 0.0]).double()
    target = dtm.exact_tilt(p, r, 7.0)
    expected = (target * (target / p).log()).sum()
    shown = run_in_page("divergenceFromBase([0, 0.5, 1], [0.35, 0.5, 0.15], 7)", tmp_path)
    assert shown == pytest.approx(expected.item(), rel=1e-6)


def test_the_number_of_paths_is_that_of_the_main_experiment(tmp_path):
    rows = RESULT["rows"][::7]
    shown = run_in_page(f"{[row['paths'] for row in rows]}.map(effectiveNumber)", tmp_path)
    assert shown == pytest.approx([row["modes"] for row in rows], rel=1e-9)


def test_the_page_is_the_one_that_the_script_writes(tmp_path):
    explore.main(["--out", str(tmp_path)])
    written = (tmp_path / "explore.html").read_text()
    assert written == PAGE.read_text(), "run python -m figures.explore"


def test_the_page_has_every_arm_and_seed_and_needs_no_other_file():
    data = json.loads(part("data"))
    assert {arm["name"] for arm in data["arms"]} == {row["arm"] for row in RESULT["rows"]}
    assert [run["seed"] for run in data["runs"]] == RESULT["seeds"]
    for run in data["runs"]:
        for name, trace in run["traces"].items():
            row = next(
                row for row in RESULT["rows"] if (row["arm"], row["seed"]) == (name, run["seed"])
            )
            assert trace[-1]["kl"] == pytest.approx(row["kl"], rel=1e-4)
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?:", PAGE.read_text())


def test_each_path_on_the_page_ends_at_the_goal_and_avoids_walls():
    data = json.loads(part("data"))
    walls = data["runs"][0]["walls"]
    for cells in data["paths"]:
        assert cells[0] == [0, 0] and cells[-1] == [3, 3] and len(cells) == 7
        assert not any(walls[y][x] for y, x in cells)


def test_a_result_on_many_mazes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="many mazes"):
        explore.main(["--data", str(Path("figures/data/main_mazes.json")), "--out", str(tmp_path)])
