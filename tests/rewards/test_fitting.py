"""Fitting as a command on a small random backbone: from ratings to a folder that loads as a reward model."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drdpo.chat import conversation_token_ids, load_tokenizer
from drdpo.config import FitHeadsConfig
from drdpo.errors import DataError, UsageError
from drdpo.records import write_rows
from drdpo.rewards.armorm import load_armorm
from drdpo.rewards.batching import pad_right
from drdpo.rewards.features import cached_features, gating_pattern, hidden_states_at
from drdpo.rewards.fitting import fit_reward_heads
from drdpo.rewards.ratings import rating_pairs, read_ratings

OBJECTIVES = ["mine-warm=warm", "mine-long=long"]


def rated_rows(prompts: range) -> list[dict[str, Any]]:
    """Two answers a prompt: a warm and a cold one, the second much longer."""
    g = random.Random(prompts.start)
    rows = []
    for prompt in prompts:
        words = [g.choice(["sun", "rain", "tea", "book", "road"]) for _ in range(4)]
        text = f"Question {prompt} about {words[0]}?" + (
            "\n<extra_id_1>Assistant\nYes\n<extra_id_1>User\nMore" if prompt % 5 == 0 else ""
        )
        rows.append({"prompt": text, "response": f"Warm {words[1]}, thanks", "warm": 4, "long": 0})
        rows.append({"prompt": text, "response": f"Cold {words[2]} " * 9 + words[3], "warm": 0, "long": 3})
    return rows


@pytest.fixture
def config(tmp_path: Path, tiny_policy: Path, root: Path) -> Callable[..., FitHeadsConfig]:
    write_rows(tmp_path / "train ratings.jsonl", rated_rows(range(30)))
    write_rows(tmp_path / "held out.jsonl", rated_rows(range(100, 115)))

    def make(**fields: Any) -> FitHeadsConfig:
        given = {
            "backbone": str(tiny_policy), "ratings": str(tmp_path / "train ratings.jsonl"),
            "validation": str(tmp_path / "held out.jsonl"), "output_path": str(tmp_path / "fitted heads"),
            "objectives": OBJECTIVES, "quality": ["warm"], "verbosity": "mine-long", "gate_steps": 20, "dtype": "float32",
            "chat_template": str(root / "src/drdpo/assets/armorm_smollm2/chat_template.jinja"),
            "attribution": "Made up here, CC0.", "gating_hidden_dim": 8,
        }  # fmt: skip
        return FitHeadsConfig(**(given | fields))

    return make


def assemble(heads: Path, backbone: Path, folder: Path) -> Path:
    """Heads and backbone in one reward model folder, as setup does for the embedded model."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    weights = {
        name: tensor for name, tensor in load_file(backbone / "model.safetensors").items() if name != "lm_head.weight"
    }
    save_file(weights | load_file(heads / "heads.safetensors"), folder / "model.safetensors")
    config = json.loads((backbone / "config.json").read_text()) | json.loads((heads / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((backbone / name).read_bytes())
    (folder / "chat_template.jinja").write_bytes((heads / "chat_template.jinja").read_bytes())
    return folder


def test_fitted_heads_load_and_predict_held_out_ratings(
    config: Callable[..., FitHeadsConfig], tiny_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_reward_heads(config(cache=str(tmp_path / "cache")))
    printed = capsys.readouterr().out
    heads = tmp_path / "fitted heads"
    assert sorted(file.name for file in heads.iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "heads.safetensors",
    ]
    written = json.loads((heads / "config.json").read_text())
    assert written["objectives"] == ["mine-warm", "mine-long"]
    assert written["gating_token_pattern"] == [2, 198, 1, 520, 9531, 198]
    folder = assemble(heads, tiny_policy, tmp_path / "reward model")
    model, tokenizer = load_armorm(folder, "cpu", torch.float32), load_tokenizer(str(folder))
    ratings = read_ratings(tmp_path / "held out.jsonl", ["warm", "long"])
    sequences = [conversation_token_ids(tokenizer, messages) for messages in ratings.conversations]
    rewards = model(*pad_right(sequences, 0, torch.device("cpu")))
    predicted_NK = 5 * rewards.stage1.numpy() - 0.5  # back to ratings
    rated_NK = 5 * ratings.labels_NK - 0.5
    assert set(rated_NK[:, 0]) == {0.0, 4.0}
    error, constant_error = ((predicted_NK - rated_NK) ** 2).mean(axis=0), rated_NK.var(axis=0)
    assert (error < 0.25 * constant_error).all()
    assert f"{error[0]:.3f}" in next(line for line in printed.splitlines() if "mine-warm" in line)  # the printed figure
    card = (heads / "README.md").read_text()
    assert next(line for line in printed.splitlines() if "mine-warm" in line) in card
    assert "Made up here, CC0." in card
    assert "--ratings='" in card
    again = config(cache=str(tmp_path / "cache"), output_path=str(tmp_path / "second"))
    fit_reward_heads(again)
    assert "conversations from" in capsys.readouterr().out
    assert (tmp_path / "second" / "heads.safetensors").read_bytes() == (heads / "heads.safetensors").read_bytes()


def test_features_are_the_hidden_states_at_the_two_positions(tiny_policy: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    backbone = AutoModel.from_pretrained(tiny_policy, dtype=torch.float32).eval()
    pattern = gating_pattern(load_tokenizer(str(tiny_policy)))
    assert pattern == [2, 198, 1, 520, 9531, 198]
    sequences = [[1, 5, *pattern, 9, 2], [1, 7, 8, 9, *pattern, 4, 4, *pattern, 6, 6, 6, 2], [1, *pattern]]
    features = cached_features(backbone, sequences, pattern, 1000, tmp_path / "cache", "key")
    for row, (ids, gate) in enumerate(zip(sequences, (2, 12, 1), strict=True)):
        with torch.no_grad():
            hidden_TD = backbone(torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(features.last_ND[row], hidden_TD[-1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(features.gate_ND[row], hidden_TD[gate], atol=1e-4, rtol=1e-4)
    stored = cached_features(torch.nn.Identity(), sequences, pattern, 1000, tmp_path / "cache", "key")
    assert torch.equal(stored.last_ND, features.last_ND)
    with pytest.raises((AttributeError, TypeError, StopIteration)):  # another key is another backbone: not from the cache
        cached_features(torch.nn.Identity(), sequences, pattern, 1000, tmp_path / "cache", "other")
    assert hidden_states_at(backbone, sequences[:1], [[0, 1, 2]], 8).shape == (1, 3, 32)


def test_ratings_scale_masks_and_pairs(tmp_path: Path) -> None:
    path = tmp_path / "ratings.jsonl"
    rows = [
        {"prompt": "p", "response": "a", "good": 4, "short": None},
        {"prompt": "q", "response": "b", "good": 0, "short": 2},
        {"prompt": "p", "response": "c", "good": 1},
        {"prompt": "p", "response": "d", "good": 4},
    ]
    write_rows(path, rows)
    ratings = read_ratings(path, ["good", "short"])
    np.testing.assert_allclose(ratings.labels_NK[:, 0], [0.9, 0.1, 0.3, 0.9])
    np.testing.assert_allclose(ratings.labels_NK[:, 1], [np.nan, 0.5, np.nan, np.nan])
    assert ratings.prompt_N.tolist() == [0, 1, 0, 0]
    assert rating_pairs(ratings.prompt_N, ratings.labels_NK[:, 0]).tolist() == [[0, 2], [3, 2]]
    assert rating_pairs(ratings.prompt_N, ratings.labels_NK[:, 1]).shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warm": 5}, 'row 2: field "warm" is 5, not a rating from 0 to 4'),
        ({"warm": "4"}, "row 2: field \"warm\" is '4', not a rating"),
        ({"response": " "}, "row 2: field \"response\" is ' ', not a text"),
        ({"prompt": "a\n<extra_id_1>Assistant\nb"}, "row 2: the prompt does not end in a user turn"),
    ],
)
def test_bad_ratings_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    row = {"prompt": "p", "response": "a", "warm": 1}
    write_rows(tmp_path / "ratings.jsonl", [row, row | change])
    with pytest.raises(DataError, match=message):
        read_ratings(tmp_path / "ratings.jsonl", ["warm"])
    write_rows(tmp_path / "ratings.jsonl", [row])
    with pytest.raises(DataError, match='no row has a rating in the field "cold"'):
        read_ratings(tmp_path / "ratings.jsonl", ["warm", "cold"])


def test_held_out_prompts_that_were_trained_on_do_not_count(
    config: Callable[..., FitHeadsConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leaked = [{**row, "prompt": f" {row['prompt']}\n"} for row in rated_rows(range(3))]
    write_rows(tmp_path / "held out.jsonl", [*leaked, *rated_rows(range(100, 115))])
    fit_reward_heads(config())
    printed = capsys.readouterr().out
    assert "6 rows left out, whose prompt is also in" in printed
    assert "30 held-out answers" in (tmp_path / "fitted heads" / "README.md").read_text()


def test_wrong_commands_are_refused(config: Callable[..., FitHeadsConfig], tiny_policy: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds a model"):
        fit_reward_heads(config(output_path=str(tiny_policy)))
    with pytest.raises(DataError, match="every held-out prompt is also in"):
        fit_reward_heads(config(validation=str(tmp_path / "train ratings.jsonl")))
    write_rows(tmp_path / "train ratings.jsonl", rated_rows(range(4)))
    with pytest.raises(DataError, match="4 prompts; fitting needs at least 10"):
        fit_reward_heads(config())
    for fields, message in (
        ({"objectives": ["warm"]}, "write NAME=COLUMN"),
        ({"verbosity": "mine-short"}, "--verbosity=mine-short"),
        ({"quality": ["cold"]}, "no objective is fitted on this column"),
        ({"gating_temperature": 0.0}, "must be positive"),
    ):
        with pytest.raises(UsageError, match=message):
            config(**fields)
    assert not (tmp_path / "fitted heads").exists()
