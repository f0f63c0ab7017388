"""How a module computes its pre-activation from its weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.product import COLUMNS, ROWS, How
from ..spec.config import DropConnectConfig, Inference, Sampling, Unit
from ..torch_private.modules import convolved as _conv  # the name that it has in pickles
from ..torch_private.modules import filters as _filters

Run = Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Product:
    """How a forward computes its pre-activation `u` from input `x`, weight and bias."""

    run: Run
    """`run(module, x, weight, bias)`, linear in x and in (weight, bias)."""
    features: int = -1
    """Dimension of the features in `x` and in `u`, counted from the end."""
    columns: bool = False
    """Whether the weight is stored in x out, as transformers' Conv1D does."""
    how: Callable[[Any], How | None] | None = field(default=None, compare=False)
    """`how(module)`: how `surgery.ops.extension` computes what the forward of a module does. None, also
    as a result, where it does not know that."""

    @property
    def is_matrix(self) -> bool:
        """Whether the weight is a matrix: then every unit can have a mask per example."""
        return self.features == -1


def needs_product(sampling: Sampling, inference: Inference) -> bool:
    """Whether these options ask for a forward that is a product; any other forward can do the rest."""
    return sampling != "batch" or inference == "moments"


_NO_DRAWS = (
    "samples= draws the pre-activation of a linear layer or convolution, and this weight has none of "
    "its own; leave samples out, then moments travel"
)


@dataclass(frozen=True)
class Demand:
    """What the options of a site ask of the product that it is part of. Plans of modules and of graphs,
    `set_inference` and `mc_predict` ask `refused`; forwards may assume that nothing refused reaches
    them."""

    sampling: Sampling
    inference: Inference
    unit: Unit
    bias: bool = False
    """Whether the bias drops with the weight."""
    draws: bool = False
    """Whether moments are those of draws of a pre-activation (`samples=Z`)."""

    @classmethod
    def of(cls, config: DropConnectConfig) -> Demand:
        draws = config.samples is not None
        return cls(config.sampling, config.inference, config.unit, config.bias, draws)

    @property
    def mode(self) -> str | None:
        """The option that needs a product, as the user writes it; None if any forward will do."""
        if not needs_product(self.sampling, self.inference):
            return None
        return "inference='moments'" if self.sampling == "batch" else f"sampling={self.sampling!r}"

    def refused(
        self,
        product: Product | None,
        otherwise: str = "needs a product",
        *,
        bias: bool = False,
        varies: bool = False,
    ) -> str | None:
        """Why a parameter cannot be dropped as the options say, and what to do; or None.

        Args:
            product: whose weight the parameter is; None if it is the weight of none.
            otherwise: what is wrong then; the message goes on with it after the option.
            bias: whether the parameter is the bias of a product.
            varies: whether moments travel through the functions that read the parameter, though it is
                the weight of no product.
        """
        if self.mode is None or (bias and self.bias):
            return None
        if varies and self.sampling == "batch":
            return _NO_DRAWS if self.draws else None
        if bias:
            return f"{self.mode} drops a bias with its weight only; use bias=True"
        if product is None:
            instead = "use sampling='batch' and inference='mean' or 'sample' for it"
            return f"{self.mode} {otherwise}; {instead}"
        if product.is_matrix:
            return None
        if self.unit == "element" and self.sampling == "example":
            return (
                "sampling='example' would need a filter bank for every example; use unit='input', "
                "'output' or 'tensor', or sampling='gaussian', or sampling='batch'"
            )
        if self.unit == "input" and self.inference == "moments":
            return (
                "with unit='input' one mask entry multiplies every position of a kernel, and that "
                "variance is not known; use another unit, or inference='sample'"
            )
        return None

    def refused_apart(self, weight: Demand | None) -> str | None:
        """Why the bias of a product cannot be dropped while its weight has other options, or is not
        dropped (None); or None."""
        own = (self.sampling, self.inference)
        if self.mode is None or (weight and (weight.sampling, weight.inference) == own):
            return None
        return (
            f"sampling={self.sampling!r} with inference={self.inference!r} drops a bias with its "
            "weight only, and the weight has not the same options; name the weight, whose bias=True "
            "takes the bias along"
        )


def _linear(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _linear_columns(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.t(), bias)


def _rows(module: Any) -> How:
    return ROWS


def _columns(module: Any) -> How:
    return COLUMNS


LINEAR_PRODUCT = Product(_linear, how=_rows)
COLUMN_PRODUCT = Product(_linear_columns, columns=True, how=_columns)


def conv_product(spatial: int) -> Product:
    """Of a convolution over so many spatial dimensions."""
    return Product(_conv, features=-1 - spatial, how=_filters)


def product_of(*known: type[nn.Module], product: Product) -> Callable[..., Product | None]:
    """For `Kind.product`: `product` for classes whose forward is that of a class in `known`."""

    def of(cls: type[nn.Module]) -> Product | None:
        return product if any(cls.forward is one.forward for one in known) else None

    return of
