"""A mask for each example: the DropConnect of the paper (Wan et al. 2013, section 3.1, algorithm 1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..spec.config import Unit
from .example_operators import example_product, part_product
from .hash import Key
from .law import Law, Layout
from .linear import autocast
from .mask import drop_weight
from .part import Part


def example_linear(
    x: Tensor,
    weight: Tensor,
    key: Key,
    law: Law,
    unit: Unit,
    anchor: Tensor | None = None,
    part: Part | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`x_e @ W_e^T + b` for each example e, where `W_e = A + m_e * (W - A) / (1 - p)`.

    Args:
        x: (examples, in) or (examples, rows, in). The rows of an example (its tokens) share its mask.
        weight: (out, in), any strides.
        key: see `surgery.ops.hash`. The examples differ in round 3 of the
            hash (`multipliers`); a single example has the mask of `drop_weight`.
        law: the drop probability.
        unit: what shares an entry of an example's mask. "element": out * in entries. "input": in
            entries, dropped from x; "output": out entries, and "tensor": one, dropped from the
            result. These three never make a weight for an example; with an anchor they cost two
            products.
        anchor: where dropped weights go, like `weight`; None is zero. Gets no gradient.
        part: which part of a whole matrix the weight is, if it is not all: its masks are that part of
            those of the whole. Then `x` has the features of the part, and it is differentiable once.
        bias: (out,), added as it is, or None.

    Returns:
        (examples, out) or (examples, rows, out), differentiable any number of times in x, weight and
        bias.

    Raises:
        ValueError: the shapes or dtypes do not fit together, or the weight has over 2**32 entries.
    """
    x, weight, anchor = autocast(x, weight, anchor)
    _check(x, weight, anchor)
    if unit == "element" and part is None:
        return example_product(x, weight, bias, anchor, key, law)
    by_example = x.unsqueeze(1) if x.dim() == 2 else x
    found = _in_general(by_example, weight, key, law, unit, anchor, part)
    found = found.squeeze(1) if x.dim() == 2 else found
    return found if bias is None else found + bias.to(found.dtype)


def _in_general(
    x: Tensor,
    weight: Tensor,
    key: Key,
    law: Law,
    unit: Unit,
    anchor: Tensor | None,
    part: Part | None,
) -> Tensor:
    """Of a part of a weight, and where the entries of a mask are shared. x: (examples, rows, in)."""
    if unit == "element":
        assert part is not None
        return part_product(x, weight, anchor, key, law, part)
    examples, rows, width = x.shape
    if unit == "input":
        layout = _shared((examples, rows, width), (0, 2), part, 1)
        kept = drop_weight(x, key, law, layout)
        product = F.linear(kept, weight)
        return product if anchor is None else product + F.linear(x - kept, anchor)
    own = (0, 2) if unit == "output" else (0,)
    layout = _shared((examples, rows, weight.shape[0]), own, part, 0)
    kept = drop_weight(F.linear(x, weight), key, law, layout)
    if anchor is None:
        return kept
    towards = F.linear(x, anchor)
    return kept + (towards - drop_weight(towards, key, law, layout))


def _shared(view: tuple[int, ...], own: tuple[int, ...], part: Part | None, dim: int) -> Layout:
    """`Layout.shared` for a view whose last dimension is one of a matrix, of which there is a part."""
    if part is None:
        return Layout.shared(view, own)
    *leading, _ = view
    runs = *(((0, size),) for size in leading), part.runs[dim]
    whole = *leading, part.whole[dim]
    return Layout.shared(whole, own).of_part(Part(whole, runs))


def example_vector(
    bias: Tensor,
    key: Key,
    law: Law,
    unit: Unit,
    examples: int,
    anchor: Tensor | None = None,
    part: Part | None = None,
) -> Tensor:
    """A bias masked for each example.

    Args:
        bias: (out,).
        key, law, anchor: as in `example_linear`.
        unit: "element" and "output": an entry for each output; with the key of the weight, "output"
            gives the mask of the weight's rows. "input" and "tensor": one entry, since a bias is the
            weight of one constant input.
        examples: their number.
        part: of the matrix, as in `example_linear`.

    Returns:
        (examples, out).
    """
    shape = (examples, bias.shape[0])
    layout = _shared(shape, (0, 1) if unit in ("element", "output") else (0,), part, 0)
    towards = None if anchor is None else anchor.expand(shape)
    return drop_weight(bias.expand(shape).contiguous(), key, law, layout, towards)


def _check(x: Tensor, weight: Tensor, anchor: Tensor | None) -> None:
    if x.dim() not in (2, 3) or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            "a mask for each example needs x of shape (examples, [rows,] in) and a weight of shape "
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
