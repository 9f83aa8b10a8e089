"""Flags of train_alignment.sh."""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from drdpo.cli import check_bounds, flag, require
from drdpo.objectives import mixtures_of


@dataclass(frozen=True)
class LoraSettings:
    """What adapters are made of and how they are saved; `model_path` and `dtype` are those of the weights they belong to."""

    model_path: str
    dtype: str
    rank: int
    merge: bool
    quantize: Literal["none", "nf4"]
    seed: int


class Strength(NamedTuple):
    """A number of a --method, by name."""

    name: str
    largest: float = 1e6
    """Far above any of use; powers and exponents of it stay finite."""
    zero: bool = False
    """May it be zero?"""
    default: float | None = None


_WEIGHTS = {
    "tv": (Strength("radius", 1, zero=True),),
    "chi2": (Strength("radius", zero=True),),
    "cvar": (Strength("share", 1),),
    "group": (Strength("rate"), Strength("adjustment", zero=True, default=0.0)),
}
_LOSSES = {
    "ropo": (Strength("alpha"),),
    "holder": (Strength("gamma"),),
    "robust_label": (Strength("radius", 1, zero=True),),
    "dpo_pro": (Strength("radius", zero=True), Strength("scale", default=1.0)),
}
"""Methods with a loss of their own, so that --loss_type does not apply."""
METHODS = {**_WEIGHTS, **_LOSSES}
"""What --method can be, with its numbers, of which all but the first have a default; docs/methods.md says what they mean."""


@dataclass(frozen=True)
class DataSettings:
    """Where preferences come from; see the flags of the same names."""

    path: str
    config: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    test_share: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class TrainConfig:
    """Step 3: align a policy. At most one of --kldpo_tau, --wdpo_rho, --drdpo_beta and --method; without any it is DPO."""

    model_path: str = flag("policy to align and frozen reference: a Hugging Face folder or hub id")
    dataset_path: str = flag("folder with train.jsonl and test.jsonl of preferences, or the hub id of a TRL-style data set")
    save_path: str = flag("output folder: checkpoints global_step_<n>, metrics.jsonl, logs")
    dataset_config: str | None = flag("configuration of a hub data set that has several", None)
    train_split: str | None = flag("split, or file <name>.jsonl of a folder, to train on (default train)", None)
    test_split: str | None = flag(
        "the same for the test pairs (default test; on the hub validation or eval if missing)", None
    )
    test_share: float | None = flag(
        "for data without a test split: hold out this share of the training split's distinct prompts, drawn by --seed", None,
        above=0, below=1,
    )  # fmt: skip
    kldpo_tau: float | None = flag("use KLDPO with this temperature", None, above=0)
    wdpo_rho: float | None = flag("use WDPO with this radius", None, above=0)
    drdpo_beta: float | None = flag("use Dr. DPO with this temperature", None, above=0)
    method: str | None = flag(
        "use another method, NAME:STRENGTH, e.g. cvar:0.3: tv:RADIUS, chi2:RADIUS, cvar:SHARE, group:RATE[,ADJUSTMENT], "
        "ropo:ALPHA, holder:GAMMA, robust_label:RADIUS or dpo_pro:RADIUS[,SCALE] (docs/methods.md)",
        None,
    )
    group_column: str | None = flag("for --method=group: field of the preference rows that names a pair's group", None)
    weight_column: str | None = flag(
        "field of the preference rows whose number multiplies a pair's term of the objective, with any method", None
    )
    kldpo_normalize: bool = flag("compute KLDPO weights as in the paper's Algorithm 2: a softmax over the population", False)
    wdpo_penalty: Literal["squared", "root"] = flag(
        "'squared': mean of rho |grad|^2, as in the authors' code; 'root': rho sqrt(mean |grad|^2), Algorithm 1", "squared"
    )
    wdpo_prompt: Literal["per_sequence", "once"] = flag(
        "gradient on the shared prompt: 'per_sequence' |g_c|^2 + |g_r|^2, as in the authors' code; 'once' |g_c + g_r|^2, as "
        "in the paper",
        "per_sequence",
    )
    wdpo_solver: Literal["auto", "exact", "tangent"] = flag(
        "parameter gradient of the penalty: 'tangent' uses a forward pass along the gradient and one backward pass, for "
        "packed rows of Llama, Mistral, Qwen2 and Qwen3; 'exact' a double backward of plain torch operations on padded "
        "rows, for any architecture; 'auto' is tangent for packed rows and exact for padded ones",
        "auto",
    )
    wdpo_fraction: float = flag(
        "apply the penalty to a random share of a step's micro-batches, rescaled to stay unbiased", 1.0, above=0, at_most=1
    )
    robust_scope: Literal["step", "micro"] = flag(
        "population of the robust weights, and of WDPO's root: all pairs of the optimizer step, or of one micro-batch on "
        "all processes; 'micro' only for methods whose weights depend on other pairs, and --wdpo_penalty=root",
        "step",
    )
    loss_type: Literal["sigmoid", "ipo", "robust", "sigmoid_norm", "ipo_norm"] = flag(
        "pointwise loss: DPO, IPO or rDPO; 'sigmoid_norm' and 'ipo_norm' are DPO and IPO, each answer's log-ratio divided "
        "by its number of tokens",
        "sigmoid",
    )
    label_smoothing: float = flag("cDPO's smoothing (sigmoid) or rDPO's flip rate (robust)", 0.0, at_least=0, below=0.5)
    beta: float = flag("KL penalty coefficient (DPO's beta)", 0.01, above=0)
    learning_rate: float = flag("peak learning rate of AdamW (0.9, 0.95); a cosine lowers it to a tenth", 5e-7, above=0)
    warmup_ratio: float = flag("fraction of the steps with linear warmup", 0.1, at_least=0, at_most=1)
    max_grad_norm: float = flag("clip the gradient to this norm", 1.0, above=0)
    max_epochs: int = flag("number of epochs", 8, at_least=1)
    max_steps: int | None = flag(
        "stop after this number of optimizer steps, which the schedule then spans", None, at_least=1
    )
    train_batch_size: int = flag("pairs per optimizer step, over all processes", 128, at_least=1)
    micro_batch_size: int | None = flag(
        "pairs per process and forward pass (default 1 for WDPO, else 4; packed rows on CUDA use --micro_batch_tokens "
        "instead)",
        None,
        at_least=1,
    )
    micro_batch_tokens: int | None = flag(
        "instead of --micro_batch_size: tokens of a packed row; each process and forward pass takes as many pairs as fit "
        "(default on CUDA: what fits the GPU's memory by prediction, at most 16,384 and at least twice --max_len; a resumed "
        "run keeps its value)",
        None,
        at_least=1,
    )
    max_len: int = flag(
        "maximum tokens of prompt + answer; longer answers are truncated, pairs with a longer prompt dropped",
        2048,
        at_least=1,
    )
    chat_template_kwargs: dict[str, Any] | None = flag(
        "JSON object of arguments for the chat template, e.g. '{\"enable_thinking\": false}' for Qwen3 without "
        "thinking; those that sampled the pairs",
        None,
    )
    max_test_pairs: int | None = flag("evaluate on the first N test pairs only", None, at_least=1)
    eval_steps: int = flag("evaluate on the test pairs every N steps; 0: only at the end", 79, at_least=0)
    eval_columns: str | None = flag(
        "evaluate each group of the test pairs apart: comma-separated fields of the rows that name groups", None
    )
    eval_mixture: list[str] = flag(
        "evaluate the test pairs as other preferences would label them: NAME=OBJECTIVE:WEIGHT,... arguments, by the rows' "
        "chosen_scores and rejected_scores",
        [],
    )
    eval_candidates: str | None = flag(
        "at every evaluation also report the policy's expected score on scored completions of --model_path in this folder's "
        "test.jsonl, without sampling: by objective and by --eval_mixture (docs/methods.md)",
        None,
    )
    max_candidate_prompts: int | None = flag("for --eval_candidates: the first N prompts of the file only", None, at_least=1)
    save_steps: int = flag("save a checkpoint every N steps; 0: only at the end", 158, at_least=0)
    keep_checkpoints: int = flag(
        "number of recent checkpoints to keep, plus the one with the lowest eval loss; 0 keeps all", 0, at_least=0
    )
    dtype: Literal["auto", "bfloat16", "float32"] = flag(
        "precision of the forward and backward pass; optimizer states are float32. 'auto' is bfloat16 on GPUs and on CPUs "
        "with AVX512_BF16 or AMX, else float32",
        "auto",
    )
    zero_stage: int = flag("DeepSpeed ZeRO stage, 0 to 3", 2, at_least=0, at_most=3)
    gradient_checkpointing: Literal["auto", "true", "false"] = flag(
        "recompute activations in the backward pass: same results, less memory, about a third more time. 'auto' does so in "
        "as few layers as bring the predicted peak to 90% of a GPU's free memory, or half of a CPU's",
        "auto",
    )
    deterministic: bool = flag(
        "use torch's deterministic CUDA kernels, so that repeated and resumed runs are bit-identical; slower. An operation "
        "without one is an error. CPU runs are always bit-identical",
        False,
    )
    lora_rank: int = flag(
        "train LoRA adapters of this rank, with alpha 32, on the linear layers of all decoder blocks; "
        "0 trains the weights. LoRA usually wants about ten times the --learning_rate",
        0,
        at_least=0,
    )
    lora_quantize: Literal["none", "nf4"] = flag(
        "'nf4' is QLoRA: with --lora_rank bitsandbytes keeps the frozen linear layers of the decoder blocks in 4 bits (NF4, "
        "double quantization, 0.52 bytes a parameter); embeddings, output head and norms keep --dtype. The reference is the "
        "quantized model; --lora_merge=true merges into the full-precision weights of --model_path, which every checkpoint "
        "rereads on the CPU. Not with WDPO or --zero_stage=3",
        "none",
    )
    lora_merge: bool = flag(
        "true: checkpoints are whole models with the adapters merged in, plus the adapters in the subfolder adapter; false: "
        "only the adapters, for peft and vLLM",
        True,
    )
    packing: bool = flag(
        "true: a micro-batch is one row without padding, with each prompt once for its two answers; false: two padded rows "
        "per pair (default true; false for --wdpo_solver=exact, which needs padded rows)",
        None,
    )
    attn: Literal["auto", "sdpa", "flex", "flash", "eager"] = flag(
        "attention kernel. 'sdpa': torch's fused kernels, for packed rows group by group. 'flash', CUDA only: torch's "
        "variable-length flash attention for packed rows, one call a layer, checked against sdpa at the start; "
        "transformers' flash_attention_2 for padded ones. 'flex', CUDA only: transformers' flex_attention, with "
        "--packing=false. 'eager': matrix products and a float32 softmax, with --packing=false. 'auto': eager for "
        "--wdpo_solver=exact; flash for packed bfloat16 rows on CUDA if it supports the model, except for WDPO; else sdpa. "
        "Without --deterministic the order of sums in CUDA's backward passes is not fixed. With --wdpo_solver=tangent "
        "bfloat16 runs attend in float32 unless 'flash' is passed",
        "auto",
    )
    optimizer_offload: bool = flag(
        "keep optimizer states in CPU memory and run the optimizer step there; --zero_stage 1 to 3", False
    )
    seed: int = flag("random seed: shuffling, adapters, --wdpo_fraction", 42)
    save_resume: bool = flag(
        "save a state to resume from (12 bytes a trained parameter), with every checkpoint and on SIGTERM and SIGUSR1; the "
        "newest two stay",
        True,
    )
    resume: Literal["auto", "never"] = flag(
        "'auto' resumes the run in --save_path; 'never' starts over and replaces it", "auto", once=True
    )
    log: str = flag(
        "where metrics go besides metrics.jsonl: tensorboard, trackio, wandb, several comma-separated, or none; trackio "
        "and wandb must be installed separately",
        "tensorboard",
    )
    push_to_hub: str | None = flag(
        "upload the last checkpoint to this hub repository (owner/name, private if new)", None, once=True
    )
    check_only: bool = flag("check flags and inputs, then stop", False, once=True)
    dry_run: bool = flag(
        "print what the run will do and the memory it will need, then stop; writes nothing", False, once=True
    )

    @property
    def named_method(self) -> tuple[str, dict[str, float]] | None:
        """Name and numbers in --method; raises UsageError for other names, or numbers out of their bounds."""
        return None if self.method is None else _named_method(self.method)

    @property
    def mixtures(self) -> dict[str, dict[str, float]]:
        """{name: {objective: weight}} of --eval_mixture; raises UsageError as mixtures_of."""
        return mixtures_of("--eval_mixture", self.eval_mixture)

    @property
    def eval_groups(self) -> list[str]:
        """The fields in --eval_columns, each once."""
        return list(dict.fromkeys(name.strip() for name in (self.eval_columns or "").split(",") if name.strip()))

    @property
    def lora(self) -> LoraSettings | None:
        """None trains the weights."""
        if not self.lora_rank:
            return None
        return LoraSettings(self.model_path, self.dtype, self.lora_rank, self.lora_merge, self.lora_quantize, self.seed)

    @property
    def data(self) -> DataSettings:
        """Where the preferences come from."""
        return DataSettings(
            self.dataset_path, self.dataset_config, self.train_split, self.test_split, self.test_share, self.seed
        )

    @property
    def trackers(self) -> list[str]:
        """The names in --log, each once; none for `none`."""
        names = dict.fromkeys(name.strip() for name in self.log.split(","))
        return [name for name in names if name != "none"]

    @property
    def second_derivative(self) -> bool:
        """Does the run differentiate a gradient?"""
        return self.wdpo_rho is not None and self.solver == "exact"

    @property
    def solver(self) -> Literal["exact", "tangent"]:
        """WDPO's solver that the flags choose."""
        if self.wdpo_solver == "auto":
            return "tangent" if self.packing else "exact"
        return self.wdpo_solver

    @property
    def tangent(self) -> bool:
        """Is there a penalty, by the tangent solver?"""
        return self.wdpo_rho is not None and self.solver == "tangent"

    @property
    def wide_values(self) -> bool:
        """Are values computed in float32, with weights of less precision? See drdpo.training.patches."""
        return self.tangent and self.dtype == "bfloat16"

    @property
    def attention_kernel(self) -> Literal["sdpa", "flex", "flash", "eager"]:
        """The kernel that the flags choose, without a look at the machine; drdpo.training.memory may replace auto by flash.
        Only eager has a second derivative."""
        if self.attn == "auto":
            return "eager" if self.second_derivative else "sdpa"
        return self.attn

    @property
    def attention(self) -> str:
        """What transformers calls the attention of the run."""
        if self.packing:
            return "shared_prefix"  # drdpo.kernels.packed_attention, which registers itself by this name
        return {"flex": "flex_attention", "flash": "flash_attention_2"}.get(self.attention_kernel, self.attention_kernel)

    @property
    def packed_flash(self) -> bool:
        """Do packed rows attend by flash attention?"""
        return self.packing and self.attention_kernel == "flash"

    @property
    def recompute(self) -> bool:
        """Recompute activations? Where --gradient_checkpointing=auto is still to be resolved: yes."""
        return self.gradient_checkpointing != "false"

    @property
    def micro_batch(self) -> int:
        """Pairs per process and forward pass; under --micro_batch_tokens the fewest."""
        if self.micro_batch_tokens is not None:
            return 1
        return self.micro_batch_size or (1 if self.wdpo_rho is not None else 4)

    def __post_init__(self) -> None:
        if isinstance(self.gradient_checkpointing, bool):
            object.__setattr__(self, "gradient_checkpointing", str(self.gradient_checkpointing).lower())
        if self.packing is None:
            object.__setattr__(self, "packing", self.wdpo_rho is None or self.wdpo_solver != "exact")
        check_bounds(self)
        _check_rules(self)


def _check_rules(config: TrainConfig) -> None:
    """Raise UsageError for flags that exclude each other, or that the others leave without effect."""
    mixtures_of("--eval_mixture", config.eval_mixture)
    strengths = [name for name in ("kldpo_tau", "wdpo_rho", "drdpo_beta", "method") if getattr(config, name) is not None]
    named = config.named_method[0] if config.named_method else None
    owners = [
        (config.wdpo_rho is not None, "wdpo_penalty wdpo_prompt wdpo_solver wdpo_fraction",
         "without --wdpo_rho; pass that too"),
        (config.kldpo_tau is not None, "kldpo_normalize", "without --kldpo_tau; pass that too"),
        (bool(config.lora_rank), "lora_merge lora_quantize", "without --lora_rank; pass that too"),
        (config.eval_candidates is not None, "max_candidate_prompts", "without --eval_candidates; pass that too"),
        (named not in _LOSSES, "loss_type label_smoothing",
         f"for --method={config.method}, which has a loss of its own; omit it"),
        (not config.loss_type.startswith("ipo"), "label_smoothing", f"for --loss_type={config.loss_type}; omit it"),
    ]  # fmt: skip
    require(
        len(strengths) <= 1, f"{' and '.join(f'--{name}' for name in strengths)} choose different methods; pass one of them"
    )
    for used, names, why in owners:
        for name in () if used else names.split():
            value = getattr(config, name)
            idle = value == type(config).__dataclass_fields__[name].default
            require(idle, f"--{name}={str(value).lower() if isinstance(value, bool) else value} has no meaning {why}")
    taken: list[str | None] = ["chosen_tokens", "rejected_tokens"]
    for each in ("group_column", "weight_column"):
        column = getattr(config, each)
        words = f"--{each}={column} names a column of other numbers: groups, or tokens; rename yours"
        require(column is None or column not in taken, words)
        taken.append(column)
    for excluded, message in _exclusions(config, named):
        require(not excluded, message)


def _exclusions(c: TrainConfig, named: str | None) -> list[tuple[bool, str]]:
    """Whether flags exclude each other, and what to say of it."""
    wdpo, exact, tokens = c.wdpo_rho is not None, c.second_derivative, c.micro_batch_tokens is not None
    logs, known = [name.strip() for name in c.log.split(",")], ("tensorboard", "trackio", "wandb", "none")
    solver = f"{c.wdpo_solver}{', which is exact' * (c.wdpo_solver == 'auto')}"
    return [
        (c.eval_columns is not None and not c.eval_groups, "--eval_columns names no field; omit it"),
        ((named == "group") != (c.group_column is not None),
         "--method=group and --group_column belong together; pass both, or neither"),
        (c.tangent and c.loss_type.endswith("_norm"),
         f"--loss_type={c.loss_type} is no loss of the margin alone, as the tangent solver needs; pass --wdpo_solver=exact"),
        (wdpo and c.wdpo_fraction != 1 and c.wdpo_penalty != "squared",
         f"--wdpo_fraction={c.wdpo_fraction} with --wdpo_penalty=root: the root of a sample's mean is biased; omit one"),
        (exact and c.packing,
         "--packing=true: --wdpo_solver=exact takes padded rows only; omit --packing, or pass --wdpo_solver=tangent"),
        (exact and c.attention_kernel != "eager",
         f"--attn={c.attn} has no second derivative, as --wdpo_solver={solver} needs; pass --attn=eager, or tangent"),
        (exact and c.zero_stage > 2,
         f"--zero_stage=3 with --wdpo_solver={solver}: DeepSpeed's stage 3 cannot run its double backward; "
         "pass --wdpo_solver=tangent and --packing=true, or --zero_stage=2"),
        (c.tangent and not c.packing,
         "--packing=false: --wdpo_solver=tangent takes packed rows only; pass --wdpo_solver=exact or --packing=true"),
        (c.zero_stage == 0 and c.dtype == "bfloat16",
         "--zero_stage=0 with --dtype=bfloat16 takes wrong steps in DeepSpeed; pass --zero_stage=1 or --dtype=float32"),
        (c.optimizer_offload and c.zero_stage == 0,
         "--optimizer_offload=true with --zero_stage=0: DeepSpeed offloads ZeRO's states; pass --zero_stage=1, 2 or 3"),
        (c.test_share is not None and c.test_split is not None,
         "--test_share and --test_split both say which the test pairs are; pass one"),
        (c.eval_candidates is not None and not c.packing,
         "--eval_candidates with --packing=false: a prompt's candidates are answers in one packed row; omit one of the two"),
        (c.lora_quantize != "none" and wdpo,
         "--lora_quantize=nf4 with --wdpo_rho: in bfloat16 bitsandbytes rounds the rows of its gradient; pass "
         "--lora_quantize=none"),
        (c.lora_quantize != "none" and c.zero_stage > 2,
         "--lora_quantize=nf4 with --zero_stage=3: DeepSpeed would split the 4-bit codes; pass --zero_stage=2"),
        *((name not in known, f"--log={c.log}: '{name}' is not one of {', '.join(known)}") for name in logs),
        ("none" in logs and len(logs) > 1, f"--log={c.log}: none excludes the others; omit one"),
        (tokens and c.micro_batch_size is not None,
         "--micro_batch_tokens and --micro_batch_size exclude each other; pass one"),
        (tokens and not c.packing,
         "--micro_batch_tokens counts the tokens of packed rows; for padded ones pass --micro_batch_size"),
        (tokens and c.robust_scope != "step",
         "--micro_batch_tokens makes the population of --robust_scope=micro vary in size; pass --micro_batch_size"),
        (c.deterministic and not c.packing and c.attn in ("flex", "flash"),
         f"--deterministic=true with --attn={c.attn} and --packing=false, which is not deterministic; pass --attn=sdpa"),
        (c.packing and c.attn in ("flex", "eager"),
         f"--attn={c.attn}: packed rows attend by sdpa or flash; pass --attn=sdpa, or --packing=false as well"),
        (c.attn == "flash" and c.dtype == "float32",
         "--attn=flash with --dtype=float32: flash attention takes 16-bit numbers only; pass --attn=sdpa"),
    ]  # fmt: skip


def _named_method(word: str) -> tuple[str, dict[str, float]]:
    name, colon, text = word.partition(":")
    require(
        name in METHODS,
        f"--method={word}: no method is called {name}; pass one of {', '.join(METHODS)}, or --kldpo_tau, --wdpo_rho, "
        "--drdpo_beta, --loss_type for the others",
    )
    strengths = METHODS[name]
    form = "".join(each.name.upper() if each.default is None else f"[,{each.name.upper()}]" for each in strengths)
    words = text.split(",") if colon else []
    require(1 <= len(words) <= len(strengths), f"--method={word}: write --method={name}:{form}, in numbers")
    numbers = {strength.name: strength.default for strength in strengths}
    for strength, spelled in zip(strengths, words, strict=False):
        try:
            number = float(spelled)
        except ValueError:
            number = math.nan
        # NaN fails every comparison.
        fits = (number >= 0 if strength.zero else number > 0) and number <= strength.largest
        bounds = f"{'[' if strength.zero else '('}0, {strength.largest:g}]"
        require(fits, f"--method={word}: {strength.name} is {spelled}, not a number in {bounds}")
        numbers[strength.name] = number
    return name, {key: number for key, number in numbers.items() if number is not None}
