"""The kernels for the product of each example, in Triton's interpreter: against the masked weights of
all examples, held at once."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from surgery import apply_dropconnect
from surgery.ops import Law, Layout, example_linear, key_from_seed
from surgery.ops.gpu import products
from surgery.ops.law import Mask

from ...expected import example_weights
from ...internals import constant, set_constant


@pytest.fixture(autouse=True)
def few_rows(monkeypatch) -> None:
    """Small tests have many rows."""
    set_constant(monkeypatch, "few rows", 4)


CPU = torch.device("cpu")
KEY = key_from_seed(41)
FEW = ["product", "input_gradient", "weight_gradient"]
MANY = ["masked_weights", "masked_weights", "masked_sum"]
EXACT = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def law(p: float, dtype: torch.dtype, in_memory: bool = False) -> Law:
    found = Law.of(p, CPU, dtype)
    return Law(found.threshold, found.scale) if in_memory else found


def tensors(sizes, anchored: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    examples, rows, inputs, outputs = sizes
    x = torch.randn(examples, rows, inputs).to(dtype).requires_grad_()
    weight = torch.randn(outputs, inputs).to(dtype).requires_grad_()
    return x, weight, torch.randn(outputs, inputs).to(dtype) if anchored else None


def check(sizes, anchored: bool, p: float, dtype: torch.dtype, in_memory: bool = False) -> None:
    """Product and gradients, with sums in an order of their own."""
    x, weight, anchor = tensors(sizes, anchored, dtype)
    found = example_linear(x, weight, KEY, law(p, dtype, in_memory), "element", anchor)
    direction = torch.randn_like(found)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    towards = None if anchor is None else anchor.double()
    used = example_weights(exact[1], len(x), KEY, p, "element", towards)
    expected = exact[0] @ used.mT
    results = (
        (y, *torch.autograd.grad(y, leaves, grad))
        for y, leaves, grad in (
            (found, (x, weight), direction),
            (expected, exact, direction.double()),
        )
    )
    step = torch.finfo(dtype).eps * (4 if dtype.itemsize == 2 else 50)
    for a, b in zip(*results):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=step, atol=3 * step)


@pytest.mark.parametrize("anchored", [False, True], ids=["zero", "pretrained"])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_against_all_weights_at_once(dtype: torch.dtype, anchored: bool, gpu_kernels) -> None:
    check((3, 1, 37, 9), anchored, 0.3, dtype)
    check((2, 6, 37, 9), anchored, 0.3, dtype, in_memory=True)
    assert gpu_kernels == FEW + MANY


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [None, 2, 6])
def test_a_bias(rows: int | None, bias_dtype: torch.dtype, gpu_kernels) -> None:
    """It is added before the sum is rounded, where masks are drawn inside of the product."""
    x, weight, _ = tensors((5, rows or 1, 37, 9), False, torch.float32)
    x = x if rows else x.detach()[:, 0].requires_grad_()
    bias = torch.randn(9).to(bias_dtype).requires_grad_()
    rule = law(0.3, torch.float32)
    found = example_linear(x, weight, KEY, rule, "element", bias=bias)
    without = example_linear(x, weight, KEY, rule, "element")
    assert torch.equal(found, without + bias)
    direction = torch.randn_like(found)
    of_x, of_weight, of_bias = torch.autograd.grad(found, (x, weight, bias), direction)
    expected = torch.autograd.grad(without, (x, weight), direction)
    assert all(map(torch.equal, (of_x, of_weight), expected))
    assert torch.equal(of_bias, direction.flatten(0, -2).sum(0).to(bias_dtype))
    assert len(gpu_kernels) == 6


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_nothing_or_all_dropped(p: float, gpu_kernels) -> None:
    for anchored, rows in itertools.product([False, True], [1, 5]):
        check((2, rows, 5, 3), anchored, p, torch.float32)
    assert gpu_kernels == 2 * (FEW + MANY)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 17])
def test_rows_of_an_example_share_its_mask(rows: int, gpu_kernels) -> None:
    check((3, rows, 7, 5), True, 0.3, torch.float32, in_memory=True)
    assert gpu_kernels == (FEW if rows <= constant("few rows") else MANY)


@pytest.mark.parametrize(
    "sizes", [(17, 1, 5, 18), (1, 1, 1, 1), (2, 5, 1, 3), (70, 1, 2, 1)], ids=str
)
def test_odd_sizes(sizes, gpu_kernels) -> None:
    """More rows and outputs than a program has, one of all, and rows that are summed in two parts."""
    check(sizes, False, 0.3, torch.float32)
    assert gpu_kernels


@pytest.mark.slow
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_many_sizes(p: float, dtype: torch.dtype, gpu_kernels) -> None:
    sizes = ((19, 1, 33, 65), (6, 3, 300, 9), (130, 1, 3, 4), (4, 9, 40, 35))
    for size, anchored in itertools.product(sizes, [False, True]):
        check(size, anchored, p, dtype)


@pytest.mark.parametrize("anchored", [False, True], ids=["zero", "pretrained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_the_masks(dtype: torch.dtype, anchored: bool, gpu_kernels) -> None:
    """Sums of a single term are exact: with one input, or one output, for each row."""
    _, weight, anchor = tensors((1, 1, 11, 9), anchored, dtype)
    rule = law(0.3, dtype)
    wide = [None if t is None else t.detach().to(rule.scale.dtype) for t in (weight, anchor)]
    used = example_weights(wide[0], 11, KEY, 0.3, "element", wide[1]).to(dtype)
    x, number = torch.eye(11, dtype=dtype), torch.arange(11)
    for inputs in (x[:, None], x.expand(11, 11, 11).contiguous()):
        inputs.requires_grad_()
        product = example_linear(inputs, weight, KEY, rule, "element", anchor)
        if inputs.shape[1] == 1:
            assert torch.equal(product[:, 0], used[number, :, number])
        else:
            assert torch.equal(product.mT, used)
        one = torch.zeros_like(product)
        one[:, :, 4] = 1
        (of_inputs,) = torch.autograd.grad(product, inputs, one, retain_graph=True)
        assert torch.equal(of_inputs, used[:, None, 4].expand_as(of_inputs))
    product = example_linear(x[:, None], weight, KEY, rule, "element", anchor)
    (of_weight,) = torch.autograd.grad(product.sum(), weight)
    ones = example_weights(torch.ones_like(wide[0]), 11, KEY, 0.3, "element").to(dtype)
    assert torch.equal(of_weight, ones[number, :, number].t())


def test_blocks_of_examples(monkeypatch, gpu_kernels) -> None:
    """Memory for two masked weights: three blocks of five examples, whose gradients are added."""
    for dtype in (torch.float32, torch.bfloat16):
        set_constant(monkeypatch, "scratch", 2 * 7 * 6 * dtype.itemsize)
        gpu_kernels.clear()
        check((5, 5, 7, 6), True, 0.3, dtype)
        assert gpu_kernels == 3 * ["masked_weights"] + 3 * ["masked_weights", "masked_sum"]


def test_strides_do_not_matter(gpu_kernels) -> None:
    """transformers' Conv1D passes the transpose of its weight."""
    x, weight, anchor = tensors((3, 2, 8, 5), True, torch.float32)
    expected = example_linear(x, weight, KEY, law(0.3, x.dtype), "element", anchor)
    stored = weight.detach().t().contiguous().requires_grad_()
    inputs = x.detach().transpose(0, 1).contiguous().requires_grad_()
    found = example_linear(
        inputs.transpose(0, 1), stored.t(), KEY, law(0.3, x.dtype), "element", anchor.mT.clone().mT
    )
    assert torch.equal(found, expected)
    grad = torch.randn(3, 5, 2).mT
    a, b = torch.autograd.grad(found, (inputs, stored), grad)
    c, d = torch.autograd.grad(expected, (x, weight), grad)
    assert torch.equal(a.transpose(0, 1), c)
    assert torch.equal(b.t(), d)
    assert gpu_kernels == 2 * ["product"] + 2 * FEW[1:]


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("rows", [1, 6])
def test_only_the_gradients_that_are_wanted(rows: int, wanted, gpu_kernels) -> None:
    x, weight, _ = tensors((3, rows, 4, 5), False, torch.float64)
    x.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    product = example_linear(x, weight, KEY, law(0.3, x.dtype), "element")
    assert product.requires_grad == any(wanted)
    if any(wanted):
        product.sum().backward()
    ways = FEW if rows == 1 else MANY
    assert gpu_kernels == [ways[0], *(name for name, want in zip(ways[1:], wanted) if want)]
    assert (x.grad is not None, weight.grad is not None) == wanted


@pytest.mark.parametrize("sizes", [(0, 2, 4, 3), (2, 0, 4, 3), (2, 2, 0, 3), (2, 9, 4, 0)], ids=str)
def test_empty(sizes, gpu_kernels) -> None:
    x, weight, _ = tensors(sizes, False, torch.float32)
    product = example_linear(x, weight, KEY, law(0.5, x.dtype), "element")
    assert product.shape == (sizes[0], sizes[1], sizes[3])
    assert not product.any()
    product.sum().backward()
    assert not x.grad.any()
    assert not weight.grad.any()


def test_sizes_beyond_the_kernels() -> None:
    huge = torch.empty(1, device="meta").expand(1 << 16, 1 << 15)
    mask = Mask(KEY, Law.of(0.5, huge.device, huge.dtype), Layout.elements(huge.numel()))
    for rows in (1, 9):
        x = torch.empty(1, rows, 1 << 15, device="meta")
        assert products.example_product(x, huge, None, None, mask) is None
    long = torch.empty(1 << 20, 4, 1 << 10, device="meta")
    assert products.example_product(long, huge[:2, : 1 << 10], None, None, mask) is None


@pytest.mark.parametrize("rows", [1, 5])
def test_gradcheck(rows: int, gpu_kernels) -> None:
    """Any number of times."""
    x, weight, anchor = tensors((2, rows, 3, 2), True, torch.float64)

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        return example_linear(x, weight, KEY, law(0.4, x.dtype), "element", anchor).sin()

    assert torch.autograd.gradcheck(layer, (x, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, (x, weight), fast_mode=True)


def test_a_weight_changed_before_backward_is_noticed(gpu_kernels) -> None:
    x, weight, _ = tensors((2, 1, 4, 3), False, torch.float32)
    product = example_linear(x, weight, KEY, law(0.5, x.dtype), "element")
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_inside_transforms_and_graphs(gpu_kernels) -> None:
    """Registered operators there; the kernels are in them."""
    x, weight, _ = tensors((2, 1, 4, 3), False, torch.float64)
    x = x.detach()

    def loss(weight: Tensor) -> Tensor:
        return example_linear(x, weight, KEY, law(0.5, x.dtype), "element").square().sum()

    (expected,) = torch.autograd.grad(loss(weight), weight)
    torch.testing.assert_close(torch.func.grad(loss)(weight.detach()), expected)
    graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gpu_kernels.clear()
    torch.testing.assert_close(torch.autograd.grad(graph(weight), weight)[0], expected)
    assert gpu_kernels == ["product", "weight_gradient"]
    product = example_linear(x, weight, KEY, law(0.5, x.dtype), "element")
    directions = torch.randn(3, *product.shape).double()
    (batch,) = torch.autograd.grad(
        product, weight, directions, is_grads_batched=True, retain_graph=True
    )
    for found, direction in zip(batch, directions):
        (one,) = torch.autograd.grad(product, weight, direction, retain_graph=True)
        torch.testing.assert_close(found, one)


@pytest.mark.parametrize("tokens", [(), (6,)], ids=["rows", "sequences"])
def test_an_operated_linear(tokens, monkeypatch, gpu_kernels) -> None:
    """The same as on the CPU."""
    layer = nn.Linear(7, 5)
    apply_dropconnect(layer, nn.Linear, p=0.5, sampling="example", toward="pretrained")
    with torch.no_grad():
        layer.weight.mul_(2)
    x = torch.randn(4, *tokens, 7, requires_grad=True)
    results = []
    for devices in ({"cpu"}, set()):
        set_constant(monkeypatch, "interpreted devices", devices)
        torch.manual_seed(5)
        layer.zero_grad()
        found = layer(x)
        (of_x,) = torch.autograd.grad(found.sin().sum(), x, retain_graph=True)
        found.cos().sum().backward()
        results.append((found, of_x, layer.weight.grad.clone(), layer.bias.grad.clone()))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
    assert set(gpu_kernels) >= set(MANY if tokens else FEW)
