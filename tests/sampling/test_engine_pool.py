"""Engine processes side by side: the same samples as one engine, and an end when one dies."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from drdpo import chat
from drdpo.errors import DataError, ProcessError
from drdpo.sampling.engines import EngineSettings, Request, Sample, Sampling, stream_seed
from drdpo.sampling.vllm_engine import InProcess, Pool

ONE_THREAD = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module")
def settings(tiny_policy: Path) -> EngineSettings:
    return EngineSettings("transformers", str(tiny_policy), "float32", 128)


@pytest.fixture(scope="module")
def blocks(tiny_policy: Path) -> dict[int, list[Request]]:
    tokenizer = chat.load_tokenizer(str(tiny_policy))
    requests = [
        Request(
            chat.prompt_token_ids(tokenizer, [{"role": "user", "content": "word " * number}]), stream_seed(1, "test", number)
        )
        for number in range(1, 13)
    ]
    return {block: requests[3 * block : 3 * block + 3] for block in range(4)}


@pytest.fixture(scope="module")
def pool(settings: EngineSettings) -> Iterator[Pool]:
    pool = Pool(settings, [ONE_THREAD, ONE_THREAD])
    yield pool
    pool.close()


def test_two_engines_sample_what_one_samples(pool: Pool, settings: EngineSettings, blocks: dict[int, list[Request]]) -> None:
    sampling = Sampling(2, 1.0, 0.9, 5, (2,))
    one: dict[tuple[int, int], list[Sample]] = {
        (block, index): samples for block, index, samples in InProcess(settings).run(blocks, sampling)
    }
    for _ in range(2):  # the processes serve more than one run
        two = {(block, index): samples for block, index, samples in pool.run(blocks, sampling)}
        assert len(two) == 12
        assert two == one


def test_variables_of_the_processes_are_not_left_behind(settings: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("DRDPO_TEST_VARIABLE", raising=False)
    pool = Pool(settings, [{"OMP_NUM_THREADS": "1", "DRDPO_TEST_VARIABLE": "x"}])
    try:
        assert os.environ["OMP_NUM_THREADS"] == "7"
        assert "DRDPO_TEST_VARIABLE" not in os.environ
    finally:
        pool._processes[0].kill()
        pool.close()


def test_an_engine_that_cannot_load_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    pool = Pool(EngineSettings("transformers", str(tmp_path), "float32", 128), [ONE_THREAD])
    try:
        with pytest.raises(DataError, match="transformers cannot load this model"):
            list(pool.run({0: [Request([1], 0)]}, Sampling(1, 1.0, 1.0, 1, (2,))))
    finally:
        pool.close()


def test_a_killed_engine_ends_the_run(pool: Pool, blocks: dict[int, list[Request]]) -> None:
    """Last in the file: the pool is of no use afterwards."""
    running = pool.run(blocks, Sampling(2, 1.0, 1.0, 5, (2,)))
    next(running)
    os.kill(pool._processes[0].pid, signal.SIGKILL)
    with pytest.raises(ProcessError, match=r"engine process 1 of 2 died \(killed by signal 9"):
        list(running)
