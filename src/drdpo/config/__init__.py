"""One frozen dataclass per step IS the command line of that step. A step loads its own only."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drdpo.config.data import AssetsConfig as AssetsConfig
    from drdpo.config.data import CompletionsConfig as CompletionsConfig
    from drdpo.config.data import PreferencesConfig as PreferencesConfig
    from drdpo.config.evaluation import CheckModelConfig as CheckModelConfig
    from drdpo.config.evaluation import CompareMixturesConfig as CompareMixturesConfig
    from drdpo.config.evaluation import CompareOpenllmConfig as CompareOpenllmConfig
    from drdpo.config.evaluation import EvaluateConfig as EvaluateConfig
    from drdpo.config.evaluation import EvaluatePolicyConfig as EvaluatePolicyConfig
    from drdpo.config.evaluation import InspectConfig as InspectConfig
    from drdpo.config.evaluation import LeaderboardConfig as LeaderboardConfig
    from drdpo.config.evaluation import ShowRunConfig as ShowRunConfig
    from drdpo.config.training import TrainConfig as TrainConfig

_FILES = {
    "AssetsConfig": "data",
    "CheckModelConfig": "evaluation",
    "CompareMixturesConfig": "evaluation",
    "CompareOpenllmConfig": "evaluation",
    "CompletionsConfig": "data",
    "EvaluateConfig": "evaluation",
    "EvaluatePolicyConfig": "evaluation",
    "InspectConfig": "evaluation",
    "LeaderboardConfig": "evaluation",
    "PreferencesConfig": "data",
    "ShowRunConfig": "evaluation",
    "TrainConfig": "training",
}
__all__ = list(_FILES)


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
