"""The product with a masked weight for each example, and its gradients, on the GPU.

Where an example has few rows, a mask is drawn inside the product, so that no masked weight exists at
all. Else the masked weights of a block of examples are written to memory by one kernel and multiplied,
and then those of the next block, in the same memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..hash import SEGMENT
from ..law import Mask
from .launch import (
    INPUT_GRADIENT,
    MASKED_SUM,
    MASKED_WEIGHTS,
    PRODUCT,
    WEIGHT_GRADIENT,
    Kernel,
    form,
    repeated,
)
from .masks import arguments

FEW_ROWS = 16
"""Up to so many rows of an example, drawing the mask for each row costs less than storing a weight."""

SCRATCH = 160 << 20
"""Bytes of masked weights at a time, where examples have many rows; at least one weight. Products with
fewer weights would leave a large GPU idle."""

BLOCK = 1024
"""Entries of a program that writes masked weights or sums them."""

UNROLL = 2
"""Rows whose outer products are summed in one go."""

PROGRAMS = 256
"""A GPU runs so many programs at once. If a weight has fewer tiles, its rows are summed in parts."""

_FUSED: dict[str, Any] = {"enable_fp_fusion": True}
"""Sums are in another order than those of the formula anyway."""

_weight_gradient = Kernel("product_kernels", "weight_gradient", num_warps=2, **_FUSED)
KERNELS = {
    PRODUCT: Kernel("product_kernels", "product", num_warps=4, **_FUSED),
    INPUT_GRADIENT: Kernel("product_kernels", "input_gradient", num_warps=4, **_FUSED),
    MASKED_WEIGHTS: Kernel("product_kernels", "masked_weights", num_warps=4),
    MASKED_SUM: Kernel("product_kernels", "masked_sum", num_warps=4),
}


def example_product(
    x: Tensor, weight: Tensor, anchor: Tensor | None, bias: Tensor | None, mask: Mask
) -> Tensor | None:
    """`x_e @ W_e^T + b` for each example e.

    Args:
        x: (examples, in) or (examples, rows, in).
        weight: (out, in).
        anchor: like the weight, or None.
        bias: (out,), or None.
        mask: see `masks.masked`.

    Returns:
        (examples, out) or (examples, rows, out); None where there is no kernel. All tensors are
        contiguous.
    """
    each = _each(x)
    if not _fit(x, weight, each):
        return None
    product = x.new_empty(*x.shape[:-1], weight.shape[0])
    if not product.numel() or not weight.numel():
        product.zero_()
        return product if bias is None else product.add_(bias)
    if each <= FEW_ROWS:
        tile = _tile(x, each)
        programs = -(-weight.shape[0] // tile[1])
        read = x, weight, anchor, bias
        done = _by_rows(PRODUCT, programs, read, product, mask, each, tile)
        return product if done else None
    if not _block_product(x, weight, anchor, mask, product):
        return None
    return product if bias is None else product.add_(bias)


def example_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    anchor: Tensor | None,
    mask: Mask,
    want_x: bool,
    want_weight: bool,
) -> tuple[Tensor | None, Tensor | None] | None:
    """The gradients of x and of the weight.

    Args:
        grad: of the product.
        x, weight, anchor, mask: see `example_product`.

    Returns:
        both, each None where it is not wanted; None where there is no kernel.
    """
    each = _each(x)
    if not _fit(x, weight, each):
        return None
    of_x = torch.empty_like(x) if want_x else None
    of_weight = torch.empty_like(weight) if want_weight else None
    if not grad.numel() or not weight.numel():
        for gradient in (of_x, of_weight):
            if gradient is not None:
                gradient.zero_()
        return of_x, of_weight
    if each > FEW_ROWS:
        done = _block_gradients(grad, x, weight, anchor, mask, of_x, of_weight)
        return (of_x, of_weight) if done else None
    if of_x is not None:
        tile = _tile(x, each)
        programs = -(-weight.shape[1] // tile[2])
        read = grad, weight, anchor
        if not _by_rows(INPUT_GRADIENT, programs, read, of_x, mask, each, tile):
            return None
    if of_weight is not None and not _summed_outer(grad, x, mask, each, of_weight):
        return None
    return of_x, of_weight


def _each(x: Tensor) -> int:
    """Rows of an example."""
    return x.shape[1] if x.dim() == 3 else 1


def _fit(x: Tensor, weight: Tensor, each: int) -> bool:
    """Whether kernels can count the entries of all that they read and write."""
    if each > FEW_ROWS:
        return weight.numel() <= SEGMENT
    return max(x.numel(), weight.numel(), x.shape[0] * each * weight.shape[0]) <= SEGMENT


def _tile(x: Tensor, each: int) -> tuple[int, int, int]:
    """Rows, outputs and inputs of a step of a program. All rows of a step share most of the hash of an
    entry, so many of them are good; but the sums of all three dimensions have to fit into registers."""
    rows = min(16, _power(x.shape[0] * each))
    return rows, min(64, 256 // rows), 32


def _outer_tile(inputs: int) -> tuple[int, int]:
    """Outputs and inputs of a program that sums over rows. Many inputs, so that each thread reads its
    own, and all threads read the same outputs."""
    wide = min(256, max(32, _power(inputs)))
    return 2048 // wide, wide


def _power(number: int) -> int:
    """The least power of two that is not below a number."""
    return 1 << (number - 1).bit_length()


def _specialised(*sizes: int) -> tuple[tuple[bool, bool], ...]:
    return tuple((size % 16 == 0, size == 1) for size in sizes)


def _by_rows(
    which: int,
    programs: int,
    read: tuple[Any, ...],
    result: Tensor,
    mask: Mask,
    each: int,
    tile: tuple[int, int, int],
) -> bool:
    """Launch a kernel in which each program computes some rows of one part (of `programs`).

    Args:
        which: `PRODUCT` or `INPUT_GRADIENT`.
        read: what is multiplied, the weight, and what may be None.
        each: rows of an example.
    """
    left, weight, *beside = read
    rows, shape = left.shape[0] * each, tuple(weight.shape)
    there = (one is not None for one in beside)
    tensors, numbers = (*read, result), (rows, *shape)
    kinds = form(*tensors)
    about = read if which == PRODUCT else tensors
    sizes = left.shape[0], each, *shape
    return KERNELS[which].launch(
        (-(-rows // tile[0]) * programs, 1, 1),
        weight.device,
        (*kinds, *_specialised(*shape)),
        (*tensors, *arguments(mask), *numbers),
        (each, *there, mask.law.scale.dtype == torch.float64, *tile),
        repeated.plan(which, tensors, kinds, about, sizes, mask, numbers),
    )


def _summed_outer(grad: Tensor, x: Tensor, mask: Mask, each: int, of_weight: Tensor) -> bool:
    rows, (outputs, inputs) = x.shape[0] * each, of_weight.shape
    tile = _outer_tile(inputs)
    programs = -(-outputs // tile[0]) * -(-inputs // tile[1])
    parts = max(1, min(PROGRAMS // programs, rows // 32))
    span = -(-rows // (parts * UNROLL)) * UNROLL
    sums = of_weight
    if parts > 1:
        sums = of_weight.new_empty(parts, outputs, inputs, dtype=mask.law.scale.dtype)
    tensors, numbers = (grad, x, sums), (rows, span, outputs, inputs)
    kinds, plan = form(*tensors), None
    if parts == 1:
        about, sizes = (grad, of_weight, None, x), (x.shape[0], each, outputs, inputs)
        plan = repeated.plan(WEIGHT_GRADIENT, tensors, kinds, about, sizes, mask, numbers)
    done = _weight_gradient.launch(
        (programs, parts, 1),
        grad.device,
        (*kinds, *_specialised(outputs, inputs)),
        (*tensors, *arguments(mask), *numbers),
        (each, mask.law.scale.dtype == torch.float64, *tile, UNROLL),
        plan,
    )
    if done and parts > 1:
        of_weight.copy_(sums.sum(0))
    return done


def _scratch(x: Tensor, weight: Tensor) -> tuple[Tensor, list[slice]]:
    """Memory for the masked weights of a block of examples, and the blocks, of nearly one size."""
    examples, size = len(x), weight.numel()
    most = max(1, SCRATCH // (size * x.element_size()))
    count = -(-examples // most)
    ends = [examples * i // count for i in range(count + 1)]
    return x.new_empty(-(-examples // count), *weight.shape), list(map(slice, ends, ends[1:]))


def _block_product(
    x: Tensor, weight: Tensor, anchor: Tensor | None, mask: Mask, product: Tensor
) -> bool:
    scratch, blocks = _scratch(x, weight)
    for block in blocks:
        used = scratch[: block.stop - block.start]
        if not _for_block(MASKED_WEIGHTS, (weight, anchor, used), used, block.start, mask, x):
            return False
        torch.bmm(x[block], used.mT, out=product[block])
    return True


def _block_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    anchor: Tensor | None,
    mask: Mask,
    of_x: Tensor | None,
    of_weight: Tensor | None,
) -> bool:
    scratch, blocks = _scratch(x, weight)
    for block, sums in zip(blocks, _sums(of_weight, len(blocks), mask.law.scale.dtype)):
        used = scratch[: block.stop - block.start]
        if of_x is not None:
            if not _for_block(MASKED_WEIGHTS, (weight, anchor, used), used, block.start, mask, x):
                return False
            torch.bmm(grad[block], used, out=of_x[block])
        if sums is not None:
            outer = torch.bmm(grad[block].mT, x[block], out=used)
            if not _for_block(MASKED_SUM, (outer, *sums), outer, block.start, mask, x):
                return False
    return True


def _sums(
    of_weight: Tensor | None, count: int, dtype: torch.dtype
) -> Iterator[tuple[Tensor | None, Tensor] | None]:
    """For each block what its sum is added to, and where the new sum goes: last, into the gradient.
    Sums of several blocks have that dtype until then."""
    if of_weight is None:
        yield from [None] * count
        return
    wide = of_weight
    if count > 1 and of_weight.dtype != dtype:
        wide = torch.empty_like(of_weight, dtype=dtype)
    for i in range(count):
        yield (None if i == 0 else wide), (wide if i < count - 1 else of_weight)


def _for_block(
    which: int,
    tensors: tuple[Tensor, Tensor | None, Tensor],
    block: Tensor,
    first: int,
    mask: Mask,
    x: Tensor,
) -> bool:
    """Launch a kernel for the masked weights of some examples.

    Args:
        which: `MASKED_WEIGHTS` or `MASKED_SUM`.
        tensors: what it reads and writes; the second, an anchor or the sum so far, may be None.
        block: (examples, out, in), the one of them that has an entry for each example.
        first: the number of its first example.
        x: of all examples. What makes all their weights at once can be repeated.
    """
    (count, *shape), size = block.shape, block[0].numel()
    kinds, plan, numbers = form(*tensors), None, (first, count, size)
    if count == len(x):
        left, beside, right = tensors
        about = left, right, beside
        sizes = (*x.shape[:2], *shape)
        plan = repeated.plan(which, tensors, kinds, about, sizes, mask, numbers)
    return KERNELS[which].launch(
        (-(-size // BLOCK), 1, 1),
        block.device,
        (*kinds, *_specialised(size)),
        (*tensors, *arguments(mask), *numbers),
        (tensors[1] is not None, mask.law.scale.dtype == torch.float64, BLOCK),
        plan,
    )
