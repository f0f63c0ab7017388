"""Canaries of the modes of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from surgery.torch_private import modes

from .canary import canary


@canary(modes, "torch._C._DisableFuncTorch")
def test_what_lasts_is_of_no_transform() -> None:
    made = []

    def makes(x: Tensor) -> Tensor:
        with modes.lasting():
            made.append(torch.zeros(2, device="cpu") + 1)
        return x * made[-1]

    torch.func.vmap(torch.func.grad(lambda x: makes(x).sum()))(torch.ones(3, 2))
    torch.func.functionalize(makes)(torch.ones(2))
    assert all(type(one) is Tensor and one.tolist() == [1, 1] for one in made)
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(one) for one in made)


@canary(modes, "torch.utils._python_dispatch._disable_current_modes")
def test_what_lasts_is_no_fake() -> None:
    with FakeTensorMode():
        with modes.lasting():
            made = torch.zeros(2, device="cpu") + 1
        assert type(torch.zeros(2)) is not Tensor  # the mode goes on
    assert type(made) is Tensor
    assert made.tolist() == [1, 1]


def test_what_lasts_is_not_of_inference_mode() -> None:
    with torch.inference_mode(), modes.lasting():
        assert not torch.zeros(2, device="cpu").is_inference()


@canary(modes, "torch._C._set_grad_enabled")
def test_gradients_are_switched_by_one_call_into_c() -> None:
    try:
        modes.set_gradients(False)
        assert not torch.is_grad_enabled()
    finally:
        modes.set_gradients(True)
    assert torch.is_grad_enabled()
    assert not hasattr(modes.set_gradients, "__code__"), "it is written in Python now"


@canary(modes, "torch._C._is_any_autocast_enabled")
def test_autocast_of_any_device_is_seen() -> None:
    assert not modes.any_autocast()
    for kind in ("cpu", "cuda"):
        torch.set_autocast_enabled(kind, True)
        try:
            assert modes.any_autocast(), kind
        finally:
            torch.set_autocast_enabled(kind, False)
    with torch.autocast("cpu"):
        assert modes.any_autocast()
        with torch.autocast("cpu", enabled=False):
            assert not modes.any_autocast()


@canary(modes, "torch._C._len_torch_dispatch_stack")
def test_modes_that_see_operations_are_counted() -> None:
    assert modes.dispatch_modes() == 0
    with TorchDispatchMode(), TorchDispatchMode():
        assert modes.dispatch_modes() == 2
    with FakeTensorMode():
        assert modes.dispatch_modes() == 1


@canary(modes, "torch._C._len_torch_function_stack")
def test_modes_that_see_functions_are_counted() -> None:
    assert modes.function_modes() == 0
    with torch.device("meta"), TorchFunctionMode():
        assert modes.function_modes() == 2


def functions_off() -> Any:
    return torch._C.DisableTorchFunctionSubclass()


@pytest.mark.parametrize(
    "switch",
    [
        torch.no_grad,
        functions_off,
        BaseTorchFunctionMode,
        lambda: torch.device("meta"),
        lambda: torch.compiler.set_stance("force_eager"),
    ],
    ids=["gradients", "functions", "mode", "device", "stance"],
)
@canary(
    modes,
    *("torch._C._get_torch_function_state", "torch._C._set_torch_function_state"),
    *("torch._C._pop_torch_function_stack", "torch._C._len_torch_function_stack"),
)
def test_switches_are_put_back(switch: Callable[[], Any]) -> None:
    """Where a context was entered and is never left; and nothing where it was."""

    def now() -> Any:
        compiled = torch.compile(lambda: torch.compiler.is_compiling(), backend="eager")
        on = torch.is_grad_enabled(), torch._C._is_torch_function_enabled()
        return *on, modes.function_modes(), str(torch.zeros(1).device), compiled()

    outside = now()
    assert outside == (True, True, 0, "cpu", True)
    put_back = modes.switches_back()
    put_back()
    assert now() == outside
    left = switch()
    left.__enter__()
    inside = now()
    assert inside != outside
    modes.switches_back()()
    assert now() == inside
    put_back()
    put_back()
    assert now() == outside
