"""What the tests of the core share: a full snapshot of a model, and masked weights written out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from surgery import DropConnectModule
from surgery.ops import hash_bits
from surgery.ops.hash import mix, multipliers, spread
from surgery.spec.plan import join

REBUILT = frozenset({"_flat_weights", "_flat_weight_refs"})
"""Lists that `nn.RNNBase` makes from its parameters again and again."""


def bits_of(tensor: Tensor | None) -> Any:
    """Everything about the value of a tensor, exactly."""
    if tensor is None:
        return None
    if isinstance(tensor, UninitializedParameter):
        return type(tensor)
    form = tuple(tensor.shape), tensor.stride(), tensor.dtype, str(tensor.device)
    if tensor.device.type == "meta" or not tensor.numel():
        return form
    value = tensor.detach().contiguous().view(-1)
    return form, value.view(torch.uint8).tolist()


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


def keep(key: Tensor, p: float, *shape: int) -> Tensor:
    """The keep mask of a key, row-major, as 0 and 1 in float64."""
    index = torch.arange(math.prod(shape), dtype=torch.int32)
    threshold = min(round(p * 2**32), 2**32) - 2**31
    return (hash_bits(index, key).long() >= threshold).double().view(shape)


def keep_examples(key: Tensor, p: float, examples: int, *shape: int) -> Tensor:
    """The keep masks of the elements of a weight, one for each example."""
    places = spread(torch.arange(math.prod(shape), dtype=torch.int32))
    bits = mix(places, key, multipliers(examples, key)[:, None]).long()
    return (bits >= min(round(p * 2**32), 2**32) - 2**31).double().view(examples, *shape)


def masked(weight: Tensor, mask: Tensor, p: float, anchor: Tensor | None = None) -> Tensor:
    """`A + m (W - A) / (1 - p)` as the library rounds it; `mask` broadcasts to the weight."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    scale = torch.tensor(1 / (1 - round(p * 2**32) / 2**32) if p < 1 else 0.0, dtype=wide)
    kept = weight.to(wide) * scale
    if anchor is None:
        return torch.where(mask.bool(), kept, torch.zeros((), dtype=wide)).to(weight.dtype)
    towards = anchor.to(wide)
    return torch.where(mask.bool(), kept + towards * (1 - scale), towards).to(weight.dtype)


def site_names(model: nn.Module) -> list[str]:
    """Plain dotted names of the sites that draw a key of their own, in the order of the model."""
    return [
        join(name, state.name)
        for name, module in model.named_modules()
        if isinstance(module, DropConnectModule)
        for state in module._dropconnect.values()
        if state.follows is None
    ]


def plain_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """A parameter by its plain name, whether or not it is operated."""
    return module._parameters[f"{name}_raw" if f"{name}_raw" in module._parameters else name]
