"""The product of each example with a masked weight of its own, entry by entry, and its gradients.

No more masked weights exist at a time than one block of them (`BLOCK` entries), and autograd keeps the
input, the weight and the key.

There are two ways to the same numbers. Where each example has few rows, kernels draw the mask inside
the product, so that no masked weight exists at all. Else, and without kernels, a block of masked
weights is made and multiplied, and then the next. Here is how it is done on the CPU, and by the formula
anywhere; `gpu/products.py` does it on the GPU.

`example_operators.py` makes of this what autograd and compilers know.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..torch_private.tensors import unviewed
from . import gpu
from .cpu import native
from .engine import CHUNK, has_kernels
from .formula import apply_mask, keep_masks
from .hash import advance_key, key_tensor, multipliers, spread
from .law import Law, Layout, Mask
from .part import Part, Rows

BLOCK = 1 << 20
"""Masked weights made at a time, where examples have many rows: 4 MB. Without a compiler a CPU makes
`CHUNK` at a time, as the temporaries of the plain formula need ten times as much."""

FEW_ROWS = 4
"""Up to so many rows of an example, drawing the mask for each row costs less than storing a weight."""


_Block = tuple[slice, slice]
"""Some examples, and some rows of their weights."""
_Pair = tuple[Tensor | None, Tensor | None]


def _blocks(examples: int, weight: Tensor, entries: int) -> Iterator[_Block]:
    """Blocks of examples and rows: several whole examples, or some rows of one."""
    rows, columns = weight.shape
    row_step = max(1, min(rows, entries // max(1, columns)))
    step = max(1, entries // max(1, rows * columns))
    for row in range(0, rows, row_step):
        for example in range(0, examples, step):
            yield slice(example, example + step), slice(row, row + row_step)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _part(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _flat(tensor: Tensor | None, example: int | None = None) -> Tensor | None:
    """All entries of a contiguous tensor, or those of an example."""
    if tensor is None:
        return None
    return tensor.reshape(-1) if example is None else tensor[example].view(-1)


class _Masks:
    """The masks of all examples of one call, and the ways to use them.

    Args:
        x: (examples, rows, in).
        weight, anchor: (out, in), any strides; the anchor may be None.
        mask: of example 0, by element.
        part: which part of a whole matrix, which the mask is of, the weight is; None is all of it.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, anchor: Tensor | None, mask: Mask, part: Part | None = None
    ) -> None:
        self.weight = weight.detach().contiguous()
        self.anchor = None if anchor is None else anchor.detach().contiguous()
        self.examples, self.rows = x.shape[:2]
        self.key, self.law = key_tensor(mask.key, weight.device), mask.law
        self.mask = Mask(self.key, mask.law, mask.layout)
        self.part = part
        self.places = None if part is None else part.rows()
        """Where the rows of the part lie in the whole matrix."""

    def counted(self) -> Mask | None:
        """A mask whose entries kernels count from the first of the weight; None if the weight is a part
        that they cannot count so."""
        if self.part is None:
            return self.mask
        if self.places is None or self.places.stride != self.weight.shape[1]:
            return None
        key = advance_key(self.key, self.places.start)
        return Mask(key, self.law, Layout.elements(self.weight.numel()))

    @functools.cached_property
    def last(self) -> Tensor:
        """The multiplier of each example in round 3 of the hash: int32, (examples,)."""
        return multipliers(self.examples, self.key)

    @property
    def library(self) -> str:
        """Which kernels draw the masks of a block."""
        return "example_masks" if self.part is None else "parts"

    def each_row(self) -> Tensor:
        """The multiplier of each row of the input: int32, (examples * rows,). For kernels of products,
        which are there."""
        last = native.example_multipliers(self.examples, self.key)
        return last if self.rows == 1 else last.repeat_interleave(self.rows)

    def kernels(self, name: str, *others: Tensor | None) -> bool:
        """Whether there are kernels of that name on the CPU for the weight and for other tensors."""
        return native.takes(self.weight, self.anchor, *others) and has_kernels(name)

    def factors(self) -> tuple[Tensor, Tensor | None]:
        """What is used of each entry if it is kept (without an anchor, before it is scaled), and if it
        is dropped."""
        if self.anchor is None:
            return self.weight, None
        always = torch.ones((), dtype=torch.bool, device=self.weight.device)
        return apply_mask(always, self.weight, self.anchor, self.law.scale), self.anchor

    def blocks(self) -> Iterator[_Block]:
        """The blocks of masked weights, one after the other."""
        large = self.weight.device.type != "cpu" or self.kernels(self.library)
        return _blocks(self.examples, self.weight, BLOCK if large else CHUNK)

    def of_block(self, block: _Block, want_used: bool, outer: Tensor | None) -> _Pair:
        """The masked weights of a block, (examples, rows, columns), and its masked outer products.

        Args:
            want_used: whether the masked weights are wanted; else None stands for them.
            outer: of the shape of the block, the gradients of its masked weights, or None. It may be
                overwritten.
        """
        examples, rows = block
        weight, anchor, last = self.weight[rows], _part(self.anchor, rows), self.last[examples]
        if not self.kernels(self.library, outer) or (self.part and self.places is None):
            keep, scale = self._keep(rows, last), self.law.scale
            used = apply_mask(keep, weight, anchor, scale) if want_used else None
            return used, None if outer is None else apply_mask(keep, outer, None, scale)
        used = weight.new_empty(len(last), *weight.shape) if want_used else None
        start = (rows.start or 0) * weight.shape[1]
        values = (_flat(weight), _flat(anchor)) if want_used else (None, None)
        for example, multiplier in enumerate(last.tolist()):
            grad = _flat(outer, example)
            tensors = *values, grad, _flat(used, example), grad
            if self.places is None:
                native.drop(*tensors, self.mask, multiplier, start)
            else:
                first, width, stride = self.places
                moved = Rows(first + (rows.start or 0) * stride, width, stride)
                native.drop_rows(*tensors, self.mask, moved, multiplier)
        return used, outer

    def _keep(self, rows: slice, last: Tensor) -> Tensor:
        """The keep masks of some rows for some examples, by the formula."""
        outputs, inputs = self.weight.shape
        if self.part is None:
            of_rows, of_columns = _indices(outputs, inputs, self.weight.device)
        else:
            of_rows, of_columns = (self.part.indices(dim, self.weight.device) for dim in range(2))
            of_rows = of_rows * self.part.whole[1]
        first, columns = spread(of_rows)[rows], spread(of_columns)
        return keep_masks(first, columns, self.key, self.law.threshold, last)


def _indices(outputs: int, inputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The index of the first entry of each row of a weight, and of the entries of row 0."""
    index = torch.arange(max(outputs, inputs), dtype=torch.int64, device=device)
    return index[:outputs] * inputs, index[:inputs]


def formula(x: Tensor, weight: Tensor, anchor: Tensor | None, key: Tensor, law: Law) -> Tensor:
    """`product` as plain tensor operations, for traces that know no operator of ours. The masked
    weights of all examples exist at once."""
    outputs, inputs = weight.shape
    of_rows, of_columns = _indices(outputs, inputs, weight.device)
    rows, columns = spread(of_rows), spread(of_columns)
    keep = keep_masks(rows, columns, key, law.threshold, multipliers(len(x), key))
    return torch.bmm(x, apply_mask(keep, weight, anchor, law.scale).mT)


def product(
    x: Tensor,
    weight: Tensor,
    anchor: Tensor | None,
    mask: Mask,
    taken: bool | None = None,
    part: Part | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`x_e @ W_e^T + b` for each example e, in eager code that autograd does not record.

    Args:
        x: (examples, in) or (examples, rows, in).
        weight, anchor: (out, in), any strides; the anchor may be None.
        mask: of example 0, by element; its key is on the host, on the CPU, or where the weight is.
        taken: whether the kernels of the GPU take these tensors, if that is known; they take no part.
        part: see `_Masks`.
        bias: (out,), not masked, or None.

    Returns:
        (examples, out) or (examples, rows, out), no view.
    """
    if gpu.takes(x, weight, anchor, strided=True) if taken is None else taken:
        dense = x.contiguous(), weight.contiguous(), _dense(anchor), _dense(bias)
        done = gpu.example_product(*dense, mask)
        if done is not None:
            return done
    found = _product(_by_example(x.detach()), weight, anchor, mask, part)
    if bias is not None:
        found += bias.to(found.dtype)
    return unviewed(found.view(*x.shape[:-1], weight.shape[0]))


def _by_example(x: Tensor) -> Tensor:
    """(examples, rows, features)."""
    return x.unsqueeze(1) if x.dim() == 2 else x


def _product(
    x: Tensor, weight: Tensor, anchor: Tensor | None, mask: Mask, part: Part | None
) -> Tensor:
    """`product` on the CPU, and by the formula anywhere. x: (examples, rows, in)."""
    masks = _Masks(x, weight, anchor, mask, part)
    fused = _fused_product(masks, x.flatten(0, 1)) if masks.rows <= FEW_ROWS else None
    if fused is not None:
        return fused
    found = x.new_empty(*x.shape[:2], weight.shape[0])
    for examples, rows in masks.blocks():
        used, _ = masks.of_block((examples, rows), True, None)
        assert used is not None
        found[examples, :, rows] = torch.bmm(x[examples], used.mT)
    return found


def gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    anchor: Tensor | None,
    mask: Mask,
    want_x: bool,
    want_weight: bool,
    taken: bool | None = None,
    part: Part | None = None,
) -> _Pair:
    """The gradients of x and of the weight, in eager code that autograd does not record.

    Args:
        grad: (examples, out) or (examples, rows, out), of the product.
        x, weight, anchor, mask, taken, part: see `product`.

    Returns:
        both, no views, in the dtypes of x and of the weight; None where not wanted.
    """
    if gpu.takes(grad, x, weight, anchor, strided=True) if taken is None else taken:
        dense = grad.contiguous(), x.contiguous(), weight.contiguous()
        done = gpu.example_gradients(*dense, _dense(anchor), mask, want_x, want_weight)
        if done is not None:
            return done
    grad, inputs = _by_example(grad.detach()), _by_example(x.detach())
    masks = _Masks(inputs, weight, anchor, mask, part)
    both = _fused_gradients(masks, grad, inputs, want_x, want_weight)
    if both is None:
        both = _block_gradients(masks, grad, inputs, want_x, want_weight)
    of_x, of_weight = both
    return (
        None if of_x is None else unviewed(of_x.to(x.dtype).view(x.shape)),
        None if of_weight is None else of_weight.to(weight.dtype),
    )


def _fused_product(masks: _Masks, rows: Tensor) -> Tensor | None:
    """The product with masks drawn inside of it; None where no kernel does it."""
    counted = masks.counted()
    if counted is None or rows.dtype != torch.float32 or not masks.kernels("products", rows):
        return None
    return native.example_product(rows.contiguous(), *masks.factors(), counted, masks.each_row())


def _fused_gradients(
    masks: _Masks, grad: Tensor, x: Tensor, want_x: bool, want_weight: bool
) -> _Pair | None:
    """The gradients with masks drawn inside of them; None where no kernel does it."""
    if masks.rows > FEW_ROWS:
        return None
    rows, inputs = grad.flatten(0, 1).contiguous(), x.flatten(0, 1).contiguous()
    counted = masks.counted()
    if counted is None or rows.dtype != torch.float32:
        return None
    if not masks.kernels("products", rows, inputs):
        return None
    # These kernels multiply what is dropped by 0, of which infinities and NaN would make NaN.
    if not _is_finite(rows) or (want_weight and not _is_finite(inputs)):
        return None
    args = (*masks.factors(), counted, masks.each_row())
    of_x, of_weight = native.example_gradients(rows, inputs, *args, want_x, want_weight)
    # Such a weight would show in the gradient of each row, which is read faster than the weight.
    return (of_x, of_weight) if of_x is None or _is_finite(of_x) else None


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite, and their sum too. For the CPU, where this waits for nothing."""
    return math.isfinite(tensor.sum().item())


def _block_gradients(
    masks: _Masks, grad: Tensor, x: Tensor, want_x: bool, want_weight: bool
) -> _Pair:
    wide = masks.law.scale.dtype
    of_x = torch.zeros_like(x, dtype=wide) if want_x else None
    of_weight = torch.zeros_like(masks.weight, dtype=wide) if want_weight else None
    for examples, rows in masks.blocks():
        part = grad[examples, :, rows]
        outer = torch.bmm(part.mT, x[examples]) if want_weight else None
        used, kept = masks.of_block((examples, rows), want_x, outer)
        if of_x is not None and used is not None:
            of_x[examples] += torch.bmm(part, used)
        if of_weight is not None and kept is not None:
            of_weight[rows] += kept[0] if len(kept) == 1 else kept.sum(0, dtype=wide)
    return of_x, of_weight
