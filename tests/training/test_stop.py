"""Which errors say that another rank is lost, and which are a rank's own."""

import json
import os

import pytest
import torch

from drdpo.errors import ProcessError, UsageError
from drdpo.training.stop import is_lost_rank, lost_rank_in_one_line, seconds_to_wait

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


@pytest.mark.parametrize("message", LOST)
def test_a_lost_rank(message: str) -> None:
    assert is_lost_rank(RuntimeError(message))


@pytest.mark.parametrize("message", OWN)
def test_an_error_of_its_own(message: str) -> None:
    assert not is_lost_rank(RuntimeError(message))
    assert not is_lost_rank(ValueError(LOST[0]))


def test_torchs_own_class_counts_whatever_it_says() -> None:
    assert is_lost_rank(torch.distributed.DistNetworkError(os.strerror(32)))


def test_a_lost_rank_is_told_to_torchrun_where_it_asks(tmp_path, monkeypatch) -> None:
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
