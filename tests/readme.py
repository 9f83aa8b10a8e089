"""The tables and commands of README.md and docs/*.md. `python tests/readme.py` writes the tables."""

import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from drdpo import config as configs  # noqa: E402
from drdpo.cli import spelled  # noqa: E402

_TABLE = re.compile(r"<!-- flags: (\w+) -->\n.*?<!-- end -->", re.DOTALL)

_MEASURED = re.compile(r"<!-- (quickstart|gpu_counts) -->\n.*?<!-- end -->", re.DOTALL)

PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))


def flag_table(class_name: str) -> str:
    """A markdown table of a config class's flags."""
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(getattr(configs, class_name)):
        if field.default is not dataclasses.MISSING:
            default = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = " ".join(field.default_factory()) or "none"
        else:
            default = "required"
        meaning = field.metadata["help"].replace("|", "\\|")
        name = spelled(getattr(configs, class_name), field.name)
        lines.append(f"| `{name}` | {default.replace('None', 'none')} | {meaning} |")
    return "\n".join(lines)


def quickstart_table() -> str:
    """A markdown table of the results of benchmarks/quickstart.py."""
    measured = ROOT / "benchmarks" / "results" / "quickstart.json"
    results = json.loads(measured.read_text(encoding="utf-8")) if measured.is_file() else {}
    methods = ("dpo", "kldpo", "wdpo")
    lines = ["| CPU | seed | DPO | KLDPO | WDPO | minutes on one core | memory |", "|---|---|---|---|---|---|---|"]
    for cpu, entry in results.items():
        kind = f"{entry['dtype']}{', limited to AVX2' if cpu == 'avx2' else ''}"
        for seed, run in entry["seeds"].items():
            gains = [run["gains_sd"][method] for method in methods]
            cells = [f"{gain['value']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]" for gain in gains]
            minutes = sum(run["seconds"].values()) / 60
            lines.append(f"| {kind} | {seed} | {' | '.join(cells)} | {minutes:.1f} | {run['peak_gib']:.1f} GiB |")
    return "\n".join(lines)


def gpu_table() -> str:
    """A markdown table of the counts of benchmarks/gpu_counts.py for the 1B model with default flags."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "gpu_counts.json").read_text(encoding="utf-8"))["rows"]
    lines = ["| method | pairs | launches | bytes moved | peak | time by the model, H100 |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row["model"] == "Llama-3.2-1B" and row["default"]:
            figures = (
                f"{row['launches']:,} | {row['gib_moved']:.0f} GiB | {row['peak_gib']:.1f} GiB | {row['h100_ms']:.0f} ms"
            )
            lines.append(f"| {row['method'].upper()} | {row['pairs']} | {figures} |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """A page with its tables generated from the config classes and from measured results."""
    tables = {"quickstart": quickstart_table, "gpu_counts": gpu_table}
    text = _MEASURED.sub(lambda match: f"<!-- {match[1]} -->\n{tables[match[1]]()}\n<!-- end -->", text)
    return _TABLE.sub(lambda match: f"<!-- flags: {match[1]} -->\n{flag_table(match[1])}\n<!-- end -->", text)


def table_names(text: str) -> list[str]:
    return _TABLE.findall(text)


def commands(text: str) -> list[list[str]]:
    """Every command of a page's bash blocks, as a list of arguments without the variables set before it."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("PYTHONPATH=src "), comments=True)
            if words:
                found.append(words)
    return found


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
