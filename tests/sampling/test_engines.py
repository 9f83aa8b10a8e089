"""The transformers engine: the distribution of its samples, and what they depend on. The choice of the engine, the division
of the GPUs, and engine processes, which give the samples of one engine."""

import json
import os
import shutil
import signal
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from drdpo.errors import DataError, ProcessError, UsageError
from drdpo.sampling import engines, pool
from drdpo.sampling.engines import Draw, EngineSettings, Request, Sample, Sampling, TransformersEngine, stream_seed
from drdpo.sampling.pool import SHORT_ANSWERS, InProcess, Pool, choose_engine, plan_engines

SAMPLING = Sampling(n=2, temperature=1.0, top_p=1.0, max_new_tokens=6, stop_token_ids=(2,))


@pytest.fixture(scope="module")
def settings(tiny_policy):
    return EngineSettings("transformers", str(tiny_policy), "float32", 128)


@pytest.fixture(scope="module")
def engine(settings):
    return TransformersEngine(settings)


def sample(engine, requests, **how):
    found = dict(engine.generate(requests, replace(SAMPLING, **how)))
    return [found[index] for index in range(len(requests))]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"temperature": 1.0}, [0.1, 0.2, 0.3, 0.4]),
        # At temperature 1/2 probabilities are squared: 1, 4, 9, 16 thirtieths.
        ({"temperature": 0.5}, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
        # 0.4 + 0.3 is the smallest set that reaches 0.65; the two are renormalised.
        ({"top_p": 0.65}, [0, 0, 3 / 7, 4 / 7]),
        ({"top_p": 0.05}, [0, 0, 0, 1]),
    ],
)
def test_frequencies_are_the_softmax_at_the_temperature_cut_by_top_p(how, expected):
    logits_V, rows = torch.tensor([0.1, 0.2, 0.3, 0.4]).log(), list(range(8000))
    chosen_R = Draw(replace(SAMPLING, **how), rows, torch.device("cpu"))(logits_V.repeat(len(rows), 1), rows)
    counts_V = torch.bincount(chosen_R, minlength=4)
    assert (counts_V / len(rows)).tolist() == pytest.approx(expected, abs=0.02)
    assert [count == 0 for count in counts_V] == [chance == 0 for chance in expected]


def test_samples_depend_on_the_seed_but_not_on_order_or_company(engine, requests):
    together = sample(engine, requests)
    assert sample(engine, requests[::-1]) == together[::-1]
    assert [sample(engine, [request])[0] for request in requests] == together
    again = [Request(requests[0].prompt_token_ids, stream_seed(2, "test", 0))]
    assert sample(engine, again)[0] != together[0]


def test_many_samples_of_a_prompt_are_the_first_ones_and_more_and_never_one_batch(engine, requests, monkeypatch):
    rows = []
    forward = engine._model.forward
    monkeypatch.setattr(engine._model, "forward", lambda *a, **k: (rows.append(len(k["input_ids"])), forward(*a, **k))[1])
    many = sample(engine, requests[:2], n=150)
    assert max(rows) == 64
    for all_of_them, few in zip(many, sample(engine, requests[:2], n=5), strict=True):
        assert len({tuple(one.token_ids) for one in all_of_them}) == len(all_of_them) == 150
        assert all_of_them[:5] == few


def test_greedy_is_the_argmax_of_the_plain_model_up_to_a_stop_token(engine, requests, tiny_policy):
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32).eval()
    found = sample(engine, requests, temperature=0.0)
    for index in (0, 3, 9):
        ids = list(requests[index].prompt_token_ids)
        with torch.inference_mode():
            for _ in range(6):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert found[index] == [Sample(ids[-6:], "length")] * 2
    free = found[0][0].token_ids
    ended = sample(engine, requests, n=1, temperature=0.0, stop_token_ids=(2, free[3]))[0][0]
    assert ended == Sample(free[: free.index(free[3]) + 1], "stop")


def test_the_folders_own_generation_config_does_not_count(engine, settings, tmp_path, requests):
    folder = shutil.copytree(settings.model_path, tmp_path / "other")
    own = {"do_sample": True, "temperature": 0.1, "top_k": 1, "repetition_penalty": 5.0, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(own))
    other = TransformersEngine(replace(settings, model_path=str(folder)))
    assert sample(other, requests) == sample(engine, requests)


def test_seeds_of_two_prompts_never_meet():
    seeds = {stream_seed(42, split, prompt_id) for split in ("train", "test") for prompt_id in range(500)}
    assert len(seeds) == 1000
    assert all(seed % (1 << 14) == 0 and 0 <= seed < 1 << 62 for seed in seeds)


ONE_THREAD = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


@pytest.fixture(autouse=True)
def _no_engine_count(monkeypatch):
    monkeypatch.delenv("DRDPO_ENGINES", raising=False)


def test_vllm_that_does_not_work_is_an_error_if_requested_or_on_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
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


def test_engines_by_hand(capsys, monkeypatch):
    assert plan_engines("vllm", 1, ["0", "1", "2"]) == [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in "012"]
    sets = [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}]
    assert plan_engines("vllm", 2, ["4", "5", "GPU-a", "GPU-b", "7"]) == sets
    assert "1 of 5 GPUs are unused" in capsys.readouterr().out
    assert len(plan_engines("transformers", 1, [])) == 1
    monkeypatch.setenv("DRDPO_ENGINES", "2")
    assert len(plan_engines("transformers", 1, [])) == 2
    assert plan_engines("vllm", 1, ["0", "1", "2"]) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]


@pytest.mark.parametrize(
    ("engine", "width", "gpus", "engines", "message"),
    [
        ("vllm", 2, [], "", "0 GPUs are visible"), ("vllm", 4, ["0", "1"], "", "2 GPUs are visible"),
        ("transformers", 2, ["0", "1"], "", "needs --engine=vllm"), ("vllm", 1, ["0"], "2", "from 1 to 1"),
        ("vllm", 1, [], "two", "at least 1"), ("vllm", 1, [], "0", "at least 1"),
    ],
)  # fmt: skip
def test_more_than_there_is_is_a_usage_error(monkeypatch, engine, width, gpus, engines, message):
    if engines:
        monkeypatch.setenv("DRDPO_ENGINES", engines)
    with pytest.raises(UsageError, match=message):
        plan_engines(engine, width, gpus)


def test_the_gpus_are_the_visible_ones(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert pool.visible_gpus() == ["3", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert pool.visible_gpus() == ["0", "1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pool.visible_gpus() == []


@pytest.fixture(scope="module")
def blocks(requests):
    return {block: requests[3 * block : 3 * block + 3] for block in range(4)}


@pytest.fixture(scope="module")
def two_engines(settings):
    with closing(Pool(settings, [ONE_THREAD, ONE_THREAD])) as engines:
        yield engines


def test_two_engines_sample_what_one_samples(two_engines, settings, blocks):
    sampling = replace(SAMPLING, top_p=0.9, max_new_tokens=5)
    one = {(block, index): samples for block, index, samples in InProcess(settings).run(blocks, sampling)}
    for _ in range(2):  # the processes serve more than one run
        two = {(block, index): samples for block, index, samples in two_engines.run(blocks, sampling)}
        assert len(two) == 10 and two == one


@pytest.mark.parametrize("count", [1, 20000], ids=["a small block", "a block beyond the pipe's buffer"])
def test_an_engine_that_cannot_load_says_why(settings, tmp_path, count):
    (tmp_path / "config.json").write_text("{}")
    block = {0: [Request([1, 2, 3], seed) for seed in range(count)]}
    pool = Pool(replace(settings, model_path=str(tmp_path)), [ONE_THREAD])
    with closing(pool), pytest.raises(DataError, match="transformers cannot load this model"):
        list(pool.run(block, SAMPLING))


def test_a_killed_engine_ends_the_run(two_engines, blocks):
    """Last in the file: it breaks the pool."""
    running = two_engines.run(blocks, SAMPLING)
    next(running)
    os.kill(two_engines._processes[0].pid, signal.SIGKILL)
    with pytest.raises(ProcessError, match=r"engine process 1 of 2 died .*signal 9"):
        list(running)
