"""What the masks of a weight do to outputs: the kernel beside the sum that defines it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from surgery.ops.grams import FEW, weighted_gram

from .. import internals


def given(
    outputs: int, examples: int, rows: int, out: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    by = torch.randn(outputs, examples, rows, out, dtype=dtype)
    x = torch.randn(examples, rows, width, dtype=dtype)
    return by, x, torch.rand(out, width, dtype=dtype)


def defined(by: Tensor, x: Tensor, square: Tensor) -> Tensor:
    of_weight = torch.einsum("aeto,eti->aeoi", by.double(), x.double())
    return torch.einsum("oi,aeoi,beoi->eab", square.double(), of_weight, of_weight)


SHAPES = [
    (1, 1, 1, 1, 1),
    (4, 3, 5, 7, 33),
    (5, 2, 9, 24, 64),
    (10, 1, 4, 100, 70),
    (3, 2, 0, 4, 5),
]


@pytest.mark.compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_is_the_sum(
    shape: tuple[int, int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    internals.note_kernels(monkeypatch, lambda name, *_: calls.append(name))
    values = given(*shape, torch.float32)
    found = weighted_gram(*values)
    torch.testing.assert_close(found.double(), defined(*values), rtol=1e-4, atol=1e-3)
    assert torch.equal(found, found.transpose(1, 2))
    assert calls == ["weighted_gram"]


@pytest.mark.parametrize("outputs", [3, FEW + 1])
def test_without_a_kernel(outputs: int) -> None:
    values = given(outputs, 2, 5, 6, 4, torch.float64)
    torch.testing.assert_close(weighted_gram(*values), defined(*values))
