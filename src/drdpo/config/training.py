"""Flags of train_alignment.sh."""

from dataclasses import dataclass
from typing import Literal

from drdpo.cli import check_bounds, flag, require

PACKED_ATTENTION = "shared_prefix"
"""What transformers calls drdpo.kernels.packed_attention."""


@dataclass(frozen=True)
class TrainConfig:
    """Step 3: align a policy. At most one of --kldpo_tau, --wdpo_rho and --drdpo_beta; none of them is plain DPO."""

    model_path: str = flag("policy to align, also the frozen reference: a Hugging Face folder or hub id")
    dataset_path: str = flag("folder with train.jsonl and test.jsonl of preferences, or the hub id of a TRL-style data set")
    save_path: str = flag("folder for checkpoints global_step_<n>, metrics.jsonl and logs")
    kldpo_tau: float | None = flag("KLDPO with this temperature", None, above=0)
    wdpo_rho: float | None = flag("WDPO with this radius", None, above=0)
    drdpo_beta: float | None = flag("Dr. DPO with this temperature", None, above=0)
    kldpo_normalize: bool = flag("KLDPO weights as the paper's Algorithm 2: a softmax over the population", False)
    wdpo_penalty: Literal["squared", "root"] = flag(
        "'squared': mean of rho |grad|^2, as the authors' code; 'root': rho sqrt(mean |grad|^2), Algorithm 1", "squared"
    )
    wdpo_prompt: Literal["per_sequence", "once"] = flag(
        "gradient on the shared prompt: 'per_sequence' |g_c|^2 + |g_r|^2, as the authors' two rows; 'once' |g_c + g_r|^2, "
        "as the paper's z",
        "per_sequence",
    )
    wdpo_solver: Literal["auto", "exact", "tangent"] = flag(
        "the penalty's parameter gradient by: 'tangent' a forward pass along the gradient and an ordinary backward pass, "
        "for packed rows of Llama, Mistral, Qwen2 and Qwen3; 'exact' a double backward of plain torch operations on padded "
        "rows, for any architecture; 'auto' is tangent for packed rows and exact for padded ones",
        "auto",
    )
    wdpo_fraction: float = flag(
        "share of a step's micro-batches (at least one) that carry the penalty, drawn again each step and rescaled to stay "
        "unbiased",
        1.0,
        above=0,
        at_most=1,
    )
    robust_scope: Literal["step", "micro"] = flag(
        "population of the robust weights, and of WDPO's root: all pairs of the optimizer step, or of one micro-batch over "
        "the ranks; 'micro' for KLDPO, Dr. DPO and --wdpo_penalty=root alone",
        "step",
    )
    loss_type: Literal["sigmoid", "ipo", "robust"] = flag("pointwise loss: DPO, IPO or rDPO", "sigmoid")
    label_smoothing: float = flag("cDPO's smoothing (sigmoid) or rDPO's flip rate (robust)", 0.0, at_least=0, below=0.5)
    beta: float = flag("KL penalty coefficient (DPO's beta)", 0.01, above=0)
    learning_rate: float = flag("peak learning rate of AdamW (0.9, 0.95); a cosine lowers it to a tenth", 5e-7, above=0)
    warmup_ratio: float = flag("share of the steps that warm up linearly", 0.1, at_least=0, at_most=1)
    max_grad_norm: float = flag("gradient clipping", 1.0, above=0)
    max_epochs: int = flag("passes over the pairs", 8, at_least=1)
    max_steps: int | None = flag("stop after so many optimizer steps; the schedule spans them", None, at_least=1)
    train_batch_size: int = flag("pairs per optimizer step, over all processes", 128, at_least=1)
    micro_batch_size: int | None = flag(
        "pairs per process and forward pass (default 1 for WDPO, else 4; for packed rows on CUDA --micro_batch_tokens is "
        "the default instead)",
        None,
        at_least=1,
    )
    micro_batch_tokens: int | None = flag(
        "instead of --micro_batch_size: as many pairs per process and forward pass as fit a packed row of this many tokens, "
        "rows of about equal length (default on CUDA: what the GPU's memory holds by the preflight's prediction, at most "
        "16,384, and at least twice --max_len)",
        None,
        at_least=1,
    )
    max_len: int = flag(
        "longest prompt + answer in tokens; a longer answer is cut, a longer prompt sets the pair aside", 2048, at_least=1
    )
    max_test_pairs: int | None = flag("evaluate on the first N test pairs only", None, at_least=1)
    eval_steps: int = flag("evaluate on the test pairs every so many steps; 0 is at the end only", 79, at_least=0)
    save_steps: int = flag("save a checkpoint every so many steps; 0 is at the end only", 158, at_least=0)
    keep_checkpoints: int = flag(
        "keep so many of the newest checkpoints, and the one of least evaluation loss; 0 keeps all", 0, at_least=0
    )
    dtype: Literal["auto", "bfloat16", "float32"] = flag(
        "precision of the forward and backward pass; optimizer states are float32; 'auto' is bfloat16 on GPUs and on CPUs "
        "with fast bfloat16 products (AVX512_BF16, AMX), else float32",
        "auto",
    )
    zero_stage: int = flag("DeepSpeed ZeRO stage, 0 to 3", 2, at_least=0, at_most=3)
    gradient_checkpointing: Literal["auto", "true", "false"] = flag(
        "recompute activations in the backward pass, which gives the same results in less memory and a third more time; "
        "'auto' keeps them where the predicted peak fits 90% of the free memory of a GPU, or half of a CPU's",
        "auto",
    )
    deterministic: bool = flag(
        "on CUDA use torch's deterministic kernels, so that two runs, or a resumed one, are bit-identical; slower. A kernel "
        "without a deterministic form is an error. On a CPU runs are so in any case",
        False,
    )
    lora_rank: int = flag(
        "train LoRA adapters of this rank, with alpha 32, on the linear layers of all decoder blocks; "
        "0 trains the weights. LoRA usually wants about ten times the --learning_rate",
        0,
        at_least=0,
    )
    lora_quantize: Literal["none", "nf4"] = flag(
        "'nf4' is QLoRA: with --lora_rank bitsandbytes holds the frozen linear layers of the decoder blocks in 4 bits (NF4, "
        "double quantization, 0.52 bytes a parameter); embeddings, output head and norms keep --dtype. The reference is the "
        "quantized model; --lora_merge=true merges into the full-precision weights of --model_path, read again on the CPU "
        "for every checkpoint. Not with WDPO or --zero_stage=3",
        "none",
    )
    lora_merge: bool = flag(
        "checkpoints are whole models with the adapters merged in, for the next steps, and the adapters in their subfolder "
        "adapter; false: checkpoints are the adapters alone, for peft and vLLM",
        True,
    )
    packing: bool = flag(
        "true: micro-batches as one row without padding, each prompt once for its two answers; false: two padded rows a "
        "pair (default true; false for --wdpo_solver=exact, which needs padded rows)",
        None,
    )
    attn: Literal["auto", "sdpa", "flex", "flash", "eager"] = flag(
        "attention kernel: 'sdpa' torch's fused kernels, for packed rows group by group; 'flash' on CUDA, for packed rows "
        "torch's variable-length flash attention, one call a layer, checked against sdpa at the start, for padded ones "
        "transformers' flash_attention_2; 'flex' transformers' flex_attention, on CUDA with --packing=false; 'eager' matrix "
        "products and a float32 softmax, with --packing=false; 'auto' is eager for --wdpo_solver=exact, flash for packed "
        "bfloat16 rows on CUDA where it serves the model, except for WDPO, else sdpa. On CUDA backward passes add in no "
        "fixed order without --deterministic. The pass of --wdpo_solver=tangent along the gradient has kernels of its own, "
        "and in bfloat16 its runs attend in float32 unless 'flash' is passed",
        "auto",
    )
    optimizer_offload: bool = flag(
        "keep ZeRO's optimizer states in the CPU's memory and step there; --zero_stage 1 to 3", False
    )
    seed: int = flag("seed of the shuffling", 42)
    save_resume: bool = flag(
        "save DeepSpeed's state (12 to 16 bytes a parameter) with every checkpoint and on SIGTERM and SIGUSR1, to continue "
        "from; the newest two stay",
        True,
    )
    resume: Literal["auto", "never"] = flag(
        "'auto' continues the run in save_path; 'never' starts anew and replaces it", "auto"
    )
    log: str = flag(
        "comma-separated, of tensorboard and wandb, or none: where the figures of metrics.jsonl, which is always written, "
        "go besides; wandb is a package outside the locks and takes its own WANDB_* variables",
        "tensorboard",
    )
    check_only: bool = flag("check the flags and the inputs, then stop", False)
    dry_run: bool = flag("print what the run will do and the memory it will need, then stop; writes nothing", False)

    @property
    def method(self) -> str:
        """Which of the methods the flags choose: dpo, kldpo, wdpo or drdpo. For checks of flags; the trainer goes by
        drdpo.training.losses.Method."""
        if self.kldpo_tau is not None:
            return "kldpo"
        if self.wdpo_rho is not None:
            return "wdpo"
        return "drdpo" if self.drdpo_beta is not None else "dpo"

    @property
    def trackers(self) -> list[str]:
        """The names in --log, each once; none for `none`."""
        names = dict.fromkeys(name.strip() for name in self.log.split(","))
        return [name for name in names if name != "none"]

    @property
    def second_derivative(self) -> bool:
        """Does the run differentiate a gradient?"""
        return self.method == "wdpo" and self.solver == "exact"

    @property
    def solver(self) -> Literal["exact", "tangent"]:
        """WDPO's solver that the flags choose."""
        if self.wdpo_solver == "auto":
            return "tangent" if self.packing else "exact"
        return self.wdpo_solver

    @property
    def tangent(self) -> bool:
        """Is there a penalty, by the tangent solver?"""
        return self.method == "wdpo" and self.solver == "tangent"

    @property
    def wide_first_tokens(self) -> bool:
        """Are sequences' first tokens computed in float32? See drdpo.training.patches."""
        return self.tangent and self.dtype == "bfloat16"

    @property
    def prompt_once(self) -> bool:
        """Do packed rows have each prompt once for its two answers? Otherwise the penalty needs the gradients on its two
        copies."""
        return self.method != "wdpo" or self.wdpo_prompt == "once"

    @property
    def attention_kernel(self) -> Literal["sdpa", "flex", "flash", "eager"]:
        """The kernel that the flags choose, without a look at the machine: drdpo.training.memory puts flash in place of
        auto. Only eager has a second derivative."""
        if self.attn == "auto":
            return "eager" if self.second_derivative else "sdpa"
        return self.attn

    @property
    def attention(self) -> str:
        """What transformers calls the attention of the run."""
        if self.packing:
            return PACKED_ATTENTION
        return {"flex": "flex_attention", "flash": "flash_attention_2"}.get(self.attention_kernel, self.attention_kernel)

    @property
    def packed_flash(self) -> bool:
        """Do packed rows attend by drdpo.kernels.packed_attention?"""
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
        return self.micro_batch_size or (1 if self.method == "wdpo" else 4)

    def __post_init__(self) -> None:
        if isinstance(self.gradient_checkpointing, bool):
            object.__setattr__(self, "gradient_checkpointing", str(self.gradient_checkpointing).lower())
        if self.packing is None:
            object.__setattr__(self, "packing", not (self.method == "wdpo" and self.wdpo_solver == "exact"))
        check_bounds(self)
        _check_rules(self)


def _check_rules(config: TrainConfig) -> None:
    """Raise UsageError for flags that cannot be honoured together."""
    _check_method(config)
    require(
        config.label_smoothing == 0 or config.loss_type != "ipo",
        "--label_smoothing has no meaning for --loss_type=ipo; leave it out",
    )
    require(
        not (config.zero_stage == 0 and config.dtype == "bfloat16"),
        "--zero_stage=0 with --dtype=bfloat16 takes wrong steps in DeepSpeed; give --zero_stage=1 or --dtype=float32",
    )
    _check_lora(config)
    _check_log(config)
    _check_tokens(config)
    _check_attention(config)
    _check_speed(config)


def _check_log(config: TrainConfig) -> None:
    names = [name.strip() for name in config.log.split(",")]
    for name in names:
        require(name in ("tensorboard", "wandb", "none"), f"--log={config.log}: '{name}' is not tensorboard, wandb or none")
    require("none" not in names or len(names) == 1, f"--log={config.log}: none stands alone; leave it or the others out")


def _check_tokens(config: TrainConfig) -> None:
    if config.micro_batch_tokens is None:
        return
    require(config.micro_batch_size is None, "--micro_batch_tokens and --micro_batch_size exclude each other; give one")
    require(config.packing, "--micro_batch_tokens counts the tokens of packed rows; for padded ones pass --micro_batch_size")
    require(
        config.robust_scope == "step",
        "--micro_batch_tokens with --robust_scope=micro: the population would change with the lengths; give "
        "--micro_batch_size",
    )


def _check_attention(config: TrainConfig) -> None:
    require(
        not config.deterministic or config.packing or config.attn not in ("flex", "flash"),
        f"--deterministic=true with --attn={config.attn} and --packing=false: transformers' kernels do not follow torch's "
        "switch; pass --attn=sdpa",
    )
    require(
        not config.packing or config.attn not in ("flex", "eager"),
        f"--attn={config.attn}: packed rows attend by sdpa or flash; pass --attn=sdpa, or --packing=false as well",
    )
    require(
        config.attn != "flash" or config.dtype != "float32",
        "--attn=flash with --dtype=float32: flash attention knows 16-bit numbers only; pass --attn=sdpa",
    )


def _check_speed(config: TrainConfig) -> None:
    require(
        not (config.optimizer_offload and config.zero_stage == 0),
        "--optimizer_offload=true with --zero_stage=0: DeepSpeed offloads what ZeRO holds; give --zero_stage=1, 2 or 3",
    )


def _check_lora(config: TrainConfig) -> None:
    if config.lora_rank:
        require(
            config.lora_quantize == "none" or config.method != "wdpo",
            "--lora_quantize=nf4 with --wdpo_rho is not supported: in bfloat16 bitsandbytes rounds the float32 rows that "
            "WDPO's gradient needs; pass --lora_quantize=none",
        )
        require(
            config.lora_quantize == "none" or config.zero_stage <= 2,
            "--lora_quantize=nf4 with --zero_stage=3: DeepSpeed would split the 4-bit codes among the processes; give "
            "--zero_stage=2",
        )
        return
    for name, changed in (("lora_merge", not config.lora_merge), ("lora_quantize", config.lora_quantize != "none")):
        require(not changed, f"--{name} has no meaning without --lora_rank; pass that too")


def _check_method(config: TrainConfig) -> None:
    chosen = [name for name in ("kldpo_tau", "wdpo_rho", "drdpo_beta") if getattr(config, name) is not None]
    require(
        len(chosen) <= 1,
        f"{' and '.join(f'--{name}' for name in chosen)} choose different methods; give one of them",
    )
    _check_idle(config)
    if config.method != "wdpo":
        return
    require(
        config.wdpo_fraction == 1 or config.wdpo_penalty == "squared",
        f"--wdpo_fraction={config.wdpo_fraction} with --wdpo_penalty=root: the root of a sample's mean is not right on "
        "average; give --wdpo_penalty=squared or --wdpo_fraction=1",
    )
    if config.second_derivative:
        _check_exact(config)
    else:
        require(
            config.packing,
            "--packing=false with --wdpo_solver=tangent, which knows packed rows only; give --wdpo_solver=exact or "
            "--packing=true",
        )


def _check_idle(config: TrainConfig) -> None:
    """Refuse flags of a method that is not chosen, which would be without effect."""
    owners = {
        "wdpo_rho": ("wdpo_penalty", "wdpo_prompt", "wdpo_solver", "wdpo_fraction"),
        "kldpo_tau": ("kldpo_normalize",),
    }
    for strength, names in owners.items():
        for name in names if getattr(config, strength) is None else ():
            value = getattr(config, name)
            require(
                value == type(config).__dataclass_fields__[name].default,
                f"--{name}={value} has no meaning without --{strength}; give that too",
            )


def _check_exact(config: TrainConfig) -> None:
    require(
        not config.packing,
        "--packing=true with --wdpo_solver=exact, whose plain attention takes padded rows only; omit --packing, or "
        "pass --wdpo_solver=tangent",
    )
    require(
        config.attention_kernel == "eager",
        f"--attn={config.attn} with the exact solver of --wdpo_rho: its kernels have no second derivative, so the penalty "
        "would be wrong or fail; pass --attn=eager, or another --wdpo_solver",
    )
    require(
        config.zero_stage <= 2,
        f"--zero_stage=3 with --wdpo_solver={config.wdpo_solver}{', which is exact' * (config.wdpo_solver == 'auto')}: "
        "DeepSpeed's stage 3 cannot run its double backward; pass --wdpo_solver=tangent and --packing=true, or "
        "--zero_stage=2",
    )
