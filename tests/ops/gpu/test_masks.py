"""The kernels for the GPU that mask and apply, in Triton's interpreter, against the formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from surgery import apply_dropconnect, hold_masks
from surgery.ops import (
    Law,
    Layout,
    drop_weight,
    hash_bits,
    key_from_seed,
    masked_formula,
    masked_linear,
)
from surgery.ops.gpu import masks
from surgery.ops.hash import advance_key, words
from surgery.ops.law import Mask

from ...internals import set_constant

KEY = key_from_seed(8)
CPU = torch.device("cpu")
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def formula(weight: Tensor, anchor: Tensor | None, law: Law, to: torch.dtype) -> Tensor:
    """Computed wide, rounded once."""
    wide = weight.to(law.scale.dtype)
    args = KEY, law.threshold, law.scale, None
    return masked_formula(wide, anchor, *args).to(to)


@dtypes
@pytest.mark.parametrize("numbers", [True, False], ids=["host", "memory"])
def test_every_size_and_every_dtype_of_the_result(dtype, numbers: bool, gpu_kernels) -> None:
    """Key and law come from the host or from memory, as in a CUDA graph."""
    for p in (0.0, 0.3, 1.0):
        law = Law.of(p, CPU, dtype)
        known = law if numbers else Law(law.threshold, law.scale)
        for size in (1, 2, 16, 1000, 1024, 1040, 2049):
            weight, anchor, grad = torch.randn(3, size).to(dtype).unbind()
            for to in {dtype, torch.float32, torch.bfloat16} if dtype != torch.float64 else {dtype}:
                for towards in (None, anchor):
                    given = grad.to(to).clone()
                    expected = formula(given, None, law, dtype)
                    layout = Layout.elements(size)
                    found = masks.masked(weight, towards, given, Mask(KEY, known, layout), to)
                    assert found is not None
                    assert torch.equal(found[0], formula(weight, towards, law, to))
                    assert torch.equal(found[1], expected)


def test_special_values_and_addresses_that_are_not_aligned(gpu_kernels) -> None:
    law = Law.of(0.5, CPU, torch.float32)
    weight = torch.tensor([float("inf"), float("nan"), -0.0, 3e38, 1e-45] * 99)[1:]
    used, _ = masks.masked(weight, None, None, Mask(KEY, law, Layout.elements(len(weight))))
    expected = formula(weight, None, law, torch.float32)
    assert torch.equal(used.view(torch.int32), expected.view(torch.int32))


def test_an_index_beyond_2_to_the_31(gpu_kernels) -> None:
    """Kernels see parts of a weight, each with the key that has moved to its start."""
    law = Law.of(0.5, CPU, torch.float32)
    layout = Layout.elements(64)
    for start in (1 << 31, (1 << 32) - 3, 1 << 32, 3 << 33):
        used, same = (
            masks.masked(torch.ones(64), None, None, Mask(advance_key(key, start), law, layout))[0]
            for key in (KEY, words(KEY))  # a tensor, and on the host
        )
        assert torch.equal(used, same)
        index = torch.arange(start, start + 64)
        if start >> 32 == (start + 63) >> 32:
            part = advance_key(KEY, start - start % (1 << 32)) if start >> 32 else KEY
            keep = hash_bits((index % (1 << 32)).to(torch.int32), part) >= law.threshold
            assert torch.equal(used != 0, keep)


@pytest.mark.parametrize(
    ("view", "mask"),
    [
        ((6, 5), (6, 1)),
        ((6, 5), (1, 5)),
        ((6, 5), (1, 1)),
        ((4, 3, 6), (4, 1, 6)),
        ((4, 3, 6, 2), (1, 3, 1, 2)),
        ((4, 3, 6, 2), (4, 3, 1, 1)),
        ((1, 3, 1, 2), (1, 3, 1, 1)),
        ((2, 3, 4, 5, 6), (2, 1, 4, 1, 6)),
    ],
)
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_shared_masks(view, mask, p: float, gpu_kernels) -> None:
    law, layout = Law.of(p, CPU, torch.float32), Layout(view, mask)
    weight, anchor = torch.randn(view), torch.randn(view)
    for towards in (None, anchor):
        used = drop_weight(weight, KEY, law, layout, towards)
        assert torch.equal(
            used, masked_formula(weight, towards, KEY, law.threshold, law.scale, mask)
        )
    turns = len(view) == 5  # five dimensions that take turns: the formula
    assert gpu_kernels == ([] if turns else ["drop_shared"] * 2)


def test_strides_of_the_weight_are_kept(gpu_kernels) -> None:
    weight = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
    law, layout = Law.of(0.4, CPU, torch.float32), Layout.elements(weight.numel())
    used = drop_weight(weight, KEY, law, layout)
    assert used.stride() == weight.stride()
    assert torch.equal(used, drop_weight(weight.contiguous(), KEY, law, layout))


@dtypes
def test_a_gradient_of_another_dtype(dtype, gpu_kernels) -> None:
    """Under autocast the gradient of a float32 weight is narrow."""
    weight, grad = torch.randn(33, 31), torch.randn(33, 31).to(dtype)
    law, layout = Law.of(0.4, CPU, torch.float32), Layout.elements(weight.numel())
    expected = formula(grad.flatten(), None, law, torch.float32)  # now: the grad may be overwritten
    masked = masks.masked(weight, None, grad, Mask(KEY, law, layout), torch.bfloat16)
    assert masked is not None
    used, of_weight = masked
    assert used.dtype == torch.bfloat16
    assert of_weight is not None
    assert of_weight.dtype == torch.float32
    assert torch.equal(of_weight.flatten(), expected)


@pytest.mark.parametrize("anchored", [False, True], ids=["zero", "pretrained"])
@pytest.mark.parametrize("narrow", [None, torch.bfloat16, torch.float16], ids=str)
def test_a_linear_against_autograd(anchored: bool, narrow, gpu_kernels) -> None:
    """To the bit, with and without autocast, for one, two and three dimensions more."""
    law, layout = Law.of(0.4, CPU, torch.float32), Layout.elements(35)
    anchor = torch.randn(7, 5) if anchored else None
    for shape in ((6, 5), (2, 3, 5)):
        x, weight, bias = torch.randn(shape), torch.randn(7, 5), torch.randn(7)
        results = []
        for way in (
            lambda x, w, b: masked_linear(x, w, b, KEY, law, layout, anchor),
            lambda x, w, b: F.linear(x, drop_weight(w, KEY, law, layout, anchor), b),
        ):
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            with torch.autocast("cpu", narrow or torch.bfloat16, enabled=narrow is not None):
                product = way(*leaves)
            assert product.dtype == (narrow or torch.float32)
            grads = torch.autograd.grad(product.double().square().sum(), leaves)
            results.append([product, *grads])
        for found, expected in zip(*results):
            assert torch.equal(found, expected)


def test_double_backward_under_autocast(gpu_kernels) -> None:
    law, layout = Law.of(0.4, CPU, torch.float32), Layout.elements(35)
    x, weight = torch.randn(6, 5), torch.randn(7, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        product = masked_linear(x, weight, None, KEY, law, layout)
    (grad,) = torch.autograd.grad(product.float().pow(3).sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), weight)
    assert second.dtype == torch.float32
    dropped = drop_weight(torch.ones(7, 5), KEY, law, layout) == 0
    assert (second[dropped] == 0).all()
    assert (second[~dropped] != 0).any()


def test_an_operated_layer_trains_by_them(gpu_kernels, monkeypatch) -> None:
    """The whole way, against the same masks on the CPU."""
    model = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))
    apply_dropconnect(model, nn.Linear, p=0.3)
    x = torch.randn(5, 12)
    torch.manual_seed(3)
    model(x).square().sum().backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    assert gpu_kernels == ["drop"] * 4
    model.zero_grad()
    torch.manual_seed(3)
    with monkeypatch.context() as without:
        set_constant(without, "interpreted devices", set())
        model(x).square().sum().backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(found, model.parameters()))
    with hold_masks(model):
        assert torch.equal(model(x), model(x))


class Seen(TorchDispatchMode):
    """Which operations are done."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mode_sees_an_operator_and_not_what_a_kernel_writes(dtype, gpu_kernels) -> None:
    """The same values, of a masked weight in its dtype and in another, forward and backward."""
    weight, x = torch.randn(6, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    law, layout = Law.of(0.4, CPU, weight.dtype), Layout.elements(48)

    def step() -> list[Tensor]:
        used = drop_weight(weight, KEY, law, layout, dtype=dtype)
        out = masked_linear(x, weight, None, KEY, law, layout).sum() + used.float().square().sum()
        return [out.detach(), used.detach(), *torch.autograd.grad(out, (x, weight))]

    expected = step()
    with Seen() as seen:
        found = step()
    assert "surgery.drop.default" in seen.names
    assert not [name for name in seen.names if "empty" in name]
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)
    assert torch.equal(found[1], expected[1])
