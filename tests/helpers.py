"""A snapshot of a model, the bits of tensors, sites and parameters by their plain names; layers."""

from __future__ import annotations

import math
from ctypes import string_at
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from surgery import predict_moments
from surgery.spec.plan import join

from .internals import states_of

REBUILT = frozenset({"_flat_weights", "_flat_weight_refs"})
"""Lists that `nn.RNNBase` makes from its parameters again and again."""


def bits_of(tensor: Tensor | None) -> Any:
    """Everything about the value of a tensor, exactly."""
    if tensor is None:
        return None
    if isinstance(tensor, UninitializedParameter):
        return type(tensor)
    form = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    if tensor.is_meta or not tensor.numel():
        return form
    value = tensor if tensor.is_contiguous() else tensor.detach().contiguous()
    return form, string_at(value.data_ptr(), value.nbytes)


def bits(tensor: Tensor) -> Tensor:
    """All bits, one NaN being as good as another."""
    one = torch.where(tensor.isnan(), torch.full_like(tensor, math.nan), tensor.detach())
    return one.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def sorts(tensor: Tensor) -> Tensor:
    """Which numbers are NaN, and which infinities."""
    return tensor.isnan() + 2 * tensor.isposinf() + 3 * tensor.isneginf()


class Snapshot:
    """All that surgery must not change: objects, order, names, classes, hooks, flags, values."""

    def __init__(self, model: nn.Module) -> None:
        self.kept_alive = list(model.modules()), list(model.parameters())
        self.modules = [
            (name, id(module), type(module), module.training, _attributes(module))
            for name, module in model.named_modules(remove_duplicate=False)
        ]
        self.parameters = [
            (name, id(value), type(value), value.requires_grad, bits_of(value), bits_of(value.grad))
            for name, value in model.named_parameters(remove_duplicate=False)
        ]
        self.state = [(name, bits_of(value)) for name, value in model.state_dict().items()]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Snapshot)
        return (self.modules, self.parameters, self.state) == (
            other.modules,
            other.parameters,
            other.state,
        )


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The instance's attributes by identity, and what lies in its dicts (parameters, hooks)."""
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name in REBUILT:
            found[name] = [id(item) for item in value] if name == "_flat_weights" else len(value)
        elif isinstance(value, dict):
            found[name] = id(value), [(key, id(item)) for key, item in value.items()]
        elif isinstance(value, (set, list, tuple)):
            found[name] = type(value), sorted(map(id, value))
        else:
            found[name] = id(value)
    return found


def site_names(model: nn.Module) -> list[str]:
    """Plain dotted names of the sites that draw a key of their own, in the order of the model."""
    return [
        join(name, state.name)
        for name, module in model.named_modules()
        for state in states_of(module)
        if state.follows is None
    ]


def plain_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """A parameter by its plain name, whether or not it is operated."""
    return module._parameters[f"{name}_raw" if f"{name}_raw" in module._parameters else name]


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A layer with copies of these."""
    made = nn.Linear(weight.shape[1], len(weight), dtype=weight.dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.copy_(bias)
    return made


def assert_moments_of_draws(model: nn.Module, x: Tensor, count: int = 2000) -> None:
    """A forward draws; mean and variance with full covariance are those of so many."""
    with torch.no_grad():
        drawn = torch.stack([model(x) for _ in range(count)])
    found = predict_moments(model, x, "full", class_dim=None)
    gap = (found.mean - drawn.mean(0)) / (drawn.std(0) / math.sqrt(count))
    assert gap.square().mean() < 2
    assert float(found.variance.sum() / drawn.var(0).sum()) == pytest.approx(1, abs=0.1)
