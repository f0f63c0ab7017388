"""Canaries of what a tensor is below its values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from surgery.torch_private import tensors

from .canary import canary


@canary(tensors, "torch.Tensor._version")
def test_every_write_counts() -> None:
    """Those by a view too; of `.data`, and of a clone, they do not."""
    weight = nn.Parameter(torch.zeros(2, 3))
    assert tensors.version_of(weight) == tensors.counter(weight) == 0
    with torch.no_grad():
        weight.add_(1)
        weight[0].mul_(2)
    assert tensors.version_of(weight) == tensors.counter(weight) == 2
    weight.data.add_(1)
    weight.detach().clone().add_(1)
    assert tensors.counter(weight) == 2
    assert tensors.counter(weight.detach()) == 2
    with FakeTensorMode():
        fake = torch.zeros(2)
        made = tensors.counter(fake)
        fake.view(1, 2).add_(1)
        assert tensors.counter(fake) == made + 1


@canary(tensors, "torch.Tensor._version")
def test_tensors_of_inference_mode_do_not_count() -> None:
    with torch.inference_mode():
        made = torch.zeros(2)
    assert tensors.version_of(made) == 0
    with pytest.raises(RuntimeError, match="version"):
        tensors.counter(made)


@pytest.mark.parametrize("where", ["cpu", "meta", "fake"])
@canary(tensors, "torch.UntypedStorage._cdata")
def test_storages_have_an_identity(where: str) -> None:
    def of(tensor: Tensor) -> int:
        return tensors.identity(tensor.untyped_storage())

    with FakeTensorMode() if where == "fake" else torch.device(where):
        one, other = torch.empty(4), torch.empty(4)
        seen = torch.empty(0).set_(one.untyped_storage(), 2, (2,), (1,))
        assert of(one) == of(one.view(2, 2)[1]) == of(one.detach()) == of(seen) != of(other)


@canary(
    tensors,
    "torch._C._functorch.get_unwrapped",
    "torch._C._functorch.is_functorch_wrapped_tensor",
)
def test_the_memory_of_what_a_transform_sees_is_that_of_the_tensor() -> None:
    weight, other = torch.ones(3, 2), torch.ones(3, 2)
    seen = []

    def sees(row: Tensor) -> Tensor:
        seen.append((tensors.memory_of(row), tensors.memory_of(row.view(2, 1).detach())))
        return row.sum()

    torch.func.vmap(torch.func.grad(sees))(weight)
    torch.func.grad(sees)(weight[1])
    assert set(seen) == {(tensors.memory_of(weight),) * 2}
    assert tensors.memory_of(weight) != tensors.memory_of(other)


def _tangent_of_nothing() -> Tensor:
    return torch._efficientzerotensor(2)


ODD = {
    "conjugate": lambda: torch.zeros(2, dtype=torch.complex64).conj(),
    "negated": lambda: torch._neg_view(torch.zeros(2)),
    "sparse": lambda: torch.zeros(2, 2).to_sparse(),
    "meta": lambda: torch.zeros(2, device="meta"),
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
    "zero": _tangent_of_nothing,
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD)
@canary(tensors, "torch._C._dispatch_keys", "raw_repr")
def test_odd_tensors_have_other_keys(name: str) -> None:
    assert tensors.dispatch_keys(ODD[name]()) != tensors.dispatch_keys(torch.zeros(2))


@canary(tensors, "torch._C._dispatch_keys", "raw_repr")
def test_dense_tensors_have_equal_keys() -> None:
    """Of any dtype, strides and history; inside of a transform they have others."""
    plain = tensors.dispatch_keys(torch.zeros(2))
    weight = nn.Parameter(torch.zeros(2, 3))
    for tensor in (weight, weight * 2, weight.t(), weight[0, 1:], torch.zeros(2).bfloat16()):
        assert tensors.dispatch_keys(tensor) == plain
    seen = []

    def asks(x: Tensor) -> Tensor:
        seen.append(tensors.dispatch_keys(x))
        return x

    torch.func.vmap(asks)(torch.zeros(2, 2))
    assert seen != [plain]


@canary(tensors, "torch.Tensor._is_zerotensor")
def test_zeros_without_memory_are_known() -> None:
    assert tensors.is_unwritten_zero(_tangent_of_nothing())
    assert not tensors.is_unwritten_zero(torch.zeros(2))
    assert not tensors.is_unwritten_zero(nn.Parameter(torch.zeros(2)))


@canary(tensors, "torch._C._functorch.is_legacy_batchedtensor")
def test_batches_of_gradients_are_known() -> None:
    seen = []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            seen.append((tensors.is_batch(grad), tensors.is_batched(grad)))
            return grad

    x = torch.ones(2, requires_grad=True)
    y = Asks.apply(x)
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(2))
    assert seen == [(True, True), (False, False)]


@canary(tensors, "torch.Tensor._is_view", "torch.ops.aten._unsafe_view")
def test_a_view_becomes_none() -> None:
    """Of the same memory; a tensor that is none stays the object."""
    tensor = torch.arange(6.0)
    view = tensor.view(2, 3)
    assert tensors.unviewed(tensor) is tensor
    assert not tensor._is_view()
    assert view._is_view()
    own = tensors.unviewed(view)
    assert not own._is_view()
    assert own.data_ptr() == tensor.data_ptr()
    assert own.equal(view)


@canary(tensors, "torch._foreach_copy_")
def test_many_tensors_are_copied_into_others() -> None:
    to, memory = [torch.zeros(2), torch.zeros(2, 2)], torch.arange(6.0)
    tensors.copy_all(to, [memory[:2], memory[2:].view(2, 2)])
    assert torch.cat([one.flatten() for one in to]).equal(memory)


@canary(tensors, "torch._C._disabled_torch_function_impl")
def test_operations_on_such_a_subclass_give_plain_tensors() -> None:
    class Sub(Tensor):
        __torch_function__ = tensors.no_torch_function

    one = torch.ones(2).as_subclass(Sub)
    assert type(one) is Sub
    assert type(one + 1) is type(torch.sin(one)) is type(one[:1]) is Tensor
    assert not torch.overrides.has_torch_function((one,))
    assert nn.Parameter.__torch_function__ is tensors.no_torch_function


@canary(tensors, "torch.Tensor._make_wrapper_subclass", "torch._C.DisableTorchFunctionSubclass")
def test_a_subclass_without_memory_knows_its_form() -> None:
    class Empty(Tensor):
        asked: list[str] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.asked.append(func.__name__)
            with tensors.without_torch_function():
                return func(*args, **(kwargs or {}))

        @classmethod
        def __torch_dispatch__(  # type: ignore[override]
            cls, func, types, args=(), kwargs=None
        ):
            raise AssertionError("it has no values")

    made = tensors.tensor_without_memory(Empty, torch.zeros(3, 2, dtype=torch.float64).t())
    assert made.shape == (2, 3)
    assert (made.stride(), made.dtype) == ((1, 2), torch.float64)
    assert Empty.asked
    Empty.asked.clear()
    with tensors.without_torch_function():
        assert made.dim() == 2
    assert not Empty.asked
