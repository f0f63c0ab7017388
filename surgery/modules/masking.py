"""The weight that one forward call uses, and how autograd can have it again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import Law, drop_weight
from ..ops.hash import Key
from ..ops.linear import as_if_trained
from ..ops.part_mask import is_sharded
from ..torch_private.modules import MANAGED
from ..torch_private.tensors import identity, version_of
from ..torch_private.tracing import is_graphed, is_traced
from .recompute import Recipe, address_of, can_recompute
from .state import SiteState


class Operand(NamedTuple):
    """A weight or a bias that one call drops: of a module, or of a node of a graph."""

    raw: Tensor
    """The stored parameter, of any shape."""
    state: SiteState
    anchor: Tensor | None
    """Where dropped entries go, of the shape of `raw`; None is zero."""


def draw_keys(operands: Sequence[Operand]) -> list[Key]:
    """The key of each mask of one call: the one that is held, or that of the weight which a bias
    follows, or a new one. New ones are drawn in the order of `operands`."""
    keys: dict[str, Key] = {}
    for raw, state, _ in operands:
        key: Key | None = state.held_key
        if key is not None and not torch.compiler.is_compiling() and is_graphed():
            key = _lifted(key)
        if key is None and state.follows is not None:
            key = keys.get(state.follows)
        if key is None:
            key = state.new_shared_key(raw) if is_sharded(raw) else state.new_key(raw.device)
        keys[state.name] = key
    return list(keys.values())


_lifted: Callable[[Any], Tensor] = torch.ops.aten.lift_fresh_copy.default
"""What `torch.tensor` ends with: a tensor from outside becomes a constant of a graph, and among fake
ones a fake one."""


def masked_weight(
    operand: Operand, key: Key, keep_law: bool = True
) -> tuple[Tensor, Recipe | None]:
    """The masked weight, and the recipe to compute it again; None if autograd keeps it instead.

    Args:
        operand: what is masked.
        key: of the mask, int32, shape (2,).
        keep_law: whether the law may be kept in the state.

    Raises:
        RuntimeError: its shape is no longer that of its anchor.
    """
    raw, state, anchor = operand
    check_anchor(state, raw, anchor)
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():  # with a version, see `live.py`
            return masked_weight(operand, key, keep_law)
    law, layout = state.law_for(raw, keep=keep_law), state.layout_for(raw)
    if state.held_key is not None and not torch.compiler.is_compiling():
        return _held(state, raw, key, law, anchor), None
    used = drop_weight(raw, key, law, layout, anchor)
    address = address_of(used) if can_recompute() else None
    if address is None:
        return requiring_as(used, raw), None

    def rebuild() -> Tensor:
        return drop_weight(raw.detach(), key, law, layout, anchor)

    return used, Recipe(address, raw, version_of(raw), rebuild, state.name, version_of(used))


def check_anchor(state: SiteState, raw: Tensor, anchor: Tensor | None) -> None:
    """Raise `RuntimeError` if the weight was resized and its anchor was not."""
    if anchor is None or anchor.shape == raw.shape:
        return
    if state.part is None or tuple(raw.shape) != state.part.shape:
        raise RuntimeError(
            f"{state.name!r} has shape {tuple(raw.shape)} but its pretrained anchor has "
            f"{tuple(anchor.shape)}: the weight was resized after apply_dropconnect. Strip first, "
            "resize, and apply again."
        )


def is_managed(module: Any) -> bool:
    """Whether FSDP, of either version, holds the module's parameters under their present names. It
    marks the object; `nn.Module.__getattr__` would take long to say that it did not."""
    return bool(module.__dict__.get(MANAGED, False))


AFTER_FSDP = "FSDP holds the parameters of the module; apply before FSDP wraps the model"


def requiring_as(used: Tensor, raw: Tensor) -> Tensor:
    """A masked weight that requires a gradient if its parameter does, also under `no_grad`. Torch
    chooses kernels by that (`matmul` folds a batch or not), and they round differently. A reentrant
    checkpoint runs a forward without gradients, and again with them: both must round alike."""
    if torch.is_grad_enabled() or not raw.requires_grad or is_traced():
        return used
    return as_if_trained(used)


class Held(NamedTuple):
    """A masked weight that is kept while masks are held."""

    weight: Tensor
    made_from: Any
    """As `_source` says it."""
    alive: tuple[Any, ...]
    """What `made_from` tells by ids and addresses, which Python uses again for others once it is gone:
    the objects, and aliases that keep the memory of tensors."""


def _source(raw: Tensor, anchor: Tensor | None, law: Law) -> Any:
    """What a held masked weight is computed from: the same as long as the masked weight would be."""
    forms = [_form(tensor) for tensor in (raw, anchor) if tensor is not None]
    return id(raw), id(anchor), id(law), torch.is_grad_enabled(), forms


def _form(tensor: Tensor) -> Any:
    """Where the values of a tensor lie, how, and how often they were written."""
    memory = identity(tensor.untyped_storage()), tensor.storage_offset()
    return *memory, tensor.dtype, tensor.shape, tensor.stride(), version_of(tensor)


def _held(state: SiteState, raw: Tensor, key: Key, law: Law, anchor: Tensor | None) -> Tensor:
    """The masked weight while masks are held. It is kept until what it was computed from changes: a
    loop over a cell computes it once, and autograd masks the sum of its gradients once. A backward ends
    that too, because the optimiser that follows may write without a new version (`p.data.add_`)."""
    layout = state.layout_for(raw)
    if is_traced():
        return drop_weight(raw, key, law, layout, anchor)
    held: Held | None = state.held  # once: replicas in other threads share the state
    source = _source(raw, anchor, law)
    if held is None or held.made_from != source:
        used = drop_weight(raw, key, law, layout, anchor)
        alive = raw, raw.detach(), law, anchor, None if anchor is None else anchor.detach()
        state.held = held = Held(requiring_as(used, raw), source, alive)
        if used.grad_fn is not None:
            used.register_hook(functools.partial(_let_go, state))
    return held.weight


def _let_go(state: SiteState, grad: Tensor) -> None:
    state.held = None
