"""report.html: escaped, self-contained, and in a real browser sortable and no wider than the window."""

import re
import shutil
import subprocess

import pytest

from drdpo.evaluation.report import Change, html_report

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
