"""Weights that are computed from other parameters: pruned, normed, or dropped by another library.

Such a module has `weight_orig`, or `weight_g` and `weight_v`, and before its forward somebody computes
`weight` from them. The weight is computed before our mask is drawn, so the mask would have no effect.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..torch_private.modules import PRUNED, pre_hooks
from .reads import forward_of

_FIXES: tuple[tuple[type[Any], str, str], ...] = (
    (BasePruningMethod, PRUNED, "torch.nn.utils.prune.remove(module, {!r})"),
    (WeightNorm, "name", "torch.nn.utils.remove_weight_norm(module, {!r})"),
    (SpectralNorm, "name", "torch.nn.utils.remove_spectral_norm(module, {!r})"),
)
"""For hooks of these classes: where they keep the name of the weight, and what takes them out."""


def computed(cls: type[nn.Module], module: nn.Module, name: str) -> str | None:
    """Name of the weight that is computed from a parameter, if the parameter is not read itself.

    Args:
        cls: the plain class of the module.
        module: owner of the parameter.
        name: of the parameter.
    """
    if isinstance(module, parametrize.ParametrizationList):
        return "the parametrized weight"
    weight = name.rpartition("_")[0]
    if not weight or weight in module._parameters:
        return None
    forward = forward_of(cls, module)
    if forward.reads((name,)):
        return None
    held = isinstance(module.__dict__.get(weight), Tensor) or weight in module._buffers
    return weight if held or forward.reads((weight,)) else None


def fix(module: nn.Module, weight: str) -> str:
    """What makes a computed weight a parameter again."""
    if isinstance(module, parametrize.ParametrizationList):
        return "call torch.nn.utils.parametrize.remove_parametrizations first"
    if parametrize.is_parametrized(module, weight):
        return f"call torch.nn.utils.parametrize.remove_parametrizations(module, {weight!r}) first"
    for hook in pre_hooks(module):
        for cls, attribute, call in _FIXES:
            if isinstance(hook, cls) and getattr(hook, attribute, None) == weight:
                return f"call {call.format(weight)} first"
    return "take out what computes it (WeightDrop?) first"
