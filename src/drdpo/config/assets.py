"""Flags of setup.sh."""

from dataclasses import dataclass

from drdpo.flags import flag


@dataclass(frozen=True)
class AssetsConfig:
    """Step 0: models and prompts."""

    models: str = flag(
        "comma-separated model names, 'embedded' (no login, no hub) or 'all'; 'auto' is all where the hub answers", "auto"
    )
    datasets: str = flag("comma-separated prompt sets, 'embedded' or 'all'; 'auto' is all where the hub answers", "auto")
