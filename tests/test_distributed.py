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
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    return asked


@pytest.mark.parametrize(
    ("accelerator", "world", "asked"),
    [(None, "2", {"device": 1, "backend": "nccl"}), ("cuda", "2", {"device": 1, "backend": "nccl"}),
     ("cpu", "2", {"backend": "gloo"}), (None, "1", {"device": 1})],
)  # fmt: skip
def test_a_gpu_of_its_own_for_every_rank_unless_told(machine_with_gpus, monkeypatch, accelerator, world, asked):
    """A single process joins no group."""
    monkeypatch.setenv("WORLD_SIZE", world)
    if accelerator:
        monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    assert distributed.use_cuda() == (accelerator != "cpu")
    assert distributed.device() == (torch.device("cpu") if accelerator == "cpu" else torch.device("cuda", 1))
    distributed.join()
    assert machine_with_gpus == asked | ({"timeout": timedelta(hours=2)} if "backend" in asked else {})
