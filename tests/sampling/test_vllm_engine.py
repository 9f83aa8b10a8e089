"""vLLM on the embedded model in float32, in an engine process as with several GPUs; the tiny model has its tokenizer."""

import sys
from unittest.mock import Mock

import pytest

from drdpo.errors import DataError
from drdpo.sampling import engines
from drdpo.sampling.engines import (
    EngineSettings,
    Request,
    Sample,
    Sampling,
    TransformersEngine,
    VllmEngine,
    stream_seed,
    vllm_problem,
)
from drdpo.sampling.pool import Pool


def test_a_broken_vllm_is_reported_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # what an import of it then raises is an ImportError
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: object())
    problem = vllm_problem()
    assert problem.startswith("importing vllm failed: ") and "\n" not in problem


@pytest.fixture(scope="module")
def settings(smollm):
    return EngineSettings("vllm", str(smollm), "float32", 128)


@pytest.fixture(scope="module")
def engine(settings):
    pool = Pool(settings, [{"DS_ACCELERATOR": "cpu"}])
    yield pool
    # vLLM's process may take longer to end than close waits.
    pool._processes[0].kill()
    pool.close()


def run(engine, requests, sampling):
    found = {index: samples for _, index, samples in engine.run({0: requests}, sampling)}
    return [found[index] for index in range(len(requests))]


@pytest.mark.slow
def test_greedy_equals_transformers(engine, requests, settings):
    sampling = Sampling(2, 0.0, 1.0, 20, (2,))
    plain = dict(TransformersEngine(settings).generate(requests[:3], sampling))
    assert run(engine, requests, sampling)[:3] == [plain[index] for index in range(3)]


@pytest.mark.slow
def test_samples_depend_on_the_seed_but_not_on_the_run_or_on_order_or_company(engine, requests):
    sampling = Sampling(4, 1.0, 0.95, 12, (2,))
    first = run(engine, requests, sampling)
    assert all(len({tuple(sample.token_ids) for sample in samples}) == 4 for samples in first[:2])
    assert run(engine, requests, sampling) == first
    assert run(engine, requests[::-1], sampling) == first[::-1]
    assert run(engine, requests[2:3], sampling) == first[2:3]
    other = [Request(request.prompt_token_ids, stream_seed(2, "test", 0)) for request in requests]
    assert run(engine, other, sampling) != first


@pytest.mark.slow
def test_a_stop_keeps_its_token(engine, requests):
    free = run(engine, requests[:1], Sampling(1, 0.0, 1.0, 20, (2,)))[0][0]
    stop = free.token_ids[8]
    place = free.token_ids.index(stop)
    for tokens, ended in (
        (20, Sample(free.token_ids[: place + 1], "stop")),
        (place, Sample(free.token_ids[:place], "length")),
    ):
        assert run(engine, requests[:1], Sampling(1, 0.0, 1.0, tokens, (2, stop))) == [[ended]]


@pytest.mark.slow
def test_prompts_longer_than_a_step_of_the_engine_are_sampled(engine, requests):
    """More prompt tokens than one step computes: vLLM on CPU must not read a seeded prompt in parts (see engines)."""
    long = [Request([1, *([9531, 1200 + number] * 58)], stream_seed(1, "test", number)) for number in range(20)]
    assert sum(len(request.prompt_token_ids) for request in long) > 2048
    assert all(len(samples) == 2 for samples in run(engine, long, Sampling(2, 1.0, 1.0, 2, (2,))))


@pytest.mark.slow
@pytest.mark.parametrize(("cpu", "context"), [(False, "LLM_CLASS"), (True, "ENGINE_CONTEXT")])
def test_a_gpu_gets_the_defaults_of_vllms_offline_class_and_a_start_that_fails_is_one_line(
    cpu, context, settings, monkeypatch
):
    """1,024 sequences and 16,384 tokens a step on an H100, as vllm.LLM has; the engine's own are 128 and 2,048."""
    import vllm
    from vllm.platforms import current_platform

    start = Mock(side_effect=RuntimeError("CUDA out of memory"))
    monkeypatch.setattr(vllm.LLMEngine, "from_engine_args", start)
    monkeypatch.setattr(current_platform, "is_cpu", lambda: cpu)
    with pytest.raises(DataError, match="SmolLM2-135M: vLLM cannot load this model: CUDA out of memory"):
        VllmEngine(settings)
    (arguments,) = start.call_args.args
    assert start.call_args.kwargs["usage_context"].value == context
    assert (arguments.max_num_seqs, arguments.enforce_eager) == (None, cpu)
    assert arguments.max_num_batched_tokens == (2048 if cpu else None)


@pytest.mark.slow
def test_flashinfers_sampler_is_off_unless_the_user_wants_it(monkeypatch):
    """It would be compiled by nvcc, which a machine with a driver alone lacks; our requests have seeds and never use it."""
    from vllm import envs

    monkeypatch.delenv("VLLM_USE_FLASHINFER_SAMPLER", raising=False)
    assert vllm_problem() is None
    assert envs.VLLM_USE_FLASHINFER_SAMPLER is False
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "1")
    assert vllm_problem() is None
    assert envs.VLLM_USE_FLASHINFER_SAMPLER is True
