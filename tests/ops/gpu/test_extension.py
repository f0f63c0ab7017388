"""What the extension launches on a GPU, in Triton's interpreter: the same bits as by Python, and by the
same kernels."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.ops import (
    Law,
    Layout,
    draw_key,
    drop_weight,
    example_linear,
    gaussian_linear,
    key_from_seed,
    masked_linear,
)
from surgery.ops.extension import loading
from surgery.ops.product import COLUMNS, How

from ...internals import extension_module, without_extension
from .pretended import Driver, pretended

pytestmark = pytest.mark.compiler

CPU = torch.device("cpu")
KEY = key_from_seed(41)


@pytest.fixture
def driver(gpu_kernels, extension: bool) -> Iterator[Driver]:
    assert extension
    with pytest.MonkeyPatch.context() as patch, pretended(patch) as found:
        yield found


def step(layer: Callable[..., Tensor], *leaves: Tensor | None) -> list[Tensor]:
    """What a layer gives, and the gradients of those leaves that want one."""
    torch.manual_seed(3)
    found = layer(*leaves)
    wanted = [one for one in leaves if one is not None and one.requires_grad]
    direction = torch.linspace(-1, 1, found.numel()).view(found.shape).to(found.dtype)
    return [found.detach(), *torch.autograd.grad(found, wanted, direction)]


def check(driver: Driver, layer: Callable[..., Tensor], *leaves: Tensor | None) -> list[str]:
    """The kernels that the extension launches, at the second time."""
    with pytest.MonkeyPatch.context() as patch:
        without_extension(patch)
        expected = step(layer, *leaves)
    first = step(layer, *leaves)
    driver.launched.clear()
    second = step(layer, *leaves)
    for found in (first, second):
        assert all(a.dtype == b.dtype for a, b in zip(found, expected))
        assert all(map(torch.equal, found, expected))
    return list(driver.launched)


def tensors(
    shape: tuple[int, ...],
    outputs: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    anchored: bool,
    biased: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    of_x, of_weight = dtypes
    x, weight = torch.randn(shape).to(of_x), torch.randn(outputs, shape[-1]).to(of_weight)
    bias = torch.randn(outputs).to(of_weight).requires_grad_() if biased else None
    anchor = torch.randn_like(weight) if anchored else None
    return x.requires_grad_(), weight.requires_grad_(), bias, anchor


FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ROWS = {
    (5, 16): ["product", "input_gradient", "weight_gradient"],
    (3, 2, 16): ["product", "input_gradient", "weight_gradient"],
    (2, 17, 16): ["masked_weights", "masked_weights", "masked_sum"],
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize(("anchored", "biased"), [(False, True), (True, False)])
def test_examples(
    shape: tuple[int, ...], dtype: torch.dtype, anchored: bool, biased: bool, driver
) -> None:
    x, weight, bias, anchor = tensors(shape, 8, (dtype, dtype), anchored, biased)
    law = Law.of(0.3, CPU, dtype)

    def layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return example_linear(x, weight, KEY, law, "element", anchor, bias=bias)

    assert check(driver, layer, x, weight, bias) == ROWS[shape]
    for of_x, of_weight in ((True, False), (False, True)):
        leaves = x.detach().requires_grad_(of_x), weight.detach().requires_grad_(of_weight)
        wanted = ROWS[shape][:1] + [ROWS[shape][1]] * of_x + [ROWS[shape][2]] * of_weight
        assert check(driver, layer, *leaves, None) == wanted


def test_examples_of_other_masks_and_shapes(driver) -> None:
    """A plan is for a shape; key and p are others each time."""
    x, weight, bias, _ = tensors((5, 16), 8, (torch.float32, torch.float32), False, True)
    for p, seed, rows in itertools.product((0.0, 0.4, 1.0), (1, 2), (5, 3)):
        key, law = key_from_seed(seed), Law.of(p, CPU, torch.float32)

        layer = partial(biased, key=key, law=law)
        assert check(driver, layer, x[:rows].detach().requires_grad_(), weight, bias) == ROWS[5, 16]


def biased(x: Tensor, weight: Tensor, bias: Tensor, key: Tensor, law: Law) -> Tensor:
    return example_linear(x, weight, key, law, "element", bias=bias)


GAUSSIAN = ["factors", "draw", "factors", "add_twice"]


@pytest.mark.parametrize("shape", [(5, 16), (3, 2, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("anchored", "biased"), [(False, True), (True, False)])
def test_gaussians(
    shape: tuple[int, ...], dtype: torch.dtype, anchored: bool, biased: bool, driver
) -> None:
    x, weight, bias, anchor = tensors(shape, 8, (dtype, dtype), anchored, biased)
    law = Law.of(0.3, CPU, dtype)

    def layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return gaussian_linear(x, weight, bias, law, "element", anchor)

    assert check(driver, layer, x, weight, bias) == GAUSSIAN
    for of_x, of_weight in ((True, False), (False, True)):
        leaves = x.detach().requires_grad_(of_x), weight.detach().requires_grad_(of_weight)
        assert check(driver, layer, *leaves, bias) == GAUSSIAN


@pytest.mark.parametrize("shape", [(5, 16), (3, 2, 16)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("anchored", [False, True])
def test_batches(shape: tuple[int, ...], dtype: torch.dtype, anchored: bool, driver) -> None:
    """One mask for all: `linear` of the extension."""
    x, weight, bias, anchor = tensors(shape, 8, (dtype, dtype), anchored, True)
    law, layout = Law.of(0.3, CPU, dtype), Layout.elements(weight.numel())

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if loading.product is not None:
            found = loading.product(x, weight, bias, (law, layout, anchor, "weight", ()), 0)
            if found is not None:
                return found
        torch.manual_seed(3)
        return masked_linear(x, weight, bias, draw_key(CPU, 0), law, layout, anchor)

    assert check(driver, layer, x, weight, bias) == ["drop", "drop"]


def plain_product(x: Tensor, used: Tensor, bias: Tensor, how: How) -> Tensor:
    if how == COLUMNS:
        return torch.addmm(bias, x, used)
    stride, padding, dilation, groups = how
    return F.conv2d(x, used, bias, stride, padding, dilation, groups)


OTHERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], How]] = {
    "columns": ((5, 16), (16, 8), COLUMNS),
    "convolution": ((2, 4, 6, 5), (8, 2, 3, 3), ((2, 1), (1, 0), (1, 1), 2)),
}


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("anchored", [False, True])
def test_batches_of_other_products(name: str, dtype: torch.dtype, anchored: bool, driver) -> None:
    shape, of_weight, how = OTHERS[name]
    x, weight = torch.randn(shape).to(dtype), torch.randn(of_weight).to(dtype).requires_grad_()
    bias = torch.randn(8).to(dtype).requires_grad_()
    anchor = torch.randn_like(weight) if anchored else None
    law, layout = Law.of(0.3, CPU, dtype), Layout.elements(weight.numel())

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if loading.product is not None:
            about = law, layout, anchor, "weight", how
            found = loading.product(x, weight, bias, about, 0)
            if found is not None:
                return found
        loading.note_product()
        torch.manual_seed(3)
        used = drop_weight(weight, draw_key(CPU, 0), law, layout, anchor)
        return plain_product(x, used, bias, how)

    both = ["drop"] if name == "columns" else ["drop", "drop"]
    for leaf, backward in ((x.clone().requires_grad_(), both), (x, ["drop"])):
        for _ in range(2):  # both passes the general way; then backward in Python
            step(layer, leaf, weight, bias)
        assert check(driver, layer, leaf, weight, bias) == ["drop", *backward]


def layers(**options: Any) -> list[tuple[str, Callable[..., Tensor]]]:
    law = Law.of(0.3, CPU, torch.float32)
    return [
        ("example", lambda x, w, b: example_linear(x, w, KEY, law, "element", bias=b, **options)),
        ("gaussian", lambda x, w, b: gaussian_linear(x, w, b, law, "element", **options)),
    ]


@pytest.mark.parametrize(("name", "layer"), layers())
def test_second_derivatives_and_changed_weights_are_those_of_python(
    name: str, layer, driver
) -> None:
    x, weight, bias, _ = tensors((5, 16), 8, (torch.float32, torch.float32), False, True)
    assert check(driver, layer, x, weight, bias)
    (first,) = torch.autograd.grad(layer(x, weight, bias).tanh().sum(), x, create_graph=True)
    if name == "example":
        (second,) = torch.autograd.grad(first.square().sum(), weight)
        assert second.abs().sum() > 0
    else:
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(first.square().sum(), weight)
    found = layer(x, weight, bias)
    torch.autograd.grad(found.sum(), x, retain_graph=True)
    torch.autograd.grad(found.sum(), x)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(found.sum(), x)
    found = layer(x, weight, bias)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()


@pytest.mark.parametrize(("name", "layer"), layers())
def test_what_is_left_to_python(name: str, layer, driver) -> None:
    """Values that lie unusually, and sizes of which Triton makes no parameters."""
    _, weight, bias, _ = tensors((5, 16), 8, (torch.float32, torch.float32), False, True)
    memory = torch.randn(5 * 16 + 1)
    askew = memory[1:].view(5, 16).requires_grad_()
    assert askew.data_ptr() % 16
    assert check(driver, layer, askew, weight, bias) == []
    single = torch.randn(1, 16, requires_grad=True)
    assert check(driver, layer, torch.randn(1, 1, requires_grad=True), single[:, :1], None) == []
    transposed = torch.randn(16, 5).t().requires_grad_()
    assert check(driver, layer, transposed, weight, bias) == []


@pytest.mark.parametrize(("name", "layer"), layers())
def test_without_gradients(name: str, layer, driver) -> None:
    x, weight, bias, _ = tensors((5, 16), 8, (torch.float32, torch.float32), False, True)
    with torch.no_grad():
        results = []
        for _ in range(2):
            torch.manual_seed(5)
            results.append(layer(x, weight, bias))
    assert torch.equal(*results)
    assert not results[1].requires_grad
    assert driver.launched == (["product"] if name == "example" else ["factors", "draw"])


@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize(
    ("dtype", "narrow"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("want", [(True, True), (False, True), (True, False)], ids=str)
def test_operators_of_a_graph(
    row: int,
    anchored: bool,
    dtype: torch.dtype,
    narrow: torch.dtype,
    want: tuple[bool, bool],
    driver: Driver,
) -> None:
    """Key and law are in memory there, the law in a row of a table."""
    x, weight, bias, anchor = tensors((3, 5, 16), 8, (narrow, dtype), anchored, True)
    bias, grad = bias.detach().to(narrow), torch.randn(3, 5, 8).to(narrow)
    laws = [Law.of(p, CPU, torch.float32) for p in (0.1, 0.2, 0.3, 0.6)]
    table = torch.stack([law.threshold for law in laws]), torch.stack([law.scale for law in laws])
    rest = anchor, KEY, *table, torch.tensor([row])
    layout = Layout.elements(weight.numel())
    with torch.no_grad():
        used = drop_weight(weight, KEY, laws[row], layout, anchor, narrow)
        of_weight = grad.reshape(-1, 8).t() @ x.reshape(-1, 16)
        expected = (
            F.linear(x, used, bias),
            grad @ used if want[0] else torch.empty(0),
            drop_weight(of_weight, KEY, laws[row], layout, None, dtype) if want[1] else None,
        )
        for _ in range(3):
            driver.launched.clear()
            output = torch.ops.surgery.masked_linear(x, weight, bias, *rest)
            to_x, to_weight = torch.ops.surgery.masked_linear_backward(grad, x, weight, *rest, want)
            assert torch.equal(output, expected[0])
            assert torch.equal(to_x, expected[1])
            if expected[2] is not None:
                assert torch.equal(to_weight, expected[2])
                assert to_weight.dtype == dtype
    assert driver.launched == ["drop", "drop"]


def test_a_thread_without_a_context_is_left_to_python(driver: Driver) -> None:
    """`cuLaunchKernel` makes none, and fails there; what launches for Python makes one."""
    x, weight, bias, _ = tensors((5, 16), 8, (torch.float32, torch.float32), False, True)
    law = Law.of(0.4, CPU, torch.float32)
    layer = partial(biased, key=KEY, law=law)
    assert check(driver, layer, x, weight, bias) == ROWS[5, 16]
    found: list[list[str]] = []

    def work() -> None:
        own = threading.get_ident()
        driver.without_context.add(own)
        for _ in range(2):
            driver.launched.clear()
            step(layer, x, weight, bias)
            found.append(list(driver.launched))
            driver.without_context.discard(own)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [[], ROWS[5, 16]]


def test_without_a_driver_it_is_left_to_python(driver: Driver) -> None:
    """As on AMD's GPUs, where torch says "cuda", too, and with old drivers of NVIDIA."""
    law, weight = Law.of(0.4, CPU, torch.float32), torch.randn(8, 16, requires_grad=True)
    layout = Layout.elements(weight.numel())

    def masked(weight: Tensor) -> Tensor:
        return drop_weight(weight, KEY, law, layout)

    assert check(driver, masked, weight) == ["drop", "drop"]
    extension_module().use_driver(0, 0, 0, 0)
    try:
        assert check(driver, masked, weight) == []
    finally:
        extension_module().use_driver(*driver.addresses())
