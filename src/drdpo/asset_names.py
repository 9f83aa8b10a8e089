"""Names of the models and prompt sets that setup can fetch. Standard library only: setup.sh runs it before installing."""

import sys
from dataclasses import dataclass
from functools import partial

from drdpo.errors import UsageError, one_line_errors

EMBEDDED_MODELS = ("SmolLM2-135M", "ArmoRM-SmolLM2")
"""Built from a PyPI package and from committed files: no hub, no login."""

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
    """The assets that --models or --datasets selects."""

    embedded: tuple[str, ...]
    hub: tuple[str, ...]
    automatic: bool = False
    """Set by "auto": hub assets are fetched if the hub answers, and a missing login is not an error."""


def _select(flag: str, embedded: tuple[str, ...], hub: dict[str, str], value: str) -> Selection:
    """The assets that `--flag=value` selects; raises UsageError for an unknown name."""
    if value == "auto":
        return Selection(embedded, tuple(hub), automatic=True)
    if value == "none":
        return Selection((), ())
    groups = {"embedded": embedded, "all": (*embedded, *hub)}
    chosen: set[str] = set()
    for name in value.split(","):
        if name not in (*groups, *embedded, *hub):
            raise UsageError(
                f"--{flag}={value}: unknown name {name!r}; choose from {', '.join((*embedded, *hub))}, or pass "
                "embedded, all, auto or none alone"
            )
        chosen.update(groups.get(name, (name,)))
    return Selection(tuple(name for name in embedded if name in chosen), tuple(name for name in hub if name in chosen))


select_models = partial(_select, "models", EMBEDDED_MODELS, HUB_MODELS)
select_datasets = partial(_select, "datasets", EMBEDDED_DATASETS, HUB_DATASETS)

if __name__ == "__main__":
    with one_line_errors():
        select_models(sys.argv[1])
        select_datasets(sys.argv[2])
