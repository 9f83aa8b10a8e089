"""The tables and commands of README.md and docs/*.md. `python tests/readme.py` writes the tables."""

import dataclasses
import json
import re
import shlex
import statistics
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from drdpo.cli import spelled  # noqa: E402
from drdpo.config import data, evaluation, training  # noqa: E402

BLOCK = r"(<!-- {}: (\w+) -->\n).*?(\n<!-- end -->)"

CONFIGS = {
    name: found for file in (data, evaluation, training) for name, found in vars(file).items() if name.endswith("Config")
}
"""Every command line by its name."""

PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))


def flag_table(class_name: str) -> str:
    """A markdown table of a config class's flags."""
    rows = []
    for field in dataclasses.fields(CONFIGS[class_name]):
        default = field.default
        if default is dataclasses.MISSING:
            filled = field.default_factory is not dataclasses.MISSING
            default = " ".join(field.default_factory()) or None if filled else "required"
        default = str(default).lower() if isinstance(default, bool) else str(default).replace("None", "none")
        name = spelled(CONFIGS[class_name], field.name)
        rows.append([f"`{name}`", default, field.metadata["help"].replace("|", "\\|")])
    return table("| flag | default | meaning |", rows)


def results(name: str) -> dict[str, Any]:
    """The stored results of a benchmark."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    lines = [head, "|" + "---|" * (head.count("|") - 1), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def quickstart_table() -> str:
    rows = []
    for cpu, entry in results("quickstart").items():
        kind = f"{entry['dtype']}{', limited to AVX2' if cpu == 'avx2' else ''}"
        for seed, run in entry["seeds"].items():
            gains = [run["gains_sd"][method] for method in ("dpo", "kldpo", "wdpo")]
            cells = [f"{gain['value']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]" for gain in gains]
            rows.append([kind, seed, *cells, f"{sum(run['seconds'].values()) / 60:.1f}", f"{run['peak_gib']:.1f} GiB"])
    return table("| CPU | seed | DPO | KLDPO | WDPO | minutes on one core | memory |", rows)


def gpu_counts_table() -> str:
    """The 1B model with default flags."""
    rows = [
        [row["method"].upper(), str(row["pairs"]), f"{row['launches']:,}", f"{row['gib_moved']:.0f} GiB",
         f"{row['peak_gib']:.1f} GiB", f"{row['h100_ms']:.0f} ms"]
        for row in results("gpu_counts")["rows"] if row["model"] == "Llama-3.2-1B" and row["default"]
    ]  # fmt: skip
    return table("| method | pairs | launches | bytes moved | peak | time by the model, H100 |", rows)


def train_step_table() -> str:
    names = {"trl": "TRL DPOTrainer", "authors": "the authors' formulation", "padded": "drdpo, `--packing=false`",
             "packed": "**drdpo**"}  # fmt: skip
    ways = results("train_step")["ways"]
    peaks = {way: ways[way]["peak_gib_over_weights_and_optimizer"] for way in names}
    rows = [[name, f"{ways[way]['faster_than_trl_by']:.2f}", f"{peaks[way] / peaks['trl']:.2f}"]
            for way, name in names.items()]  # fmt: skip
    return table("| | pairs per second / TRL's | peak memory over weights and optimizer / TRL's |", rows)


def linear_logprob_table() -> str:
    rows = []
    for case in results("linear_logprob")["cases"]:
        ways = case["ways"]
        times = [1 / ways["matmuls"]["forward_times_drdpo"]]
        times += [1 / ways[way]["both_times_drdpo"] for way in ("matmuls", "trl", "plain")]
        peaks = [f"{1024 * ways[way]['peak_gib']:,.0f} MiB" for way in ("drdpo", "plain", "compile", "trl")]
        rows.append([case["case"].replace("x", " x "), *(f"{ratio:.2f}" for ratio in times), *peaks])
    head = "| V x D x tokens | ours / products, forward | ours / products, both | ours / TRL's chunks | ours / log_softmax "
    return table(head + "| memory: ours | log_softmax | torch.compile | TRL's chunks |", rows)


def wdpo_table() -> str:
    """Time, memory and errors of benchmarks/wdpo.py at its shortest length in bfloat16."""
    names = {"dpo": "DPO", "original": "the authors' formulation", "exact": "`exact`",
             "exact once": "`exact`, `--wdpo_prompt=once`", "tangent": "`tangent` (default)",
             "tangent once": "`tangent`, `--wdpo_prompt=once`"}  # fmt: skip
    found = results("wdpo")
    tokens = found["rows"][0]["tokens"]
    first = {(row["way"], row["checkpointing"]): row for row in found["rows"] if row["tokens"] == tokens}
    rows = []
    for way, name in names.items():
        cells = [f"{first[way, kept][part]:.1f}" for part in ("time_ratio", "memory_ratio") for kept in (True, False)]
        error = found["errors"][str(tokens)].get(f"{way}, bfloat16")
        errors = [f"{error['error']:.1%}", f"{error['worst']:.1%}", f"{error['cosine']:.3f}"] if error else ["-"] * 3
        rows.append([name, *cells, *errors])
    return table("| | time | without | memory | without | error in bf16 | worst | lowest cosine |", rows)


def wdpo_length_table() -> str:
    """DPO's and the authors' formulation beside ours."""
    rows = results("wdpo")["rows"]
    of = {(row["tokens"], row["checkpointing"], row["way"]): row for row in rows}
    cells = []
    for kept, tokens in product((True, False), dict.fromkeys(row["tokens"] for row in rows)):
        ways = {way: of.get((tokens, kept, way)) for way in ("dpo", "original", "tangent")}
        cells.append([str(tokens), "yes" if kept else "no"])
        cells[-1] += [f"{row['time_ratio']:.1f}" if row else "-" for way, row in ways.items() if way != "dpo"]
        cells[-1] += [f"{row['peak_gib']:.2f} GiB" if row else "-" for row in ways.values()]
    return table("| tokens | checkpointing | time: the authors' | ours | memory: DPO | the authors' | ours |", cells)


def wdpo_accuracy_table() -> str:
    """By length and text, and over all pairs."""
    parts: dict[str, list[Any]] = {}
    for pair in (pairs := results("wdpo")["accuracy"]):
        parts.setdefault(f"{pair['tokens']}, {pair['text']}", []).append(pair)
    rows = []
    for name, part in {**parts, "all": pairs}.items():
        errors = [pair["error"] for pair in part]
        cosine, condition = min(pair["cosine"] for pair in part), max(pair["solver_condition"] for pair in part)
        cells = [f"{statistics.median(errors):.1%}", f"{max(errors):.1%}", f"{cosine:.4f}", f"{condition:.0f}"]
        rows.append([name, str(len(part)), *cells])
    return table("| tokens of a sequence, text | pairs | median error | worst | lowest cosine | `solver_condition` |", rows)


def scoring_table() -> str:
    rows = []
    for case in results("scoring")["cases"]:
        ways = case["ways"]
        peak = ways["packed"]["peak_gib_over_the_model"] / ways["padded"]["peak_gib_over_the_model"]
        faster = [f"{ways[way]['packed_is_faster_by']:.1f}x" for way in ("one", "padded")]
        rows.append([case["answers"], str(case["n"]), *faster, f"{peak:.2f}"])
    head = "| answers | n | faster than one at a time | faster than padded batches of 8 | peak memory / padded |"
    return table(head, rows)


def methods_table() -> str:
    runs = results("methods")["runs"]
    rows = []
    for name, run in runs.items():
        measured = ("first_loss", "loss", "eval_loss", "eval_accuracy", "worst_group_accuracy", "other_accuracy")
        cells = [f"`{' '.join(run['flags'])}`" if run["flags"] else "", *(f"{run[key]:.3f}" for key in measured)]
        ratio = run["seconds_per_step"] / runs["DPO"]["seconds_per_step"]
        rows.append([name, *cells, f"{run['effective_share']:.2f}", f"{ratio:.2f}"])
    head = "| method | flags | first loss | last loss | test loss | test accuracy | worse group | other labels "
    return table(head + "| effective sample / pairs | time per step / DPO's |", rows)


def label_shift_tables() -> str:
    """Losses and accuracies over alpha, and their differences from DPO's."""
    methods = json.loads((ROOT / "docs" / "label_shift.json").read_text(encoding="utf-8"))["methods"]
    tables = []
    for measure in ("loss", "accuracy"):
        rows = []
        for method, found in methods.items():
            row = found[measure]
            last = [f"{value:+.3f} [{low:+.3f}, {high:+.3f}]" for value, low, high in row.get("against_dpo", [])][-2:]
            needed = [f"{row['detectable'][-1]:.3f}"] if last else [""] * 3
            rows.append([method, *(f"{value:.3f}" for value in (*row["alphas"], row["worst"])), *last, *needed])
        head = f"| {measure} at alpha | 0 | 0.25 | 0.5 | 0.75 | 1 | worst | at 1, minus DPO's | worst, minus DPO's "
        tables.append(table(head + "| detectable |", rows))
    return "\n\n".join(tables)


def architectures_table() -> str:
    from harness.architectures import table

    return table()


MEASURED = {name.removesuffix("_table").removesuffix("_tables"): make for name, make in list(globals().items())
            if name.endswith(("_table", "_tables")) and name not in ("flag_table", "with_tables")}  # fmt: skip


def with_tables(text: str) -> str:
    """A page with its tables generated from the config classes and from measured results."""
    text = re.sub(BLOCK.format("results"), lambda match: match[1] + MEASURED[match[2]]() + match[3], text, flags=re.DOTALL)
    return re.sub(BLOCK.format("flags"), lambda match: match[1] + flag_table(match[2]) + match[3], text, flags=re.DOTALL)


def table_names(text: str) -> list[str]:
    return [name for _, name, _ in re.findall(BLOCK.format("flags"), text, re.DOTALL)]


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
