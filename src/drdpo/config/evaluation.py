"""Flags of step 4: evaluation, comparisons, inspection of data and runs."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from drdpo.cli import check_bounds, flag, positional, require
from drdpo.objectives import mixtures_of

HF_MAX_LENGTH = 8192
"""Default of the longest context with backend hf. For generation, lm-eval searches for a batch size with the full context
(Llama 3.x: 131,072 tokens), which fits no GPU, and would end at 1."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Step 4a: scores of one or more runs by objective, gains over the first, spider plot."""

    runs: list[str] = flag(
        "NAME=FOLDER arguments, folders of scored completions; the first is the base; repeat a name with other folders to "
        "pool training seeds"
    )
    output_path: str = flag(
        "folder for report.md, report.html, CSV files and, from three objectives on, spider.png and spider.svg"
    )
    objectives: list[str] = flag(
        "objectives to report, in either spelling (default: all that the runs share); win rates need ArmoRM among them", []
    )
    split: Literal["test", "train"] = flag("split to evaluate", "test")
    bootstrap: int = flag("bootstrap samples for confidence intervals", 2000, at_least=100)
    seed: int = flag("seed of the bootstrap", 42, at_least=0)

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class EvaluatePolicyConfig:
    """Step 4a without sampling: expected scores of policies on scored completions of the starting model."""

    candidates: str = flag("folder of scored completions of --reference, two or more a prompt")
    policies: list[str] = flag(
        "NAME=FOLDER arguments, checkpoints to evaluate; the others are also compared with the first; repeat a name with "
        "other folders to pool training seeds"
    )
    reference: str = flag("the starting model, which drew the completions: a Hugging Face folder or hub id")
    output_path: str = flag("folder for value.json, report.md, report.html, value.png and value.svg, and log-probs")
    mixtures: list[str] = flag(
        "also evaluate mixtures of the objectives' z-scores: NAME=OBJECTIVE:WEIGHT,... arguments, weights that sum to 1", []
    )
    split: Literal["test", "train"] = flag("split to evaluate", "test")
    max_prompts: int | None = flag("evaluate the first N prompts only", None, at_least=1)
    min_ess: float = flag("flag prompts whose effective sample is smaller", 2.0, at_least=1)
    micro_batch_tokens: int = flag("tokens of a packed row", 4096, at_least=1)
    dtype: Literal["auto", "bfloat16", "float32"] = flag(
        "precision of the forward passes; bfloat16 is faster, and its rounding is noise in every log-ratio", "float32"
    )
    chat_template_kwargs: dict[str, Any] | None = flag(
        "JSON object of arguments for the chat template; those that sampled the completions", None
    )
    bootstrap: int = flag("bootstrap samples for confidence intervals", 2000, at_least=100)
    seed: int = flag("seed of the bootstrap", 42, at_least=0)

    @property
    def weights(self) -> dict[str, dict[str, float]]:
        """{name: {objective: weight}} of --mixtures."""
        return mixtures_of("--mixtures", self.mixtures)

    def __post_init__(self) -> None:
        check_bounds(self)
        mixtures_of("--mixtures", self.mixtures)


@dataclass(frozen=True)
class LeaderboardConfig:
    """Step 4b: Open LLM Leaderboard v2 with lm-eval."""

    model_path: str = flag("model to evaluate: a Hugging Face folder or hub id")
    output_path: str | None = flag("folder for results (default outputs/openllm/<model name>)", None)
    tasks: str = flag("comma-separated lm-eval tasks or groups", "leaderboard")
    limit: float | None = flag("number of samples per task (below 1: a share), for a trial", None, above=0)
    include_path: str | None = flag("folder of additional task YAML files", None)
    backend: Literal["hf", "vllm"] = flag("lm-eval backend", "hf")
    batch_size: str = flag("batch size, or 'auto': what fits a GPU, 1 on a CPU", "auto")
    dtype: Literal["auto", "bfloat16", "float32"] = flag(
        "precision of the model; 'auto' is bfloat16 on GPUs and on CPUs with fast bfloat16 products (AVX512_BF16, AMX), "
        "otherwise float32",
        "auto",
    )
    max_length: int | None = flag(
        f"context length; the authors used 2048 (default: the model's own, with backend hf at most {HF_MAX_LENGTH})",
        None,
        at_least=1,
    )
    max_gen_toks: int | None = flag("longest generation; the authors used 1024", None, at_least=1)
    num_fewshot: int | None = flag(
        "few-shot examples, for tasks that have any (default: each task's own number)", None, at_least=0
    )
    apply_chat_template: bool = flag("render prompts with the model's chat template", True)
    chat_template_kwargs: dict[str, Any] | None = flag(
        "JSON object of arguments for the chat template, e.g. '{\"enable_thinking\": false}' for Qwen3 without "
        "thinking; those of training",
        None,
    )
    fewshot_as_multiturn: bool = flag("format few-shot examples as turns of a conversation", True)
    tensor_parallel_size: int = flag(
        "tensor-parallel size per vLLM engine (backend vllm); the other GPUs run more engines", 1, at_least=1
    )
    seed: int = flag("seed of the few-shot sampling", 42, at_least=0)
    overwrite: bool = flag("replace results from other flags or another model", False, once=True)
    check_only: bool = flag("check flags and inputs, then exit", False, once=True)

    def __post_init__(self) -> None:
        check_bounds(self)
        require(
            self.limit is None or self.limit < 1 or self.limit == int(self.limit),
            f"--limit={self.limit}: pass a whole number of samples, or a share below 1",
        )
        known = self.batch_size == "auto" or re.fullmatch("0*[1-9][0-9]{0,8}", self.batch_size)
        require(bool(known), f"--batch_size={self.batch_size}: pass a positive number or auto")
        require(
            self.tensor_parallel_size == 1 or self.backend == "vllm",
            f"--tensor_parallel_size={self.tensor_parallel_size} requires --backend=vllm; hf loads a whole model per GPU",
        )
        if not self.apply_chat_template:
            require(not self.chat_template_kwargs, "--chat_template_kwargs requires --apply_chat_template")
            turns = "--fewshot_as_multiturn requires --apply_chat_template; also pass --fewshot_as_multiturn=false"
            require(not self.fewshot_as_multiturn, turns)


@dataclass(frozen=True)
class CompareOpenllmConfig:
    """Compare leaderboard results of several models with each other and with the published ones."""

    runs: list[str] = flag(
        "NAME=FOLDER arguments, output folders of openllm_eval.slurm; GROUP/NAME=FOLDER tabulates each group separately, "
        "1B, 3B and 8B with the published numbers, e.g. 1B/base=outputs/openllm/base"
    )
    output_path: str = flag("folder for report.md, report.html and leaderboard.csv")


@dataclass(frozen=True)
class CompareMixturesConfig:
    """Compare the gains of several training mixtures with the published ones."""

    reports: list[str] = flag(
        "NAME=FOLDER arguments, output folders of evaluate_armorm.py, one per training mixture; with the published numbers "
        "if it is named like the authors', e.g. helpfulness_coherence"
    )
    output_path: str = flag("folder for report.md, report.html, spiders.png and spiders.svg")


@dataclass(frozen=True)
class CheckModelConfig:
    """What a model is, and what each step says of it."""

    path: str = positional("model folder, or hub id, of which config.json alone is read")


@dataclass(frozen=True)
class InspectConfig:
    """Tables and samples of the data of any step."""

    path: str = positional("folder or JSON-lines file of prompts, completions, preference pairs or rejected rows")
    samples: int = flag("rows to print per file", 3, at_least=0)
    seed: int = flag("seed for choosing these rows", 42, at_least=0, below=2**32)

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class ShowRunConfig:
    """State, progress and training curves of a run."""

    path: str = positional("folder of a training run, or the output folder of any other step")
    picture: bool = flag("draw the training curves as training.png in the folder", True)
