"""What the trainer refuses, through its command line: one line, the right exit status, nothing written."""

import subprocess
import sys
from collections.abc import Callable

import pytest
from harness.runs import refuse, train

from drdpo import distributed
from drdpo.cli import parse
from drdpo.config.training import TrainConfig
from drdpo.errors import UsageError
from drdpo.folder import lock_folder, write_manifest
from drdpo.machine import settle
from drdpo.training.checkpoint import write_index
from drdpo.training.losses import method_of
from drdpo.training.run import _made_by, check_inputs, open_run


@pytest.fixture
def words_of(tiny_policy, data, tmp_path) -> Callable[..., list[str]]:
    """A command line of these flags, into tmp_path/out."""
    return lambda *flags: [f"--model_path={tiny_policy}", f"--dataset_path={data}", f"--save_path={tmp_path / 'out'}",
                           "--train_batch_size=4", *flags]  # fmt: skip


@pytest.fixture
def check(forks, tiny_policy, data, tmp_path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """The command with --check_only."""
    common = {"model_path": tiny_policy, "dataset_path": data, "save_path": tmp_path / "out", "train_batch_size": 4}
    return lambda world=1, **flags: train(forks, common | flags | {"check_only": True}, WORLD_SIZE=str(world))


ROBUST, WDPO = "--kldpo_tau=0.1", "--wdpo_rho=0.1"
EXACT = (WDPO, "--wdpo_solver=exact")
QLORA = ("--lora_rank=4", "--lora_quantize=nf4")
REFUSED = {
    (ROBUST, WDPO): ["--kldpo_tau and --wdpo_rho"],
    ("--kldpo_tau=0",): ["--kldpo_tau=0.0"],
    ("--wdpo_rho=-1",): ["--wdpo_rho=-1.0"],
    ("--drdpo_beta=nan",): ["--drdpo_beta=nan"],
    ("--beta=0",): ["--beta=0.0"],
    ("--test_share=0.1", "--test_split=b"): ["--test_share and --test_split", "pass one"],
    ("--test_share=1",): ["--test_share=1.0"],
    ("--max_test_pairs=0",): ["--max_test_pairs=0"],
    ("--label_smoothing=0.5",): ["--label_smoothing"],
    ("--loss_type=ipo", "--label_smoothing=0.1"): ["--label_smoothing"],
    ("--method=cvar",): ["--method=cvar: write --method=cvar:SHARE"],
    ("--method=dpo:1",): ["no method is called dpo", "tv, chi2", "--kldpo_tau"],
    ("--method=cvar:nan",): ["share is nan", "(0, 1]"],
    ("--method=cvar:0",): ["share is 0"],
    ("--method=tv:1.5",): ["radius is 1.5", "[0, 1]"],
    ("--method=ropo:-1",): ["alpha is -1", "(0, 1e+06]"],
    ("--method=ropo:1e200",): ["alpha is 1e200", "(0, 1e+06]"],
    ("--method=chi2:1,2",): ["--method=chi2:RADIUS"],
    ("--method=group:0.1",): ["--group_column"],
    ("--group_column=domain", "--method=tv:0.1"): ["--method=group and --group_column"],
    ("--weight_column=rejected_tokens",): ["--weight_column=rejected_tokens names a column of other numbers"],
    ("--method=group:1", "--group_column=chosen_tokens"): ["--group_column=chosen_tokens names a column of other numbers"],
    ("--method=group:1", "--group_column=g", "--weight_column=g"): ["--weight_column=g names a column of other numbers"],
    ("--method=tv:0.1", ROBUST): ["--kldpo_tau and --method"],
    ("--method=ropo:14", "--loss_type=ipo"): ["--loss_type=ipo", "a loss of its own"],
    ("--method=holder:2", "--label_smoothing=0.1"): ["--label_smoothing=0.1"],
    ("--method=ropo:14", "--robust_scope=micro"): ["--robust_scope=micro", "ROPO"],
    ("--method=cvar:0.5", "--train_batch_size=1", "--micro_batch_size=1"): ["population of one pair"],
    ("--method=group:0.1", "--group_column=g", "--robust_scope=micro"): ["group DRO", "once a step"],
    (WDPO, "--loss_type=sigmoid_norm"): ["--loss_type=sigmoid_norm", "--wdpo_solver=exact"],
    ("--loss_type=ipo_norm", "--label_smoothing=0.1"): ["--label_smoothing"],
    ("--eval_columns=,",): ["--eval_columns names no field"],
    ("--eval_mixture=safe",): ["NAME=OBJECTIVE:WEIGHT"],
    ("--eval_mixture=a b=x:1",): ["NAME=OBJECTIVE:WEIGHT"],
    ("--eval_mixture=safe=x:much",): ["'much' is not a number"],
    ("--eval_mixture=safe=x:-1,y:2",): ["not negative"],
    ("--eval_mixture=safe=x:0.5",): ["sum to 0.5, not to 1"],
    ("--eval_mixture", "a=x:1", "a=y:1"): ["two mixtures have the same name"],
    ("--train_batch_size=6", "--micro_batch_size=4"): ["--train_batch_size=6", "--micro_batch_size=4"],
    (ROBUST, "--train_batch_size=1", "--micro_batch_size=1"): ["population of one pair"],
    ("--drdpo_beta=1", "--micro_batch_size=1", "--robust_scope=micro"): ["population of one pair"],
    ("--robust_scope=micro",): ["--robust_scope=micro", "DPO"],
    ("--robust_scope=micro", WDPO): ["--robust_scope=micro", "root"],
    (WDPO, "--wdpo_fraction=0.1", "--micro_batch_size=1"): ["--wdpo_fraction=0.1 of 4", "0.25"],
    (WDPO, "--wdpo_fraction=1.5"): ["(0, 1]"],
    (WDPO, "--wdpo_fraction=0.5", "--wdpo_penalty=root"): ["root of a sample"],
    **{
        (flag,): [f"{flag} has no meaning without --wdpo_rho"]
        for flag in ("--wdpo_solver=exact", "--wdpo_penalty=root", "--wdpo_prompt=once", "--wdpo_fraction=0.5")
    },
    ("--kldpo_normalize=true",): ["--kldpo_normalize=true has no meaning without --kldpo_tau"],
    ("--lora_rank=-1",): ["--lora_rank=-1"],
    ("--lora_merge=false",): ["--lora_merge=false has no meaning"],
    ("--lora_quantize=nf4",): ["--lora_quantize=nf4 has no meaning without --lora_rank"],
    (*QLORA, "--zero_stage=3"): ["--lora_quantize=nf4 with --zero_stage=3", "--zero_stage=2"],
    (*QLORA, WDPO): ["--lora_quantize=nf4 with --wdpo_rho", "--lora_quantize=none"],
    (WDPO, "--wdpo_solver=tangent", "--packing=false"): ["--packing=false"],
    (WDPO, "--packing=false", "--zero_stage=3"): ["auto, which is exact", "--wdpo_solver=tangent and --packing=true"],
    (*EXACT, "--packing=true"): ["padded rows only", "--wdpo_solver=tangent"],
    (*EXACT, "--micro_batch_tokens=9"): ["--micro_batch_size"],
    (*EXACT, "--zero_stage=3"): ["--zero_stage=3", "--zero_stage=2", "--wdpo_solver=tangent"],
    (*EXACT, "--attn=flash", "--dtype=bfloat16"): ["second derivative"],
    (WDPO, "--packing=false", "--attn=flash"): ["second derivative", "eager"],
    (WDPO, "--packing=false", "--attn=sdpa"): ["second derivative", "--attn=eager"],
    ("--attn=flex",): ["--attn=flex: packed rows", "--attn=sdpa", "--packing=false"],
    ("--attn=eager",): ["--attn=eager: packed rows"],
    ("--attn=flex", "--packing=false"): ["--attn=flex needs a CUDA device", "--attn=sdpa"],
    ("--attn=flash", "--packing=false"): ["--attn=flash needs", "--attn=sdpa"],
    ("--attn=flash", "--dtype=float32"): ["16-bit"],
    ("--optimizer_offload=true", "--zero_stage=0", "--dtype=float32"): ["--optimizer_offload=true", "--zero_stage=1"],
    ("--zero_stage=0", "--dtype=bfloat16"): ["--zero_stage=0", "bfloat16"],
}


def check_flags(words: list[str]) -> None:
    config = parse(TrainConfig, "", words)
    check_inputs(config, method_of(config))


@pytest.mark.parametrize("flags", REFUSED, ids=" ".join)
def test_flags_that_cannot_be_honoured_are_refused(flags, words_of, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "use_cuda", lambda: False)
    with pytest.raises((UsageError, SystemExit)) as refused:
        check_flags(words_of(*flags))
    line = str(refused.value) if refused.type is UsageError else capsys.readouterr().err
    for word in REFUSED[flags]:
        assert word in line, line


def test_flash_attention_that_is_not_installed_is_refused(words_of, monkeypatch):
    monkeypatch.setattr(distributed, "use_cuda", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="flash-attn, which is not installed"):
        check_flags(words_of("--attn=flash", "--packing=false", "--dtype=bfloat16"))


def test_the_first_test_pairs_alone_are_evaluated(words_of):
    config = parse(TrainConfig, "", words_of("--max_test_pairs=2"))
    run = open_run(config, method_of(config))
    assert (len(run.train), len(run.test)) == (10, 2)


def test_wrong_commands_end_before_the_launcher_in_one_line(check, tmp_path):
    """And a second run into one folder, while the first lives."""
    refuse(check(kldpo_tua=0.1), 2, "--kldpo_tua")
    refuse(check(world=3, micro_batch_size=1), 2, "3 processes")
    refuse(check(train_batch_size=16), 1, "10 usable train pairs")
    assert not (tmp_path / "out").exists()
    with lock_folder(tmp_path / "out"):
        refuse(check(), 2, "is locked by process", str(tmp_path / "out"))
    assert check().returncode == 0
    (tmp_path / "file").write_text("")
    refuse(check(save_path=tmp_path / "file"), 1, "is a file, not a folder")


def test_a_run_with_other_flags_or_processes_is_refused_before_the_launcher(check, words_of, tmp_path):
    out, micro = tmp_path / "out", {"kldpo_tau": 0.1, "robust_scope": "micro"}

    def there(**flags) -> None:
        """Record a run of these flags in the folder."""
        meant, _ = settle(parse(TrainConfig, "", words_of(*[f"--{name}={value}" for name, value in flags.items()])))
        write_manifest(out, "train", {**_made_by(meant, method_of(meant)), "pairs": "x"})

    there()
    assert check().returncode == 0
    refuse(check(beta=0.5), 2, "beta (0.01 -> 0.5)")
    assert check(beta=0.5, resume="never").returncode == 0
    assert check(micro_batch_size=2).returncode == 0, "changes roundings alone"
    for flags, before, now in (({"wdpo_rho": 0.1, "wdpo_fraction": 0.5}, 1, 2), (micro, 2, 4)):
        there(**flags, micro_batch_size=before)
        refuse(check(**flags, micro_batch_size=now), 2, f"micro_batch_size ({before} -> {now})")
    (out / "resume" / "step_1").mkdir(parents=True)
    write_index(out / "resume" / "step_1", 1, 2, {})
    there()
    assert check().returncode == 0, "another number of processes changes roundings alone"
    there(**micro)
    refuse(check(**micro), 2, "2 processes", "--robust_scope=micro another")
    there()
    (out / "resume" / "step_1" / "state.json").unlink()
    assert check().returncode == 0, "a state that is not whole hinders no run"


def test_checks_pass_without_the_libraries_of_training(root, words_of):
    """The check runs before the launcher, so it must be quick."""
    program = (
        "import sys; sys.modules |= dict.fromkeys(('deepspeed', 'peft', 'datasets', 'bitsandbytes')); "
        f"import runpy; runpy.run_path({str(root / 'src/train_alignment.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program, *words_of("--check_only=true")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
