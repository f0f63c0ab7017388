"""A mask for each example: against the masked weights of all examples, held at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.ops import (
    Law,
    Layout,
    drop_weight,
    example_linear,
    example_vector,
    key_from_seed,
)
from surgery.spec.config import Unit

from ..expected import example_weights, keep, mask_shape, masked
from ..internals import set_constant

CPU = torch.device("cpu")

KEY = key_from_seed(41)

UNITS = ["element", "input", "output", "tensor"]

units = pytest.mark.parametrize("unit", UNITS)

towards = pytest.mark.parametrize("anchored", [False, True], ids=["zero", "pretrained"])

SHAPES = {"1x1x1x1": (1, 1, 1, 1), "3x1x5x4": (3, 1, 5, 4), "4x7x6x3": (4, 7, 6, 3)}

"""Examples x rows x in x out."""

COMPILED = {"rows drawn inside": (12, 1, 48, 40), "blocks": (5, 6, 48, 40)}

"""Large enough to compile."""


def law(p: float, dtype: torch.dtype = torch.float64) -> Law:
    return Law.of(p, CPU, dtype)


def tensors(sizes: tuple[int, ...], anchored: bool, dtype: torch.dtype = torch.float64):
    examples, rows, inputs, outputs = sizes
    x = torch.randn(examples, rows, inputs).to(dtype).requires_grad_()
    weight = torch.randn(outputs, inputs).to(dtype).requires_grad_()
    return x, weight, torch.randn(outputs, inputs).to(dtype) if anchored else None


def naive(x: Tensor, weight: Tensor, p: float, unit: Unit, anchor: Tensor | None) -> Tensor:
    return x @ example_weights(weight, len(x), KEY, p, unit, anchor).mT


def check(sizes, unit: Unit, anchored: bool, p: float, dtype=torch.float64) -> None:
    x, weight, anchor = tensors(sizes, anchored, dtype)
    found = example_linear(x, weight, KEY, law(p, dtype), unit, anchor)
    expected = naive(x, weight, p, unit, anchor)
    direction = torch.randn_like(found)
    step = 200 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=step, atol=step)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), direction) for y in (found, expected))):
        torch.testing.assert_close(a, b, rtol=step, atol=step)


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
@units
@towards
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_against_all_weights_at_once(sizes, unit: Unit, anchored: bool, p: float) -> None:
    check(sizes, unit, anchored, p)


@units
@towards
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_bias_and_examples_of_one_row(unit: Unit, anchored: bool, dtype: torch.dtype) -> None:
    """A bias is added as it is; (examples, in) is (examples, 1, in)."""
    x, weight, anchor = tensors((6, 1, 12, 10), anchored, dtype)
    bias = torch.randn(10).requires_grad_()
    flat = x.detach()[:, 0].requires_grad_()
    rule, leaves = law(0.3, dtype), (flat, weight, bias)
    found = example_linear(flat, weight, KEY, rule, unit, anchor, bias=bias)
    expected = naive(x, weight, 0.3, unit, anchor)[:, 0] + bias.to(dtype)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(found)
    gradients = torch.autograd.grad(found, leaves, direction)
    of_x, of_weight, of_bias = torch.autograd.grad(expected, (x, weight, bias), direction)
    for a, b in zip(gradients, (of_x[:, 0], of_weight, of_bias)):
        torch.testing.assert_close(a, b)
    together = example_linear(x, weight, KEY, rule, unit, anchor, bias=bias)
    assert torch.equal(together[:, 0], found)
    if dtype == torch.float64:
        bias = bias.detach().double().requires_grad_()
        assert torch.autograd.gradgradcheck(
            lambda x, w, b: example_linear(x, w, KEY, rule, unit, anchor, bias=b),
            (flat, weight, bias),
        )


@pytest.mark.compiler
@pytest.mark.parametrize("sizes", COMPILED.values(), ids=COMPILED)
@towards
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kernels_against_all_weights_at_once(sizes, anchored: bool, dtype) -> None:
    check(sizes, "element", anchored, 0.3, dtype)


@pytest.mark.compiler
@towards
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("examples", [1, 2, 3, 7, 8, 15])
@pytest.mark.parametrize("width", [1, 5, 8, 17, 33])
def test_product_kernels_of_ragged_sizes(width, examples, p, anchored: bool) -> None:
    """Blocks of 8, 4, 2 and 1 rows, vectors with a rest, outputs by four and one by one."""
    for outputs in (1, 4, 6):
        check((examples, 1, width, outputs), "element", anchored, p, torch.float32)


@pytest.mark.compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_products(threads: int) -> None:
    x, weight, _ = tensors((9, 2, 100, 30), False, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            product = example_linear(x, weight, KEY, law(0.3, torch.float32), "element")
            results.append([product, *torch.autograd.grad(product.cos().sum(), (x, weight))])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("sizes", COMPILED.values(), ids=COMPILED)
@towards
def test_plain_against_all_weights_at_once(
    sizes, anchored: bool, monkeypatch, switch_kernels
) -> None:
    """Without a compiler, and with blocks of some rows of one example, or of several examples."""
    switch_kernels(False)
    for chunk in (100, 1 << 13, 1 << 16):
        set_constant(monkeypatch, "chunk of examples", chunk)
        check(sizes, "element", anchored, 0.3)


@pytest.mark.compiler
@towards
@pytest.mark.parametrize("block", [100, 2000, 5000])
def test_blocks_do_not_change_what_kernels_give(block: int, anchored: bool, monkeypatch) -> None:
    """Some rows of one example, or several examples."""
    set_constant(monkeypatch, "block of examples", block)
    for dtype in (torch.float32, torch.float64):
        check(COMPILED["blocks"], "element", anchored, 0.3, dtype)


@units
def test_gradcheck(unit: Unit) -> None:
    for anchored in (False, True):
        x, weight, anchor = tensors((3, 2, 4, 3), anchored)

        def layer(x, weight, anchor=anchor):
            return example_linear(x, weight, KEY, law(0.4), unit, anchor).sin()

        assert torch.autograd.gradcheck(layer, (x, weight))
        assert torch.autograd.gradgradcheck(layer, (x, weight))


@units
@towards
def test_a_single_example_has_the_mask_of_the_whole_weight(unit: Unit, anchored: bool) -> None:
    """Bit for bit: each row of the product of the unit matrix is a row of the masked weight."""
    _, weight, anchor = tensors((1, 1, 8, 5), anchored, torch.float32)
    own = {"element": (0, 1), "input": (1,), "output": (0,), "tensor": ()}[unit]
    layout = Layout.shared((5, 8), own) if unit != "element" else Layout.elements(40)
    expected = drop_weight(weight, KEY, law(0.5, torch.float32), layout, anchor)
    x = torch.eye(8)[None]
    found = example_linear(x, weight, KEY, law(0.5, torch.float32), unit, anchor)
    if anchor is None:
        assert torch.equal(found[0].t(), expected)
    else:  # the cheap forms add two products
        torch.testing.assert_close(found[0].t(), expected)


@units
def test_p_zero_is_the_plain_layer_and_p_one_the_anchor(unit: Unit) -> None:
    x, weight, anchor = tensors((3, 2, 8, 5), True, torch.float32)
    one, zero = law(1.0, torch.float32), law(0.0, torch.float32)
    exact = unit != "element"  # the product of each example is rounded in its own order
    compare = torch.equal if exact else torch.allclose
    for towards in (None, anchor):
        assert compare(example_linear(x, weight, KEY, zero, unit, towards), F.linear(x, weight))
    dropped = example_linear(x, weight, KEY, one, unit, anchor)
    assert compare(dropped, F.linear(x, anchor))
    assert torch.equal(example_linear(x, weight, KEY, one, unit), torch.zeros(3, 2, 5))


def test_strides_do_not_matter() -> None:
    """transformers' Conv1D passes the transpose of its weight."""
    x, weight, _ = tensors((3, 2, 8, 5), False)
    stored = weight.detach().t().contiguous().requires_grad_()
    found = example_linear(x, stored.t(), KEY, law(0.3), "element")
    expected = example_linear(x, weight, KEY, law(0.3), "element")
    assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), stored)
    assert torch.equal(gradient.t(), torch.autograd.grad(expected.sum(), weight)[0])


def test_examples_have_different_masks(check_mean) -> None:
    weight, x = torch.randn(4, 6).double(), torch.randn(1, 1, 6).double().expand(50, 1, 6)
    products = example_linear(x, weight, KEY, law(0.5), "element")
    assert len(products.flatten(1).unique(dim=0)) == 50
    seeds = iter(range(2000))

    def draw() -> Tensor:
        return example_linear(x[:3], weight, key_from_seed(next(seeds)), law(0.5), "element")

    check_mean(draw, F.linear(x[:3], weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(3, 1, 64, 8), (2, 6, 64, 8)], ids=str)
def test_narrow_dtypes(dtype: torch.dtype, sizes) -> None:
    x, weight, anchor = tensors(sizes, True, dtype)
    found = example_linear(x, weight, KEY, law(0.3, dtype), "element", anchor)
    wide = [t.detach().float().requires_grad_() for t in (x, weight)]
    expected = naive(wide[0], wide[1], 0.3, "element", anchor.float())
    assert found.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(found.float(), expected, rtol=4 * step, atol=16 * step)
    direction = torch.randn_like(found)
    gradients = torch.autograd.grad(found, (x, weight), direction)
    exact = torch.autograd.grad(expected, wide, direction.float())
    for a, b in zip(gradients, exact):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), b, rtol=4 * step, atol=16 * step)


@units
def test_autocast_computes_in_its_dtype(unit: Unit) -> None:
    x, weight, _ = tensors((3, 2, 8, 5), False, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = example_linear(x, weight, KEY, law(0.3, torch.float32), unit)
    assert found.dtype == torch.bfloat16
    found.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("wanted", ["x", "weight", "neither"])
@pytest.mark.parametrize("rows", [1, 6])
def test_only_the_gradients_that_are_wanted(wanted: str, rows: int) -> None:
    x, weight, _ = tensors((3, rows, 8, 5), False)
    rule = law(0.3)
    both = torch.autograd.grad(example_linear(x, weight, KEY, rule, "element").sum(), (x, weight))
    x.requires_grad_(wanted == "x")
    weight.requires_grad_(wanted == "weight")
    product = example_linear(x, weight, KEY, rule, "element")
    assert product.requires_grad == (wanted != "neither")
    if wanted != "neither":
        product.sum().backward()
        assert x.grad is None or torch.equal(x.grad, both[0])
        assert weight.grad is None or torch.equal(weight.grad, both[1])


@pytest.mark.parametrize("sizes", [(0, 2, 4, 3), (2, 0, 4, 3), (2, 2, 0, 3), (2, 2, 4, 0)], ids=str)
@units
def test_empty(sizes, unit: Unit) -> None:
    x, weight, _ = tensors(sizes, False)
    product = example_linear(x, weight, KEY, law(0.5), unit)
    assert product.shape == (sizes[0], sizes[1], sizes[3])
    assert not product.any()
    product.sum().backward()
    assert not x.grad.any()
    assert not weight.grad.any()


def test_bad_arguments() -> None:
    rule = law(0.5)
    with pytest.raises(ValueError, match=r"\(examples, \[rows,\] in\).*got \(4,\) and \(2, 4\)"):
        example_linear(torch.zeros(4), torch.zeros(2, 4), KEY, rule, "element")
    with pytest.raises(ValueError, match=r"got \(3, 1, 5\) and \(2, 4\)"):
        example_linear(torch.zeros(3, 1, 5), torch.zeros(2, 4), KEY, rule, "element")
    with pytest.raises(ValueError, match=r"anchor has shape \(4,\), its weight \(2, 4\)"):
        example_linear(torch.zeros(3, 1, 4), torch.zeros(2, 4), KEY, rule, "input", torch.ones(4))
    with pytest.raises(ValueError, match=r"x is torch\.float32 and the weight torch\.float64"):
        example_linear(torch.zeros(3, 1, 4), torch.zeros(2, 4).double(), KEY, rule, "element")
    huge = torch.zeros(1 << 17, device="meta").expand(1 << 16, 1 << 17)
    x = torch.zeros(1, 1, 1 << 17, device="meta")
    with pytest.raises(ValueError, match=r'8589934592 entries.*use sampling="batch"'):
        example_linear(x, huge, KEY, rule, "element")


@units
@towards
def test_vector(unit: Unit, anchored: bool) -> None:
    bias = torch.randn(5).double().requires_grad_()
    anchor = torch.randn(5).double() if anchored else None
    found = example_vector(bias, KEY, law(0.5), unit, 6, anchor)
    mask = keep(KEY, 0.5, 6, *mask_shape((5,), unit))
    torch.testing.assert_close(found, masked(bias, mask, 0.5, anchor))
    assert torch.autograd.gradcheck(
        lambda b: example_vector(b, KEY, law(0.5), unit, 6, anchor), bias
    )


@pytest.mark.parametrize("unit", ["output", "tensor"])
def test_vector_shares_the_mask_of_its_weight(unit: Unit) -> None:
    """With the weight's key, a layer's row and its bias are dropped together."""
    x, weight, _ = tensors((6, 3, 4, 5), False)
    bias = torch.randn(5).double()
    found = example_linear(x, weight, KEY, law(0.5), unit)
    found = found + example_vector(bias, KEY, law(0.5), unit, 6)[:, None]
    mask = keep(KEY, 0.5, 6, 1, 5 if unit == "output" else 1)
    torch.testing.assert_close(found, mask * F.linear(x, weight, bias) * 2)


def test_input_unit_is_dropout() -> None:
    x, weight, _ = tensors((50, 1, 20, 5), False)
    mask = keep(KEY, 0.5, 50, 1, 20)
    assert torch.equal(
        example_linear(x, weight, KEY, law(0.5), "input"), F.linear(x * mask * 2, weight)
    )


def test_tensor_unit_is_stochastic_depth() -> None:
    x, weight, _ = tensors((50, 3, 20, 5), False)
    mask = keep(KEY, 0.5, 50, 1, 1)
    branch = F.linear(x, weight)
    assert torch.equal(example_linear(x, weight, KEY, law(0.5), "tensor"), branch * (mask * 2))
