"""The wrappers with a stand-in for the launcher: arguments pass unchanged, from any directory, with spaces in paths."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from harness.forks import Forks
from harness.stand_ins import add_program, make_environment

from drdpo.records import Preference, write_records

STEP_1, STEP_3, STEP_4B = "generate_completions.slurm", "train_alignment.slurm", "openllm_eval.slurm"
WRAPPERS = (STEP_1, STEP_3, STEP_4B, "generate_completions.sh", "train_alignment.sh", "generate.sh", "quickstart.sh")


@pytest.fixture
def environment(forks: Forks, tmp_path: Path) -> dict[str, str]:
    """An environment whose launcher notes its arguments; the steps run in forks."""
    prefix = make_environment(tmp_path / "an environment", {"python": "machine/python"}, FORKS_SOCKET=str(forks.place))
    launched = str(tmp_path / "launched")
    return os.environ | {
        "DRDPO_ENV": str(prefix), "LAUNCHED": launched, "CUDA_VISIBLE_DEVICES": "", "DRDPO_PROCESSES": "2",
    }  # fmt: skip


@pytest.fixture
def flags(tmp_path: Path, tiny_policy: Path) -> list[str]:
    said = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    for split in ("train", "test"):
        rows = [Preference(0, said("user", "a"), said("assistant", "b"), said("assistant", "c"))] * 128
        write_records(tmp_path / "my pairs" / f"{split}.jsonl", rows)
    return [f"--model_path={tiny_policy}", "--dataset_path", f"{tmp_path}/my pairs", f"--save_path={tmp_path}/my run"]


def replace_python(environment: dict[str, str], script: str) -> None:
    """A bash script stands in for the environment's python, which knows no GPU."""
    no_gpu = '[[ "$*" != *ask_driver* ]] || exec echo 0 0'
    (Path(environment["DRDPO_ENV"]) / "bin" / "python").write_text(f"#!/bin/bash\n{no_gpu}\n{script}\n")


def bash(environment: dict[str, str], cwd: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def train(root: Path, environment: dict[str, str], tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "some where else").mkdir(exist_ok=True)
    return bash(environment, tmp_path / "some where else", root / "train_alignment.sh", *words)


def launched(environment: dict[str, str]) -> list[str]:
    path = Path(environment["LAUNCHED"])
    return path.read_text().splitlines() if path.is_file() else []


def test_flags_pass_unchanged(root, environment, flags, tmp_path):
    done = train(root, environment, tmp_path, *flags, "--kldpo_tau=0.05")
    assert done.returncode == 0, done.stderr
    words = launched(environment)
    assert words[words.index(str(root / "src/train_alignment.py")) + 1 :] == [*flags, "--kldpo_tau=0.05"]
    assert "--nproc-per-node=2" in words
    folder = next(word for word in words if word.startswith("--log-dir=")).removeprefix("--log-dir=")
    assert Path(folder).parent == tmp_path / "my run" / "logs"
    assert train(root, environment, tmp_path, *flags, "--dry_run=true").returncode == 0
    assert "--log-dir=/dev/null" in launched(environment), "a dry run writes nothing"


RANK = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}
LEFT_OVER = {"DRDPO_PROCESSES": "1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


@pytest.mark.parametrize(("variables", "place"), [(RANK, "3 of 4 at first:29500"), (LEFT_OVER, " of  at :")])
def test_a_rank_of_torchrun_and_one_process_alone_need_no_launcher(variables, place, root, environment, flags):
    """torchrun --no-python starts the wrapper once a rank. The process takes the wrapper's place, so signals reach it."""
    replace_python(environment, 'printf "%s\\n" "$@" "rank=$RANK of $WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT pid=$$"')
    command = ["bash", str(root / "train_alignment.sh"), *flags]
    with subprocess.Popen(command, env=environment | variables, stdout=subprocess.PIPE, text=True) as process:
        said = process.stdout.read().splitlines()
    assert said == [str(root / "src/train_alignment.py"), *flags, f"rank={place} pid={process.pid}"]
    assert process.returncode == 0 and launched(environment) == []


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, 4), ({"CUDA_VISIBLE_DEVICES": "1,2,3,5", "DRDPO_PROCESSES": "2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "", "DRDPO_PROCESSES": "2"}, 2),
        ({"DRDPO_PROCESSES": "5"}, "4 GPUs are visible"), ({"DRDPO_PROCESSES": "many"}, "not a positive number"),
        ({"DRDPO_HOSTFILE": "hosts"}, "DRDPO_HOSTFILE is not supported"), ({"DRDPO_NODES": "two"}, "DRDPO_NODES=two"),
        ({"DRDPO_NODES": "2"}, "DRDPO_NODE_RANK="), ({"DRDPO_NODES": "2", "DRDPO_NODE_RANK": "2"}, "DRDPO_NODE_RANK=2"),
        ({"DRDPO_NODES": "2", "DRDPO_NODE_RANK": "1"}, "MASTER_ADDR"), ({"GPUS": "lost"}, "name 'lost' is not defined"),
        pytest.param(
            {"GPUS": "0", "SKIP_CHECK": "", "SMI_GPUS": "NVIDIA\nNVIDIA"}, "nvidia-smi lists 2 GPUs (NVIDIA), driver",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here"),
        ),
    ],
)  # fmt: skip
def test_one_process_per_visible_gpu_or_a_reason(variables, expected, root, environment, flags, tmp_path):
    add_program(Path(environment["DRDPO_ENV"]) / "bin", "nvidia-smi", "machine/nvidia-smi")
    del environment["CUDA_VISIBLE_DEVICES"], environment["DRDPO_PROCESSES"]
    done = train(root, environment | {"GPUS": "4", "SKIP_CHECK": "1"} | variables, tmp_path, *flags)
    if isinstance(expected, int):
        assert done.returncode == 0, done.stderr
        assert f"--nproc-per-node={expected}" in launched(environment)
    else:
        assert done.returncode == (1 if variables.get("GPUS") == "lost" else 2) and expected in done.stderr
        assert not launched(environment)


def test_a_wrong_flag_or_bad_data_starts_no_launcher(root, environment, flags, tmp_path):
    assert train(root, environment, tmp_path, *flags, "--train_batch_size=3", "--micro_batch_size=2").returncode == 2
    (tmp_path / "my pairs" / "test.jsonl").write_text('{"chosen": ')
    done = train(root, environment, tmp_path, *flags)
    assert done.returncode == 1 and "test.jsonl, row 1" in done.stderr
    assert not launched(environment)
    assert not (tmp_path / "my run").exists()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_without_an_environment_setup_is_named(wrapper, clone, environment, tmp_path):
    lost = bash(environment | {"DRDPO_ENV": str(tmp_path / "gone")}, tmp_path, clone / "train_alignment.sh")
    assert lost.returncode == 1 and "bash setup.sh" in lost.stderr
    (clone / ".environment").unlink()
    replace_python(environment, f'exec {sys.executable} -S "$@"')  # a python without packages
    bare = environment | {"PATH": f"{environment['DRDPO_ENV']}/bin:{os.environ['PATH']}"}
    del bare["DRDPO_ENV"]
    if wrapper != "quickstart.sh":  # which calls setup.sh
        done = bash(bare, tmp_path, clone / wrapper, "--model_path=x", "--save_path=y")
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].endswith("has no torch or msgspec; run: bash setup.sh")
    done = bash(bare, tmp_path, clone / wrapper, "--help")
    assert done.returncode == 0 and "usage:" in done.stdout


def test_quickstart_refuses_unknown_flags_and_a_folder_of_other_flags(root, environment, tmp_path):
    done = bash(environment, tmp_path, root / "quickstart.sh", "--size=1")
    assert done.returncode == 2 and "--size=1" in done.stderr
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "flags").write_text("--prompts=1 \n")
    done = bash(environment, tmp_path, root / "quickstart.sh", f"--output_path={folder}", "--prompts=2")
    assert done.returncode == 2 and str(folder) in done.stderr and "(--prompts=1 )" in done.stderr


@pytest.mark.parametrize(
    ("words", "evaluates"),
    [
        (["--check_only=true"], False), (["--check_only", "True"], False), (["--check-only=1"], False),
        (["--check_only", "--seed=1"], False), ([], True), (["--check_only", "No"], True),
        (["--check_only=1", "--check_only=0"], True),
    ],
)  # fmt: skip
def test_generate_evaluates_what_it_made_unless_it_only_checks(words, evaluates, root, environment, tmp_path):
    replace_python(environment, 'basename "$1"; printf "  %s\\n" "${@:2}"')
    done = bash(environment | {"DRDPO_PROCESSES": "1"}, tmp_path, root / "generate.sh", "--save_path=out puts/x", *words)
    lines = done.stdout.splitlines()
    scripts = [line for line in lines if not line.startswith(" ")]
    steps = ["score_completions.py", "generate_completions.py", "score_completions.py", "evaluate_armorm.py"]
    assert scripts == steps[: 4 if evaluates else 3]
    assert not evaluates or lines[-3:] == ["  --runs", "  x=out puts/x", "  --output_path=out puts/x"]


@pytest.mark.parametrize(
    ("word", "status", "message"),
    [("--reward_model={}", 1, "a language model (LlamaForCausalLM)"), ("--score_max_len=99999", 2, "reads at most")],
)
def test_a_wrong_reward_model_is_refused_before_sampling(word, status, message, root, environment, tiny_policy, tmp_path):
    words = [f"--model_path={tiny_policy}", "--score_batch_tokens=99999", f"--save_path={tmp_path / 'out'}"]
    done = bash(environment, tmp_path, root / "generate_completions.sh", *words, word.format(tiny_policy))
    assert done.returncode == status and message in done.stderr.splitlines()[-1]
    assert "generate_completions.py" not in done.stderr, "no step was begun"
    assert not (tmp_path / "out").exists()


@pytest.fixture
def job(root, environment):
    """Run a job with a python that notes its words, sleeping at $SLEEPS; (status, words)."""
    for name in ("python", "srun", "scontrol"):
        add_program(Path(environment["DRDPO_ENV"]) / "bin", name, f"slurm/{name}")
    kept = {name: value for name, value in environment.items() if not name.startswith(("SLURM", "MASTER", "RANK", "WORLD"))}

    def run(
        nodes: int, sent: signal.Signals | None = None, script: str = STEP_1, words: Sequence[str] = (), **variables: str
    ) -> tuple[int, list[str]]:
        slurm = {"SLURM_JOB_ID": "40007", "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_CPUS_PER_TASK": "7", "SLURM_NODEID": "0",
                 "SLURM_JOB_NODELIST": "node[1-2]", "DRDPO_PROCESSES": "1"}  # fmt: skip
        command = ["bash", str(root / script), "--save_path=a b", *words]
        process = subprocess.Popen(command, env=kept | slurm | variables)
        Path(environment["LAUNCHED"] + ".pid").write_text(str(process.pid))
        if sent is not None:
            deadline = time.monotonic() + 60
            while not any(fnmatch(line, variables["SLEEPS"]) for line in launched(environment)):
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.05)
            process.send_signal(sent)
        status = process.wait(timeout=60)
        return status, [line.replace(f"{root}/src/", "") for line in launched(environment)]

    return run


ALONE = [
    "node= of : score_completions.py --save_path=a b --check_only=true",
    "node= of : generate_completions.py --save_path=a b",
    "node= of : score_completions.py --save_path=a b",
]
RENDEZVOUS = "--nnodes=2 --node-rank={} --master-addr=first --master-port=12007 --nproc-per-node=1 --log-dir=/dev/null"


def test_a_job_samples_and_scores_and_on_two_nodes_divides_and_writes(job, environment):
    assert job(1) == (0, ALONE)
    Path(environment["LAUNCHED"]).unlink()
    status, said = job(2)
    rounds = ("node= of 2", "node=0 of 2", "node=1 of 2", "node= of 2 writes")
    divide, *samples, merge = (f"{each}: generate_completions.py --save_path=a b" for each in rounds)
    assert status == 0 and said[0] == ALONE[0] and said[1] == divide and said[4] == merge
    assert sorted(said[2:4]) == samples
    score = "score_completions.py --save_path=a b"
    expected = {f"node={node} of 2: {score} --check_only=true" for node in (0, 1)}
    expected |= {f"node={node} of 2: -P drdpo/launch.py {RENDEZVOUS.format(node)} {score}" for node in (0, 1)}
    assert len(said) == 9 and set(said[5:]) == expected
    srun = Path(environment["LAUNCHED"] + ".srun").read_text().splitlines()
    assert [word for word in srun if word.startswith("--wait")] == ["--wait=0", "--wait=120"]
    assert srun.count("cpus=7") == 2 and srun.count("--kill-on-bad-exit=0") == 2


def test_training_on_two_nodes_starts_a_launcher_on_each(job, environment):
    status, said = job(2, script=STEP_3)
    train = "train_alignment.py --save_path=a b"
    assert status == 0 and {f"node={node} of 2: {train} --check_only=true" for node in (0, 1)} < set(said)
    launchers = sorted(line for line in said if "launch.py" in line)
    for node, line in enumerate(launchers):
        start = f"node={node} of 2: -P drdpo/launch.py {RENDEZVOUS.format(node).replace('/dev/null', 'a b/logs/')}"
        assert line.startswith(start) and line.endswith(train)
    assert len(launchers) == 2 and len(said) == 4
    assert "--wait=120" in Path(environment["LAUNCHED"] + ".srun").read_text().splitlines()


def test_a_requeued_job_resumes_whatever_it_was_started_with(job):
    words = ["--resume=never"]
    assert job(1, script=STEP_3, words=words, SLURM_RESTART_COUNT="0")[1][-1].endswith("a b --resume=never")
    assert job(1, script=STEP_3, words=words, SLURM_RESTART_COUNT="2")[1][-1].endswith("--resume=never --resume=auto")


@pytest.mark.parametrize(
    ("script", "nodes", "sleeps", "sent", "status", "queued"),
    [
        (STEP_1, 1, "*generate*", signal.SIGUSR1, 75, True), (STEP_1, 1, "*score*=a b", signal.SIGUSR1, 75, True),
        (STEP_1, 1, "*generate*", signal.SIGTERM, 143, False), (STEP_1, 2, "node=1*generate*", signal.SIGUSR1, 75, True),
        (STEP_1, 2, "node=0*launch*", signal.SIGUSR1, 75, True),
        # Training ends with 75 once its state is saved; a run that ends otherwise is not queued.
        (STEP_3, 1, "*a b", signal.SIGUSR1, 75, True), (STEP_3, 1, "*a b", signal.SIGTERM, 75, False),
        (STEP_3, 2, "node=1*launch*", signal.SIGUSR1, 75, True), (STEP_3, 1, "*a b", signal.SIGUSR1, 138, False),
        # The launcher takes the wrapper's place.
        ("train_alignment.sh", 1, "*a b", signal.SIGTERM, -15, False),
        (STEP_4B, 1, "*evaluate*", signal.SIGUSR1, 75, True), (STEP_4B, 1, "*evaluate*", signal.SIGTERM, 143, False),
        (STEP_4B, 2, "node= of 2: *", signal.SIGUSR1, 75, True), (STEP_4B, 2, "node=1*", signal.SIGUSR1, 75, True),
        (STEP_4B, 2, "*writes*", signal.SIGUSR1, 75, True),
    ],
)  # fmt: skip
def test_the_job_is_queued_again_before_the_time_limit_but_not_when_it_is_cancelled(
    script, nodes, sleeps, sent, status, queued, job, environment
):
    found, said = job(nodes, sent, script, SLEEPS=sleeps, STOPPED="75" if (script, status) == (STEP_3, 75) else "")
    assert found == status, said
    assert fnmatch(said[-1], sleeps) or nodes == 2, "nothing follows"
    requeue = Path(environment["LAUNCHED"] + ".requeue")
    assert requeue.read_text() == "requeue 40007\n" if queued else not requeue.exists()


@pytest.mark.parametrize(("sent", "queued"), [("USR1", "requeue 40007\n"), ("TERM", "")])
def test_a_signal_between_two_parts_of_a_job_is_not_lost(sent, queued, job, environment):
    """It comes from the scontrol that names the nodes, after the first part has ended."""
    assert job(2, SENT_BY_SCONTROL=sent) == (75, ALONE[:1])
    requeue = Path(environment["LAUNCHED"] + ".requeue")
    assert (requeue.read_text() if requeue.exists() else "") == queued


def test_a_node_that_fails_ends_the_job_once_the_others_have_sampled(job):
    status, said = job(2, FAILS="node=1*generate*")
    assert status == 7 and len(said) == 4 and said[-1].startswith("node=")
