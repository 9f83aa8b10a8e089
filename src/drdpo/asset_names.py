"""Names of the models and prompt sets that setup can fetch. Standard library only: setup.sh runs it before installing."""

import sys
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


def _select(flag: str, embedded: tuple[str, ...], hub: dict[str, str], value: str) -> dict[str, bool]:
    """{asset that `--flag=value` selects: is it an error if it cannot be had?}; with "auto" those of the hub may be missing.
    Raises UsageError for an unknown name."""
    if value == "auto":
        return {name: name in embedded for name in (*embedded, *hub)}
    if value == "none":
        return {}
    groups = {"embedded": embedded, "all": (*embedded, *hub)}
    chosen: dict[str, bool] = {}
    for name in value.split(","):
        if name not in (*groups, *embedded, *hub):
            raise UsageError(
                f"--{flag}={value}: unknown name {name!r}; choose from {', '.join((*embedded, *hub))}, embedded and all, or "
                "pass auto or none alone"
            )
        chosen |= dict.fromkeys(groups.get(name, (name,)), True)
    return chosen


select_models = partial(_select, "models", EMBEDDED_MODELS, HUB_MODELS)
select_datasets = partial(_select, "datasets", EMBEDDED_DATASETS, HUB_DATASETS)

if __name__ == "__main__":
    with one_line_errors():
        select_models(sys.argv[1])
        select_datasets(sys.argv[2])
