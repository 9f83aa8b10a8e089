"""--eval_candidates: refused or read, and a run's expected scores and log-ratios against those of its checkpoints."""

import numpy as np
import pytest
from harness.policies import config_of
from harness.runs import fault, flags_of, metrics_of, run_ranks, said, write_candidates
from safetensors import safe_open
from safetensors.numpy import load_file

from drdpo import chat
from drdpo.candidates import load_candidates, values
from drdpo.errors import DataError, UsageError
from drdpo.evaluation.policy_value import answer_logprobs
from drdpo.records import read_rows, write_rows
from drdpo.training.losses import method_of
from drdpo.training.run import check_inputs


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"packing": False}, "--eval_candidates with --packing=false"),
        ({"eval_candidates": None, "max_candidate_prompts": 3}, "has no meaning without --eval_candidates"),
        ({"max_len": 20}, "and none is cut; pass --max_len="),
        ({"eval_mixture": ["m=x:0.5,z:0.5"]}, "the completions lack z, and the mixture m reads it"),
        ({"eval_mixture": ["x=y:1"]}, "the mixture x has the name of an objective"),
    ],
)
def test_flags_that_cannot_be_honoured(flags, words, tiny_policy, tmp_path):
    folder = write_candidates(tmp_path / "candidates", chat.load_tokenizer(str(tiny_policy)))
    flags = {"model_path": str(tiny_policy), "eval_candidates": str(folder), "save_path": "new"} | flags
    with pytest.raises((UsageError, DataError), match=words):
        check_inputs(config_of(**flags), method_of(config_of()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [{}, {"lora_rank": 4, "zero_stage": 3, "micro_batch_size": None, "micro_batch_tokens": 80}], ids=["all", "lora"]
)
def test_a_killed_run_reports_what_its_checkpoints_are_worth(flags, forks, tiny_policy, data, tmp_path):
    """On two ranks. The third step is killed and the reference is gone, so the resumed run computes it anew, of the
    untrained weights: the ratios are those that plain evaluation of the checkpoints gives."""
    tokenizer = chat.load_tokenizer(str(tiny_policy))
    folder = write_candidates(tmp_path / "candidates", tokenizer)
    save, log = tmp_path / "run", tmp_path / "log"
    words = flags_of(tiny_policy, data, save, eval_candidates=folder, eval_mixture="m=x:0.25,y:0.75", **flags)
    words = {name: value for name, value in words.items() if value is not None}
    assert -9 in run_ranks(forks, words, log, [fault("loop:train_step", 3)])
    (save / "reference_candidates.safetensors").unlink()
    assert run_ranks(forks, words, log) == [0, 0], said(log)
    assert "9 candidates of 3 prompts; mean x 0." in said(log)

    candidates = load_candidates(str(folder), "test", tokenizer, {"m": {"x": 0.25, "y": 0.75}})
    start_C = answer_logprobs(str(tiny_policy), "float32", candidates, 64, "start")
    shape, metrics = candidates.scores_NKO.shape[:2], {line["step"]: line for line in metrics_of(save)}
    for step in (0, 2, 4):
        path = save / "candidates" / f"step_{step}.safetensors"
        with safe_open(path, framework="numpy") as stored:
            assert (stored.metadata()["candidates"], stored.metadata()["step"]) == (candidates.key, str(step))
        found = load_file(path)
        ratio_NK = found["log_ratio"]
        assert ratio_NK.dtype == np.float32 and ratio_NK.shape == shape == (3, 4)
        assert found["prompt_id"].tolist() == [7, 8, 9]
        assert found["sample_id"].tolist() == [[0, 1, 2, -1], [0, 1, -1, -1], [0, 1, 2, 3]]
        if step == 0:
            assert np.array_equal(ratio_NK, candidates.table(np.zeros(9)).astype(np.float32), equal_nan=True)
            continue
        ours_C = answer_logprobs(str(save / f"global_step_{step}"), "float32", candidates, 64, "step")
        expected_NK = candidates.table(ours_C - start_C)
        assert np.nanstd(expected_NK) > 0.01
        np.testing.assert_allclose(ratio_NK, expected_NK, atol=2e-4, equal_nan=True)
        values_NO, sizes_N = values(ratio_NK, candidates.scores_NKO)
        line = metrics[step]
        assert [line[f"eval_value.{name}"] for name in "xym"] == pytest.approx(values_NO.mean(axis=0).tolist())
        assert line["eval_candidates_ess"] == pytest.approx(float(sizes_N.mean()))
    assert "eval_value.x" not in metrics[3]

    assert run_ranks(forks, words, log) == [0, 0] and "nothing to do" in said(log)
    assert run_ranks(forks, words | {"max_candidate_prompts": 2}, log) == [2, 2]
    assert "is complete, but was not evaluated on the candidates" in said(log)


def test_equal_scores_have_no_unit(tiny_policy, tmp_path):
    """The standard deviation of 0.3 thirty times is 5e-17 by rounding."""
    tokenizer = chat.load_tokenizer(str(tiny_policy))
    path = write_candidates(tmp_path / "candidates", tokenizer, [10] * 3) / "test.jsonl"
    rows = [row | {"scores": row["scores"] | {"x": 0.3}} for _, row in read_rows(path)]
    write_rows(path, rows)
    assert np.full(30, 0.3).std() > 0
    assert load_candidates(str(path.parent), "test", tokenizer, {}).units["x"] == 0
    with pytest.raises(DataError, match="all have the same score in x"):
        load_candidates(str(path.parent), "test", tokenizer, {"m": {"x": 1.0}})
