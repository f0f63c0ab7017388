"""A mask for each example: what backward keeps, how much memory it takes, and how it is traced."""

from __future__ import annotations

import subprocess
import sys
import warnings
from itertools import compress

import pytest
import torch
from torch import Tensor

from surgery.ops import (
    Law,
    example_linear,
)
from surgery.spec.config import Unit

from .test_example import KEY, law, naive, tensors, towards, units


@pytest.mark.parametrize("rows", [1, 6])
def test_backward_keeps_the_input_and_the_weight(rows: int) -> None:
    x, weight, _ = tensors((8, rows, 12, 10), False)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        example_linear(x, weight, KEY, law(0.5), "element")
    assert sorted(tensor.numel() for tensor in kept) == sorted([x.numel(), weight.numel()])


def test_a_weight_changed_before_backward_is_noticed() -> None:
    x, weight, _ = tensors((2, 1, 4, 3), False)
    product = example_linear(x, weight, KEY, law(0.5), "element")
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


MEMORY = """
import sys, torch
import torch.nn.functional as F
from surgery.ops import Law, example_linear, key_from_seed

def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) / 1024

def step():
    x.grad = weight.grad = None
    for f in layers[sys.argv[1]]:
        f().sum().backward()

x = torch.randn(128, 1, 1024, requires_grad=True)
weight = torch.randn(1024, 1024, requires_grad=True)
law, key = Law.of(0.5, x.device, x.dtype), key_from_seed(1)
layers = {"plain": [lambda: F.linear(x, weight)],
          "example": [lambda: example_linear(x, weight, key, law, "element")]}
step()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
step()
print(status("VmHWM") - before, 4.0 + 4.0 + 2.0)
"""

"""Peak of a step beside what is there, in MB; and what a plain layer has: weight, gradient, x, y."""


@pytest.mark.compiler
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_under_twice_that_of_a_plain_layer() -> None:
    """128 examples of 1024 x 1024: all their weights would be 512 MB, their masks 128 MB."""
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, "example"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    extra, plain = map(float, result.stdout.split())
    assert extra < plain


@units
def test_compiles_into_one_graph(unit: Unit) -> None:
    x, weight, anchor = tensors((4, 6, 8, 5), True)

    def layer(x, weight):
        return example_linear(x.tanh(), weight, KEY, rule, unit, anchor).sin()

    rule = law(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of what it traces
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        results = [
            (y, *torch.autograd.grad(y.sum(), (x, weight)))
            for y in (compiled(x, weight), layer(x, weight))
        ]
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_a_compiled_graph_holds_no_weight_of_an_example() -> None:
    """No tensor of the graphs of forward and backward has examples x out x in entries."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    x, weight, _ = tensors((7, 3, 11, 13), False)
    rule, sizes = law(0.5), []

    def inspect(graph, inputs):
        for node in graph.graph.nodes:
            for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
                if isinstance(value, Tensor):
                    sizes.append(value.numel())
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=inspect, bw_compiler=inspect)
    compiled = torch.compile(
        lambda: example_linear(x, weight, KEY, rule, "element"), fullgraph=True, backend=backend
    )
    compiled().sum().backward()
    assert max(sizes) == max(x.numel(), weight.numel(), 7 * 3 * 13)


def test_exports_as_one_node() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x, weight, key, threshold, scale):
            return example_linear(x, weight, key, Law(threshold, scale), "element")

    x, weight, _ = tensors((4, 6, 8, 5), False)
    args = (x.detach(), weight.detach(), KEY, law(0.5).threshold, law(0.5).scale)
    graph = torch.export.export(Layer(), args, strict=False).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert called == ["surgery.example_product.default"]


@towards
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_operators_are_registered_correctly(anchored: bool) -> None:
    x, weight, anchor = tensors((3, 2, 4, 5), anchored)
    args = (x, weight, anchor, KEY, law(0.5).threshold, law(0.5).scale)
    torch.library.opcheck(torch.ops.surgery.example_product.default, args)
    grad = torch.randn(3, 2, 5).double().requires_grad_()
    for wanted in [(True, True), (False, True), (True, False)]:
        backward = torch.ops.surgery.example_product_backward.default
        torch.library.opcheck(backward, (grad, *args, *wanted))


@units
@towards
def test_functional_transforms(unit: Unit, anchored: bool) -> None:
    x, weight, anchor = tensors((3, 2, 4, 5), anchored)
    x = x.detach()

    def loss(weight):
        return example_linear(x, weight, KEY, law(0.5), unit, anchor).square().sum()

    (expected,) = torch.autograd.grad(loss(weight), weight)
    weight = weight.detach()
    torch.testing.assert_close(torch.func.grad(loss)(weight), expected)
    both = torch.stack([weight, 2 * weight])
    gradients = torch.func.vmap(torch.func.grad(loss))(both)
    torch.testing.assert_close(gradients[0], expected)
    torch.testing.assert_close(gradients[1], torch.func.grad(loss)(2 * weight))


MOVES = {"x": (True, False, False), "weight": (False, True, False), "grad": (False, False, True)}
WANTED = {"x": (True, False), "weight": (False, True), "both": (True, True)}


@towards
@pytest.mark.parametrize("moves", [*MOVES.values(), (True,) * 3], ids=[*MOVES, "all"])
@pytest.mark.parametrize("wanted", WANTED.values(), ids=[f"of-{name}" for name in WANTED])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of `torch.func.jvp`
def test_tangents_of_gradients(wanted, moves, anchored: bool) -> None:
    """Forward over reverse: gradients of x and of the weight, where some of x, the weight and the
    gradient of the product move."""
    x, weight, anchor = tensors((3, 2, 4, 5), anchored)
    at = x.detach(), weight.detach(), torch.randn(3, 2, 5).double()
    start, along = (tuple(compress(of, moves)) for of in (at, map(torch.randn_like, at)))

    def tangents(product):
        def gradients(*moved):
            rest = iter(moved)
            x, weight, grad = (next(rest) if m else fixed for m, fixed in zip(moves, at))

            def of_wanted(*ours):
                given = iter(ours)
                return product(*(next(given) if w else t for w, t in zip(wanted, (x, weight))))

            return torch.func.vjp(of_wanted, *compress((x, weight), wanted))[1](grad)

        return torch.func.jvp(gradients, start, along)[1]

    found = tangents(lambda x, weight: example_linear(x, weight, KEY, law(0.3), "element", anchor))
    expected = tangents(lambda x, weight: naive(x, weight, 0.3, "element", anchor))
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)


def test_meta_tensors() -> None:
    x = torch.empty(2, 3, 4, device="meta", requires_grad=True)
    weight = torch.empty(5, 4, device="meta", requires_grad=True)
    rule = Law.of(0.5, weight.device, weight.dtype)
    product = example_linear(x, weight, KEY.to("meta"), rule, "element")
    assert product.shape == (2, 3, 5)
    product.sum().backward()
    assert weight.grad.shape == (5, 4)
