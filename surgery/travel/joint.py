"""Functions of several entries together: softmax and norms."""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import independent
from .call import Call, rule
from .run import Run
from .state import State, apart, average_of_draws, of_draws
from .value import Travelling


class _Softmax(NamedTuple):
    """What both rules need."""

    share: Tensor
    """The softmax at the mean."""
    spread: Tensor
    """The variance of each logit less their mean."""
    centred: Tensor | None
    """The columns of each logit less their mean."""


@rule("softmax", "safe_softmax")
def softmax(call: Call) -> Any:
    """To second order, with s = softmax(m) and w_i the variance of z_i - sum_j s_j z_j,

        E[softmax(z)]_i = s_i (1 + (w_i - sum_k s_k w_k) / 2)  ~  softmax(m + w / 2)_i

    which stays a distribution. Draws, and their mirror images, have all orders. It moves as
    `s * (dz - sum_j s_j dz_j)`.
    """
    value, dim = call.first, call.argument(1, "dim", -1)
    if not (isinstance(value, Travelling) and isinstance(dim, int)):
        return NotImplemented
    state, run = value.state(), value.run
    if not run.follows and dim in (-1, state.mean.ndim - 1):
        mean, variance = independent.softmax(state.at, state.variance)
        return Travelling.of(run, State(mean.to(state.mean.dtype), variance))

    def function(t: Tensor) -> Tensor:
        return t.softmax(dim)

    drawn = run.draws(state) is not None
    share, spread, centred = _softmax(state, dim, follows=not drawn)
    mean = function(state.mean.to(spread.dtype) + spread / 2).to(state.mean.dtype)
    if drawn:
        with apart():
            more = average_of_draws(function, state) - mean
        mean = mean + more
    with apart():
        variance = share.square() * spread

    def linear() -> Tensor | None:
        columns = _softmax(state, dim).centred if drawn else centred
        return None if columns is None else share.to(columns.dtype) * columns

    def columns() -> Tensor | None:
        return of_draws(function, mean, run.columns, state)

    new = torch.zeros_like(variance)
    return Travelling.of(run, run.after(mean, variance, new, linear, columns, mixes=True))


@rule("softmin")
def softmin(call: Call) -> Any:
    return torch.softmax(-call.first, call.argument(1, "dim", -1))


@rule("log_softmax")
def log_softmax(call: Call) -> Any:
    """`z - logsumexp(z)`, where E[logsumexp] is that of the mean plus half of the expected
    curvature."""
    value, dim = call.first, call.argument(1, "dim", -1)
    if not (isinstance(value, Travelling) and isinstance(dim, int)):
        return NotImplemented
    state = value.state()
    share, spread, centred = _softmax(state, dim)
    with apart():
        curvature = (share * spread).sum(dim, keepdim=True) / 2
    mean = state.mean.log_softmax(dim) - curvature.to(state.mean.dtype)

    run = value.run

    def columns() -> Tensor | None:
        return of_draws(lambda t: t.log_softmax(dim), mean, run.columns, state)

    new = torch.zeros_like(spread)
    return Travelling.of(run, run.after(mean, spread, new, lambda: centred, columns))


def _softmax(state: State, dim: int, follows: bool = True) -> _Softmax:
    """
    Args:
        follows: whether the spread is that of the columns; else entries are taken as independent.
    """
    with apart():
        share = state.at.softmax(dim)
        share = torch.where(share.isfinite(), share, 0)
        centred = None
        if state.factors is not None and follows:
            low = share.to(state.factors.dtype)
            column = dim if dim < 0 else dim + 1
            centred = state.factors - (low * state.factors).sum(column, keepdim=True)
            spread = centred.to(share.dtype).square().sum(0)
        else:
            common = (share.square() * state.variance).sum(dim, keepdim=True)
            spread = state.variance * (1 - 2 * share) + common
        return _Softmax(share, spread.clamp_min(0), centred)


@rule("layer_norm", "rms_norm")
def layer_norm(call: Call) -> Any:
    """(x - its mean) / root of the expected square. It moves as the derivative there does."""
    value = call.first
    if not isinstance(value, Travelling):
        return NotImplemented
    names = ["input", "normalized_shape", "weight", "bias", "eps"]
    if call.name == "rms_norm":
        names.remove("bias")
    given = {**dict(zip(names, call.args)), **call.kwargs}
    state, run = value.state(), value.run
    eps = given.get("eps", 1e-5 if call.name == "layer_norm" else None)
    eps = torch.finfo(state.mean.dtype).eps if eps is None else eps
    dims = tuple(range(-len(given["normalized_shape"]), 0))
    centred = call.name == "layer_norm"
    found = normed(state, run, dims, eps, centred, given.get("weight"), given.get("bias"))
    return Travelling.of(run, found)


def normed(
    state: State,
    run: Run,
    dims: tuple[int, ...],
    eps: float,
    centred: bool,
    weight: Tensor | None,
    bias: Tensor | None,
) -> State:
    """The state after a norm over `dims`, counted from the end.

    With y the normalised mean, n entries and d the deviation, entry i moves as
    (dx_i - mean(dx) - y_i mean(y dx)) / d. Entries of x are taken as independent for the variance.
    With C the covariance of dx / d, the expectation is y + 3/2 y (y'C y) / n^2 - C y / n to second
    order. The last two are left out where nothing tells C: of independent entries they are of order
    1 / n. Draws have all orders.
    """
    count = math.prod([state.mean.shape[dim] for dim in dims])
    one = 1 / count if centred else 0.0
    if not run.follows and dims == (-1,):
        result, moved = independent.norm(state.at, state.variance, weight, bias, eps, centred)
        return State(result.to(state.mean.dtype), moved)
    mean, variance, factors = state.mean.to(state.variance.dtype), state.variance, state.factors
    drawn = run.draws(state) is not None
    with apart():
        added = variance.mean(dims, keepdim=True) * (1 - one)
        if centred and factors is not None and not drawn:
            common = factors.mean(dims, keepdim=True).square().sum(0)
            added = (variance.mean(dims, keepdim=True) - common).clamp_min(0)
    unscaled, inverse = independent.normed(mean, added + eps, dims, centred)
    with apart():
        gain = inverse if weight is None else inverse * weight
        moved = independent.moved_by_norm(unscaled, variance, dims, centred) * gain.square()

    def of_draw(draw: Tensor) -> Tensor:
        wide, alone = draw.to(variance.dtype), torch.full_like(added, eps)
        return independent.normed(wide, alone, dims, centred)[0]

    def slopes() -> tuple[Tensor, Tensor, Tensor]:
        """The normalised mean; the columns, centred; and their products with it, averaged."""
        assert factors is not None
        y, own = unscaled.detach().to(factors.dtype), factors
        if centred:
            own = own - own.mean(dims, keepdim=True)
        return y, own, (y * own).mean(dims, keepdim=True)

    with apart():
        bent = torch.zeros_like(inverse)
        if drawn:
            bent = average_of_draws(of_draw, state) - unscaled
        elif factors is not None:
            y, own, along = slopes()
            by_scale = along * inverse.square().to(own.dtype)
            bent = 1.5 * y * (along * by_scale).sum(0) - (own * by_scale).sum(0)
    result = unscaled + bent
    scaled = result if weight is None else result * weight

    def linear() -> Tensor | None:
        if factors is None:
            return None
        y, own, along = slopes()
        return (own - y * along) * gain.to(own.dtype)

    def columns() -> Tensor | None:
        found = of_draws(of_draw, result.to(state.mean.dtype), run.columns, state)
        return found if found is None or weight is None else found.mul_(weight)

    mean = (scaled if bias is None else scaled + bias).to(state.mean.dtype)
    return run.after(mean, moved, torch.zeros_like(moved), linear, columns, mixes=True)


_BATCH_NORM = tuple(inspect.signature(F.batch_norm).parameters)


@rule("batch_norm")
def batch_norm(call: Call) -> Any:
    """In evaluation, affine in each channel."""
    value = call.first
    names = _BATCH_NORM
    if call.func is not F.batch_norm:  # torch.batch_norm and its aten overload
        names = ("input", *names[3:5], *names[1:3], *names[5:])
    given = {**dict(zip(names, call.args)), **call.kwargs}
    if not isinstance(value, Travelling) or given.get("training", False):
        return NotImplemented
    if given.get("running_mean") is None:
        return NotImplemented
    state = value.state()
    mean = call.on(state.mean)
    with apart():
        scale = (given["running_var"] + given.get("eps", 1e-5)).rsqrt()
        if given.get("weight") is not None:
            scale = scale * given["weight"]
        scale = scale.view(-1, *(1,) * (mean.ndim - 2))
    return Travelling.of(value.run, state.scaled(mean, scale))


@rule("group_norm")
def group_norm(call: Call) -> Any:
    """A layer norm over the channels of a group and all positions."""
    value, groups = call.first, call.argument(1, "num_groups")
    if not isinstance(value, Travelling):
        return NotImplemented
    weight, bias = call.argument(2, "weight"), call.argument(3, "bias")
    shape = value.shape
    flat: Any = value.reshape(shape[0], groups, -1)
    state = normed(flat.state(), value.run, (-1,), call.argument(4, "eps", 1e-5), True, None, None)
    result: Any = Travelling.of(value.run, state).reshape(shape)
    view = (1, -1, *(1,) * (len(shape) - 2))
    result = result if weight is None else result * weight.view(view)
    return result if bias is None else result + bias.view(view)


@rule("normalize")
def normalize(call: Call) -> Any:
    """Divided by the root of the sum of expected squares: a root-mean-square norm, scaled."""
    value = call.first
    power, dim = call.argument(1, "p", 2.0), call.argument(2, "dim", 1)
    if not isinstance(value, Travelling) or power != 2 or not isinstance(dim, int):
        return NotImplemented
    dim = dim if dim < 0 else dim - value.ndim
    state, count = value.state(), value.shape[dim]
    found = normed(state, value.run, (dim,), 0.0, False, None, None)
    found = found.scaled(found.mean / math.sqrt(count), 1 / math.sqrt(count))
    return Travelling.of(value.run, found)


@rule("glu")
def glu(call: Call) -> Any:
    one, other = call.first.chunk(2, call.argument(1, "dim", -1))
    return one * torch.sigmoid(other)


@rule("prelu")
def prelu(call: Call) -> Any:
    """The weight has one entry for each channel, or one for all."""
    value, weight = call.first, call.argument(1, "weight")
    if not isinstance(value, Travelling) or isinstance(weight, Travelling):
        return NotImplemented
    slope = weight.reshape(-1, *(1,) * (value.ndim - 2)) if weight.numel() > 1 else weight
    given: Any = value
    return torch.relu(given) - slope * torch.relu(-given)
