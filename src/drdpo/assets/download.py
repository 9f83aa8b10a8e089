"""Setup's second half: make or download every selected model and prompt set that is missing, then print a table."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from drdpo.asset_names import HUB_DATASETS, HUB_MODELS, select_datasets, select_models
from drdpo.assets import embedded, hub
from drdpo.config.data import AssetsConfig
from drdpo.errors import DataError

ROOT = Path(__file__).resolve().parents[3]


class Asset(NamedTuple):
    """A model or prompt set for `folder`."""

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

    Returns:
        One outcome per asset.

    Raises:
        DataError: an asset failed, after all others were done. With `auto`, a gated model without a login and a hub that
            does not answer are not failures.
    """
    chosen = (select_models(config.models), select_datasets(config.datasets))
    names = {name for each in chosen for name in (*each.embedded, *each.hub)}
    optional = {name for each in chosen if each.automatic for name in each.hub}
    answers = cache(hub.hub_answers)  # asked only if something is missing
    outcomes = []
    for name, asset in _assets(root).items():
        if name not in names and not (name == "SmolLM2-135M" and "ArmoRM-SmolLM2" in names):  # its backbone
            continue
        state, note, required = "present", str(asset.folder), name not in optional
        try:
            if not asset.is_made() and name in (*HUB_MODELS, *HUB_DATASETS) and not answers():
                state, note = "failed" if required else "left out", "the hub does not answer"
            elif not asset.is_made():
                print(f"{name}: making {asset.folder}", flush=True)
                asset.make()
                state = "made"
        except hub.NeedsLoginError as error:
            state, note = "needs a login", str(error)
        except DataError as error:
            state, note, required = "failed", str(error), True
        outcomes.append(Outcome(name, state, note, required and state not in ("present", "made")))
    if any(outcome.state == "left out" for outcome in outcomes):
        print("The hub does not answer: using only the embedded models and prompts, which are enough for quickstart.sh.")
    outcomes = [outcome for outcome in outcomes if outcome.state != "left out"]
    width = max((len(outcome.name) for outcome in outcomes), default=0)
    for outcome in outcomes:
        print(f"{outcome.name:<{width}}  {outcome.state:<13}  {outcome.note.removeprefix(f'{root}/')}")
    if failed := [outcome.name for outcome in outcomes if outcome.failed]:
        raise DataError(f"{len(failed)} of {len(outcomes)} models and prompt sets are missing: {', '.join(failed)}")
    return outcomes


def _assets(root: Path) -> dict[str, Asset]:
    """All of them, dependencies first: the reward model's backbone is the policy."""
    models, datasets = root / "models", root / "datasets"
    policy, reward, prompts = models / "SmolLM2-135M", models / "ArmoRM-SmolLM2", datasets / "embedded_prompts"
    assets = [
        Asset(policy, partial(embedded.policy_is_made, policy), partial(embedded.make_policy, policy)),
        Asset(
            reward,
            partial(embedded.reward_model_is_made, reward, policy),
            partial(embedded.make_reward_model, reward, policy),
        ),
        Asset(prompts, partial(embedded.prompts_are_made, prompts), partial(embedded.make_prompts, prompts)),
    ]
    for folder, repo in ((models / name, repo) for name, repo in HUB_MODELS.items()):
        assets.append(Asset(folder, (folder / "config.json").is_file, partial(hub.download_model, repo, folder)))
    for folder, repo in ((datasets / name, repo) for name, repo in HUB_DATASETS.items()):
        assets.append(Asset(folder, (folder / "test.jsonl").is_file, partial(hub.download_helpsteer2, repo, folder)))
    return {asset.folder.name: asset for asset in assets}
