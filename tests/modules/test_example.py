"""`sampling="example"`: every example has a mask of its own, as if its weight were written out."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from surgery import apply_dropconnect, hold_masks, set_p, strip_dropconnect

from ..expected import keep, keep_examples, mask_shape, masked
from ..helpers import Snapshot

P = 0.4
UNITS = ("element", "input", "output", "tensor")
every_unit = pytest.mark.parametrize("unit", UNITS)
channel_units = pytest.mark.parametrize("unit", UNITS[1:])


def bias_masks(key: Tensor, unit: str, examples: int, size: int) -> Tensor:
    return keep(key, P, examples, *mask_shape((size,), unit))


class Anchored:
    """A layer after a step of training: weights and what they go toward."""

    def __init__(self, layer: nn.Module, **options: Any) -> None:
        self.anchor = layer.weight.detach().clone(), layer.bias.detach().clone()
        self.layer = apply_dropconnect(layer, type(layer), p=P, sampling="example", **options)
        with torch.no_grad():
            for raw in layer.parameters():
                raw += torch.randn_like(raw)
        if options.get("toward") != "pretrained":
            self.anchor = None, None
        weight, bias = layer.parameters()
        self.weight, self.bias = (
            value.detach().clone().requires_grad_() for value in (weight, bias)
        )


def reference(made: Anchored, x: Tensor, unit: str, keys: list[Tensor], bias: bool) -> Tensor:
    """(examples, rows, in) -> (examples, rows, out), with every weight of every example."""
    matrix, towards = made.weight, made.anchor[0]
    if not isinstance(made.layer, nn.Linear):  # transformers' Conv1D
        matrix, towards = matrix.t(), None if towards is None else towards.t()
    out, width = matrix.shape
    mask = keep_examples(keys[0], P, len(x), out, width, unit=unit).expand(-1, out, width)
    outputs = []
    for example, rows in enumerate(x):
        used = masked(matrix, mask[example], P, towards)
        added = made.bias
        if bias:
            of_bias = bias_masks(keys[-1], unit, len(x), out)[example]
            added = masked(made.bias, of_bias, P, made.anchor[1])
        outputs.append(F.linear(rows, used, added))
    return torch.stack(outputs)


def linear() -> nn.Module:
    return nn.Linear(5, 4).double()


def columns() -> nn.Module:
    pytest.importorskip("transformers.modeling_utils")  # what the adapter waits for
    from transformers.pytorch_utils import Conv1D

    conv1d = Conv1D(4, 5).double()
    nn.init.normal_(conv1d.bias)
    return conv1d


def assert_same(made: Anchored, x: Tensor, expected: Callable[[Tensor], Tensor]) -> None:
    """Output, and gradients of input, weight and bias."""
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    u = made.layer(mine)
    v = expected(theirs)
    torch.testing.assert_close(u, v)
    probe = torch.randn_like(u)
    found = torch.autograd.grad(u, (mine, *made.layer.parameters()), probe)
    wanted = torch.autograd.grad(v, (theirs, made.weight, made.bias), probe)
    torch.testing.assert_close(found, wanted)


LEADING = {
    "matrix": ((3,), 0),
    "tokens": ((3, 2), 0),
    "tokens-second": ((3, 2), 1),
    "second-from-the-end": ((3, 2), -2),
    "four": ((2, 3, 2), 1),
    "all": ((3, 2), "all"),
}


@pytest.mark.parametrize("make", [linear, columns])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("toward", ["zero", "pretrained"])
@every_unit
def test_matrix(make: Any, bias: bool, toward: str, unit: str, keys: list[Tensor]) -> None:
    made = Anchored(make(), unit=unit, toward=toward, bias=bias)
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    assert_same(made, x, lambda x: reference(made, x, unit, keys, bias))
    assert len(keys) == (2 if bias and unit in ("element", "input") else 1)


@pytest.mark.parametrize(("leading", "dim"), LEADING.values(), ids=LEADING)
@pytest.mark.parametrize("unit", ["element", "output"])
def test_where_examples_lie(leading: Any, dim: Any, unit: str, keys: list[Tensor]) -> None:
    made = Anchored(linear(), unit=unit, example_dim=dim, bias=True)

    def expected(x: Tensor) -> Tensor:
        first = x.reshape(-1, 1, 5) if dim == "all" else x.movedim(dim, 0)
        u = reference(made, first.reshape(len(first), -1, 5), unit, keys, bias=True)
        u = u.reshape(*first.shape[:-1], 4)
        return u.reshape(*leading, 4) if dim == "all" else u.movedim(0, dim)

    assert_same(made, torch.randn(*leading, 5, dtype=torch.float64), expected)


CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3), (7,)),
    "1d-groups": (lambda: nn.Conv1d(4, 6, 3, groups=2, stride=2), (7,)),
    "2d-padding": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 5)),
    "2d-depthwise": (lambda: nn.Conv2d(4, 4, 2, groups=4, dilation=2), (4, 5)),
    "3d": (lambda: nn.Conv3d(4, 2, 2), (3, 3, 3)),
}


def conv_mask(layer: Any, key: Tensor, unit: str, examples: int) -> Tensor:
    """The masks as weights: (examples, *weight.shape), or broadcasting to it."""
    ones = (1,) * (layer.weight.ndim - 2)
    if unit == "tensor":
        return keep(key, P, examples, 1, 1).view(examples, 1, 1, *ones)
    if unit == "output":
        return keep(key, P, examples, layer.out_channels).view(examples, -1, 1, *ones)
    groups, wide = layer.groups, layer.in_channels // layer.groups
    mask = keep(key, P, examples, groups, wide)
    return mask.repeat_interleave(layer.out_channels // groups, 1).view(examples, -1, wide, *ones)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("toward", ["zero", "pretrained"])
@channel_units
def test_convolution(name: str, toward: str, unit: str, keys: list[Tensor]) -> None:
    make, size = CONVOLUTIONS[name]
    made = Anchored(make().double(), unit=unit, toward=toward, bias=True)
    layer: Any = made.layer

    def expected(x: Tensor) -> Tensor:
        mask = conv_mask(layer, keys[0], unit, len(x))
        of_bias = bias_masks(keys[-1], unit, len(x), layer.out_channels)
        return torch.cat(
            [
                layer._conv_forward(
                    x[e : e + 1],
                    masked(made.weight, mask[e], P, made.anchor[0]),
                    masked(made.bias, of_bias[e], P, made.anchor[1]),
                )
                for e in range(len(x))
            ]
        )

    assert_same(made, torch.randn(3, 4, *size, dtype=torch.float64), expected)


@every_unit
@pytest.mark.parametrize("p", [0, 1])
def test_nothing_and_everything(p: int, unit: str) -> None:
    layer = linear()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    plain = layer(x)
    apply_dropconnect(layer, nn.Linear, p=p, unit=unit, sampling="example")
    u = layer(x)
    assert torch.equal(u, plain if p == 0 else layer.bias.expand_as(plain))
    grad = torch.autograd.grad(u.sum(), layer.weight)[0]
    wanted = torch.autograd.grad(plain.sum(), layer.weight)[0]
    torch.testing.assert_close(grad, wanted if p == 0 else torch.zeros_like(grad))


@every_unit
def test_expectation_is_the_plain_layer(unit: str, check_mean: Any) -> None:
    layer = linear()
    x = torch.randn(3, 5, dtype=torch.float64)
    plain = layer(x)
    apply_dropconnect(layer, nn.Linear, p=P, unit=unit, sampling="example", bias=True)
    check_mean(lambda: layer(x), plain.detach(), 1000)


@every_unit
def test_examples_differ_and_tokens_do_not(unit: str) -> None:
    layer = apply_dropconnect(nn.Linear(8, 4), nn.Linear, p=0.5, unit=unit, sampling="example")
    u = layer(torch.ones(30, 3, 8))
    assert torch.equal(u[:, 0], u[:, 1])
    assert not torch.equal(u[0], u[1:].mean(0))
    assert len(u[:, 0].unique(dim=0)) > 1


@every_unit
def test_frozen_weight_passes_the_gradient_on(unit: str, keys: list[Tensor]) -> None:
    layer = linear().requires_grad_(False)
    apply_dropconnect(layer, nn.Linear, p=P, unit=unit, sampling="example")
    x = torch.randn(3, 1, 5, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    mask = keep_examples(keys[0], P, 3, 4, 5, unit=unit).expand(3, 4, 5)
    wanted = torch.stack([masked(layer.weight, one, P).sum(0, keepdim=True) for one in mask])
    torch.testing.assert_close(x.grad, wanted)


def test_empty_batch_and_keyword(keys: list[Tensor]) -> None:
    layer = apply_dropconnect(nn.Linear(5, 4), nn.Linear, p=P, sampling="example")
    assert layer(torch.randn(0, 5)).shape == (0, 4)
    assert layer(input=torch.randn(2, 5)).shape == (2, 4)
    conv = apply_dropconnect(nn.Conv1d(4, 6, 2), nn.Conv1d, unit="input", sampling="example")
    assert conv(torch.randn(0, 4, 5)).shape == (0, 6, 4)


def test_held_masks_stay_over_time_steps(keys: list[Tensor]) -> None:
    layer = apply_dropconnect(linear(), nn.Linear, p=P, sampling="example", bias=True)
    x = torch.randn(3, 5, dtype=torch.float64)
    with hold_masks(layer):
        first, again = layer(x), layer(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, layer(x))


@every_unit
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_draws_the_same(unit: str, reentrant: bool) -> None:
    model = nn.Sequential(linear(), nn.Tanh(), nn.Linear(4, 3).double())
    apply_dropconnect(model, nn.Linear, p=P, unit=unit, sampling="example", bias=True)
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        u = run(x)
        found.append(
            (u, *torch.autograd.grad(u.square().sum(), (x, *model.parameters())))
            if not reentrant or run is model
            else _by_backward(u, x, model)
        )
    for mine, theirs in zip(*found):
        assert torch.equal(mine, theirs)


def _by_backward(u: Tensor, x: Tensor, model: nn.Module) -> tuple[Tensor, ...]:
    """Gradients for a reentrant checkpoint, which refuses `autograd.grad`."""
    u.square().sum().backward()
    return (u, x.grad, *(weight.grad for weight in model.parameters()))


@every_unit
def test_autocast(unit: str, keys: list[Tensor]) -> None:
    layer = apply_dropconnect(nn.Linear(16, 8), nn.Linear, p=P, unit=unit, sampling="example")
    x = torch.randn(3, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        u = layer(x)
        plain = layer.eval()(x)
    assert u.dtype == plain.dtype == torch.bfloat16
    layer.train()
    mask = keep_examples(keys[0], P, 3, 8, 16, unit=unit)
    wanted = torch.stack(
        [F.linear(x[e], masked(layer.weight, mask[e], P), layer.bias) for e in range(3)]
    )
    assert (u - wanted).abs().max() < 2**-6 * wanted.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        layer.double()
        assert layer(x.double()).dtype == layer.eval()(x.double()).dtype == torch.float64


def test_copies_draw_their_own(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    before = Snapshot(model)
    apply_dropconnect(model, nn.Linear, p=P, sampling="example")
    x = torch.randn(3, 5)
    torch.manual_seed(5)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.manual_seed(5)
        assert torch.equal(twin(x), expected)
    strip_dropconnect(model)
    assert Snapshot(model) == before


def test_gradients_accumulate(keys: list[Tensor]) -> None:
    layer = apply_dropconnect(linear(), nn.Linear, p=P, sampling="example")
    grads = []
    for _ in range(3):
        x = torch.randn(2, 1, 5, dtype=torch.float64)
        layer(x).sum().backward()
        mask = keep_examples(keys[-1], P, 2, 4, 5)
        grads.append((mask * x).sum(0) / (1 - P))
    torch.testing.assert_close(layer.weight.grad, sum(grads), rtol=1e-8, atol=0)


def test_processes_draw_different_masks(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    found = []
    for rank in (0, 1):
        layer = apply_dropconnect(nn.Linear(50, 1, bias=False), nn.Linear, sampling="example")
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        nn.init.ones_(layer.weight)
        torch.manual_seed(0)
        found.append(layer(torch.eye(50)[None]))
    assert not torch.equal(*found)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@torch._inductor.config.patch(fallback_random=True)
@pytest.mark.parametrize(
    ("unit", "backend"),
    [("input", "aot_eager"), pytest.param("element", "inductor", marks=pytest.mark.compiler)],
)
def test_compiled_draws_the_same_and_p_changes_freely(unit: str, backend: str) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    apply_dropconnect(model, nn.Linear, p=P, unit=unit, sampling="example", bias=True)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(3, 2, 5)
    for p in (0.4, 0.2, 0.7):
        set_p(model, p)
        results = []
        with torch.compiler.set_stance("fail_on_recompile" if p != 0.4 else "default"):
            for run in (model, compiled):
                torch.manual_seed(5)
                u = run(x)
                results.append((u, *torch.autograd.grad(u.square().sum(), [*model.parameters()])))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("options", [{"sampling": "example"}, {"inference": "moments"}], ids=str)
def test_wrong_arguments_get_the_error_of_the_forward(options: dict[str, Any]) -> None:
    x, model = torch.randn(3, 4), apply_dropconnect(nn.Linear(4, 4), "weight", p=0.3, **options)
    model.train("sampling" in options)
    model(input=x)
    for args, kwargs in (
        ((), {}),
        ((x, x), {}),
        ((x,), {"input": x}),
        ((), {"wrong": x}),
        ((1,), {}),
    ):
        with pytest.raises(TypeError):
            model(*args, **kwargs)
