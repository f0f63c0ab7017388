"""One name for one torch function, whatever form it is given in."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgery.base.torch_names import WRITERS, is_of_torch, name_of, of_two, spelling, writes
from surgery.moments.torch_functions import ACROSS, ACTIVATIONS, DROPPING

aten = torch.ops.aten

FORMS: dict[str, list[Any]] = {
    "relu": [F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, "relu", "relu_",
             aten.relu, aten.relu_.default, nn.ReLU, nn.ReLU(), nn.ReLU(inplace=True)],
    "add": [torch.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, "__iadd__",
            operator.add, operator.iadd, aten.add.Tensor, aten.add_.Tensor],
    "div": [torch.div, torch.true_divide, Tensor.divide_, operator.truediv, operator.itruediv],
    "and": [operator.and_, operator.iand, Tensor.__and__, Tensor.__iand__],
    "positive": [torch.positive, operator.pos, Tensor.__pos__, "positive"],
    "softmax": [F.softmax, aten._softmax.default, nn.Softmax, nn.Softmax2d],
    "clamp": [torch.clip, Tensor.clip_, "clamp", aten.clamp],
    "linear": [F.linear, nn.Linear, nn.LazyLinear, aten.linear.default,
               nn.MultiheadAttention(4, 2).out_proj],
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_has_the_one_name(name: str) -> None:
    for form in FORMS[name]:
        assert name_of(form) == name, form


class First(TorchFunctionMode):
    """Notes the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(spelling(func))
        return func(*args, **(kwargs or {}))


def called(function: Callable[..., Any], *args: Any) -> list[str]:
    """The spellings of the torch functions that a function calls."""
    with First() as mode:
        function(*args)
    return mode.seen


PLAIN = (
    "CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU RReLU "
    "ReLU SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink Dropout Dropout1d Dropout2d "
    "Dropout3d AlphaDropout FeatureAlphaDropout"
)
"""Classes that can be made without arguments."""

MODULES: dict[nn.Module, Tensor] = {
    **{getattr(nn, name)(): torch.randn(2, 4, 4) for name in PLAIN.split()},
    nn.Threshold(0, 0): torch.randn(4),
    nn.Softmax(-1): torch.randn(4),
    nn.Softmin(-1): torch.randn(4),
    nn.LogSoftmax(-1): torch.randn(4),
    nn.BatchNorm1d(4).eval(): torch.randn(2, 4),
    nn.InstanceNorm1d(4).eval(): torch.randn(2, 4, 4),
    nn.GroupNorm(2, 4): torch.randn(2, 4),
    nn.LayerNorm(4): torch.randn(2, 4),
    nn.RMSNorm(4): torch.randn(2, 4),
    nn.EmbeddingBag(4, 4): torch.ones(2, 2, dtype=torch.long),
    nn.ConvTranspose2d(4, 4, 2): torch.randn(1, 4, 4, 4),
    nn.Conv3d(4, 4, 1): torch.randn(1, 4, 2, 2, 2),
    nn.Bilinear(4, 4, 1): torch.randn(2, 4),
    nn.LSTMCell(4, 4): torch.randn(2, 4),
    nn.GRUCell(4, 4): torch.randn(2, 4),
    nn.RNNCell(4, 4): torch.randn(2, 4),
    nn.LSTM(4, 4): torch.randn(2, 4),
    nn.Flatten(): torch.randn(2, 4),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:dropout[23]d:UserWarning")
@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_a_module_has_the_name_of_the_function_that_it_calls(module: nn.Module) -> None:
    x = MODULES[module]
    seen = called(module, *((x, x) if isinstance(module, nn.Bilinear) else (x,)))
    assert name_of(module) in map(name_of, seen)
    if "activation" in type(module).__module__:
        assert name_of(module) in ACTIVATIONS | ACROSS
    if "dropout" in type(module).__module__:
        assert name_of(module) in DROPPING


def test_a_subclass_has_the_name_of_torchs_class() -> None:
    class Rectifier(nn.ReLU):
        pass

    class Rotary(nn.Module):
        pass

    assert name_of(Rectifier) == "relu"
    assert name_of(Rotary()) == "rotary"


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_operators_that_assign_write_if_tensors_have_them(name: str) -> None:
    apply = getattr(operator, name)
    bits = name[1:] in ("and", "or", "xor", "lshift", "rshift")
    x = torch.ones(2, 2, dtype=torch.long if bits else torch.float)
    assert writes(spelling(apply)) is (apply(x, x.clone()) is x)
    plain = getattr(operator, f"{WRITERS[name]}_" if WRITERS[name] in ("and", "or") else name[1:])
    assert name_of(apply) == name_of(plain)
    assert not writes(spelling(plain))


@pytest.mark.parametrize(
    "function",
    [Tensor.relu_, F.relu_, aten.relu_, aten._index_put_impl_, Tensor.__setitem__, "mul_"],
)
def test_what_writes(function: Any) -> None:
    assert writes(spelling(function))


@pytest.mark.parametrize(
    "function", [torch.relu, aten._softmax.default, Tensor.__radd__, "__and__"]
)
def test_what_does_not_write(function: Any) -> None:
    assert not writes(spelling(function))


def test_the_largest_of_two() -> None:
    x = torch.ones(2)
    assert of_two("max", (x, x)) == "maximum"
    assert of_two("max", (x, 0)) == of_two("max", (x,)) == "max"
    assert of_two("add", (x, x)) == "add"


def test_what_is_of_torch() -> None:
    def relu(x: Tensor) -> Tensor:
        return x

    for function in (torch.relu, F.relu, Tensor.relu, nn.ReLU):
        assert is_of_torch(function)
    for other in (relu, lambda x: x, nn.ReLU()):
        assert not is_of_torch(other)
