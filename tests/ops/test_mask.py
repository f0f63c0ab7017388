"""The masked weight is `A + m (W - A) / (1 - p)`, for every layout, dtype, shape and probability."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery.ops import Law, Layout, drop_weight, hash_bits, keep_mask, key_from_seed

from ..internals import set_constant, without_extension

KEY = key_from_seed(11)
CPU = torch.device("cpu")
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NARROW = [torch.float8_e4m3fn, torch.float8_e5m2]

SHAPE = (4, 6, 5)
LAYOUTS = {
    "element": Layout.elements(math.prod(SHAPE)),
    "tensor": Layout.shared(SHAPE, ()),
    "first": Layout.shared(SHAPE, (0,)),
    "middle": Layout.shared(SHAPE, (1,)),
    "outer": Layout.shared(SHAPE, (0, 2)),
    "regrouped": Layout.shared((2, 2, 6, 5), (0, 2)),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
towards = pytest.mark.parametrize("anchored", [False, True], ids=["zero", "pretrained"])
probabilities = pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])


def law(p: float, dtype: torch.dtype = torch.float32) -> Law:
    return Law.of(p, CPU, dtype)


def mask_of(key: Tensor, p: float, layout: Layout, shape: tuple[int, ...]) -> Tensor:
    """The keep mask of every weight, entry by entry in Python integers."""
    dropped = round(p * 2**32)
    bits = hash_bits(torch.arange(layout.entries, dtype=torch.int32), key)
    kept = [int(word) + 2**31 >= dropped for word in bits]
    return torch.tensor(kept, dtype=torch.bool).view(layout.mask).expand(layout.view).reshape(shape)


def reference(weight: Tensor, anchor: Tensor | None, p: float, layout: Layout) -> Tensor:
    """The design's formula, in float64, for the p that acts: a multiple of 2**-32."""
    p = round(p * 2**32) / 2**32
    wide = weight.double()
    towards = torch.zeros_like(wide) if anchor is None else anchor.double()
    mask = mask_of(KEY, p, layout, tuple(weight.shape)).double()
    return towards + mask * (wide - towards) / (1 - p) if p < 1 else towards


def pair(anchored: bool, dtype: torch.dtype, shape=SHAPE) -> tuple[Tensor, Tensor | None]:
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype) if anchored else None


@layouts
@towards
@probabilities
def test_closed_form(layout: Layout, anchored: bool, p: float) -> None:
    weight, anchor = pair(anchored, torch.float64)
    used = drop_weight(weight, KEY, law(p, torch.float64), layout, anchor)
    torch.testing.assert_close(used, reference(weight, anchor, p, layout), rtol=1e-14, atol=1e-14)


@towards
@pytest.mark.parametrize("dtype", FLOATS + NARROW, ids=str)
def test_dtypes(dtype: torch.dtype, anchored: bool) -> None:
    """Narrow floats are rounded once: the result is the nearest to the float32 one."""
    weight, anchor = pair(anchored, dtype)
    layout = LAYOUTS["element"]
    used = drop_weight(weight, KEY, law(0.3, dtype), layout, anchor)
    assert used.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = drop_weight(
        weight.to(wide), KEY, law(0.3, wide), layout, None if anchor is None else anchor.to(wide)
    )
    assert torch.equal(used.float(), expected.to(dtype).float())
    exact = reference(weight, anchor, 0.3, layout)
    step = torch.finfo(dtype).eps if dtype not in NARROW else 0.5
    torch.testing.assert_close(used.double(), exact, rtol=step, atol=4 * step)


@layouts
@towards
@pytest.mark.parametrize("dtype", FLOATS + NARROW, ids=str)
def test_p_zero_is_exact(layout: Layout, anchored: bool, dtype: torch.dtype) -> None:
    weight, anchor = pair(anchored, dtype)
    used = drop_weight(weight, KEY, law(0.0, dtype), layout, anchor)
    assert torch.equal(used.view(torch.uint8), weight.view(torch.uint8))


@layouts
@towards
@pytest.mark.parametrize("dtype", FLOATS + NARROW, ids=str)
def test_p_one_gives_the_anchor(layout: Layout, anchored: bool, dtype: torch.dtype) -> None:
    weight, anchor = pair(anchored, dtype)
    used = drop_weight(weight, KEY, law(1.0, dtype), layout, anchor)
    expected = torch.zeros(SHAPE).to(dtype) if anchor is None else anchor
    assert torch.equal(used.view(torch.uint8), expected.view(torch.uint8))


@towards
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_extreme_p_has_exact_gradient(anchored: bool, p: float) -> None:
    weight, anchor = pair(anchored, torch.float32)
    weight.requires_grad_()
    drop_weight(weight, KEY, law(p), LAYOUTS["element"], anchor).sum().backward()
    assert torch.equal(weight.grad, torch.full(SHAPE, 1 - p))


def test_dropped_infinities_are_dropped() -> None:
    """A dropped weight is gone, whatever it was: no 0 * inf."""
    weight = torch.full(SHAPE, math.inf)
    used = drop_weight(weight, KEY, law(0.5), LAYOUTS["element"])
    mask = mask_of(KEY, 0.5, LAYOUTS["element"], SHAPE)
    assert torch.equal(used, torch.where(mask, math.inf, 0.0))


@layouts
@towards
def test_gradients(layout: Layout, anchored: bool) -> None:
    weight, anchor = pair(anchored, torch.float64)
    weight.requires_grad_()
    half = law(0.4, torch.float64)

    def used(value: Tensor) -> Tensor:
        return drop_weight(value, KEY, half, layout, anchor).sin()

    assert torch.autograd.gradcheck(used, weight)
    assert torch.autograd.gradgradcheck(used, weight)


@towards
def test_expectation_is_the_weight(anchored: bool, check_mean) -> None:
    weight, anchor = pair(anchored, torch.float64, (64,))
    seeds = iter(range(4000))
    rule, layout = law(0.3, torch.float64), Layout.elements(64)

    def draw() -> Tensor:
        return drop_weight(weight, key_from_seed(next(seeds)), rule, layout, anchor)

    check_mean(draw, weight, 4000)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("unit", ["element", "tensor"])
def test_tiny_shapes(shape: tuple[int, ...], dtype: torch.dtype, unit: str) -> None:
    weight = torch.randn(shape).to(dtype).requires_grad_()
    layout = Layout.elements(weight.numel()) if unit == "element" else Layout.shared(shape, ())
    used = drop_weight(weight, KEY, law(0.5, dtype), layout)
    assert used.shape == shape
    mask = mask_of(KEY, 0.5, layout, shape)
    assert torch.equal(used, torch.where(mask, weight * 2, 0).to(dtype))
    used.sum().backward()
    assert torch.equal(weight.grad, mask.to(dtype) * 2)


def strided() -> dict[str, Tensor]:
    return {
        "transposed": torch.randn(6, 20).t(),
        "channels-last": torch.randn(4, 3, 5, 2).to(memory_format=torch.channels_last),
        "channels-last-3d": torch.randn(2, 3, 4, 5, 2).to(memory_format=torch.channels_last_3d),
        "permuted": torch.randn(3, 4, 5).permute(2, 0, 1),
    }


@pytest.mark.parametrize("name", strided())
@towards
def test_strides_are_kept_and_the_mask_is_that_of_the_contiguous(name: str, anchored: bool) -> None:
    weight = strided()[name]
    anchor = torch.randn_like(weight) if anchored else None
    layout = Layout.elements(weight.numel())
    used = drop_weight(weight, KEY, law(0.5), layout, anchor)
    plain_anchor = None if anchor is None else anchor.contiguous()
    expected = drop_weight(weight.contiguous(), KEY, law(0.5), layout, plain_anchor)
    assert used.stride() == weight.stride()
    assert torch.equal(used, expected)


def test_slices_with_gaps() -> None:
    """A slice has gaps in memory; the result is dense, and the mask is by row and column."""
    weight = torch.randn(8, 10)[::2, 1:7]
    layout = Layout.elements(weight.numel())
    used = drop_weight(weight, KEY, law(0.5), layout)
    assert torch.equal(used, drop_weight(weight.contiguous(), KEY, law(0.5), layout))


@pytest.mark.parametrize(
    "shape", [(2**31 + 8,), (70_000, 40_000), (3, 2**30 + 1)], ids=["vector", "matrix", "ragged"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_more_than_2_to_31_weights_on_meta(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
    device = weight.device
    rule = Law.of(0.5, device, dtype)
    used = drop_weight(weight, KEY.to(device), rule, Layout.elements(weight.numel()))
    assert used.shape == shape
    assert used.dtype == dtype
    used.sum().backward()
    assert weight.grad.shape == shape


def test_segments_do_not_change_the_mask(monkeypatch) -> None:
    weight = torch.randn(1000)
    whole = drop_weight(weight, KEY, law(0.3), Layout.elements(1000))
    set_constant(monkeypatch, "segment", 64)
    assert torch.equal(drop_weight(weight, KEY, law(0.3), Layout.elements(1000)), whole)


@pytest.mark.parametrize("p", [0.0, 2**-33, 2**-32, 0.1, 0.5, 1 - 2**-32, 1 - 2**-34, 1.0])
def test_law_rounds_p_to_the_resolution_of_the_bits(p: float) -> None:
    """P(drop) is a multiple of 2**-32, and the scale is exact for the p that acts."""
    rule = law(p, torch.float64)
    acts = (int(rule.threshold) + 2**31) / 2**32  # entries below the threshold are dropped
    if round(p * 2**32) == 2**32:
        assert int(rule.threshold) == 2**31 - 1
        assert float(rule.scale) == 0.0
    else:
        assert acts == round(p * 2**32) / 2**32
        assert float(rule.scale) == 1 / (1 - acts)


@pytest.mark.parametrize("dtype", FLOATS + NARROW, ids=str)
def test_law_precision_and_fit(dtype: torch.dtype) -> None:
    rule = law(0.5, dtype)
    assert rule.threshold.dtype == torch.int32
    assert rule.scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert rule.fits(torch.zeros(1, dtype=dtype))
    assert not rule.fits(torch.zeros(1, dtype=dtype, device="meta"))
    other = torch.float32 if dtype == torch.float64 else torch.float64
    assert not rule.fits(torch.zeros(1, dtype=other))


def test_keep_mask_is_row_major() -> None:
    threshold = law(0.5).threshold
    flat = keep_mask((24,), KEY, threshold)
    assert flat.dtype == torch.bool
    assert torch.equal(keep_mask((2, 3, 4), KEY, threshold), flat.view(2, 3, 4))


@layouts
@towards
def test_backward_keeps_the_key_and_two_scalars(
    layout: Layout, anchored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_extension(monkeypatch)  # whose node keeps numbers
    weight, anchor = pair(anchored, torch.float32)
    weight.requires_grad_()
    used = drop_weight(weight, KEY, law(0.5), layout, anchor)
    node: Any = used.grad_fn
    held = [*vars(node).values(), node.mask.key, *vars(node.mask.law).values()]
    kept = [*node.saved_tensors, *(value for value in held if isinstance(value, Tensor))]
    assert sorted(tensor.numel() for tensor in kept) == [1, 1, 2]
    assert sum(tensor.numel() * tensor.element_size() for tensor in kept) == 16


@towards
def test_functional_transforms(anchored: bool) -> None:
    """`torch.func` transforms see the plain formula."""
    weight, anchor = pair(anchored, torch.float64)
    layout, rule = LAYOUTS["element"], law(0.5, torch.float64)

    def loss(value: Tensor) -> Tensor:
        return drop_weight(value, KEY, rule, layout, anchor).square().sum()

    leaf = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(weight), expected, rtol=0, atol=0)
    batch = torch.stack([weight, 2 * weight])
    each = torch.stack([loss(part) for part in batch])
    torch.testing.assert_close(torch.func.vmap(loss)(batch), each)
