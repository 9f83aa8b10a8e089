"""What the folders say about themselves: how each run was trained, sampled and scored, and where the runs differ.

Read from the manifests of the other steps; one that is missing is reported as missing, never guessed.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drdpo.folder import read_manifest

_PLACES = ("save_path", "output_path", "overwrite", "check_only", "resume")
"""Flags that name places or ways of running: they do not shape a result."""

_OWN = ("model", "model_path", "model_fingerprint", "sampled", "save_path")
"""What rightly differs between two runs: the policy, and the file that it sampled."""


@dataclass(frozen=True)
class Step:
    """A manifest's record of one step, flat and as text."""

    made_by: dict[str, str]
    """Flags and fingerprints on which the results depend."""
    facts: dict[str, str]
    """Counts and whatever else was noted."""
    versions: dict[str, str]
    commit: str


@dataclass(frozen=True)
class Provenance:
    """What made one run; a part is None where there is no record of it."""

    sampling: Step | None
    scoring: Step | None
    training: dict[str, str] | None
    """The flags of the training that wrote the policy."""
    mixture: dict[str, float]
    """{objective: weight} that its pairs were mixed by; empty where that is not recorded."""
    notes: list[str]

    @property
    def policy(self) -> str:
        """The model that was sampled, as its flag named it."""
        return _policy(self.sampling) or "not recorded"

    @property
    def method(self) -> str:
        """How the policy was trained, with the method's own flags."""
        return method_line(self.training) if self.training else "no training recorded"

    @property
    def versions(self) -> dict[str, str]:
        """Library versions and commits of sampling and scoring."""
        found: dict[str, str] = {}
        for name, step in (("sampling", self.sampling), ("scoring", self.scoring)):
            if step is not None:
                found |= step.versions | {f"commit of the {name}": step.commit}
        return found


def read_provenance(folder: Path, split: str) -> Provenance:
    """Collect what made `folder/<split>.jsonl`.

    Args:
        folder: scored completions, with manifest.json (step score_<split>) and sampled/manifest.json (step sample_<split>).
        split: "train" or "test".

    Raises:
        DataError: a manifest that is not JSON.
    """
    places = {f"sample_{split}": folder / "sampled", f"score_{split}": folder}
    # "sample test" and "sample_test" are one name.
    manifests = {name: {k.replace(" ", "_"): v for k, v in read_manifest(place).items()} for name, place in places.items()}
    steps = {name: _step(manifest.get(name)) for name, manifest in manifests.items()}
    notes = [f"{places[name] / 'manifest.json'} has no record of {name}" for name, step in steps.items() if step is None]
    sampling, scoring = steps[f"sample_{split}"], steps[f"score_{split}"]
    training = _training_flags(_policy(sampling))
    return Provenance(sampling, scoring, training, _mixture(training), notes)


def method_line(flags: dict[str, str]) -> str:
    """`KLDPO (kldpo_tau=0.05, beta=0.01, seed=42)`, from the flags of a training."""
    names = {"kldpo_tau": "KLDPO", "wdpo_rho": "WDPO", "drdpo_beta": "Dr. DPO"}
    chosen = next((flag for flag in names if flag in flags), None)
    shown = [flag for flag in (chosen, "beta", "seed") if flag in flags]
    name = names[chosen] if chosen else flags.get("method", "DPO")
    return f"{name} ({', '.join(f'{flag}={flags[flag]}' for flag in shown)})"


def differences(provenances: dict[str, Provenance]) -> list[str]:
    """One line per flag or input, other than the policy, in which the runs' sampling or scoring differs.

    Args:
        provenances: {run: what made it}.
    """
    lines = []
    for name in ("sampling", "scoring"):
        records = {run: step.made_by for run, p in provenances.items() if (step := getattr(p, name)) is not None}
        for flag in sorted({flag for made_by in records.values() for flag in made_by} - set(_OWN)):
            values = {run: made_by.get(flag, "not given") for run, made_by in records.items()}
            if len(set(values.values())) > 1:
                lines.append(f"the {name} differs in {flag}: " + ", ".join(f"{run} {v}" for run, v in values.items()))
    return lines


def shown(step: Step | None) -> dict[str, str]:
    """The lines of a step in a report."""
    if step is None:
        return {}
    # `flags` repeats every flag of the wrapper; where a name stands for a path and its fingerprint, both are shown.
    facts = {name: value for name, value in step.facts.items() if not name.startswith("flags.")}
    return facts | {name if name not in facts else f"{name} (fingerprint)": value for name, value in step.made_by.items()}


def _policy(sampling: Step | None) -> str | None:
    if sampling is None:
        return None
    places = (sampling.made_by.get("model_path"), sampling.facts.get("model_path"), sampling.facts.get("flags.model_path"))
    return next((path for path in places if path), None)


def _step(record: Any) -> Step | None:
    if not isinstance(record, dict) or not isinstance(record.get("made_by"), dict):
        return None
    found = record.get("versions")
    versions = {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}
    facts = {name: value for name, value in record.items() if name not in ("made_by", "versions", "commit")}
    return Step(_flat(record["made_by"]), _flat(facts), versions, str(record.get("commit", "unknown")))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif value is not None and name not in _PLACES:
            flat[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _mixture(training: dict[str, str] | None) -> dict[str, float]:
    """The weights in the manifest of the pairs that a training used."""
    if not training or not Path(folder := training["dataset_path"]).is_dir():
        return {}
    record = read_manifest(Path(folder)).get("preferences")
    made_by = record.get("made_by") if isinstance(record, dict) else None
    weights = made_by.get("weights") if isinstance(made_by, dict) else None
    return {str(name): float(weight) for name, weight in weights.items()} if isinstance(weights, dict) else {}


def _training_flags(model_path: str | None) -> dict[str, str] | None:
    """The flags of the training that wrote a checkpoint `<save_path>/global_step_<n>`, else None."""
    if model_path is None or not (path := Path(model_path).parent / "config.json").is_file():
        return None
    try:
        flags = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    # A folder of models may hold another config.json: a training's has these two flags.
    return _flat(flags) if isinstance(flags, dict) and {"dataset_path", "kldpo_tau"} <= set(flags) else None
