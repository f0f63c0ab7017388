"""`inference="moments"`: a pre-activation travels as mean and variance to the activation that follows.

A site returns a `Gaussian`, which torch functions take for a tensor. Elementwise functions are put
off; whatever else reads it gets the expectation. So `gelu(x)`, `x * sigmoid(1.702 * x)` and
`0.5 * x * (1 + tanh(...))` are one function of one Gaussian each, however they are written, and
`act(gate) * up` is a product of independent factors.

    E[f(u)],  u ~ N(mean, variance)                                   (Wan et al. 2013, section 3.2)

Linear operations make the expectation exact. Norms, attention and pooling see the mean, as in
`inference="mean"`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import elementwise, ops
from .scope import Deferred, settle

Apply = Callable[[Tensor], Tensor]


@dataclasses.dataclass(eq=False)
class Source:
    """The Gaussian that a site made: independent elements, and independent of every other source."""

    mean: Tensor
    variance: Tensor
    site: str
    draws: int | None
    """Z, if expectations are estimated by that many draws."""


def _same(u: Tensor) -> Tensor:
    return u


class Gaussian(Deferred):
    """`apply(u)` with `u` a Gaussian source: what the rest of a forward takes for a tensor."""

    def __init__(
        self,
        source: Source,
        apply: Apply = _same,
        normal: tuple[Tensor, Tensor] | None = None,
        closed: Callable[[], Tensor] | None = None,
        captures: bool = False,
    ) -> None:
        self.source = source
        self.apply = apply
        self.normal = normal
        """Mean and variance, while the value is Gaussian itself."""
        self.closed = closed
        """The expectation, if there is a better way to it than through `apply`."""
        self.captures = captures
        """Whether `apply` holds tensors of the shape of its argument, or looks at dimensions."""

    @classmethod
    def of(cls, mean: Tensor, variance: Tensor, site: str, draws: int | None) -> Gaussian:
        """A fresh Gaussian, independent of all others."""
        return cls(Source(mean, variance, site, draws), normal=(mean, variance))

    def expectation(self) -> Tensor:
        """The mean of the value; of what is no floating-point number, the value at the mean."""
        source = self.source
        if self.normal is not None:
            return self.normal[0]
        if source.draws is None and self.closed is not None:
            return self.closed()
        like = self.at_mean()
        if not like.is_floating_point():
            return like
        if source.draws is not None:
            return self._by_draws(source.draws).to(like.dtype)
        return ops.expectation(self.apply, source.mean, source.variance).to(like.dtype)

    def at_mean(self) -> Tensor:
        """The value at the mean of the source: a tensor of the same form."""
        return self.apply(self.source.mean) if self.normal is None else self.normal[0]

    def _by_draws(self, count: int) -> Tensor:
        mean, variance = self.source.mean, self.source.variance
        if not self.captures:
            return ops.expectation_by_draws(self.apply, mean, variance, count)
        total = self.apply(ops.gaussian_sample(mean, variance))
        for _ in range(count - 1):
            total = total + self.apply(ops.gaussian_sample(mean, variance))
        return total / count

    def become(self, value: Any) -> Gaussian:
        """Take another value, as functions that write into their argument do."""
        if not isinstance(value, Gaussian):
            source = self.source
            value = Gaussian.of(value, torch.zeros_like(value), source.site, source.draws)
        self.source, self.apply, self.normal = value.source, value.apply, value.normal
        self.closed, self.captures = value.closed, value.captures
        return self

    def __repr__(self) -> str:
        return f"Gaussian(site={self.source.site!r}, shape={tuple(self.shape)})"

    def __getattr__(self, name: str) -> Any:
        member = getattr(Tensor, name)
        if callable(member):
            return functools.partial(_call, member, self)
        if name in elementwise.VIEWS:
            return _view(lambda t: getattr(t, name), self)
        return getattr(self.at_mean(), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})


def _call(member: Any, *args: Any, **kwargs: Any) -> Any:
    return _dispatch(member, args, kwargs)


def _operator(name: str) -> Callable[..., Any]:
    member = getattr(Tensor, name)

    def operator(self: Gaussian, *args: Any) -> Any:
        return _dispatch(member, (self, *args), {})

    return operator


_OPERATORS = (
    "add radd sub rsub mul rmul truediv rtruediv pow rpow neg pos abs matmul rmatmul mod floordiv "
    "gt lt ge le eq ne and or xor rand ror rxor invert getitem setitem len bool float int iter contains"
)
for _name in _OPERATORS.split():
    setattr(Gaussian, f"__{_name}__", _operator(f"__{_name}__"))
for _name, _writer in {"iadd": "add_", "isub": "sub_", "imul": "mul_", "itruediv": "div_"}.items():
    setattr(Gaussian, f"__{_name}__", _operator(_writer))


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func` does to arguments among which are Gaussians."""
    if not args and "input" in kwargs:
        args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
    name = _name_of(func)
    values = [value for value in (*args, *kwargs.values()) if isinstance(value, Gaussian)]
    if not values or kwargs.get("out") is not None:  # inside a list, as `torch.cat` takes them
        return func(*settle(args), **settle(kwargs))
    if _writes(name, kwargs):
        return _in_place(func, name, args, kwargs)
    if args and isinstance(args[0], Gaussian):
        handler = _handler(name)
        if handler is not None:
            return handler(func, name, args[0], args, kwargs)
    if name in _ELEMENTWISE and not _leaves_domain(name, args):
        return _pointwise(func, name, values, args, kwargs)
    return func(*settle(args), **settle(kwargs))


_ELEMENTWISE = (
    elementwise.ADDS
    | elementwise.REVERSED
    | elementwise.SCALES
    | elementwise.POINTWISE
    | elementwise.COMPARISONS
    | elementwise.PARTIAL
)

_Handler = Callable[[Any, str, Gaussian, tuple[Any, ...], dict[str, Any]], Any]


def _handler(name: str) -> _Handler | None:
    """What is special about some functions of a Gaussian, their first argument."""
    if name in elementwise.QUERIES:
        return _query
    if name in elementwise.CASTS:
        return _cast
    if name in elementwise.VIEWS:
        return _rearrange
    if name in elementwise.JOINT:
        return _joint
    if name in elementwise.DROPOUTS:
        return _dropout
    return {"batch_norm": _batch_norm, "glu": _glu}.get(name)


def _name_of(func: Any) -> str:
    """`mul` of `torch.mul`, `Tensor.__rmul__` is `rmul`, `gelu` of `aten.gelu.default`."""
    schema = getattr(func, "_schema", None)
    name = str(func.__name__) if schema is None else str(schema.name).rpartition("::")[2]
    return name[2:-2] if name.startswith("__") else name


def _writes(name: str, kwargs: dict[str, Any]) -> bool:
    writer = name.endswith("_") and not name.startswith("_")
    return writer or name == "setitem" or kwargs.get("inplace") is True


def _in_place(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function that writes into its first argument."""
    target = args[0]
    pure = {k: v for k, v in kwargs.items() if k != "inplace"}
    twin = func if kwargs.get("inplace") is True else _twin(name)
    if isinstance(target, Gaussian):
        if twin is not None:
            return target.become(_dispatch(twin, args, pure))
        written = target.expectation().clone()
        func(written, *settle(args[1:]), **settle(kwargs))
        return target.become(written)
    value = _dispatch(twin, args, pure) if name in ("add_", "sub_") else None
    written = func(*settle(args), **settle(kwargs))
    if isinstance(value, Gaussian) and value.normal is not None:
        return Gaussian.of(written, value.normal[1], value.source.site, value.source.draws)
    return written


def _twin(name: str) -> Any:
    """The function that returns what `name` would write; None if there is none."""
    plain = name[:-1]
    return getattr(Tensor, plain, None) or getattr(torch.nn.functional, plain, None)


def _query(
    func: Any, name: str, value: Gaussian, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return func(value.at_mean(), *settle(args[1:]), **settle(kwargs))


def _dropout(
    func: Any, name: str, value: Gaussian, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Nothing in eval; `training` is the third argument, whose default is True."""
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return func(*settle(args), **settle(kwargs)) if training else value


def _cast(
    func: Any, name: str, value: Gaussian, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    rest, named = settle(args[1:]), settle(kwargs)

    def cast(tensor: Tensor) -> Tensor:
        result: Tensor = func(tensor, *rest, **named)
        return result

    return _mapped(value, cast, lambda mean, variance: (cast(mean), cast(variance)))


def _mapped(
    value: Gaussian, function: Apply, normal: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Gaussian:
    """The value after an affine function of it; `normal` says what becomes of mean and variance."""
    before, closed = value.apply, value.closed
    return Gaussian(
        value.source,
        lambda u: function(before(u)),
        None if value.normal is None else normal(*value.normal),
        None if closed is None else lambda: function(closed()),
        value.captures,
    )


def _rearrange(
    func: Any, name: str, value: Gaussian, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return _view(lambda t: func(t, *settle(args[1:]), **settle(kwargs)), value)


def _view(function: Callable[[Tensor], Any], value: Gaussian) -> Any:
    """A rearrangement: of a Gaussian, new ones; of a function of one, its expectation rearranged."""
    if value.normal is None:
        return function(value.expectation())
    source, (mean, variance) = value.source, value.normal
    means, variances = function(mean), function(variance)
    if isinstance(means, Tensor):
        return Gaussian.of(means, variances, source.site, source.draws)
    return tuple(
        Gaussian.of(one, other, source.site, source.draws) for one, other in zip(means, variances)
    )


_BATCH_NORM = (
    "input",
    "running_mean",
    "running_var",
    "weight",
    "bias",
    "training",
    "momentum",
    "eps",
)


def _batch_norm(
    func: Any, name: str, value: Gaussian, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """In eval, batch norm is affine in each channel; what it does to the variance is the square of
    what it does to a difference."""
    functional = torch.nn.functional.batch_norm
    names = _BATCH_NORM
    if func is not functional:  # torch.batch_norm and its aten overload
        names = ("input", *names[3:5], *names[1:3], *names[5:])
    options = {**dict(zip(names, args)), **kwargs}
    if options.get("training", False):
        return func(*settle(args), **settle(kwargs))
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


def _glu(
    func: Any, name: str, value: Gaussian, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
    one, other = _view(lambda t: t.chunk(2, dim), value)
    return one * torch.sigmoid(other)


def _joint(
    func: Any, name: str, value: Gaussian, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if value.source.draws is None:
        if value.normal is None:
            return func(*settle(args), **settle(kwargs))
        raise RuntimeError(
            f"{value.source.site}: inference='moments' needs an elementwise activation after it, and "
            f"found {name.strip('_')}. Give samples=Z to estimate it by draws, or give this site "
            "inference='mean'"
        )
    before, rest, named = value.apply, settle(args[1:]), settle(kwargs)
    # Draws one at a time, since the function may look along the first dimension.
    return Gaussian(value.source, lambda u: func(before(u), *rest, **named), captures=True)


def _leaves_domain(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a function that is not defined on the whole line, or has a pole, is applied to a
    Gaussian itself: then there is no expectation."""
    if name in elementwise.PARTIAL:
        reached = args[:1]
    elif "div" in name:
        reached = args[1:]
    elif name == "pow":
        whole = isinstance(args[1], (int, float)) and args[1] >= 0 and args[1] == int(args[1])
        reached = () if whole else args[:1]
    else:
        return False
    return any(isinstance(one, Gaussian) and one.normal is not None for one in reached)


def _pointwise(
    func: Any, name: str, values: list[Gaussian], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if any(value.source is not values[0].source for value in values):
        return _independent(func, name, values, args, kwargs)
    value = values[0]

    def function(u: Tensor) -> Tensor:
        given = [arg.apply(u) if isinstance(arg, Gaussian) else arg for arg in args]
        named = {k: v.apply(u) if isinstance(v, Gaussian) else v for k, v in kwargs.items()}
        result: Tensor = func(*given, **named)
        return result

    others = (*args, *kwargs.values())
    captures = any(one.captures for one in values)
    captures = captures or any(isinstance(other, Tensor) and other.ndim > 0 for other in others)
    normal = _affine(func, name, args, kwargs)
    closed = _closed(func, name, args, kwargs) if len(values) == 1 else None
    return Gaussian(value.source, function, normal, closed, captures)


def _affine(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """Mean and variance after a shift or a scaling of one Gaussian; None after anything else."""
    if kwargs or not _is_linear(name, args):
        return None
    value = next(arg for arg in args if isinstance(arg, Gaussian))
    if value.normal is None:
        return None
    mean, variance = value.normal
    moved: Tensor = func(*(mean if arg is value else arg for arg in args))
    if name in elementwise.SCALES:
        scale = func(*(torch.ones_like(mean) if arg is value else arg for arg in args))
        return moved, variance * scale * scale
    return moved, variance.expand_as(moved)


def _is_linear(name: str, args: tuple[Any, ...]) -> bool:
    """Whether the result is affine in the one Gaussian among the arguments."""
    places = [i for i, arg in enumerate(args) if isinstance(arg, Gaussian)]
    if len(places) != 1:
        return False
    if name in elementwise.SCALES:
        return "div" not in name or places == [0]
    return name in elementwise.ADDS or name in elementwise.REVERSED


def _closed(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], Tensor] | None:
    """The expectation of a function of one value, without composing it: of an activation right after
    a Gaussian, some of which have a closed form, and of what is linear in that."""
    value = next((arg for arg in args if isinstance(arg, Gaussian)), None)
    if value is None or name in elementwise.COMPARISONS:
        return None
    before = value.closed
    if before is not None and not kwargs and _is_linear(name, args):
        return lambda: func(*(before() if arg is value else arg for arg in args))
    if value.normal is None:
        return None
    mean, variance = value.normal

    def activation(t: Tensor) -> Tensor:
        result: Tensor = func(*(t if arg is value else arg for arg in args), **kwargs)
        return result

    tanh = kwargs.get("approximate") == "tanh"  # the other GELU
    mean, variance = torch.broadcast_tensors(mean, variance)  # type: ignore[no-untyped-call]
    return lambda: ops.expectation(
        activation, mean, variance, None if tanh else elementwise.CLOSED.get(name)
    )


def _independent(
    func: Any, name: str, values: list[Gaussian], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A function of values of several sources. Sums of Gaussians are Gaussian; the expectation of
    another sum or of a product is that of the expectations."""
    normals = [value.normal for value in values if value.normal is not None]
    result = func(*settle(args), **settle(kwargs))
    if name not in elementwise.ADDS or kwargs or len(args) != 2 or len(normals) != 2:
        return result
    variance = normals[0][1] + normals[1][1]
    source = values[0].source
    site = f"{source.site} and {values[1].source.site}"
    return Gaussian.of(result, variance, site, source.draws)
