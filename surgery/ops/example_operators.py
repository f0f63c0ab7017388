"""The product of each example, as autograd, compilers and `torch.func` see it.

It and its gradients are two registered operators, which `torch.compile`, `torch.export` and
`torch.func` leave whole. Eager code does without them: for a small layer they take longer to call than
the work takes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..torch_private.modes import dispatch_modes
from ..torch_private.tracing import is_traced, is_transformed
from . import gpu
from .example_product import formula, gradients, product
from .extension import loading
from .hash import Key, key_tensor
from .law import Law, Layout, Mask
from .once import differentiable_once
from .ordinary import is_ordinary
from .part import Part
from .product import matrix


def example_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor | None, key: Key, law: Law
) -> Tensor:
    """`x_e @ W_e^T + b` for x (examples, in) or (examples, rows, in), a weight (out, in) and a bias
    (out,), which is not masked: see `example_linear`."""
    if not is_traced():
        found = _eager(x, weight, bias, anchor, _mask_of(weight, key, law))
        if found is not None:
            return found
    rows = x.unsqueeze(1) if x.dim() == 2 else x
    # dynamo knows no rules for operators inside of transforms
    if torch.compiler.is_compiling() and is_transformed():
        u = formula(rows, weight, anchor, key_tensor(key, weight.device), law)
    else:
        given = rows, weight, anchor, key_tensor(key), law.threshold, law.scale
        u = cast(Tensor, _product(*given))
    u = u.squeeze(1) if x.dim() == 2 else u
    return u if bias is None else u + bias.to(u.dtype)


def _eager(
    x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor | None, mask: Mask
) -> Tensor | None:
    """The same in eager code; None where only operators do it."""
    if loading.example is not None:
        done = loading.example(x, weight, bias, (anchor, mask))
        if done is not None:
            return done
    taken = _taken(x, weight, anchor, bias)
    if taken is None:
        return None
    if torch.is_grad_enabled():
        rest = anchor, mask, taken
        found: Tensor = _Eager.apply(x, weight, bias, rest)  # type: ignore[no-untyped-call]
    else:
        found = product(x, weight, anchor, mask, taken, bias=bias)
    if taken:
        loading.note_product()
    return found


def _taken(*tensors: Tensor | None) -> bool | None:
    """Whether the kernels of a GPU take these tensors; None where only operators do: of tensors that
    are more than dense values, and while modes look on."""
    if gpu.takes(*tensors, strided=True):  # type: ignore[arg-type]
        return True
    plain = all(tensor is None or is_ordinary(tensor) for tensor in tensors)
    return False if plain and not dispatch_modes() else None


def part_product(
    x: Tensor, weight: Tensor, anchor: Tensor | None, key: Key, law: Law, part: Part
) -> Tensor:
    """The same for a weight that is a part of a whole one: in eager code, differentiable once."""
    if is_traced():
        raise RuntimeError(
            "a mask for each example of a weight that processes share (tensor parallelism) is for "
            "eager code; use sampling='batch' where torch.compile or torch.func follows it"
        )
    mask = Mask(key_tensor(key, weight.device), law, _elements(math.prod(part.whole)))
    return cast(Tensor, _OfPart.apply(x, weight, (anchor, mask, part)))  # type: ignore[no-untyped-call]


_OF_PART = "a product of sampling='example' with a weight that processes share"


class _OfPart(torch.autograd.Function):
    """The product with a part of a weight. Keeps x, W and the key."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rest: Any) -> Tensor:
        anchor, mask, part = ctx.rest = rest
        ctx.save_for_backward(x, weight)
        return product(x, weight, anchor, mask, taken=False, part=part)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (anchor, mask, part), (x, weight) = ctx.rest, ctx.saved_tensors
        want_x, want_weight, _ = ctx.needs_input_grad
        given = grads[0], x, weight, anchor, mask, want_x, want_weight
        with torch.no_grad():
            both = gradients(*given, taken=False, part=part)
        return *differentiable_once(_OF_PART, both, (grads[0], x, weight)), None


def _mask_of(weight: Tensor, key: Key, law: Law) -> Mask:
    """The mask of example 0."""
    return Mask(key, law, _elements(weight.numel()))


_elements = functools.lru_cache(maxsize=4096)(Layout.elements)


_Rest = tuple[Tensor | None, Mask, bool]
"""Anchor and mask of a weight, and what `_taken` says: one argument, as each costs time."""


class _Eager(torch.autograd.Function):
    """The product in eager code. Keeps x, W and the key. `extension/example.h` is the same on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rest: _Rest) -> Tensor:
        anchor, ctx.mask, taken = rest
        ctx.save_for_backward(x, weight, anchor)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return product(x, weight, anchor, ctx.mask, taken, bias=bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, anchor = ctx.saved_tensors
        (grad,), (*want, want_bias, _) = grads, ctx.needs_input_grad
        of_bias = matrix(grad).sum(0).to(ctx.bias_dtype) if want_bias else None
        return *_gradients_of_node(grad, x, weight, (anchor, ctx.mask), want)[:2], of_bias, None


def _gradients_of_node(
    grad: Tensor, x: Tensor, weight: Tensor, rest: Any, want: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, None]:
    """Of x and weight, in backward of the node, here and in C++.

    Args:
        rest: anchor and mask, and more.
        want: of x and weight.
    """
    (anchor, mask, *_), (want_x, want_weight), law = rest, want, rest[1].law
    if not torch.is_grad_enabled() and not is_traced():
        taken = _taken(grad, x, weight, anchor)
        if taken is not None:
            both = gradients(grad, x, weight, anchor, mask, bool(want_x), bool(want_weight), taken)
            loading.take_kernels()
            return *both, None
    grad, rows = (each.unsqueeze(1) if x.dim() == 2 else each for each in (grad, x))
    given = grad, rows, weight, anchor, key_tensor(mask.key), law.threshold, law.scale
    of_x, of_weight = _gradients(*given, bool(want_x), bool(want_weight))
    return of_x.view(x.shape) if want_x else None, of_weight if want_weight else None, None


loading.use(example=_gradients_of_node)


@torch.library.custom_op(
    "surgery::example_product",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? anchor, Tensor key, Tensor threshold, Tensor scale)"
    " -> Tensor",
)
def _product_op(
    x: Tensor, weight: Tensor, anchor: Tensor | None, key: Tensor, threshold: Tensor, scale: Tensor
) -> Tensor:
    return product(x, weight, anchor, _mask_of(weight, key, Law(threshold, scale)))


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
    mask = _mask_of(weight, key, Law(threshold, scale))
    of_x, of_weight = gradients(grad, x, weight, anchor, mask, want_x, want_weight)
    return (
        x.new_empty(0) if of_x is None else of_x,
        weight.new_empty(0) if of_weight is None else of_weight,
    )


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
        dot = dot + _product(x_dot, weight, anchor, *law)
    if weight_dot is not None:
        dot = dot + _product(x, weight_dot, None, *law)
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
        for_grad = for_grad + _product(of_x, weight, anchor, *law)
    if want_weight:
        for_grad = for_grad + _product(x, of_weight, None, *law)
    values = (of_x if want_x else x, of_weight if want_weight else weight)
    for_x, for_weight = _gradients(grad, *values, None, *law, want_weight, want_x)
    return (
        for_grad,
        for_x if want_weight else None,
        for_weight if want_x else None,
        *(None,) * 6,
    )


def _differentiable(
    name: str, operator: Any, backward: Callable[..., Any], tangent: Callable[..., Any]
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
    methods: dict[str, Any] = {key: staticmethod(rule) for key, rule in rules.items()}
    recorded = cast(Any, type(name, (torch.autograd.Function,), methods))
    return call


_gradients = _differentiable(
    "example_product_backward", _gradients_op, _gradients_backward, _gradients_tangent
)
_product = _differentiable("example_product", _product_op, _product_backward, _product_tangent)
