"""An operated Linear in a compiled graph: one operator forward, and one backward.

The graph holds no masked weight then, and its backward draws the mask once, for the masked weight and
for the gradient, as eager code does. To the compiler these are two calls; a mask of its own for each
would be four nodes, a part of the graph that is computed again, and three calls.

If what backward does changes, the operator needs a new name: AOTAutograd keeps backwards on disk by the
graph of the forward.

`extension/operators.h` has them in C++. On a GPU only that is used: calls of Python would take longer
there than what inductor makes of the formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch_private.compiler import constant_in_traces
from . import gpu
from .extension import loading
from .law import Law, Layout, Mask
from .linear import gradients, product
from .mask import drop
from .once import differentiable_once
from .operators import composite, operator
from .product import matrix


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor | None, *law: Tensor
) -> Tensor:
    mask = _mask_of(weight, *law)
    if x.dtype == weight.dtype:
        found = product(x, weight, bias, mask, anchor, weight.requires_grad)
    else:
        found = F.linear(x, drop(weight, anchor, mask, x.dtype), bias)
    loading.note_product()
    return found


def _gradients(
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
    mask = _mask_of(weight, key, thresholds, scales, row)
    on_gpu = gpu.is_there(weight) and gpu.reads(weight, anchor)
    found = gradients(grad, x, weight, mask, anchor, (*want, False), on_gpu)
    loading.note_product()
    return tuple(grad.new_empty(0) if one is None else one for one in found[:2])


def _mask_of(weight: Tensor, key: Tensor, thresholds: Tensor, scales: Tensor, row: Tensor) -> Mask:
    law = Law(thresholds.index_select(0, row)[0], scales.index_select(0, row)[0])
    return Mask(key, law, Layout.elements(weight.numel()))


def _shape(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias)


def _shapes(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    of_x = grad.new_empty((*grad.shape[:-1], weight.shape[1]))
    found = of_x, torch.empty_like(weight)
    return tuple(one if wanted else grad.new_empty(0) for one, wanted in zip(found, rest[-1]))


_INPUTS = "Tensor x, Tensor weight, Tensor? bias"
_LAW = "Tensor? anchor, Tensor key, Tensor thresholds, Tensor scales, Tensor row"

_linear_op = operator(f"masked_linear({_INPUTS}, {_LAW}) -> Tensor", _product, _shape)
_gradients_op = operator(
    f"masked_linear_backward(Tensor grad, Tensor x, Tensor weight, {_LAW}, bool[] want)"
    " -> (Tensor, Tensor)",
    _gradients,
    _shapes,
)
"""The gradients of x and weight; empty where not wanted. That of the bias is left to the compiler,
which makes it part of something else."""


class _LinearInGraph(torch.autograd.Function):
    """`_linear_op`, differentiable once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *rest)
        return cast(Tensor, _linear_op(x, weight, bias, *rest))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (*want, of_bias) = grads, ctx.needs_input_grad[:3]
        found: tuple[Tensor | None, ...] = (None, None)
        if any(want):
            saved = ctx.saved_tensors  # once: a checkpoint gives each a single time
            both = _gradients_op(grad, *saved, want)
            given = tuple(one if wanted else None for one, wanted in zip(both, want))
            found = differentiable_once(_PRODUCT, given, (grad, *saved[:2]))
        return *found, matrix(grad).sum(0) if of_bias else None, *(None,) * 5


_PRODUCT = "a Linear in a compiled graph"


def _trained(*args: Tensor | None) -> Tensor:
    return cast(Tensor, _LinearInGraph.apply(*args))  # type: ignore[no-untyped-call]


loading.use(product=_product, gradients=_gradients)


@constant_in_traces
def has_operators(kind: str) -> bool:
    """Whether the operators are worth their calls on a type of device. The first trace for a GPU waits
    for the extension, since it would take longer without."""
    return kind == "cpu" or (kind == "cuda" and loading.on_the_gpu())


linear_in_graph = composite(f"trained_linear({_INPUTS}, {_LAW}) -> Tensor", _trained)
"""`F.linear` with a masked weight, for a trace.

    linear_in_graph(x, weight, bias, anchor, key, thresholds, scales, row)

x: (..., in). weight, anchor: (out, in), masked by element; the anchor may be None. bias: (out,) or
None. key: int32, (2,). thresholds, scales: of a table of laws, 1-D. row: int64, (1,), of the law in it.
All of one dtype but for those; on a GPU, weight and anchor may have another. Returns (..., out),
differentiable once.
"""
