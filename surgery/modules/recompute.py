"""Let autograd keep the key instead of the masked weight.

A forward that multiplies by the masked weight makes autograd save it, which would cost the size of
every weight until the backward pass. While the forward runs, hooks on saved tensors replace any view
of a masked weight by a recipe (raw weight, key, law) and rebuild it when backward asks for it.

Hooks of an outer scope (activation checkpointing, `save_on_cpu`) see every other tensor as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..ops.versions import check_unmodified
from ..torch_private.saved_hooks import hooks_are_allowed, see_through, take_out, top_hooks
from ..torch_private.tensors import version_of
from ..torch_private.tracing import is_traced


class Recipe(NamedTuple):
    """How to compute a masked weight again."""

    address: int
    """Of the memory of the masked weight, by which saved tensors are recognised."""
    raw: Tensor
    version: int
    """Of `raw`, when the masked weight was made."""
    rebuild: Callable[[], Tensor]
    name: str
    made: int
    """Version of the masked weight when it was made."""
    saved: Callable[[], None] | None = None
    """Called for each view of the masked weight that autograd saves."""


class _SavedView(NamedTuple):
    """A view of a masked weight, as it lies in that weight's storage."""

    recipe: Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Saved(NamedTuple):
    """Any other tensor, with the version that autograd would have checked."""

    tensor: Tensor
    version: int


def _replacing(recipes: Sequence[Recipe]) -> saved_tensors_hooks:
    """Hooks for a forward: tensors saved inside are replaced by their recipe if they are views of a
    masked weight."""
    known = {recipe.address: recipe for recipe in recipes}
    outer_pack, outer_unpack = top_hooks(False) or (_pack, _unpack)

    def pack(tensor: Tensor) -> Any:
        recipe = known.get(_address(tensor))
        if recipe is None or not _is_as_made(tensor, recipe):
            return outer_pack(tensor)
        if recipe.saved is not None:
            recipe.saved()
        return _SavedView(recipe, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def unpack(saved: Any) -> Any:
        return _rebuild(saved) if isinstance(saved, _SavedView) else outer_unpack(saved)

    see_through(pack)
    return saved_tensors_hooks(pack, unpack)


def call_recomputing(
    recipes: Sequence[Recipe],
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """`forward(*args, **kwargs)` inside the hooks for these recipes, if there are any. `with` would
    leave the hooks in place, for everything that is saved from then on, if an interrupt came at its
    end."""
    if not recipes:
        return forward(*args, **kwargs)
    hooks = _replacing(recipes)
    try:
        hooks.__enter__()
        result = forward(*args, **kwargs)
        take_out(hooks)
        return result
    except BaseException:
        take_out(hooks)
        raise


def can_recompute() -> bool:
    """Whether saved-tensor hooks work here: autograd records, nothing traces, nothing forbids."""
    return torch.is_grad_enabled() and not is_traced() and hooks_are_allowed()


def address_of(used: Tensor) -> int | None:
    """The key under which a masked weight is found, or None if it has no storage of its own."""
    if type(used) is not Tensor or used.device.type == "meta" or used.numel() == 0:
        return None
    return _address(used)


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, quantised and wrapper tensors have none
        return 0


def _is_as_made(tensor: Tensor, recipe: Recipe) -> bool:
    """Whether size, stride and offset are all that this view adds to the masked weight: it was not
    changed since, nor is it seen as complex or negated."""
    same = tensor.dtype == recipe.raw.dtype and not tensor.is_neg()
    return same and version_of(tensor) == recipe.made


def _rebuild(saved: _SavedView) -> Tensor:
    recipe = saved.recipe
    check_unmodified(recipe.name, recipe.raw, recipe.version)
    # Of detached tensors, so that nothing is recorded: an interrupt inside `no_grad` could leave it on.
    return recipe.rebuild().as_strided(saved.size, saved.stride, saved.offset)


def _pack(tensor: Tensor) -> _Saved:
    return _Saved(tensor, version_of(tensor))


def _unpack(saved: _Saved) -> Tensor:
    version = version_of(saved.tensor)
    if version != saved.version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: a tensor of shape {tuple(saved.tensor.shape)} is at version "
            f"{version}; expected version {saved.version} instead"
        )
    return saved.tensor
