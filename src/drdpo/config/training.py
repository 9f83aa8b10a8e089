"""Flags of train_alignment.sh."""

from dataclasses import dataclass
from typing import Literal

from drdpo.flags import flag, require

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
    wdpo_solver: Literal["auto", "exact", "tangent", "finite_difference", "adversarial"] = flag(
        "the penalty's parameter gradient by: 'exact' a double backward; 'tangent' the same numbers by a forward pass along "
        "the gradient and an ordinary backward pass, in a third of the memory, for Llama-like models; 'finite_difference' "
        "two passes beside the point (float32 only); 'adversarial' one pass at the embeddings moved by 2 rho grad, right to "
        "first order in rho only (float32 only); 'auto' is tangent for packed rows and exact for padded ones",
        "auto",
    )
    wdpo_fraction: float = flag(
        "share of a step's pairs, drawn anew each step, that carry the penalty, scaled up so that it is right on average",
        1.0,
    )
    robust_scope: Literal["step", "micro"] = flag(
        "population of the robust weights: all pairs of the optimizer step, or of one micro-batch over the ranks", "step"
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
    micro_batch_size: int | None = flag("pairs per process and forward pass (default 1 for WDPO, else 4)", None)
    max_len: int = flag(
        "longest prompt + answer in tokens; a longer answer is cut, a longer prompt sets the pair aside", 2048
    )
    eval_steps: int = flag("evaluate on the test pairs every so many steps; 0 is at the end only", 79)
    save_steps: int = flag("save a checkpoint every so many steps; 0 is at the end only", 158)
    dtype: Literal["bfloat16", "float32"] = flag(
        "precision of the forward and backward pass; optimizer states are float32", "bfloat16"
    )
    zero_stage: int = flag("DeepSpeed ZeRO stage, 0 to 3", 2)
    gradient_checkpointing: bool = flag("recompute activations in the backward pass", True)
    lora_rank: int = flag(
        "train LoRA adapters of this rank in place of the weights; 0 trains the weights. LoRA usually wants about ten times "
        "the --learning_rate",
        0,
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
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = flag(
        "for --packing=false; 'auto' is eager for WDPO's double backward, else sdpa", "auto"
    )
    seed: int = flag("seed of the shuffling", 42)
    save_resume: bool = flag("save DeepSpeed's state with every checkpoint (12 bytes a parameter), to continue from", True)
    resume: Literal["auto", "never"] = flag(
        "'auto' continues the run in save_path; 'never' starts anew and replaces it", "auto"
    )
    check_only: bool = flag("check the flags and the inputs, then stop", False)
    dry_run: bool = flag("print what the run will do and the memory it will need, then stop; writes nothing", False)

    @property
    def method(self) -> Literal["dpo", "kldpo", "wdpo", "drdpo"]:
        """The robust method that the flags choose."""
        if self.kldpo_tau is not None:
            return "kldpo"
        if self.wdpo_rho is not None:
            return "wdpo"
        return "drdpo" if self.drdpo_beta is not None else "dpo"

    @property
    def second_derivative(self) -> bool:
        """Does the run differentiate a gradient?"""
        return self.method == "wdpo" and self.solver == "exact"

    @property
    def solver(self) -> Literal["exact", "tangent", "finite_difference", "adversarial"]:
        """WDPO's solver that the flags choose."""
        if self.wdpo_solver == "auto":
            return "tangent" if self.packing else "exact"
        return self.wdpo_solver

    @property
    def penalised(self) -> int:
        """Pairs of a step that carry WDPO's penalty."""
        return max(1, round(self.wdpo_fraction * self.train_batch_size))

    @property
    def penalty_scale(self) -> float:
        """The inverse of the chance that a pair carries the penalty."""
        return self.train_batch_size / self.penalised

    @property
    def attention(self) -> str:
        """The attention that is right for the method: sdpa and flash kernels have no second derivative."""
        if self.packing:
            return PACKED_ATTENTION
        if self.attn_implementation == "auto":
            return "eager" if self.second_derivative else "sdpa"
        return self.attn_implementation

    @property
    def micro_batch(self) -> int:
        """Pairs per process and forward pass."""
        return self.micro_batch_size or (1 if self.method == "wdpo" else 4)

    def __post_init__(self) -> None:
        self._check_method()
        for name in ("beta", "learning_rate", "max_grad_norm", "kldpo_cap"):
            require(getattr(self, name) > 0, f"--{name}={getattr(self, name)} must be positive")
        for name in ("max_epochs", "train_batch_size", "max_len", "max_steps", "micro_batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name}={value} must be at least 1")
        for name in ("warmup_ratio", "min_lr_ratio"):
            require(0 <= getattr(self, name) <= 1, f"--{name}={getattr(self, name)} must lie in [0, 1]")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, f"--{name}={getattr(self, name)} must lie in [0, 1)")
        for name in ("eval_steps", "save_steps", "weight_decay"):
            require(getattr(self, name) >= 0, f"--{name}={getattr(self, name)} must not be negative")
        require(0 <= self.label_smoothing < 0.5, f"--label_smoothing={self.label_smoothing} must lie in [0, 0.5)")
        require(
            self.label_smoothing == 0 or self.loss_type != "ipo",
            "--label_smoothing has no meaning for --loss_type=ipo; leave it out",
        )
        require(self.zero_stage in (0, 1, 2, 3), f"--zero_stage={self.zero_stage}: DeepSpeed has stages 0, 1, 2 and 3")
        require(
            not (self.zero_stage == 0 and self.dtype == "bfloat16"),
            "--zero_stage=0 with --dtype=bfloat16 takes wrong steps in DeepSpeed; give --zero_stage=1 or --dtype=float32",
        )

        self._check_lora()
        require(
            not self.packing or self.attn_implementation == "auto",
            f"--attn_implementation={self.attn_implementation}: packed rows have an attention of their own; give "
            "--packing=false as well",
        )

    def _check_lora(self) -> None:
        require(self.lora_rank >= 0, f"--lora_rank={self.lora_rank} must not be negative")
        require(self.lora_alpha > 0, f"--lora_alpha={self.lora_alpha} must be positive")
        if self.lora_rank:
            return
        given = {"lora_alpha": self.lora_alpha != 32, "lora_targets": self.lora_targets, "lora_merge": not self.lora_merge}
        for name, changed in given.items():
            require(not changed, f"--{name} has no meaning without --lora_rank; give that too")

    def _check_method(self) -> None:
        chosen = {
            name: value for name in ("kldpo_tau", "wdpo_rho", "drdpo_beta") if (value := getattr(self, name)) is not None
        }
        require(
            len(chosen) <= 1,
            f"{' and '.join(f'--{name}' for name in chosen)} choose different methods; give one of them",
        )
        for name, value in chosen.items():
            require(value > 0, f"--{name}={value} must be positive (leave it out for plain DPO)")
        if self.method != "wdpo":
            return
        require(0 < self.wdpo_fraction <= 1, f"--wdpo_fraction={self.wdpo_fraction} must lie in (0, 1]")
        require(
            self.wdpo_fraction == 1 or self.wdpo_penalty == "squared",
            f"--wdpo_fraction={self.wdpo_fraction} with --wdpo_penalty=root: the root of a sample's mean is not right on "
            "average; give --wdpo_penalty=squared or --wdpo_fraction=1",
        )
        require(
            self.wdpo_fraction == 1 or self.zero_stage <= 2,
            f"--wdpo_fraction={self.wdpo_fraction} with --zero_stage=3: processes with and without a penalised pair would "
            "ask each other for different weights; give --zero_stage=2 or --wdpo_fraction=1",
        )
        if self.second_derivative:
            self._check_exact()
        else:
            self._check_first_order()

    def _check_exact(self) -> None:
        require(
            self.packing or self.attention == "eager",
            f"--attn_implementation={self.attention} with --wdpo_rho: its kernels have no second derivative, so the exact "
            "penalty would be wrong or fail; give --attn_implementation=eager",
        )
        require(
            self.zero_stage <= 2,
            "--zero_stage=3 with --wdpo_solver=exact: DeepSpeed's stage 3 cannot run its double backward; give "
            "--wdpo_solver=tangent or --zero_stage=2",
        )

    def _check_first_order(self) -> None:
        if self.solver == "tangent":
            require(
                self.packing,
                "--packing=false with --wdpo_solver=tangent, which knows packed rows only; give --wdpo_solver=exact or "
                "--packing=true",
            )
            return
        require(
            self.dtype == "float32",
            f"--wdpo_solver={self.wdpo_solver} with --dtype=bfloat16: the step that curvature allows is lost in bfloat16's "
            "rounding (28% error at best, measured); give --wdpo_solver=tangent or --dtype=float32",
        )
