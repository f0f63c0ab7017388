"""What is known of outputs over samples: running sums, and what `mc_predict` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..spec.errors import SurgeryError


@dataclass(frozen=True)
class MCPrediction:
    """What `mc_predict` found. `batch` is that of the inputs; logarithms are natural."""

    mean: Tensor
    """Mean of the outputs over the samples: the shape of the model's output."""

    variance: Tensor
    """Unbiased variance of the outputs over the samples, entry by entry: the same shape."""

    probabilities: Tensor | None
    """Mean of the class probabilities, the same shape; for one logit, of its class. None without
    classes."""

    entropy: Tensor | None
    """Predictive entropy, that of `probabilities`: total uncertainty. The output's shape without the
    class dimension."""

    mutual_information: Tensor | None
    """Between prediction and weights (BALD, Houlsby et al. 2011): the part of the entropy that comes
    from not knowing the weights. The shape of `entropy`."""

    samples: int
    """Number of forwards for each input."""

    def cpu(self) -> MCPrediction:
        """The same on the CPU."""
        moved: Any = (one.cpu() if isinstance(one, Tensor) else one for one in _fields_of(self))
        return MCPrediction(*moved)


def _fields_of(prediction: MCPrediction) -> tuple[Any, ...]:
    return tuple(getattr(prediction, one.name) for one in fields(prediction))


def check_joinable(outputs: Sequence[Tensor], verb: str) -> None:
    """Refuse outputs of the batches of a loader that cannot be joined: none, or of different shapes."""
    if not outputs:
        raise SurgeryError("the loader gave no batch: an iterator can be used once only")
    shapes = {tuple(output.shape[1:]) for output in outputs}
    if len(shapes) > 1:
        raise SurgeryError(
            f"outputs of batches have different shapes after the rows: {sorted(shapes)}; pad all "
            f"batches to one length, or call {verb} for each batch"
        )


def joined(parts: Sequence[MCPrediction]) -> MCPrediction:
    """What was found for the batches of a loader, one after the other.

    Raises:
        SurgeryError: there are none, or their outputs differ in more than their rows.
    """
    check_joinable([part.mean for part in parts], "mc_predict")
    columns = zip(*map(_fields_of, parts))
    whole: Any = (torch.cat(one) if isinstance(one[0], Tensor) else one[0] for one in columns)
    return MCPrediction(*whole)


class Totals:
    """Sums over samples, so that outputs need not be kept."""

    def __init__(self, class_dim: int | None) -> None:
        self.class_dim = class_dim
        self.count = 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0
        """Sum of squared deviations from the mean (Chan, Golub and LeVeque 1983)."""
        self.probabilities: Any = 0.0
        self.entropies: Any = 0.0

    def add(self, outputs: Tensor) -> None:
        """`outputs` is (samples, batch, ...)."""
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        n, mean = len(outputs), outputs.mean(0)
        squares = ((outputs - mean) ** 2).sum(0)
        if self.count:
            mean, squares = self._together(n, mean, squares)
        self.count, self.mean, self.squares = self.count + n, mean, squares
        if self.class_dim is not None:
            log_p = self._log_probabilities(outputs)
            self.probabilities = self.probabilities + log_p.exp().sum(0)
            self.entropies = self.entropies + _entropy(log_p, self._dim(outputs)).sum(0)

    def _together(self, n: int, mean: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and squared deviations of all, with those of the last `n`."""
        total, gap = self.count + n, mean - self.mean
        squares = self.squares + squares + gap**2 * (self.count * n / total)
        weighted = self.mean * (self.count / total) + mean * (n / total)
        # Infinite means have no gap; equal ones stay what they are to the bit.
        return torch.where(gap.isfinite(), self.mean + gap * (n / total), weighted), squares

    def _dim(self, outputs: Tensor) -> int:
        """The class dimension of stacked outputs, counted from the end."""
        assert self.class_dim is not None
        ndim = outputs.ndim - 1
        dim = self.class_dim if self.class_dim < 0 else self.class_dim - ndim
        if not 1 - ndim <= dim <= -1:
            raise ValueError(
                f"class_dim={self.class_dim} is no dimension after the batch of an output of shape "
                f"{tuple(outputs.shape[1:])}; give that of the classes, or None"
            )
        return dim

    def _log_probabilities(self, outputs: Tensor) -> Tensor:
        dim = self._dim(outputs)
        if outputs.shape[dim] == 1:  # one logit: the other class has logit 0
            outputs = torch.cat([torch.zeros_like(outputs), outputs], dim)
        return outputs.log_softmax(dim)

    def result(self) -> MCPrediction:
        variance = self.squares / (self.count - 1)
        if self.class_dim is None:
            return MCPrediction(self.mean, variance, None, None, None, self.count)
        dim = self._dim(self.mean[None])
        probabilities = self.probabilities / self.count
        entropy = _entropy(probabilities.log(), dim)
        information = (entropy - self.entropies / self.count).clamp_min(0)
        if self.mean.shape[dim] == 1:
            probabilities = probabilities.narrow(dim, 1, 1)
        return MCPrediction(self.mean, variance, probabilities, entropy, information, self.count)


def _entropy(log_p: Tensor, dim: int) -> Tensor:
    entropy: Tensor = torch.special.entr(log_p.exp()).sum(dim)
    return entropy
