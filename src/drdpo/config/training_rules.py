"""Which flags of train_alignment.sh cannot be honoured, alone or together."""

from typing import TYPE_CHECKING

from drdpo.flags import require

if TYPE_CHECKING:
    from drdpo.config.training import TrainConfig


def check_training(config: "TrainConfig") -> None:
    """Raise UsageError for flags of a training run that cannot be honoured, alone or together."""
    _check_method(config)
    for name in ("beta", "learning_rate", "max_grad_norm", "kldpo_cap"):
        require(getattr(config, name) > 0, f"--{name}={getattr(config, name)} must be positive")
    for name in (
        "max_epochs",
        "train_batch_size",
        "max_len",
        "max_steps",
        "max_test_pairs",
        "micro_batch_size",
        "micro_batch_tokens",
    ):
        value = getattr(config, name)
        require(value is None or value >= 1, f"--{name}={value} must be at least 1")
    for name in ("warmup_ratio", "min_lr_ratio"):
        require(0 <= getattr(config, name) <= 1, f"--{name}={getattr(config, name)} must lie in [0, 1]")
    for name in ("adam_beta1", "adam_beta2"):
        require(0 <= getattr(config, name) < 1, f"--{name}={getattr(config, name)} must lie in [0, 1)")
    for name in ("eval_steps", "save_steps", "weight_decay", "keep_checkpoints"):
        require(getattr(config, name) >= 0, f"--{name}={getattr(config, name)} must not be negative")
    require(0 <= config.label_smoothing < 0.5, f"--label_smoothing={config.label_smoothing} must lie in [0, 0.5)")
    require(
        config.label_smoothing == 0 or config.loss_type != "ipo",
        "--label_smoothing has no meaning for --loss_type=ipo; leave it out",
    )
    require(config.zero_stage in (0, 1, 2, 3), f"--zero_stage={config.zero_stage}: DeepSpeed has stages 0, 1, 2 and 3")
    require(
        not (config.zero_stage == 0 and config.dtype == "bfloat16"),
        "--zero_stage=0 with --dtype=bfloat16 takes wrong steps in DeepSpeed; give --zero_stage=1 or --dtype=float32",
    )

    _check_saving(config)
    _check_lora(config)
    _check_log(config)
    _check_tokens(config)
    _check_attention(config)
    _check_speed(config)


def _check_saving(config: "TrainConfig") -> None:
    require(config.comm_timeout >= 1, f"--comm_timeout={config.comm_timeout} must be at least 1")
    require(
        config.keep_checkpoints > 0 or not config.keep_steps,
        "--keep_steps has no meaning without --keep_checkpoints, as all stay; give that too",
    )
    for step in config.keep_steps:
        saved = config.save_steps and step % config.save_steps == 0
        require(
            step > 0 and (saved or step == config.max_steps or config.max_steps is None),
            f"--keep_steps={step}: no checkpoint is saved after that step; --save_steps={config.save_steps}",
        )


def _check_log(config: "TrainConfig") -> None:
    names = [name.strip() for name in config.log.split(",")]
    for name in names:
        require(name in ("tensorboard", "wandb", "none"), f"--log={config.log}: '{name}' is not tensorboard, wandb or none")
    require("none" not in names or len(names) == 1, f"--log={config.log}: none stands alone; leave it or the others out")


def _check_tokens(config: "TrainConfig") -> None:
    if config.micro_batch_tokens is None:
        return
    require(config.micro_batch_size is None, "--micro_batch_tokens and --micro_batch_size exclude each other; give one")
    require(config.packing, "--micro_batch_tokens counts the tokens of packed rows; leave out --packing=false")
    require(
        config.robust_scope == "step",
        "--micro_batch_tokens with --robust_scope=micro: the population would change with the lengths; give "
        "--micro_batch_size",
    )


def _check_attention(config: "TrainConfig") -> None:
    require(
        not config.deterministic or config.packing or config.attn not in ("flex", "flash"),
        f"--deterministic=true with --attn={config.attn} and --packing=false: transformers' kernels do not follow torch's "
        "switch; pass --attn=sdpa",
    )
    if config.attn not in ("flex", "flash"):
        return
    require(
        not config.packing or config.attn == "flash",
        f"--attn={config.attn}: packed rows attend by sdpa, flash or eager; give --attn=sdpa, or --packing=false as well",
    )
    require(
        config.attn == "flex" or config.dtype != "float32",
        "--attn=flash with --dtype=float32: flash attention knows 16-bit numbers only; give --attn=sdpa",
    )


def _check_speed(config: "TrainConfig") -> None:
    require(
        not (config.optimizer_offload and config.zero_stage == 0),
        "--optimizer_offload=true with --zero_stage=0: DeepSpeed offloads what ZeRO holds; give --zero_stage=1, 2 or 3",
    )
    if not config.torch_compile:
        return
    require(
        config.zero_stage <= 2,
        "--torch_compile=true with --zero_stage=3: compiled layers do not fetch their weights; give --zero_stage=2",
    )
    require(
        not config.second_derivative,
        "--torch_compile=true with --wdpo_solver=exact: compiled layers have no second derivative; leave out "
        "--torch_compile",
    )
    require(
        config.method != "wdpo" or config.solver != "tangent",
        "--torch_compile=true with --wdpo_solver=tangent: its pass along the gradient does not call the layers; leave out "
        "--torch_compile",
    )


def _check_lora(config: "TrainConfig") -> None:
    require(config.lora_rank >= 0, f"--lora_rank={config.lora_rank} must not be negative")
    require(config.lora_alpha > 0, f"--lora_alpha={config.lora_alpha} must be positive")
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
        require(
            config.lora_quantize == "none" or not config.torch_compile,
            "--lora_quantize=nf4 with --torch_compile=true: compiling 4-bit layers is not supported; leave out one of them",
        )
        return
    given = {
        "lora_alpha": config.lora_alpha != 32, "lora_targets": config.lora_targets, "lora_merge": not config.lora_merge,
        "lora_quantize": config.lora_quantize != "none",
    }  # fmt: skip
    for name, changed in given.items():
        require(not changed, f"--{name} has no meaning without --lora_rank; give that too")


def _check_method(config: "TrainConfig") -> None:
    chosen = {
        name: value for name in ("kldpo_tau", "wdpo_rho", "drdpo_beta") if (value := getattr(config, name)) is not None
    }
    require(
        len(chosen) <= 1,
        f"{' and '.join(f'--{name}' for name in chosen)} choose different methods; give one of them",
    )
    for name, value in chosen.items():
        require(value > 0, f"--{name}={value} must be positive (leave it out for plain DPO)")
    _check_idle(config)
    _check_scope(config)
    if config.method != "wdpo":
        return
    require(0 < config.wdpo_fraction <= 1, f"--wdpo_fraction={config.wdpo_fraction} must lie in (0, 1]")
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


def _check_idle(config: "TrainConfig") -> None:
    """Refuse flags of a method that is not chosen, which would be without effect."""
    owners = {
        "wdpo_rho": ("wdpo_penalty", "wdpo_prompt", "wdpo_solver", "wdpo_fraction"),
        "kldpo_tau": ("kldpo_cap", "kldpo_normalize"),
    }
    for strength, names in owners.items():
        for name in names if getattr(config, strength) is None else ():
            value = getattr(config, name)
            require(
                value == type(config).__dataclass_fields__[name].default,
                f"--{name}={value} has no meaning without --{strength}; give that too",
            )
    require(
        not config.kldpo_normalize or config.kldpo_cap == type(config).__dataclass_fields__["kldpo_cap"].default,
        f"--kldpo_cap={config.kldpo_cap} with --kldpo_normalize=true: Algorithm 2's weights have no cap; leave one out",
    )


def _check_scope(config: "TrainConfig") -> None:
    """Refuse a population where no pair's term depends on the other pairs."""
    if config.weighted or (config.method == "wdpo" and config.wdpo_penalty == "root"):
        return
    name = "WDPO with --wdpo_penalty=squared" if config.method == "wdpo" else "plain DPO"
    require(
        config.robust_scope == "step",
        f"--robust_scope={config.robust_scope} has no meaning for {name}, where no pair's term depends on the other pairs; "
        "leave it out, or choose a method with a population: --kldpo_tau, --drdpo_beta, or --wdpo_penalty=root",
    )


def _check_exact(config: "TrainConfig") -> None:
    require(
        config.plain_attention or (config.packing and config.attention_kernel == "sdpa"),
        f"--attn={config.attn} with the exact solver of --wdpo_rho: its kernels have no second derivative, so the penalty "
        "would be wrong or fail; give --attn=eager, or another --wdpo_solver",
    )
    require(
        config.zero_stage <= 2,
        f"--zero_stage=3 with --wdpo_solver={config.wdpo_solver}{', which is exact' * (config.wdpo_solver == 'auto')}: "
        "DeepSpeed's stage 3 cannot run its double backward; give "
        f"--wdpo_solver=tangent{'' if config.packing else ' and --packing=true'}, or --zero_stage=2",
    )
