"""The extension in C++ against Python: the same bits, the same masks, the same errors."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from surgery import apply_dropconnect, set_p
from surgery.ops import Law, draw_key, masked_linear
from surgery.ops.law import Layout
from surgery.ops.product import ROWS

from ..internals import extension_product, note_taken, without_extension

pytestmark = pytest.mark.compiler

CASES = list(
    itertools.product(
        (torch.float32, torch.bfloat16, torch.float64),
        ((5, 16), (2, 3, 16), (2, 0, 16)),
        (True, False),
        (True, False),
    )
)


@pytest.fixture(autouse=True)
def there(extension: bool) -> None:
    assert extension


def by_extension(
    x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor | None = None, rank: int = 0
) -> Tensor | None:
    law = Law.of(0.4, weight.device, weight.dtype)
    about = law, Layout.elements(weight.numel()), anchor, "weight", ROWS
    return extension_product()(x, weight, bias, about, rank)


def by_python(
    x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor | None = None, rank: int = 0
) -> Tensor:
    law, layout = Law.of(0.4, weight.device, weight.dtype), Layout.elements(weight.numel())
    key = draw_key(weight.device, rank)
    return masked_linear(x, weight, bias, key, law, layout, anchor, "weight")


def with_one_key(*functions: Callable[..., Any], **kwargs: Any) -> list[Any]:
    """What each returns for random numbers that start alike."""
    found = []
    for function in functions:
        torch.manual_seed(5)
        found.append(function(**kwargs))
    return found


def same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize(("dtype", "shape", "biased", "anchored"), CASES)
def test_bits_of_the_product_and_its_gradients(
    dtype: torch.dtype, shape: tuple[int, ...], biased: bool, anchored: bool
) -> None:
    for of_x, of_weight in ((True, True), (True, False), (False, True)):
        x = torch.randn(shape, dtype=dtype).requires_grad_(of_x)
        weight = torch.randn(8, 16, dtype=dtype).requires_grad_(of_weight)
        bias = torch.randn(8, dtype=dtype, requires_grad=True) if biased else None
        anchor = torch.randn(8, 16, dtype=dtype) if anchored else None
        args = {"x": x, "weight": weight, "bias": bias, "anchor": anchor}
        outputs = with_one_key(by_extension, by_python, **args)
        assert outputs[0] is not None
        assert same(*outputs)
        inputs = [one for one in (x, weight, bias) if one is not None and one.requires_grad]
        grad = torch.randn_like(outputs[0])
        found = [torch.autograd.grad(output, inputs, grad) for output in outputs]
        assert all(map(same, *found))


@pytest.mark.parametrize("rank", [0, 1, 5, 1 << 20])
def test_the_key_is_that_of_python(rank: int) -> None:
    """And the generator is left where Python leaves it."""
    x, weight = torch.eye(64), torch.randn(64, 64, requires_grad=True)

    def drawn(function: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        return function(x, weight, None, None, rank), torch.rand(3)

    first, second = with_one_key(lambda: drawn(by_extension), lambda: drawn(by_python))
    assert all(map(torch.equal, first, second))


def test_unusual_strides() -> None:
    x, weight = torch.randn(16, 6).t().requires_grad_(), torch.randn(8, 16, requires_grad=True)
    outputs = with_one_key(by_extension, by_python, x=x, weight=weight, bias=None)
    assert same(*outputs)
    assert all(map(same, *(torch.autograd.grad(one.sum(), (x, weight)) for one in outputs)))


def test_second_derivatives() -> None:
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 16, dtype=torch.float64, requires_grad=True)

    def second(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(function(x, weight, None).tanh().sum(), x, create_graph=True)
        return torch.autograd.grad(found[0].square().sum(), (x, weight))

    first, other = with_one_key(lambda: second(by_extension), lambda: second(by_python))
    assert all(map(torch.allclose, first, other))

    def seeded(x: Tensor, weight: Tensor) -> Tensor | None:
        torch.manual_seed(1)
        return by_extension(x, weight, None)

    assert torch.autograd.gradcheck(seeded, (x, weight))
    assert torch.autograd.gradgradcheck(seeded, (x, weight))


def test_backward_twice_and_after_it_is_freed() -> None:
    x, weight = torch.randn(4, 16), torch.randn(8, 16, requires_grad=True)
    output = by_extension(x, weight, None)
    assert output is not None
    once = torch.autograd.grad(output.sum(), weight, retain_graph=True)
    assert same(once[0], torch.autograd.grad(output.sum(), weight)[0])
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()


def test_a_weight_that_was_changed_meanwhile() -> None:
    x, weight = torch.randn(4, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    output = by_extension(x, weight, None)
    assert output is not None
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="'weight' has been modified"):
        output.sum().backward()


def test_activation_checkpoints_and_saved_tensor_hooks() -> None:
    """Python's node keeps as many tensors, so that a model may change from one to the other."""
    x, weight = torch.randn(4, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)

    def again(function: Callable[..., Tensor]) -> tuple[list[Any], tuple[Tensor, ...]]:
        kept: list[Any] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, id_):
            output = function(x, weight, None)
        return [one.shape for one in kept], torch.autograd.grad(output.sum(), (x, weight))

    (shapes, grads), (others, expected) = with_one_key(
        lambda: again(by_extension), lambda: again(by_python)
    )
    assert shapes == others == [x.shape]
    assert all(map(same, grads, expected))
    calls = iter([by_python, by_extension])  # forward by one, and again by the other

    def changing(x: Tensor, weight: Tensor) -> Tensor:
        return next(calls)(x, weight, None)

    torch.manual_seed(5)
    output = checkpoint(changing, x, weight, use_reentrant=False)
    assert all(map(same, torch.autograd.grad(output.sum(), (x, weight)), expected))


def id_(one: Any) -> Any:
    return one


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_what_is_left_to_python() -> None:
    x, weight = torch.randn(4, 16), torch.randn(8, 16, requires_grad=True)
    assert by_extension(x, weight, None) is not None
    before = torch.get_rng_state()
    half = torch.randn(8, 16, dtype=torch.float16, requires_grad=True)
    assert by_extension(x[0], weight, None) is None
    assert by_extension(torch.randn(3, 2, 16).transpose(0, 1), weight, None) is None
    assert by_extension(x, weight.t().contiguous().t(), None) is None
    assert by_extension(x.to_sparse(), weight, None) is None
    assert by_extension(x.double(), weight, None) is None
    assert by_extension(x, weight, torch.randn(8).double()) is None
    assert by_extension(x[:, :8], weight, None) is None
    assert by_extension(x.half(), half, None) is None
    assert by_extension(x, weight, None, torch.randn(8, 8)) is None
    assert by_extension(x.to("meta"), weight, None) is None
    assert by_extension(torch.complex(x, x).conj().imag, weight, None) is None
    for mode in (torch.no_grad(), torch.inference_mode(), Mode(), FunctionMode()):
        with mode:
            assert by_extension(x, weight, None) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert by_extension(x, weight, None) is None
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert by_extension(dual, weight, None) is None
    torch.func.vmap(lambda one: torch.zeros(0).sum() + (by_extension(x, weight, None) is None))
    assert torch.equal(before[-8:], torch.get_rng_state()[-8:])


def test_gradients_that_are_none_or_unusual() -> None:
    x, weight = torch.randn(4, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    for grad in (
        torch.ones(1, 1).expand(4, 8),
        torch.complex(torch.ones(4, 8), torch.ones(4, 8)).conj().imag,
        torch.randn(8, 4).t(),
    ):
        outputs = with_one_key(by_extension, by_python, x=x, weight=weight, bias=None)
        found = [torch.autograd.grad(one, (x, weight), grad) for one in outputs]
        assert all(map(same, *found))
    output = by_extension(x, weight, None)
    assert output is not None
    batched = torch.autograd.grad(output, weight, torch.randn(3, 4, 8), is_grads_batched=True)
    assert batched[0].shape == (3, 8, 16)


def test_a_model_trains_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """With p that changes, frozen layers, and what is kept of the state."""

    def trained() -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4, bias=False))
        apply_dropconnect(model, nn.Linear, p=0.3, toward="pretrained")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(4):
            set_p(model, 0.1 * step)
            model[0].requires_grad_(step != 2)
            optimizer.zero_grad()
            model(torch.randn(3, 5, 16)).square().sum().backward()
            optimizer.step()
        return [one.detach() for one in model.parameters()]

    found = trained()
    without_extension(monkeypatch)
    assert all(map(torch.equal, found, trained()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_the_operators_of_a_graph(dtype: torch.dtype, toward: Any) -> None:
    """float16 has no kernel on the CPU, and Python does it."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4, bias=False)).to(dtype)
    apply_dropconnect(model, nn.Linear, p=0.4, toward=toward)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = torch.randn(2, 3, 16, dtype=dtype, requires_grad=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def step(called: Any) -> list[Tensor]:
        output = called(x)
        grads = torch.autograd.grad(output.float().square().sum(), [x, *model.parameters()])
        return [output, *grads]

    first, second = with_one_key(lambda: step(model), lambda: step(compiled))
    assert all(map(same, first, second))


def test_kernels_that_python_compiles_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever of a step was left to Python."""
    taken = note_taken(monkeypatch)
    x = torch.randn(4, 16, dtype=torch.float16, requires_grad=True)
    layer = apply_dropconnect(nn.Linear(16, 8).half(), nn.Linear, p=0.4)
    torch._dynamo.reset()
    found = torch.compile(layer, backend="aot_eager")(x).sum()
    assert taken
    taken.clear()
    found.backward()
    assert taken
    taken.clear()
    x, weight = torch.randn(4, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    output = by_extension(x, weight, None)
    assert output is not None
    assert not taken
    torch.autograd.grad(output.sum(), x, create_graph=True)
    assert taken


COLD = """
import threading
import torch
from torch import nn
from surgery import apply_dropconnect
from surgery.ops.extension import loading

model = apply_dropconnect(nn.Sequential(nn.Linear(8, 8)), nn.Linear, p=0.5)
x = torch.randn(2, 8)
for _ in range(loading.PATIENCE):
    model(x).sum().backward()
assert loading.product is None, "nothing was kept"
for thread in threading.enumerate():
    if thread.name == "dropconnect-compiler":
        thread.join()
        print("compiled beside")
model(x)
print("used" if loading.product is not None else "not used")
"""


def cold(folder: Path, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", COLD],
        env={**os.environ, "DROPCONNECT_CACHE_DIR": str(folder), **environment},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


@pytest.mark.slow
def test_it_is_compiled_beside_a_training(tmp_path: Path) -> None:
    assert cold(tmp_path).split("\n")[:2] == ["compiled beside", "used"]


def test_without_a_compiler_python_goes_on(tmp_path: Path) -> None:
    """And nothing is said that is not said of the kernels."""
    assert cold(tmp_path, CXX="c++ --no-such-flag").count("not used") == 1


def test_the_first_call_may_be_in_inference_mode() -> None:
    """In which tensors are of another kind than those of a training."""
    code = """
import torch
from surgery import apply_dropconnect
from surgery.ops.extension import loading
model = apply_dropconnect(torch.nn.Linear(6, 4), torch.nn.Linear, p=0.5, inference="sample")
assert loading.compile_now()
with torch.inference_mode():
    torch.compile(model, backend="aot_eager")(torch.randn(3, 6))
product, taken = loading.product, []
loading.product = lambda *args: taken.append(product(*args)) or taken[-1]
model(torch.randn(3, 6)).sum().backward()
assert taken[0] is not None
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
