"""How a run ends early: SIGTERM and SIGUSR1 save at the next step and exit with 75; a lost rank is reported in one line."""

import json
import os
import subprocess
import sys

import pytest
import torch
from harness.runs import check_equal, fault, flags_of, metrics_of, run_ranks, said

from drdpo.distributed import is_lost_rank, lost_rank_in_one_line, seconds_to_wait
from drdpo.errors import STOPPED, ProcessError, UsageError
from drdpo.training.checkpoint import states

STEP = "loop:train_step"
SOURCE = "[/pytorch/third_party/gloo/gloo/transport/tcp"
LOST = [
    f"{SOURCE}/pair.cc:547] Connection closed by peer [127.0.0.1]:33544",
    f"{SOURCE}/unbound_buffer.cc:81] Timed out waiting 15000ms for recv operation to complete",
    f"{SOURCE}/buffer.cc:72] Timed out waiting 1800000ms for send operation to complete",
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, remote process exited",
    "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9, OpType=ALLREDUCE)",
    "NCCL communicator was aborted on rank 1.",
    "The client socket has timed out after 60000ms while trying to connect to (node1, 29500).",
]
OWN = [
    "PytorchStreamWriter failed writing file data/3: file write failed",
    "CUDA out of memory. Tried to allocate 2.00 GiB",
    "the model nccl-tiny needs a timeout of 3 in its config.json",
    "outputs/gloo-run/resume: broken pipe of beliefs",
    "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
]


def test_a_lost_rank_is_told_from_an_error_of_its_own():
    assert all(is_lost_rank(RuntimeError(message)) for message in LOST)
    assert not any(is_lost_rank(RuntimeError(message)) for message in OWN) and not is_lost_rank(ValueError(LOST[0]))
    assert is_lost_rank(torch.distributed.DistNetworkError(os.strerror(32))), "torch's own class, whatever its message"


def test_a_lost_rank_is_reported_to_torchrun_if_it_asks(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    with pytest.raises(ProcessError, match="rank 0 lost another rank"), lost_rank_in_one_line(7):
        raise RuntimeError(LOST[0])
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit) as stopped, lost_rank_in_one_line(7):
        raise RuntimeError(LOST[0])
    assert stopped.value.code == 1
    written = json.loads((tmp_path / "error.json").read_text())["message"]
    assert "DRDPO_TIMEOUT=7" in written["message"] and LOST[0] in written["extraInfo"]["py_callstack"]


def test_the_time_to_wait_is_a_positive_number(monkeypatch):
    monkeypatch.delenv("DRDPO_TIMEOUT", raising=False)
    assert seconds_to_wait() == 1800
    monkeypatch.setenv("DRDPO_TIMEOUT", "15")
    assert seconds_to_wait() == 15
    for text in ("0", "-3", "1.5", "soon"):
        monkeypatch.setenv("DRDPO_TIMEOUT", text)
        with pytest.raises(UsageError, match=f"DRDPO_TIMEOUT={text}"):
            seconds_to_wait()


NOTES = """
import os, signal, sys, torch
from drdpo.training.loop import stop_on_signal
sent, cpu = signal.Signals[sys.argv[1]], torch.device("cpu")
os.kill(os.getpid(), sent)
for expected in (sent.name, None):
    with stop_on_signal() as stop:
        assert stop(cpu) == expected
with stop_on_signal() as stop:
    os.kill(os.getpid(), sent)
    assert stop(cpu) == sent.name
assert signal.getsignal(sent) == signal.SIG_DFL
print("noted")
"""


@pytest.mark.parametrize("sent", ["SIGTERM", "SIGUSR1"])
def test_a_signal_is_noted_also_one_that_was_blocked(sent):
    """In a process that starts with the signals blocked, as by src/train_alignment.py."""
    block = f"import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.{sent}}}); os.execv(sys.executable, "
    command = [sys.executable, "-c", block + "[sys.executable, '-c', *sys.argv[1:]])", NOTES, sent]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "noted\n", done.stderr


@pytest.mark.slow
def test_stopped_twice_equals_undisturbed(forks, tiny_policy, data, tmp_path):
    log, save = tmp_path / "log", tmp_path / "stopped"
    assert run_ranks(forks, flags_of(tiny_policy, data, tmp_path / "whole"), log) == [0, 0], said(log)
    # No state but those of the signals.
    flags = flags_of(tiny_policy, data, save, save_steps=0)
    for rank, sent, step in ((1, "SIGUSR1", 2), (0, "SIGTERM", 3)):
        faults = [fault(STEP, 2 if step == 2 else 1, rank=rank, signal=sent)]
        assert run_ranks(forks, flags, log, faults) == [STOPPED, STOPPED], said(log)
        assert f"stopped by {sent} after step {step} of 4, state saved" in said(log)
        assert states(save / "resume")[0][0].step == step
        assert len(metrics_of(save)) == step
    assert run_ranks(forks, flags, log) == [0, 0], said(log)
    check_equal(save, tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_among_the_reference_log_probs_is_answered_once_they_are_written(forks, tiny_policy, data, tmp_path):
    log, save = tmp_path / "log", tmp_path / "stopped"
    flags = flags_of(tiny_policy, data, save)
    # After those of the training pairs, before those of the test pairs.
    sent = fault("loop:_reference", 1, rank=1, signal="SIGUSR1")
    assert run_ranks(forks, flags, log, [sent]) == [STOPPED, STOPPED], said(log)
    assert "stopped by SIGUSR1 before the first step; rerun the same command to start" in said(log)
    kept = {path.name: path.stat().st_mtime_ns for path in save.glob("reference_*")}
    assert sorted(kept) == ["reference_test.safetensors", "reference_train.safetensors"]
    assert run_ranks(forks, flags, log) == [0, 0], said(log)
    assert {path.name: path.stat().st_mtime_ns for path in save.glob("reference_*")} == kept


@pytest.mark.slow
def test_a_run_that_keeps_no_state_does_not_ask_to_be_started_again(forks, tiny_policy, data, tmp_path):
    log = tmp_path / "log"
    flags = flags_of(tiny_policy, data, tmp_path / "out", save_resume=False)
    assert run_ranks(forks, flags, log, [fault(STEP, 1, signal="SIGTERM")]) == [1, 1], said(log)
    assert "error: stopped by SIGTERM after step 1 of 4; --save_resume=false" in said(log)
