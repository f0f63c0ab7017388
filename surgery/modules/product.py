"""How a module computes its pre-activation from its weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

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

    @property
    def is_matrix(self) -> bool:
        """Whether the weight is a matrix: then every unit can have a mask per example."""
        return self.features == -1


def _linear(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _linear_columns(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.t(), bias)


def _conv(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    u: Tensor = module._conv_forward(x, weight, bias)
    return u


LINEAR_PRODUCT = Product(_linear)
COLUMN_PRODUCT = Product(_linear_columns, columns=True)


def conv_product(spatial: int) -> Product:
    """Of a convolution over so many spatial dimensions."""
    return Product(_conv, features=-1 - spatial)
