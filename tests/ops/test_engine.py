"""Compiled, plain, whole and chunked runs give the same bits; without a compiler it still works."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from surgery.ops import (
    Law,
    Layout,
    drop_weight,
    key_from_seed,
    masked_formula,
    switch,
)
from surgery.ops.cpu.workspace import Block
from surgery.ops.law import Mask
from surgery.ops.mask import drop_both
from surgery.ops.switch import set_compile_enabled

from ..internals import constant, forget_failures, set_constant

KEY = key_from_seed(21)
SHAPE = (101, 257)
SMALL = (37, 97)
"""Four blocks of the kernels for the GPU, whose interpreter takes ten milliseconds for each."""


def layout_of(name: str, shape: tuple[int, int] = SHAPE) -> Layout:
    if name == "element":
        return Layout.elements(shape[0] * shape[1])
    return Layout.shared(shape, {"row": (0,), "column": (1,), "tensor": ()}[name])


CHUNK = constant("chunk")
towards = pytest.mark.parametrize("anchored", [False, True], ids=["zero", "pretrained"])


@pytest.fixture(autouse=True)
def fresh_engine(monkeypatch: pytest.MonkeyPatch, switch_kernels: Callable[[bool], bool]) -> None:
    """An engine that has not found out yet whether compiling works."""
    forget_failures(monkeypatch)
    switch_kernels(True)


def both(layout: Layout, weight: Tensor, anchor: Tensor | None, p: float):
    """The masked weight and the gradient, compiled and plain."""
    results = []
    for enabled in (True, False):
        set_compile_enabled(enabled)
        leaf = weight.clone().requires_grad_()
        law = Law.of(p, weight.device, weight.dtype)
        used = drop_weight(leaf, KEY, law, layout, anchor)
        (grad,) = torch.autograd.grad(used.double().cos().sum(), leaf)
        results.append((used.detach(), grad))
    return results


def compare(name: str, dtype, anchored: bool, shape: tuple[int, int] = SHAPE) -> None:
    weight = torch.randn(shape).to(dtype)
    anchor = torch.randn(shape).to(dtype) if anchored else None
    fast, slow = both(layout_of(name, shape), weight, anchor, 0.3)
    assert torch.equal(fast[0], slow[0])
    assert torch.equal(fast[1], slow[1])


DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.compiler
@towards
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_and_the_formula_agree_bit_by_bit(dtype, anchored, kernel_calls) -> None:
    compare("element", dtype, anchored)
    assert kernel_calls == ["drop", "drop"]  # forward and backward of the first run


@towards
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["element", "row", "column", "tensor"])
def test_kernels_for_the_gpu_agree_bit_by_bit(layout, dtype, anchored, gpu_kernels) -> None:
    compare(layout, dtype, anchored, SMALL)
    assert gpu_kernels == ["drop" if layout == "element" else "drop_shared"] * 2


@towards
def test_a_dtype_without_a_kernel_has_the_formula(anchored: bool, kernel_calls) -> None:
    compare("element", torch.float16, anchored)
    assert kernel_calls == []


@pytest.mark.compiler
@towards
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 4095, 4097, 3 * 8192 + 5])
def test_both_at_once_are_what_two_masks_give(size: int, dtype, anchored, kernel_calls) -> None:
    weight, grad = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    anchor = torch.randn(size).to(dtype) if anchored else None
    law, layout = Law.of(0.3, weight.device, dtype), Layout.elements(size)
    expected = drop_weight(weight, KEY, law, layout, anchor), drop_weight(grad, KEY, law, layout)
    del kernel_calls[:]
    block = Block(weight)
    with torch.no_grad():
        used, masked = drop_both(weight, anchor, grad.clone(), Mask(KEY, law, layout), block)
    assert kernel_calls == ["drop both"]
    assert used.data_ptr() == block.base.data_ptr()
    assert torch.equal(used, expected[0])
    assert torch.equal(masked, expected[1])


@pytest.mark.compiler
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_number_of_threads_does_not_change_the_bits(threads: int) -> None:
    law, layout = Law.of(0.3, torch.device("cpu"), torch.float32), Layout.elements(100_003)
    weight, before = torch.randn(100_003), torch.get_num_threads()
    expected = drop_weight(weight, KEY, law, layout)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(drop_weight(weight, KEY, law, layout), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.compiler
def test_nothing_is_left_to_chance(kernel_calls) -> None:
    """Torch's own switch for deterministic algorithms changes nothing, and complains of nothing."""
    weight = torch.randn(50_000)
    law, layout = Law.of(0.3, weight.device, weight.dtype), Layout.elements(50_000)
    expected = drop_weight(weight, KEY, law, layout)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(drop_weight(weight, KEY, law, layout), expected)
    finally:
        torch.use_deterministic_algorithms(False)
    assert kernel_calls == ["drop", "drop"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [1 << 16, 1000, 997, 1])
@towards
def test_chunks_give_the_bits_of_the_formula(
    chunk: int, p: float, dtype: torch.dtype, anchored: bool, monkeypatch
) -> None:
    set_compile_enabled(False)
    size = 2 * chunk + 5 if chunk > 1 else 20
    weight, anchor = torch.randn(2, size).to(dtype)
    weight[3] = torch.inf
    anchor = anchor if anchored else None
    law = Law.of(p, weight.device, weight.dtype)
    whole = masked_formula(weight, anchor, KEY, law.threshold, law.scale, None)
    set_constant(monkeypatch, "chunk", chunk)
    found = drop_weight(weight, KEY, law, Layout.elements(size), anchor)
    assert torch.equal(_bits(found), _bits(whole))


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Of which also those of zeros and of what is not a number are compared."""
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize])


def test_chunks_of_a_layout_whose_mask_has_several_dimensions(monkeypatch) -> None:
    """A depthwise convolution by output: the mask has the view's own shape, row-major."""
    set_compile_enabled(False)
    shape = (50, 3, 1, 1)
    weight, layout = torch.randn(shape), Layout.shared(shape, (0, 1))
    law = Law.of(0.3, weight.device, weight.dtype)
    whole = drop_weight(weight, KEY, law, layout)
    set_constant(monkeypatch, "chunk", 16)
    assert torch.equal(drop_weight(weight, KEY, law, layout), whole)


class _Storages(TorchDispatchMode):
    """The storages of more than a chunk that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.large: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().nbytes() > 8 * CHUNK:
            self.large.add(result.untyped_storage().data_ptr())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@towards
def test_plain_run_needs_little_memory_beside_the_result(
    anchored: bool, dtype: torch.dtype
) -> None:
    """Temporaries have the size of a chunk, not of the weight."""
    set_compile_enabled(False)
    weight, anchor = torch.randn(2, 9 * CHUNK + 1, dtype=dtype)
    law = Law.of(0.5, weight.device, weight.dtype)
    with _Storages() as storages:
        used = drop_weight(
            weight, KEY, law, Layout.elements(weight.numel()), anchor if anchored else None
        )
    given = {weight.untyped_storage().data_ptr(), used.untyped_storage().data_ptr()}
    assert storages.large <= given


def test_switching_off_means_not_compiling(kernel_calls, gpu_kernels) -> None:
    set_compile_enabled(False)
    law = Law.of(0.5, torch.device("cpu"), torch.float32)
    drop_weight(torch.randn(20_000), KEY, law, Layout.elements(20_000))
    assert kernel_calls == gpu_kernels == []
    assert not switch.compile_enabled("cpu")
    assert not switch.compile_enabled("gpu")


@pytest.mark.parametrize("name", ["element", "row"])
def test_where_triton_fails_the_formula_gives_the_same_bits(
    name: str, gpu_kernels, monkeypatch
) -> None:
    """It compiles its launchers with a C compiler, which a machine may lack. One warning tells."""
    set_compile_enabled(False)
    weight, law = torch.randn(SHAPE), Law.of(0.4, torch.device("cpu"), torch.float32)
    layout = layout_of(name)
    expected = drop_weight(weight, KEY, law, layout)
    set_compile_enabled(True)

    def broken(name: str) -> Any:
        assert name.startswith("surgery.ops.gpu.")
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.warns(RuntimeWarning, match=r"No kernels can be.*Reason: Failed to find C") as seen:
        first = drop_weight(weight, KEY, law, layout)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = drop_weight(weight, KEY, law, layout)
    assert len(seen) == 1
    assert "DROPCONNECT_COMPILE=0" in str(seen[0].message)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert not switch.compile_enabled("gpu")
    assert switch.compile_enabled("cpu")


def test_errors_of_the_formula_are_not_hidden() -> None:
    """Only a compiler's failure falls back: an error in the arguments is raised."""
    law = Law.of(0.4, torch.device("cpu"), torch.float32)
    with pytest.raises((RuntimeError, ValueError)):
        drop_weight(torch.randn(20_000), KEY, law, Layout.elements(19_999))
