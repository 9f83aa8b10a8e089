"""Flags of src/download_assets.py, which setup.sh passes on."""

from dataclasses import dataclass

from drdpo.asset_names import EMBEDDED_DATASETS, EMBEDDED_MODELS, HUB_DATASETS, HUB_MODELS, select_datasets, select_models
from drdpo.cli import flag

_GROUPS = "or embedded (no hub, no login), all, none; auto is all where the hub answers, else embedded"


@dataclass(frozen=True)
class AssetsConfig:
    """Step 0: models and prompts."""

    models: str = flag(f"comma-separated, of {', '.join((*EMBEDDED_MODELS, *HUB_MODELS))}; {_GROUPS}", "auto")
    datasets: str = flag(f"comma-separated, of {', '.join((*EMBEDDED_DATASETS, *HUB_DATASETS))}; {_GROUPS}", "auto")

    def __post_init__(self) -> None:
        select_models(self.models)
        select_datasets(self.datasets)
