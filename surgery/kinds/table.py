"""The kinds of module: which weights DropConnect takes by default, and what their dimensions mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..base.caching import PerObject, cached
from ..ops import Layout
from ..spec.config import Unit
from .product import LINEAR_PRODUCT, Product, conv_product


@dataclass(frozen=True)
class Axes:
    """The meaning of a weight's dimensions, after viewing it with shape `view`."""

    view: tuple[int, ...]
    input: tuple[int, ...]
    """Dimensions along which the input feature varies; () for a bias, the weight of a constant 1."""
    output: tuple[int, ...]
    """Dimensions along which the pre-activation varies."""


AxesOf = Callable[[nn.Module, str, Tensor], "Axes | None"]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How one family of module classes is operated on. Register with `register_kind`."""

    name: str
    """Shown in plans."""

    classes: tuple[type[nn.Module], ...]

    weights: Callable[[nn.Module], Sequence[str]]
    """Names, relative to the module, of the parameters that a target naming the module means."""

    axes: AxesOf
    """Meaning of the dimensions of a parameter; None if unknown (then only the units `element` and
    `tensor` can be used)."""

    bias: Callable[[str], str | None]
    """Name of the bias that goes with a weight, or None."""

    refuse: Callable[[nn.Module, str], str | None] = lambda module, name: None
    """Why this parameter of this module cannot be operated on and what to do, or None."""

    product: Callable[[type[nn.Module]], Product | None] = lambda cls: None
    """How the forward of a plain class computes its pre-activation from `weight` and `bias`; None if
    it is no product of input and weight, or its forward is not known. Per-example masks, Gaussian
    noise and moments need it."""

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


_kinds: list[Kind] = []


def register_kind(kind: Kind) -> None:
    """Add a kind. Kinds registered later are asked first, so a subclass can have its own."""
    _kinds.insert(0, kind)
    _kind_of_class.clear()


_kind_of_class: PerObject[type[nn.Module], Kind | None] = PerObject()
"""What was found before; None for a class that no kind was registered for."""

_kind_of_one: WeakKeyDictionary[nn.Module, Kind] = WeakKeyDictionary()


def set_kind(module: nn.Module, kind: Kind) -> None:
    """Say the kind of one module object whose class does not tell it: whose parameters are read by
    the nodes of a graph. The kind must not refer to the module."""
    _kind_of_one[module] = kind


def kind_of(module: nn.Module) -> Kind:
    """The kind of a module; `OTHER` if none was registered for its class."""
    return _kind_of_class.get(type(module), _registered) or _kind_of_one.get(module, OTHER)


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


def product_of(*known: type[nn.Module], product: Product) -> Callable[..., Product | None]:
    """For `Kind.product`: `product` for classes whose forward is that of a class in `known`."""

    def of(cls: type[nn.Module]) -> Product | None:
        same = cls in known or any(cls.forward is one.forward for one in known)
        return product if same else None

    return of


def _conv_product_of(cls: type[nn.Module]) -> Product | None:
    for spatial, conv in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), start=1):
        if cls.forward is conv.forward:
            return conv_product(spatial)
    return None


def _weight(module: nn.Module) -> Sequence[str]:
    return ("weight",)


def _bias(name: str) -> str | None:
    """`bias_hh_l0` of `weight_hh_l0`, `in_proj_bias` of `in_proj_weight`."""
    return name.replace("weight", "bias") if "weight" in name else None


def rows(name: str, weight: Tensor) -> Axes | None:
    """A matrix with outputs along rows, or a vector of outputs."""
    if weight.ndim == 1:
        return Axes(tuple(weight.shape), input=(), output=(0,))
    return Axes(tuple(weight.shape), input=(1,), output=(0,)) if weight.ndim == 2 else None


def _matrix(module: nn.Module, name: str, weight: Tensor) -> Axes | None:
    return rows(name, weight)


def columns(module: nn.Module, name: str, weight: Tensor) -> Axes | None:
    """A matrix with inputs along rows (Embedding: a word is an input; transformers' Conv1D)."""
    if weight.ndim != 2:
        return rows(name, weight)
    return Axes(tuple(weight.shape), input=(0,), output=(1,))


def conv_axes(weight: Tensor, groups: int, transposed: bool) -> Axes:
    """Of a filter bank, viewed as (group, output in group, input in group, kernel)."""
    first, second = weight.shape[:2]
    kernel = weight.numel() // max(first * second, 1)
    view = (groups, first // groups, second, kernel)
    if transposed:
        return Axes(view, input=(0, 1), output=(0, 2))
    return Axes(view, input=(0, 2), output=(0, 1))


def _conv(module: nn.Module, name: str, weight: Tensor) -> Axes | None:
    if weight.ndim == 1:
        return rows(name, weight)
    groups = module.groups
    assert isinstance(groups, int)
    return conv_axes(weight, groups, bool(getattr(module, "transposed", False)))


def _attention(module: nn.Module, name: str, weight: Tensor) -> Axes | None:
    """The packed projection is three matrices on top of each other: query, key and value."""
    if not name.startswith("in_proj_"):
        return rows(name, weight)
    if weight.ndim == 1:
        return Axes((3, weight.shape[0] // 3), input=(0,), output=(0, 1))
    return Axes((3, weight.shape[0] // 3, weight.shape[1]), input=(0, 2), output=(0, 1))


SEPARATE_PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
"""The parameters of a MultiheadAttention whose keys or values have another width."""


def _attention_weights(module: nn.Module) -> Sequence[str]:
    packed = getattr(module, "_qkv_same_embed_dim", True)
    return (*(("in_proj_weight",) if packed else SEPARATE_PROJECTIONS), "out_proj.weight")


def _attention_bias(name: str) -> str | None:
    """The separate projections share one packed bias, which goes with none of them alone."""
    return _bias(name) if name == "in_proj_weight" else None


def _recurrent_weights(module: nn.Module) -> Sequence[str]:
    """The AWD-LSTM convention: hidden to hidden, every layer and direction; also those that are no
    parameters any more (pruned, normed), which are refused by name."""
    names = getattr(module, "_flat_weights_names", None)
    if not isinstance(names, list):
        names = list(module._parameters)
    return tuple(name for name in names if name.startswith("weight_hh"))


def _refuse_embedding(module: nn.Module, name: str) -> str | None:
    if getattr(module, "max_norm", None) is not None:
        return "max_norm rewrites the weight in its forward; construct the module without max_norm"
    if getattr(module, "sparse", False):
        return "a sparse gradient cannot pass a mask; construct the module with sparse=False"
    return None


def _nothing(module: nn.Module) -> Sequence[str]:
    return ()


OTHER = Kind(
    name="other",
    classes=(nn.Module,),
    weights=_nothing,
    axes=lambda module, name, weight: None,
    bias=lambda name: None,
)
"""Any other module: parameters only if named, masks by element or as a whole."""

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)

LINEAR = Kind(
    name="linear",
    classes=(nn.Linear,),
    weights=_weight,
    axes=_matrix,
    bias=_bias,
    product=product_of(nn.Linear, product=LINEAR_PRODUCT),
    linear=True,
)

for _kind in (
    LINEAR,
    Kind(
        name="conv",
        classes=_CONVOLUTIONS,
        weights=_weight,
        axes=_conv,
        bias=_bias,
        product=_conv_product_of,
    ),
    Kind(
        name="embedding",
        classes=(nn.Embedding, nn.EmbeddingBag),
        weights=_weight,
        axes=columns,
        bias=lambda name: None,
        refuse=_refuse_embedding,
    ),
    Kind(name="rnn", classes=(nn.RNNBase,), weights=_recurrent_weights, axes=_matrix, bias=_bias),
    Kind(
        name="rnn-cell",
        classes=(nn.RNNCellBase,),
        weights=lambda module: ("weight_hh",),
        axes=_matrix,
        bias=_bias,
    ),
    Kind(
        name="attention",
        classes=(nn.MultiheadAttention,),
        weights=_attention_weights,
        axes=_attention,
        bias=_attention_bias,
    ),
):
    register_kind(_kind)
