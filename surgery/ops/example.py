"""A mask for each example: the DropConnect of the paper (Wan et al. 2013, section 3.1, algorithm 1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..spec.config import Unit
from .example_operators import example_product
from .hash import Key
from .law import Law, Layout
from .linear import autocast
from .mask import drop_weight


def example_linear(
    x: Tensor, weight: Tensor, key: Key, law: Law, unit: Unit, anchor: Tensor | None = None
) -> Tensor:
    """`x_e @ W_e^T` for each example e, where `W_e = A + m_e * (W - A) / (1 - p)`.

    Args:
        x: (examples, rows, in). The rows of an example (its tokens) share its mask.
        weight: (out, in), any strides.
        key: see `surgery.ops.hash`. The examples differ in round 3 of the
            hash (`multipliers`); a single example has the mask of `drop_weight`.
        law: the drop probability.
        unit: what shares an entry of an example's mask. "element": out * in entries. "input": in
            entries, dropped from x; "output": out entries, and "tensor": one, dropped from the
            result. These three never make a weight for an example; with an anchor they cost two
            products.
        anchor: where dropped weights go, like `weight`; None is zero. Gets no gradient.

    Returns:
        (examples, rows, out), differentiable any number of times in x and weight.

    Raises:
        ValueError: the shapes or dtypes do not fit together, or the weight has over 2**32 entries.
    """
    x, weight, anchor = autocast(x, weight, anchor)
    _check(x, weight, anchor)
    if unit == "element":
        return example_product(x, weight, anchor, key, law)
    examples, rows, width = x.shape
    if unit == "input":
        layout = Layout.shared((examples, rows, width), (0, 2))
        kept = drop_weight(x, key, law, layout)
        product = F.linear(kept, weight)
        return product if anchor is None else product + F.linear(x - kept, anchor)
    layout = Layout.shared((examples, rows, weight.shape[0]), (0, 2) if unit == "output" else (0,))
    kept = drop_weight(F.linear(x, weight), key, law, layout)
    if anchor is None:
        return kept
    towards = F.linear(x, anchor)
    return kept + (towards - drop_weight(towards, key, law, layout))


def example_vector(
    bias: Tensor,
    key: Key,
    law: Law,
    unit: Unit,
    examples: int,
    anchor: Tensor | None = None,
) -> Tensor:
    """A bias masked for each example.

    Args:
        bias: (out,).
        key, law, anchor: as in `example_linear`.
        unit: "element" and "output": an entry for each output; with the key of the weight, "output"
            gives the mask of the weight's rows. "input" and "tensor": one entry, since a bias is the
            weight of one constant input.
        examples: their number.

    Returns:
        (examples, out).
    """
    shape = (examples, bias.shape[0])
    layout = Layout.shared(shape, (0, 1) if unit in ("element", "output") else (0,))
    towards = None if anchor is None else anchor.expand(shape)
    return drop_weight(bias.expand(shape).contiguous(), key, law, layout, towards)


def _check(x: Tensor, weight: Tensor, anchor: Tensor | None) -> None:
    if x.dim() != 3 or weight.dim() != 2 or x.shape[2] != weight.shape[1]:
        raise ValueError(
            "a mask for each example needs x of shape (examples, rows, in) and a weight of shape "
            f"(out, in), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if anchor is not None and anchor.shape != weight.shape:
        raise ValueError(
            f"the anchor has shape {tuple(anchor.shape)}, its weight {tuple(weight.shape)}"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and the weight {weight.dtype}; cast one of them")
    if weight.numel() > 1 << 32:
        raise ValueError(
            f"a weight of {weight.numel()} entries is too large for a mask of each example (at most "
            '2**32); use sampling="batch"'
        )
