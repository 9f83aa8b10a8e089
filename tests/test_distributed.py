"""Which device and back end a rank takes, and how long it waits for the others."""

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from drdpo import distributed


@pytest.fixture
def machine_with_gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine that says it has GPUs, as rank 1 of 2; holds what torch was asked for."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: asked.update(device=index))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, timeout: asked.update(backend=backend, timeout=timeout)
    )
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    return asked


@pytest.mark.parametrize("accelerator", [None, "cuda"])
def test_a_gpu_of_its_own_for_every_rank(
    machine_with_gpus: dict[str, Any], monkeypatch: pytest.MonkeyPatch, accelerator: str | None
) -> None:
    if accelerator:
        monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    assert distributed.use_cuda()
    assert distributed.device() == torch.device("cuda", 1)
    distributed.join()
    assert machine_with_gpus == {"device": 1, "backend": "nccl", "timeout": timedelta(hours=2)}


def test_deepspeeds_switch_keeps_torch_off_the_gpus(
    machine_with_gpus: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert not distributed.use_cuda()
    assert distributed.device() == torch.device("cpu")
    distributed.join()
    assert machine_with_gpus == {"backend": "gloo", "timeout": timedelta(hours=2)}


def test_a_single_process_joins_no_group(machine_with_gpus: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    distributed.join()
    assert machine_with_gpus == {"device": 1}


FAILING = """
import os, sys
from drdpo import distributed
from drdpo.errors import UsageError, one_line_errors

def write():
    if len(sys.argv) > 1:
        raise UsageError("no room for " + str(os.getpid()))
    print("written")

with one_line_errors():
    distributed.join()
    distributed.on_main(write, status=2)
    print("rank", distributed.rank(), "went on")
    distributed.leave()
"""


@pytest.mark.parametrize("fails", [True, False])
def test_what_fails_on_the_first_rank_ends_all_with_its_line_alone(fails: bool, root: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FAILING, *(["fail"] if fails else [])], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root / "src"), "RANK": str(rank), "WORLD_SIZE": "2",
                                         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    said = [rank.communicate(timeout=120) for rank in ranks]
    errors = [[line for line in error.splitlines() if line.startswith("error:")] for _, error in said]
    if fails:
        assert [rank.returncode for rank in ranks] == [2, 2]
        assert errors == [[f"error: no room for {ranks[0].pid}"], []]
        assert [out for out, _ in said] == ["", ""]
    else:
        assert [rank.returncode for rank in ranks] == [0, 0], said
        assert [out for out, _ in said] == ["written\nrank 0 went on\n", "rank 1 went on\n"]
