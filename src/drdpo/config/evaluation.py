"""Flags of step 4: evaluation, comparisons, a look at data and runs."""

from dataclasses import dataclass
from typing import Literal

from drdpo.cli import check_bounds, flag, positional, require

HF_MAX_LENGTH = 8192
"""Longest context that backend hf gets unless --max_length says otherwise. Without requests to look at, as for generation,
lm-eval's search for a batch size tries the full context (Llama 3.x: 131,072), which fits no GPU, and ends at 1."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Step 4a: per-objective averages of one or more runs, and the spider plot."""

    runs: list[str] = flag(
        "NAME=FOLDER words, folders of scored completions; the first is the base; a name that stands with several folders "
        "is one run of several training seeds"
    )
    output_path: str = flag("folder for report.md, spider.png, spider.svg, scores.csv, pairs.csv and answers.csv")
    objectives: list[str] = flag("objectives to report, in either spelling (default: all that every run has)", [])
    trained_on: list[str] = flag(
        "objectives that training saw; the others are marked unseen (default: those that the runs' pairs were mixed from, "
        "where the manifests tell)",
        [],
    )
    sweep: list[str] = flag(
        "two objectives r1 r2: evaluate the mixtures alpha r1 + (1 - alpha) r2 for alpha from 0 to 1; writes alpha.csv, "
        "alpha.png and alpha.svg",
        [],
    )
    sweep_trained_at: float = flag("the alpha that training used, marked in the plot of --sweep", 0.5, at_least=0, at_most=1)
    split: Literal["test", "train"] = flag("split to average", "test")
    bootstrap: int = flag("paired bootstrap samples of the confidence interval", 2000, at_least=100)
    seed: int = flag("seed of the bootstrap", 42, at_least=0)

    def __post_init__(self) -> None:
        check_bounds(self)
        require(
            not self.sweep or len(set(self.sweep)) == len(self.sweep) == 2,
            f"--sweep {' '.join(self.sweep)}: give two different objectives, e.g. --sweep helpsteer_helpfulness "
            "helpsteer_coherence",
        )


@dataclass(frozen=True)
class LeaderboardConfig:
    """Step 4b: Open LLM Leaderboard v2 through lm-eval."""

    model_path: str = flag("model to evaluate: a Hugging Face folder or hub id")
    output_path: str | None = flag("folder for results (default outputs/openllm/<model name>)", None)
    tasks: str = flag("comma-separated lm-eval tasks or groups", "leaderboard")
    limit: float | None = flag("only so many samples per task (below 1: a share), for a trial", None, above=0)
    include_path: str | None = flag("folder of further task yaml files", None)
    backend: Literal["hf", "vllm"] = flag("lm-eval back end", "hf")
    batch_size: str = flag("sequences at a time, or 'auto': what fits a GPU, and 1 on a CPU", "auto")
    dtype: Literal["auto", "bfloat16", "float32"] = flag(
        "precision of the model; 'auto' is bfloat16 on GPUs and on CPUs with fast bfloat16 products (AVX512_BF16, AMX), "
        "else float32",
        "auto",
    )
    max_length: int | None = flag(
        f"context length; the authors used 2048 (default: the model's own, with backend hf at most {HF_MAX_LENGTH})",
        None,
        at_least=1,
    )
    max_gen_toks: int | None = flag("longest generation; the authors used 1024", None, at_least=1)
    num_fewshot: int | None = flag(
        "few-shot examples, in place of each task's own number unless that is 0", None, at_least=0
    )
    apply_chat_template: bool = flag("render prompts with the model's chat template", True)
    fewshot_as_multiturn: bool = flag("few-shot examples as turns of a conversation", True)
    tensor_parallel_size: int = flag(
        "GPUs that one vLLM engine spans (backend vllm); one engine for every so many", 1, at_least=1
    )
    seed: int = flag("seed of the few-shot sampling", 42, at_least=0)
    overwrite: bool = flag("replace results that other flags or another model made", False)
    check_only: bool = flag("check the flags and the inputs, then stop", False)

    def __post_init__(self) -> None:
        check_bounds(self)
        require(
            self.limit is None or self.limit < 1 or self.limit == int(self.limit),
            f"--limit={self.limit}: give a whole number of samples, or a share below 1",
        )
        require(
            self.batch_size == "auto"
            or (self.batch_size.isascii() and self.batch_size.isdigit() and 0 < len(self.batch_size.lstrip("0")) < 10),
            f"--batch_size={self.batch_size}: give a positive number or auto",
        )
        require(
            self.tensor_parallel_size == 1 or self.backend == "vllm",
            f"--tensor_parallel_size={self.tensor_parallel_size} is for --backend=vllm; hf holds a whole model per GPU",
        )
        require(
            self.apply_chat_template or not self.fewshot_as_multiturn,
            "--fewshot_as_multiturn needs --apply_chat_template; give --fewshot_as_multiturn=false as well",
        )


# Flags of src/compare_openllm.py and src/compare_mixtures.py, the last steps of the experiments.


@dataclass(frozen=True)
class CompareOpenllmConfig:
    """Leaderboard results of several models, side by side and beside the published ones."""

    runs: list[str] = flag(
        "NAME=FOLDER words, output folders of openllm_eval.slurm; GROUP/NAME=FOLDER puts a run into a table of its group, "
        "e.g. 1B/base=outputs/openllm/base"
    )
    output_path: str = flag("folder for report.md, leaderboard.csv, heatmap.png and heatmap.svg")
    published: Literal["auto", "none", "1B", "3B", "8B"] = flag(
        "the authors' numbers to show beside ours; auto is those of the size that a GROUP names", "auto"
    )


@dataclass(frozen=True)
class CompareMixturesConfig:
    """Gains of several training mixtures, beside the published ones."""

    reports: list[str] = flag("NAME=FOLDER words, output folders of evaluate_armorm.py, one for each training mixture")
    output_path: str = flag("folder for report.md, spiders.png and spiders.svg")
    published: bool = flag("show the authors' numbers beside the mixtures that bear one of their names", True)


# Flags of src/inspect_data.py and src/show_run.py.


@dataclass(frozen=True)
class InspectConfig:
    """Tables, samples and histograms of data, whichever step made it."""

    path: str = positional("folder or JSON-lines file of prompts, completions, preference pairs or rejected rows")
    samples: int = flag("rows of each file to print", 3, at_least=0)
    seed: int = flag("seed of the choice of these rows", 42, at_least=0, below=2**32)
    output_path: str | None = flag("PNG of the histograms (default: outputs/inspection/<path>.png)", None)

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class ShowRunConfig:
    """State, progress and training curves of a run."""

    path: str = positional("folder of a training run, or the output folder of any other step")
    picture: bool = flag("draw the training curves as training.png in the folder", True)
