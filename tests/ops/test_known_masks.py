"""Every implementation of the masks gives the known answers, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery.ops import Law, Layout, drop_weight
from surgery.ops.cpu import native
from surgery.ops.hash import (
    advance_key,
    draw_key,
    hash_bits,
    mix,
    multipliers,
    spread,
)
from surgery.ops.law import Mask

from ..internals import derived_key, give_bits, signed
from .known_masks import RATES, RUN, Line, computed, stored
from .statistics import window

LINES = stored()


def tensor_of(words: tuple[int, ...]) -> Tensor:
    return torch.tensor([signed(word) for word in words], dtype=torch.int32)


def key_of(line: Line) -> Tensor:
    """Of the part of the mask in which the line lies."""
    key = tensor_of(line.key)
    key = key if line.rank == 0 else derived_key(key, line.rank)
    return advance_key(key, line.start >> 32 << 32)


def multiplier_of(line: Line) -> Tensor:
    return multipliers(line.example + 1, key_of(line))[line.example]


def test_file_is_what_the_reference_gives() -> None:
    assert list(computed()) == LINES


def test_formula() -> None:
    for line in LINES:
        bits = tensor_of(line.bits)
        places = spread(window(line.start, RUN))
        assert torch.equal(mix(places, key_of(line), multiplier_of(line)), bits), line
        if line.example == 0:
            key = tensor_of(line.key)
            key = key if line.rank == 0 else derived_key(key, line.rank)
            moved = advance_key(key, line.start)
            assert torch.equal(hash_bits(window(0, RUN), moved), bits), line


def masks(
    lines: list[Line], dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Line, Law, Tensor]]:
    for place, p in enumerate(RATES):
        law = Law.of(float(p), torch.device("cpu"), dtype)
        for line in lines:
            yield line, law, torch.tensor([entry == "1" for entry in line.kept[place]])


def test_drawn_key_of_a_rank(monkeypatch) -> None:
    for line in LINES:
        give_bits(monkeypatch, tensor_of(line.key))
        key: Any = draw_key(torch.device("cpu"), line.rank)
        assert torch.equal(advance_key(key, line.start >> 32 << 32), key_of(line))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_a_compiler(dtype: torch.dtype, switch_kernels) -> None:
    ones = torch.ones(RUN, dtype=dtype)
    switch_kernels(False)
    of_batches = [line for line in LINES if line.example == 0]
    for line, law, expected in masks(of_batches, dtype):
        key = advance_key(key_of(line), line.start & 0xFFFFFFFF)
        used = drop_weight(ones, key, law, Layout.elements(RUN))
        assert torch.equal(used != 0, expected), line


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_kernels_of_masks(dtype: torch.dtype) -> None:
    ones, used = torch.ones(RUN, dtype=dtype), torch.empty(RUN, dtype=dtype)
    for line, law, expected in masks(LINES, dtype):
        mask = Mask(key_of(line), law, Layout.elements(RUN))
        multiplier, start = int(multiplier_of(line)), line.start & 0xFFFFFFFF
        for given in (multiplier, None) if line.example == 0 else (multiplier,):
            native.drop(ones, None, None, used, None, mask, given, start)
            assert torch.equal(used != 0, expected), line


@pytest.mark.compiler
def test_kernels_of_products() -> None:
    """A weight of ones times the unit vectors, and the gradient of the weight: both are the mask."""
    near = [line for line in LINES if line.start < 1 << 20 and line.key == LINES[-1].key]
    for line, law, expected in masks(near):
        rows = (line.start + RUN) // RUN + 1
        ones = torch.ones(rows, RUN)
        mask = Mask(key_of(line), law, Layout.elements(RUN))
        own = multiplier_of(line).repeat(RUN)
        product = native.example_product(torch.eye(RUN), ones, None, mask, own)
        rest = ones[:1], ones, None, mask, own[:1], False, True
        _, gradient = native.example_gradients(ones[:, :1].t().contiguous(), *rest)
        assert gradient is not None
        for found in (product.t(), gradient):
            entries = found.flatten()[line.start : line.start + RUN]
            assert torch.equal(entries != 0, expected), line


@pytest.mark.compiler
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled() -> None:
    """By inductor: the bits, and the keys of ranks and parts."""

    def together(index: Tensor, keys: Tensor, own: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        places = spread(index)
        moved = advance_key(derived_key(key, 7), (3 << 32) + 12)
        return mix(places, keys), mix(places, keys, own), moved, multipliers(164, key)

    index = torch.stack([window(line.start, RUN) for line in LINES])
    keys = torch.stack([key_of(line) for line in LINES], dim=1)[:, :, None]
    own = torch.stack([multiplier_of(line) for line in LINES])[:, None]
    compiled = torch.compile(together, fullgraph=True)
    for known in LINES[:: len(LINES) // 3]:
        key = tensor_of(known.key)
        of_batch, of_examples, moved, factors = compiled(index, keys, own, key)
        for line, first, second in zip(LINES, of_batch, of_examples):
            assert torch.equal(second, tensor_of(line.bits)), line
            assert line.example or torch.equal(first, second)
        assert torch.equal(moved, together(index, keys, own, key)[2])
        assert torch.equal(factors, multipliers(164, key))
