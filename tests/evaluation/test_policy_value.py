"""Expected scores without sampling: laws by hand, by enumeration and by sampling; what is refused; the report."""

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from harness.runs import write_candidates
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from drdpo import chat
from drdpo.candidates import Candidates, load_candidates, values
from drdpo.config.evaluation import EvaluatePolicyConfig
from drdpo.errors import DataError
from drdpo.evaluation import policy_value
from drdpo.evaluation.policy_value import answer_logprobs, evaluate_policy, policy_values
from drdpo.folder import write_manifest
from drdpo.models import fingerprint
from drdpo.records import Completion, read_records
from drdpo.sampling.engines import EngineSettings, Request, Sampling, TransformersEngine

NAN = float("nan")


def candidates_of(prompts, answers, scores):
    """Of token ids, with one score."""
    scores_NKO = np.full((len(prompts), max(map(len, answers)), 1), NAN)
    for n, row in enumerate(scores):
        scores_NKO[n, : len(row), 0] = row
    drawn = [[Completion(n, k, [], [], ids, "stop", {}) for k, ids in enumerate(row)] for n, row in enumerate(answers)]
    units = {"x": float(np.nanstd(scores_NKO))}
    return Candidates(Path("-"), drawn, prompts, scores_NKO, ["x"], [], units, "")


def test_values_and_sizes_by_hand():
    log_ratio_NK = np.log([[1.0, 3.0, NAN], [2.0, 2.0, 4.0], [5.0, NAN, NAN]])
    scores_NKO = np.array([[[1.0], [2.0], [NAN]], [[0.0], [4.0], [8.0]], [[7.0], [NAN], [NAN]]])
    values_NO, sizes_N = values(log_ratio_NK, scores_NKO)
    # Weights 1/4, 3/4 and 1/4, 1/4, 1/2. One candidate says nothing: NaN.
    np.testing.assert_allclose(values_NO, [[1.75], [5.0], [NAN]])
    np.testing.assert_allclose(sizes_N, [1 / (1 / 16 + 9 / 16), 1 / (1 / 16 + 1 / 16 + 1 / 4), 1.0])


def test_the_starting_models_value_is_the_plain_mean_and_constants_cancel():
    generator = np.random.default_rng(0)
    scores_NKO, ratio_NK = generator.normal(size=(5, 4, 3)), generator.normal(size=(5, 4))
    same, sizes_N = values(np.zeros((5, 4)), scores_NKO)
    np.testing.assert_allclose(same, scores_NKO.mean(axis=1))
    np.testing.assert_allclose(sizes_N, 4)
    for shift in (-1e4, 1e4):  # exp of these is 0 or infinite
        for ours, theirs in zip(values(ratio_NK + shift, scores_NKO), values(ratio_NK, scores_NKO), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9)


@pytest.mark.parametrize("row_tokens", [1, 40, 4096])
def test_all_answers_as_candidates_of_a_uniform_model_give_the_exact_expectation(row_tokens, tmp_path):
    """A model without an output head is uniform over the 64 answers of two tokens, so each of them once is in proportion to
    it: then sum pi / pi_ref s / sum pi / pi_ref is sum pi s, here by whole rows of transformers."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    policy = LlamaForCausalLM(config)
    policy.save_pretrained(tmp_path / "policy")
    torch.nn.init.zeros_(policy.lm_head.weight)
    policy.save_pretrained(tmp_path / "uniform")

    prompts, answers = [[1, 2, 3], [5]], [list(answer) for answer in product(range(8), repeat=2)]
    scores = [float((3 * a + b * b) % 7) for a, b in answers]
    candidates = candidates_of(prompts, [answers, answers], [scores, scores])
    assert sorted(i for row in candidates.rows(row_tokens) for i in row.indices_S) == list(range(128))
    start_C, ours_C = (
        answer_logprobs(str(tmp_path / name), "float32", candidates, row_tokens, name) for name in ("uniform", "policy")
    )
    np.testing.assert_allclose(start_C, 2 * np.log(1 / 8), rtol=1e-5)
    values_NO, sizes_N = values(candidates.table(ours_C - start_C), candidates.scores_NKO)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    for n, prompt in enumerate(prompts):
        with torch.no_grad():
            rows = policy(torch.tensor([prompt + answer for answer in answers])).logits[:, -3:-1].log_softmax(dim=-1)
        chances = rows.gather(2, torch.tensor(answers)[:, :, None]).sum(dim=(1, 2)).exp().double().numpy()
        assert chances.sum() == pytest.approx(1)
        assert values_NO[n, 0] == pytest.approx(chances @ scores, rel=1e-5)
        assert abs(chances @ scores - np.mean(scores)) > 0.1
        assert sizes_N[n] == pytest.approx(1 / np.square(chances).sum(), rel=1e-4)


@pytest.mark.slow
def test_it_agrees_with_sampling_the_embedded_model(smollm, tmp_path):
    """The policy is the embedded model with a larger last norm, so at a lower temperature; the score of an answer is its
    log-prob under the starting model, which that raises by many standard errors."""
    cooler = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    with torch.no_grad():
        cooler.model.norm.weight *= 1.15
    cooler.save_pretrained(tmp_path / "cooler")
    tokenizer = chat.load_tokenizer(str(smollm))
    prompts = [tokenizer(text)["input_ids"] for text in ("The river is", "She opened the", "Two and two", "A good book")]
    sampling = Sampling(48, 1.0, 1.0, 3, (tokenizer.eos_token_id,))

    def drawn(path):
        engine = TransformersEngine(EngineSettings("transformers", str(path), "float32", 64))
        requests = [Request(prompt, 1000 * number) for number, prompt in enumerate(prompts)]
        found = dict(engine.generate(requests, sampling))
        return [[sample.token_ids for sample in found[number]] for number in range(len(prompts))]

    def logprobs(path, answers):
        candidates = candidates_of(prompts, answers, [[0.0] * len(row) for row in answers])
        return candidates.table(answer_logprobs(str(path), "float32", candidates, 4096, path.name))

    base = drawn(smollm)
    start_NK = logprobs(smollm, base)
    candidates = candidates_of(prompts, base, start_NK.tolist())
    values_NO, _ = values(logprobs(tmp_path / "cooler", base) - start_NK, candidates.scores_NKO)
    sampled_NK = logprobs(smollm, drawn(tmp_path / "cooler"))
    # Of each estimate the error over answers within prompts; the ratio's by the delta method.
    weights_NK = np.exp(logprobs(tmp_path / "cooler", base) - start_NK)
    weights_NK /= weights_NK.sum(axis=1, keepdims=True)
    errors = [np.square(weights_NK * (start_NK - values_NO)).sum(axis=1), sampled_NK.var(axis=1) / sampled_NK.shape[1]]
    error = np.sqrt(np.sum(errors)) / len(prompts)
    assert abs(values_NO.mean() - sampled_NK.mean()) < 2.6 * error
    assert values_NO.mean() - start_NK.mean() > 4 * error, "the starting model's own mean is no such estimate"


def test_gains_are_paired_over_prompts_and_seeds():
    generator = np.random.default_rng(1)
    scores = generator.normal(size=(20, 6))
    candidates = candidates_of([[0]] * 20, [[[0]] * 6] * 20, scores.tolist())
    one, two = generator.normal(size=(2, 20, 6))
    # A bystander that equals the first, and two seeds of which the gain is the mean.
    found = policy_values(candidates, {"a": [one], "same": [one], "seeds": [one, two]}, 2.0, 400, 0)
    unit = scores.std()
    ours = [float(values(table, candidates.scores_NKO)[0].mean()) for table in (one, two)]
    assert found["a"].gains_sd["x"].value == pytest.approx((ours[0] - scores.mean()) / unit)
    assert found["seeds"].gains_sd["x"].value == pytest.approx((sum(ours) / 2 - scores.mean()) / unit)
    assert found["a"].against_first_sd == {}
    same, seeds = (found[name].against_first_sd["x"] for name in ("same", "seeds"))
    assert (same.value, same.low, same.high) == pytest.approx((0, 0, 0))
    assert seeds.value == pytest.approx((ours[1] - ours[0]) / 2 / unit) and seeds.low < seeds.value < seeds.high
    sizes_N = values(one, candidates.scores_NKO)[1]
    assert found["a"].ess == pytest.approx(sizes_N.mean())
    assert found["a"].share_below_min_ess == pytest.approx((sizes_N < 2).mean())


@pytest.fixture
def load(tiny_policy, tmp_path):
    """Candidates with so many completions of each prompt, the second changed, and `made_by` in the manifest of samples."""

    def read(counts=(3, 2, 4), mixtures=None, made_by=None, **changed):
        tokenizer = chat.load_tokenizer(str(tiny_policy))
        folder = write_candidates(tmp_path, tokenizer, counts, **changed)
        if made_by:
            write_manifest(folder / "sampled", "sample_test", made_by)
        return load_candidates(str(folder), "test", tokenizer, mixtures or {})

    return read


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"scores": {}}, 'row 2: field "scores" is missing'),
        ({"token_ids": []}, 'row 2: field "token_ids" is empty'),
        ({"token_ids": [5, 6]}, 'row 2: field "token_ids" does not spell the completion in the tokenizer of'),
        ({"token_ids": [10**6]}, 'row 2: field "token_ids" does not spell the completion'),
        ({"counts": (1, 1)}, "no prompt has two completions, and one says nothing of a policy"),
        (
            {"made_by": {"chat_template_kwargs": {"a": 1}}},
            r"sampled with --chat_template_kwargs='{\"a\": 1}'; pass the same",
        ),
    ],
)
def test_rows_that_say_nothing_are_named(changed, words, load):
    with pytest.raises(DataError, match=words):
        load(**changed)


def test_single_completions_are_omitted(load):
    found = load((2, 1, 3))
    assert [rows[0].prompt_id for rows in found.drawn] == [7, 9]
    assert found.note == "1 prompts with one completion were omitted"


def test_how_they_were_sampled_is_read(load, tiny_policy):
    made_by = {"temperature": 0.7, "top_p": 1.0, "chat_template_kwargs": None, "model": fingerprint(tiny_policy)}
    assert load(made_by=made_by).note.startswith("the completions were drawn with temperature 0.7: V is the mean score")
    assert load(made_by=made_by | {"temperature": 1.0}).note == ""
    assert "drawn with another model than this starting one" in load(made_by={"model": "another"}).note


def test_mixtures_are_of_z_scores(load):
    found = load(mixtures={"m": {"x": 0.25, "y": 0.75}})
    x, y, m = (found.scores_NKO[:, :, o][~np.isnan(found.scores_NKO[:, :, o])] for o in range(3))
    np.testing.assert_allclose(m, 0.25 * (x - x.mean()) / x.std() + 0.75 * (y - y.mean()) / y.std())
    assert found.names == ["x", "y", "m"] and found.units == pytest.approx({"x": x.std(), "y": y.std()})


def test_the_report_and_its_cached_log_probs(tiny_policy, tmp_path, monkeypatch, capsys):
    tokenizer = chat.load_tokenizer(str(tiny_policy))
    moved = AutoModelForCausalLM.from_pretrained(tiny_policy)
    with torch.no_grad():
        moved.model.norm.weight *= 8
    for part in (moved, tokenizer):
        part.save_pretrained(tmp_path / "moved")
    config = EvaluatePolicyConfig(
        candidates=str(write_candidates(tmp_path / "base", tokenizer)), reference=str(tiny_policy),
        policies=[f"start={tiny_policy}", f"moved={tmp_path / 'moved'}"], output_path=str(tmp_path / "out"),
        mixtures=["m=x:0.5,y:0.5"],
    )  # fmt: skip
    read = Mock(wraps=read_records)
    monkeypatch.setattr("drdpo.candidates.read_records", read)
    evaluate_policy(config)
    assert read.call_count == 1, "once for all policies"
    found = json.loads((tmp_path / "out" / "value.json").read_text())["policies"]
    assert found["start"]["gains_sd"]["m"] == {"value": 0, "low": 0, "high": 0} and found["start"]["against_first_sd"] == {}
    assert found["start"]["ess"] == pytest.approx(3) and found["start"]["share_below_min_ess"] == 0
    assert found["moved"]["share_below_min_ess"] == 1 and abs(found["moved"]["gains_sd"]["x"]["value"]) > 0.01
    assert "moved: 100% of its prompts have an effective sample below 2" in capsys.readouterr().out
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| start | +0.000 [+0.000, +0.000] |" in report and "## Differences from start" in report
    assert {"value.png", "value.svg", "report.html"} <= {path.name for path in (tmp_path / "out").iterdir()}

    monkeypatch.setattr(policy_value, "answer_logprobs", None)
    evaluate_policy(replace(config, min_ess=1.0))
    again = json.loads((tmp_path / "out" / "value.json").read_text())["policies"]
    assert again["moved"]["gains_sd"] == found["moved"]["gains_sd"] and again["moved"]["share_below_min_ess"] == 0
    damaged = next((tmp_path / "out" / "logprobs").iterdir())
    damaged.write_bytes(b"x")
    with pytest.raises(DataError, match=r"not a readable safetensors file .*; delete it"):
        evaluate_policy(config)


def test_a_policy_of_another_tokenizer_is_refused(tiny_policy, tmp_path):
    tokenizer = chat.load_tokenizer(str(tiny_policy))
    base = write_candidates(tmp_path / "base", tokenizer)
    other = shutil.copytree(tiny_policy, tmp_path / "other")
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<|im_start|>", "<|im_start|> ")
    tokenizer.save_pretrained(other)
    config = EvaluatePolicyConfig(str(base), [f"a={other}"], str(tiny_policy), str(tmp_path / "out"))
    with pytest.raises(DataError, match="its tokenizer or chat template is not that of --reference"):
        evaluate_policy(config)
    (other / "model.safetensors").unlink()
    with pytest.raises(DataError, match="no weights"):
        evaluate_policy(config)
