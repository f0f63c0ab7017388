"""The paper's own modes, for modules whose pre-activation is a product of input and weight.

A mask per example, noise per pre-activation, and moments cannot be had by handing a masked weight to
the module's forward: they replace that forward's product.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..kinds.examples import where_examples_lie
from ..kinds.product import LINEAR_PRODUCT, Product
from ..moments import Gaussian, Points, Source
from ..moments.scope import in_scope, scope_shapes, settle
from ..ops import Law, Layout, drop_weight
from ..ops.hash import Key
from ..ops.ordinary import is_dense
from .state import NotGrouped, SiteState


class Factor(NamedTuple):
    """A weight or a bias as it enters a product."""

    raw: Tensor
    state: SiteState | None = None
    """None: it is not dropped."""
    anchor: Tensor | None = None


def product_forward(
    product: Product,
    module: nn.Module | None,
    x: Tensor,
    weight: Factor,
    bias: Factor | None,
    mode: str,
) -> Any:
    """The pre-activation of one forward call.

    Args:
        product: of the module or graph node.
        module: what `product.run` is given.
        x: the input; its features along `product.features`.
        weight: a site.
        bias: dropped with the weight, or not dropped, or None.
        mode: `SiteState.mode` of the weight: `"example"`, `"gaussian"`, `"moments"` or `"probe"`.

    Returns:
        a Tensor, or for `"moments"` a `Gaussian` where something above settles it.

    Raises:
        RuntimeError: the input has no example dimension, or not the one of the model's input.
    """
    state = weight.state
    assert state is not None
    x = settle(x)
    if not isinstance(x, Tensor):
        raise TypeError(f"{state.site}: the input must be a Tensor, not {type(x).__name__}")
    _check_dense(x, state, mode)
    if mode == "probe":
        return _probe(product, module, x, weight, bias, state)
    if mode == "example":
        return _per_example(product, module, x, weight, bias, state)
    undropped = bias is None or bias.state is None
    if mode == "gaussian" and product is LINEAR_PRODUCT and undropped:
        law, offset = state.law_for(weight.raw), None if bias is None else bias.raw
        return ops.gaussian_linear(x, weight.raw, offset, law, state.unit, weight.anchor)
    mean, variance = _moments(product, module, x, weight, bias, state)
    if mode == "gaussian":
        return ops.gaussian_sample(mean, variance)
    if state.settled or in_scope():
        points = _points(product, module, x, weight, bias, mean)
        shared = state.unit in ("input", "tensor")
        return Gaussian.of(Source(mean, variance, state.site, state.draws, points, shared))
    return mean


def _check_dense(x: Tensor, state: SiteState, mode: str) -> None:
    """Raise `RuntimeError` for an input that this mode cannot use."""
    if is_dense(x):
        return
    if state.group is not None:
        raise NotGrouped(state.site)
    option = "inference='moments'" if mode == "moments" else f"sampling={mode!r}"
    other = "inference='mean'" if mode == "moments" else "sampling='batch'"
    form = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
    dense = "x.to_padded_tensor(0.0)" if x.is_nested else "x.to_dense()"
    raise RuntimeError(
        f"{state.site}: {option} needs a dense input, and got a {form} tensor. Give it {dense}, or "
        f"give this site {other}"
    )


def _probe(
    product: Product,
    module: nn.Module | None,
    x: Tensor,
    weight: Factor,
    bias: Factor | None,
    state: SiteState,
) -> Tensor:
    """What the plain weight gives, tilted so that neighbouring repetitions of the batch differ."""
    assert state.group is not None
    leading = x.ndim + product.features
    if leading < 1:
        raise NotGrouped(state.site)
    _check_group(state, x)
    u = product.run(module, x, weight.raw, None if bias is None else bias.raw)
    samples = state.group.samples
    factors = tilt(samples, u.shape[product.features], u.device, u.dtype)
    spatial = -1 - product.features
    factors = factors.view(samples, *(1,) * leading, factors.shape[1], *(1,) * spatial)
    tilted = u.reshape(samples, len(u) // samples, *u.shape[1:]) * factors
    return tilted.view(u.shape)


def tilt(samples: int, features: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(samples, features): 0.5 or 1.5, in one pattern for the sample in the middle and every other
    from there, in another between them. No shift and no norm over the features makes them equal."""
    place = torch.arange(features, device=device)
    one, other = 0.5 + (place // 2 % 2).to(dtype), 1.5 - (place % 2).to(dtype)
    return torch.stack([other if (i - samples // 2) % 2 else one for i in range(samples)])


def _points(
    product: Product,
    module: nn.Module | None,
    x: Tensor,
    weight: Factor,
    bias: Factor | None,
    mean: Tensor,
) -> Points | None:
    """Where one mask entry multiplies the whole pre-activation: its value if kept, and if dropped, each
    with its probability."""
    state = weight.state
    assert state is not None
    if state.unit not in ("output", "tensor"):
        return None
    moving, law = _moving(weight), state.law_for(weight.raw)
    bias_law = None if bias is None else _own_law(bias)
    part = product.run(
        module, x, moving, None if bias is None or bias_law is None else _moving(bias)
    )
    if bias_law is not None and bias_law is not law:
        of_weight = product.run(module, x, moving, None)
        return _points_of_two(mean, of_weight, part - of_weight, law.scale, bias_law.scale)
    never = law.scale == 0  # p = 1: the mean is that of dropped weights
    kept = torch.where(never, mean, mean + (law.scale - 1) * part).to(mean.dtype)
    dropped = torch.where(never, mean, mean - part).to(mean.dtype)
    probability = torch.where(never, 0, 1 / law.scale)
    return (kept, probability), (dropped, 1 - probability)


def _points_of_two(
    mean: Tensor, of_weight: Tensor, of_bias: Tensor, scale: Tensor, bias_scale: Tensor
) -> Points:
    """The same where weight and bias differ in p: kept are both, the one of smaller p, or none."""
    # p = 1 is in the mean already: nothing moves, as for p = 0.
    of_weight, of_bias = (
        torch.where(one == 0, 0, part) for one, part in ((scale, of_weight), (bias_scale, of_bias))
    )
    scale, bias_scale = (torch.where(one == 0, 1, one) for one in (scale, bias_scale))
    none = mean - of_weight - of_bias
    weight_kept, bias_kept = none + scale * of_weight, none + bias_scale * of_bias
    one = torch.where(scale < bias_scale, weight_kept, bias_kept)
    both = weight_kept + bias_scale * of_bias
    often, seldom = 1 / torch.minimum(scale, bias_scale), 1 / torch.maximum(scale, bias_scale)
    points = (both, seldom), (one, often - seldom), (none, 1 - often)
    return tuple((value.to(mean.dtype), probability) for value, probability in points)


def _own_law(bias: Factor) -> Law | None:
    """The law of a bias that is dropped."""
    return None if bias.state is None else bias.state.law_for(bias.raw)


def _moving(factor: Factor) -> Tensor:
    """What a mask multiplies."""
    return factor.raw if factor.anchor is None else factor.raw - factor.anchor


def _moments(
    product: Product,
    module: nn.Module | None,
    x: Tensor,
    weight: Factor,
    bias: Factor | None,
    state: SiteState,
) -> tuple[Tensor, Tensor]:
    return ops.moments_of(
        functools.partial(product.run, module),
        x,
        weight.raw,
        None if bias is None else bias.raw,
        state.law_for(weight.raw),
        state.unit,
        anchor=weight.anchor,
        bias_anchor=None if bias is None else bias.anchor,
        bias_law=None if bias is None else _own_law(bias),
    )


def _per_example(
    product: Product,
    module: nn.Module | None,
    x: Tensor,
    weight: Factor,
    bias: Factor | None,
    state: SiteState,
) -> Tensor:
    key = _key(state, weight.raw)
    dim = _example_dim(product, x, state)
    if product.is_matrix:
        return _matrix_per_example(product, x, weight, bias, state, key, dim)
    return _channels_per_example(product, module, x, weight, bias, state, key)


def _groups(state: SiteState) -> int | None:
    """Into how many examples the batch is split, if not one for each row."""
    return None if state.group is None or state.sampling != "batch" else state.group.samples


def _key(state: SiteState, raw: Tensor) -> Key:
    return state.new_key(raw.device) if state.held_key is None else state.held_key


def _example_dim(product: Product, x: Tensor, state: SiteState) -> int | None:
    """The dimension of the examples, counted from the start; None for all but the features."""
    _check_group(state, x)
    given = () if torch.compiler.is_compiling() else scope_shapes()
    dim, problem = where_examples_lie(tuple(x.shape), state.example_dim, product.features, given)
    if problem is not None:
        raise RuntimeError(f"{state.site}: {problem}")
    return dim


def _check_group(state: SiteState, x: Tensor) -> None:
    """Raise `NotGrouped` unless the repetitions of a batch lie where the examples do."""
    if state.group is None:
        return
    first = state.example_dim in ("all", 0, -x.ndim)
    if not first or x.shape[0] != state.group.rows:
        raise NotGrouped(state.site)


def _matrix_per_example(
    product: Product,
    x: Tensor,
    weight: Factor,
    bias: Factor | None,
    state: SiteState,
    key: Key,
    dim: int | None,
) -> Tensor:
    matrix, anchor = weight.raw, weight.anchor
    if product.columns:
        matrix, anchor = matrix.t(), None if anchor is None else anchor.t()
    law = state.law_for(weight.raw)
    rows, leading = _rows(x, dim, _groups(state))
    u = ops.example_linear(rows, matrix, key, law, state.unit, anchor)
    if bias is not None:
        u = u + _bias_per_example(bias, key, len(rows)).unsqueeze(1).to(u.dtype)
    u = u.reshape(*leading, u.shape[-1])
    return u if dim is None else u.movedim(0, dim)


def _rows(x: Tensor, dim: int | None, groups: int | None) -> tuple[Tensor, tuple[int, ...]]:
    """The input as (examples, rows that share a mask, features), and its leading sizes with the
    examples first."""
    features = x.shape[-1]
    if dim is None:
        return x.reshape(math.prod(x.shape[:-1]), 1, features), tuple(x.shape[:-1])
    first = x.movedim(dim, 0)
    examples = first.shape[0] if groups is None else groups
    size = math.prod(first.shape[:-1]) // max(examples, 1)
    return first.reshape(examples, size, features), tuple(first.shape[:-1])


def _bias_per_example(bias: Factor, key: Key, examples: int) -> Tensor:
    """(examples, out), or (1, out) if it is not dropped."""
    state = bias.state
    if state is None:
        return bias.raw.unsqueeze(0)
    own = key if state.follows is not None else _key(state, bias.raw)
    law = state.law_for(bias.raw)
    return ops.example_vector(bias.raw, own, law, state.unit, examples, bias.anchor)


def _channels_per_example(
    product: Product,
    module: nn.Module | None,
    x: Tensor,
    weight: Factor,
    bias: Factor | None,
    state: SiteState,
    key: Key,
) -> Tensor:
    """A convolution whose masks lie on the channels of its input or of its output."""
    law = state.law_for(weight.raw)
    groups = _groups(state) or len(x)

    def kept(values: Tensor) -> Tensor:
        view = (groups, len(values) // max(groups, 1), *values.shape[1:])
        return drop_weight(values, key, law, Layout.shared(view, own))

    own = (0,) if state.unit == "tensor" else (0, 2)
    if state.unit == "input":
        dropped = kept(x)
        u = product.run(module, dropped, weight.raw, None)
        if weight.anchor is not None:
            u = u + product.run(module, x - dropped, weight.anchor, None)
    else:
        u = kept(product.run(module, x, weight.raw, None))
        if weight.anchor is not None:
            towards = product.run(module, x, weight.anchor, None)
            u = u + (towards - kept(towards))
    if bias is None:
        return u
    added = _bias_per_example(bias, key, groups)
    added = added.repeat_interleave(len(x) // max(len(added), 1), 0)
    return u + added.reshape(len(x), u.shape[1], *(1,) * (u.ndim - 2)).to(u.dtype)
