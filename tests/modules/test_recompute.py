"""A masked weight is not kept for backward: it is computed again from its key."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks

from surgery import SurgeryError, apply_dropconnect

from ..expected import keep, masked
from ..helpers import plain_parameter

IN, OUT, BATCH, P = 48, 40, 3, 0.5
WEIGHT = IN * OUT


def linear(**options) -> nn.Linear:
    return apply_dropconnect(nn.Linear(IN, OUT), nn.Linear, **{"p": P, **options})


ways = pytest.mark.parametrize("unit", ["element", "input"])
"""By element, a Linear is one function of autograd; else it is found by hooks what to compute again."""


def batch() -> Tensor:
    return torch.randn(BATCH, IN, requires_grad=True)


def modules() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    return {
        "linear": (nn.Linear(6, 4), (3, 6)),
        "linear-3d": (nn.Linear(6, 4), (2, 3, 6)),
        "linear-no-bias": (nn.Linear(6, 4, bias=False), (3, 6)),
        "conv": (nn.Conv2d(3, 4, 3), (2, 3, 6, 6)),
        "conv-channels-last": (
            nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
            (2, 3, 6, 6),
        ),
        "attention-out": (nn.MultiheadAttention(8, 2), (4, 3, 8)),
        "cell": (nn.GRUCell(6, 4), (3, 6)),
    }


def call(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.MultiheadAttention):
        return module(x, x, x, need_weights=False)[0]
    if isinstance(module, nn.RNNCellBase):
        return module(x, torch.ones(len(x), 4, requires_grad=True))
    return module(x)


@pytest.mark.parametrize("name", modules())
def test_masked_weights_die_with_the_forward(name: str, masked_weights) -> None:
    module, shape = modules()[name]
    apply_dropconnect(module, type(module), p=P)
    output = call(module, torch.randn(shape, requires_grad=True))
    assert masked_weights
    assert all(storage.expired() for storage in masked_weights)
    forward = len(masked_weights)
    output.sum().backward()
    assert len(masked_weights) == 2 * forward  # made again, once, for the gradient of the input


def saved_sizes(layer: nn.Module) -> list[int]:
    """Numbers of entries of the tensors that reach the hooks of an outer scope."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(batch().to(layer.bias.device))
    return sizes


@pytest.mark.parametrize(
    "options", [{}, {"toward": "pretrained"}, {"unit": "input"}, {"bias": True}], ids=str
)
def test_saves_what_the_plain_module_saves_without_the_weight(options) -> None:
    plain = saved_sizes(nn.Linear(IN, OUT))
    ours = saved_sizes(linear(**options))
    assert WEIGHT in plain
    assert sorted(ours) == sorted([size for size in plain if size != WEIGHT])


def test_saves_no_weight_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert WEIGHT in saved_sizes(nn.Linear(IN, OUT))
        assert WEIGHT not in saved_sizes(linear())


def test_tensors_without_memory_are_all_saved() -> None:
    """They have one address, so that none can be told to be the masked weight."""
    sizes = saved_sizes(linear(bias=True).to("meta"))
    assert sorted(sizes) == sorted(saved_sizes(nn.Linear(IN, OUT)))


@pytest.mark.parametrize("name", modules())
@pytest.mark.parametrize("toward", ["zero", "pretrained"])
@pytest.mark.parametrize("unit", ["element", "tensor"])
def test_gradients_are_those_of_the_masked_weights(name, toward, unit, keys) -> None:
    module, shape = modules()[name]
    targets = "out_proj" if name == "attention-out" else type(module)
    plain = copy.deepcopy(module)
    apply_dropconnect(module, targets, p=P, toward=toward, unit=unit)
    owner = "out_proj" if name == "attention-out" else ""
    weight = "weight_hh" if name == "cell" else "weight"
    raw = plain_parameter(module.get_submodule(owner), weight)
    with torch.no_grad():
        raw.add_(0.1)
    x = torch.randn(shape)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    call(module, ours).sin().sum().backward()
    target = getattr(plain.get_submodule(owner), weight)
    entries = raw.shape if unit == "element" else [1] * raw.ndim
    mask = keep(keys[0], P, *entries)
    anchor = target.data.clone() if toward == "pretrained" else None
    target.data = masked(raw.data, mask, P, anchor).contiguous(
        memory_format=torch.channels_last if name.endswith("last") else torch.contiguous_format
    )
    call(plain, theirs).sin().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    assert torch.equal(raw.grad, masked(target.grad, mask, P))


@ways
def test_stale_weight_is_named(unit: str) -> None:
    """The optimizer's step between forward and backward is caught, as without DropConnect."""
    layer = linear(unit=unit)
    output = layer(batch())
    with torch.no_grad():
        layer.weight.add_(1)
    message = r"weight 'weight' has been modified .* expected version \d+\. Call backward\(\)"
    with pytest.raises(RuntimeError, match=message):
        output.sum().backward()


@ways
def test_stale_input_is_caught(unit: str) -> None:
    """What the outer scope would have checked is still checked."""
    layer = linear(unit=unit)
    x = torch.randn(BATCH, IN)
    output = layer(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        output.sum().backward()


@ways
def test_backward_twice(unit: str) -> None:
    layer, x = linear(unit=unit), batch()
    output = layer(x).sum()
    output.backward(retain_graph=True)
    once = layer.weight.grad.clone(), x.grad.clone()
    output.backward()
    assert torch.equal(layer.weight.grad, 2 * once[0])
    assert torch.equal(x.grad, 2 * once[1])


def gradients(layer: nn.Module, scope) -> list[Tensor]:
    x = torch.linspace(-1, 1, BATCH * IN).view(BATCH, IN).requires_grad_()
    layer.zero_grad()
    torch.manual_seed(5)
    with scope:
        output = layer(x).tanh()
    output.sum().backward()
    return [x.grad, *(parameter.grad.clone() for parameter in layer.parameters())]


def halve() -> saved_tensors_hooks:
    """Packs as float16: lossy, so that its effect shows."""
    return saved_tensors_hooks(lambda t: (t.dtype, t.half()), lambda s: s[1].to(s[0]))


@pytest.mark.parametrize(
    "scope",
    [
        save_on_cpu,
        lambda: saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
        lambda: disable_saved_tensors_hooks("not here"),
    ],
    ids=["save_on_cpu", "clone", "hooks disabled"],
)
@ways
def test_outer_scopes_compose(scope, unit: str) -> None:
    layer = linear(toward="pretrained", unit=unit)
    with torch.no_grad():
        layer.weight.add_(0.1)
    plain = gradients(layer, torch.enable_grad())
    for ours, expected in zip(gradients(layer, scope()), plain, strict=True):
        assert torch.equal(ours, expected)


def test_outer_hooks_see_every_other_tensor() -> None:
    """A lossy outer hook changes the gradients through the input, and only those."""
    layer = linear()
    exact, lossy = gradients(layer, torch.enable_grad()), gradients(layer, halve())
    assert not torch.equal(exact[1], lossy[1])  # of the weight: uses the input
    torch.testing.assert_close(exact[1], lossy[1], rtol=1e-2, atol=1e-2)


def test_double_backward() -> None:
    layer = apply_dropconnect(nn.Linear(4, 3), nn.Linear, p=P, toward="pretrained").double()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def output(value: Tensor, raw: Tensor) -> Tensor:
        torch.manual_seed(1)
        return torch.func.functional_call(layer, {"weight_raw": raw}, (value,)).sin()

    assert torch.autograd.gradcheck(output, (x, weight))
    assert torch.autograd.gradgradcheck(output, (x, weight))


class Complex(nn.Module):
    """A filter stored as pairs of real numbers, as GFNet and rotary embeddings do."""

    def __init__(self, conjugate: bool) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(5, 2, dtype=torch.float64))
        self.conjugate = conjugate

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.view_as_complex(self.filter)
        return x * (weight.conj() if self.conjugate else weight)


class Imaginary(Complex):
    """The imaginary part of a conjugate is a view that is negated when it is read."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.view_as_complex(self.filter).conj().imag


class Strided(nn.Module):
    """Saves a part of its weight, with swapped dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x[:4] * self.filter.t()[1, ::1] * self.filter[2:, 1:3].t().sum()


@pytest.mark.parametrize(
    "make",
    [lambda: Complex(False), lambda: Complex(True), lambda: Imaginary(True), Strided],
    ids=["complex", "conjugate", "imaginary", "strided"],
)
def test_views_of_the_masked_weight(make, keys) -> None:
    module = make()
    plain = copy.deepcopy(module)
    apply_dropconnect(module, "filter", p=P)
    x = torch.randn(5, dtype=torch.complex128)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    module(ours).abs().sum().backward()
    mask = keep(keys[0], P, *plain.filter.shape)
    plain.filter.data = masked(plain.filter.data, mask, P)
    plain(theirs).abs().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    assert torch.equal(plain_parameter(module, "filter").grad, masked(plain.filter.grad, mask, P))


class Changes(nn.Module):
    """Changes the masked weight in place before using it."""

    def __init__(self, strided: bool) -> None:
        super().__init__()
        table = torch.randn(4, 4)
        self.table = nn.Parameter(table.t() if strided else table)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table.mul_(3.0)


@pytest.mark.parametrize("strided", [False, True])
def test_a_masked_weight_that_the_forward_changes_is_refused(strided: bool) -> None:
    """Torch itself forbids it for parameters that require a gradient."""
    module = apply_dropconnect(Changes(strided), "table", p=P)
    with pytest.raises(SurgeryError, match=r"table: the forward of Changes writes to it"):
        module(torch.randn(2, 4))


def test_nested_operated_modules(keys) -> None:
    """A drawing parent inside another: each one's masked weights are found."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True).double()
    plain = copy.deepcopy(layer)
    apply_dropconnect(layer, ["self_attn", "linear?"], p=P)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(ours).sin().sum().backward()
    names = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight"]
    for key, name in zip(keys, [*names, "linear2.weight"], strict=True):
        weight = plain.get_parameter(name)
        weight.data = masked(weight.data, keep(key, P, *weight.shape), P)
    plain(theirs).sin().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
