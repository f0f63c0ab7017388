"""An operated module inside what others switch on around it: inference mode, autocast, devices,
deterministic algorithms; and weights whose dtype is not that of their anchor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgery import apply_dropconnect
from surgery.ops import release

from ..internals import forget_indices

WIDTH = 600  # more than a chunk of weights


@pytest.fixture(
    params=[
        pytest.param(True, id="kernels", marks=pytest.mark.compiler),
        pytest.param(False, id="plain"),
    ]
)
def fresh(request: pytest.FixtureRequest, switch_kernels: Callable[[bool], bool]) -> None:
    """Nothing is kept from before."""
    switch_kernels(request.param)
    release()
    forget_indices()


def linear(bias: bool = True, **options: Any) -> nn.Linear:
    return apply_dropconnect(nn.Linear(WIDTH, WIDTH, bias), nn.Linear, p=0.5, **options)


def train(model: nn.Module) -> None:
    x = torch.randn(3, WIDTH, requires_grad=True)
    model.train()(x).square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


TRAINED = [{}, {"bias": False}, {"sampling": "gaussian"}, {"sampling": "example"}]


@pytest.mark.parametrize("inference", ["sample", "moments"])
@pytest.mark.parametrize("options", TRAINED, ids=str)
def test_inference_mode_leaves_nothing_that_training_cannot_use(options, inference, fresh) -> None:
    with torch.inference_mode():
        linear(inference=inference).eval()(torch.randn(3, WIDTH))
    train(linear(**options))


@pytest.mark.parametrize("options", TRAINED, ids=str)
def test_the_default_device_is_not_that_of_masks(options, fresh) -> None:
    model, x = linear(**options), torch.randn(3, WIDTH)
    if options.get("sampling") != "gaussian":
        with torch.device("meta"):
            model(x)
    train(model)


@pytest.mark.parametrize("sampling", ["batch", "example"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_an_anchor_of_another_dtype(dtype: torch.dtype, sampling, fresh) -> None:
    """`load_state_dict(assign=True)` of plain weights leaves the anchor as it was."""
    outputs = []
    for assign in (True, False):
        model = linear(toward="pretrained", sampling=sampling)
        anchor = model.weight_anchor.detach().clone()
        if not assign:
            model = model.to(dtype)
        torch.manual_seed(1)
        plain = nn.Linear(WIDTH, WIDTH).to(dtype)
        model.load_state_dict(plain.state_dict(), assign=assign)
        model.weight_anchor.copy_(torch.ones_like(anchor) / 8)  # exact in all dtypes
        x = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH).to(dtype).requires_grad_()
        torch.manual_seed(2)
        out = model(x)
        out.sum().backward()
        outputs.append([out, x.grad, model.weight.grad])
    for found, expected in zip(*outputs):
        close = 4 * torch.finfo(dtype).eps
        size = float(expected.detach().abs().max())
        torch.testing.assert_close(found, expected, rtol=close, atol=close * size)


class _Weights(TorchFunctionMode):
    """What linear functions were given."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            self.found.append(args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_autocast_keeps_no_masked_weight(bias: bool, grad: bool) -> None:
    """It keeps what it makes of leaves that require a gradient, until it ends: of parameters, which
    are used again; a masked weight is not."""
    model, weights = linear(bias), _Weights()
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad), weights:
        model(torch.randn(3, WIDTH))
    assert len(weights.found) == 1
    (weight,) = weights.found
    assert not (weight.requires_grad and weight.is_leaf)


@pytest.mark.parametrize("options", TRAINED, ids=str)
def test_deterministic_algorithms_have_nothing_to_complain_of(options, fresh) -> None:
    gradients = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            torch.manual_seed(1)
            model = linear(**options)
            train(model)
            gradients.append([parameter.grad for parameter in model.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, *gradients))
