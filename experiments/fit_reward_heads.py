"""Fit a reward model in ArmoRM's layout (Wang et al. 2024, arXiv 2406.12845) to human ratings, on a frozen backbone.

    stage 1   per objective a ridge regression without intercept on a hidden state of the answer
    stage 2   a gate over the objectives, fitted by Bradley-Terry on pairs; the transform is the identity, since verbosity,
              which ArmoRM's transform removes from the other objectives, gets no head

Layer, pooling, penalties, objectives and gate steps are chosen by cross-validation over the training prompts. The gate and
the comparison with the baselines use cross-fitted rewards, each from heads that never saw the prompt: a head scores the
answers it was fitted to too well, and a gate would trust it. The held-out files only serve to report metrics.

Writes <output_path>/heads (heads.safetensors, config.json, README.md, chat_template.jinja) and <output_path>/model, the
same heads on their backbone, for --reward_model. src/drdpo/assets/armorm_smollm2 was made this way.

Shape suffixes: N answers, D width, K objectives, P pairs, A penalties, S gate steps.
"""

import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import bootstrap, spearmanr
from sklearn.dummy import DummyRegressor
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm
from transformers import AutoModel

from drdpo import distributed
from drdpo.assets.download import split_helpsteer_turns
from drdpo.assets.embedded import make_reward_model
from drdpo.chat import Tokenizer, conversation_token_ids, load_tokenizer, prompt_token_ids
from drdpo.cli import check_bounds, flag, parse, require
from drdpo.errors import DataError, one_line_errors
from drdpo.folder import atomic_folder
from drdpo.kernels.packed_attention import PackedRow, hidden_states
from drdpo.machine import announce, settle
from drdpo.records import Message, Preference, read_rows
from drdpo.scoring.armorm import POOLINGS, GatingNetwork, find_span, packed_batches
from drdpo.scoring.score import use_cpu_well

RATINGS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
OBJECTIVES = (*(f"helpsteer-{column}" for column in RATINGS), "ultrafeedback-overall_score")
VERBOSITY = OBJECTIVES.index("helpsteer-verbosity")
POINTS = (5.0, 5.0, 5.0, 5.0, 5.0, 10.0)
"""Rating points per unit of a label. ArmoRM's labels: (rating + 0.5) / 5 for HelpSteer, score / 10 for UltraFeedback."""
ALPHAS = np.logspace(-4, 4, 17)
"""The paper's ridge penalties."""
FOLDS, BATCH_TOKENS = 5, 4096
GATE, GATE_STEPS = {"hidden_dim": 64, "n_hidden": 1, "temperature": 10.0}, 300
LARGEST_SCALE = 1000.0
"""Of the gated score: if every margin has the right sign, the likelihood has no maximum."""


@dataclass(frozen=True)
class FitConfig:
    """Fit the heads of a multi-objective reward model on a frozen backbone."""

    backbone: str = flag("Hugging Face folder of a Llama-family model")
    ratings: str = flag(f"JSON lines {{prompt, response, {', '.join(RATINGS)}}}, ratings 0 to 4, as in HelpSteer2")
    validation: str = flag("held-out ratings, for the reported metrics only")
    preferences: str = flag("JSON lines {prompt, chosen, rejected, score_chosen, score_rejected}, scores 0 to 10")
    preferences_validation: str = flag("held-out preferences, for the reported metrics only")
    output_path: str = flag("new folder for heads/ and model/")
    layers: list[int] = flag("candidate depths of the backbone, counted from 1 (default: its full depth)", [], at_least=1)
    chat_template: str | None = flag("file with the chat template of the reward model (default: the backbone's)", None)
    max_len: int = flag("longest conversation in tokens; longer ones are omitted", 2048, at_least=1)
    dtype: Literal["auto", "bfloat16", "float32"] = flag(
        "precision of the backbone; heads are float32; 'auto' as in training", "auto"
    )
    seed: int = flag("seed of the folds, the gate and the bootstrap", 42, at_least=0)

    def __post_init__(self) -> None:
        check_bounds(self)
        target = Path(self.output_path)
        require(
            not target.exists() or not any(target.iterdir()), f"--output_path={target} is not empty; choose another folder"
        )


class Answer(NamedTuple):
    """A rated answer. Two answers of one group make a pair, in which the one of higher quality is better."""

    group: str
    messages: list[Message]
    labels_K: list[float]
    """NaN if not rated."""
    quality: float

    @property
    def prompt(self) -> str:
        """Equal for prompts that differ only in outer white space."""
        return json.dumps([[message["role"], message["content"].strip()] for message in self.messages[:-1]])

    @property
    def text(self) -> str:
        return self.messages[-1]["content"].strip()


class Answers(NamedTuple):
    """The answers of both files, training or held out."""

    token_ids: list[list[int]]
    prompts: list[str]
    labels_NK: np.ndarray
    length_N: np.ndarray
    """Log of the number of characters."""
    prompt_N: np.ndarray
    """Index of the prompt."""
    pairs: list[np.ndarray]
    """Per file [P, 2] (better, worse)."""


def read_ratings(path: Path) -> list[Answer]:
    """Answers of a file in HelpSteer2's format; the answer with higher helpfulness + correctness is better."""
    answers = []
    for number, row in read_rows(path):
        try:
            if not isinstance(row.get("prompt"), str) or not isinstance(row.get("response"), str):
                raise ValueError('fields "prompt" and "response" must be strings')
            messages = [*split_helpsteer_turns(row["prompt"]), {"role": "assistant", "content": row["response"]}]
            rated = [_number(row, column, 4) for column in RATINGS]
        except ValueError as error:
            raise DataError(f"{path}, row {number}: {error}") from error
        answer = Answer("", messages, [*((rating + 0.5) / 5 for rating in rated), math.nan], rated[0] + rated[1])
        answers.append(answer._replace(group=answer.prompt))
    return answers


def read_preferences(path: Path) -> list[Answer]:
    """Two answers per row, with scores in the row or its metadata; rows with an empty answer are omitted."""
    answers = []
    for number, row in read_rows(path):
        try:
            pair = Preference.from_trl({**row, "chosen_score": None, "rejected_score": None}, number)
            fields = {**row["metadata"], **row} if isinstance(row.get("metadata"), dict) else row
            scores = [_number(fields, f"score_{side}", 10) for side in ("chosen", "rejected")]
        except ValueError as error:
            raise DataError(f"{path}, row {number}: {error}") from error
        both = [
            Answer(f"row {number}", [*pair.prompt, *answer], [*[math.nan] * len(RATINGS), score / 10], score)
            for answer, score in zip((pair.chosen, pair.rejected), scores, strict=True)
        ]
        answers += both if all(answer.text for answer in both) else []
    return answers


def _number(row: dict[str, Any], name: str, highest: float) -> float:
    value = row.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= highest:
        raise ValueError(f'field "{name}" is {value!r}, not a number from 0 to {highest}')
    return float(value)


def read_side(paths: Sequence[str], tokenizer: Tokenizer, max_len: int, seen: frozenset[str] = frozenset()) -> Answers:
    """Read a ratings and a preferences file without the prompts in `seen`; prints what was omitted."""
    kept: list[Answer] = []
    token_ids, pairs = [], []
    for path, read in zip(map(Path, paths), (read_ratings, read_preferences), strict=True):
        omitted, groups, start = Counter[str](), defaultdict[str, list[int]](list), len(kept)
        for answer in read(path):
            try:
                ids = conversation_token_ids(tokenizer, answer.messages)
            except ValueError:
                ids = []
            if answer.prompt in seen:
                omitted["prompt also in training"] += 1
            elif not 0 < len(ids) <= max_len:
                omitted[f"more than {max_len} tokens" if ids else "refused by the chat template"] += 1
            else:
                groups[answer.group].append(len(kept))
                kept.append(answer)
                token_ids.append(ids)
        two = (pair for rows in groups.values() for pair in itertools.combinations(rows, 2))
        ordered = (sorted(pair, key=lambda row: -kept[row].quality) for pair in two)
        found = [(a, b) for a, b in ordered if kept[a].quality > kept[b].quality and kept[a].text != kept[b].text]
        if len(groups) < 2 * FOLDS or not found:
            raise DataError(f"{path}: too few answers: {len(groups)} prompts, {len(found)} pairs that differ in quality")
        pairs.append(np.array(found))
        print(f"{path}: {len(kept) - start} answers, {len(found)} pairs; omitted: {dict(omitted)}", flush=True)
    prompts = [answer.prompt for answer in kept]
    length_N = np.log([len(answer.messages[-1]["content"]) for answer in kept])
    labels_NK = np.array([answer.labels_K for answer in kept])
    return Answers(token_ids, prompts, labels_NK, length_N, pd.factorize(pd.Series(prompts))[0], pairs)


def gating_pattern(tokenizer: Tokenizer) -> list[int]:
    """The template's token ids between a prompt and its answer: the common ending of two different prompts."""
    first, second = (prompt_token_ids(tokenizer, [{"role": "user", "content": text}]) for text in ("apple", "seven"))
    same = list(itertools.takewhile(lambda ids: ids[0] == ids[1], zip(reversed(first), reversed(second), strict=False)))
    if not same:
        raise DataError(
            "the chat template writes nothing between a prompt and its answer, so the gate has no position to read"
        )
    return first[-len(same) :]


def load_backbone(config: FitConfig) -> tuple[Any, list[int]]:
    """The frozen backbone, cut to the deepest candidate layer, and the candidates (default: the last layer).

    Raises:
        DataError: it is not a Llama-family model.
        UsageError: it has fewer layers than --layers.
    """
    use_cpu_well(distributed.device())
    model: Any = AutoModel.from_pretrained(config.backbone, dtype=getattr(torch, config.dtype), use_safetensors=True)
    if not hasattr(model, "layers") or not hasattr(model, "norm"):
        raise DataError(f"{config.backbone}: a {type(model).__name__} is not of the Llama family (layers, then a norm)")
    layers = sorted(set(config.layers)) or [len(model.layers)]
    require(layers[-1] <= len(model.layers), f"--layers {layers[-1]}: {config.backbone} has {len(model.layers)} layers")
    model.layers, model.config.num_hidden_layers = model.layers[: layers[-1]], layers[-1]
    return model.to(distributed.device()).eval().requires_grad_(False), layers


@torch.inference_mode()
def read_features(model: Any, layers: list[int], answers: Answers, pattern: list[int]) -> dict[tuple[int, str], Tensor]:
    """{(layer, "last", "mean" or "gate"): [N, D] float32}: hidden states of the last token, averaged over the answer, and at
    the gate position, after a layer and the FINAL norm, as in a backbone cut to this depth."""
    spans = [find_span(ids, pattern) for ids in answers.token_ids]
    size = len(spans), model.config.hidden_size
    found = {(layer, kind): torch.empty(size) for layer in layers for kind in (*POOLINGS, "gate")}
    captured: dict[int, Tensor] = {}
    hooks = [
        model.layers[layer - 1].register_forward_hook(lambda *given, layer=layer: captured.update({layer: given[-1]}))
        for layer in layers
    ]
    for batch in tqdm(packed_batches(answers.token_ids, answers.prompts, BATCH_TOKENS), desc="features", unit="batch"):
        row = PackedRow([(group.shared, [answers.token_ids[index] for index in group.rows]) for group in batch])
        hidden_states(model, row)
        for layer, output in captured.items():
            hidden_TD = model.norm(output)[0].float().cpu()
            for number, index in enumerate(index for group in batch for index in group.rows):
                gate, first, last = spans[index]
                answer = [row.index(number, position) for position in range(first, last + 1)]
                found[layer, "last"][index] = hidden_TD[answer[-1]]
                found[layer, "mean"][index] = hidden_TD[answer].mean(dim=0)
                found[layer, "gate"][index] = hidden_TD[row.index(number, gate)]
    for hook in hooks:
        hook.remove()
    if not all(bool(tensor.isfinite().all()) for tensor in found.values()):
        raise DataError("the backbone's hidden states are not finite; try --dtype=float32")
    return found


def prompt_folds(prompt_N: np.ndarray, seed: int) -> np.ndarray:
    """[N] fold of each row. Rows of one prompt share a fold; the numbers of prompts differ by at most one."""
    prompts, inverse_N = np.unique(prompt_N, return_inverse=True)
    fold_of = np.empty(len(prompts), dtype=int)
    fold_of[np.random.default_rng(seed).permutation(len(prompts))] = np.arange(len(prompts)) % FOLDS
    return fold_of[inverse_N]


def fit_ridges(x_ND: np.ndarray, labels_NK: np.ndarray, fold_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per objective a ridge regression on the rows with its label; the penalty has the lowest error over the folds.

    Returns:
        weights [K, D]; penalties [K]; predictions [N, K] over the folds, NaN without a label.
    """
    weight_KD, alpha_K = np.empty((labels_NK.shape[1], x_ND.shape[1])), np.empty(labels_NK.shape[1])
    predicted_NK, there_NK = np.full(labels_NK.shape, np.nan), ~np.isnan(labels_NK)
    for there_N in np.unique(there_NK, axis=1).T:  # One decomposition for all objectives of these rows and all penalties.
        columns = np.flatnonzero((there_NK == there_N[:, None]).all(axis=0))
        x_nD, y_nk, split = x_ND[there_N], labels_NK[np.ix_(there_N, columns)], PredefinedSplit(fold_N[there_N])
        path = Ridge(alpha=np.tile(ALPHAS, len(columns)), fit_intercept=False, solver="svd")
        made = cross_val_predict(path, x_nD, np.repeat(y_nk, len(ALPHAS), axis=1), cv=split)
        made_nkA = made.reshape(*y_nk.shape, len(ALPHAS))
        best_k = np.square(made_nkA - y_nk[:, :, None]).mean(axis=0).argmin(axis=1)
        alpha_K[columns] = ALPHAS[best_k]
        weight_KD[columns] = Ridge(alpha=ALPHAS[best_k], fit_intercept=False, solver="svd").fit(x_nD, y_nk).coef_
        predicted_NK[np.ix_(there_N, columns)] = made_nkA[:, np.arange(len(columns)), best_k]
    return weight_KD, alpha_K, predicted_NK


def cross_fit(x_ND: np.ndarray, labels_NK: np.ndarray, fold_N: np.ndarray) -> np.ndarray:
    """[N, K] rewards, each from a head that was fitted, and its penalty chosen, without the row's prompt."""
    rewards_NK = np.empty(labels_NK.shape)
    for fold in tqdm(range(FOLDS), desc="cross-fitting", unit="fold"):
        rest = fold_N != fold
        rewards_NK[~rest] = x_ND[~rest] @ fit_ridges(x_ND[rest], labels_NK[rest], fold_N[rest])[0].T
    return rewards_NK


def spearman(x_N: np.ndarray, y_N: np.ndarray) -> float:
    return float(spearmanr(x_N, y_N).statistic)


def resample(
    statistic: Callable[..., float], arrays: Sequence[np.ndarray], prompt_N: np.ndarray, seed: int, samples: int = 1000
) -> tuple[float, str]:
    """Standard error and 95% interval of a statistic of [N, ...] arrays, by scipy's percentile bootstrap over whole prompts,
    since the rows of a prompt are not independent."""
    order_N = np.argsort(prompt_N, kind="stable")
    groups = np.split(order_N, np.flatnonzero(np.diff(prompt_N[order_N])) + 1)

    def of_prompts(drawn: np.ndarray) -> float:
        rows = np.concatenate([groups[int(group)] for group in drawn])
        return statistic(*(array[rows] for array in arrays))

    prompts = (np.arange(len(groups)),)
    found = bootstrap(prompts, of_prompts, vectorized=False, n_resamples=samples, method="percentile", rng=seed)
    return float(found.standard_error), "{:.3f} to {:.3f}".format(*found.confidence_interval)


def explained(predicted_NK: np.ndarray, labels_NK: np.ndarray) -> float:
    """Explained share of the labels' variance, averaged over the objectives."""
    return float((1 - np.nanmean(np.square(predicted_NK - labels_NK), axis=0) / np.nanvar(labels_NK, axis=0)).mean())


def choose(
    features: dict[tuple[int, str], np.ndarray], labels_NK: np.ndarray, prompt_N: np.ndarray, fold_N: np.ndarray, seed: int
) -> tuple[tuple[int, str], pd.DataFrame]:
    """The (layer, pooling) for stage 1, and the table of candidates.

    Among those whose `explained` is within one standard error (of the difference, resampling prompts) of the best, the
    shallowest layer is chosen, which is cheapest to score with, and the better of its poolings.
    """
    predicted = {place: fit_ridges(x_ND, labels_NK, fold_N)[2] for place, x_ND in tqdm(features.items(), desc="candidates")}
    best_NK = max(predicted.values(), key=lambda predicted_NK: explained(predicted_NK, labels_NK))

    def behind(best_NK: np.ndarray, other_NK: np.ndarray, labels_NK: np.ndarray) -> float:
        return explained(best_NK, labels_NK) - explained(other_NK, labels_NK)

    rows = []
    for (layer, pooling), other_NK in predicted.items():
        arrays = best_NK, other_NK, labels_NK
        error, _ = resample(behind, arrays, prompt_N, seed, samples=200)
        rows.append((layer, pooling, explained(other_NK, labels_NK), behind(*arrays), error))
    table = pd.DataFrame(rows, columns=["layer", "pooling", "explained", "behind the best", "standard error"])
    chosen = table[table["behind the best"] <= table["standard error"]].sort_values(["layer", "behind the best"]).iloc[0]
    return (int(chosen["layer"]), str(chosen["pooling"])), table


def compare(
    objective: int, made_N: np.ndarray, label_N: np.ndarray, constant_N: np.ndarray, line_N: np.ndarray
) -> dict[str, Any]:
    """An objective and its baselines: rank correlations, and mean squared errors in rating points."""
    errors = [np.square(POINTS[objective] * (guess_N - label_N)).mean() for guess_N in (made_N, constant_N, line_N)]
    names = ("Spearman", "length's Spearman", "error", "constant's error", "length's error")
    figures = dict(zip(names, (spearman(made_N, label_N), spearman(line_N, label_N), *errors), strict=True))
    return {"objective": OBJECTIVES[objective], "rows": len(label_N), **figures}


def claims(train: Answers, rewards_NK: np.ndarray, fold_N: np.ndarray, seed: int) -> pd.DataFrame:
    """Which objectives earn a head: over the folds, a smaller error than a constant and than a line through the log of the
    answer's length, and a rank correlation above the line's by more than two standard errors. Verbosity never does."""
    rows = []
    for objective, label_N in enumerate(train.labels_NK.T):
        there = ~np.isnan(label_N)
        made, rated, length = rewards_NK[there, objective], label_N[there], train.length_N[there, None]
        split = PredefinedSplit(fold_N[there])
        trivial = [cross_val_predict(model, length, rated, cv=split) for model in (DummyRegressor(), LinearRegression())]
        row = compare(objective, made, rated, *trivial)
        error, _ = resample(
            lambda made, rated, line: spearman(made, rated) - spearman(line, rated), (made, rated, trivial[1]),
            train.prompt_N[there], seed, samples=200,
        )  # fmt: skip
        row |= {"lead": row["Spearman"] - row["length's Spearman"], "standard error": error}
        smaller = row["error"] < min(row["constant's error"], row["length's error"])
        earns = objective != VERBOSITY and smaller and row["lead"] > 2 * row["standard error"]
        rows.append(row | {"earns a head": bool(earns)})
    return pd.DataFrame(rows)


def log_odds_scale(margin_P: np.ndarray) -> float:
    """The most likely factor that turns margins, the better answer's score minus the worse one's, into log-odds."""

    def slope(scale: float) -> float:  # Of the Bradley-Terry log-likelihood, which is concave in the scale.
        return float((margin_P * expit(-scale * margin_P)).mean())

    if slope(0.0) <= 0:
        return 1.0  # The score prefers the worse answers.
    return LARGEST_SCALE if slope(LARGEST_SCALE) > 0 else brentq(slope, 0.0, LARGEST_SCALE)


def fit_gate(prompt_PD: Tensor, margin_PK: Tensor, fold_P: np.ndarray, seed: int) -> tuple[GatingNetwork, np.ndarray]:
    """Fit a gate by Bradley-Terry on all pairs, stopped where the loss on held-out prompts is lowest.

    The last layer starts at zero, so that an unfitted gate weighs all objectives equally. logit_scale is fixed at the value
    that makes the margins of this score log-odds: at 1 the margins, fractions of a unit, would hardly change the loss.

    Args:
        prompt_PD: hidden states at the gate position.
        margin_PK: rewards of the better answer minus those of the worse one.
        fold_P: fold of each pair's prompt.
        seed: of the first layers.

    Returns:
        The gate, and the held-out loss [S], starting with the unfitted gate's.
    """

    def loss(gate: GatingNetwork, rows: np.ndarray) -> Tensor:
        return -logsigmoid((gate(prompt_PD[rows]) * margin_PK[rows]).sum(dim=-1)).mean()

    def fitted(rows: np.ndarray, steps: int, held_out: np.ndarray) -> tuple[GatingNetwork, np.ndarray]:
        torch.manual_seed(seed)
        gate, losses = GatingNetwork(prompt_PD.shape[1], margin_PK.shape[1], **GATE), []
        torch.nn.init.zeros_(gate.layers[-1].weight)
        torch.nn.init.zeros_(gate.layers[-1].bias)
        gate.logit_scale.requires_grad_(False).fill_(log_odds_scale(margin_PK[rows].double().mean(dim=1).numpy()))
        optimizer = torch.optim.AdamW([weight for weight in gate.parameters() if weight.requires_grad], lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, GATE_STEPS)
        for _ in range(steps):
            with torch.no_grad():
                losses.append(loss(gate, held_out).item())
            optimizer.zero_grad()
            loss(gate, rows).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            return gate, np.array([*losses, loss(gate, held_out).item()])

    loss_S = np.zeros(GATE_STEPS + 1)
    for fold in tqdm(np.unique(fold_P), desc="gate", unit="fold"):
        loss_S += fitted(fold_P != fold, GATE_STEPS, fold_P == fold)[1] * (fold_P == fold).mean()
    every = np.ones(len(fold_P), dtype=bool)
    return fitted(every, int(loss_S.argmin()), every)[0], loss_S


class Heads(NamedTuple):
    """Everything that is fitted."""

    kept: list[int]
    """[K] the objectives with a head, among OBJECTIVES."""
    weight_KD: np.ndarray
    alpha_K: np.ndarray
    gate: GatingNetwork


def fit_heads(
    train: Answers, answer_ND: np.ndarray, gate_ND: Tensor, fold_N: np.ndarray, seed: int
) -> tuple[Heads, pd.DataFrame]:
    """Fit both stages to the features of the training answers; also returns the table of `claims`."""
    crossed_NK = cross_fit(answer_ND, train.labels_NK, fold_N)
    table = claims(train, crossed_NK, fold_N, seed)
    kept = np.flatnonzero(table["earns a head"]).tolist()
    if not kept:
        raise DataError("no objective clearly beats a constant and the answer's length over the folds; add ratings")
    better_P, worse_P = np.concatenate(train.pairs).T
    margin_PK = torch.from_numpy((crossed_NK[better_P] - crossed_NK[worse_P])[:, kept]).float()
    gate, loss_S = fit_gate(gate_ND[better_P], margin_PK, fold_N[better_P], seed)
    print(
        f"gate: {len(better_P)} pairs; held-out loss {loss_S[0]:.4f} unfitted, {loss_S.min():.4f} at step {loss_S.argmin()}"
    )
    weight_KD, alpha_K, _ = fit_ridges(answer_ND, train.labels_NK[:, kept], fold_N)
    return Heads(kept, weight_KD, alpha_K, gate), table


def held_out_figures(
    heads: Heads, train: Answers, held: Answers, answer_ND: np.ndarray, gate_ND: Tensor, seed: int
) -> list[str]:
    """Markdown: the objectives and their baselines, then the pair accuracies on each file."""
    stage1_NK = answer_ND @ heads.weight_KD.T
    with torch.no_grad():
        gated_N = (heads.gate(gate_ND).double().numpy() * stage1_NK).sum(axis=1)
    rows = []
    for made_N, objective, alpha in zip(stage1_NK.T, heads.kept, heads.alpha_K, strict=True):
        there, seen = (~np.isnan(side.labels_NK[:, objective]) for side in (held, train))
        length, given = train.length_N[seen, None], train.labels_NK[seen, objective]
        trivial = [
            model.fit(length, given).predict(held.length_N[there, None]) for model in (DummyRegressor(), LinearRegression())
        ]
        arrays = made_N[there], held.labels_NK[there, objective]
        _, interval = resample(spearman, arrays, held.prompt_N[there], seed)
        rows.append(compare(objective, *arrays, *trivial) | {"95% interval of Spearman": interval, "alpha": alpha})
    parts = ["## Held-out answers", markdown(rows)]
    named = zip([OBJECTIVES[objective] for objective in heads.kept], stage1_NK.T, strict=True)
    scores = {"ArmoRM (gated)": gated_N, **dict(named), "longer answer": held.length_N}
    for name, (better_P, worse_P) in zip(("ratings", "preferences"), (pairs.T for pairs in held.pairs), strict=True):
        rows = []
        for score, score_N in scores.items():
            right_P = (np.sign(score_N[better_P] - score_N[worse_P]) + 1) / 2  # A tie counts half.
            _, interval = resample(np.mean, [right_P], held.prompt_N[better_P], seed)
            rows.append({"score": score, "pair accuracy": right_P.mean(), "95% interval": interval})
        loss = np.logaddexp(0.0, gated_N[worse_P] - gated_N[better_P]).mean()
        parts += [
            f"## Held-out {name}: {len(better_P)} pairs; loss of the gated score {loss:.3f} (guessing: 0.693)",
            markdown(rows),
        ]
    return parts


def markdown(rows: Any) -> str:
    return pd.DataFrame(rows).to_markdown(index=False, floatfmt=".3f")


def write(config: FitConfig, heads: Heads, place: tuple[int, str], pattern: list[int], template: str, card: str) -> None:
    """Write heads/ and model/, both or neither."""
    tensors = {
        "regression_layer.weight": torch.from_numpy(heads.weight_KD).float(),
        "reward_transform_matrix": torch.eye(len(heads.kept)),
        **{f"gating.{name}": tensor.detach().clone() for name, tensor in heads.gate.state_dict().items()},
    }
    fields = {
        "num_hidden_layers": place[0],
        "pooling": place[1],
        "num_objectives": len(heads.kept),
        "objectives": [OBJECTIVES[objective] for objective in heads.kept],
        "gating_token_pattern": pattern,
        **{f"gating_{name}": value for name, value in GATE.items()},
    }
    with atomic_folder(Path(config.output_path)) as aside:
        folder = aside / "heads"
        folder.mkdir()
        save_file(tensors, folder / "heads.safetensors")
        config_text = json.dumps(fields, indent=2) + "\n"
        for name, text in (("config.json", config_text), ("README.md", card), ("chat_template.jinja", template)):
            (folder / name).write_text(text, encoding="utf-8")
        make_reward_model(aside / "model", Path(config.backbone), folder)


def fit_reward_heads(config: FitConfig) -> None:
    """Fit the heads, print the card, write both folders.

    Raises:
        DataError: a file is missing or malformed, or has too few usable rows.
        UsageError: the backbone has fewer layers than --layers.
    """
    config, precision = settle(config)
    announce(precision)
    tokenizer = load_tokenizer(config.backbone)
    if config.chat_template is not None:
        tokenizer.chat_template = Path(config.chat_template).read_text(encoding="utf-8")
    pattern = gating_pattern(tokenizer)
    train = read_side((config.ratings, config.preferences), tokenizer, config.max_len)
    files = config.validation, config.preferences_validation
    held = read_side(files, tokenizer, config.max_len, frozenset(train.prompts))
    model, layers = load_backbone(config)
    fold_N = prompt_folds(train.prompt_N, config.seed)
    features = read_features(model, layers, train, pattern)
    readings = {place: tensor.double().numpy() for place, tensor in features.items() if place[1] in POOLINGS}
    place, candidates = choose(readings, train.labels_NK, train.prompt_N, fold_N, config.seed)
    heads, table = fit_heads(train, readings[place], features[place[0], "gate"], fold_N, config.seed)
    features = read_features(model, [place[0]], held, pattern)
    parts = [
        "# Reward heads in ArmoRM's layout",
        f"Stage 1 reads the first {place[0]} layers of `{config.backbone}` ({place[1]}). {len(train.prompts)} training "
        f"answers, {len(held.prompts)} held out. Errors are mean squares in rating points; intervals resample prompts.",
        "## Candidates, over folds of the training prompts", markdown(candidates),
        "## Objectives, over folds of the training prompts", markdown(table),
        *held_out_figures(heads, train, held, features[place].double().numpy(), features[place[0], "gate"], config.seed),
    ]  # fmt: skip
    card = "\n\n".join(parts) + "\n"
    print(card, flush=True)
    write(config, heads, place, pattern, str(tokenizer.chat_template), card)
    print(f"use it with --reward_model={config.output_path}/model")


if __name__ == "__main__":
    with one_line_errors():
        fit_reward_heads(parse(FitConfig, "Fit the heads of a multi-objective reward model on a frozen backbone."))
