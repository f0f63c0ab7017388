"""The mask of a part of a weight is that part of the mask of the whole, for kernels and formulas."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery.ops import Law, Layout, drop_weight, example_linear, key_from_seed
from surgery.ops.part import Part, Rows, Run

KEY = key_from_seed(3)
WHOLE = ((7,), (6, 10), (300, 1000), (3, 5, 4))
"""The third is masked in several chunks."""


def runs(size: int, way: str) -> tuple[Run, ...]:
    half = size // 2
    return {
        "all": ((0, size),),
        "first": ((0, half),),
        "last": ((half, size - half),),
        "ends": ((0, 1), (size - 1, 1)),
        "none": ((0, 0),),
    }[way]


def parts(whole: tuple[int, ...]) -> list[Part]:
    ways = ("all", "first", "last", "ends", "none")
    return [
        Part(whole, tuple(runs(size, way) for size, way in zip(whole, chosen)))
        for chosen in itertools.product(ways, repeat=len(whole))
    ]


def cut(tensor: Tensor, part: Part) -> Tensor:
    for dim in range(tensor.ndim):
        tensor = tensor.index_select(dim, part.indices(dim, tensor.device))
    return tensor


@pytest.fixture(params=[True, False], ids=["kernels", "formula"], autouse=True)
def ways(request: pytest.FixtureRequest, switch_kernels: Any) -> None:
    if not request.param:
        switch_kernels(False)


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("whole", WHOLE, ids=str)
def test_by_element(whole: tuple[int, ...], dtype: torch.dtype, anchored: bool) -> None:
    weight = torch.randn(whole).to(dtype).requires_grad_()
    anchor = torch.randn(whole).to(dtype) if anchored else None
    law, layout = Law.of(0.4, weight.device, dtype), Layout.elements(weight.numel())
    full = drop_weight(weight, KEY, law, layout, anchor)
    grad = torch.randn(whole).to(dtype)
    (of_full,) = torch.autograd.grad(full, weight, grad)
    for part in parts(whole):
        own = cut(weight.detach(), part).requires_grad_()
        towards = None if anchor is None else cut(anchor, part)
        used = drop_weight(own, KEY, law, layout.of_part(part), towards)
        assert torch.equal(used, cut(full.detach(), part)), part
        (of_own,) = torch.autograd.grad(used, own, cut(grad, part))
        assert torch.equal(of_own, cut(of_full, part)), part


@pytest.mark.parametrize("own", [(), (0,), (1,), (2,)])
def test_shared_entries(own: tuple[int, ...]) -> None:
    whole = (4, 6, 5)
    weight = torch.randn(whole)
    law = Law.of(0.5, weight.device, weight.dtype)
    for view in (whole, (4, 6, 5)[::-1] if not own else whole):
        layout = Layout.shared(view, own)
        full = drop_weight(weight, KEY, law, layout)
        for part in parts(whole):
            used = drop_weight(cut(weight, part), KEY, law, layout.of_part(part))
            assert torch.equal(used, cut(full, part)), part


@pytest.mark.parametrize("unit", ["element", "input", "output", "tensor"])
@pytest.mark.parametrize("rows", [1, 7])
def test_per_example(unit: Any, rows: int) -> None:
    """In whole numbers: outputs of a part are outputs of the whole, summands add up to them, and so for
    the gradients."""
    x = torch.randint(-3, 4, (5, rows, 8)).float().requires_grad_()
    weight = torch.randint(-3, 4, (6, 8)).float().requires_grad_()
    anchor = torch.randint(-3, 4, (6, 8)).float()
    law = Law.of(0.5, weight.device, weight.dtype)
    full = example_linear(x, weight, KEY, law, unit, anchor)
    grad = torch.randint(-3, 4, full.shape).float()
    of_x, of_weight = torch.autograd.grad(full, (x, weight), grad)
    for dim in range(2):
        found, found_x, found_weight = [], [], []
        for way in ("first", "last"):
            size = weight.shape[dim]
            other = ((0, weight.shape[1 - dim]),)
            own = runs(size, way)
            part = Part((6, 8), (own, other) if dim == 0 else (other, own))
            mine = cut(weight.detach(), part).requires_grad_()
            given, of_u = x.detach(), grad
            if dim == 1:
                given = given[..., own[0][0] : own[0][0] + own[0][1]]
            else:
                of_u = grad[..., own[0][0] : own[0][0] + own[0][1]]
            given = given.clone().requires_grad_()
            u = example_linear(given, mine, KEY, law, unit, cut(anchor, part), part)
            by_x, by_weight = torch.autograd.grad(u, (given, mine), of_u)
            found.append(u)
            found_x.append(by_x)
            found_weight.append(by_weight)
        together = torch.cat(found, -1) if dim == 0 else found[0] + found[1]
        assert torch.equal(together, full)
        whole_x = found_x[0] + found_x[1] if dim == 0 else torch.cat(found_x, -1)
        assert torch.equal(whole_x, of_x)
        assert torch.equal(torch.cat(found_weight, dim), of_weight)


def test_rows() -> None:
    """What the kernel counts: equally spaced rows, or nothing."""
    all_, some, ends = ((0, 4),), ((1, 2),), ((0, 1), (3, 1))
    assert Part((4, 4), (some, all_)).rows() == Rows(4, 8, 8)
    assert Part((4, 4), (all_, some)).rows() == Rows(1, 2, 4)
    assert Part((4, 4), (some, some)).rows() == Rows(5, 2, 4)
    assert Part((4, 4, 4), (some, all_, some)).rows() == Rows(17, 2, 4)
    assert Part((4, 4, 4), (all_, some, some)).rows() is None
    assert Part((4, 4), (ends, all_)).rows() is None


def test_a_whole_that_is_too_large_is_refused() -> None:
    layout = Layout.elements(1 << 33)
    part = Part((1 << 20, 1 << 13), (((0, 2),), ((0, 2),)))
    law = Law.of(0.5, torch.device("cpu"), torch.float32)
    with pytest.raises(RuntimeError, match="too large for the mask of a part"):
        drop_weight(torch.ones(2, 2), KEY, law, layout.of_part(part))
