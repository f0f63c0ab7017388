"""Compiled, plain, whole and chunked runs give the same bits; without a compiler it still works."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor

from surgery.ops import Law, Layout, drop_weight, engine, key_from_seed

KEY = key_from_seed(21)
ROWS, COLUMNS = 101, 257
SHAPE = (ROWS, COLUMNS)
LAYOUTS = {
    "element": Layout.elements(ROWS * COLUMNS),
    "row": Layout.shared(SHAPE, (0,)),
    "column": Layout.shared(SHAPE, (1,)),
    "tensor": Layout.shared(SHAPE, ()),
}
towards = pytest.mark.parametrize("anchored", [False, True], ids=["zero", "pretrained"])


@pytest.fixture(autouse=True)
def fresh_engine(monkeypatch):
    """An engine that has not found out yet whether compiling works."""
    monkeypatch.setattr(engine, "_broken", False)
    monkeypatch.delenv("DROPCONNECT_COMPILE", raising=False)


@pytest.fixture
def plain(monkeypatch):
    """Switch compiling off, as `DROPCONNECT_COMPILE=0` does; `plain(False)` switches it on again."""

    def switch(off: bool = True) -> None:
        monkeypatch.setenv("DROPCONNECT_COMPILE", "0" if off else "1")

    return switch


@pytest.fixture
def compiled_calls(monkeypatch) -> list[str]:
    """Counts how often a compiled formula is asked for."""
    calls: list[str] = []
    compile_formula = engine._compile

    def count(formula):
        calls.append(formula.__name__)
        return compile_formula(formula)

    monkeypatch.setattr(engine, "_compile", count)
    return calls


def both(layout: Layout, weight: Tensor, anchor: Tensor | None, p: float, switch_off):
    """The masked weight and the gradient, compiled and plain."""
    results = []
    for prepare in (lambda: None, switch_off):
        prepare()
        leaf = weight.clone().requires_grad_()
        law = Law.of(p, weight.device, weight.dtype)
        used = drop_weight(leaf, KEY, law, layout, anchor)
        (grad,) = torch.autograd.grad(used.double().cos().sum(), leaf)
        results.append((used.detach(), grad))
    return results


def compare(layout, dtype, anchored, plain, compiled_calls) -> None:
    weight = torch.randn(SHAPE).to(dtype)
    anchor = torch.randn(SHAPE).to(dtype) if anchored else None
    fast, slow = both(layout, weight, anchor, 0.3, plain)
    assert compiled_calls == ["masked_formula"] * 2  # forward and backward of the first run
    assert torch.equal(fast[0], slow[0])
    assert torch.equal(fast[1], slow[1])


@pytest.mark.compiler
@towards
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_compiled_and_plain_runs_agree_bit_by_bit(layout, anchored, plain, compiled_calls) -> None:
    compare(layout, torch.float32, anchored, plain, compiled_calls)


@pytest.mark.slow
@pytest.mark.compiler
@towards
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_dtype_agrees_bit_by_bit(layout, dtype, anchored, plain, compiled_calls) -> None:
    compare(layout, dtype, anchored, plain, compiled_calls)


@pytest.mark.compiler
@pytest.mark.parametrize("p", [0.0, 0.1, 0.7, 1.0])
def test_new_p_and_new_shape_do_not_recompile(p: float, compiled_calls) -> None:
    """p and the size are data of the compiled formula."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.compiler.reset()
        engine._compiled.clear()
        for n, rate in ((20_000, 0.5), (30_011, p)):
            law = Law.of(rate, torch.device("cpu"), torch.float32)
            drop_weight(torch.randn(n), KEY, law, Layout.elements(n))
    assert len(compiled_calls) == 2


@pytest.mark.parametrize("chunk", [1 << 16, 1000, 997, 1])
@towards
def test_chunks_do_not_change_the_bits(chunk: int, anchored: bool, plain, monkeypatch) -> None:
    plain()
    size = 2 * chunk + 5 if chunk > 1 else 20
    weight, anchor = torch.randn(size), torch.randn(size) if anchored else None
    law = Law.of(0.3, weight.device, weight.dtype)
    monkeypatch.setattr(engine, "CHUNK", 1 << 30)
    whole = drop_weight(weight, KEY, law, Layout.elements(size), anchor)
    monkeypatch.setattr(engine, "CHUNK", chunk)
    assert torch.equal(drop_weight(weight, KEY, law, Layout.elements(size), anchor), whole)


def test_chunks_of_a_layout_whose_mask_has_several_dimensions(plain, monkeypatch) -> None:
    """A depthwise convolution by output: the mask has the view's own shape, row-major."""
    plain()
    shape = (50, 3, 1, 1)
    weight, layout = torch.randn(shape), Layout.shared(shape, (0, 1))
    law = Law.of(0.3, weight.device, weight.dtype)
    whole = drop_weight(weight, KEY, law, layout)
    monkeypatch.setattr(engine, "CHUNK", 16)
    assert torch.equal(drop_weight(weight, KEY, law, layout), whole)


def test_plain_run_needs_little_memory_beside_the_result(plain, monkeypatch) -> None:
    """Temporaries have the size of a chunk, not of the weight."""
    plain()
    largest: list[int] = []

    def spy(weight, *rest):
        largest.append(weight.numel())
        return engine_formula(weight, *rest)

    engine_formula = sys.modules["surgery.ops.mask"].masked_formula
    monkeypatch.setattr("surgery.ops.mask.masked_formula", spy)
    weight = torch.randn(3 * engine.CHUNK + 1)
    law = Law.of(0.5, weight.device, weight.dtype)
    drop_weight(weight, KEY, law, Layout.elements(weight.numel()))
    assert largest == [engine.CHUNK] * 3 + [1]


@pytest.mark.parametrize("size", [1, engine.SMALL - 1])
def test_small_weights_do_not_compile(size: int, compiled_calls) -> None:
    law = Law.of(0.5, torch.device("cpu"), torch.float32)
    drop_weight(torch.randn(size), KEY, law, Layout.elements(size))
    assert compiled_calls == []


def test_switching_off_means_not_compiling(plain, compiled_calls) -> None:
    plain()
    law = Law.of(0.5, torch.device("cpu"), torch.float32)
    drop_weight(torch.randn(engine.SMALL), KEY, law, Layout.elements(engine.SMALL))
    assert compiled_calls == []
    assert not engine.compile_enabled()


def compiler_failures() -> dict[str, Exception]:
    from torch._dynamo.exc import BackendCompilerFailed, Unsupported
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    def backend() -> None:
        """Stands for inductor."""

    return {
        "backend": BackendCompilerFailed(backend, RuntimeError("no compiler"), None),
        "unsupported": Unsupported("no tracing", case_name="test"),
        "c++ fails": CppCompileError(["g++"], "fatal error: Python.h: No such file"),
        "no c++": InvalidCxxCompiler(),
    }


@pytest.mark.parametrize("name", compiler_failures())
def test_fallback_warns_once_and_gives_the_same_bits(name: str, plain, monkeypatch) -> None:
    plain()
    weight = torch.randn(20_000)
    law, layout = Law.of(0.4, weight.device, weight.dtype), Layout.elements(20_000)
    expected = drop_weight(weight, KEY, law, layout)
    plain(False)

    def broken(*args):
        raise compiler_failures()[name]

    monkeypatch.setattr(engine, "_compile", lambda formula: broken)
    with pytest.warns(RuntimeWarning, match=r"torch\.compile does not work here.*Reason: ") as seen:
        first = drop_weight(weight, KEY, law, layout)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = drop_weight(weight, KEY, law, layout)
    assert len(seen) == 1
    assert "DROPCONNECT_COMPILE=0" in str(seen[0].message)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert not engine.compile_enabled()


def test_fallback_where_torch_compile_itself_refuses(plain, monkeypatch) -> None:
    """On a Python that torch does not support yet, `torch.compile(...)` raises when called."""
    plain()
    weight = torch.randn(20_000)
    law = Law.of(0.4, weight.device, weight.dtype)
    expected = drop_weight(weight, KEY, law, Layout.elements(20_000))
    plain(False)
    monkeypatch.setattr(engine, "_compiled", {})

    def refuse(*args, **kwargs):
        raise RuntimeError("torch.compile is not supported on Python 3.99+")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.warns(RuntimeWarning, match=r"Python 3\.99"):
        used = drop_weight(weight, KEY, law, Layout.elements(20_000))
    assert torch.equal(used, expected)


def test_errors_of_the_formula_are_not_hidden() -> None:
    """Only a compiler's failure falls back: an error in the arguments is raised."""
    law = Law.of(0.4, torch.device("cpu"), torch.float32)
    with pytest.raises((RuntimeError, ValueError)):
        drop_weight(torch.randn(20_000), KEY, law, Layout.elements(19_999))


NO_COMPILER = """
import warnings
import torch
from surgery.ops import Law, Layout, drop_weight, key_from_seed
weight = torch.arange(20_000.0)
law, layout = Law.of(0.4, weight.device, weight.dtype), Layout.elements(20_000)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    used = [drop_weight(weight, key_from_seed(21), law, layout) for _ in range(2)]
ours = [w for w in seen if "DropConnect" in str(w.message)]
print(len(ours), ours[0].category.__name__ if ours else None, float(used[0].double().sum()))
"""


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param({"CXX": "no-such-compiler"}, id="no compiler"),
        pytest.param({"CXX": "false"}, id="compiler fails", marks=pytest.mark.slow),
        pytest.param({"TORCHINDUCTOR_CACHE_DIR": "{file}"}, id="no folder", marks=pytest.mark.slow),
    ],
)
def test_real_machine_without_a_working_compiler(broken, plain, tmp_path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    env |= {name: value.format(file=file) for name, value in broken.items()}
    result = subprocess.run(
        [sys.executable, "-c", NO_COMPILER], env=env, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    plain()
    weight = torch.arange(20_000.0)
    law = Law.of(0.4, weight.device, weight.dtype)
    expected = drop_weight(weight, KEY, law, Layout.elements(20_000))
    assert result.stdout.split() == ["1", "RuntimeWarning", str(float(expected.double().sum()))]
