"""Flags of generate_completions.sh and generate.sh."""

from dataclasses import dataclass
from typing import Literal

from drdpo.cli import check_bounds, flag, require


@dataclass(frozen=True)
class CompletionsConfig:
    """Step 1 and step 4a: sample completions and score them."""

    save_path: str = flag("folder for train.jsonl and test.jsonl, scored; the unscored samples go to its sampled/")
    model_path: str = flag("policy: a Hugging Face folder or hub id")
    best_of_n: int = flag("completions per prompt", 2, at_least=1)
    temperature: float = flag("sampling temperature; 0 is greedy", 0.7, at_least=0)
    only_test: bool = flag("sample and score the test prompts only", False)
    dataset: str = flag(
        "folder of prompts; 'auto' is datasets/helpsteer2_prompts where it exists, else datasets/embedded_prompts", "auto"
    )
    top_p: float = flag("nucleus sampling", 1.0, above=0, at_most=1)
    max_new_tokens: int = flag("longest completion in tokens", 1024, at_least=1)
    prompt_max_len: int = flag("a longer prompt, in tokens, is set aside in rejects.jsonl", 1024, at_least=1)
    max_prompts: int | None = flag("use only the first so many prompts of each split", None, at_least=1)
    seed: int = flag("seed of the sampling; every (prompt, sample) has its own stream", 42)
    engine: Literal["auto", "vllm", "transformers"] = flag(
        "'auto' is vllm where it can be imported, but transformers on a CPU for answers of at most 64 tokens", "auto"
    )
    tensor_parallel_size: int = flag("GPUs that one vLLM engine spans; the others run data-parallel engines", 1, at_least=1)
    gpu_memory_utilization: float = flag("share of a GPU's memory that vLLM may take", 0.9, above=0, at_most=1)
    dtype: Literal["auto", "bfloat16", "float32"] = flag(
        "precision of policy and reward backbone (reward heads are always float32); 'auto' is bfloat16 on GPUs and on CPUs "
        "with fast bfloat16 products (AVX512_BF16, AMX), else float32",
        "auto",
    )
    reward_model: str = flag(
        "folder of a reward model in ArmoRM's layout; 'auto' is models/ArmoRM where it exists, else models/ArmoRM-SmolLM2",
        "auto",
    )
    score_max_len: int = flag("a longer prompt + completion, in tokens, is set aside in rejects.jsonl", 4096, at_least=1)
    score_batch_tokens: int = flag(
        "tokens in one scoring batch, which bound its memory; a prompt counts once for its completions", 8192, at_least=1
    )
    overwrite: bool = flag("replace results that other flags, models or inputs made", False)
    check_only: bool = flag("check the flags and the inputs, then stop", False)

    def __post_init__(self) -> None:
        check_bounds(self)
        require(
            self.score_batch_tokens >= self.score_max_len,
            f"--score_batch_tokens={self.score_batch_tokens} is less than --score_max_len={self.score_max_len}, so the "
            "longest conversation would not fit a batch; raise the one or lower the other",
        )
