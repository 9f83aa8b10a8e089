"""The transformers engine: the distribution of its samples, and what they depend on."""

import json
import shutil
from collections import Counter

import pytest
import torch

from drdpo.sampling.engines import Draw, EngineSettings, Request, Sample, Sampling, TransformersEngine, stream_seed


@pytest.fixture(scope="module")
def engine(tiny_policy):
    return TransformersEngine(EngineSettings("transformers", str(tiny_policy), "float32", 128))


def sampling(
    n: int = 2, temperature: float = 1.0, top_p: float = 1.0, tokens: int = 6, stops: tuple[int, ...] = (2,)
) -> Sampling:
    return Sampling(n, temperature, top_p, tokens, stops)


def draws(logits_V: torch.Tensor, how: Sampling, rows: int) -> list[float]:
    draw = Draw(how, list(range(rows)), torch.device("cpu"))
    chosen_R = draw(logits_V.repeat(rows, 1), list(range(rows)))
    counts = Counter(chosen_R.tolist())
    return [counts[token] / rows for token in range(len(logits_V))]


def test_frequencies_are_the_softmax_at_the_temperature():
    logits_V = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    assert draws(logits_V, sampling(temperature=1.0), 8000) == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.02)
    # At temperature 1/2 probabilities are squared: 1, 4, 9, 16 thirtieths.
    assert draws(logits_V, sampling(temperature=0.5), 8000) == pytest.approx([1 / 30, 4 / 30, 9 / 30, 16 / 30], abs=0.02)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits_V = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    # 0.4 + 0.3 reaches 0.65; the two are renormalised.
    assert draws(logits_V, sampling(top_p=0.65), 8000) == pytest.approx([0, 0, 3 / 7, 4 / 7], abs=0.02)
    assert draws(logits_V, sampling(top_p=0.05), 200) == [0, 0, 0, 1]


def test_every_request_has_n_different_samples(engine, requests):
    found = dict(engine.generate(requests, sampling(n=4)))
    assert sorted(found) == list(range(len(requests)))
    assert all(len({tuple(sample.token_ids) for sample in samples}) == 4 for samples in found.values())


def test_samples_do_not_depend_on_order_or_company(engine, requests):
    together = dict(engine.generate(requests, sampling()))
    backwards = dict(engine.generate(requests[::-1], sampling()))
    assert [backwards[len(requests) - 1 - index] for index in range(len(requests))] == [
        together[index] for index in range(len(requests))
    ]
    for index, request in enumerate(requests):
        assert dict(engine.generate([request], sampling()))[0] == together[index]


def test_many_samples_of_a_prompt_are_the_first_ones_and_more_and_never_one_batch(engine, requests, monkeypatch):
    rows = []
    forward = engine._model.forward
    monkeypatch.setattr(engine._model, "forward", lambda *a, **k: (rows.append(len(k["input_ids"])), forward(*a, **k))[1])
    many = dict(engine.generate(requests[:2], sampling(n=150)))
    assert max(rows) == 64
    few = dict(engine.generate(requests[:2], sampling(n=5)))
    for index in range(2):
        assert len({tuple(sample.token_ids) for sample in many[index]}) == len(many[index]) == 150
        assert many[index][:5] == few[index]


def test_the_seed_changes_the_samples(engine, requests):
    again = [Request(requests[0].prompt_token_ids, stream_seed(2, "test", 0))]
    assert dict(engine.generate(again, sampling()))[0] != dict(engine.generate(requests[:1], sampling()))[0]


def test_greedy_is_the_argmax_of_the_plain_model(engine, requests, tiny_policy):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32).eval()
    found = dict(engine.generate(requests, sampling(n=2, temperature=0.0)))
    for index in (0, 3, 9):
        ids = list(requests[index].prompt_token_ids)
        with torch.inference_mode():
            for _ in range(6):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected = ids[len(requests[index].prompt_token_ids) :]
        assert found[index] == [Sample(expected, "length")] * 2


def test_a_sample_ends_with_its_stop_token(engine, requests):
    free = dict(engine.generate(requests[:1], sampling(n=1, temperature=0.0)))[0][0].token_ids
    stop = free[3]
    ended = dict(engine.generate(requests, sampling(n=1, temperature=0.0, stops=(2, stop))))[0][0]
    assert ended == Sample(free[: free.index(stop) + 1], "stop")


def test_the_folders_own_generation_config_does_not_count(tiny_policy, tmp_path, requests):
    plain = dict(
        TransformersEngine(EngineSettings("transformers", str(tiny_policy), "float32", 128)).generate(requests, sampling())
    )
    folder = tmp_path / "other"
    shutil.copytree(tiny_policy, folder)
    settings = {"do_sample": True, "temperature": 0.1, "top_k": 1, "repetition_penalty": 5.0, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    other = TransformersEngine(EngineSettings("transformers", str(folder), "float32", 128))
    assert dict(other.generate(requests, sampling())) == plain


def test_seeds_of_two_prompts_never_meet():
    seeds = {stream_seed(42, split, prompt_id) for split in ("train", "test") for prompt_id in range(500)}
    assert len(seeds) == 1000
    assert all(seed % (1 << 14) == 0 and 0 <= seed < 1 << 62 for seed in seeds)
    assert stream_seed(42, "test", 7) == stream_seed(42, "test", 7)
