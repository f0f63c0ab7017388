"""What an operated Linear costs: calls of kernels, memory; and when it is not the fused one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from surgery import apply_dropconnect, hold_masks, strip_dropconnect
from surgery.ops import release

from ..expected import keep, masked
from ..internals import free_blocks, note_fused, without_extension

IN, OUT, P = 48, 40, 0.5


def linear(**options) -> nn.Linear:
    return apply_dropconnect(nn.Linear(IN, OUT), nn.Linear, **{"p": P, **options})


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of Linears that run as one function."""
    inputs: list[Tensor] = []
    note_fused(monkeypatch, inputs.append)
    return inputs


@pytest.mark.compiler
@pytest.mark.parametrize("shape", [(3, IN), (2, 3, IN)], ids=str)
@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_a_step_hashes_twice(shape, toward: str, kernel_calls) -> None:
    """Once in forward; once in backward, for the masked weight and the gradient."""
    linear(toward=toward)(torch.randn(shape, requires_grad=True)).sum().backward()
    assert kernel_calls == ["drop", "drop both"]


@pytest.mark.compiler
def test_backward_makes_only_what_is_wanted(kernel_calls) -> None:
    linear()(torch.randn(3, IN)).sum().backward()
    linear().requires_grad_(False)(torch.randn(3, IN, requires_grad=True)).sum().backward()
    assert kernel_calls == ["drop"] * 4


class Sizes(TorchDispatchMode):
    """Numbers of entries of the tensors that operations return, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        views = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in views:
                self.sizes.append(value.numel())
        return result


@pytest.fixture(autouse=True)
def by_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the extension does is in tests/ops/test_extension.py."""
    without_extension(monkeypatch)


@pytest.mark.compiler
def test_masked_weights_of_all_layers_lie_in_one_block() -> None:
    release()
    layers = [nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 8)]
    model = apply_dropconnect(nn.Sequential(*layers), nn.Linear, p=P)
    for _ in range(2):
        model(torch.randn(3, 48, requires_grad=True)).sum().backward()
    (block,) = free_blocks()
    assert block.numel() == 64 * 80  # the largest weight
    strip_dropconnect(model)
    assert free_blocks() == []


@pytest.mark.compiler
def test_a_mode_that_looks_on_sees_memory_of_its_own() -> None:
    """It could hold on to what it sees."""
    release()
    layer = linear()
    with Sizes() as seen:
        layer(torch.randn(3, IN, requires_grad=True)).sum().backward()
    assert seen.sizes.count(IN * OUT) >= 2  # the masked weight of forward, and that of backward
    assert free_blocks() == []


@pytest.mark.compiler
def test_memory_is_not_used_again_after_an_error() -> None:
    release()
    with pytest.raises(RuntimeError):
        linear()(torch.randn(3, IN + 1))
    assert free_blocks() == []


@pytest.mark.compiler
def test_threads_do_not_share_a_block() -> None:
    layers = [linear() for _ in range(6)]
    inputs = [torch.randn(5, IN) for _ in layers]
    alone = [copy.deepcopy(layer) for layer in layers]
    for layer, x in zip(alone, inputs):
        for seed in range(30):
            torch.manual_seed(seed)
            with hold_masks(layer):  # another way to the same masks
                layer(x).sum().backward()
    failures: list[BaseException] = []
    lock = threading.Lock()

    def work(layer: nn.Linear, x: Tensor) -> None:
        try:
            for seed in range(30):
                with lock:  # seeds are of the process
                    torch.manual_seed(seed)
                    y = layer(x)
                y.sum().backward()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(layers, inputs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for layer, expected in zip(layers, alone):
        torch.testing.assert_close(layer.weight.grad, expected.weight.grad)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, IN), (2, 3, IN), (1, 2, 3, IN), (0, IN)], ids=str)
def test_it_is_the_product_with_the_masked_weight(shape, bias: bool, keys, fused_calls) -> None:
    """To the bit, with its gradients."""
    layer = nn.Linear(IN, OUT, bias=bias)
    plain = copy.deepcopy(layer)
    apply_dropconnect(layer, nn.Linear, p=P)
    x = torch.randn(shape)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = layer(ours)
    mask = keep(keys[0], P, OUT, IN)
    plain.weight.data = masked(plain.weight, mask, P)
    expected = plain(theirs)
    assert torch.equal(found, expected)
    found.sin().sum().backward()
    expected.sin().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    assert torch.equal(layer.weight.grad, masked(plain.weight.grad, mask, P))
    if bias:
        assert torch.equal(layer.bias.grad, plain.bias.grad)
    assert len(fused_calls) == 1


class Twice(nn.Linear):
    """A forward of its own, which nobody may replace."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def first(x: Tensor) -> Tensor:
    return x[0]


@pytest.mark.parametrize(
    ("make", "options", "change"),
    [
        (Twice, {}, None),
        (nn.Linear, {"bias": True}, None),
        (nn.Linear, {}, first),
    ],
    ids=["subclass", "bias", "vector"],
)
def test_what_is_not_fused(
    make: type[nn.Linear], options, change: Callable[[Tensor], Tensor] | None, fused_calls
) -> None:
    layer = apply_dropconnect(make(IN, OUT), make, p=P, **options)
    x = torch.randn(3, IN)
    layer(x if change is None else change(x)).sum().backward()
    assert layer.weight.grad is not None
    assert fused_calls == []


@pytest.mark.parametrize("sampling", ["example", "gaussian"])
def test_other_samplings_are_one_function_too(sampling: str, fused_calls) -> None:
    """With the numbers of the general way, which a call by name takes."""
    layer, x = linear(sampling=sampling), torch.randn(3, IN, requires_grad=True)
    results = []
    for args, kwargs in (((x,), {}), ((), {"input": x})):
        torch.manual_seed(3)
        y = layer(*args, **kwargs)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))])
    assert all(map(torch.equal, *results))
    assert len(fused_calls) == 1


def test_held_masks_and_no_grad_are_not_fused(fused_calls) -> None:
    layer, x = linear(inference="sample"), torch.randn(3, IN)
    with hold_masks(layer):
        layer(x)
    with torch.no_grad():
        layer(x)
    assert fused_calls == []
    layer.eval()(x)
    assert len(fused_calls) == 1
