"""Scored completions of the starting model as a fixed sample by which every policy is judged, without sampling a token.

For a prompt x with candidates y_1 .. y_K drawn from the starting model pi_ref,

    V = sum_k w_k s_k,    w_k = r_k / sum_j r_j,    r_k = pi(y_k | x) / pi_ref(y_k | x)

is the self-normalised importance-sampling estimate of the expected score of pi (Owen, Monte Carlo theory, section 9.2), and
1 / sum_k w_k^2 its effective sample size, from 1 to K. The ratio is of the tokens as sampled: the stop token is one of them
if the answer ended by it, and an answer that the length limit cut has none. Candidates drawn at another temperature, or with
top-p, are not from pi_ref but from some q: then V is the mean score under q tilted by pi / pi_ref.

Shape suffixes: N prompts, K candidates of a prompt, O kinds of score, C candidates of all prompts, S candidates of a packed
row.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from drdpo import chat, distributed
from drdpo.errors import DataError, UsageError
from drdpo.folder import atomic_file, read_manifest, section
from drdpo.models import fingerprint
from drdpo.progress import progress
from drdpo.records import Completion, check_unique, read_records, row_number

if TYPE_CHECKING:
    import torch

    from drdpo.kernels.packed_attention import PackedRow

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

LARGEST_SCORE = 1e100
"""Squares and sums of larger scores would overflow."""
ROW_TOKENS = 4096
"""Tokens of a packed row of candidates, if not more are needed for one of them."""


def values(log_ratio_NK: Array, scores_NKO: Array) -> tuple[Array, Array]:
    """The expected score of a policy on every prompt, and the effective sample size; see the module's docstring.

    Args:
        log_ratio_NK: [N, K] log pi - log pi_ref of every candidate, NaN where a prompt has fewer.
        scores_NKO: [N, K, O] their scores; what stands beside an absent candidate is not read.

    Returns:
        V [N, O] and the sample size [N]. A prompt with one candidate says nothing of the policy: V is NaN, the size 1.
    """
    there_NK = ~np.isnan(log_ratio_NK)
    log_ratio_NK = np.where(there_NK, log_ratio_NK, -np.inf).astype(np.float64)
    weights_NK = np.exp(log_ratio_NK - log_ratio_NK.max(axis=1, keepdims=True))
    weights_NK /= weights_NK.sum(axis=1, keepdims=True)
    values_NO = np.einsum("nk,nko->no", weights_NK, np.where(there_NK[:, :, None], scores_NKO, 0.0))
    values_NO[there_NK.sum(axis=1) < 2] = np.nan
    return values_NO, 1 / np.square(weights_NK).sum(axis=1)


# Reading -----------------------------------------------------------------------------------------------------------------


def check_scored(
    path: Path, completions: Sequence[Completion], needed: Collection[str] | None = None
) -> dict[int, list[Completion]]:
    """{prompt_id: completions} of scored completions, in their order.

    Args:
        needed: objectives that every row must have, with scores within LARGEST_SCORE; by default all those of row 1, and no
            others.

    Raises:
        DataError: a row without scores or with other objectives, with another prompt than earlier rows with its prompt_id,
            or with the (prompt_id, sample_id) of another.
    """
    check_unique(path, ((row.prompt_id, row.sample_id) for row in completions), '"prompt_id", "sample_id"')
    by_prompt: dict[int, list[Completion]] = {}
    first = set(completions[0].scores)
    for index, row in enumerate(completions):
        group, odd, problem = by_prompt.setdefault(row.prompt_id, []), set(row.scores) ^ first, ""
        if not row.scores:
            problem = '"scores" is missing; run step 1 (generate_completions.sh)'
        elif needed is None and odd:
            problem = f'"scores" has other objectives than row 1 ({", ".join(sorted(odd))})'
        elif lacking := sorted(set(needed or ()) - set(row.scores)):
            problem = f'"scores" lacks {", ".join(lacking)}; it has {", ".join(row.scores)}'
        elif large := [name for name in needed or () if abs(row.scores[name]) > LARGEST_SCORE]:
            problem = f'"scores": {large[0]} is {row.scores[large[0]]:g}, beyond {LARGEST_SCORE:g}'
        elif group and group[0].prompt != row.prompt:
            problem = f'"prompt" differs from that of another row with prompt_id {row.prompt_id}'
        if problem:
            raise DataError(f"{path}, row {row_number(path, index)}: field {problem}")
        group.append(row)
    return by_prompt


def mean_and_sd(scores_C: npt.ArrayLike) -> tuple[float, float]:
    """Mean and population standard deviation; the latter is exactly 0 for equal scores, which rounding would make 1e-17."""
    values_C = np.asarray(scores_C, dtype=np.float64)
    return float(values_C.mean()), float(values_C.std()) if np.ptp(values_C) else 0.0


@dataclass(frozen=True)
class Candidates:
    """Of N prompts, each with two candidates or more."""

    path: Path
    drawn: list[list[Completion]]
    """The candidates of every prompt."""
    prompts: list[list[int]]
    """Token ids."""
    scores_NKO: Array
    """NaN where a prompt has fewer candidates: its objectives, then the mixtures of their z-scores."""
    objectives: list[str]
    mixtures: list[str]
    units: dict[str, float]
    """Standard deviation over all candidates (population form) of each objective."""
    note: str
    """What a reader should know of how they were drawn and read; may be empty."""

    @property
    def names(self) -> list[str]:
        """Of the O kinds of score."""
        return [*self.objectives, *self.mixtures]

    @cached_property
    def answers(self) -> list[list[list[int]]]:
        """Token ids of every candidate of every prompt, as sampled."""
        return [[row.token_ids for row in of_prompt] for of_prompt in self.drawn]

    def read_alike(self, tokenizer: chat.Tokenizer) -> bool:
        """Does a tokenizer give these prompts and answers the same tokens?"""
        try:
            same = self.prompts == [chat.prompt_token_ids(tokenizer, of_prompt[0].prompt) for of_prompt in self.drawn]
        except ValueError:  # Its template refuses one.
            return False
        return same and all(_spells(tokenizer, row) for of_prompt in self.drawn for row in of_prompt)

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """(prompt, candidate) of each of the C candidates."""
        return [(n, k) for n, answers in enumerate(self.answers) for k in range(len(answers))]

    @cached_property
    def key(self) -> str:
        """Hash of what log-probs depend on besides the model: ids and tokens."""
        ids = [of_prompt[0].prompt_id for of_prompt in self.drawn], [[row.sample_id for row in rows] for rows in self.drawn]
        words = (*ids, self.prompts, self.answers)
        return hashlib.sha256(repr(words).encode()).hexdigest()[:32]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(len(prompt) + max(map(len, answers)) for prompt, answers in zip(self.prompts, self.answers, strict=True))

    def table(self, values_C: Any) -> Array:
        """[N, K] of numbers of the C candidates, NaN where a prompt has fewer.

        Raises:
            DataError: one is not finite.
        """
        odd = np.flatnonzero(~np.isfinite(values_C))
        if len(odd):
            row = list(chain(*self.drawn))[odd[0]]
            which = f"prompt_id {row.prompt_id}, sample_id {row.sample_id}"
            raise DataError(f"{self.path}, {which}: its log-prob under the policy is {values_C[odd[0]]}")
        table_NK = np.full(self.scores_NKO.shape[:2], np.nan)
        table_NK[tuple(np.array(self.places).T)] = values_C
        return table_NK

    def logprobs(self, of_row: "Callable[[CandidateRow], torch.Tensor]", row_tokens: int, label: str) -> "torch.Tensor":
        """[C] float32 on the CPU: log-probs of all candidates. Every rank must call.

        Args:
            of_row: [S] log-probs of a row. Rows do not depend on the ranks, so neither do its roundings.
            row_tokens: of a packed row.
            label: for the progress bar.
        """
        import torch

        rows = self.rows(row_tokens)
        # All ranks make equally many forward passes, in which ZeRO-3 gathers weights; what is done twice has the same bits.
        rows += rows[:1] * (-len(rows) % distributed.world_size())
        ours, found = distributed.shard(rows), []
        for row in progress(ours, desc=label, unit="row", leave=False, disable=not distributed.is_main()):
            logprob_S = of_row(row).double()
            found.append(torch.stack([torch.tensor(row.indices_S, device=logprob_S.device).double(), logprob_S], dim=1))
        table_K2 = distributed.gather(torch.cat(found)).cpu()
        logprobs_C = torch.full((len(self.places),), float("nan"))
        logprobs_C[table_K2[:, 0].long()] = table_K2[:, 1].float()
        return logprobs_C

    def rows(self, budget: int) -> "list[CandidateRow]":
        """All candidates in packed rows, each prompt once for those in a row; a function of the candidates and the budget.

        Args:
            budget: tokens of a row at most, unless a prompt with one answer has more.
        """
        from drdpo.kernels.packed_attention import PackedRow

        rows: list[list[int]] = []
        room = 0
        for c, (n, k) in enumerate(self.places):
            size = alone = len(self.prompts[n]) + len(self.answers[n][k])
            if rows and self.places[rows[-1][-1]][0] == n:
                size = len(self.answers[n][k])
            if not rows or size > room:
                rows.append([])
                room, size = max(budget, alone), alone
            rows[-1].append(c)
            room -= size
        found = []
        for indices_S in rows:
            by_prompt = groupby((self.places[c] for c in indices_S), key=lambda place: place[0])
            answers = [(n, [self.prompts[n] + self.answers[n][k] for _, k in group]) for n, group in by_prompt]
            found.append(CandidateRow(PackedRow([(len(self.prompts[n]), whole) for n, whole in answers]), indices_S))
        return found

    def write(self, path: Path, log_ratio_NK: Array, step: int) -> None:
        """Write `log_ratio` [N, K] float32 with `prompt_id` [N] and `sample_id` [N, K], -1 where a prompt has fewer; the
        metadata names the candidates."""
        from safetensors.numpy import save

        prompt_ids_N = np.array([of_prompt[0].prompt_id for of_prompt in self.drawn])
        ids_NK = np.nan_to_num(self.table([row.sample_id for row in chain(*self.drawn)]), nan=-1).astype(np.int64)
        tensors = {"log_ratio": log_ratio_NK.astype(np.float32), "prompt_id": prompt_ids_N, "sample_id": ids_NK}
        with atomic_file(path, "wb") as stream:
            stream.write(save(tensors, metadata={"candidates": self.key, "path": str(self.path), "step": str(step)}))

    def _is_of_others(self, path: Path) -> bool:
        """Did `write` write this file for other candidates?"""
        from safetensors import safe_open

        with safe_open(path, "numpy") as stored:
            return (stored.metadata() or {}).get("candidates") != self.key

    def remove_others(self, folder: Path) -> None:
        """Remove what an earlier start wrote of other candidates."""
        for path in filter(self._is_of_others, folder.glob("step_*.safetensors")):
            path.unlink(missing_ok=True)

    def check_evaluated(self, run: Path, step: int) -> None:
        """Raise UsageError if a complete run was not evaluated on these candidates."""
        path = run / "candidates" / f"step_{step}.safetensors"
        if not path.is_file() or self._is_of_others(path):
            raise UsageError(
                f"{run} is complete, but was not evaluated on the candidates in {self.path.parent}; evaluate its "
                "checkpoints by src/evaluate_policy.py, or train into another --save_path"
            )


class CandidateRow(NamedTuple):
    """S candidates as one row without padding."""

    packed: "PackedRow"
    indices_S: list[int]
    """Their numbers among all C."""


def load_candidates(
    folder: str, split: str, tokenizer: chat.Tokenizer, mixtures: Mapping[str, Mapping[str, float]], limit: int | None = None
) -> Candidates:
    """Read the scored completions in folder/<split>.jsonl.

    Args:
        tokenizer: of the model that drew them, with the arguments of its template.
        mixtures: {name: {objective: weight}} of z-scores, mean and standard deviation over all candidates that are read.
        limit: number of prompts to read, from the start of the file; None for all.

    Raises:
        DataError: as read_records and check_scored; no prompt has two candidates; they have no tokens, or others than this
            tokenizer's; the template refuses a prompt; a mixture of an objective that they lack, or that does not vary.
    """
    path = Path(folder) / f"{split}.jsonl"
    made_by = section(read_manifest(path.parent / "sampled"), f"sample_{path.stem}", "made_by")
    if (asked := made_by.get("chat_template_kwargs") or {}) != tokenizer.chat_template_kwargs:
        raise DataError(f"{path}: sampled with --chat_template_kwargs='{json.dumps(asked)}'; pass the same")
    rows = read_records(path, Completion.from_row)
    drawn = dict(list(check_scored(path, rows).items())[:limit])
    for index, row in enumerate(rows):
        if row.prompt_id in drawn:
            _check_tokens(path, index, row, tokenizer)
    found = [of_prompt for of_prompt in drawn.values() if len(of_prompt) > 1]
    if not found:
        raise DataError(f"{path}: no prompt has two completions, and one says nothing of a policy; sample with --best_of_n")
    try:
        ids = [chat.prompt_token_ids(tokenizer, of_prompt[0].prompt) for of_prompt in found]
    except ValueError as error:
        raise DataError(f"{path}: the chat template refuses a prompt: {error}") from error
    objectives = list(rows[0].scores)
    scores_NKO = np.full((len(found), max(map(len, found)), len(objectives)), np.nan)
    for n, of_prompt in enumerate(found):
        scores_NKO[n, : len(of_prompt)] = [[row.scores[name] for name in objectives] for row in of_prompt]
    flat_CO = scores_NKO[~np.isnan(scores_NKO[:, :, 0])]
    units = {name: mean_and_sd(one_C)[1] for name, one_C in zip(objectives, flat_CO.T, strict=True)}
    mixed = [_mixed(path, scores_NKO, objectives, units, *mixture) for mixture in mixtures.items()]
    lone = len(drawn) - len(found)
    omitted = f"{lone} prompts with one completion were omitted; " if lone else ""
    return Candidates(
        path, found, ids, np.concatenate([scores_NKO, *mixed], axis=2), objectives, list(mixtures), units,
        (omitted + _drawn_otherwise(made_by, tokenizer.name_or_path)).removesuffix("; "),
    )  # fmt: skip


def _spells(tokenizer: chat.Tokenizer, row: Completion) -> bool:
    known = max(row.token_ids) < len(tokenizer)
    return known and chat.decode(tokenizer, row.token_ids) == row.completion[0]["content"].strip()


def _check_tokens(path: Path, index: int, row: Completion, tokenizer: chat.Tokenizer) -> None:
    problem = ""
    if not row.token_ids:
        problem = "is empty, and log-probs are of the tokens as sampled"
    elif not _spells(tokenizer, row):
        problem = (
            f"does not spell the completion in the tokenizer of {tokenizer.name_or_path}: another model drew it; pass "
            "completions of the starting model"
        )
    if problem:
        raise DataError(f'{path}, row {row_number(path, index)}: field "token_ids" {problem}')


def _mixed(
    path: Path, scores_NKO: Array, objectives: list[str], units: dict[str, float], name: str, weights: Mapping[str, float]
) -> Array:
    """[N, K, 1] of a mixture: the weighted sum of z-scores."""
    if name in objectives:
        raise DataError(f"{path}: the mixture {name} has the name of an objective; rename it")
    total_NK1 = np.zeros((*scores_NKO.shape[:2], 1))
    for objective, weight in weights.items():
        if not units.get(objective):
            what = "lack" if objective not in units else "all have the same score in"
            raise DataError(f"{path}: the completions {what} {objective}, and the mixture {name} reads it")
        place = objectives.index(objective)
        one_NK1 = scores_NKO[:, :, place : place + 1]
        total_NK1 += weight * (one_NK1 - np.nanmean(one_NK1)) / units[objective]
    return total_NK1


def _drawn_otherwise(made_by: Mapping[str, Any], model: str) -> str:
    """A note if they were drawn at another temperature, with top-p, or with another model; empty if not."""
    odd = [f"{name} {made_by[name]}" for name in ("temperature", "top_p") if made_by.get(name, 1) != 1]
    if made_by.get("model") not in (None, fingerprint(model)):
        odd.append("another model than this starting one")
    tilted = "V is the mean score under that distribution tilted by pi / pi_ref, not the policy's own"
    return f"the completions were drawn with {' and '.join(odd)}: {tilted}" if odd else ""
