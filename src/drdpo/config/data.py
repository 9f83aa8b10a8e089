"""Flags of steps 0 to 2: assets, completions, preferences."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from drdpo.asset_names import EMBEDDED_DATASETS, EMBEDDED_MODELS, HUB_DATASETS, HUB_MODELS, select_datasets, select_models
from drdpo.cli import check_bounds, flag, require
from drdpo.objectives import FLAG_TO_OBJECTIVE


@dataclass(frozen=True)
class CompletionsConfig:
    """Steps 1 and 4a: sample completions and score them."""

    save_path: str = flag("folder for the scored train.jsonl and test.jsonl; unscored samples go to its sampled/")
    model_path: str = flag("policy: a Hugging Face folder or hub id")
    best_of_n: int = flag("completions per prompt", 2, at_least=1)
    temperature: float = flag("sampling temperature; 0 is greedy", 0.7, at_least=0)
    only_test: bool = flag("sample and score the test prompts only", False)
    dataset: str = flag(
        "folder of prompts; 'auto' is datasets/helpsteer2_prompts if present, else datasets/embedded_prompts", "auto"
    )
    top_p: float = flag("nucleus sampling", 1.0, above=0, at_most=1)
    max_new_tokens: int = flag("maximum completion length in tokens", 1024, at_least=1)
    prompt_max_len: int = flag("maximum prompt length in tokens; longer prompts go to rejects.jsonl", 1024, at_least=1)
    max_prompts: int | None = flag("use only the first N prompts of each split", None, at_least=1)
    seed: int = flag("sampling seed; every sample of every prompt has its own random stream", 42)
    chat_template_kwargs: dict[str, Any] | None = flag(
        "JSON object of arguments for the policy's chat template, e.g. '{\"enable_thinking\": false}' for Qwen3 without "
        "thinking; pass the same to training and evaluation",
        None,
    )
    engine: Literal["auto", "vllm", "transformers"] = flag(
        "'auto' is vllm if it works, but transformers on a CPU for completions of at most 64 tokens", "auto"
    )
    tensor_parallel_size: int = flag("GPUs per vLLM engine; with more GPUs, several engines run in parallel", 1, at_least=1)
    gpu_memory_utilization: float = flag("share of GPU memory for vLLM", 0.9, above=0, at_most=1)
    dtype: Literal["auto", "bfloat16", "float32"] = flag(
        "precision of policy and reward backbone (reward heads are always float32); 'auto' is bfloat16 on GPUs and on CPUs "
        "with fast bfloat16 (AVX512_BF16, AMX), else float32",
        "auto",
    )
    reward_model: str = flag(
        "folder of a reward model in ArmoRM's layout; 'auto' is models/ArmoRM if present, else models/ArmoRM-SmolLM2", "auto"
    )
    score_max_len: int = flag(
        "maximum length of prompt and completion in tokens; longer ones go to rejects.jsonl", 4096, at_least=1
    )
    score_batch_tokens: int = flag(
        "tokens per scoring batch, which limits its memory; a prompt counts once for all its completions", 8192, at_least=1
    )
    overwrite: bool = flag("replace results from other flags, models or inputs", False, once=True)
    check_only: bool = flag("check flags and inputs, then stop", False, once=True)

    def __post_init__(self) -> None:
        check_bounds(self)
        tokens, longest = self.score_batch_tokens, self.score_max_len
        require(
            tokens >= longest,
            f"--score_batch_tokens={tokens} is less than --score_max_len={longest}, so the longest conversation would not "
            "fit in a batch; increase --score_batch_tokens or decrease --score_max_len",
        )


def _weight() -> float:
    return flag("weight of this objective", 0.0)


@dataclass(frozen=True)
class PreferencesConfig:
    """Step 2: mix objectives into preference pairs."""

    completions: str = flag("folder of scored completions", "datasets/helpsteer2_completions")
    output_path: str = flag("folder for train.jsonl and test.jsonl of pairs", "datasets/helpsteer2_preferences")
    selection: Literal["top_bottom", "top_random", "all_pairs"] = flag(
        "pairs per prompt: top_bottom pairs the best with the worst completion, top_random the best with a random lower one "
        "that passes the filters, all_pairs every two",
        "top_bottom",
    )
    min_margin: float = flag(
        "smallest margin of a pair, in units of the mixed score (z-scores if --standardize=true); a margin of 0 is always "
        "dropped",
        0.0,
        at_least=0,
    )
    max_pairs_per_prompt: int | None = flag(
        "for all_pairs: number of pairs to keep per prompt, largest margins first", None, at_least=1
    )
    seed: int = flag("seed of top_random; a prompt's draw depends only on the seed, the split and prompt_id", 42)
    standardize: bool = flag("z-score every objective before mixing", True)
    standardize_by: Literal["split", "train"] = flag(
        "split whose mean and standard deviation are used: each split's own, or train's for both, so that equal completions "
        "score the same in train and test",
        "split",
    )
    dry_run: bool = flag("print the report without writing files", False, once=True)
    overwrite: bool = flag("replace pairs from other flags or inputs", False, once=True)
    helpsteer_helpfulness: float = _weight()
    helpsteer_correctness: float = _weight()
    helpsteer_coherence: float = _weight()
    helpsteer_complexity: float = _weight()
    helpsteer_verbosity: float = _weight()
    ultrafeedback_overall_score: float = _weight()
    ultrafeedback_instruction_following: float = _weight()
    ultrafeedback_truthfulness: float = _weight()
    ultrafeedback_honesty: float = _weight()
    ultrafeedback_helpfulness: float = _weight()
    beavertails_is_safe: float = _weight()
    prometheus_score: float = _weight()
    argilla_overall_quality: float = _weight()
    argilla_judge_lm: float = _weight()
    code_complexity: float = _weight()
    code_style: float = _weight()
    code_explanation: float = _weight()
    code_instruction_following: float = _weight()
    code_readability: float = _weight()
    ArmoRM: float = flag("weight of the gated stage-2 score", 0.0)
    weights: list[str] = flag("NAME=WEIGHT arguments for objectives of another reward model", [])

    def objective_weights(self) -> dict[str, float]:
        """{objective: weight} of the objectives with a weight over 0; weights sum to 1 within 1e-6."""
        named = {objective: getattr(self, name) for name, objective in FLAG_TO_OBJECTIVE.items()}
        spelled = {objective: f"--{name}={named[objective]:g}" for name, objective in FLAG_TO_OBJECTIVE.items()}
        for word in self.weights:
            name, separator, number = word.partition("=")
            require(bool(separator and name), f"--weights {word}: write NAME=WEIGHT")
            require(name not in FLAG_TO_OBJECTIVE and not named.get(name), f"--weights {word}: {name} has two weights")
            try:
                named[name], spelled[name] = float(number), f"--weights {word}"
            except ValueError:
                require(False, f"--weights {word}: {number!r} is not a number")
        for name, weight in named.items():
            require(0 <= weight < math.inf, f"{spelled[name]}: a weight is finite and not negative, as the mix is convex")
        total = sum(named.values())
        example = "--ArmoRM=1.0 or --ultrafeedback_truthfulness=0.5 --helpsteer_complexity=0.5"
        require(abs(total - 1.0) <= 1e-6, f"the objective weights sum to {total:g}, not to 1; pass e.g. {example}")
        return {name: weight for name, weight in named.items() if weight > 0}

    def __post_init__(self) -> None:
        self.objective_weights()
        check_bounds(self)
        most, by = self.max_pairs_per_prompt, self.standardize_by
        require(
            most is None or self.selection == "all_pairs",
            f"--max_pairs_per_prompt={most} requires --selection=all_pairs; {self.selection} makes one pair per prompt",
        )
        require(self.standardize or by == "split", f"--standardize_by={by} requires --standardize=true")


_GROUPS = "or embedded (no hub, no login), all, none; auto is all where the hub answers, else embedded"


@dataclass(frozen=True)
class AssetsConfig:
    """Step 0: models and prompts."""

    models: str = flag(f"comma-separated, of {', '.join((*EMBEDDED_MODELS, *HUB_MODELS))}; {_GROUPS}", "auto")
    datasets: str = flag(f"comma-separated, of {', '.join((*EMBEDDED_DATASETS, *HUB_DATASETS))}; {_GROUPS}", "auto")

    def __post_init__(self) -> None:
        select_models(self.models)
        select_datasets(self.datasets)
