"""experiments/fit_reward_heads.py: each part on data with a known answer, then the whole on a small random backbone."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fit_reward_heads as fit
import numpy as np
import pytest
import torch
from harness import ROOT
from harness.reward_models import pad_right
from scipy.stats import bootstrap, spearmanr

from drdpo.chat import load_tokenizer
from drdpo.errors import DataError, UsageError
from drdpo.records import write_rows
from drdpo.scoring.armorm import load_armorm

TEMPLATE = ROOT / "src/drdpo/assets/armorm_smollm2/chat_template.jinja"


def solve(x_ND: np.ndarray, y_N: np.ndarray, alpha: float) -> np.ndarray:
    return np.linalg.solve(x_ND.T @ x_ND + alpha * np.eye(x_ND.shape[1]), x_ND.T @ y_N)


def problem(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, two labels, the second on two thirds of the rows only, and folds."""
    g = np.random.default_rng(0)
    x_ND = g.normal(size=(rows, 4))
    labels_NK = x_ND @ [[0.6, 3], [-0.8, 0], [0.4, 1], [0.2, -1]] + g.normal(size=(rows, 2))
    labels_NK[::3, 1] = np.nan
    return x_ND, labels_NK, fit.prompt_folds(np.arange(rows), 0)


def test_ridge_is_the_closed_form_on_the_rows_that_have_the_label():
    x_ND, labels_NK, fold_N = problem(90)
    weight_KD, alpha_K, predicted_NK = fit.fit_ridges(x_ND, labels_NK, fold_N)
    for k in range(2):
        there = ~np.isnan(labels_NK[:, k])
        x, y, fold = x_ND[there], labels_NK[there, k], fold_N[there]
        held_out = {
            alpha: np.array([x[n] @ solve(x[fold != fold[n]], y[fold != fold[n]], alpha) for n in range(len(y))])
            for alpha in fit.ALPHAS
        }
        best = min(held_out, key=lambda alpha: np.square(held_out[alpha] - y).sum())
        assert alpha_K[k] == best
        np.testing.assert_allclose(weight_KD[k], solve(x, y, best), rtol=1e-8)
        np.testing.assert_allclose(predicted_NK[there, k], held_out[best], rtol=1e-8)
        assert np.isnan(predicted_NK[~there, k]).all()


def test_cross_fitted_rewards_never_saw_the_prompt():
    x_ND, labels_NK, fold_N = problem(90)
    rewards_NK, held = fit.cross_fit(x_ND, labels_NK, fold_N), fold_N == 3
    again_NK = fit.cross_fit(x_ND, np.where(held[:, None], 100.0, labels_NK), fold_N)
    np.testing.assert_array_equal(again_NK[held], rewards_NK[held])
    assert (again_NK[~held] != rewards_NK[~held]).all() and not np.isnan(rewards_NK).any()
    two_N = np.repeat(np.arange(23), 2)
    fold_N = fit.prompt_folds(two_N, 42)
    assert (fold_N[0::2] == fold_N[1::2]).all() and sorted(np.bincount(fold_N)) == [8, 8, 10, 10, 10]
    assert (fold_N != fit.prompt_folds(two_N, 43)).any()


def test_whole_prompts_are_resampled():
    x_N = np.random.default_rng(0).normal(size=50).repeat(2)
    error, _ = fit.resample(np.mean, [x_N], np.repeat(np.arange(50), 2), seed=1)
    # Both rows of a prompt are equal, so there are 50 values, not 100.
    assert error == pytest.approx(x_N.std() / 50**0.5, rel=0.1)


def readings(noise: dict[tuple[int, str], float]) -> tuple[tuple[int, str], Any]:
    """`choose` among readings that blur two labels more or less; 300 answers to 150 prompts."""
    g = np.random.default_rng(7)
    signal_ND, prompt_N = g.normal(size=(300, 2)), np.arange(300) // 2
    labels_NK = signal_ND + 0.3 * g.normal(size=(300, 2))
    labels_NK[:100, 1] = np.nan
    features = {place: signal_ND + blur * g.normal(size=(300, 2)) for place, blur in noise.items()}
    return fit.choose(features, labels_NK, prompt_N, fit.prompt_folds(prompt_N, 0), 0)


def test_the_best_reading_is_chosen_and_a_shallower_one_within_a_standard_error():
    place, table = readings({(1, "last"): 2.0, (2, "last"): 1.0, (2, "mean"): 0.1, (3, "mean"): 1.0})
    assert place == (2, "mean") and table["behind the best"].tolist()[2] == 0
    place, table = readings({(2, "last"): 2.0, (4, "last"): 0.6, (4, "mean"): 0.27, (6, "mean"): 0.3})
    behind, error = table["behind the best"].tolist(), table["standard error"].tolist()
    assert behind[3] == 0, "the draw favours the last"
    assert place == (4, "mean") and 0 < behind[2] <= error[2] and behind[1] > error[1]


def test_an_objective_without_signal_beyond_length_is_dropped():
    g = np.random.default_rng(5)
    length_N, other_N, noise_N = g.normal(size=(3, 200))
    labels_NK = np.stack([other_N, length_N + noise_N, noise_N, np.where(np.arange(200) < 50, np.nan, other_N)], axis=1)
    rewards_NK = np.stack([(other_N + noise_N) / 2, length_N, other_N, other_N], axis=1)
    prompt_N = np.arange(200) // 2
    given = fit.Answers([], [], labels_NK, length_N, prompt_N, [None])
    table = fit.claims(given, rewards_NK, fit.prompt_folds(prompt_N, 0), 0)
    assert table["earns a head"].tolist() == [True, False, False, True]
    assert table["rows"].tolist() == [200, 200, 200, 150]
    assert table["lead"][1] == pytest.approx(0, abs=0.01)  # the line is one of length, so its ranks are the same
    assert table["Spearman"][0] == pytest.approx(spearmanr(other_N + noise_N, other_N).statistic)
    # 5 rating points in a unit of a label
    assert table["error"][0] == pytest.approx(np.square(2.5 * (noise_N - other_N)).mean())
    assert table["constant's error"][0] == pytest.approx(25 * other_N.var(), rel=0.05)


def test_margins_become_log_odds():
    assert fit.log_odds_scale(np.array([0.1, 0.1, 0.1, -0.1])) == pytest.approx(10 * math.log(3))
    assert fit.log_odds_scale(np.array([0.1, -0.1, -0.1])) == 1.0  # it prefers the worse answers
    assert fit.log_odds_scale(np.array([0.1, 0.2])) == fit.LARGEST_SCALE  # nothing is wrong: no maximum


def test_the_gate_weights_the_objective_that_a_prompt_asks_for():
    g = torch.Generator().manual_seed(0)
    prompt_PD = 5 * torch.randn(300, 6, generator=g)
    asks_second_P = prompt_PD[:, 0] > 0
    margin_PK = torch.where(torch.stack([~asks_second_P, asks_second_P], 1), 2.0, -2.5)
    fold_P = np.arange(300) % 5
    gate, loss_S = fit.fit_gate(prompt_PD, margin_PK, fold_P, 1)
    # Equal weights: every margin is (2 - 2.5) / 2. No scale helps such a score, so it is 1.
    assert gate.logit_scale.item() == 1.0
    assert loss_S[0] == pytest.approx(math.log1p(math.exp(0.25)))
    assert loss_S.min() < loss_S[0] - 0.1
    with torch.no_grad():
        weight_PK = gate(prompt_PD)
    torch.testing.assert_close(weight_PK.sum(dim=1), torch.ones(300))
    assert ((weight_PK[:, 1] > 0.5) == asks_second_P).float().mean() > 0.95
    same_PK = torch.where(torch.rand(300, 1, generator=g) < 0.75, 0.1, -0.1).expand(300, 2)
    gate, loss_S = fit.fit_gate(prompt_PD, same_PK, fold_P, 1)  # both objectives agree: no weighting is better
    assert loss_S.argmin() == 0
    with torch.no_grad():
        torch.testing.assert_close(gate(prompt_PD), torch.full((300, 2), gate.logit_scale.item() / 2))
    right = (same_PK[:, 0] > 0).double().mean().item()
    assert gate.logit_scale.item() == pytest.approx(10 * math.log(right / (1 - right)), rel=1e-5)


def words(g: random.Random, warm: bool, sure: bool, long: bool) -> str:
    middle = [g.choice(["sun", "rain", "tea", "book", "road"]) for _ in range(40 if long else 8)]
    return f"{'Warm thanks' if warm else 'Cold refusal'} {' '.join(middle)}" + 4 * (" surely" if sure else " perhaps")


def rated_rows(prompts: range) -> list[dict[str, Any]]:
    """Two answers a prompt: a warm one, which is helpful and correct, and a cold one; each sure (complex) or not, and long
    (verbose) or not. Coherence is chance."""
    g, rows = random.Random(prompts.start), []
    for prompt in prompts:
        text = f"Question {prompt}?" + ("\n<extra_id_1>Assistant\nYes\n<extra_id_1>User\nMore" if prompt % 5 == 0 else "")
        for warm in (True, False):
            sure, long = g.random() < 0.5, g.random() < 0.5
            rated = dict(zip(fit.RATINGS, (4 * warm, 1 + 3 * warm, g.randrange(5), 1 + 2 * sure, 3 * long), strict=True))
            rows.append({"prompt": text, "response": words(g, warm, sure, long)} | rated)
    return rows


def preference_rows(prompts: range) -> list[dict[str, Any]]:
    g = random.Random(prompts.start)
    say = lambda warm: words(g, warm, g.random() < 0.5, g.random() < 0.5)  # noqa: E731
    scores = lambda prompt: {"score_chosen": 9.0, "score_rejected": 9.0 if prompt % 10 == 0 else 2.0}  # noqa: E731
    return [
        {"prompt": f"Wish {prompt}?", "chosen": say(True), "rejected": say(False), "metadata": scores(prompt)}
        for prompt in prompts
    ]


@pytest.fixture
def config(tmp_path: Path, tiny_policy: Path) -> Callable[..., fit.FitConfig]:
    """The flags for four files that are written first."""
    files = {
        "ratings": rated_rows(range(40)), "validation": rated_rows(range(35, 55)),
        "preferences": preference_rows(range(40)), "preferences_validation": preference_rows(range(100, 120)),
    }  # fmt: skip
    for name, rows in files.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    given = {name: str(tmp_path / f"{name}.jsonl") for name in files} | {"backbone": str(tiny_policy), "dtype": "float32"}
    given |= {"output_path": str(tmp_path / "fitted"), "chat_template": str(TEMPLATE)}
    return lambda **fields: fit.FitConfig(**(given | fields))


def test_answers_are_read_with_armorms_labels(config, capsys):
    flags = config()
    tokenizer = load_tokenizer(flags.backbone)
    tokenizer.chat_template = TEMPLATE.read_text()
    assert fit.gating_pattern(tokenizer) == [2, 198, 1, 520, 9531, 198]
    train = fit.read_side((flags.ratings, flags.preferences), tokenizer, 400)
    np.testing.assert_allclose(train.labels_NK[0, [0, 1, 5]], [0.9, 0.9, np.nan])  # ArmoRM's card: rating = 5 x - 0.5
    np.testing.assert_allclose(train.labels_NK[82], [*[np.nan] * 5, 0.9])  # rating = 10 x
    assert train.pairs[0].tolist()[:2] == [[0, 1], [2, 3]]
    assert train.pairs[1].tolist()[:2] == [[82, 83], [84, 85]]  # the first row's scores are equal
    assert [len(pairs) for pairs in train.pairs] == [40, 36]
    assert train.prompt_N.tolist() == [n // 2 for n in range(160)]
    capsys.readouterr()
    held = fit.read_side((flags.validation, flags.preferences_validation), tokenizer, 400, frozenset(train.prompts))
    assert "30 answers, 15 pairs; omitted: {'prompt also in training': 10}" in capsys.readouterr().out
    assert not set(held.prompts) & set(train.prompts)
    with pytest.raises(DataError, match=r"ratings\.jsonl: too few answers"):
        fit.read_side((flags.ratings, flags.preferences), tokenizer, 10)
    for name, row, message in (
        ("ratings", {"prompt": "x", "response": "y", "helpfulness": 5}, r'row 1: field "helpfulness" is 5, not a number'),
        ("ratings", {"prompt": "x"}, r"row 1: fields .* must be strings"),
        ("preferences", {"prompt": "x", "chosen": "y", "rejected": "z"}, r'row 1: field "score_chosen" is None'),
        ("preferences", {"prompt": "x", "chosen": "y"}, r'row 1: field "rejected" is missing'),
    ):
        write_rows(Path(getattr(flags, name)), [row])
        with pytest.raises(DataError, match=message):
            getattr(fit, f"read_{name}")(Path(getattr(flags, name)))


def test_the_fitted_model_scores_as_it_was_fitted(config, monkeypatch, capsys):
    monkeypatch.setattr(fit, "bootstrap", lambda *words, **settings: bootstrap(*words, **settings | {"n_resamples": 30}))
    flags = config(layers=[2, 1])
    fit.fit_reward_heads(flags)
    heads, folder = (Path(flags.output_path) / name for name in ("heads", "model"))
    found = sorted(path.name for path in heads.iterdir())
    assert found == ["README.md", "chat_template.jinja", "config.json", "heads.safetensors"]
    written = json.loads((heads / "config.json").read_text())
    layer, objectives = written["num_hidden_layers"], written["objectives"]
    assert {"helpsteer-helpfulness", "helpsteer-complexity", "ultrafeedback-overall_score"} <= set(objectives)
    assert not {"helpsteer-coherence", "helpsteer-verbosity"} & set(objectives)  # chance; verbosity never gets a head
    model, tokenizer = load_armorm(folder, "cpu", torch.float32), load_tokenizer(str(folder))
    assert (len(model.model.layers), model.layout.pooling) == (layer, written["pooling"])
    held = fit.read_side((flags.validation, flags.preferences_validation), tokenizer, 400)
    backbone, layers = fit.load_backbone(flags)
    read = fit.read_features(backbone, layers, held, written["gating_token_pattern"])
    rewards = model(*pad_right(held.token_ids, 0))
    expected = model.heads(read[layer, written["pooling"]], read[layer, "gate"])
    torch.testing.assert_close(rewards.stage1, expected.stage1, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rewards.stage2, expected.stage2, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(read[1, "last"], read[2, "last"], atol=0.1)
    # Within half a rating point of the truth; a constant is off by 2.
    rated_N = held.labels_NK[:40, 0]
    error_N = rewards.stage1[:40, objectives.index("helpsteer-helpfulness")].numpy() - rated_N
    assert np.square(error_N).mean() < 0.5 * rated_N.var()
    card = (heads / "README.md").read_text()
    assert card in capsys.readouterr().out
    better_P, worse_P = held.pairs[1].T
    gated = (rewards.stage2[better_P] > rewards.stage2[worse_P]).float().mean().item()
    row = next(line for line in card.split("Held-out preferences: 18 pairs")[1].splitlines() if "ArmoRM (gated)" in line)
    assert float(row.split("|")[2]) == pytest.approx(gated, abs=1e-3)
    with pytest.raises(UsageError, match="is not empty"):
        config(output_path=flags.backbone)
    with pytest.raises(UsageError, match="must be at least 1"):
        config(layers=[0])
    with pytest.raises(UsageError, match=r"--layers 3: .* has 2 layers"):
        fit.load_backbone(config(layers=[1, 3], output_path=flags.output_path + " 2"))
