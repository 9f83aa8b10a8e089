"""Names of the models and prompt sets that setup can fetch. Standard library only: setup.sh asks before it installs."""

import sys
from dataclasses import dataclass

from drdpo.errors import UsageError, one_line_errors

EMBEDDED_MODELS = ("SmolLM2-135M", "ArmoRM-SmolLM2")
"""Made from packages of the package index and from committed files: no hub, no login."""

HUB_MODELS: dict[str, str] = {
    "Llama1b": "meta-llama/Llama-3.2-1B-Instruct",
    "Llama3b": "meta-llama/Llama-3.2-3B-Instruct",
    "Llama8b": "meta-llama/Llama-3.1-8B-Instruct",
    "ArmoRM": "RLHFlow/ArmoRM-Llama3-8B-v0.1",
}
"""Folder under models/ -> hub id."""

EMBEDDED_DATASETS = ("embedded_prompts",)
HUB_DATASETS: dict[str, str] = {"helpsteer2_prompts": "nvidia/HelpSteer2"}
"""Folder under datasets/ -> hub id."""


@dataclass(frozen=True)
class Selection:
    """What --models or --datasets chooses."""

    embedded: tuple[str, ...]
    hub: tuple[str, ...]
    automatic: bool = False
    """The user named nothing: hub assets are fetched where the hub answers, and a missing login is no error."""


def select_models(value: str) -> Selection:
    """What `--models=value` chooses; raises UsageError for an unknown name."""
    return _select("models", value, EMBEDDED_MODELS, HUB_MODELS)


def select_datasets(value: str) -> Selection:
    """What `--datasets=value` chooses; raises UsageError for an unknown name."""
    return _select("datasets", value, EMBEDDED_DATASETS, HUB_DATASETS)


def _select(flag: str, value: str, embedded: tuple[str, ...], hub: dict[str, str]) -> Selection:
    if value == "auto":
        return Selection(embedded, tuple(hub), automatic=True)
    if value == "none":
        return Selection((), ())
    groups = {"embedded": embedded, "all": (*embedded, *hub)}
    chosen: set[str] = set()
    for word in value.split(","):
        if word not in (*groups, *embedded, *hub):
            raise UsageError(
                f"--{flag}={value}: {word!r} is not known; name some of {', '.join((*embedded, *hub))}, or give "
                "embedded, all, auto or none alone"
            )
        chosen.update(groups.get(word, (word,)))
    return Selection(tuple(name for name in embedded if name in chosen), tuple(name for name in hub if name in chosen))


if __name__ == "__main__":
    with one_line_errors():
        select_models(sys.argv[1])
        select_datasets(sys.argv[2])
