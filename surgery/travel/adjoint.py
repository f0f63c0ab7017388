"""The covariance of outputs from backward passes.

To first order the outputs are linear in all that is born on the way. One backward pass for each output
gives its derivatives by every birth, and so the covariance

    sum over births of  J C J^T        J: derivatives of the outputs, C: covariance of what is born

with all that a forward cannot carry: two paths that meet again (residual sums, attention), masks
that all tokens or positions share. The derivative of a mean is the gain of `elementwise`, the same
that a forward would multiply by.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .run import Run


def output_covariance(mean: Tensor, run: Run) -> Tensor:
    """The covariance of the outputs of each example: (rows, outputs, outputs), with the entries of an
    example in a row.

    Args:
        mean: of the outputs, (rows, ...), with the graph that the run has recorded.
    """
    rows = run.rows
    flat = mean.reshape(rows, -1)
    count = flat.shape[1]
    total = flat.new_zeros(rows, count, count).detach()
    births = [one for one in run.births if one.delta is not None]
    if not births or not flat.requires_grad:
        return total
    deltas = [one.delta for one in births if one.delta is not None]
    by: list[list[Tensor]] = [[] for _ in births]
    for output in range(count):
        found = torch.autograd.grad(
            flat[:, output].sum(), deltas, retain_graph=output + 1 < count, allow_unused=True
        )
        for own, delta, gradient in zip(by, deltas, found):
            own.append(torch.zeros_like(delta) if gradient is None else gradient)
    with torch.no_grad():
        for birth, own in zip(births, by):
            total += birth.gram(torch.stack(own).to(birth.variance.dtype), rows).to(total.dtype)
    return total
