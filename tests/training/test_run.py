"""What the trainer refuses, through its command line: one line, the right exit status, nothing written."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from harness.forks import Forks

from drdpo.config import TrainConfig
from drdpo.errors import UsageError
from drdpo.training.losses import method_of
from drdpo.training.run import open_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("preference data")
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 4)
    return folder


def train(forks: Forks, model: Path, data: Path, save: Path, *flags: str, world: int = 1):
    command = [sys.executable, ROOT / "src/train_alignment.py", f"--model_path={model}", f"--dataset_path={data}",
               f"--save_path={save}", "--train_batch_size=4", "--check_only=true", *flags]  # fmt: skip
    return forks.run(command, {**os.environ, "DS_ACCELERATOR": "cpu", "WORLD_SIZE": str(world)})


def refuse(done, status: int, *words: str) -> None:
    assert done.returncode == status, done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ") or ": error: " in lines[-1], done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[-1], lines[-1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--kldpo_tua=0.1"], ["unrecognized arguments", "--kldpo_tua"]),
        (["--kldpo_t=0.1"], ["unrecognized arguments"]),
        (["--kldpo_tau=0.1", "--wdpo_rho=0.1"], ["--kldpo_tau and --wdpo_rho"]),
        (["--kldpo_tau=0"], ["--kldpo_tau=0.0 must be positive"]),
        (["--wdpo_rho=-1"], ["--wdpo_rho=-1.0 must be positive"]),
        (["--drdpo_beta=nan"], ["--drdpo_beta=nan is not a finite number"]),
        (["--beta=0"], ["--beta=0.0 must be positive"]),
        (["--beta=fast"], ["invalid float value"]),
        (["--train_batch_size=6", "--micro_batch_size=4"], ["--train_batch_size=6", "--micro_batch_size=4"]),
        (["--kldpo_tau=0.1", "--train_batch_size=1", "--micro_batch_size=1"], ["population of one pair"]),
        (["--drdpo_beta=1", "--micro_batch_size=1", "--robust_scope=micro"], ["population of one pair"]),
        (["--robust_scope=micro"], ["--robust_scope=micro has no meaning for DPO", "leave it out"]),
        (["--robust_scope=micro", "--wdpo_rho=0.1"], ["no meaning for WDPO", "--wdpo_penalty=root"]),
        (["--wdpo_rho=0.1", "--packing=false", "--attn=flash"], ["second derivative", "eager"]),
        (["--wdpo_rho=0.1", "--packing=false", "--attn=sdpa"], ["second derivative"]),
        (["--attn=flex"], ["--attn=flex: packed rows", "--attn=sdpa", "--packing=false"]),
        (["--wdpo_rho=0.1", "--wdpo_solver=exact", "--packing=true"], ["padded rows only", "--wdpo_solver=tangent"]),
        (["--attn=flex", "--packing=false"], ["--attn=flex needs a CUDA device", "--attn=sdpa"]),
        (["--attn=flash", "--packing=false"], ["--attn=flash needs", "--attn=sdpa"]),
        (["--attn=flash_attention_2"], ["invalid choice"]),
        (["--optimizer_offload=true", "--zero_stage=0", "--dtype=float32"], ["--optimizer_offload=true", "--zero_stage=1"]),
        (["--wdpo_rho=0.1", "--wdpo_solver=exact", "--zero_stage=3"], ["--zero_stage=3", "--zero_stage=2"]),
        (["--wdpo_rho=0.1", "--wdpo_fraction=0.1", "--micro_batch_size=1"], ["--wdpo_fraction=0.1 of 4", "0.25 or more"]),
        (["--zero_stage=0", "--dtype=bfloat16"], ["--zero_stage=0", "bfloat16"]),
        (["--loss_type=ipo", "--label_smoothing=0.1"], ["--label_smoothing"]),
        (["--label_smoothing=0.5"], ["--label_smoothing"]),
    ],
)  # fmt: skip
def test_a_wrong_command_ends_with_status_2(flags, words, forks, tiny_policy, data, tmp_path):
    refuse(train(forks, tiny_policy, data, tmp_path / "out", *flags), 2, *words)
    assert not (tmp_path / "out").exists()


def test_the_first_test_pairs_alone_are_evaluated(tiny_policy, data, tmp_path):
    config = TrainConfig(str(tiny_policy), str(data), str(tmp_path / "run"), train_batch_size=4, max_test_pairs=3)
    run = open_run(config, method_of(config))
    assert (len(run.train), len(run.test)) == (4, 3)
    with pytest.raises(UsageError, match="--max_test_pairs=0 must be at least 1"):
        replace(config, max_test_pairs=0)


def test_processes_count_in_the_batch(forks, tiny_policy, data, tmp_path):
    refuse(train(forks, tiny_policy, data, tmp_path / "out", "--micro_batch_size=1", world=3), 2, "3 processes")


def broken_model(tiny_policy: Path, tmp_path: Path, *missing: str, add: str | None = None) -> Path:
    model = tmp_path / "model"
    shutil.copytree(tiny_policy, model)
    for name in missing:
        (model / name).unlink()
    if add:
        (model / add).write_bytes(b"\x80\x04")
    return model


def test_too_few_pairs_and_a_file_for_a_folder_are_refused_before_the_launcher(forks, tiny_policy, data, tmp_path):
    out = tmp_path / "out"
    refuse(train(forks, tiny_policy, data, out, "--train_batch_size=8"), 1, "4 usable train pairs, fewer than 8")
    out.write_text("")
    refuse(train(forks, tiny_policy, data, out), 1, "is a file, not a folder")


def test_a_run_with_other_flags_or_processes_is_refused_before_the_launcher(forks, tiny_policy, data, tmp_path):
    from drdpo.config import TrainConfig
    from drdpo.folder import write_manifest
    from drdpo.machine import settle
    from drdpo.training.checkpoint import write_index
    from drdpo.training.run import _made_by

    out = tmp_path / "out"
    config, _ = settle(TrainConfig(str(tiny_policy), str(data), str(out), train_batch_size=4))
    write_manifest(out, "train", {**_made_by(config, method_of(config)), "pairs": "x"})
    assert train(forks, tiny_policy, data, out).returncode == 0
    refuse(train(forks, tiny_policy, data, out, "--beta=0.5"), 2, "beta (0.01 -> 0.5)")
    assert train(forks, tiny_policy, data, out, "--beta=0.5", "--resume=never").returncode == 0
    (out / "resume" / "step_1").mkdir(parents=True)
    write_index(out / "resume" / "step_1", 1, 2, {})
    refuse(train(forks, tiny_policy, data, out), 2, "2 processes", "by 1")
    (out / "resume" / "step_1" / "state.json").unlink()
    assert train(forks, tiny_policy, data, out).returncode == 0, "a state that is not whole hinders no run"


def test_a_second_run_into_one_folder_is_refused_while_the_first_lives(forks, tiny_policy, data, tmp_path):
    from drdpo.folder import lock_folder

    out = tmp_path / "out"
    with lock_folder(out):
        refuse(train(forks, tiny_policy, data, out), 2, "is locked by process", str(out))
    assert train(forks, tiny_policy, data, out).returncode == 0


def test_bad_models_end_with_status_1(forks, tiny_policy, data, tmp_path):
    out = tmp_path / "out"
    refuse(train(forks, Path("models/none"), data, out), 1, "models/none", "no such model folder")
    refuse(train(forks, broken_model(tiny_policy, tmp_path / "a", "tokenizer.json"), data, out), 1, "tokenizer")
    pickled = broken_model(tiny_policy, tmp_path / "b", "model.safetensors", add="pytorch_model.bin")
    refuse(train(forks, pickled, data, out), 1, "pickle", "safetensors")
    assert not out.exists()


def test_bad_data_ends_with_status_1(forks, tiny_policy, data, tmp_path):
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    out = tmp_path / "out"
    rows = (data / "train.jsonl").read_text()
    for text, words in [
        (rows[:-10], ["train.jsonl, row 4", "not a whole JSON object"]),
        (rows + '{"prompt": "a", "chosen": "b"}\n', ["train.jsonl, row 5", '"rejected" is missing']),
        ("", ["train.jsonl", "no rows"]),
    ]:
        (broken / "train.jsonl").write_text(text)
        refuse(train(forks, tiny_policy, broken, out), 1, *words)
    (broken / "train.jsonl").write_text(rows)
    (broken / "test.jsonl").unlink()
    refuse(train(forks, tiny_policy, broken, out), 1, "test.jsonl: no such file")
    assert not out.exists()


def test_checks_pass_without_the_libraries_of_training(root, tiny_policy, data, tmp_path):
    """The check runs before the launcher, so it must be quick."""
    program = (
        "import sys; sys.modules |= dict.fromkeys(('deepspeed', 'accelerate', 'peft', 'datasets', 'transformers.models')); "
        f"import runpy; runpy.run_path({str(root / 'src/train_alignment.py')!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", program, f"--model_path={tiny_policy}", f"--dataset_path={data}",
               f"--save_path={tmp_path / 'out'}", "--train_batch_size=4", "--check_only=true"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
