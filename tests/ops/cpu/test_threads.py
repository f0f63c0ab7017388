"""Any number of threads gives the same bits, of every kernel and of every type that it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from surgery.ops import Law, Layout, key_from_seed
from surgery.ops.cpu import native
from surgery.ops.hash import multipliers
from surgery.ops.law import Mask, steps
from surgery.ops.part import Rows

from ...internals import kernel_functions

pytestmark = pytest.mark.compiler

KEY = key_from_seed(31)
SIZE = 5 * 8192 + 77
"""More parts than threads, the last of which is smaller."""
ROWS = 61


def mask(size: int, dtype: torch.dtype = torch.float32) -> Mask:
    return Mask(KEY, Law.of(0.3, torch.device("cpu"), dtype), Layout.elements(size))


def drops(dtype: torch.dtype, multiplier: int | None) -> Iterator[Tensor]:
    """Masked weights and masked gradients: both, and each alone."""
    weight, towards, grad = torch.randn(3, SIZE).to(dtype)
    for anchor in (None, towards):
        for values, given in (
            ((weight, anchor), grad),
            ((weight, anchor), None),
            ((None, None), grad),
        ):
            used = None if values[0] is None else torch.empty_like(weight)
            left = None if given is None else torch.empty_like(grad)
            native.drop(*values, given, used, left, mask(SIZE, dtype), multiplier)
            yield from (one for one in (used, left) if one is not None)


def drops_of_rows(dtype: torch.dtype) -> Iterator[Tensor]:
    weight, anchor, grad = torch.randn(3, ROWS * 400).to(dtype)
    used, left = torch.empty_like(weight), torch.empty_like(grad)
    whole = mask(ROWS * 1000, dtype)
    native.drop_rows(weight, anchor, grad, used, left, whole, Rows(300, 400, 1000))
    yield from (used, left)


def drops_of_shared(dtype: torch.dtype) -> Iterator[Tensor]:
    weight, towards = torch.randn(2, ROWS, 1031).to(dtype)
    for own, anchor in (((0,), None), ((1,), towards), ((), towards)):
        layout = Layout.shared((ROWS, 1031), own)
        used, form = torch.empty_like(weight), steps(layout)
        assert form is not None
        law = Law.of(0.3, weight.device, dtype)
        native.drop_shared(weight, anchor, used, Mask(KEY, law, layout), form)
        yield used


def tensors_of_products() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, grad = torch.randn(23, 203), torch.randn(23, ROWS)
    return x, grad, *torch.randn(2, ROWS, 203)


def products() -> Iterator[Tensor]:
    x, _, kept, dropped = tensors_of_products()
    for anchor in (None, dropped):
        yield native.example_product(x, kept, anchor, mask(kept.numel()), multipliers(23, KEY))


def gradients_of_products() -> Iterator[Tensor]:
    x, grad, kept, dropped = tensors_of_products()
    for anchor in (None, dropped):
        of = mask(kept.numel()), multipliers(23, KEY)
        for found in native.example_gradients(grad, x, kept, anchor, *of, True, True):
            assert found is not None
            yield found


def excesses() -> Iterator[Tensor]:
    mean, var = torch.randn(SIZE), torch.rand(SIZE)
    yield native.excess(mean, var)
    yield native.excess(mean, var, rectified=True)


def samples() -> Iterator[Tensor]:
    mean, var, noise = torch.randn(SIZE), torch.rand(SIZE), torch.randn(SIZE)
    native.sample(mean, var, noise, torch.tensor(0.4))
    yield from (mean, var)


def moments_of_entries(name: str, *parameters: float) -> Iterator[Tensor]:
    found = native.moments_of_entries(name, torch.randn(SIZE), torch.rand(SIZE), True, *parameters)
    yield from (one for one in found if one is not None)


def moments_of_rows(norm: bool) -> Iterator[Tensor]:
    width = 96
    given = torch.randn(5 * ROWS, width), torch.rand(5 * ROWS, width)
    if norm:
        yield from native.moments_of_norm(*given, torch.rand(width), torch.rand(width), 1e-5, True)
    else:
        yield from native.moments_of_softmax(*given)


def grams() -> Iterator[Tensor]:
    yield native.weighted_gram(
        torch.randn(5, 3, ROWS, 70), torch.randn(3, ROWS, 50), torch.rand(70, 50)
    )


KERNELS: dict[str, Callable[[], Iterator[Tensor]]] = {
    "products.example_product": products,
    "products.example_gradients": gradients_of_products,
    "products.example_multipliers": lambda: iter([native.example_multipliers(SIZE, KEY)]),
    "activations.excess": excesses,
    "activations.sample": samples,
    "grams.weighted_gram": grams,
    "moments.gelu_moments": lambda: moments_of_entries("gelu_moments"),
    "moments.leaky_relu_moments": lambda: moments_of_entries("leaky_relu_moments", 0.1),
    "moments.norm_moments": lambda: moments_of_rows(norm=True),
    "moments.softmax_moments": lambda: moments_of_rows(norm=False),
}
for dtype, name in native.NAMES.items():
    KERNELS[f"masks.drop_{name}"] = lambda dtype=dtype: drops(dtype, None)
    KERNELS[f"example_masks.drop_{name}"] = lambda dtype=dtype: drops(dtype, 12345)
    KERNELS[f"parts.drop_rows_{name}"] = lambda dtype=dtype: drops_of_rows(dtype)
    KERNELS[f"shared.drop_shared_{name}"] = lambda dtype=dtype: drops_of_shared(dtype)


def test_these_are_all_kernels() -> None:
    assert sorted(KERNELS) == sorted(kernel_functions())


@pytest.mark.parametrize("name", KERNELS)
def test_the_number_of_threads_does_not_change_the_bits(name: str) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7, 64):
            torch.manual_seed(5)
            torch.set_num_threads(threads)
            results.append(list(KERNELS[name]()))
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))
