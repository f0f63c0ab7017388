"""The product of each example with a masked weight of its own, entry by entry, and its gradients.

No more masked weights exist at a time than one block of them (`BLOCK` entries), and autograd keeps the
input, the weight and the key.

There are two ways to the same numbers. Where each example has few rows, the mask is drawn inside the
product: by kernels on the CPU, and on the GPU by formulas that inductor turns into one loop nest, so
that no masked weight exists at all. Else a block of masked weights is made and multiplied, and then the
next. Both are the insides of two registered operators, which `torch.compile`, `torch.export` and
`torch.func` leave whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from . import native
from .engine import CHUNK, has_kernels, run_compiled
from .hash import mix, multipliers, spread
from .mask import apply_mask
from .ordinary import unviewed
from .tracing import is_traced

BLOCK = 1 << 20
"""Masked weights made at a time, where examples have many rows: 4 MB. Without a compiler a CPU makes
`CHUNK` at a time, as the temporaries of the plain formula need ten times as much."""

FEW_ROWS = 4
"""Up to so many rows an example, drawing its mask for each row costs less than storing its weight."""


# The formulas. The place of an entry is the sum of the spread indices of its two coordinates, since
# spreading is linear; `last` is the multiplier of each example in round 3 of the hash.


def _masked(
    values: Tensor,
    anchor: Tensor | None,
    last: Tensor,
    key: Tensor,
    threshold: Tensor,
    scale: Tensor,
    first: Tensor,
    second: Tensor,
) -> Tensor:
    """The masked weight of each example: (examples, first, second)."""
    bits = mix(first[:, None] + second, key, last[:, None, None])
    return apply_mask(bits >= threshold, values, anchor, scale)


def _product_formula(
    x: Tensor,
    weight: Tensor,
    anchor: Tensor | None,
    last: Tensor,
    key: Tensor,
    threshold: Tensor,
    scale: Tensor,
    first: Tensor,
    second: Tensor,
) -> Tensor:
    """`x_e @ W_e` for x (examples, first) and a weight (first, second)."""
    used = _masked(weight, anchor, last, key, threshold, scale, first, second)
    return (x[:, :, None].to(scale.dtype) * used).sum(1).to(x.dtype)


def _outer_formula(
    u: Tensor,
    v: Tensor,
    last: Tensor,
    key: Tensor,
    threshold: Tensor,
    scale: Tensor,
    first: Tensor,
    second: Tensor,
) -> Tensor:
    """The gradient of the weight: the masked outer products of u_e and v_e, summed over e."""
    outer = u[:, :, None].to(scale.dtype) * v[:, None, :].to(scale.dtype)
    return _masked(outer, None, last, key, threshold, scale, first, second).sum(0)


def _coordinates(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The spread indices of rows and columns."""
    rows, columns = weight.shape
    index = torch.arange(max(rows, columns), dtype=torch.int64, device=weight.device)
    return spread(index[:rows] * columns), spread(index[:columns])


_Place = tuple[slice, slice]
_Pair = tuple[Tensor | None, Tensor | None]


def _blocks(examples: int, weight: Tensor, entries: int) -> Iterator[_Place]:
    """Blocks of examples and rows: several whole examples, or some rows of one."""
    rows, columns = weight.shape
    row_step = max(1, min(rows, entries // max(1, columns)))
    step = max(1, entries // max(1, rows * columns))
    for row in range(0, rows, row_step):
        for example in range(0, examples, step):
            yield slice(example, example + step), slice(row, row + row_step)


def _part(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _flat(tensor: Tensor | None, example: int | None = None) -> Tensor | None:
    """All entries of a contiguous tensor, or those of an example."""
    if tensor is None:
        return None
    return tensor.reshape(-1) if example is None else tensor[example].view(-1)


class _Masks:
    """The masks of all examples of one call, and the ways to use them."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        anchor: Tensor | None,
        key: Tensor,
        threshold: Tensor,
        scale: Tensor,
    ) -> None:
        self.weight = weight.detach().contiguous()
        self.anchor = None if anchor is None else anchor.detach().contiguous()
        self.examples, self.rows = x.shape[:2]
        self.law = (key, threshold, scale)
        self.last = multipliers(self.examples, key)

    def each_row(self) -> Tensor:
        """The multiplier of each row of the input in round 3 of the hash."""
        return self.last if self.rows == 1 else self.last.repeat_interleave(self.rows)

    def kernels(self, name: str, *others: Tensor) -> bool:
        """Whether there are kernels for the weight and for other tensors."""
        given = (
            (self.weight, *others) if self.anchor is None else (self.weight, self.anchor, *others)
        )
        return native.takes(*given) and has_kernels(name)

    def factors(self) -> tuple[Tensor, Tensor | None]:
        """What is used of each entry if it is kept (without an anchor, before it is scaled), and if it
        is dropped."""
        if self.anchor is None:
            return self.weight, None
        always = torch.ones((), dtype=torch.bool, device=self.weight.device)
        return apply_mask(always, self.weight, self.anchor, self.law[2]), self.anchor

    def compiled(
        self, formula: Callable[..., Tensor], *tensors: Tensor | None, swap: bool = False
    ) -> Any:
        """A formula with the masks drawn inside, by inductor; None where that is not the way."""
        places = _coordinates(self.weight)
        dense = [None if tensor is None else tensor.contiguous() for tensor in tensors]
        args = (*dense, self.each_row(), *self.law, *(places[::-1] if swap else places))
        return run_compiled(formula, self.weight, args)

    def blocks(self) -> Iterator[_Place]:
        """The blocks of masked weights, one after the other."""
        large = self.weight.device.type != "cpu" or self.kernels("example_masks")
        return _blocks(self.examples, self.weight, BLOCK if large else CHUNK)

    def block(self, place: _Place, want_used: bool, outer: Tensor | None) -> _Pair:
        """The masked weights of a block, (examples, rows, columns), and its outer products, masked."""
        examples, rows = place
        weight, anchor, last = self.weight[rows], _part(self.anchor, rows), self.last[examples]
        if not self.kernels("example_masks", *(() if outer is None else (outer,))):
            first, second = _coordinates(self.weight)
            rest = (last, *self.law, first[rows], second)
            used = _masked(weight, anchor, *rest) if want_used else None
            return used, None if outer is None else _masked(outer, None, *rest)
        used = weight.new_empty(len(last), *weight.shape) if want_used else None
        start = (rows.start or 0) * weight.shape[1]
        values = (_flat(weight), _flat(anchor)) if want_used else (None, None)
        for example, multiplier in enumerate(last.tolist()):
            grad = _flat(outer, example)
            native.drop(*values, grad, _flat(used, example), grad, self.law, multiplier, start)
        return used, outer


@torch.library.custom_op(
    "surgery::example_product",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? anchor, Tensor key, Tensor threshold, Tensor scale)"
    " -> Tensor",
)
def _product_op(
    x: Tensor, weight: Tensor, anchor: Tensor | None, key: Tensor, threshold: Tensor, scale: Tensor
) -> Tensor:
    x = x.detach()
    masks = _Masks(x, weight, anchor, key, threshold, scale)
    fused = _fused_product(masks, x.flatten(0, 1)) if masks.rows <= FEW_ROWS else None
    if fused is not None:
        return unviewed(fused.view(*x.shape[:2], weight.shape[0]))
    product = x.new_empty(*x.shape[:2], weight.shape[0])
    for place in masks.blocks():
        used, _ = masks.block(place, True, None)
        assert used is not None
        product[place[0], :, place[1]] = torch.bmm(x[place[0]], used.mT)
    return product


def _fused_product(masks: _Masks, rows: Tensor) -> Tensor | None:
    """The product with masks drawn inside; None where there is nothing that does it."""
    if rows.dtype == torch.float32 and masks.kernels("products", rows):
        factors = masks.factors()
        return native.example_product(rows.contiguous(), *factors, masks.law, masks.each_row())
    towards = None if masks.anchor is None else masks.anchor.t()
    found: Tensor | None = masks.compiled(
        _product_formula, rows, masks.weight.t(), towards, swap=True
    )
    return found


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
    grad, x = grad.detach(), x.detach()
    masks = _Masks(x, weight, anchor, key, threshold, scale)
    found = (
        _fused_gradients(masks, grad, x, want_x, want_weight) if masks.rows <= FEW_ROWS else None
    )
    if found is None:
        found = _block_gradients(masks, grad, x, want_x, want_weight)
    of_x, of_weight = found
    return (
        x.new_empty(0) if of_x is None else unviewed(of_x.to(x.dtype).view(x.shape)),
        weight.new_empty(0) if of_weight is None else of_weight.to(weight.dtype),
    )


def _fused_gradients(
    masks: _Masks, grad: Tensor, x: Tensor, want_x: bool, want_weight: bool
) -> _Pair | None:
    """The gradients with masks drawn inside; None where there is nothing that does it."""
    rows, inputs = grad.flatten(0, 1).contiguous(), x.flatten(0, 1).contiguous()
    if rows.dtype == torch.float32 and masks.kernels("products", rows, inputs):
        args = (*masks.factors(), masks.law, masks.each_row())
        return native.example_gradients(rows, inputs, *args, want_x, want_weight)
    of_x = of_weight = None
    if want_x:
        of_x = masks.compiled(_product_formula, rows, masks.weight, masks.anchor)
        if of_x is None:
            return None
    if want_weight:
        of_weight = masks.compiled(_outer_formula, rows, inputs)
        if of_weight is None:
            return None
    return of_x, of_weight


def _block_gradients(
    masks: _Masks, grad: Tensor, x: Tensor, want_x: bool, want_weight: bool
) -> _Pair:
    wide = masks.law[2].dtype
    of_x = torch.zeros_like(x, dtype=wide) if want_x else None
    of_weight = torch.zeros_like(masks.weight, dtype=wide) if want_weight else None
    for place in masks.blocks():
        examples, rows = place
        part = grad[examples, :, rows]
        outer = torch.bmm(part.mT, x[examples]) if want_weight else None
        used, kept = masks.block(place, want_x, outer)
        if of_x is not None and used is not None:
            of_x[examples] += torch.bmm(part, used)
        if of_weight is not None and kept is not None:
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


def _keep_for_both(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """For tangents too, which registered operators do not have."""
    _keep(ctx, inputs, output)
    ctx.save_for_forward(*(value for value in inputs if not isinstance(value, bool)))


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    want_x, want_weight = ctx.needs_input_grad[:2]
    of_x, of_weight = _gradients(grad, *ctx.saved_tensors, want_x, want_weight)
    return of_x if want_x else None, of_weight if want_weight else None, None, None, None, None


def _product_tangent(ctx: Any, x_dot: Any, weight_dot: Any, *rest: Any) -> Tensor:
    """The product is linear in x, and in W - A."""
    x, weight, anchor, *law = ctx.saved_tensors
    dot: Tensor = x.new_zeros(*x.shape[:2], weight.shape[0])
    if x_dot is not None:
        dot = dot + example_product(x_dot, weight, anchor, *law)
    if weight_dot is not None:
        dot = dot + example_product(x, weight_dot, None, *law)
    return dot


def _gradients_tangent(
    ctx: Any, grad_dot: Any, x_dot: Any, weight_dot: Any, *rest: Any
) -> tuple[Tensor, Tensor]:
    """The gradient of x is linear in that of the product and in W - A, the one of W in the former and
    in x."""
    grad, x, weight, anchor, *law = ctx.saved_tensors
    want_x, want_weight = ctx.wanted
    of_x, of_weight = (
        like.new_zeros(like.shape if wanted else 0)
        for like, wanted in ((x, want_x), (weight, want_weight))
    )
    if grad_dot is not None:
        by_x, by_weight = _gradients(grad_dot, x, weight, anchor, *law, want_x, want_weight)
        of_x, of_weight = of_x + by_x, of_weight + by_weight
    if x_dot is not None and want_weight:
        of_weight = of_weight + _gradients(grad, x_dot, weight, None, *law, False, True)[1]
    if weight_dot is not None and want_x:
        of_x = of_x + _gradients(grad, x, weight_dot, None, *law, True, False)[0]
    return of_x, of_weight


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


def _differentiable(
    operator: Any, backward: Callable[..., Any], tangent: Callable[..., Any]
) -> Callable[..., Any]:
    """The operator with its gradient and its tangent, also inside `torch.func`, which does not
    differentiate registered operators but functions."""

    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling() and is_traced():
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
    rules = {
        "forward": operator,
        "setup_context": _keep_for_both,
        "backward": backward,
        "jvp": tangent,
        "vmap": vmap,
    }
    methods: dict[str, Any] = {name: staticmethod(rule) for name, rule in rules.items()}
    recorded = cast(Any, type(operator._name, (torch.autograd.Function,), methods))
    return call


_gradients = _differentiable(_gradients_op, _gradients_backward, _gradients_tangent)
example_product = _differentiable(_product_op, _product_backward, _product_tangent)
"""`x_e @ W_e^T` for x (examples, rows, in) and a weight (out, in): see `example_linear`."""
