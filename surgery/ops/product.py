"""How an input meets a weight: what the extension is told of a module, and what Python does of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

How = tuple[Any, ...]
"""`ROWS` or `COLUMNS`, or a convolution: (stride, padding, dilation, groups), with a number for each
spatial dimension in the first three."""

ROWS: How = ()
"""`F.linear`."""
COLUMNS: How = ("columns",)
"""`torch.addmm`, of a matrix and a weight that is stored in x out."""

_convolution_backward = torch.ops.aten.convolution_backward.default


def matrix(tensor: Tensor) -> Tensor:
    """All leading dimensions as one; by `reshape`, which batches of gradients know."""
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def of_weight(rows: Tensor, x: Tensor, how: How) -> Tensor:
    """The gradient of the weight of a matrix product. `rows`: that of the product, as a matrix."""
    return matrix(x).t().mm(rows) if how == COLUMNS else rows.t().mm(matrix(x))


def of_input(rows: Tensor, used: Tensor, how: How) -> Tensor:
    """That of its input, as a matrix."""
    return rows.mm(used.t() if how == COLUMNS else used)


def convolution_gradients(
    grad: Tensor, x: Tensor, used: Tensor, how: How, want: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, of the masked weight and of the bias; each None where it is not wanted."""
    stride, padding, dilation, groups = how
    none, sizes = [0] * len(stride), [used.shape[0]]
    options = sizes, stride, padding, dilation, False, none, groups, list(want)
    found = _convolution_backward(grad, x, used, *options)
    return tuple(one if wanted else None for one, wanted in zip(found, want))
