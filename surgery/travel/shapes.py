"""Functions that move entries, copy them or join them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..moments.scope import hashable
from ..moments.torch_functions import ALIASING, CASTING, COPYING, DROPOUTS, VIEWS
from ..torch_private.tensors import memory_of
from ..torch_private.tracing import is_traced
from .birth import Diagonal, OfOutputs, root
from .call import RULES, Call, rule
from .numbers import Numbers
from .run import Run
from .state import State, aligned, apart, certain, wide
from .value import Apply, Travelling


def state_of(value: Any) -> State:
    """The state of a travelling value; that of a tensor, which does not vary."""
    return value.state() if isinstance(value, Travelling) else certain(value)


@rule(*VIEWS, "view_copy", "unfold", "expand_copy", "tril", "triu", "diagonal", "pad")
def view(call: Call) -> Any:
    """Every entry elsewhere, or several times. `unfold` of a tensor; `pad` by constants."""
    if call.name in AS_ANOTHER:
        function, first = AS_ANOTHER[call.name], call.first
        shape = (first, tuple(call.argument(1, "other").shape))
        return (
            view(Call.of(function, shape, {}))
            if isinstance(first, Travelling)
            else function(*shape)
        )
    if not isinstance(call.first, Travelling) or len(call.values) > 1:
        return NotImplemented
    if call.name == "pad" and call.argument(3, "value"):
        return NotImplemented
    value, state, function = call.first, call.first.state(), _taking(call)
    key = hashable((call.name, *call.args[1:], *call.kwargs.items()))
    found = None if key is None else state.views.get(key)
    if found is None:
        found = _moved(state, function)
        if key is not None:
            state.views[key] = found
    if isinstance(found, State):
        return _taken(value, state, found, call.name, function)
    return tuple(
        _taken(value, state, part, call.name, partial(_part, function, index))
        for index, part in enumerate(found)
    )


def _taking(call: Call) -> Apply:
    """The function of its first argument. A value has no strides, and its mean may have others than the
    model's tensor: what is contiguous there has a view of any shape."""
    sizes = call.args[1:] or (call.kwargs.get("size"),)
    if call.name not in ("view", "unsafe_view") or isinstance(sizes[0], torch.dtype):
        return call.of_first()
    return lambda t: t.reshape(*sizes)


AS_ANOTHER: dict[str, Any] = {
    "expand_as": Tensor.expand,
    "reshape_as": Tensor.reshape,
    "view_as": Tensor.view,
}
"""Views that read the shape of another tensor, which may vary."""


def _moved(state: State, function: Apply) -> State | list[State]:
    """The state after a view, or those of its parts."""
    if isinstance(function(state.mean), Tensor):
        return state.moved(function)
    count = len(function(state.mean))
    return [state.moved(partial(_part, function, index)) for index in range(count)]


def _part(function: Apply, index: int, t: Tensor) -> Tensor:
    return function(t)[index]


def _taken(value: Travelling, state: State, found: State, name: str, view: Apply) -> Travelling:
    """What a function took of a value: a view of it if it is one of its mean."""
    if name in ALIASING and not is_traced() and memory_of(found.mean) == memory_of(state.mean):
        return value.viewed(found, view)
    return Travelling.of(value.run, found)


@rule("iter")
def iterate(call: Call) -> Any:
    """Along the first dimension."""
    return iter(view(Call.of(torch.unbind, (call.first, 0), {})))


@rule(*COPYING)
def copied(call: Call) -> Any:
    """The value itself: it is never written to, but becomes another."""
    value = call.first
    if call.name == "requires_grad" or not isinstance(value, Travelling):
        return value
    if call.name == "contiguous" and value.base is not None:
        return value if value.state().mean.is_contiguous() else value.copied()
    if call.name in ("clone", "detach_copy", "lift_fresh_copy"):
        return Travelling.later(value, value, value.apply, value.moments, value.is_linear)
    return value


@rule(*CASTING)
def cast(call: Call) -> Any:
    """In another dtype or on another device."""
    value = call.first
    if not isinstance(value, Travelling):  # but what it is cast like
        return call.settled()
    if not value.dtype.is_floating_point:  # of a comparison
        return RULES["elementwise"](call)
    state = value.state()
    mean = call.on(state.mean)
    if not mean.dtype.is_floating_point:
        return NotImplemented
    if mean is state.mean:
        return value
    dtype = wide(mean.dtype)
    variance = state.variance.to(device=mean.device, dtype=dtype)
    factors = state.factors
    if factors is not None:
        factors = factors.to(device=mean.device, dtype=mean.dtype)
    return Travelling.of(value.run, State(mean, variance, factors))


@rule("cat", "stack")
def joined(call: Call) -> Any:
    """Values side by side."""
    given = call.argument(0, "tensors")
    if call.name == "cat":  # torch leaves out empty vectors too: caches begin with one
        given = [one for one in given if one.ndim != 1 or one.numel()] or given
    parts = [state_of(part) for part in given]
    rest, named = call.args[1:], {k: v for k, v in call.kwargs.items() if k != "tensors"}
    dim = rest[0] if rest else named.get("dim", 0)

    def join(tensors: list[Tensor]) -> Tensor:
        joined: Tensor = call.func(tensors, *rest, **named)
        return joined

    mean = join([part.mean for part in parts])
    variance = join([part.variance for part in parts]).to(wide(mean.dtype))
    counts = [0 if part.factors is None else len(part.factors) for part in parts]
    factors = None
    if any(counts):
        columns = max(counts)
        padded = []
        for part in parts:
            own = part.mean.new_zeros(columns, *part.mean.shape)
            if part.factors is not None:
                own[: len(part.factors)] = part.factors
            padded.append(own)
        factors = call.func(padded, dim=dim + 1 if dim >= 0 else dim)
    return Travelling.of(call.run, State(mean, variance, factors))


@rule("setitem")
def put(call: Call) -> Any:
    """`x[index] = y`, where x or y travels; into a plain tensor only the mean can be written."""
    target, index, given = call.args
    if not isinstance(target, Travelling):
        call.run.settles("setitem")
        return call.settled()
    state, other = target.state(), state_of(given) if isinstance(given, Tensor) else None
    mean, variance = state.mean.clone(), state.variance.clone()
    mean[index] = given if other is None else other.mean
    variance[index] = 0 if other is None else other.variance
    factors = None if state.factors is None else state.factors.clone()
    source = None if other is None else other.factors
    if factors is None and source is not None:
        factors = mean.new_zeros(len(source), *mean.shape).detach()
    if factors is not None:
        where = (slice(None), *(index if isinstance(index, tuple) else (index,)))
        factors[where] = 0
        if source is not None:
            if len(source) > len(factors):
                more = factors.new_zeros(len(source) - len(factors), *factors.shape[1:])
                factors = torch.cat([factors, more])
            factors[(slice(0, len(source)), *where[1:])] = (
                aligned(source, other.mean.ndim) if other else 0
            )
    return target.become(Travelling.of(target.run, State(mean, variance, factors)))


@rule(*DROPOUTS)
def dropout(call: Call) -> Any:
    """In evaluation the identity. Where the run lets dropouts drop, every entry is 0 with
    probability p and else divided by 1 - p; dropout of whole channels has one number for each
    channel."""
    value, run = call.first, call.run
    p = call.argument(1, "p", 0.5)
    if not isinstance(value, Travelling):
        return NotImplemented
    if not run.dropout or p == 0:
        return value
    if p == 1 or call.name.endswith("alpha_dropout") or call.name == "feature_dropout":
        return NotImplemented
    state = value.state()
    with apart():
        fresh = (state.at.square() + state.variance) * (p / (1 - p))
    ratio = p / (1 - p)

    def draws(count: int, numbers: Numbers) -> Tensor:
        masks = numbers.masks((count, *state.mean.shape), ratio, state.variance)
        inputs = torch.stack([state.draw(draw) for draw in range(count)])
        return masks * inputs * math.sqrt(ratio)

    if call.name == "dropout" or state.mean.ndim < 3:
        return Travelling.of(run, run.born(state, Diagonal(fresh, draws)))
    channel, columns = 1 - state.mean.ndim, run.draws(state)
    if columns is not None:
        columns = columns * math.sqrt(ratio)
    birth = OfOutputs(root(fresh, state.at), (channel,), ratio, columns=columns)
    return Travelling.of(run, run.born(state, birth))


def dropped_inside(run: Run, value: Any, p: float) -> Any:
    """A value after a dropout that a function has inside of it, as attention and RNNs do."""
    return F.dropout(Travelling.made_of(run, value), p) if run.dropout and p else value  # type: ignore[arg-type]
