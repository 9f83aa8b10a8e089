"""Setup's second half: every chosen model and prompt set, made or fetched unless it is there; a table at the end."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from drdpo.asset_names import HUB_DATASETS, HUB_MODELS, Selection, select_datasets, select_models
from drdpo.assets import hub
from drdpo.assets.embedded import make_policy, policy_is_made
from drdpo.assets.prompts import make_prompts, prompts_are_made
from drdpo.assets.reward_model import make_reward_model, reward_model_is_made
from drdpo.config import AssetsConfig
from drdpo.errors import DataError

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Asset:
    """Something setup can put into `folder`."""

    name: str
    folder: Path
    is_made: Callable[[], bool]
    make: Callable[[], object]


@dataclass(frozen=True)
class Outcome:
    """A line of the table."""

    name: str
    state: str
    note: str
    failed: bool = False


def download_assets(config: AssetsConfig, root: Path = ROOT) -> list[Outcome]:
    """Put the chosen models into `root`/models and prompts into `root`/datasets, and print a table.

    Args:
        config: --models and --datasets.
        root: the repository.

    Returns:
        One outcome per chosen asset.

    Raises:
        DataError: after everything else was done: an asset failed, or one that was named needs a login or a hub that
            does not answer. With `auto`, a gated model without login and a hub that does not answer are no errors.
    """
    models, datasets = select_models(config.models), select_datasets(config.datasets)
    outcomes = [_attempt(asset, required=True) for asset in embedded_assets((*models.embedded, *datasets.embedded), root)]
    outcomes += _from_hub(models, datasets, root)
    _print_table(outcomes, root)
    if failed := [outcome.name for outcome in outcomes if outcome.failed]:
        raise DataError(f"{len(failed)} of {len(outcomes)} models and prompt sets are not there: {', '.join(failed)}")
    return outcomes


def embedded_assets(names: tuple[str, ...], root: Path) -> list[Asset]:
    """The embedded assets of these names, in the order in which they depend on each other."""
    policy, reward = root / "models" / "SmolLM2-135M", root / "models" / "ArmoRM-SmolLM2"
    prompts = root / "datasets" / "embedded_prompts"
    assets = [
        Asset(policy.name, policy, lambda: policy_is_made(policy), lambda: make_policy(policy)),
        Asset(reward.name, reward, lambda: reward_model_is_made(reward, policy), lambda: make_reward_model(reward, policy)),
        Asset(prompts.name, prompts, lambda: prompts_are_made(prompts), lambda: make_prompts(prompts)),
    ]
    chosen = {*names, *([policy.name] if reward.name in names else [])}  # The reward model's backbone is the policy.
    return [asset for asset in assets if asset.name in chosen]


def hub_assets(models: tuple[str, ...], datasets: tuple[str, ...], root: Path) -> list[Asset]:
    """The hub's assets of these names. One that is there is not compared with the hub's newest revision."""

    def model(name: str) -> Asset:
        folder = root / "models" / name
        return Asset(name, folder, (folder / "config.json").is_file, lambda: hub.download_model(HUB_MODELS[name], folder))

    def dataset(name: str) -> Asset:
        folder = root / "datasets" / name
        repo = HUB_DATASETS[name]
        return Asset(name, folder, (folder / "test.jsonl").is_file, lambda: hub.download_helpsteer2(repo, folder))

    return [*map(model, models), *map(dataset, datasets)]


def _from_hub(models: Selection, datasets: Selection, root: Path) -> list[Outcome]:
    """Fetch the hub's assets; the hub is asked only where one is missing."""
    groups = [(models.automatic, hub_assets(models.hub, (), root)), (datasets.automatic, hub_assets((), datasets.hub, root))]
    missing = [asset for _, assets in groups for asset in assets if not asset.is_made()]
    answers = hub.hub_answers() if missing else True
    if not answers and any(automatic for automatic, assets in groups for asset in assets if asset in missing):
        print("The hub does not answer: only the embedded models and prompts (this is enough for quickstart.sh).")
    outcomes = []
    for automatic, assets in groups:
        for asset in assets:
            if answers or asset not in missing:
                outcomes.append(_attempt(asset, required=not automatic))
            elif not automatic:
                outcomes.append(Outcome(asset.name, "failed", "the hub does not answer", failed=True))
    return outcomes


def _attempt(asset: Asset, required: bool) -> Outcome:
    """Make one asset; its failure is an outcome, so that the others are still made.

    Args:
        asset: what to make.
        required: the user named it, or it needs no login: then a missing login is a failure.
    """
    try:
        if asset.is_made():
            return Outcome(asset.name, "there", str(asset.folder))
        print(f"{asset.name}: making {asset.folder}", flush=True)
        asset.make()
    except hub.NeedsLoginError as error:
        return Outcome(asset.name, "needs a login", str(error), failed=required)
    except DataError as error:
        return Outcome(asset.name, "failed", str(error), failed=True)
    return Outcome(asset.name, "made", str(asset.folder))


def _print_table(outcomes: list[Outcome], root: Path) -> None:
    width = max((len(outcome.name) for outcome in outcomes), default=0)
    for outcome in outcomes:
        print(f"{outcome.name:<{width}}  {outcome.state:<13}  {outcome.note.removeprefix(f'{root}/')}")
