"""What a kind of module is, and which kind a module has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..base.caching import PerObject, cached
from ..ops import Layout
from ..spec.config import Unit
from .product import Product


@dataclass(frozen=True)
class Axes:
    """What the dimensions of a parameter mean, once it is viewed with shape `view`. The weight of a
    Linear, of shape (outputs, inputs), has the input along dimension 1 and the output along 0."""

    view: tuple[int, ...]
    """A shape with as many entries as the parameter has."""
    input: tuple[int, ...]
    """Dimensions along which the input feature varies; () for a bias, the weight of a constant 1."""
    output: tuple[int, ...]
    """Dimensions along which the pre-activation varies."""


AxesOf = Callable[[nn.Module, str, Tensor], "Axes | None"]
"""From (module, plain name of a parameter of it, the parameter)."""

ReadsOf = Callable[[type[nn.Module], nn.Module], "Sequence[str] | None"]
"""From (plain class of a module, the module)."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How one family of module classes is operated on. Register with `register_kind`."""

    name: str
    """Shown in plans."""

    classes: tuple[type[nn.Module], ...]
    """Of this kind are these classes and their subclasses, if no later kind has them."""

    weights: Callable[[nn.Module], Sequence[str]]
    """Names, relative to the module, of the parameters that a target naming the module means."""

    axes: AxesOf
    """Meaning of the dimensions of a parameter; None if unknown (then only the units `element` and
    `tensor` can be used)."""

    bias: Callable[[str], str | None]
    """From the name of a weight, that of the bias that goes with it, or None."""

    refuse: Callable[[nn.Module, str], str | None] = lambda module, name: None
    """From (module, plain name of a parameter): why it cannot be operated on, and what to do; or
    None."""

    product: Callable[[type[nn.Module]], Product | None] = lambda cls: None
    """How the forward of a plain class computes its pre-activation from `weight` and `bias`; None if
    it is no product of input and weight, or its forward is not known. Per-example masks, Gaussian
    noise and moments need it."""

    reads: ReadsOf = lambda cls, module: None
    """Names, relative to the module, of the parameters that its own forward reads: also those of
    children (`out_proj.weight`), but not what these read when they are called. They need not exist.
    None if that is not known: then the source of the forward tells."""

    rests: Callable[[type[nn.Module]], Sequence[str]] = lambda cls: ()
    """If the forward of a plain class reads none of `reads` while the module is training: the methods
    by which it calls its children then. They may be replaced by others that do read."""

    varies: Callable[[type[nn.Module], str], bool] = lambda cls, name: False
    """From (plain class of a module, name of a parameter relative to it, as in `reads`): whether
    moments travel through the functions that its forward gives the parameter to, though it is no
    product."""

    linear: bool = False
    """Whether the target `"all-linear"` takes it."""

    def layout(self, module: nn.Module, name: str, weight: Tensor, unit: Unit) -> Layout | None:
        """Which entries of a parameter share a mask entry; None if the unit has no meaning for it: one
        that `needs_axes`, where these are unknown.

        Args:
            module: of this kind, the owner of the parameter.
            name: plain name of the parameter in the module.
            weight: the parameter, of any shape.
            unit: of the config.
        """
        if unit == "element":
            return _elements(weight.numel())
        if unit == "tensor":
            return Layout.shared(tuple(weight.shape), ())
        axes = self.axes(module, name, weight)
        if axes is None:
            return None
        return Layout.shared(axes.view, axes.input if unit == "input" else axes.output)

    def but(self, **changes: Any) -> Kind:
        """A kind like this one, with some fields changed."""
        return dataclasses.replace(self, **changes)


OTHER = Kind(
    name="other",
    classes=(nn.Module,),
    weights=lambda module: (),
    axes=lambda module, name, weight: None,
    bias=lambda name: None,
)
"""Any other module: parameters only if named, masks by element or as a whole."""


_kinds: list[Kind] = []


def register_kind(kind: Kind) -> None:
    """Add a kind. Kinds registered later are asked first, so a subclass can have its own."""
    _kinds.insert(0, kind)
    _kind_of_class.clear()


_kind_of_class: PerObject[type[nn.Module], Kind | None] = PerObject()
"""What was found before; None for a class that no kind was registered for."""


def kind_of(module: nn.Module) -> Kind:
    """The kind of a module; `OTHER` if none was registered for its class."""
    return kind_of_class(type(module))


def kind_of_class(cls: type[nn.Module]) -> Kind:
    """The same for a class, plain or not."""
    return _kind_of_class.get(cls, _registered) or OTHER


def _registered(cls: type[nn.Module]) -> Kind | None:
    return next((kind for kind in _kinds if issubclass(cls, kind.classes)), None)


@cached
def _elements(numel: int) -> Layout:
    """Weights of one size share it."""
    return Layout.elements(numel)


def needs_axes(unit: Unit) -> bool:
    """Whether the unit depends on what the dimensions of a parameter mean."""
    return unit in ("input", "output")


def follows_weight(unit: Unit) -> bool:
    """Whether a bias takes the mask of its weight: a dropped row drops its bias too."""
    return unit in ("output", "tensor")


def reads_of(*known: type[nn.Module], names: Sequence[str]) -> ReadsOf:
    """For `Kind.reads`: `names` for the classes that `computes_as` takes."""
    knows = computes_as(*known)
    return lambda cls, module: names if knows(cls) else None


def calls_by(known: type[nn.Module], methods: Sequence[str]) -> Callable[..., Sequence[str]]:
    """For `Kind.rests`: `methods` for the classes that `computes_as` takes, while these have the
    methods that `known` has now."""
    knows, own = computes_as(known), [getattr(known, name) for name in methods]

    def of(cls: type[nn.Module]) -> Sequence[str]:
        return methods if knows(cls) and [getattr(cls, name) for name in methods] == own else ()

    return of


def computes_as(*known: type[nn.Module]) -> Callable[[type[nn.Module]], bool]:
    """Whether a class is one in `known`, while that has the forward that it has now, or a subclass that
    adds nothing which its forward could use: no methods or properties but `__init__`."""
    forwards = [(one, one.forward) for one in known]

    def knows(cls: type[nn.Module]) -> bool:
        return any(
            cls.forward is forward and issubclass(cls, one) and not _adds_to(cls, one)
            for one, forward in forwards
        )

    return knows


def varies_in(*known: type[nn.Module], names: Callable[[str], bool]) -> Callable[..., bool]:
    """For `Kind.varies`: parameters with these names, of classes whose forward is that of one in
    `known`."""
    forwards = [one.forward for one in known]

    def of(cls: type[nn.Module], name: str) -> bool:
        return names(name) and any(cls.forward is forward for forward in forwards)

    return of


def _adds_to(cls: type, known: type) -> bool:
    """Whether a class, or one between it and `known`, has methods or properties of its own."""
    between = cls.__mro__[: cls.__mro__.index(known)]
    own = (item for one in between for item in vars(one).items())
    return any(name != "__init__" and hasattr(type(value), "__get__") for name, value in own)
