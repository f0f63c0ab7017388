"""The kernel for weights that share mask entries, against the formula: bit by bit."""

from __future__ import annotations

import pytest
import torch

from surgery.ops import Law, Layout, drop_weight, key_from_seed

pytestmark = pytest.mark.compiler

VIEWS: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((6, 5), (0,)),
    ((6, 5), (1,)),
    ((6, 5), ()),
    ((1, 5), (0,)),
    ((0, 3), (0,)),
    ((4, 3, 5, 2), (0, 2)),
    ((4, 3, 5, 2), (1,)),
    ((4, 3, 5, 2), (1, 3)),
    ((3, 10, 7), (0, 2)),
    ((64, 3, 3, 3), (1,)),
    ((130, 1000), (1,)),  # more than one part for each thread
    ((1000, 77), (0,)),
    ((70_001,), ()),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("view", "own"), VIEWS, ids=str)
def test_bits(view, own, dtype: torch.dtype, kernel_calls: list[str], switch_kernels) -> None:
    layout = Layout.shared(view, own)
    weight, anchor = (torch.randn(view).to(dtype) for _ in range(2))
    for towards in (None, anchor):
        for p in (0.0, 0.4, 1.0):
            law, key = Law.of(p, weight.device, dtype), key_from_seed(int(10 * p))
            switch_kernels(True)
            kernel_calls.clear()
            found = drop_weight(weight, key, law, layout, towards)
            assert kernel_calls == ["drop_shared"]
            switch_kernels(False)
            assert torch.equal(found, drop_weight(weight, key, law, layout, towards))
            assert kernel_calls == ["drop_shared"]


def test_a_gradient_of_other_strides() -> None:
    weight = torch.randn(6, 5, requires_grad=True)
    law, layout = Law.of(0.4, weight.device, weight.dtype), Layout.shared((6, 5), (0,))
    used = drop_weight(weight, key_from_seed(1), law, layout)
    used.backward(torch.ones(()).expand(6, 5))
    rows = {tuple(row.tolist()) for row in weight.grad}
    assert rows == {(0.0,) * 5, (law.scale.item(),) * 5}
