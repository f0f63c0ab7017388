"""Infinities, NaN, subnormal and huge numbers, and p at the ends of its range: the rules of
`docs/reliability.md`, on every way to a masked weight.

A dropped entry is gone, whatever it was; all else goes where torch's own product takes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.ops import (
    Law,
    Layout,
    drop_weight,
    example_linear,
    gaussian_linear,
    key_from_seed,
    linear_moments,
)
from surgery.ops.law import Mask
from surgery.ops.mask import drop_both

from ..expected import example_weights, keep, keep_examples, masked
from ..helpers import bits, sorts

CPU = torch.device("cpu")
KEY = key_from_seed(5)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
RATES = [1e-12, 1e-8, 0.5, 0.999, 1 - 2**-32, 1 - 1e-12]
SHAPE = (83, 122)
SPECIAL = (math.inf, -math.inf, math.nan, 0.0, -0.0, 1.0, -1.0)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
towards = pytest.mark.parametrize("anchored", [False, True], ids=["zero", "pretrained"])


def specials(dtype: torch.dtype) -> Tensor:
    """A quarter is ordinary; the rest is what a dtype has at its ends."""
    about = torch.finfo(dtype)
    ends = (about.max, -about.max, about.tiny, about.tiny / 2, about.tiny * about.eps)
    of = torch.tensor([*SPECIAL, *ends], dtype=torch.float64).to(dtype)
    chosen = of[torch.randint(len(of), SHAPE)]
    return torch.where(torch.rand(SHAPE) < 0.25, torch.randn(SHAPE).to(dtype), chosen)


@every_dtype
@towards
@pytest.mark.parametrize("unit", ["element", "input"])
def test_all_ways_to_a_masked_weight_agree(
    unit: str, dtype: torch.dtype, anchored: bool, switch_kernels: Callable[[bool], bool]
) -> None:
    weight, anchor, grad = specials(dtype), specials(dtype) if anchored else None, specials(dtype)
    by_element = unit == "element"
    layout = Layout.elements(weight.numel()) if by_element else Layout.shared(SHAPE, (1,))
    for p in RATES:
        law, mask = Law.of(p, CPU, dtype), keep(KEY, p, *(SHAPE if by_element else (1, SHAPE[1])))
        mask = mask.expand(SHAPE).bool()
        if dropped_all := p > 1 - 2**-33:
            mask = torch.zeros_like(mask)
        wide = masked(weight, mask, 1.0 if dropped_all else p, anchor)
        of_grad = masked(grad, mask, 1.0 if dropped_all else p)
        for kernels in (True, False):
            switch_kernels(kernels)
            leaf = weight.clone().requires_grad_()
            used = drop_weight(leaf, KEY, law, layout, anchor)
            found = [(used, torch.autograd.grad(used, leaf, grad)[0])]
            with torch.no_grad():
                found.append(drop_both(weight, anchor, grad.clone(), Mask(KEY, law, layout)))
            for value, of_weight in found:
                assert torch.equal(bits(value), bits(wide))
                assert torch.equal(bits(of_weight), bits(of_grad))


def check_products(dtype: torch.dtype, rows: int, anchored: bool, bad: str) -> None:
    """The product of each example, and its gradients, with two numbers in `bad` that are none."""
    x, grad = torch.randn(5, rows, 21).to(dtype), torch.randn(5, rows, 7).to(dtype)
    weight, anchor = torch.randn(2, 7, 21).to(dtype)
    place = {"x": x, "grad": grad, "weight": weight}[bad].view(-1)
    place[3], place[17] = math.inf, math.nan
    towards = anchor if anchored else None
    law, (own, leaf) = Law.of(0.5, CPU, dtype), (x.clone(), weight.clone())
    out = example_linear(own.requires_grad_(), leaf.requires_grad_(), KEY, law, "element", towards)
    found = out.detach(), *torch.autograd.grad(out, (own, leaf), grad)
    wide = law.scale.dtype
    used = example_weights(weight, 5, KEY, 0.5, "element", towards).to(wide)
    mask = keep_examples(KEY, 0.5, 5, 7, 21).bool()
    outer = torch.where(mask, grad.to(wide).mT @ x.to(wide) * law.scale, 0.0).sum(0)
    expected = x.to(wide) @ used.mT, grad.to(wide) @ used, outer
    for one, other in zip(found, expected):
        assert torch.equal(sorts(one), sorts(other.to(dtype)))


@every_dtype
@towards
@pytest.mark.parametrize("bad", ["x", "grad", "weight"])
def test_products_of_examples_pass_on_what_is_no_number(
    bad: str, anchored: bool, dtype: torch.dtype, switch_kernels: Callable[[bool], bool]
) -> None:
    for kernels in (True, False):
        switch_kernels(kernels)
        for rows in (1, 6):
            check_products(dtype, rows, anchored, bad)


@pytest.mark.parametrize("bad", ["x", "weight"])
def test_what_only_the_other_gradient_needs_may_be_no_number(bad: str) -> None:
    """In a gradient that is asked for alone, nothing of the other's tensor is seen."""
    x, weight, grad = torch.randn(5, 1, 21), torch.randn(7, 21), torch.randn(5, 1, 7)
    asked, law, found = weight if bad == "weight" else x, Law.of(0.5, CPU, torch.float32), []
    asked.requires_grad_()
    for value in (1.0, math.nan):
        asked.data.view(-1)[3] = value
        product = example_linear(x, weight, KEY, law, "element")
        found.append(torch.autograd.grad(product, asked, grad)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("bad", ["x", "grad", "weight"])
def test_so_do_those_of_the_gpu(bad: str, gpu_kernels: list[str]) -> None:
    check_products(torch.float32, 1, False, bad)
    assert gpu_kernels


def test_what_p_is_rounded_to() -> None:
    """A multiple of 2^-32: nearer to 0 nothing is dropped, and nearer to 1 all."""
    for p, dropped in ((1e-10, 0), (1.2e-10, 1), (1 - 1.2e-10, 2**32 - 1), (1 - 1e-10, 2**32)):
        law = Law.of(p, CPU, torch.float32)
        scale = 0.0 if dropped == 2**32 else 2**32 / (2**32 - dropped)
        assert float(law.scale) == pytest.approx(scale, rel=1e-7)
        assert law.drops_all is (dropped == 2**32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_the_variance_of_a_small_p_has_all_its_digits(dtype: torch.dtype) -> None:
    """In float32, 1 / (1 - p) is 1 for p = 1e-8."""
    for p in (1e-8, 1e-6, 1e-3, 0.3, 0.999, 1 - 2**-32):
        rounded = round(p * 2**32) / 2**32
        ratio = Law.of(p, CPU, dtype).ratio
        assert float(ratio) == pytest.approx(rounded / (1 - rounded), rel=3e-7)
    assert [float(Law.of(p, CPU, dtype).ratio) for p in (0.0, 1.0)] == [0.0, 0.0]


def test_a_variance_beyond_float16_is_drawn_from() -> None:
    """Standard deviations of 400 fit; their squares do not."""
    x, weight = torch.full((64, 16), 10.0).half(), torch.full((8, 16), 0.32).half()
    law = Law.of(0.999, CPU, torch.float16)
    mean, variance = linear_moments(x, weight, None, law, "element")
    assert float(variance.min()) > torch.finfo(torch.float16).max
    sample = gaussian_linear(x, weight, None, law, "element")
    assert sample.dtype == torch.float16
    assert sample.isfinite().all()
    z = (sample.double() - mean.double()) / variance.double().sqrt()
    assert abs(float(z.std()) - 1) < 4 / math.sqrt(2 * z.numel())


def test_sixteen_bits_overflow_only_where_the_result_does() -> None:
    """1 / (1 - p) may be any number: it is one of float32, and the product is rounded once."""
    weight = torch.tensor([0.5, -3.0, 60.0, 70.0, 3e-8]).half()
    law = Law.of(0.999, CPU, torch.float16)
    always = Law(torch.tensor(-(2**31), dtype=torch.int32), law.scale)
    used = drop_weight(weight, KEY, always, Layout.elements(5))
    assert used.tolist() == (weight.float() * 1000.00006).half().tolist()
    assert used.isinf().tolist() == [False, False, False, True, False]


def test_squares_that_a_gradient_needs_are_not_used_again() -> None:
    """Those of a frozen weight, for the gradient of the input: memory that the next weight takes."""
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(5, 6)
    law = Law.of(0.5, CPU, torch.float32)
    variance = linear_moments(x, weight, None, law, "element")[1]
    with torch.no_grad():
        linear_moments(torch.randn(4, 6), torch.randn(5, 6), None, law, "element")
    (found,) = torch.autograd.grad(variance.sum(), x)
    y = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad(F.linear(y.square(), weight.square()).sum(), y)
    torch.testing.assert_close(found, expected)
