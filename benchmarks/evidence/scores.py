"""How good probabilities are."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 10


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100 * float((probabilities.argmax(-1) == labels).double().mean())


def nll(probabilities: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood, in nats."""
    own = probabilities.double().gather(-1, labels.unsqueeze(-1))
    return float(-own.clamp_min(1e-12).log().mean())


def ece(probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error (Guo et al. 2017), in percent: the mean distance between confidence
    and accuracy, over ten bins of confidence of equal width."""
    confidence, guess = probabilities.double().max(-1)
    right = (guess == labels).double()
    bins = (confidence * BINS).long().clamp_max(BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64, device=bins.device)
    gaps.index_add_(0, bins, right - confidence)
    return 100 * float(gaps.abs().sum() / len(labels))


def all_scores(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    return {
        "accuracy": accuracy(probabilities, labels),
        "nll": nll(probabilities, labels),
        "ece": ece(probabilities, labels),
    }
