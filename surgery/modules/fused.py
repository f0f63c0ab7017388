"""The forward of a Linear whose weight is masked by element, in eager training: the common case, and
the one in which the host's time counts most. One function does the product, its gradients and masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kinds.product import LINEAR_PRODUCT
from ..ops import masked_linear
from ..ops.ordinary import is_dense
from ..torch_private.tracing import is_scripted, is_traced
from .masking import check_anchor
from .state import SiteState


def fused_forward(module: Any, x: Any) -> Tensor | None:
    """What the forward returns; None, with nothing done, if anything but a mask by element is asked of
    this module, its input or the caller."""
    own = module.__dict__
    states = own["_dropconnect"]
    if len(states) != 1 or not torch.is_grad_enabled() or is_traced():
        return None
    (state,) = states.values()
    if not _asks_for_a_mask(state, own):
        return None
    if type(x) is not Tensor or x.ndim < 2 or not is_dense(x):
        return None
    parameters = own["_parameters"]
    raw = parameters.get(state.raw)
    if type(raw) is not nn.Parameter:
        return None
    state.drawn = True
    anchor = None
    if state.anchor is not None:
        anchor = getattr(module, state.anchor)
        check_anchor(state, raw, anchor)
    bias = parameters.get("bias")
    if bias is None:  # there is none, or it is pruned or parametrized
        bias = module.bias
    law, key = state.law_for(raw), state.new_key(raw.device)
    return masked_linear(x, raw, bias, key, law, state.layout, anchor, state.name)


def _asks_for_a_mask(state: SiteState, own: dict[str, Any]) -> bool:
    """Whether the weight gets a mask of its own in this call, by element, and nothing else is drawn."""
    if state.product is not LINEAR_PRODUCT or state.sampling != "batch":
        return False
    if state.held_key is not None or state.group is not None or own[state.live] is not None:
        return False
    if own["_dropconnect_draws"] or state.rate * state.factor == 0.0 or is_scripted():
        return False
    return (own["training"] or state.inference == "sample") and state.layout.is_elementwise
