"""The covariance of outputs from backward passes.

To first order the outputs are linear in all that is born on the way. One backward pass for each output
gives its derivatives by every birth, and so the covariance

    sum over births of  J C J^T        J: derivatives of the outputs, C: covariance of what is born

with all that a forward cannot carry: two paths that meet again (residual sums, attention), masks
that all tokens or positions share. The derivative of a mean is the gain of `elementwise`, the same
that a forward would multiply by.

Passes run one by one: as one batch (`is_grads_batched`) they took longer for a real batch of MiniLM.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..spec.errors import SurgeryError
from .birth import Birth, of_examples
from .run import Run
from .state import wide


def output_covariance(mean: Tensor, run: Run) -> Tensor:
    """The covariance of the outputs of each example: (rows, outputs, outputs), with the entries of an
    example in a row.

    Args:
        mean: of the outputs, (rows, ...), with the graph that the run has recorded.

    Returns:
        in the dtype of variances.

    Raises:
        SurgeryError: some value that varies has not the examples along its first dimension.
    """
    rows = run.rows
    flat = mean.reshape(rows, -1)
    count = flat.shape[1]
    total = flat.new_zeros(rows, count, count, dtype=wide(flat.dtype)).detach()
    pairs = [(birth, birth.delta) for birth in run.births if birth.delta is not None]
    if not pairs or not flat.requires_grad:
        return total
    deltas = [delta for _, delta in pairs]
    _check_examples(flat, deltas, rows)
    by = {id(birth): torch.empty_like(delta.expand(count, *delta.shape)) for birth, delta in pairs}
    for output in range(count):
        found = torch.autograd.grad(
            flat[:, output].sum(), deltas, retain_graph=output + 1 < count, allow_unused=True
        )
        for own, gradient in zip(by.values(), found):
            own[output] = 0 if gradient is None else gradient
    with torch.no_grad():
        for births in _with_the_same_numbers([birth for birth, _ in pairs]):
            # Taken out, which frees them: there are many.
            theirs = [by.pop(id(one)).to(one.variance.dtype) for one in births]
            total += births[0].gram(theirs, rows, births[1:]).to(total.dtype)
    return total


def _check_examples(flat: Tensor, deltas: list[Tensor], rows: int) -> None:
    """Raise `SurgeryError` unless the outputs of the first example move by what is born where its
    entries must lie, and by nothing else. One backward pass for all examples rests on that."""
    if rows == 1:
        return
    weights = torch.linspace(1, 2, flat.shape[1], dtype=flat.dtype, device=flat.device)
    found = torch.autograd.grad(
        (flat[0] * weights).sum(), deltas, retain_graph=True, allow_unused=True
    )
    for gradient in (one for one in found if one is not None):
        fits = gradient.ndim > 0 and gradient.shape[0] % rows == 0
        if fits:
            # Of another example whose slopes are not finite, 0 times that.
            known = gradient.to(wide(gradient.dtype)).nan_to_num(0, 0, 0).unsqueeze(0)
            sizes = of_examples(known, rows)[0].flatten(1).square().sum(1)
            fits = bool(sizes[1:].sum() <= ROUNDING**2 * sizes[0])
        if not fits:
            raise SurgeryError(
                f"backward passes need the examples along the first dimension: there are {rows}, and "
                f"a value of shape {tuple(gradient.shape)} that varies has them elsewhere, or is "
                "common to all; give covariance= a number of draws or 'diagonal', or predict one "
                "example at a time. The model is unchanged"
            )


ROUNDING = 1e-3
"""What examples have to do with each other by rounding alone is less."""


def _with_the_same_numbers(births: list[Birth]) -> Iterable[list[Birth]]:
    """The births, those together that share their numbers."""
    groups: dict[int, list[Birth]] = {}
    for birth in births:
        groups.setdefault(id(birth.shared or birth), []).append(birth)
    return groups.values()
