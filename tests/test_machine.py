"""What --dtype=auto is on which machine, and which machines are refused: stand-ins for torch's view and for nvidia-smi."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from drdpo import distributed, machine
from drdpo.config.data import CompletionsConfig
from drdpo.config.evaluation import LeaderboardConfig
from drdpo.config.training import TrainConfig
from drdpo.errors import UsageError
from drdpo.evaluation.leaderboard import evaluate_openllm
from drdpo.folder import Parts
from drdpo.sampling.sample import sample_completions
from drdpo.scoring.score import score_completions
from drdpo.training.losses import method_of
from drdpo.training.run import _made_by, check_inputs

H100, T4 = ("NVIDIA H100 80GB HBM3", (9, 0)), ("Tesla T4", (7, 5))
ASK_ANOTHER = machine._gpus_of_another_process
SEES_NO_BFLOAT16 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
"""On any CPU, these keep oneDNN and torch from bfloat16 instructions."""


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing remembered, and a CPU that no variable chooses."""
    for cached in (machine._nvidia_smi, ASK_ANOTHER):
        cached.cache_clear()
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "RANK", "WORLD_SIZE", "CC"):
        monkeypatch.delenv(name, raising=False)
    see(monkeypatch)


def see(monkeypatch, *gpus):
    """Let torch see these GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: gpus[number][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: gpus[number][1])
    monkeypatch.setattr(machine, "_gpus_of_another_process", lambda: [machine.Gpu(name, *number) for name, number in gpus])


def cpu(monkeypatch, claims, speed):
    """Let the CPU say that it has bfloat16 products, or not, and the probe measure this; None: it must not run."""
    monkeypatch.setattr(machine, "_claims_bfloat16", lambda: claims)
    monkeypatch.setattr(machine, "bfloat16_speed", lambda: pytest.fail("the probe ran") if speed is None else speed)


def smi(monkeypatch, folder, script):
    """A nvidia-smi on the path."""
    (folder / "nvidia-smi").write_text(f"#!/bin/bash\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(machine, "SMI_TIMEOUT", 0.3 if "sleep" in script else 10)


LISTS = """case "$1" in
    --list-gpus) echo 'GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-1)'; echo '  MIG 1g.5gb Device 0: (UUID: MIG-2)' ;;
    *) echo 535.104.05 ;;
esac"""


@pytest.fixture
def unseen(monkeypatch, tmp_path):
    """An nvidia-smi that lists an A100, which torch does not see."""
    (tmp_path / "driver").mkdir()
    smi(monkeypatch, tmp_path / "driver", LISTS)


def python(root, *words, **variables):
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), **variables}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)


# What auto is


@pytest.mark.parametrize(
    ("claims", "speed", "dtype", "reason"),
    [(True, 2.0, "bfloat16", "2.0 times as fast as float32"), (True, 0.2, "float32", "5.0 times slower than float32"),
     (False, None, "float32", "no bfloat16 products")],
)  # fmt: skip
def test_auto_on_a_cpu_goes_by_its_flags_and_then_by_the_probe(monkeypatch, claims, speed, dtype, reason):
    cpu(monkeypatch, claims, speed)
    found = machine.resolve_dtype("auto")
    assert found.dtype == dtype and reason in found.reason


def test_auto_on_any_gpu_from_8_0_is_bfloat16_also_where_nobody_knows_it(monkeypatch, tmp_path):
    cpu(monkeypatch, False, None)
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi, as in many containers
    for gpu in [H100, ("NVIDIA A100-SXM4-40GB", (8, 0)), ("Graphics Device, (odd)", (12, 1))]:
        see(monkeypatch, gpu)
        config, found = machine.settle(CompletionsConfig("out", "model"))
        assert config.dtype == found.dtype == "bfloat16"
        assert gpu[0] in found.reason


def test_where_onednn_may_not_use_bfloat16_auto_is_float32_and_the_probe_says_why(root):
    """In a process of its own: oneDNN reads its variable once. An explicit --dtype needs no torch without a driver."""
    program = """if True:
        import ctypes, sys
        from drdpo import machine
        from drdpo.config.data import CompletionsConfig
        def missing(name):
            raise OSError(name)
        library, ctypes.CDLL = ctypes.CDLL, missing
        print(machine.settle(CompletionsConfig("out", "model", dtype="float32"))[0].dtype, "torch" in sys.modules)
        ctypes.CDLL = library
        import torch
        torch.cuda.is_available = lambda: False
        machine.announce(machine.resolve_dtype("auto"))
        machine.announce(machine.resolve_dtype("bfloat16"))
        machine._claims_bfloat16 = lambda: True  # a flag that is wrong
        machine.announce(machine.resolve_dtype("auto"))
        threads = torch.get_num_threads()
        print(machine.bfloat16_speed.__wrapped__() > 0.01, threads == torch.get_num_threads(), machine.bfloat16_speed())"""
    done = python(root, "-c", program, CUDA_VISIBLE_DEVICES="", **SEES_NO_BFLOAT16)
    settled, flags, probe, measured = done.stdout.splitlines()
    *fine, speed = measured.split()
    assert settled == "float32 False" and fine == ["True", "True"] and float(speed) < 1
    factor = f"{1 / float(speed):.1f} times slower than float32"
    assert flags.startswith("--dtype=auto is float32: this CPU has no bfloat16 products")
    assert probe == f"--dtype=auto is float32: this CPU multiplies bfloat16 {factor}"
    (warning,) = done.stderr.splitlines()
    assert warning.startswith(f"WARNING: this CPU multiplies bfloat16 {factor}")


def test_an_explicit_flag_wins_and_is_probed_only_to_warn(monkeypatch):
    for claims in (True, False):  # a flag of the CPU that is wrong warns too
        cpu(monkeypatch, claims, None)
        assert machine.resolve_dtype("float32") == ("float32", "asked for by --dtype", "")
        cpu(monkeypatch, claims, 2.0)
        assert machine.resolve_dtype("bfloat16") == ("bfloat16", "asked for by --dtype", "")
        cpu(monkeypatch, claims, 0.125)
        assert machine.resolve_dtype("bfloat16").dtype == "bfloat16"
        assert "8.0 times slower" in machine.resolve_dtype("bfloat16").warning
    see(monkeypatch, H100)
    assert not machine.resolve_dtype("bfloat16").warning


@pytest.mark.parametrize(
    ("environment", "said"), [({}, 1), ({"RANK": "0", "WORLD_SIZE": "2"}, 1), ({"RANK": "1", "WORLD_SIZE": "2"}, 0),
                              ({"WORLD_SIZE": "2"}, 0)]
)  # fmt: skip
def test_the_choice_is_said_once(monkeypatch, capsys, environment, said):
    """Not by other ranks, nor by the wrapper's check before them."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    machine.announce(machine.Precision("float32", "a reason"))
    machine.announce(machine.Precision("bfloat16", machine._ASKED, "slow"))
    out, err = capsys.readouterr()
    assert out.splitlines() == ["--dtype=auto is float32: a reason"] * said
    assert err.splitlines() == ["WARNING: slow"] * said


# Flags that go with one precision only


def train_config(policy, folder, **flags):
    row = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n"
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(row * 4)
    return TrainConfig(str(policy), str(folder), str(folder / "out"), train_batch_size=4, **flags)


def checked(config):
    return check_inputs(config, method_of(config))


def test_flags_of_one_precision_are_judged_by_what_auto_is_here(monkeypatch, tiny_policy, tmp_path):
    stage_0, flash, wdpo = (train_config(tiny_policy, tmp_path, **flags) for flags in
                            ({"zero_stage": 0}, {"attn": "flash"}, {"wdpo_rho": 0.1}))  # fmt: skip
    cpu(monkeypatch, True, 0.2)
    checked(stage_0)
    with pytest.raises(UsageError, match="--attn=flash needs a CUDA device"):
        checked(flash)
    with pytest.raises(UsageError, match=r"--attn=flash with --dtype=float32.*--dtype=auto is float32 here"):
        machine.settle(flash)
    settled, explicit = (machine.settle(one)[0] for one in (wdpo, dataclasses.replace(wdpo, dtype="float32")))
    assert not settled.wide_values
    made_by = _made_by(settled, method_of(settled))
    assert made_by["dtype"] == "float32" and made_by == _made_by(explicit, method_of(explicit)), "the same run"
    cpu(monkeypatch, True, 2.0)
    with pytest.raises(UsageError, match=r"bfloat16.*\(--dtype=auto is bfloat16 here: .*2\.0 times as fast as float32\)"):
        checked(stage_0)
    checked(dataclasses.replace(stage_0, dtype="float32"))
    assert machine.settle(wdpo)[0].wide_values
    see(monkeypatch, H100)
    monkeypatch.setattr(machine, "check_compiler", lambda: None)
    checked(flash)


def test_the_dry_run_and_the_check_show_the_precision(forks, root, tiny_policy, tmp_path):
    config, here = train_config(tiny_policy, tmp_path), machine.resolve_dtype("auto").dtype
    command = [sys.executable, root / "src/train_alignment.py", f"--model_path={tiny_policy}", "--train_batch_size=4",
               f"--dataset_path={tmp_path}", f"--save_path={config.save_path}"]  # fmt: skip
    for words in (["--check_only=true"], ["--dry_run=true"], ["--dry_run=true", "--dtype=float32"]):
        done = forks.run([*command, *words], {**os.environ, "DS_ACCELERATOR": "cpu"})
        explicit = "--dtype=float32" in words
        assert done.returncode == 0 and (f"--dtype=auto is {here}: " in done.stdout) != explicit, done.stderr
        assert "--check_only=true" in words or f"all trained, in {'float32' if explicit else here}" in done.stdout


def test_ranks_that_differ_take_float32(monkeypatch):
    config, found = CompletionsConfig("out", "model", dtype="bfloat16"), machine.Precision("bfloat16", "fast")
    monkeypatch.setattr(distributed, "gather_floats", lambda values: [*values, 1.0])
    assert machine.agree(config, found) == (config, found)
    monkeypatch.setattr(distributed, "gather_floats", lambda values: [*values, 0.0])
    config, found = machine.agree(config, found)
    assert config.dtype == found.dtype == "float32"
    assert "1 of 2 processes" in found.reason


# Which machines are refused


def steps(root, model, out):
    """Every step with a model."""
    prompts, rewards = str(root / "datasets/embedded_prompts"), str(root / "models/ArmoRM-SmolLM2")
    completions = CompletionsConfig(str(out), str(model), dataset=prompts, reward_model=rewards, engine="transformers")
    return {
        "sampling": lambda: sample_completions(completions),
        "scoring": lambda: score_completions(completions),
        "training": lambda: checked(train_config(model, out)),
        "leaderboard": lambda: evaluate_openllm(LeaderboardConfig(str(model), str(out / "leaderboard"))),
        "leaderboard by vllm": lambda: machine.settle(LeaderboardConfig(str(model)), untouched=True),
    }


@pytest.mark.parametrize("step", steps(Path(), Path(), Path()))
def test_every_step_refuses_an_old_gpu_and_the_cpu_beside_an_unseen_one(
    monkeypatch, unseen, root, tiny_policy, tmp_path, step
):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    unseen_gpu = r"NVIDIA A100-SXM4-40GB.*driver 535\.104\.05.*CUDA 13\.0 needs driver 580.*setup\.sh.*CUDA_VISIBLE_DEVICES="
    with pytest.raises(UsageError, match=unseen_gpu):
        steps(root, tiny_policy, tmp_path)[step]()
    see(monkeypatch, H100, T4)
    monkeypatch.setattr(machine, "check_compiler", lambda: None)
    old = r"GPU 1 \(Tesla T4\) has compute capability 7\.5.*newer GPU.*CUDA_VISIBLE_DEVICES="
    with pytest.raises(UsageError, match=old):
        steps(root, tiny_policy, tmp_path)[step]()


@pytest.mark.parametrize(
    ("script", "counted", "build", "visible", "says"),
    [
        (LISTS, 0, None, None, "build for CPUs; run bash setup.sh"),
        (LISTS, 0, "12.8", None, "CUDA 12.8 needs driver 525; python -c 'import"),
        (LISTS, 0, "14.2", None, "CUDA 14.2 needs driver unknown"),
        (LISTS, 0, "12.8", "7", "CUDA_VISIBLE_DEVICES=7 may name others; unset it"),
        ("echo GPU 0: NVIDIA H100", 0, "12.8", None, "(NVIDIA H100), driver of unknown version"),
        # A container without nvidia-smi under a driver that torch's build cannot use.
        ("exit 9", 2, "12.8", None, "the driver lists 2 GPUs"),
    ],
)
def test_an_unseen_gpu_has_several_reasons(monkeypatch, tmp_path, script, counted, build, visible, says):
    smi(monkeypatch, tmp_path, script)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(machine, "_driver", lambda: (counted, 12080))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UsageError) as refused:
        machine.check_device()
    assert says in str(refused.value) and "none is visible to torch" in str(refused.value)
    assert script != LISTS or "lists 1 GPU (NVIDIA A100-SXM4-40GB), driver 535.104.05," in str(refused.value)


@pytest.mark.parametrize(
    ("script", "why"),
    [("echo it has failed; echo more; exit 9", "it has failed"), ("sleep 60", "timed out after 0.3 seconds"),
     (f"{LISTS}\nexit 9", ""), ("echo NVIDIA-SMI has failed because it could not communicate with the driver", None),
     (r"printf '\xff\xfe\x00GPU'", None), ("kill -11 $$", "")],
)  # fmt: skip
def test_a_broken_nvidia_smi_says_nothing_to_a_step_and_why_to_a_launcher(monkeypatch, tmp_path, capsys, script, why):
    monkeypatch.setattr(machine, "_driver", lambda: (0, 0))
    smi(monkeypatch, tmp_path, script)
    assert machine.check_device() == []
    assert capsys.readouterr().err == ""
    assert machine.ask_driver() == (0, 0)
    said = capsys.readouterr().err
    assert said == "" if why is None else said.startswith("note: nvidia-smi fails: ") and said.endswith(f"{why}\n")
    see(monkeypatch, H100)
    assert machine.check_device() == [machine.Gpu("NVIDIA H100 80GB HBM3", 9, 0)]


@pytest.mark.parametrize(
    ("variables", "counted", "expected"),
    [
        # The driver itself has followed CUDA_VISIBLE_DEVICES. With MIG nvidia-smi lists other devices.
        ({}, 2, 2), ({"CUDA_VISIBLE_DEVICES": "6,7"}, 2, 2), ({}, 0, 1), ({"CUDA_VISIBLE_DEVICES": "7"}, 0, 1),
        *(({"CUDA_VISIBLE_DEVICES": hidden}, 2, 0) for hidden in ("", " ", "-1", "NoDevFiles")),
        ({"DS_ACCELERATOR": "cpu"}, 2, 0),
    ],
)  # fmt: skip
def test_a_launcher_counts_the_drivers_gpus_or_else_those_of_nvidia_smi(monkeypatch, unseen, variables, counted, expected):
    monkeypatch.setattr(machine, "_driver", lambda: (counted, 12080))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert machine.ask_driver() == (expected, 12080)
    if expected == 0:  # hidden GPUs leave the CPU
        assert machine.check_device() == []
        assert "DS_ACCELERATOR" not in variables or os.environ["CUDA_VISIBLE_DEVICES"] == "", "for vLLM and lm-eval"


LIBCUDA = """
int cuDriverGetVersion(int *version) { *version = 12080; return 0; }
int cuInit(unsigned flags) { return STATUS; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
"""


@pytest.mark.parametrize(("status", "said"), [("0", "2 12080\n"), ("100", "0 12080\n")])
def test_the_driver_is_asked_for_devices_and_version_by_its_library(root, tmp_path, status, said):
    """100 is CUDA's error for no device."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    command = [compiler, "-shared", "-fPIC", f"-DSTATUS={status}", "-x", "c", "-", "-o", str(tmp_path / "libcuda.so.1")]
    subprocess.run(command, input=LIBCUDA, text=True, check=True)
    program = "from drdpo.machine import ask_driver; print(*ask_driver())"
    done = python(root, "-c", program, PATH=str(tmp_path), LD_LIBRARY_PATH=str(tmp_path))
    assert (done.stdout, done.stderr) == (said, "")


def test_a_process_without_a_group_is_alone_and_leaves_the_gpu_untouched(monkeypatch, tmp_path):
    """Whatever a cluster's template has left in the environment; sampling starts its engines after this."""
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    see(monkeypatch, H100)
    monkeypatch.setattr(distributed, "device", lambda: pytest.fail("the GPU was asked for"))
    parts = Parts(tmp_path / "parts", {}, overwrite=False)
    parts.open(2)
    parts.add(0, [])
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"plan.json", "0.0.jsonl"}


def test_an_engine_finds_cuda_untouched(monkeypatch):
    see(monkeypatch, H100)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("this initialises the driver"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: pytest.fail("this initialises CUDA"))
    assert machine.check_device(untouched=True) == [machine.Gpu("NVIDIA H100 80GB HBM3", 9, 0)]
    monkeypatch.undo()  # torch's own view, whatever is here
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert ASK_ANOTHER() == machine.gpus()


def test_gpus_that_torch_cannot_initialise_are_refused_in_torchs_words(monkeypatch):
    def fail(_):
        raise RuntimeError("CUDA unknown error\n- this may be due to")

    see(monkeypatch, H100)
    monkeypatch.setattr(torch.cuda, "get_device_name", fail)
    with pytest.raises(UsageError, match=r"CUDA unknown error - this may be due to\); set CUDA_VISIBLE_DEVICES="):
        machine.check_device()
    monkeypatch.setattr(machine, "_gpus_of_another_process", ASK_ANOTHER)
    monkeypatch.setattr(machine, "_LIST_GPUS", "import sys; sys.exit('RuntimeError: it fell off the bus')")
    with pytest.raises(UsageError, match="it fell off the bus"):
        machine.check_device(untouched=True)


def test_triton_needs_a_compiler_and_python_h(monkeypatch, tmp_path):
    see(monkeypatch, H100)
    header = tmp_path / "include" / "Python.h"
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda *_: str(header.parent))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=rf"a C compiler \(gcc or clang\) and {header}.*gcc and python3-dev"):
        machine.check_device(kernels=True)
    machine.check_device()  # vLLM compiles for itself
    header.parent.mkdir()
    header.write_text("")
    (tmp_path / "clang").write_text("")
    (tmp_path / "clang").chmod(0o755)
    machine.check_device(kernels=True)
    monkeypatch.setenv("CC", "my-cc")
    with pytest.raises(UsageError, match=r"a C compiler \(my-cc\), which"):
        machine.check_device(kernels=True)
    see(monkeypatch)
    machine.check_device(kernels=True)


def test_setup_can_ask(root, unseen):
    if not torch.version.cuda:
        refused = python(root, "-m", "drdpo.machine")
        assert refused.returncode == 1
        assert len(refused.stdout.splitlines()) == 1 and "driver 535.104.05" in refused.stdout
    fine = python(root, "-m", "drdpo.machine", CUDA_VISIBLE_DEVICES="", **SEES_NO_BFLOAT16)
    assert (fine.returncode, fine.stdout[:26]) == (0, "--dtype=auto is float32: t")


# The device and back end of a rank


NCCL = {"device": 1, "backend": "nccl", "timeout": timedelta(hours=2)}


@pytest.mark.parametrize(
    ("accelerator", "world", "expected"),
    [(None, "2", NCCL), ("cuda", "2", NCCL), ("cpu", "2", {"backend": "gloo", "timeout": timedelta(hours=2)}),
     (None, "1", {"device": 1})],
)  # fmt: skip
def test_a_rank_takes_a_gpu_of_its_own_and_a_back_end(monkeypatch, accelerator, world, expected):
    """Local rank 1 of a machine with GPUs; DeepSpeed's switch keeps torch off them, and a single process joins no group."""
    asked = {}
    see(monkeypatch, H100, H100)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: asked.update(device=index))
    join = lambda backend, timeout: asked.update(backend=backend, timeout=timeout)  # noqa: E731
    monkeypatch.setattr(torch.distributed, "init_process_group", join)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": world, "DS_ACCELERATOR": accelerator}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    assert distributed.use_cuda() == (accelerator != "cpu")
    assert distributed.device() == (torch.device("cpu") if accelerator == "cpu" else torch.device("cuda", 1))
    distributed.join()
    assert asked == expected
