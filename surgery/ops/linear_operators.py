"""An operated Linear in a compiled graph on the CPU: one operator forward, and one backward.

The graph holds no masked weight then, and its backward draws the mask once, for the masked weight and
for the gradient, as eager code does. To the compiler these are two calls; a mask of its own for each
would be four nodes, a part of the graph that is computed again, and three calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .law import Law, Layout, Mask
from .linear import gradients, product

_LAW = "Tensor key, Tensor thresholds, Tensor scales, Tensor row"


@torch.library.custom_op(
    "surgery::linear",
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor? bias, Tensor? anchor, {_LAW}) -> Tensor",
)
def _linear_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor | None, *law: Tensor
) -> Tensor:
    return product(x, weight, bias, _mask_of(weight, *law), anchor, weight.requires_grad)


@torch.library.custom_op(
    "surgery::linear_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor x, Tensor weight, Tensor? anchor, {_LAW}, bool[] want)"
    " -> (Tensor, Tensor, Tensor)",
)
def _gradients_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    anchor: Tensor | None,
    key: Tensor,
    thresholds: Tensor,
    scales: Tensor,
    row: Tensor,
    want: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of x, weight and bias; empty where not wanted."""
    mask = _mask_of(weight, key, thresholds, scales, row)
    found = gradients(grad, x, weight, mask, anchor, want)
    return tuple(grad.new_empty(0) if one is None else one for one in found)


def _mask_of(weight: Tensor, key: Tensor, thresholds: Tensor, scales: Tensor, row: Tensor) -> Mask:
    number = int(row)
    law = Law(thresholds[number], scales[number])
    return Mask(key, law, Layout.elements(weight.numel()))


@_linear_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    return F.linear(x, weight, bias)


@_gradients_op.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    shapes = (*grad.shape[:-1], weight.shape[1]), weight.shape, weight.shape[:1]
    return tuple(grad.new_empty(shape if wanted else 0) for shape, wanted in zip(shapes, rest[-1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _, *rest = inputs
    ctx.save_for_backward(x, weight, *rest)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    want = list(ctx.needs_input_grad[:3])
    found = _gradients_op(grad, *ctx.saved_tensors, want)
    return *(one if wanted else None for one, wanted in zip(found, want)), *(None,) * 5


_linear_op.register_autograd(_backward, setup_context=_keep)

linear_in_graph: Any = torch.ops.surgery.linear.default
"""`F.linear` with a masked weight, for a trace on the CPU.

    linear_in_graph(x, weight, bias, anchor, key, thresholds, scales, row)

x: (..., in). weight, anchor: (out, in), masked by element; the anchor may be None. bias: (out,) or
None. key: int32, (2,). thresholds, scales: of a table of laws, 1-D. row: int64, (1,), of the law in it.
All of one dtype but for those. Returns (..., out), differentiable once.
"""
