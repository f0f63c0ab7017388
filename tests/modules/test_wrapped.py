"""Functions that a library has put on the instance around the forward, as transformers' tensor
parallelism does."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from surgery import SurgeryError, apply_dropconnect, strip_dropconnect


def wrap(module: nn.Module, factor: int = 3) -> Callable[..., Any]:
    """Put a function on the instance that keeps its forward; returns that function."""
    inner = module.forward

    def forward(x: torch.Tensor, *, shift: int = 1) -> Any:
        return inner(x) * factor + shift

    module.forward = forward
    return forward


def output(module: nn.Module, seed: int = 5) -> torch.Tensor:
    torch.manual_seed(seed)
    out: torch.Tensor = module(torch.eye(4))
    return out.detach()


def test_the_operated_forward_is_called_inside() -> None:
    plain, wrapped = (nn.Linear(4, 4) for _ in range(2))
    wrapped.load_state_dict(plain.state_dict())
    wrap(wrapped)
    apply_dropconnect(plain, "", p=0.5)
    apply_dropconnect(wrapped, "", p=0.5)
    assert torch.equal(output(wrapped), output(plain) * 3 + 1)
    assert not torch.equal(output(wrapped, 5), output(wrapped, 6))


def test_strip_puts_the_function_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    functions = [wrap(layer) for layer in model]
    before = output(model)
    apply_dropconnect(model, "0", p=0.5)
    assert model[0].forward is not functions[0]
    assert model[1].forward is functions[1]
    strip_dropconnect(model)
    assert [layer.forward for layer in model] == functions
    assert torch.equal(output(model), before)


def test_a_function_that_was_kept_drops_no_more_after_strip() -> None:
    layer = nn.Linear(4, 4)
    wrap(layer)
    before = output(layer)
    apply_dropconnect(layer, "", p=0.5)
    kept = layer.forward
    strip_dropconnect(layer)
    layer.forward = kept
    assert torch.equal(output(layer), before)


def test_sites_that_are_added_later() -> None:
    """The function is made again once."""
    attention: Any = nn.MultiheadAttention(4, 2)
    inner = attention.forward

    def forward(x: torch.Tensor) -> Any:
        return inner(x, x, x)[0]

    attention.forward = forward
    apply_dropconnect(attention, "in_proj_weight", p=0.5)
    once = attention.forward
    apply_dropconnect(attention, "out_proj", p=0.5)
    assert attention.forward is once
    assert not torch.equal(output(attention, 5), output(attention, 6))
    strip_dropconnect(attention)
    assert attention.forward is forward


def test_a_bias_is_refused() -> None:
    layer = nn.Linear(4, 4)
    wrap(layer)
    with pytest.raises(SurgeryError, match="look for the bias by its name; use bias=False"):
        apply_dropconnect(layer, "", p=0.5, bias=True)


@pytest.mark.parametrize("way", ["partial", "other", "method"])
def test_what_does_not_keep_the_forward_in_a_closure_is_refused(way: str) -> None:
    layer, other = nn.Linear(4, 4), nn.Linear(4, 4)
    if way == "partial":  # as accelerate's hooks do
        layer.forward = functools.partial(layer.forward)
    elif way == "other":
        wrap(other)
        layer.forward = other.forward
    else:
        layer.forward = other.forward
    with pytest.raises(SurgeryError, match="has been replaced on the instance"):
        apply_dropconnect(layer, "", p=0.5)


def test_copies_keep_the_plain_forward_of_whom_they_were_made() -> None:
    """As for a plain module: the function belongs to the original."""
    layer = nn.Linear(4, 4)
    wrap(layer)
    apply_dropconnect(layer, "", p=0.5)
    assert copy.deepcopy(layer).forward is layer.forward
