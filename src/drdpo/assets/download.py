"""Setup's second half: make or download every selected model and prompt set that is missing, then print a table."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from drdpo.asset_names import HUB_DATASETS, HUB_MODELS, Selection, select_datasets, select_models
from drdpo.assets import embedded, hub
from drdpo.config.data import AssetsConfig
from drdpo.errors import DataError

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Asset:
    """A model or prompt set for `folder`."""

    name: str
    folder: Path
    is_made: Callable[[], bool]
    make: Callable[[], object]


@dataclass(frozen=True)
class Outcome:
    """A row of the table."""

    name: str
    state: str
    note: str
    failed: bool = False


def download_assets(config: AssetsConfig, root: Path = ROOT) -> list[Outcome]:
    """Put the selected models into `root`/models and prompts into `root`/datasets, and print a table.

    Args:
        config: --models and --datasets.
        root: the repository.

    Returns:
        One outcome per asset.

    Raises:
        DataError: an asset failed, after all others were done. With `auto`, a gated model without a login and a hub that
            does not answer are not failures.
    """
    models, datasets = select_models(config.models), select_datasets(config.datasets)
    outcomes = [_attempt(asset, required=True) for asset in _embedded((*models.embedded, *datasets.embedded), root)]
    outcomes += _from_hub(models, datasets, root)
    width = max((len(outcome.name) for outcome in outcomes), default=0)
    for outcome in outcomes:
        print(f"{outcome.name:<{width}}  {outcome.state:<13}  {outcome.note.removeprefix(f'{root}/')}")
    if failed := [outcome.name for outcome in outcomes if outcome.failed]:
        raise DataError(f"{len(failed)} of {len(outcomes)} models and prompt sets are missing: {', '.join(failed)}")
    return outcomes


def _embedded(names: tuple[str, ...], root: Path) -> list[Asset]:
    """The embedded assets of these names, dependencies first: the reward model's backbone is the policy."""
    policy, reward = root / "models" / "SmolLM2-135M", root / "models" / "ArmoRM-SmolLM2"
    prompts = root / "datasets" / "embedded_prompts"
    makers: dict[Path, tuple[Callable[[], bool], Callable[[], object]]] = {
        policy: (lambda: embedded.policy_is_made(policy), lambda: embedded.make_policy(policy)),
        reward: (
            lambda: embedded.reward_model_is_made(reward, policy), lambda: embedded.make_reward_model(reward, policy),
        ),
        prompts: (lambda: embedded.prompts_are_made(prompts), lambda: embedded.make_prompts(prompts)),
    }  # fmt: skip
    chosen = {*names, *([policy.name] if reward.name in names else [])}
    return [Asset(folder.name, folder, *maker) for folder, maker in makers.items() if folder.name in chosen]


def _hub_model(name: str, root: Path) -> Asset:
    folder = root / "models" / name
    return Asset(name, folder, (folder / "config.json").is_file, lambda: hub.download_model(HUB_MODELS[name], folder))


def _hub_dataset(name: str, root: Path) -> Asset:
    folder = root / "datasets" / name
    return Asset(name, folder, (folder / "test.jsonl").is_file, lambda: hub.download_helpsteer2(HUB_DATASETS[name], folder))


def _from_hub(models: Selection, datasets: Selection, root: Path) -> list[Outcome]:
    """Download the hub's assets, at any revision; the hub is only asked if one is missing."""
    assets = [(_hub_model(name, root), not models.automatic) for name in models.hub]
    assets += [(_hub_dataset(name, root), not datasets.automatic) for name in datasets.hub]
    missing = [(asset, required) for asset, required in assets if not asset.is_made()]
    if not missing or hub.hub_answers():
        return [_attempt(asset, required) for asset, required in assets]
    if not all(required for _, required in missing):
        print("The hub does not answer: using only the embedded models and prompts, which are enough for quickstart.sh.")
    outcomes = [_attempt(*each) for each in assets if each not in missing]
    return outcomes + [
        Outcome(asset.name, "failed", "the hub does not answer", failed=True) for asset, required in missing if required
    ]


def _attempt(asset: Asset, required: bool) -> Outcome:
    """Make one asset if it is missing. A failure is returned, so that the others are still made.

    Args:
        asset: what to make.
        required: whether a missing login is a failure.
    """
    try:
        if asset.is_made():
            return Outcome(asset.name, "present", str(asset.folder))
        print(f"{asset.name}: making {asset.folder}", flush=True)
        asset.make()
    except hub.NeedsLoginError as error:
        return Outcome(asset.name, "needs a login", str(error), failed=required)
    except DataError as error:
        return Outcome(asset.name, "failed", str(error), failed=True)
    return Outcome(asset.name, "made", str(asset.folder))
