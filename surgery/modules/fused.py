"""The forward of a Linear, or of another product, whose weight is masked.

These are the most common cases, and those in which the time of Python counts most. In eager training
one node of autograd draws the mask, multiplies, and computes the gradients: that of `ops/extension`.
Where it is not there or leaves the call to Python, that of a Linear is that of
`surgery.ops.masked_linear`, and others go the general way. For other samplings of a Linear it is that
of their products, and what is skipped here is the search for weights that could have masks. In a
trace, each line and each attribute that is read takes time to compile, at each site.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import masked_linear
from ..ops.extension import loading
from ..ops.law import law_dtype
from ..ops.linear import autocast_dtype
from ..ops.linear_operators import has_operators, linear_in_graph
from ..ops.mask import drop_in_graph
from ..ops.ordinary import is_dense
from ..ops.product import ROWS
from ..ops.switch import compile_enabled
from ..torch_private.compiler import is_exporting, look_in_trace, object_of
from ..torch_private.tracing import is_scripted, is_traced, is_transformed
from .laws import published
from .masking import Operand, check_anchor
from .product_forward import product_forward
from .state import SiteState
from .watch import refuse_recomputation


def fused_forward(module: Any, x: Any) -> Tensor | None:
    """What the forward of a module returns for the input `x`.

    None, and nothing is changed, if the module has no such product, or anything else is asked of it (a
    mode, held masks, a bias that is dropped), or the input or the caller needs the general way.

    Raises:
        RuntimeError: the shape of the weight is no longer that of its anchor; or see
            `refuse_recomputation`.
    """
    own = module.__dict__
    states = own["_dropconnect"]
    if len(states) != 1:
        return None
    (state,) = states.values()
    if not _asks_for_one_site(state, own):
        return None
    if state.drawn_outside:
        refuse_recomputation(state)
    parameters = own["_parameters"]
    raw = parameters.get(state.raw)
    if type(raw) is not nn.Parameter:
        return None
    bias = parameters.get("bias")
    if bias is None:  # there is none, or it is an attribute: pruned or parametrized
        bias = module.bias
    anchor = None if state.anchor is None else getattr(module, state.anchor)
    if state.sampling != "batch":
        if not state.by_element:
            return None
        if type(x) is not Tensor or is_traced():
            return None
        state.drawn = True
        product: Tensor = product_forward(
            state.sampling, module, x, Operand(raw, state, anchor), bias
        )
        return product
    if loading.product is not None and type(state) is SiteState and compile_enabled("cpu"):
        how: Any = ROWS if state.is_linear else state.fused.how(module)  # type: ignore[union-attr, misc]
        if how is None:
            return None
        about = state.law, state.layout, anchor, state.name, how
        found: Tensor | None = loading.product(x, raw, bias, about, state.rank())
        if found is not None:
            state.drawn = True
            return found
    if not torch.is_grad_enabled() or is_traced():
        return None
    if not state.is_linear:
        loading.note_product()
        return None
    if type(x) is not Tensor or x.ndim < 2 or not is_dense(x):
        return None
    state.drawn = True
    if anchor is not None:
        check_anchor(state, raw, anchor)
    law, key = state.law_now(raw), state.new_key(raw.device)
    return masked_linear(x, raw, bias, key, law, state.layout, anchor, state.name)


def traced_forward(module: Any, x: Any) -> Tensor | None:
    """`fused_forward` for a trace; also while p is 0, since that may change. None while exporting.

    Where operators stand for the formula, the whole product is one, and one more its backward.
    """
    states = module._dropconnect
    if len(states) != 1 or type(x) is not Tensor or is_exporting():
        return None
    (state,) = states.values()
    names = state.in_trace
    if not names or module._dropconnect_draws:
        return None
    if state.held_key is not None or state.group is not None:
        return None
    if not (module.training or state.inference == "sample"):
        return None
    name, live, of_anchor = names.split("|")
    raw, row = getattr(module, name), state.row
    if row is None or type(raw) is not nn.Parameter or getattr(module, live) is not None:
        return None
    thresholds, scales = published(row.name)
    if scales.device != raw.device or scales.dtype != law_dtype(raw.dtype):
        return None
    if x.ndim < 2 or x.layout is not torch.strided:
        return None
    anchor = getattr(module, of_anchor) if of_anchor else None
    if anchor is not None and anchor.shape != raw.shape:
        return None
    look_in_trace(_note, _note_now, None, state, None, 0)
    key, kind, bias = state.new_key(raw.device), raw.device.type, module.bias
    if has_operators(kind) and not is_transformed():
        narrow, law = autocast_dtype(x), (key, thresholds, scales, row.index)
        casts = narrow is not None and kind != "cpu" and raw.dtype != torch.float64
        if casts:
            x, bias = x.to(narrow), None if bias is None else bias.to(narrow)
        if casts or (narrow is None and x.dtype == raw.dtype):
            product: Tensor = linear_in_graph(x, raw, bias, anchor, *law)
            return product
    threshold, scale = thresholds.index_select(0, row.index), scales.index_select(0, row.index)
    used = drop_in_graph(raw, anchor, key, threshold, scale, state.layout)
    return F.linear(x, used, bias)


def _note(context: Any) -> None:
    object_of(context, "state").drawn = True  # here, and not by each call of the compiled code


def _note_now(reader: Any, state: SiteState, used: Any, version: int) -> None:
    state.drawn = True


def _asks_for_one_site(state: SiteState, own: dict[str, Any]) -> bool:
    """Whether this call drops the weight of a product, and does nothing else. `own`: the
    `__dict__` of the module, which is faster to read than its attributes."""
    if not state.fusible:
        return False
    if state.held_key is not None or state.group is not None or own[state.live] is not None:
        return False
    if own["_dropconnect_draws"] or state.rate * state.factor == 0.0 or is_scripted():
        return False
    return own["training"] or state.inference == "sample"
