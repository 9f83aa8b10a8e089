"""The tables of docs/tuning.md, computed from the trainer's own losses.

usage: PYTHONPATH=src python experiments/tuning_numbers.py
"""

import math

import torch

from drdpo.training.losses import drdpo_weights, effective_sample_size, kl_weights, pair_losses

CAP = 10.0
TAUS = (0.005, 0.01, 0.05, 0.5)
QUANTILES = 100_000
"""Quantiles that represent a normal distribution of losses."""


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def margins() -> str:
    """Loss and slope of a pair, by its scaled margin beta h."""
    rows = []
    for scaled in (-4.0, -1.0, 0.0, 1.0, 4.0):
        margin = torch.tensor([scaled], dtype=torch.float64, requires_grad=True)
        loss = pair_losses(margin, beta=1.0)
        (slope,) = torch.autograd.grad(loss.sum(), margin)
        nats = [f"{scaled / beta:g}" for beta in (0.1, 0.01)]
        rows.append([f"{scaled:g}", *nats, f"{loss.item():.3f}", f"{-slope.item():.3f}"])
    return table(["beta h", "h at beta 0.1", "h at beta 0.01", "loss", "pull s = sigmoid(-beta h)"], rows)


def kldpo() -> str:
    """Weight of a pair above the mean loss and shrinkage of the solution, by tau."""
    rows = []
    for tau in TAUS:
        mean = torch.tensor([math.log(2)], dtype=torch.float64)
        weights = [float(kl_weights(mean + above, mean, tau, CAP)) for above in (0.005, 0.05, 0.5)]
        capped = tau * math.log(CAP)
        rows.append([
            f"{tau:g}", *(f"{weight:.3g}" for weight in weights), f"{capped:.4f}", f"{2 * capped / 0.1:.3g}",
            f"{2 * capped / 0.01:.3g}", f"{tau / (1 + tau):.4f}",
        ])  # fmt: skip
    columns = [
        "tau", "weight at mean + 0.005", "+ 0.05", "+ 0.5", "loss above the mean that reaches the cap",
        "the same in nats of h, beta 0.1", "beta 0.01", "tau / (1 + tau)",
    ]  # fmt: skip
    return table(columns, rows)


def normal_losses(spread: float) -> torch.Tensor:
    """[QUANTILES] losses, normal with this standard deviation."""
    places = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    return 1 + spread * torch.special.ndtri(places)


def sample_sizes() -> str:
    """Effective sample size as a share of the population, for normal losses with standard deviation s."""
    rows = []
    for ratio in (0.1, 0.3, 0.5, 1.0, 1.5, 2.0):
        losses_P = normal_losses(ratio)
        figures = []
        for weights_P in (
            kl_weights(losses_P, losses_P, 1.0, normalize=True),
            drdpo_weights(losses_P, losses_P, 1.0),
            kl_weights(losses_P, losses_P, 1.0, CAP),
        ):
            figures += [float(effective_sample_size(weights_P)) / QUANTILES, float(weights_P.mean())]
        soft, _, drdpo, _, capped, mean = figures
        rows.append([f"{ratio:g}", f"{soft:.2f}", f"{drdpo:.2f}", f"{capped:.2f}", f"{mean:.2f}"])
    columns = ["σ / temperature", "KLDPO, Algorithm 2", "Dr. DPO", "KLDPO, code form, cap 10", "mean weight of that form"]
    return table(columns, rows)


def tables() -> dict[str, str]:
    """All tables by name."""
    return {"margins": margins(), "kldpo": kldpo(), "sample sizes": sample_sizes()}


if __name__ == "__main__":
    for name, text in tables().items():
        print(f"{name}\n\n{text}\n")
