"""lm-eval's tasks: do they exist, and can their data be loaded? Answered before a model is loaded."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drdpo.errors import DataError, UsageError
from drdpo.progress import progress

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def split_tasks(words: str) -> list[str]:
    """`a, b` -> [a, b].

    Raises:
        UsageError: no name, or one given twice.
    """
    names = [name for word in words.split(",") if (name := word.strip())]
    if not names:
        raise UsageError("--tasks is empty; give e.g. --tasks=leaderboard")
    if len(set(names)) < len(names):
        raise UsageError(f"--tasks={words} names a task twice")
    return names


def find_tasks(names: list[str], include_path: str | None, model_args: Mapping[str, Any]) -> "tuple[TaskManager, list[str]]":
    """Look the tasks up in lm-eval's index.

    The index of all of lm-eval's fourteen thousand tasks takes ten seconds to build, so the leaderboard's own and those of
    --include_path are tried first.

    Args:
        names: tasks, groups or tags.
        include_path: a folder of further task files, or None.
        model_args: what lm-eval passes on to tasks that ask for the model.

    Returns:
        The index, and the single tasks that the names stand for (a group that spells members out stands for itself).

    Raises:
        UsageError: include_path is no folder, or a name is no task.
    """
    import lm_eval.tasks

    if include_path is not None and not Path(include_path).is_dir():
        raise UsageError(f"--include_path={include_path}: no such folder")
    further = [include_path] if include_path else []
    leaderboard = str(Path(lm_eval.tasks.__file__).parent / "leaderboard")
    metadata = dict(model_args)
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[leaderboard, *further], metadata=metadata)
    leaves, missing = _leaves(manager, names)
    if missing:
        manager = lm_eval.tasks.TaskManager(include_path=further or None, metadata=metadata)
        leaves, missing = _leaves(manager, names)
    if missing:
        near = difflib.get_close_matches(missing[0], manager.all_tasks, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        where = f" or in --include_path={include_path}" if include_path else "; --include_path adds a folder of task files"
        raise UsageError(f"--tasks: lm-eval has no task {', '.join(missing)}{where}{hint}")
    return manager, leaves


def _leaves(manager: "TaskManager", names: list[str]) -> tuple[list[str], list[str]]:
    """The single tasks behind the names, and the names that the index lacks."""
    leaves: list[str] = []
    missing: list[str] = []
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop(0)
        if name in seen:
            continue
        seen.add(name)
        entry = manager.task_index.get(name)
        if entry is None:
            missing.append(name)
            continue
        if members := _members(entry):
            waiting = [*members, *waiting]
        else:
            leaves.append(name)
    return leaves, missing


def _members(entry: Any) -> list[str]:
    """What a group or tag consists of; empty for a task, and for a group that spells a member out in its own file."""
    if entry.yaml_path is None:
        return sorted(entry.tags)
    listed = (entry.cfg or {}).get("task")
    if not isinstance(listed, list) or any(isinstance(item, dict) and "dataset_path" in item for item in listed):
        return []
    names = [item if isinstance(item, str) else item.get("group") or item.get("task") for item in listed]
    return [name for name in names if isinstance(name, str)]


def check_data(manager: "TaskManager", leaves: list[str]) -> None:
    """Load every task's data once, so that a missing data set ends the run before a model is loaded.

    Args:
        manager, leaves: from find_tasks.

    Raises:
        DataError: naming the task whose data or helper could not be loaded, and what to do.
    """
    for leaf in leaves:
        if "ifeval" in leaf:
            _check_punkt(leaf)
    for leaf in progress(leaves, desc="loading the tasks' data", unit="task", disable=len(leaves) < 2):
        try:
            manager.load([leaf])
        except Exception as cause:  # whatever the harness or the task's own code raises
            raise DataError(_no_data(leaf, cause)) from cause


_UNREACHABLE = ("DatasetNotFoundError", "ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError")


def _no_data(leaf: str, cause: Exception) -> str:
    text = _one_line(cause)
    if "gated" in text.lower() or "401" in text or "403" in text:
        advice = "its data set is gated: accept its terms on the hub's page, then log in (hf auth login)"
    elif type(cause).__name__ in _UNREACHABLE:
        advice = (
            "its data set is neither reachable nor in the cache: load it once on a machine with network (HF_HOME is where "
            "the cache lies) and unset HF_HUB_OFFLINE, or give other --tasks"
        )
    else:
        advice = "look at its task file and data files, or give other --tasks"
    return f"task {leaf} could not be loaded ({text}); {advice}"


def _check_punkt(leaf: str) -> None:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        if not nltk.download("punkt_tab", quiet=True):
            raise DataError(
                f"task {leaf} needs NLTK's punkt_tab, which is neither installed nor downloadable here; run on a machine "
                "with network: python -m nltk.downloader punkt_tab, and let NLTK_DATA name the folder it was put in"
            ) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
