"""The choice of the engine, the division of the GPUs, and engine processes: the same samples as one engine."""

import os
import signal

import pytest

from drdpo.errors import DataError, ProcessError, UsageError
from drdpo.sampling import pool, vllm_engine
from drdpo.sampling.engines import EngineSettings, Request, Sampling
from drdpo.sampling.pool import SHORT_ANSWERS, InProcess, Pool, choose_engine, plan_engines

ONE_THREAD = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


@pytest.fixture(autouse=True)
def _no_engine_count(monkeypatch):
    monkeypatch.delenv("DRDPO_ENGINES", raising=False)


def test_vllm_that_does_not_work_is_an_error_if_requested_or_on_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--engine=vllm: .*not installed.*--engine=transformers"):
        choose_engine("vllm", 1024, on_gpu=False)
    with pytest.raises(UsageError, match=r"--engine=auto: .*not installed.*bash setup\.sh.*--engine=transformers"):
        choose_engine("auto", 8, on_gpu=True)
    assert choose_engine("auto", 1024, on_gpu=False) == "transformers"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("WARNING: ") and "not installed" in line


def test_auto_is_vllm_but_transformers_for_short_answers_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(pool, "vllm_problem", lambda: None)
    assert choose_engine("auto", SHORT_ANSWERS, on_gpu=False) == "transformers"
    assert "--engine=auto is transformers" in capsys.readouterr().out
    assert choose_engine("auto", SHORT_ANSWERS + 1, on_gpu=False) == "vllm"
    assert choose_engine("auto", SHORT_ANSWERS, on_gpu=True) == "vllm"
    assert choose_engine("vllm", SHORT_ANSWERS, on_gpu=False) == "vllm", "a flag wins"


def test_one_engine_per_gpu():
    assert plan_engines("vllm", 1, ["0", "1", "2"]) == [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in "012"]


def test_tensor_parallel_engines_share_the_gpus(capsys):
    assert plan_engines("vllm", 2, ["4", "5", "GPU-a", "GPU-b", "7"]) == [
        {"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"},
    ]  # fmt: skip
    assert "1 of 5 GPUs are unused" in capsys.readouterr().out


def test_one_engine_on_a_cpu_and_more_by_the_variable(monkeypatch):
    assert len(plan_engines("transformers", 1, [])) == 1
    monkeypatch.setenv("DRDPO_ENGINES", "2")
    assert len(plan_engines("transformers", 1, [])) == 2
    assert plan_engines("vllm", 1, ["0", "1", "2"]) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]


@pytest.mark.parametrize(
    ("engine", "width", "gpus", "engines", "message"),
    [
        ("vllm", 2, [], None, "0 GPUs are visible"),
        ("vllm", 4, ["0", "1"], None, "2 GPUs are visible"),
        ("transformers", 2, ["0", "1"], None, "needs --engine=vllm"),
        ("vllm", 1, ["0"], "2", "from 1 to 1"),
        ("vllm", 1, [], "two", "at least 1"),
        ("vllm", 1, [], "0", "at least 1"),
    ],
)
def test_more_than_there_is_is_a_usage_error(monkeypatch, engine, width, gpus, engines, message):
    if engines is not None:
        monkeypatch.setenv("DRDPO_ENGINES", engines)
    with pytest.raises(UsageError, match=message):
        plan_engines(engine, width, gpus)


def test_the_gpus_are_the_visible_ones(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert pool.visible_gpus() == ["3", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert pool.visible_gpus() == ["0", "1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pool.visible_gpus() == []


@pytest.fixture(scope="module")
def settings(tiny_policy):
    return EngineSettings("transformers", str(tiny_policy), "float32", 128)


@pytest.fixture(scope="module")
def blocks(requests):
    return {block: requests[3 * block : 3 * block + 3] for block in range(4)}


@pytest.fixture(scope="module")
def two_engines(settings):
    engines = Pool(settings, [ONE_THREAD, ONE_THREAD])
    yield engines
    engines.close()


def test_two_engines_sample_what_one_samples(two_engines, settings, blocks):
    sampling = Sampling(2, 1.0, 0.9, 5, (2,))
    one = {(block, index): samples for block, index, samples in InProcess(settings).run(blocks, sampling)}
    for _ in range(2):  # the processes serve more than one run
        two = {(block, index): samples for block, index, samples in two_engines.run(blocks, sampling)}
        assert len(two) == 10
        assert two == one


@pytest.mark.parametrize("count", [1, 20000], ids=["a small block", "a block beyond the pipe's buffer"])
def test_an_engine_that_cannot_load_says_why(tmp_path, count):
    (tmp_path / "config.json").write_text("{}")
    engines = Pool(EngineSettings("transformers", str(tmp_path), "float32", 128), [ONE_THREAD])
    try:
        with pytest.raises(DataError, match="transformers cannot load this model"):
            list(engines.run({0: [Request([1, 2, 3], seed) for seed in range(count)]}, Sampling(1, 1.0, 1.0, 1, (2,))))
    finally:
        engines.close()


def test_a_killed_engine_ends_the_run(two_engines, blocks):
    """Last in the file: it breaks the pool."""
    running = two_engines.run(blocks, Sampling(2, 1.0, 1.0, 5, (2,)))
    next(running)
    os.kill(two_engines._processes[0].pid, signal.SIGKILL)
    with pytest.raises(ProcessError, match=r"engine process 1 of 2 died .*signal 9"):
        list(running)
