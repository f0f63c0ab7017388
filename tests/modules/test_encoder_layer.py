"""`nn.TransformerEncoderLayer`, whose forward reads the weights of its children in `eval()` only."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from surgery import apply_dropconnect, dropconnect_sites, set_inference

from ..expected import keep, masked
from ..internals import taken_by_extension, without_extension

LINEAR = ["linear1.weight", "linear2.weight"]


def layers(**options: Any) -> tuple[nn.TransformerEncoderLayer, nn.TransformerEncoderLayer]:
    """One whose two Linears are operated, and a plain one."""
    torch.manual_seed(1)
    plain = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    operated = apply_dropconnect(copy.deepcopy(plain), "linear?", p=0.5, **options)
    return operated, plain


def step(layer: nn.Module) -> list[Tensor]:
    """What a step gives; and random numbers, which tell where it leaves the generator."""
    torch.manual_seed(2)
    x = torch.randn(3, 4, 8, requires_grad=True)
    layer.zero_grad()
    layer(x).square().sum().backward()
    grads = [one.grad for one in layer.parameters() if one.grad is not None]
    assert x.grad is not None
    return [x.grad, *grads, torch.rand(2)]


@pytest.mark.compiler
@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_in_training_its_linears_are_products_of_the_extension(
    toward: str, extension: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert extension
    layer, _ = layers(toward=toward)
    taken = taken_by_extension(monkeypatch)
    found = step(layer)
    assert taken == [True, True]
    with pytest.MonkeyPatch.context() as patch:
        without_extension(patch)
        for one, other in zip(found, step(layer), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": True}], ids=str)
def test_masks_that_the_layer_has_drawn_are_not_drawn_again(reentrant: bool, options: Any) -> None:
    """In `eval()` it draws, and a checkpoint of what it calls would draw others."""
    layer, _ = layers(inference="sample", **options)
    layer.eval()
    block = layer._ff_block
    layer._ff_block = lambda x: checkpoint(block, x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="activation checkpointing recomputes what reads linear"):
        step(layer)


@pytest.mark.parametrize("options", [{}, {"bias": True}], ids=str)
@pytest.mark.parametrize("copied", [lambda layer: layer, copy.deepcopy], ids=["same", "copy"])
def test_it_may_have_sampled_before(options: Any, copied: Any) -> None:
    layer, _ = layers(**options)
    set_inference(layer, "sample")
    with torch.no_grad():
        layer.eval()(torch.randn(3, 4, 8))
    layer = copied(layer.train())
    whole = step(layer)
    for name in ("linear1", "linear2"):
        setattr(layer, name, checkpoint_wrapper(getattr(layer, name)))
    for one, other in zip(whole, step(layer), strict=True):
        assert torch.equal(one, other)


def replaced(layer: nn.TransformerEncoderLayer, way: str, patch: pytest.MonkeyPatch) -> None:
    def block(self: Any, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.linear1.weight, self.linear1.bias).relu()
        return F.linear(hidden, self.linear2.weight, self.linear2.bias)

    if way == "instance":
        patch.setattr(layer, "_ff_block", partial(block, layer), raising=False)
    elif way == "class":
        patch.setattr(nn.TransformerEncoderLayer, "_ff_block", block)
    else:
        first = layer.linear1
        patch.setitem(first.__dict__, "forward", lambda x: F.linear(x, first.weight, first.bias))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("way", "before"),
    [
        ("instance", True),
        ("instance", False),
        ("class", True),
        ("class", False),
        ("forward of a child", False),
    ],
)
def test_methods_that_others_have_put_in_place_get_masked_weights(
    way: str, before: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    if before:
        replaced(layer, way, monkeypatch)
    apply_dropconnect(layer, "linear1", p=1.0)
    if not before:
        replaced(layer, way, monkeypatch)
    x = torch.randn(3, 4, 8)
    output = (torch.compile(layer, backend="eager") if compiled else layer)(x)
    layer.linear1.weight.data.zero_()
    with torch.no_grad():
        assert torch.allclose(output, layer(x), atol=1e-6)


def test_a_child_that_trains_in_a_layer_that_does_not(keys: list[Tensor]) -> None:
    """One kernel computes the layer then, from the masked weight."""
    layer, plain = layers()
    layer.eval()
    layer.linear1.train()
    x = torch.randn(3, 4, 8)
    with torch.no_grad():
        output = layer(x)
        (key,) = keys
        weight = plain.linear1.weight
        weight.data = masked(weight.data, keep(key, 0.5, *weight.shape), 0.5)
        assert torch.equal(output, plain.eval()(x))


def test_a_child_that_does_not_train_in_a_layer_that_does(keys: list[Tensor]) -> None:
    layer, plain = layers()
    layer.linear1.eval()
    x = torch.randn(3, 4, 8)
    output = layer(x)
    (key,) = keys
    weight = plain.linear2.weight
    weight.data = masked(weight.data, keep(key, 0.5, *weight.shape), 0.5)
    assert torch.equal(output, plain(x))


def test_a_subclass_with_methods_of_its_own_draws_for_all_that_these_read(
    keys: list[Tensor],
) -> None:
    class Own(nn.TransformerEncoderLayer):
        def _ff_block(self, x: Tensor) -> Tensor:
            hidden = nn.functional.linear(x, self.linear1.weight, self.linear1.bias).relu()
            return self.linear2(hidden)

    layer = Own(8, 2, 12, dropout=0.0, batch_first=True)
    plain = copy.deepcopy(layer)
    apply_dropconnect(layer, "linear?", p=0.5)
    x = torch.randn(3, 4, 8)
    output = layer(x)
    names = [site.name for site in dropconnect_sites(layer)]
    assert names == LINEAR
    for key, name in zip(keys, names, strict=True):
        weight = plain.get_parameter(name)
        weight.data = masked(weight.data, keep(key, 0.5, *weight.shape), 0.5)
    assert torch.equal(output, plain(x))
