"""Pooling by maxima."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Call, rule
from .pairs import larger_of
from .state import State, apart
from .value import Travelling

_MAXIMA = tuple(f"max_pool{n}d" for n in (1, 2, 3))


@rule(*_MAXIMA, *(f"{name}_with_indices" for name in _MAXIMA))
def max_pool(call: Call) -> Any:
    """The largest of the entries of a window, two by two (Clark 1961). A rising function of the largest
    is the largest of the function: ReLU and its like come after, since what they make of a Gaussian
    is none."""
    value = call.first
    if not isinstance(value, Travelling) or call.argument(6, "return_indices", False):
        return NotImplemented
    if value.under is not None:
        activation, before = value.under
        return activation(max_pool(Call.of(call.func, (before, *call.args[1:]), call.kwargs)))
    spatial = int(call.name.removesuffix("_with_indices")[-2])
    if call.argument(5, "ceil_mode", False) or value.ndim != spatial + 2:
        return NotImplemented

    def sizes(given: Any) -> tuple[int, ...]:
        return (given,) * spatial if isinstance(given, int) else tuple(given)

    kernel = sizes(call.argument(1, "kernel_size"))
    stride = sizes(call.argument(2, "stride") or kernel)
    padding, dilation = (
        sizes(call.argument(3, "padding", 0)),
        sizes(call.argument(4, "dilation", 1)),
    )
    state = value.state()
    if any(padding):
        width = [size for one in reversed(padding) for size in (one, one)]
        padded = state.moved(lambda t: F.pad(t, width))
        with apart():  # below all others, and no larger than needed: it is squared
            low = state.at.min() - 10 * state.variance.max().sqrt() - 1
            outside = F.pad(torch.zeros_like(state.at), width, value=1.0) * low
        mean = padded.mean + outside.to(padded.mean.dtype)
        state = State(mean, padded.variance, padded.factors)
    windows = _windows(state, kernel, stride, dilation)
    while len(windows) > 1:
        pairs = zip(windows[::2], windows[1::2])
        rest = windows[-1:] if len(windows) % 2 else []
        windows = [larger_of(one, other, value.run) for one, other in pairs] + rest
    return Travelling.of(value.run, windows[0])


def _windows(
    state: State, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> list[State]:
    """For each place in the kernel, the entries that lie there in all windows."""
    shape = state.mean.shape[-len(kernel) :]
    counts = [
        (size - step * (width - 1) - 1) // hop + 1
        for size, width, hop, step in zip(shape, kernel, stride, dilation)
    ]
    found = []
    for place in (
        torch.cartesian_prod(*(torch.arange(width) for width in kernel))
        .reshape(-1, len(kernel))
        .tolist()
    ):
        index = tuple(
            slice(at * step, at * step + (count - 1) * hop + 1, hop)
            for at, step, hop, count in zip(place, dilation, stride, counts)
        )
        found.append(state.moved(partial(_at, (..., *index))))
    return found


def _at(index: Any, t: Tensor) -> Tensor:
    return t[index]
