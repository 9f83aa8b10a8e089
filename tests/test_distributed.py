"""Which device and back end a rank takes, and how long it waits for the others."""

from datetime import timedelta
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
