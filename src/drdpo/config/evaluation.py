"""Flags of src/evaluate_armorm.py and openllm_eval.slurm."""

from dataclasses import dataclass
from typing import Literal

from drdpo.flags import flag, require


@dataclass(frozen=True)
class EvaluateConfig:
    """Step 4a: per-objective averages of one or more runs, and the spider plot."""

    runs: list[str] = flag("NAME=FOLDER words, folders of scored completions; the first is the base")
    output_path: str = flag("folder for scores.csv, report.md, spider.png and spider.svg")
    objectives: list[str] = flag("objectives to draw, in either spelling (default: all that every run has)", [])
    split: Literal["test", "train"] = flag("split to average", "test")
    bootstrap: int = flag("paired bootstrap samples of the confidence interval", 2000)
    seed: int = flag("seed of the bootstrap", 42)


@dataclass(frozen=True)
class LeaderboardConfig:
    """Step 4b: Open LLM Leaderboard v2 through lm-eval."""

    model_path: str = flag("model to evaluate: a Hugging Face folder or hub id")
    output_path: str | None = flag("folder for results (default outputs/openllm/<model name>)", None)
    tasks: str = flag("comma-separated lm-eval tasks or groups", "leaderboard")
    limit: float | None = flag("only so many samples per task (below 1: a share), for a trial", None)
    include_path: str | None = flag("folder of further task yaml files", None)
    backend: Literal["hf", "vllm"] = flag("lm-eval back end", "hf")
    batch_size: str = flag("lm-eval batch size", "auto")
    dtype: Literal["bfloat16", "float32"] = flag("precision of the model", "bfloat16")
    max_length: int | None = flag("context length; the authors used 2048", None)
    max_gen_toks: int | None = flag("longest generation; the authors used 1024", None)
    num_fewshot: int | None = flag("few-shot examples, in place of each task's own number", None)
    apply_chat_template: bool = flag("render prompts with the model's chat template", True)
    fewshot_as_multiturn: bool = flag("few-shot examples as turns of a conversation", True)
    tensor_parallel_size: int = flag("GPUs that one vLLM engine spans (backend vllm)", 1)
    seed: int = flag("seed of the few-shot sampling", 42)
    check_only: bool = flag("check the flags and the inputs, then stop", False)

    def __post_init__(self) -> None:
        require(self.limit is None or self.limit > 0, f"--limit={self.limit} must be positive")
        require(
            self.apply_chat_template or not self.fewshot_as_multiturn,
            "--fewshot_as_multiturn needs --apply_chat_template; give --fewshot_as_multiturn=false as well",
        )
