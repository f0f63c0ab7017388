"""What torch functions make of a `Gaussian`.

Every handler has the arguments `(call, value)`: the call, and the Gaussian that is its first argument.
It returns a Gaussian where it can, and otherwise what the function makes of the expectation.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base.torch_names import canonical, of_two, spelling, twin_of, writes
from . import torch_functions as table
from .gaussian import Apply, Gaussian, Source
from .pointwise import Call, leaves_domain, pointwise
from .scope import settle


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func` does to arguments among which are Gaussians.

    Returns:
        a Gaussian, or what the function returns for tensors.

    Raises:
        RuntimeError: a value that is read was written to through a view.
    """
    if not args and "input" in kwargs:
        args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
    spelled = spelling(func)
    name = of_two(canonical(spelled), args)
    call = Call(func, name, args, kwargs)
    if name in table.JOINING and kwargs.get("out") is None:
        return _joined(call)
    if not call.gaussians() or kwargs.get("out") is not None:  # inside a list
        return call.settled()
    if writes(spelled) or kwargs.get("inplace") is True:
        return _in_place(call, spelled)
    if args and isinstance(args[0], Gaussian):
        handler = _handler(name)
        if handler is not None:
            return handler(call, args[0])
    if name in table.ELEMENTWISE and not leaves_domain(name, args):
        return pointwise(call)
    return call.settled()


def _joined(call: Call) -> Any:
    """`torch.cat` and `torch.stack`: means and variances are joined, and a plain tensor has variance 0.

    Entries of the result may depend on each other, if they are parts of one pre-activation. This is
    forgotten here: `parents` only tells from which pre-activations the result is not independent.
    """
    func, args, kwargs = call.func, call.args, call.kwargs
    parts = kwargs.get("tensors", args[0] if args else ())
    gaussians = [part for part in parts if isinstance(part, Gaussian)]
    if any(part.normal is None for part in gaussians):
        return call.settled()
    rest = {k: v for k, v in kwargs.items() if k != "tensors"}
    means = func([settle(part) for part in parts], *args[1:], **rest)
    variances = func([_variance(part) for part in parts], *args[1:], **rest)
    source = gaussians[0].source
    parents = tuple(part.source for part in gaussians)
    whole = Source(means, variances, source.site, source.draws, None, True, parents=parents)
    return Gaussian.of(whole)


def _variance(part: Any) -> Tensor:
    if isinstance(part, Gaussian):
        assert part.normal is not None
        return part.normal[1]
    return torch.zeros_like(part)


_Handler = Callable[[Call, Gaussian], Any]


def _handler(name: str) -> _Handler | None:
    """How a function is handled that does something special to its first argument; None for others."""
    if name in table.QUERIES:
        return _query
    if name in table.PASSING:
        return _cast
    if name in table.VIEWS:
        return _rearrange
    if name in table.JOINT:
        return _whole
    if name in table.DROPOUTS:
        return _dropout
    return _SPECIAL.get(name)


def _in_place(call: Call, spelled: str) -> Any:
    """What a function does that writes into its first argument; returns that argument.

    A Gaussian takes the value that the function's twin, which does not write, returns. A plain tensor
    to which a Gaussian is added becomes a Gaussian.
    """
    func, args, kwargs = call.func, call.args, call.kwargs
    target = args[0]
    pure = {k: v for k, v in kwargs.items() if k != "inplace"}
    twin = func if kwargs.get("inplace") is True else twin_of(spelled)
    if isinstance(target, Gaussian):
        if spelled == "requires_grad_" and not kwargs.get("requires_grad", (*args, True)[1]):
            return target  # what was made without a gradient has none
        if twin is not None:
            return target.become(dispatch(twin, args, pure))
        written = target.expectation().clone()
        func(written, *settle(args[1:]), **settle(kwargs))
        return target.become(written)
    value = dispatch(twin, args, pure) if canonical(spelled) in table.ADDS else None
    written = call.settled()
    if isinstance(value, Gaussian) and value.normal is not None:
        source = value.source
        moments = written, value.normal[1]
        return Gaussian.of(Source(*moments, source.site, source.draws, parents=(source,)))
    return written


def _query(call: Call, value: Gaussian) -> Any:
    return call.of_first()(value.at_mean())


def _dropout(call: Call, value: Gaussian) -> Any:
    """In evaluation mode, the value as it is; `training` is the third argument, by default True."""
    args, kwargs = call.args, call.kwargs
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return call.settled() if training else value


def _cast(call: Call, value: Gaussian) -> Any:
    cast = call.of_first()
    if not torch.compiler.is_compiling():
        like = value.at_mean()
        if cast(like) is like:  # a function may return its argument: `contiguous`, `to`
            return value
    return _mapped(value, cast, lambda mean, variance: (cast(mean), cast(variance)))


def _mapped(
    value: Gaussian, function: Apply, normal: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Gaussian:
    """The value after a function that is affine in each entry.

    Args:
        function: of a tensor of the form of the value.
        normal: what becomes of mean and variance.
    """
    before = value.apply
    return Gaussian(
        value.source,
        lambda u: function(before(u)),
        None if value.normal is None else normal(*value.normal),
        value.captures,
    )


def _rearrange(call: Call, value: Gaussian) -> Any:
    key = (call.name, settle(call.args[1:]), tuple(settle(call.kwargs).items()))
    return value.rearranged(call.of_first(), key)


_BATCH_NORM = tuple(inspect.signature(torch.nn.functional.batch_norm).parameters)


def _batch_norm(call: Call, value: Gaussian) -> Any:
    """In evaluation mode, batch norm is affine in each channel. The factor of a channel is what it
    makes of 1 with a running mean of 0 and without bias; the variance is multiplied by its
    square."""
    functional = torch.nn.functional.batch_norm
    names = _BATCH_NORM
    if call.func is not functional:  # torch.batch_norm and its aten overload
        names = ("input", *names[3:5], *names[1:3], *names[5:])
    options = {**dict(zip(names, call.args)), **call.kwargs}
    if options.get("training", False):
        return call.settled()
    del options["input"]

    def normalise(tensor: Tensor) -> Tensor:
        return functional(tensor, **{k: v for k, v in options.items() if k in _BATCH_NORM})

    def moments(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        zero = torch.zeros_like(options["running_mean"])
        scale = functional(
            torch.ones_like(mean), zero, options["running_var"], options.get("weight"),
            eps=options.get("eps", 1e-5),
        )  # fmt: skip
        return normalise(mean), variance * scale**2

    return _mapped(value, normalise, moments)


def _glu(call: Call, value: Gaussian) -> Any:
    dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else -1)
    one, other = value.rearranged(lambda t: t.chunk(2, dim), ("chunk", (2, dim), ()))
    return one * torch.sigmoid(other)


def _prelu(call: Call, value: Gaussian) -> Any:
    """The weight has one entry for each channel, which is dimension 1 of the value; it is reshaped so
    that it broadcasts."""
    weight = call.args[1] if len(call.args) > 1 else call.kwargs["weight"]
    slope = weight.reshape(-1, *(1,) * (value.dim() - 2)) if weight.numel() > 1 else weight

    def leaky(t: Tensor, slope: Tensor) -> Tensor:
        return torch.where(t > 0, t, slope * t)

    return pointwise(Call(leaky, "leaky_relu", (value, slope), {}))


def _whole(call: Call, value: Gaussian) -> Any:
    """A function that needs all entries together (softmax, layer norm): it is applied to each draw."""
    before, function = value.apply, call.of_first()
    source = dataclasses.replace(value.source, points=None)  # points are values of one entry alone
    # `captures` makes draws come one at a time: stacked along the first dimension, as they are
    # otherwise, they would be mixed by a function that looks along it.
    return Gaussian(source, lambda u: function(before(u)), captures=True)


def _iterate(call: Call, value: Gaussian) -> Any:
    return iter(value.rearranged(lambda t: t.unbind(0), ("unbind", (0,), ())))


_SPECIAL: dict[str, _Handler] = {
    "iter": _iterate,
    "batch_norm": _batch_norm,
    "glu": _glu,
    "layer_norm": _whole,
    "prelu": _prelu,
    "rms_norm": _whole,
}


Gaussian.dispatch = staticmethod(dispatch)
