"""What autograd can do with a plain module it can do with an operated one: write into what a module
returned, batches of gradients, tangents."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence

from surgery import SurgeryError, apply_dropconnect
from surgery.ops import Law, draw_key
from surgery.ops.example_operators import example_product
from surgery.ops.gaussian import gaussian_sample
from surgery.ops.gaussian_linear import gaussian_linear
from surgery.ops.law import Layout
from surgery.ops.linear import masked_linear
from surgery.ops.mask import drop_weight

from ..zoo.kinds import CASES, Case

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # the first `make_dual`
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),  # vmap of kernels
    pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning"),  # float32
]
"""What torch says of itself."""

WAYS: list[dict[str, Any]] = [
    {**option, "toward": toward}
    for option, toward in itertools.product(
        (
            {},
            {"unit": "input"},
            {"unit": "output"},
            {"sampling": "example"},
            {"sampling": "example", "unit": "tensor"},
            {"sampling": "gaussian"},
            {"inference": "moments"},
        ),
        ("zero", "pretrained"),
    )
]


def operated_in_every_way(case: Case, dtype: torch.dtype = torch.float64) -> Iterator[nn.Module]:
    """Modules operated on in all ways that this kind takes, with weights that left their anchors."""
    for way in WAYS:
        module = case.build().to(dtype)
        try:
            apply_dropconnect(module, case.target_of(module), p=0.4, **way)
        except SurgeryError:
            assert "sampling" in way or "inference" in way or "unit" in way
            continue
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.25)
        yield module.train("inference" not in way)


def output(module: nn.Module, *inputs: Any, values: dict[str, Tensor] | None = None) -> Tensor:
    """The first tensor that the module returns, with the same masks at each call."""
    torch.manual_seed(5)
    found = functional_call(module, {} if values is None else values, inputs)
    found = found[0] if isinstance(found, tuple) else found
    return found[0] if isinstance(found, tuple) else found


def leaves(module: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Parameters, and the inputs that can have a gradient."""
    floats = [x.requires_grad_() for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
    return [*module.parameters(), *{id(x): x for x in floats}.values()]


def zeros_for_none(grads: Any, like: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, like)]


WRITES = {
    "relu_": (lambda y: y.relu_(), lambda y: y.relu()),
    "+=": (lambda y: y.__iadd__(1.5), lambda y: y + 1.5),
    "masked_fill_": (lambda y: y.masked_fill_(y > 0, 3), lambda y: y.masked_fill(y > 0, 3)),
    "slice": (
        lambda y: (y[..., :2].mul_(3), y)[1],
        lambda y: torch.cat([3 * y[..., :2], y[..., 2:]], -1),
    ),
    "item": (lambda y: (y.__setitem__(0, 0.0), y)[1], lambda y: torch.cat([0 * y[:1], y[1:]])),
}


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *((nn.Linear, shape) for shape in ((6,), (3, 6), (2, 3, 6), (2, 2, 3, 6))),
        (nn.Conv1d, (2, 6, 5)),
    ],
    ids=str,
)
def test_what_a_module_returns_can_be_written_to(kind, shape) -> None:
    size = (1,) if kind is nn.Conv1d else ()
    for way, bias in itertools.product(WAYS, (True, False)):
        module = kind(6, 6, *size, bias=bias)
        x = torch.randn(shape)
        if way.get("sampling") == "example" and len(shape) == len(size) + 1:
            continue  # no dimension for the examples
        try:
            apply_dropconnect(module, kind, p=0.4, **way)
        except SurgeryError:
            continue
        module.train("inference" not in way)
        for inside, outside in WRITES.values():
            module.zero_grad()
            found = inside(output(module, x))
            found.sin().sum().backward()
            grads = [parameter.grad.clone() for parameter in module.parameters()]
            module.zero_grad()
            expected = outside(output(module, x))
            expected.sin().sum().backward()
            torch.testing.assert_close(found, expected)
            for grad, parameter in zip(grads, module.parameters(), strict=True):
                torch.testing.assert_close(grad, parameter.grad)


def test_no_function_returns_a_view() -> None:
    """By name, beside what modules do with them."""
    weight = torch.randn(4, 6, requires_grad=True)
    law, key = Law.of(0.5, weight.device, weight.dtype), draw_key(weight.device)
    layout = Layout.elements(weight.numel())
    for x in (torch.randn(3, 6), torch.randn(2, 3, 6), torch.randn(3, 2, 6).transpose(0, 1)):
        for bias in (None, torch.zeros(4)):
            assert not masked_linear(x, weight, bias, key, law, layout)._is_view()
            assert not gaussian_linear(x, weight, bias, law, "element")._is_view()
    for rows in (2, 9):
        x = torch.randn(3, rows, 6, requires_grad=True)
        found = example_product(x, weight, None, None, key, law)
        assert not found._is_view()
        assert not any(grad._is_view() for grad in torch.autograd.grad(found.sum(), (x, weight)))
    assert not drop_weight(weight, key, law, layout)._is_view()
    assert not drop_weight(weight, key, law, Layout.shared((4, 6), (0,)))._is_view()
    assert not gaussian_sample(weight, weight.square())._is_view()


SOME = (
    "linear", "linear-no-bias", "conv2d", "conv-transpose1d", "embedding", "lstm", "gru-cell",
    "attention", "router",
)  # fmt: skip
some_cases = pytest.mark.parametrize("case", [CASES[name] for name in SOME], ids=SOME)


@some_cases
def test_gradients_in_a_batch(case: Case) -> None:
    """`is_grads_batched=True`, and `torch.vmap` over `torch.autograd.grad`."""
    torch.manual_seed(0)
    for dtype in (torch.float64, torch.float32):
        for module in operated_in_every_way(case, dtype):
            inputs = tuple(_in(x, dtype) for x in case.inputs())
            given = leaves(module, inputs)
            y = output(module, *inputs)
            vectors = torch.randn(3, *y.shape, dtype=dtype)

            def back(v: Tensor, y: Tensor = y, given: list[Tensor] = given, **options: Any) -> Any:
                grads = torch.autograd.grad(
                    y, given, v, retain_graph=True, allow_unused=True, **options
                )
                return tuple(g for g in grads if g is not None)

            expected = [torch.stack(grads) for grads in zip(*map(back, vectors))]
            for found in (back(vectors, is_grads_batched=True), torch.vmap(back)(vectors)):
                for ours, theirs in zip(found, expected, strict=True):
                    torch.testing.assert_close(ours, theirs)


def _in(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, tuple) and not isinstance(x, PackedSequence):
        return tuple(_in(one, dtype) for one in x)
    return x.to(dtype) if isinstance(x, PackedSequence) or x.is_floating_point() else x


@pytest.mark.parametrize("way", [way for way in WAYS if way.get("sampling") != "gaussian"], ids=str)
def test_vectorized_jacobian_and_hessian(way) -> None:
    layer = apply_dropconnect(nn.Linear(4, 3).double(), nn.Linear, p=0.4, **way)
    x = torch.randn(2, 4, dtype=torch.float64)

    def value(x: Tensor, raw: Tensor) -> Tensor:
        return output(layer, x, values={"weight_raw": raw})

    given = (x, layer.weight.detach().clone())
    for ours, theirs in zip(jacobian(value, given, vectorize=True), jacobian(value, given)):
        torch.testing.assert_close(ours, theirs)

    def scalar(*args: Tensor) -> Tensor:
        return value(*args).sin().sum()

    for ours, theirs in zip(hessian(scalar, given, vectorize=True), hessian(scalar, given)):
        torch.testing.assert_close(ours, theirs)


EPSILON = 1e-6


LONG = ("lstm-bidirectional", "lstm-layers", "lstm-packed", "lstm-inputs")
"""Torch takes recurrent layers apart for tangents, which takes seconds for each variant."""


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow] if name in LONG else [])
        for name, case in CASES.items()
    ],
)
def test_tangents(case: Case) -> None:
    """Of weights and inputs, by `make_dual`, against differences of values."""
    if case is CASES["encoder-layer"]:
        pytest.skip("torch has no tangent of this attention kernel")
    for module in operated_in_every_way(case):
        inputs = case.inputs()
        values = dict(module.named_parameters())
        dots = {name: torch.randn_like(value) for name, value in values.items()}
        moves = [torch.randn_like(x) if _moves(x) else None for x in inputs]

        def along(step: float) -> Tensor:
            moved = {name: value + step * dots[name] for name, value in values.items()}  # noqa: B023
            shifted = [
                x if dot is None else x + step * dot
                for x, dot in zip(inputs, moves)  # noqa: B023
            ]
            with torch.no_grad():
                return output(module, *shifted, values=moved)  # noqa: B023

        with fwd.dual_level():
            dual = {name: fwd.make_dual(value, dots[name]) for name, value in values.items()}
            given = [x if dot is None else fwd.make_dual(x, dot) for x, dot in zip(inputs, moves)]
            found = fwd.unpack_dual(output(module, *given, values=dual)).tangent
        expected = (along(EPSILON) - along(-EPSILON)) / (2 * EPSILON)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def _moves(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


@some_cases
def test_tangents_of_gradients(case: Case) -> None:
    """A forward before, a backward inside of a dual level: backward is linear in what it is given."""
    for module in operated_in_every_way(case):
        inputs = case.inputs()
        given = leaves(module, inputs)
        y = output(module, *inputs)
        vector, dot = torch.randn_like(y), torch.randn_like(y)

        def back(v: Tensor, y: Tensor = y, given: list[Tensor] = given) -> Any:
            return torch.autograd.grad(y, given, v, retain_graph=True, allow_unused=True)

        with fwd.dual_level():
            duals = [
                None if g is None else fwd.unpack_dual(g) for g in back(fwd.make_dual(vector, dot))
            ]
        for dual, primal, tangent in zip(duals, back(vector), back(dot), strict=True):
            if dual is not None:
                torch.testing.assert_close(dual.primal, primal)
                torch.testing.assert_close(dual.tangent, tangent)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_hessian_vector_product_by_tangents(way) -> None:
    """Forward over reverse."""
    layer = apply_dropconnect(nn.Linear(4, 3).double(), nn.Linear, p=0.4, **way)
    layer.train("inference" not in way)
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    weight = 1.25 * layer.weight.detach()
    dot = torch.randn_like(weight)

    def gradient(raw: Tensor) -> Tensor:
        raw = raw if raw.requires_grad else raw.requires_grad_()
        y = output(layer, x, values={"weight_raw": raw}).sin().sum()
        return torch.autograd.grad(y, raw)[0]

    with fwd.dual_level():
        raw = fwd.make_dual(weight.clone().requires_grad_(), dot)
        found = fwd.unpack_dual(gradient(raw)).tangent
    expected = gradient(weight + EPSILON * dot) - gradient(weight - EPSILON * dot)
    torch.testing.assert_close(found, expected / (2 * EPSILON), rtol=1e-5, atol=1e-6)
