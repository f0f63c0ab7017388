"""The masked weight by itself, as a node of the extension, against Python's: the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import apply_dropconnect
from surgery.ops import Law, Layout, drop_weight, key_from_seed
from surgery.ops.hash import SEGMENT, key_tensor
from surgery.ops.law import Mask
from surgery.ops.part import Part

from ..expected import keep
from ..internals import extension_module, taken_by_extension, without_extension

pytestmark = pytest.mark.compiler

KEY = key_from_seed(7)


@pytest.fixture(autouse=True)
def taken(extension: bool, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    assert extension
    return taken_by_extension(monkeypatch, "mask")


def dropped(weight: Tensor, anchor: Tensor | None = None, **options: Any) -> Tensor:
    law, layout = Law.of(0.4, weight.device, weight.dtype), Layout.elements(weight.numel())
    return drop_weight(weight, KEY, law, layout, anchor, **options)


def by_python(function: Any, *args: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        without_extension(patch)
        return function(*args)


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("shape", [(2,), (5, 7), (3, 2, 4), (300, 70)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bits(dtype: torch.dtype, shape: tuple[int, ...], anchored: bool, taken) -> None:
    weight = torch.randn(shape).to(dtype).requires_grad_()
    anchor = torch.randn(shape).to(dtype) if anchored else None

    def step(*grads: Tensor) -> list[Tensor]:
        used = dropped(weight, anchor)
        found = [torch.autograd.grad(used, weight, g, retain_graph=True)[0] for g in grads]
        return [used.detach(), *found]

    grads = torch.randn(shape).to(dtype), torch.ones((), dtype=dtype).expand(shape)
    found = step(*grads)
    assert taken == [True]
    assert all(map(torch.equal, found, by_python(step, *grads)))


def test_derivatives_of_any_order(taken: list[bool]) -> None:
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dropped, weight)
    assert torch.autograd.gradgradcheck(dropped, weight)
    assert taken[0]
    used = dropped(weight)
    grads = torch.randn(5, 3, 4, dtype=torch.float64)
    (every,) = torch.autograd.grad(used, weight, grads, is_grads_batched=True, retain_graph=True)
    for grad, found in zip(grads, every):
        assert torch.equal(torch.autograd.grad(used, weight, grad, retain_graph=True)[0], found)


def test_weights_of_more_than_one_key() -> None:
    """Their parts have keys of their own. Nothing is written to the memory, so none is taken."""
    law = Law.of(0.4, torch.device("cpu"), torch.bfloat16)
    for entries in (SEGMENT + 2, 12):
        mask = Mask(KEY, law, Layout.elements(entries))
        weight = torch.empty(entries, dtype=torch.bfloat16)
        found = extension_module().mask(weight, (None, mask, None))
        assert (found is None) == (entries > SEGMENT)


def test_what_is_left_to_python(taken: list[bool]) -> None:
    weight = torch.randn(4, 6, requires_grad=True)
    dropped(weight.t())
    dropped(weight[:, ::2])
    dropped(weight.detach().half())
    dropped(weight, dtype=torch.bfloat16)
    dropped(torch.randn(1))
    law = Law.of(0.4, weight.device, weight.dtype)
    turns = torch.randn(32)  # of five dimensions
    drop_weight(turns, KEY, law, Layout.shared((2,) * 5, (0, 2, 4)))
    rows, part = Layout.shared((6, 4), (0,)), Part((6, 4), (((2, 4),), ((0, 4),)))
    used = drop_weight(torch.ones(4, 4), KEY, law, rows.of_part(part))
    assert torch.equal(used != 0, keep(key_tensor(KEY), 0.4, 6, 1)[2:].bool().expand(4, 4))
    with torch.inference_mode():
        dropped(weight)
    assert taken
    assert True not in taken
    with torch.no_grad():
        assert not dropped(weight).requires_grad
    assert taken[-1]


@pytest.mark.parametrize(
    "layer",
    [nn.Embedding(9, 4), nn.MultiheadAttention(4, 2), nn.LSTMCell(4, 4), nn.GRU(4, 4)],
    ids=lambda layer: type(layer).__name__,
)
def test_modules_train_alike(layer: nn.Module, taken: list[bool]) -> None:
    apply_dropconnect(layer, "*", p=0.4)

    def step() -> list[Any]:
        torch.manual_seed(3)
        x = torch.randint(9, (3, 4)) if isinstance(layer, nn.Embedding) else torch.randn(3, 4)
        args = (x, x, x) if isinstance(layer, nn.MultiheadAttention) else (x,)
        found = layer(*args)
        output = found[0] if isinstance(found, tuple) else found
        layer.zero_grad()
        output.square().sum().backward()
        return [output.detach(), *(one.grad for one in layer.parameters()), torch.rand(2)]

    found = step()
    assert True in taken or isinstance(layer, nn.GRU)  # its weights share memory: see `flat.py`
    assert all(map(torch.equal, found, by_python(step)))


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.Embedding(4, 4)], ids=repr
)
def test_compiled_autograd_is_told_what_to_do(layer: nn.Module) -> None:
    model = apply_dropconnect(nn.Sequential(layer), "*", p=0.4)
    x = torch.tensor([[1, 2]]) if isinstance(layer, nn.Embedding) else torch.randn(2, 4, 4)
    loss = model(x).sum()
    compiler = torch.compile(backend="eager")
    refused = pytest.raises(NotImplementedError, match="set DROPCONNECT_COMPILE=0")
    with torch._dynamo.compiled_autograd._enable(compiler), refused:
        loss.backward()


def test_it_is_off_where_kernels_are(taken: list[bool], switch_kernels) -> None:
    weight = torch.randn(4, 6, requires_grad=True)
    layer = apply_dropconnect(nn.Linear(6, 4), nn.Linear, p=0.4)
    switch_kernels(False)
    node = dropped(weight).grad_fn
    assert type(node).__name__ == "_DropWeightBackward"
    assert type(layer(torch.randn(2, 6)).grad_fn).__name__ == "_MaskedLinearBackward"
    assert not taken
    switch_kernels(True)
    assert type(dropped(weight).grad_fn) is not type(node)
    assert taken == [True]
