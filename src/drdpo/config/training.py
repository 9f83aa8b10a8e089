"""Flags of train_alignment.sh."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from drdpo.config.training_rules import check_training
from drdpo.flags import flag

if TYPE_CHECKING:
    from torch import Tensor

PACKED_ATTENTION = "shared_prefix"
"""What transformers calls drdpo.kernels.shared_prefix."""


@dataclass(frozen=True)
class TrainConfig:
    """Step 3: align a policy. At most one of --kldpo_tau, --wdpo_rho and --drdpo_beta; none of them is plain DPO."""

    model_path: str = flag("policy to align, also the frozen reference: a Hugging Face folder or hub id")
    dataset_path: str = flag("folder with train.jsonl and test.jsonl of preferences, or the hub id of a TRL-style data set")
    save_path: str = flag("folder for checkpoints global_step_<n>, metrics.jsonl and logs")
    kldpo_tau: float | None = flag("KLDPO with this temperature", None)
    wdpo_rho: float | None = flag("WDPO with this radius", None)
    drdpo_beta: float | None = flag("Dr. DPO with this temperature", None)
    kldpo_cap: float = flag("largest KLDPO weight", 10.0)
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
        "for packed rows of Llama, Mistral, Qwen2 and Qwen3; 'exact' a double backward, for any architecture; 'auto' is "
        "tangent for packed rows and exact for padded ones",
        "auto",
    )
    wdpo_fraction: float = flag(
        "share of a step's micro-batches (at least one) that carry the penalty, drawn again each step and rescaled to stay "
        "unbiased",
        1.0,
    )
    robust_scope: Literal["step", "micro"] = flag(
        "population of the robust weights, and of WDPO's root: all pairs of the optimizer step, or of one micro-batch over "
        "the ranks; 'micro' for KLDPO, Dr. DPO and --wdpo_penalty=root alone",
        "step",
    )
    loss_type: Literal["sigmoid", "ipo", "robust"] = flag("pointwise loss: DPO, IPO or rDPO", "sigmoid")
    label_smoothing: float = flag("cDPO's smoothing (sigmoid) or rDPO's flip rate (robust)", 0.0)
    beta: float = flag("strength of the KL leash to the reference", 0.01)
    learning_rate: float = flag("peak learning rate", 5e-7)
    warmup_ratio: float = flag("share of the steps that warm up linearly", 0.1)
    min_lr_ratio: float = flag("the cosine ends at this share of the peak", 0.1)
    adam_beta1: float = flag("AdamW", 0.9)
    adam_beta2: float = flag("AdamW", 0.95)
    weight_decay: float = flag("AdamW", 0.0)
    max_grad_norm: float = flag("gradient clipping", 1.0)
    max_epochs: int = flag("passes over the pairs", 8)
    max_steps: int | None = flag("stop after so many optimizer steps; the schedule spans them", None)
    train_batch_size: int = flag("pairs per optimizer step, over all processes", 128)
    micro_batch_size: int | None = flag(
        "pairs per process and forward pass (default 1 for WDPO, else 4; for packed rows on CUDA --micro_batch_tokens is "
        "the default instead)",
        None,
    )
    micro_batch_tokens: int | None = flag(
        "instead of --micro_batch_size: as many pairs per process and forward pass as fit a packed row of this many tokens, "
        "rows of about equal length (default on CUDA: what the GPU's memory holds by the preflight's prediction, at most "
        "16,384, and at least twice --max_len)",
        None,
    )
    max_len: int = flag(
        "longest prompt + answer in tokens; a longer answer is cut, a longer prompt sets the pair aside", 2048
    )
    max_test_pairs: int | None = flag("evaluate on the first N test pairs only", None)
    eval_steps: int = flag("evaluate on the test pairs every so many steps; 0 is at the end only", 79)
    save_steps: int = flag("save a checkpoint every so many steps; 0 is at the end only", 158)
    keep_checkpoints: int = flag(
        "keep so many of the newest checkpoints, and the one of least evaluation loss; 0 keeps all", 0
    )
    keep_steps: list[int] = flag("with --keep_checkpoints: steps whose checkpoints stay as well, e.g. 158 316", [])
    dtype: Literal["auto", "bfloat16", "float32"] = flag(
        "precision of the forward and backward pass; optimizer states are float32; 'auto' is bfloat16 on GPUs and on CPUs "
        "with fast bfloat16 products (AVX512_BF16, AMX), else float32",
        "auto",
    )
    zero_stage: int = flag("DeepSpeed ZeRO stage, 0 to 3", 2)
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
        "train LoRA adapters of this rank in place of the weights; 0 trains the weights. LoRA usually wants about ten times "
        "the --learning_rate",
        0,
    )
    lora_quantize: Literal["none", "nf4"] = flag(
        "'nf4' is QLoRA: with --lora_rank bitsandbytes holds the frozen linear layers of the decoder blocks in 4 bits (NF4, "
        "double quantization, 0.52 bytes a parameter); embeddings, output head and norms keep --dtype. The reference is the "
        "quantized model; --lora_merge=true merges into the full-precision weights of --model_path, read again on the CPU "
        "for every checkpoint. Not with WDPO, --zero_stage=3 or --torch_compile",
        "none",
    )
    lora_alpha: int = flag("LoRA's changes count --lora_alpha / --lora_rank", 32)
    lora_targets: list[str] = flag(
        "last names of the linear layers that get adapters, e.g. q_proj v_proj (default: all of the decoder blocks)", []
    )
    lora_merge: bool = flag(
        "checkpoints are whole models with the adapters merged in, for the next steps, and the adapters in their subfolder "
        "adapter; false: checkpoints are the adapters alone, for peft and vLLM",
        True,
    )
    packing: bool = flag(
        "micro-batches as one row without padding, each prompt once for its two answers; false: two padded rows a pair", True
    )
    attn: Literal["auto", "sdpa", "flex", "flash", "eager"] = flag(
        "attention kernel: 'sdpa' torch's fused kernels, for packed rows group by group (with a second derivative of our "
        "own for --wdpo_solver=exact); 'flash' on CUDA, for packed rows torch's variable-length flash attention, one call a "
        "layer, checked against sdpa at the start, for padded ones transformers' flash_attention_2; 'flex' transformers' "
        "flex_attention, on CUDA with --packing=false; 'eager' matrix products and a float32 softmax; 'auto' is flash for "
        "packed bfloat16 rows on CUDA where it serves the model, except for WDPO's exact and tangent solvers, eager for "
        "padded rows with --wdpo_solver=exact, else sdpa. On CUDA backward passes add in no fixed order without "
        "--deterministic. The pass of --wdpo_solver=tangent along the gradient has kernels of its own, and in bfloat16 its "
        "runs attend in float32 unless 'flash' is passed",
        "auto",
    )
    optimizer_offload: bool = flag(
        "keep ZeRO's optimizer states in the CPU's memory and step there; --zero_stage 1 to 3", False
    )
    torch_compile: bool = flag(
        "compile every decoder layer at its first use: of packed rows all but the attention, whose loop over the row's "
        "groups stays as it is; of padded rows the attention too; not the embeddings nor the output head; not for WDPO's "
        "exact and tangent solvers, nor --zero_stage=3",
        False,
    )
    seed: int = flag("seed of the shuffling", 42)
    save_resume: bool = flag(
        "save DeepSpeed's state (12 to 16 bytes a parameter) with every checkpoint and on SIGTERM and SIGUSR1, to continue "
        "from; the newest two stay",
        True,
    )
    comm_timeout: int = flag(
        "seconds that processes wait for one that does not answer, before the run ends with an error; the waits for a "
        "checkpoint to be written are longer",
        1800,
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

    def own_losses(self, margins_B: "Tensor") -> "Tensor | None":
        """[B] differentiable losses of margins [B], for a method of your own (docs/own.md); None is --loss_type's."""
        return None

    def own_weights(self, losses_B: "Tensor", population_P: "Tensor") -> "Tensor | None":
        """[B] detached weights of losses [B] in a population [P], for a method of your own (docs/own.md); None is 1."""
        return None

    @property
    def own_name(self) -> dict[str, str]:
        """For manifests: the name of a method of your own, which no flag gives."""
        return {} if type(self) is TrainConfig else {"method": self.method}

    @property
    def weighted(self) -> bool:
        """Does a pair's weight depend on the other pairs' losses?"""
        return self.method in ("kldpo", "drdpo") or type(self).own_weights is not TrainConfig.own_weights

    @property
    def method(self) -> str:
        """The robust method that the flags choose: dpo, kldpo, wdpo or drdpo."""
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
    def wide_first_tokens(self) -> bool:
        """Are sequences' first tokens computed in float32? See drdpo.training.wide_rows."""
        return self.method == "wdpo" and self.solver == "tangent" and self.dtype == "bfloat16"

    @property
    def attention_kernel(self) -> Literal["sdpa", "flex", "flash", "eager"]:
        """The kernel that the flags choose, without a look at the machine: drdpo.training.automatic puts flash in place of
        auto. For padded rows sdpa, flex and flash have no second derivative."""
        if self.attn == "auto":
            return "eager" if self.second_derivative and not self.packing else "sdpa"
        return self.attn

    @property
    def attention(self) -> str:
        """What transformers calls the attention of the run."""
        if self.packing:
            return PACKED_ATTENTION
        return {"flex": "flex_attention", "flash": "flash_attention_2"}.get(self.attention_kernel, self.attention_kernel)

    @property
    def packed_flash(self) -> bool:
        """Do packed rows attend by drdpo.kernels.varlen_attention?"""
        return self.packing and self.attention_kernel == "flash"

    @property
    def plain_attention(self) -> bool:
        """Attend by matrix products and a softmax, which are differentiable any number of times?"""
        return self.attention_kernel == "eager"

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
        check_training(self)
