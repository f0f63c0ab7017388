"""Tensors that are not a plain piece of memory: negated, empty, of inference mode, sparse, nested."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import apply_dropconnect, hold_masks, plan_dropconnect
from surgery.ops import release

from ..internals import free_blocks
from ..zoo.kinds import Case, every_case
from .test_autograd import operated_in_every_way, output, some_cases

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors:UserWarning",
    "ignore:Sparse CSR tensor support is in beta:UserWarning",
    "ignore:Initializing zero-element tensors:UserWarning",
)


def negated(tensor: Tensor) -> Tensor:
    """The same values, seen through a view that negates."""
    view = torch._neg_view(-tensor.detach())
    assert view.is_neg()
    return view


def parts(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    tables = [table for m in module.modules() for table in (m._parameters, m._buffers)]
    return [(table, name) for table in tables for name in table if table[name] is not None]


def everything(module: nn.Module, inputs: tuple[Any, ...], vector: Tensor) -> list[Tensor]:
    """What a forward returns and its gradients, and what it returns under `no_grad`."""
    y = output(module, *inputs)
    grads = torch.autograd.grad(y, list(module.parameters()), vector, allow_unused=True)
    with torch.no_grad():
        again = output(module, *inputs)
    return [y, again, *(grad for grad in grads if grad is not None)]


@some_cases
def test_a_negated_view_is_the_negative(case: Case) -> None:
    """Of inputs, gradients, weights and anchors."""
    for dtype in (torch.float64, torch.float32):
        for module in operated_in_every_way(case, dtype):
            inputs = case.inputs()
            if not all(isinstance(x, Tensor) for x in inputs):
                return  # states and packed sequences: their weights are those of other cases
            inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
            y = output(module, *inputs)
            expected = everything(module, inputs, torch.ones_like(y))
            turned = copy.deepcopy(module)
            for table, name in parts(turned):
                old = table[name]
                table[name] = (
                    nn.Parameter(negated(old)) if type(old) is nn.Parameter else negated(old)
                )
            shown = tuple(negated(x) if x.is_floating_point() else x for x in inputs)
            found = everything(turned, shown, negated(torch.ones_like(y)))
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours.resolve_neg(), theirs)


def test_a_weight_that_is_the_imaginary_part_of_a_conjugate() -> None:
    layer = nn.Linear(3, 4, bias=False)
    values = torch.randn(4, 3)
    layer.weight = nn.Parameter(torch.complex(values, -values).conj().imag)
    assert layer.weight.is_neg()
    apply_dropconnect(layer, nn.Linear, p=0.5)
    kept = layer(torch.eye(3)).t().detach()
    assert torch.equal(kept, torch.where(kept != 0, 2 * values, 0))


OPTIONS: list[dict[str, Any]] = [
    {**way, **more, "toward": toward}
    for way in ({}, {"sampling": "example"}, {"sampling": "example", "example_dim": "all"},
                {"sampling": "gaussian"}, {"inference": "moments"})
    for more in ({}, {"unit": "input"}, {"unit": "output"}, {"bias": True})
    for toward in ("zero", "pretrained")
]  # fmt: skip


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (4, 5), (0, 0)], ids=str)
def test_nothing_in_and_nothing_out(sizes: tuple[int, int]) -> None:
    for options, shape in itertools.product(OPTIONS, ((3,), (0,), (2, 3), (2, 0), (0, 3))):
        if options.get("sampling") == "gaussian" and options.get("unit") == "input":
            continue
        layer = apply_dropconnect(nn.Linear(*sizes), nn.Linear, p=0.4, **options)
        layer.train("inference" not in options)
        x = torch.randn(*shape, sizes[0], requires_grad=True)
        y = layer(x)
        assert y.shape == (*shape, sizes[1])
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape


@pytest.mark.compiler
@pytest.mark.parametrize("sampling", ["batch", "example", "gaussian"])
def test_experts_without_tokens(sampling: Any) -> None:
    """As a mixture of experts calls them: a slice of all tokens, which may be empty. Compiled, too."""
    options: Any = {"example_dim": "all"} if sampling == "example" else {}
    expert = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    apply_dropconnect(expert, nn.Linear, p=0.4, sampling=sampling, **options)
    tokens = torch.randn(5, 4)
    compiled = [torch.compile(expert, backend="aot_eager", dynamic=True)]
    for call in (expert, *(compiled if options else ())):
        for chosen in (tokens[:0], tokens[:3], tokens[:0]):
            expert.zero_grad()
            call(chosen).sum().backward()
            assert expert[0].weight.grad is not None


@every_case
def test_frozen_weights_of_inference_mode(case: Case) -> None:
    """They do not count their changes."""
    with torch.inference_mode():
        module = case.build()
        for table, name in parts(module):
            table[name] = nn.Parameter(table[name].detach().clone(), requires_grad=False)
    inputs = case.inputs()
    target = case.target_of(module)
    plan_dropconnect(module, target, p=0.5, inference="sample", example_inputs=inputs)
    apply_dropconnect(module, target, p=0.5, inference="sample")
    first = output(module, *inputs)
    assert torch.equal(output(module, *inputs), first)
    with hold_masks(module):
        output(module, *inputs)
        output(module, *inputs)


def test_inference_weights_pass_gradients_on() -> None:
    with torch.inference_mode():
        layer = nn.Linear(4, 3).requires_grad_(False)
    apply_dropconnect(layer, nn.Linear, p=0.5)
    x = torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


def ragged(layout: torch.layout) -> Tensor:
    rows = [torch.randn(2, 6), torch.randn(3, 6)]
    return torch.nested.nested_tensor(rows, layout=layout)


INPUTS: dict[str, Callable[[], Tensor]] = {
    "nested": lambda: ragged(torch.strided),
    "jagged": lambda: ragged(torch.jagged),
    "sparse_coo": lambda: torch.randn(3, 6).to_sparse(),
    "sparse_csr": lambda: torch.randn(3, 6).to_sparse_csr(),
}


def entries(y: Tensor) -> Tensor:
    return torch.cat([part.flatten() for part in y.unbind()]) if y.is_nested else y


@pytest.mark.parametrize("name", INPUTS)
def test_what_the_plain_layer_takes(name: str) -> None:
    """Masks of a batch act on it; modes that replace the product say what they need."""
    x = INPUTS[name]()
    layer = nn.Linear(6, 5, bias=not name.startswith("sparse"))
    apply_dropconnect(layer, nn.Linear, p=0.5)
    y = layer(x)
    with torch.no_grad():
        torch.manual_seed(0)
        first = entries(layer(x))
        assert not torch.equal(entries(layer(x)), first)
    entries(y).sum().backward()
    assert layer.weight.grad is not None
    modes: Any = ({"sampling": "example"}, {"sampling": "gaussian"}, {"inference": "moments"})
    for options in modes:
        site = apply_dropconnect(nn.Sequential(nn.Linear(6, 5)), nn.Linear, p=0.5, **options)
        form = "nested" if name == "jagged" else name
        message = rf"0\.weight: .* needs a dense input, and got a {form} tensor\. Give it x\.to_"
        with pytest.raises(RuntimeError, match=message):
            site.train("inference" not in options)(x)


@pytest.mark.compiler
@pytest.mark.parametrize("sampling", ["batch", "example", "gaussian"])
def test_a_failing_forward_breaks_no_other(sampling: str) -> None:
    """Nothing that it used is used again."""
    layer = apply_dropconnect(nn.Linear(4, 3), nn.Linear, p=0.5, sampling=sampling)
    other = apply_dropconnect(nn.Linear(4, 3), nn.Linear, p=0.5, sampling=sampling)
    x = torch.randn(2, 4, requires_grad=True)
    release()
    for weight in (torch.randn(3, 4).to_sparse(), torch.randn(3, 4).to_mkldnn()):
        layer._parameters["weight_raw"] = nn.Parameter(weight, requires_grad=False)
        with contextlib.suppress(RuntimeError):
            layer(x).sum().backward()
        other(x).sum().backward()
    assert all(block.layout is torch.strided for block in free_blocks())
