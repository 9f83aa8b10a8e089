"""Stored leaderboard results: read, grouped, and where they were not made alike."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drdpo.errors import DataError, UsageError
from drdpo.evaluation.leaderboard_scores import Benchmark, benchmarks
from drdpo.evaluation.runs import parse_runs
from drdpo.folder import read_json_object, read_manifest

_OWN = ("model_path", "model_fingerprint")
"""What rightly differs between two runs."""


@dataclass(frozen=True)
class LeaderboardRun:
    """One model's results."""

    group: str
    """Of the tables: what stands before "/" in its name, or nothing."""
    name: str
    folder: Path
    results: dict[str, Any]
    """The harness's whole results."""
    manifest: dict[str, Any]
    """Of the evaluation; empty where there is none, as beside results that the harness wrote itself."""

    @property
    def benchmarks(self) -> list[Benchmark]:
        """Those of the six that were run whole."""
        return benchmarks(self.results["results"])

    @property
    def limit(self) -> float | None:
        """Samples per task, where the run was a trial."""
        config = self.results.get("config")
        value = config.get("limit") if isinstance(config, dict) else None
        return float(value) if isinstance(value, int | float) else None

    @property
    def facts(self) -> dict[str, str]:
        """What a reader needs to repeat it."""
        made_by = self.manifest.get("made_by", {})
        versions = self.manifest.get("versions", {})
        found = {name: value for name, value in made_by.items() if value is not None}
        found |= {
            name: self.manifest[name] for name in ("date", "chat_template_sha256", "max_length") if name in self.manifest
        }
        found |= {
            f"{name} version": versions[name] for name in ("lm-eval", "transformers", "torch", "vllm") if name in versions
        }
        if "commit" in self.manifest:
            found["commit"] = self.manifest["commit"]
        return {name: str(value) for name, value in found.items()}


def read_runs(words: list[str]) -> list[LeaderboardRun]:
    """Read GROUP/NAME=FOLDER words.

    Raises:
        UsageError: a word that is none, a name given twice.
        DataError: no results.json in a folder, or one without the harness's results.
    """
    runs = []
    for name, folders in parse_runs(words).items():
        if len(folders) > 1:
            raise UsageError(f"--runs: the name {name} is given twice; every model needs its own")
        group, _, short = name.rpartition("/")
        runs.append(_read(group, short, folders[0]))
    return runs


def _read(group: str, name: str, folder: Path) -> LeaderboardRun:
    path = folder / "results.json"
    if not path.is_file():
        raise DataError(f"run {name}: {path}: no such file; openllm_eval.slurm writes it")
    results = read_json_object(path)
    scores = results.get("results")
    if not isinstance(scores, dict) or not all(isinstance(values, dict) for values in scores.values()):
        raise DataError(f'{path}: field "results" is missing or not of the harness')
    record = read_manifest(folder).get("evaluate_openllm", {})
    return LeaderboardRun(group, name, folder, results, record if isinstance(record, dict) else {})


def differences(runs: list[LeaderboardRun]) -> list[str]:
    """One line a flag, version or template in which the runs' evaluations differ, the model aside."""
    lines = []
    records = {run.name: run.facts for run in runs}
    for fact in dict.fromkeys(fact for record in records.values() for fact in record):
        if fact in (*_OWN, "date", "commit"):
            continue
        values = {name: record.get(fact, "not recorded") for name, record in records.items()}
        if len(set(values.values())) > 1:
            lines.append(
                f"the evaluation differs in {fact}: " + ", ".join(f"{run} {value}" for run, value in values.items())
            )
    return lines
