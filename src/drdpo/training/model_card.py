"""A checkpoint's model card, README.md, and the upload of a finished run's last checkpoint to the Hugging Face hub."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from drdpo.errors import one_line
from drdpo.folder import git_commit, read_manifest, section, versions
from drdpo.training.run import Run

_PAPER = "2502.01930"
_WHOLE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder or repository", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("this folder or repository")
```"""
_ADAPTER = """```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("this folder or repository")  # adapters, on top of the base model
```"""
_METRICS = ("loss", "accuracy", "margin", "eval_loss", "eval_accuracy", "eval_margin")


def model_card(run: Run, step: int, metrics: dict[str, float]) -> str:
    """The card of a checkpoint, whose step has these metrics."""
    from huggingface_hub import ModelCardData

    config, (base, license) = run.config, _base(run.config.model_path)
    data = None if Path(config.dataset_path).exists() else [config.dataset_path]
    adapter = config.lora is not None and not config.lora.merge
    card_data = ModelCardData(
        base_model=base, license=license, datasets=data, pipeline_tag="text-generation",
        library_name="peft" if adapter else "transformers", tags=["drdpo", "preference-optimization", f"arxiv:{_PAPER}"],
    )  # fmt: skip
    seen = {f"{split} pairs": f"{run.counts[split]['out']:,} of {run.counts[split]['in']:,}" for split in ("train", "test")}
    rows: dict[str, Any] = {
        "method": run.method.label, "pairs from": config.dataset_path, **seen, "beta": config.beta,
        "learning rate": config.learning_rate, "pairs per step": config.train_batch_size,
        "epochs": f"{metrics['epoch']:.2f}", "seed": config.seed, "precision": config.dtype,
        **{name.replace("_", " "): f"{metrics[name]:.4g}" for name in _METRICS if name in metrics},
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()), "commit of drdpo": git_commit(),
    }  # fmt: skip
    shown = {name: one_line(str(value), 300).replace("|", "\\|") for name, value in rows.items()}
    return f"""---
{card_data.to_yaml()}
---

# {run.folder.resolve().name}

{base or config.model_path}, aligned by **{run.method.label}** with [drdpo](https://arxiv.org/abs/{_PAPER}), \
step {step} of {run.steps}.

{_ADAPTER if adapter else _WHOLE}

| | |
|---|---|
""" + "".join(f"| {name} | {value} |\n" for name, value in shown.items())


def _base(model_path: str) -> tuple[str | None, str | None]:
    """Base model and licence of the policy: those of its own card, or the hub repository it was downloaded from."""
    import yaml
    from huggingface_hub import ModelCard

    folder = Path(model_path)
    if not folder.is_dir():
        return model_path, None
    found: dict[str, Any] = {}
    with suppress(OSError, ValueError, yaml.YAMLError):
        if (folder / "README.md").is_file():
            found = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict()
    repository = section(read_manifest(folder), "assets", "made_by").get("repository")
    base = repository or found.get("base_model")
    return base if isinstance(base, str) else None, found.get("license")


def push_to_hub(repository: str, folder: Path) -> None:
    """Upload a checkpoint to a private repository (owner/name), made if it is missing; a failure is a warning, as the run is
    complete."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"drdpo: {folder.name}")
        print(f"uploaded {folder} to {done.commit_url}", flush=True)
    except Exception as error:  # network, login, quota: of several libraries' kinds
        why = one_line(str(error), 300)
        print(
            f"warning: --push_to_hub={repository} failed ({why}); rerun the same command to upload {folder}", file=sys.stderr
        )
