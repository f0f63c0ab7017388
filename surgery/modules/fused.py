"""The forward of a Linear whose weight is masked by element, in eager training.

This is the most common case, and the one in which the time of Python counts most. One autograd Function
(`surgery.ops.masked_linear`) draws the mask, multiplies, and computes the gradients.
"""

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
    """What the forward of a module returns, shape (..., out), for the input `x`, shape (..., in).

    None, and nothing is changed, if the module is no such Linear, or anything else is asked of it (a
    mode, held masks, a bias that is dropped), or the input or the caller needs the general way.

    Raises:
        RuntimeError: the shape of the weight is no longer that of its anchor.
    """
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
    if bias is None:  # there is none, or it is an attribute: pruned or parametrized
        bias = module.bias
    law, key = state.law_for(raw), state.new_key(raw.device)
    return masked_linear(x, raw, bias, key, law, state.layout, anchor, state.name)


def _asks_for_a_mask(state: SiteState, own: dict[str, Any]) -> bool:
    """Whether this call draws one mask, by element, for the weight of a Linear, and nothing else.
    `own`: the `__dict__` of the module, which is faster to read than its attributes."""
    if state.product is not LINEAR_PRODUCT or state.sampling != "batch":
        return False
    if state.held_key is not None or state.group is not None or own[state.live] is not None:
        return False
    if own["_dropconnect_draws"] or state.rate * state.factor == 0.0 or is_scripted():
        return False
    return (own["training"] or state.inference == "sample") and state.layout.is_elementwise
