"""Shifted populations of the test pairs, evaluated in the same forward passes as the test pairs themselves.

--eval_columns splits the test pairs into groups. --eval_mixture labels them as other preferences would: it mixes the scores
that the two answers of a pair have by objective, and where the rejected answer scores higher, the two change places. That is
the preference shift itself, without sampling a token.

Shape suffixes: B pairs of a batch, M test pairs, K rows of the gathered table, C two columns a mixture.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drdpo.errors import DataError
from drdpo.training.data import Pair
from drdpo.training.losses import Pairs
from drdpo.training.rows import Columns

MOST_GROUPS = 50
"""Groups of a column: every group is two metrics."""


def relabelled(pairs: Pairs, mixed_B2: Tensor) -> Pairs:
    """Pairs with the better answer by other scores, [B, 2] of the chosen and the rejected one, as the chosen one. Columns
    chosen_score and rejected_score, which a loss may read, become these; other columns of the two answers change places."""
    swap_B = mixed_B2[:, 0] < mixed_B2[:, 1]

    def ordered(chosen_B: Tensor, rejected_B: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(swap_B, rejected_B, chosen_B), torch.where(swap_B, chosen_B, rejected_B)

    columns = dict(pairs.columns)
    for name in pairs.columns:
        other = name.replace("chosen_", "rejected_", 1)
        if name.startswith("chosen_") and other in columns:
            given = mixed_B2.float().unbind(dim=1) if name == "chosen_score" else (columns[name], columns[other])
            columns[name], columns[other] = ordered(*given)
    log_ratios_S = torch.cat(ordered(*pairs.log_ratios_S.chunk(2)))
    margins_B = torch.where(swap_B, -pairs.margins_B, pairs.margins_B)
    return pairs._replace(margins_B=margins_B, log_ratios_S=log_ratios_S, columns=columns)


@dataclass(frozen=True)
class Shifts:
    """Of M test pairs."""

    groups: Mapping[str, Tensor]
    """[M] bool each, by `column.group`."""
    mixed: Mapping[str, Tensor]
    """[M, 2] by mixture: scores of the chosen and the rejected answer."""

    def table(self, loss: Callable[[Pairs], Tensor], pairs: Pairs, indices_B: Tensor) -> Tensor:
        """[B, C] the method's loss and whether the margin is positive, under each mixture's labels, NaN where it has no
        preference, of the pairs at these places [B] among the test pairs."""
        columns = [torch.empty(0, len(indices_B), device=indices_B.device)]
        for mixed_M2 in self.mixed.values():
            mixed_B2 = mixed_M2.to(indices_B.device)[indices_B]
            other = relabelled(pairs, mixed_B2)
            numbers_2B = torch.stack([loss(other).float(), (other.margins_B > 0).float()])
            columns.append(torch.where(mixed_B2[:, 0] == mixed_B2[:, 1], torch.nan, numbers_2B))
        return torch.cat(columns).T

    def metrics(self, indices_K: Tensor, plain_K2: Tensor, shifted_KC: Tensor) -> dict[str, float]:
        """{loss.NAME: .., accuracy.NAME: ..} of every group and every mixture, from the places [K] of test pairs, their loss
        and accuracy [K, 2] under the data set's labels, and their rows [K, C] of `table`, on the CPU."""
        found = {name: plain_K2[member_M[indices_K]] for name, member_M in self.groups.items()}
        for number, name in enumerate(self.mixed):
            numbers_K2 = shifted_KC[:, 2 * number : 2 * number + 2]
            found[name] = numbers_K2[self.mixed[name][indices_K].diff(dim=1)[:, 0] != 0]
        means = {name: numbers.double().mean(dim=0).tolist() for name, numbers in found.items()}
        whats = ("loss", "accuracy")
        return {f"{what}.{name}": value for name, mean in means.items() for what, value in zip(whats, mean, strict=True)}


def shifts_of(
    pairs: Sequence[Pair] | Sequence[Columns], columns: Sequence[str], mixtures: Sequence[str], source: str
) -> tuple[Shifts, list[str]]:
    """The shifted populations of test pairs, or of what is read of their rows, by these columns and mixtures, and a line
    about each.

    Raises:
        DataError: a column of more than MOST_GROUPS groups or of names that would be one metric, or a mixture without a
            preference.
    """
    groups, mixed, lines = {}, {}, []
    for column in columns:
        names = sorted({pair.groups[column] for pair in pairs})
        if len(names) > MOST_GROUPS:
            raise DataError(f'{source}: field "{column}" of --eval_columns names {len(names)} groups; at most {MOST_GROUPS}')
        for name in names:
            key = re.sub(r"[^-.\w]", "_", f"{column}.{name}")
            if key in groups:
                raise DataError(f'{source}: two groups in field "{column}" would be the metric {key}; rename one')
            groups[key] = torch.tensor([pair.groups[column] == name for pair in pairs])
            lines.append(f"{key}: {int(groups[key].sum())} pairs")
    for name in mixtures:
        mixed[name] = torch.tensor([pair.mixed[name] for pair in pairs], dtype=torch.float64)
        change_M = mixed[name].diff(dim=1)[:, 0]
        if not change_M.any():
            raise DataError(f"{source}: --eval_mixture {name} scores both answers of every pair alike, so it labels none")
        swapped, ties = int((change_M > 0).sum()), int((change_M == 0).sum())
        lines.append(f"{name}: {swapped} of {len(pairs)} labels differ from the data set's, {ties} without a preference")
    return Shifts(groups, mixed), lines
