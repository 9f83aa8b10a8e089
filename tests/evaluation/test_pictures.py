"""The picture: what is drawn where, from 3 to 20 objectives and 1 to 5 runs. report.html: escaped, self-contained, and in a
real browser sortable and no wider than the window."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from drdpo.evaluation.report import Change, html_report
from drdpo.evaluation.runs import ANSWERS, ScoredRun
from drdpo.evaluation.spider import draw_spider, gain_limits, raw_range
from drdpo.evaluation.statistics import Estimate, compare
from drdpo.objectives import ARMORM_OBJECTIVES, GATED_SCORE


def fabricate(names, objectives, shift=0.1):
    """Two completions for each of 12 prompts; every run is higher than the one before."""
    generator = np.random.default_rng(0)
    prompts = {i: [{"role": "user", "content": str(i)}] for i in range(12)}
    runs = []
    for place, name in enumerate(names):
        drawn = {key: 10.0**index * (generator.normal(size=(12, 2)) + shift * place) for index, key in enumerate(objectives)}
        completions = pd.DataFrame({("scores", key): values.ravel() for key, values in drawn.items()})
        completions[[("answers", key) for key in ANSWERS]] = 0.0
        completions.index = pd.MultiIndex.from_arrays([[0] * 24, np.repeat(np.arange(12), 2)])
        runs.append(ScoredRun(name, [Path("x")], prompts, completions))
    return runs


@pytest.mark.parametrize("objectives", [3, 6, 20])
@pytest.mark.parametrize("runs", [1, 2, 5])
def test_every_size_is_drawn(objectives, runs):
    names = [*ARMORM_OBJECTIVES, GATED_SCORE][:objectives]
    fabricated = fabricate(["base", "dpo", "kldpo", "wdpo", "drdpo"][:runs], names)
    files = draw_spider(compare(fabricated, names, 100, 0, []))
    # matplotlib notes every text of an svg in a comment.
    svg = files["spider.svg"].decode()
    assert svg.count("<!-- base -->") >= 1
    assert ("Gain over base" in svg) == (runs > 1)
    assert all((name.partition("-")[2] or name).replace("_", " ") in svg for name in names)
    assert len(files["spider.png"]) > 10_000


def test_an_objective_without_spread_has_no_gain_axis():
    names = list(ARMORM_OBJECTIVES[:4])
    runs = fabricate(["base", "dpo"], names)
    runs[0].completions["scores", names[0]] = 1.0
    comparison = compare(runs, names, 100, 0, [])
    assert set(comparison.gains["dpo", "base"]) & set(names) == set(names[1:])
    svg = draw_spider(comparison)["spider.svg"].decode()
    assert svg.count("helpfulness") < svg.count("correctness")


def test_raw_axis_is_the_quartiles_widened_to_hold_every_mean():
    (objective,) = names = [ARMORM_OBJECTIVES[0]]
    for shift in (0.0, 3.0):
        runs = fabricate(["base", "dpo"], names, shift)
        ends = raw_range(runs, objective)
        low, high = np.quantile(np.concatenate([run.completions["scores", objective] for run in runs]), [0.25, 0.75])
        assert ends[0] <= low < high <= ends[1]
        assert all(ends[0] < run.mean(objective) < ends[1] for run in runs)
    runs = fabricate(["only"], names)
    runs[0].completions["scores", objective] = 5.0
    assert sum(raw_range(runs, objective)) / 2 == pytest.approx(5.0), "a single run of equal scores"


@pytest.mark.parametrize(("smallest", "largest"), [(-0.5, -0.1), (-0.2, 0.3), (0.1, 0.4), (0.0, 0.0)])
def test_negative_gains_lie_inside_the_bases_ring(smallest, largest):
    low, high = gain_limits([Estimate(smallest, None, None), Estimate(largest, None, None)])
    assert low < min(smallest, 0.0) and high > max(largest, 0.0)
    assert (0.0 - low) / (high - low) > 0.15


SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 400"><rect width="800" height="400"/></svg>'
REPORT = """# a & b against base

> **Not a like-for-like comparison:** x

![Mean scores](spider.png)

| run | folder | gain |
|---|---|---:|
| one | `outputs/a_long_name_of_a_folder/completions/of/a/run/with_a_name` | +0.50 [+0.1, +0.9] |
| two | <script>alert(1)</script> | -1.25 [-2.0, -0.5] |
| three | `c` | +0.125 [+0.1, +0.2] |
"""
CHANGES = [
    Change("What <b>is</b> it?", "ArmoRM", [("base", 0.5, "It\n is <script>alert(2)</script>"), ("dpo", 0.75, "that")])
]


def page():
    return html_report({"report.md": REPORT, "spider.svg": SVG.encode(), "spider.png": b""}, CHANGES)


def test_a_page_is_escaped_and_needs_no_other_file():
    text = page()
    assert "<title>a &amp; b against base</title>" in text
    assert text.count("<script>") == 1 and "&lt;script&gt;alert(1)" in text and "&lt;script&gt;alert(2)" in text
    assert "What &lt;b&gt;is&lt;/b&gt; it?" in text and "0.7500" in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == 1 and sources[0].startswith("data:image/svg+xml;base64,")
    assert "Prompts whose answers changed most" not in html_report({"report.md": "# x"})


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
@pytest.mark.parametrize("width", [400, 1200])
def test_in_a_browser_tables_sort_and_the_page_does_not_scroll_sideways(width, tmp_path):
    probe = """<script>
    const column = document.querySelectorAll("th button")[2];
    column.click();
    const order = () => [...document.querySelectorAll("tbody tr")].map((row) => row.cells[0].textContent).join(" ");
    const down = order();
    column.click();
    const fits = document.documentElement.scrollWidth <= innerWidth;
    document.title = [down, order(), fits, document.images[0].naturalWidth > 0];
    </script>"""
    file = tmp_path / "report.html"
    file.write_text(page().replace("</body>", f"{probe}</body>"), encoding="utf-8")
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
        f"--user-data-dir={tmp_path}/profile",
        "--virtual-time-budget=2000", "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "<title>one three two,two three one,true," in done.stdout, done.stdout[:300] + done.stderr[-300:]
