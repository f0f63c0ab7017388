"""The product of each example with a masked weight of its own, entry by entry, and its gradients.

No more masked weights exist at a time than one block of them (`BLOCK` entries), and autograd keeps the
input, the weight and the key.

There are two ways to the same numbers. Where each example has few rows, the mask is drawn inside the
product: formulas that inductor turns into one loop nest, so that no masked weight exists at all. Else
a block of masked weights is made and multiplied, and then the next. Both are the insides of two
registered operators, which `torch.compile`, `torch.export` and `torch.func` leave whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from .engine import CHUNK, compile_enabled, run_compiled
from .hash import example_keys, spread
from .mask import masked_formula

BLOCK = 1 << 20
"""Masked weights made at a time, where examples have many rows: 4 MB. Without a compiler a CPU makes
`CHUNK` at a time, as the temporaries of the plain formula need ten times as much."""

FEW_ROWS = 4
"""Up to so many rows an example, drawing its mask for each row costs less than storing its weight."""


# The formulas. `key` is that of each example, (examples, 2); the place of an entry is the sum of the
# spread indices of its two coordinates, since spreading is linear.


def _masked(
    values: Tensor,
    anchor: Tensor | None,
    key: Tensor,
    threshold: Tensor,
    scale: Tensor,
    first: Tensor,
    second: Tensor,
) -> Tensor:
    """The masked weight of each example: (examples, first, second)."""
    shape = (key.shape[0], first.shape[0], second.shape[0])
    words = key.t()[:, :, None, None]
    places = first[:, None] + second
    return masked_formula(values, anchor, words, threshold, scale, shape, places)


def _product_formula(
    x: Tensor,
    weight: Tensor,
    anchor: Tensor | None,
    key: Tensor,
    threshold: Tensor,
    scale: Tensor,
    first: Tensor,
    second: Tensor,
) -> Tensor:
    """`x_e @ W_e` for x (examples, first) and a weight (first, second).

    The sum is over the outer loop, which inductor vectorises along `second`: twice as fast.
    """
    used = _masked(weight, anchor, key, threshold, scale, first, second)
    return (x[:, :, None].to(scale.dtype) * used).sum(1).to(x.dtype)


def _outer_formula(
    u: Tensor,
    v: Tensor,
    key: Tensor,
    threshold: Tensor,
    scale: Tensor,
    first: Tensor,
    second: Tensor,
) -> Tensor:
    """The gradient of the weight: the masked outer products of u_e and v_e, summed over e."""
    outer = u[:, :, None].to(scale.dtype) * v[:, None, :].to(scale.dtype)
    return _masked(outer, None, key, threshold, scale, first, second).sum(0)


def _block_formula(
    weight: Tensor | None,
    anchor: Tensor | None,
    outer: Tensor | None,
    key: Tensor,
    threshold: Tensor,
    scale: Tensor,
    first: Tensor,
    second: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """What one draw of the masks of a block makes of its weight and of its outer products."""
    mask = partial(_masked, key=key, threshold=threshold, scale=scale, first=first, second=second)
    used = None if weight is None else mask(weight, anchor)
    return used, None if outer is None else mask(outer, None)


def _coordinates(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The spread indices of rows and columns."""
    rows, columns = weight.shape
    index = torch.arange(max(rows, columns), dtype=torch.int64, device=weight.device)
    return spread(index[:rows] * columns), spread(index[:columns])


_Place = tuple[slice, slice]


def _blocks(examples: int, weight: Tensor) -> Iterator[_Place]:
    """Blocks of examples and rows: several whole examples, or some rows of one."""
    rows, columns = weight.shape
    entries = BLOCK if compile_enabled() or weight.device.type != "cpu" else CHUNK
    row_step = max(1, min(rows, entries // max(1, columns)))
    step = max(1, entries // max(1, rows * columns))
    for row in range(0, rows, row_step):
        for example in range(0, examples, step):
            yield slice(example, example + step), slice(row, row + row_step)


def _part(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


class _Masks:
    """The masks of all examples of one call, and the two ways to use them."""

    def __init__(
        self, x: Tensor, weight: Tensor, key: Tensor, threshold: Tensor, scale: Tensor
    ) -> None:
        self.shape, self.rows = weight.shape, x.shape[1]
        self.key = example_keys(key, x.shape[0], weight.numel())
        self.law = (threshold, scale)
        self.places = _coordinates(weight)

    def fused(
        self, formula: Callable[..., Tensor], *tensors: Tensor | None, swap: bool = False
    ) -> Tensor | None:
        """A formula with the masks drawn inside, or None where that is not the way to do it."""
        if self.rows > FEW_ROWS or not compile_enabled():
            return None
        key = self.key.repeat_interleave(self.rows, 0)
        places = self.places[::-1] if swap else self.places
        dense = [None if tensor is None else tensor.contiguous() for tensor in tensors]
        entries = key.shape[0] * self.shape.numel()
        found: Tensor | None = run_compiled(
            formula, key, entries, (*dense, key, *self.law, *places)
        )
        return found

    def block(
        self, place: _Place, weight: Tensor | None, anchor: Tensor | None, outer: Tensor | None
    ) -> Any:
        """The masked weights and the masked outer products of a block."""
        examples, rows = place
        key, first, second = self.key[examples], self.places[0][rows], self.places[1]
        args = (_part(weight, rows), _part(anchor, rows), outer, key, *self.law, first, second)
        entries = key.shape[0] * first.shape[0] * second.shape[0]
        found = run_compiled(_block_formula, key, entries, args)
        return _block_formula(*args) if found is None else found


@torch.library.custom_op(
    "surgery::example_product",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? anchor, Tensor key, Tensor threshold, Tensor scale)"
    " -> Tensor",
)
def _product_op(
    x: Tensor, weight: Tensor, anchor: Tensor | None, key: Tensor, threshold: Tensor, scale: Tensor
) -> Tensor:
    x, weight = x.detach(), weight.detach()
    examples, rows = x.shape[:2]
    masks = _Masks(x, weight, key, threshold, scale)
    towards = None if anchor is None else anchor.t()
    flat = x.flatten(0, 1)
    fused = masks.fused(_product_formula, flat, weight.t(), towards, swap=True)
    if fused is not None:
        return fused.view(examples, rows, weight.shape[0])
    product = x.new_empty(examples, rows, weight.shape[0])
    for place in _blocks(examples, weight):
        used, _ = masks.block(place, weight, anchor, None)
        product[place[0], :, place[1]] = torch.bmm(x[place[0]], used.mT)
    return product


@torch.library.custom_op(
    "surgery::example_product_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor? anchor, Tensor key, Tensor threshold,"
    " Tensor scale, bool want_x, bool want_weight) -> (Tensor, Tensor)",
)
def _gradients_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    anchor: Tensor | None,
    key: Tensor,
    threshold: Tensor,
    scale: Tensor,
    want_x: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight; empty where not wanted."""
    grad, x, weight = grad.detach(), x.detach(), weight.detach()
    masks = _Masks(x, weight, key, threshold, scale)
    found = _fused_gradients(masks, grad, x, weight, anchor, want_x, want_weight)
    if found is None:
        found = _block_gradients(masks, grad, x, weight, anchor, want_x, want_weight)
    of_x, of_weight = found
    return (
        x.new_empty(0) if of_x is None else of_x.to(x.dtype),
        weight.new_empty(0) if of_weight is None else of_weight.to(weight.dtype),
    )


_Gradients = tuple[Tensor | None, Tensor | None]


def _fused_gradients(
    masks: _Masks,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    anchor: Tensor | None,
    want_x: bool,
    want_weight: bool,
) -> _Gradients | None:
    of_x = of_weight = None
    rows, inputs = grad.flatten(0, 1), x.flatten(0, 1)
    if want_x:
        of_x = masks.fused(_product_formula, rows, weight, anchor)
        if of_x is None:
            return None
        of_x = of_x.view(x.shape)
    if want_weight:
        of_weight = masks.fused(_outer_formula, rows, inputs)
        if of_weight is None:
            return None
    return of_x, of_weight


def _block_gradients(
    masks: _Masks,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    anchor: Tensor | None,
    want_x: bool,
    want_weight: bool,
) -> _Gradients:
    wide = masks.law[1].dtype
    of_x = torch.zeros_like(x, dtype=wide) if want_x else None
    of_weight = torch.zeros_like(weight, dtype=wide) if want_weight else None
    for place in _blocks(x.shape[0], weight):
        examples, rows = place
        part = grad[examples, :, rows]
        outer = torch.bmm(part.mT, x[examples]) if want_weight else None
        used, kept = masks.block(place, weight if want_x else None, anchor, outer)
        if of_x is not None:
            of_x[examples] += torch.bmm(part, used)
        if of_weight is not None:
            of_weight[rows] += kept[0] if len(kept) == 1 else kept.sum(0, dtype=wide)
    return of_x, of_weight


@_product_op.register_fake
def _(x: Tensor, weight: Tensor, *rest: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[0])


@_gradients_op.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    want_x, want_weight = rest[-2:]
    return (
        x.new_empty(x.shape if want_x else 0),
        weight.new_empty(weight.shape if want_weight else 0),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(value for value in inputs if not isinstance(value, bool)))
    ctx.wanted = tuple(value for value in inputs if isinstance(value, bool))


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    want_x, want_weight = ctx.needs_input_grad[:2]
    of_x, of_weight = _gradients(grad, *ctx.saved_tensors, want_x, want_weight)
    return of_x if want_x else None, of_weight if want_weight else None, None, None, None, None


def _gradients_backward(ctx: Any, of_x: Tensor, of_weight: Tensor) -> tuple[Tensor | None, ...]:
    """Both gradients are linear in each of grad, x and weight, so theirs are made of the same two."""
    grad, x, weight, anchor, *law = ctx.saved_tensors
    want_x, want_weight = ctx.wanted
    for_grad = torch.zeros_like(grad)
    if want_x:
        for_grad = for_grad + example_product(of_x, weight, anchor, *law)
    if want_weight:
        for_grad = for_grad + example_product(x, of_weight, None, *law)
    values = (of_x if want_x else x, of_weight if want_weight else weight)
    for_x, for_weight = _gradients(grad, *values, None, *law, want_weight, want_x)
    return (
        for_grad,
        for_x if want_weight else None,
        for_weight if want_x else None,
        *(None,) * 6,
    )


def _differentiable(operator: Any, backward: Callable[..., Any]) -> Callable[..., Any]:
    """The operator with its gradient, also inside `torch.func`, which does not differentiate
    registered operators but functions."""

    def call(*args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return recorded.apply(*args)
        return operator(*args)

    def vmap(info: Any, dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """One after another, so that memory stays bounded."""
        results = [
            call(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, dims)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results))), (0, 0)

    operator.register_autograd(backward, setup_context=_keep)
    rules = {"forward": operator, "setup_context": _keep, "backward": backward, "vmap": vmap}
    methods: dict[str, Any] = {name: staticmethod(rule) for name, rule in rules.items()}
    recorded = cast(Any, type(operator._name, (torch.autograd.Function,), methods))
    return call


_gradients = _differentiable(_gradients_op, _gradients_backward)
example_product = _differentiable(_product_op, _product_backward)
"""`x_e @ W_e^T` for x (examples, rows, in) and a weight (out, in): see `example_linear`."""
