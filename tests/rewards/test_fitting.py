"""Fitting as a command on a small random backbone: from rated answers to a folder that loads as a reward model."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from drdpo.assets.reward_model import make_reward_model
from drdpo.chat import conversation_token_ids, load_tokenizer
from drdpo.config import FitHeadsConfig
from drdpo.errors import DataError, UsageError
from drdpo.records import write_rows
from drdpo.rewards.armorm import load_armorm
from drdpo.rewards.batching import pad_right
from drdpo.rewards.features import Features, layer_features
from drdpo.rewards.fitting import fit_reward_heads
from drdpo.rewards.labels import Scale
from drdpo.rewards.ratings import read_ratings

OBJECTIVES = ["mine-warm=warm", "mine-sure=sure", "mine-long=long"]


def answer(g: random.Random, warm: bool, sure: bool, long: bool) -> str:
    words = [g.choice(["sun", "rain", "tea", "book", "road"]) for _ in range(40 if long else 8)]
    return f"{'Warm thanks' if warm else 'Cold refusal'} {' '.join(words)}" + 4 * (" surely" if sure else " perhaps")


def rated_rows(prompts: range) -> list[dict[str, Any]]:
    """Two answers a prompt: a warm and a cold one, each sure or not, and long or not. Length says all of `long`."""
    g = random.Random(prompts.start)
    rows = []
    for prompt in prompts:
        text = f"Question {prompt}?" + ("\n<extra_id_1>Assistant\nYes\n<extra_id_1>User\nMore" if prompt % 5 == 0 else "")
        for warm in (True, False):
            sure, long = g.random() < 0.5, g.random() < 0.5
            row = {"prompt": text, "response": answer(g, warm, sure, long)}
            rows.append(row | {"warm": 4 * warm, "sure": 1 + 2 * sure, "long": 3 * long})
    return rows


def preference_rows(prompts: range) -> list[dict[str, Any]]:
    g = random.Random(prompts.start)
    return [
        {
            "prompt": f"Wish {prompt}?",
            "chosen": answer(g, True, g.random() < 0.5, g.random() < 0.5),
            "rejected": answer(g, False, g.random() < 0.5, g.random() < 0.5),
            "metadata": {"score_chosen": 9.0, "score_rejected": 9.0 if prompt % 10 == 0 else 2.0},
        }
        for prompt in prompts
    ]


@pytest.fixture
def config(tmp_path: Path, tiny_policy: Path, root: Path) -> Callable[..., FitHeadsConfig]:
    write_rows(tmp_path / "train ratings.jsonl", rated_rows(range(40)))
    write_rows(tmp_path / "held out.jsonl", rated_rows(range(100, 120)))
    write_rows(tmp_path / "train pairs.jsonl", preference_rows(range(40)))
    write_rows(tmp_path / "held out pairs.jsonl", preference_rows(range(100, 120)))

    def make(**fields: Any) -> FitHeadsConfig:
        given = {
            "backbone": str(tiny_policy), "ratings": str(tmp_path / "train ratings.jsonl"),
            "validation": str(tmp_path / "held out.jsonl"), "output_path": str(tmp_path / "fitted heads"),
            "objectives": OBJECTIVES, "quality": ["warm"], "verbosity": "mine-sure", "gate_steps": 20, "dtype": "float32",
            "chat_template": str(root / "src/drdpo/assets/armorm_smollm2/chat_template.jinja"),
            "attribution": "Made up here, CC0.", "remarks": "Tried one layer.", "gating_hidden_dim": 8,
        }  # fmt: skip
        return FitHeadsConfig(**(given | fields))

    return make


def with_pairs(tmp_path: Path) -> dict[str, str]:
    return {
        "preferences": str(tmp_path / "train pairs.jsonl"),
        "preferences_validation": str(tmp_path / "held out pairs.jsonl"),
    }


def test_fitted_heads_load_and_predict_held_out_ratings(
    config: Callable[..., FitHeadsConfig], tiny_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_reward_heads(config(cache=str(tmp_path / "cache")))
    printed = capsys.readouterr().out
    heads = tmp_path / "fitted heads"
    names = ["README.md", "chat_template.jinja", "config.json", "heads.safetensors"]
    assert sorted(file.name for file in heads.iterdir()) == names
    written = json.loads((heads / "config.json").read_text())
    # Length alone gives `long`, so no head may claim it.
    assert written["objectives"] == ["mine-warm", "mine-sure"]
    assert "dropped: mine-long does not clearly beat a constant and the answer's length" in printed
    assert written["num_hidden_layers"] == 2
    assert written["gating_token_pattern"] == [2, 198, 1, 520, 9531, 198]
    make_reward_model(tmp_path / "reward model", tiny_policy, heads)
    model, tokenizer = load_armorm(tmp_path / "reward model", "cpu", torch.float32), load_tokenizer(str(tiny_policy))
    tokenizer.chat_template = (heads / "chat_template.jinja").read_text()
    ratings = read_ratings(tmp_path / "held out.jsonl", ["warm", "sure"], ["warm"], Scale(4, 0.5))
    sequences = [conversation_token_ids(tokenizer, messages) for messages in ratings.conversations]
    rewards = model(*pad_right(sequences, 0, torch.device("cpu")))
    rated_NK, predicted_NK = 5 * ratings.labels_NK - 0.5, 5 * rewards.stage1.numpy() - 0.5  # back to ratings
    assert set(rated_NK[:, 0]) == {0.0, 4.0}
    error, constant_error = ((predicted_NK - rated_NK) ** 2).mean(axis=0), rated_NK.var(axis=0)
    assert error[0] < 0.5 * constant_error[0]
    held_out = next(line for line in reversed(printed.splitlines()) if "mine-warm" in line and "yes" in line)
    assert f"{error[0]:.3f}" in held_out  # the printed figure is that of the model that was written
    better_P, worse_P = ratings.pairs_P2.T
    gated = float((rewards.stage2[better_P] > rewards.stage2[worse_P]).float().mean())
    assert f"{gated:.3f}" in next(line for line in printed.splitlines() if "ArmoRM (gated)" in line)
    card = (heads / "README.md").read_text()
    for text in (
        held_out,
        "Made up here, CC0.",
        "Tried one layer.\n",
        "--ratings='",
        "Dropped: mine-long.",
        "5 x - 0.5, from 0 to 4",
    ):
        assert text in card
    fit_reward_heads(config(cache=str(tmp_path / "cache"), output_path=str(tmp_path / "second")))
    assert "80 conversations, layers 2, from" in capsys.readouterr().out
    assert (tmp_path / "second" / "heads.safetensors").read_bytes() == (heads / "heads.safetensors").read_bytes()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_assembled_model_reads_what_was_fitted_on(
    config: Callable[..., FitHeadsConfig], tiny_policy: Path, tmp_path: Path, pooling: str
) -> None:
    from transformers import AutoModel

    fit_reward_heads(config(layers=[1], pooling=pooling, drop_weak=False, **with_pairs(tmp_path)))
    heads, folder = tmp_path / "fitted heads", tmp_path / "reward model"
    make_reward_model(folder, tiny_policy, heads)
    model, tokenizer = load_armorm(folder, "cpu", torch.float32), load_tokenizer(str(folder))
    assert (model.layout.pooling, len(model.model.layers)) == (pooling, 1)
    ratings = read_ratings(tmp_path / "held out.jsonl", ["warm"], ["warm"], Scale(4, 0.5))
    sequences = [conversation_token_ids(tokenizer, messages) for messages in ratings.conversations]
    backbone = AutoModel.from_pretrained(tiny_policy, dtype=torch.float32).eval()
    pattern = json.loads((heads / "config.json").read_text())["gating_token_pattern"]
    features: Features = layer_features(backbone, [1, 2], sequences, pattern, 400)[1]
    weight_KD = load_file(heads / "heads.safetensors")["regression_layer.weight"]
    assert weight_KD.shape == (4, 32)
    rewards = model(*pad_right(sequences, 0, torch.device("cpu")))
    torch.testing.assert_close(rewards.stage1, features.answer(pooling) @ weight_KD.T, atol=1e-4, rtol=1e-4)
    expected = model.heads(features.answer(pooling), features.gate_ND)
    torch.testing.assert_close(rewards.stage2, expected.stage2, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(features.last_ND, features.mean_ND, atol=0.1)


def test_preferences_give_an_objective_and_pairs(
    config: Callable[..., FitHeadsConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_reward_heads(config(layers=[2, 1], **with_pairs(tmp_path)))
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "fitted heads" / "config.json").read_text())
    assert written["objectives"] == ["mine-warm", "mine-sure", "ultrafeedback-overall_score"]
    assert "gate: 76 pairs" in printed  # 40 of the ratings, 40 - 4 with different scores of the preferences
    assert "train pairs.jsonl: rows that make no pair, equal scores: 4" in printed
    assert "Pairs of held out.jsonl (ratings): 20." in printed
    assert "Pairs of held out pairs.jsonl (preferences): 18." in printed
    card = (tmp_path / "fitted heads" / "README.md").read_text()
    assert "ultrafeedback-overall_score stands for the rating 10 x, from 0 to 10" in card
    assert "120 training answers" not in card
    assert "160 training answers; 80 held-out answers" in card
    assert (written["num_hidden_layers"], written["pooling"]) in [(1, "last"), (1, "mean"), (2, "last"), (2, "mean")]
    marked = next(line for line in card.splitlines() if "(chosen)" in line).split("|")
    assert (int(marked[1]), marked[2].split()[0]) == (written["num_hidden_layers"], written["pooling"])
    assert sum(line.startswith("|") and (" last " in line or " mean " in line[:20]) for line in card.splitlines()) >= 4


def test_preferences_without_scores_give_pairs(config: Callable[..., FitHeadsConfig], tmp_path: Path) -> None:
    for name, prompts in (("train pairs.jsonl", range(40)), ("held out pairs.jsonl", range(100, 120))):
        write_rows(tmp_path / name, [{**row, "metadata": None} for row in preference_rows(prompts)])
    with pytest.raises(
        DataError, match='no row has a rating in the field "score_chosen"; without scores, give --preferences_obj'
    ):
        fit_reward_heads(config(**with_pairs(tmp_path)))
    fit_reward_heads(config(preferences_objective="", **with_pairs(tmp_path)))
    written = json.loads((tmp_path / "fitted heads" / "config.json").read_text())
    assert written["objectives"] == ["mine-warm", "mine-sure"]
    card = (tmp_path / "fitted heads" / "README.md").read_text()
    assert "Pairs of held out pairs.jsonl (preferences): 20." in card
    assert "--preferences_objective=''" in card


def test_without_a_head_for_verbosity_nothing_is_debiased(
    config: Callable[..., FitHeadsConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_reward_heads(config(verbosity="mine-long"))
    assert "mine-long is no head, so nothing is taken out of the others" in capsys.readouterr().out
    heads = load_file(tmp_path / "fitted heads" / "heads.safetensors")
    assert torch.equal(heads["reward_transform_matrix"], torch.eye(2))
    assert "no debiasing, since mine-long was dropped" in (tmp_path / "fitted heads" / "README.md").read_text()
    fit_reward_heads(config(verbosity="mine-long", drop_weak=False))
    heads = load_file(tmp_path / "fitted heads" / "heads.safetensors")
    assert heads["reward_transform_matrix"].shape == (3, 3)
    assert heads["reward_transform_matrix"][2, 2] == 0


def test_held_out_prompts_that_were_trained_on_do_not_count(
    config: Callable[..., FitHeadsConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leaked = [{**row, "prompt": f" {row['prompt']}\n"} for row in rated_rows(range(1, 4))]
    shared = [{**row, "prompt": "Wish 1?"} for row in rated_rows(range(1))]
    write_rows(tmp_path / "held out.jsonl", [*leaked, *shared, *rated_rows(range(100, 120))])
    fit_reward_heads(config(**with_pairs(tmp_path)))
    assert "held out.jsonl: 8 answers left out, whose prompt is also among those of training" in capsys.readouterr().out
    assert "80 held-out answers" in (tmp_path / "fitted heads" / "README.md").read_text()


def test_wrong_commands_are_refused(config: Callable[..., FitHeadsConfig], tiny_policy: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds a model"):
        fit_reward_heads(config(output_path=str(tiny_policy)))
    with pytest.raises(UsageError, match=r"--layers 3: the backbone .* has 2 layers"):
        fit_reward_heads(config(layers=[1, 3]))
    with pytest.raises(DataError, match="every held-out prompt is also among"):
        fit_reward_heads(config(validation=str(tmp_path / "train ratings.jsonl")))
    with pytest.raises(DataError, match="no conversation can be rendered within --max_len=5"):
        fit_reward_heads(config(max_len=5))
    with pytest.raises(DataError, match="no objective clearly beats a constant"):
        fit_reward_heads(config(objectives=["mine-long=long"], quality=["long"], verbosity=""))
    write_rows(tmp_path / "train ratings.jsonl", rated_rows(range(4)))
    with pytest.raises(DataError, match="4 prompts with mine-warm; fitting needs at least 10"):
        fit_reward_heads(config())
    for fields, message in (
        ({"objectives": ["warm"]}, "write NAME=COLUMN"),
        ({"objectives": ["ultrafeedback-overall_score=warm"], "verbosity": ""}, "is given twice or taken"),
        ({"verbosity": "mine-short"}, "--verbosity=mine-short"),
        ({"quality": ["cold"]}, "no objective is fitted on this column"),
        ({"gating_temperature": 0.0}, "must be positive"),
        ({"highest_score": 0.0}, "must be positive"),
        ({"layers": [0]}, "counted from 1"),
        ({"preferences": "some.jsonl"}, "go together"),
        ({"preferences_objective": "ArmoRM"}, "the name of the gated score"),
    ):
        with pytest.raises(UsageError, match=message):
            config(**fields)
    assert not (tmp_path / "fitted heads").exists()


def test_figures_are_printed_with_both_intervals(
    config: Callable[..., FitHeadsConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    fit_reward_heads(config(objectives=["mine-warm=warm"], verbosity=""))
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if "Pearson (95% interval)" in line)
    row = lines[lines.index(head) + 2]
    cells = dict(zip((cell.strip() for cell in head.split("|")), (cell.strip() for cell in row.split("|")), strict=True))
    for name in ("Pearson (95% interval)", "Spearman (95% interval)"):
        value, low, high = (float(word.strip("()")) for word in cells[name].replace(" to ", " ").split())
        assert -1 <= low <= value <= high <= 1
    assert np.isfinite(float(cells["ridge alpha"]))
