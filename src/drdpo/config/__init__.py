"""One frozen dataclass per step IS the command line of that step."""

from drdpo.config.assets import AssetsConfig
from drdpo.config.comparison import CompareMixturesConfig, CompareOpenllmConfig
from drdpo.config.completions import CompletionsConfig
from drdpo.config.evaluation import EvaluateConfig, LeaderboardConfig
from drdpo.config.inspection import InspectConfig, ShowRunConfig
from drdpo.config.preferences import PreferencesConfig
from drdpo.config.training import TrainConfig

__all__ = [
    "AssetsConfig",
    "CompareMixturesConfig",
    "CompareOpenllmConfig",
    "CompletionsConfig",
    "EvaluateConfig",
    "InspectConfig",
    "LeaderboardConfig",
    "PreferencesConfig",
    "ShowRunConfig",
    "TrainConfig",
]
