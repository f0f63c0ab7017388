"""What `predict_moments` returns: Gaussians of outputs, and what they say of classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .prediction import Totals, check_joinable

DRAWS = 512
"""Draws from the Gaussian of the logits, for what is known of classes. They cost no forward."""


class LowRank(NamedTuple):
    """A covariance of the entries of each example as its factors."""

    factors: Tensor
    """(*shape, columns)"""

    def dense(self) -> Tensor:
        """(batch, entries, entries): the factors times themselves."""
        factors = self.factors.reshape(len(self.factors), -1, self.factors.shape[-1])
        return factors @ factors.transpose(1, 2)


@dataclass(frozen=True)
class Prediction:
    """What `predict_moments` found. `batch` is that of the inputs; logarithms are natural."""

    mean: Tensor
    """Expectation of the outputs over the masks: the shape of the model's output."""

    variance: Tensor
    """Variance of the outputs over the masks, entry by entry: the same shape."""

    covariance: Tensor | LowRank | None
    """Of the entries of an example, in a row: (batch, entries, entries) for `"full"`, its factors for a
    number of draws, None for `"diagonal"`."""

    probabilities: Tensor | None
    """Expected class probabilities, the same shape; for one logit, of its class. None without
    classes."""

    entropy: Tensor | None
    """Predictive entropy, that of `probabilities`. The output's shape without the class dimension."""

    mutual_information: Tensor | None
    """Between prediction and masks: the part of the entropy that comes from not knowing the
    weights. The shape of `entropy`. As `probabilities` and `entropy` it is that of the Gaussian of
    the logits."""

    settled: tuple[str, ...]
    """Where the variance of a value was lost, as `"module: function"`: functions without a rule go on
    with the mean. Empty if the variance went all the way."""

    def cpu(self) -> Prediction:
        """The same on the CPU."""
        return self._with(lambda one: one.cpu())

    def _with(self, function: Any) -> Prediction:
        changed: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                changed[name] = function(value)
            elif isinstance(value, LowRank):
                changed[name] = LowRank(*map(function, value))
        return replace(self, **changed)


def joined_predictions(parts: Sequence[Prediction]) -> Prediction:
    """What was found for the batches of a loader, one after the other.

    Raises:
        SurgeryError: there are none, or their outputs differ in more than their rows.
    """
    check_joinable([part.mean for part in parts], "predict_moments")
    joined: dict[str, Any] = {}
    for name, value in vars(parts[0]).items():
        columns: list[Any] = [getattr(part, name) for part in parts]
        if isinstance(value, Tensor):
            joined[name] = torch.cat(columns)
        elif isinstance(value, LowRank):
            joined[name] = LowRank(*map(torch.cat, zip(*columns)))
    settled = dict.fromkeys(where for part in parts for where in part.settled)
    return replace(parts[0], **joined, settled=tuple(settled))


def prediction_of(
    mean: Tensor,
    variance: Tensor,
    covariance: Tensor | LowRank | None,
    class_dim: int | None,
    settled: Sequence[str],
) -> Prediction:
    """The Gaussian of the outputs, and what draws from it say of classes."""
    if class_dim is None:
        return Prediction(mean, variance, covariance, None, None, None, tuple(settled))
    total = Totals(class_dim)
    for drawn in _draws(mean, variance, covariance):
        total.add(drawn)
    found = total.result()
    classes = found.probabilities, found.entropy, found.mutual_information
    return Prediction(mean, variance, covariance, *classes, tuple(settled))


def _draws(mean: Tensor, variance: Tensor, covariance: Tensor | LowRank | None) -> Any:
    """Draws from the Gaussian, (draws, *shape), some at a time; each comes with its mirror image,
    from a generator of their own."""
    generator = torch.Generator(mean.device).manual_seed(0)
    wide = mean.to(variance.dtype)
    rows, entries = len(mean), max(1, mean.numel())
    at_once = max(1, min(DRAWS // 2, 2**22 // entries))

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=mean.device, dtype=wide.dtype)

    root = None
    if isinstance(covariance, Tensor):
        root = _root(covariance.to(wide.dtype))
    left = DRAWS // 2
    while left:
        count = min(at_once, left)
        if root is not None:
            change = torch.einsum("bij,kbj->kbi", root, noise(count, rows, root.shape[-1]))
            change = change.reshape(count, *mean.shape)
        elif isinstance(covariance, LowRank):
            factors = covariance.factors.to(wide.dtype)
            ones = (1,) * (factors.ndim - 2)
            latent = noise(count, rows, factors.shape[-1]).view(count, rows, *ones, -1)
            change = (factors * latent).sum(-1)
        else:
            change = variance.sqrt() * noise(count, *mean.shape)
        yield torch.cat([wide + change, wide - change])
        left -= count


def _root(covariance: Tensor) -> Tensor:
    """R with `R R^T` the covariance, (batch, entries, entries); it may be singular. Rows are NaN of
    entries whose variance is infinite or NaN, and of no others.

    LAPACK refuses what is not finite; and eigenvalues may be larger than any entry, and overflow.
    """
    variance = covariance.diagonal(dim1=1, dim2=2)
    known = variance.isfinite()
    both = known.unsqueeze(2) & known.unsqueeze(1) & covariance.isfinite()
    scale = _power_of_two(torch.where(known, variance, 0))[:, None, None]
    values, vectors = torch.linalg.eigh(torch.where(both, covariance / scale / scale, 0))
    root: Tensor = vectors * values.clamp_min(0).sqrt().unsqueeze(1) * scale
    return root.masked_fill(~known.unsqueeze(2), torch.nan)


def _power_of_two(variances: Tensor) -> Tensor:
    """About the largest standard deviation of each row, (rows,); rounds nothing that it divides."""
    largest = torch.cat([variances, variances.new_zeros(len(variances), 1)], 1).amax(1)
    power: Tensor = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent // 2)
    return power
