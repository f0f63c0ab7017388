"""Canaries of the stack of hooks on saved tensors."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks
from torch.utils import checkpoint

from surgery.torch_private import saved_hooks

from .canary import canary


def _same(value: Any) -> Any:
    return value


def _other(value: Any) -> Any:
    return id(value)


@canary(saved_hooks, "torch._C._autograd._top_saved_tensors_default_hooks")
def test_the_top_of_the_stack_is_the_last_pair() -> None:
    assert saved_hooks.top_hooks(False) is None
    outer, inner = saved_tensors_hooks(_same, _same), saved_tensors_hooks(_other, _same)
    with outer:
        with inner:
            assert saved_hooks.top_hooks(False) == (inner.pack_hook, inner.unpack_hook)
        assert saved_hooks.top_hooks(False) == (outer.pack_hook, outer.unpack_hook)
    assert saved_hooks.top_hooks(False) is None


@canary(saved_hooks, "torch._C._autograd._pop_saved_tensors_default_hooks")
def test_popping_is_leaving() -> None:
    """And a pair that others left on top of ours goes with it."""
    ours, left = saved_tensors_hooks(_same, _same), saved_tensors_hooks(_other, _same)
    with saved_tensors_hooks(_same, _other) as _:
        below = saved_hooks.top_hooks(False)
        ours.__enter__()
        left.__enter__()
        saved_hooks.take_out(ours)
        assert saved_hooks.top_hooks(False) == below
    assert saved_hooks.top_hooks(False) is None


@canary(saved_hooks, "torch.autograd.graph.saved_tensors_hooks")
def test_others_stay_if_ours_are_not_there() -> None:
    """They are put back by `saved_tensors_hooks.__enter__`, in their order."""
    first, second = saved_tensors_hooks(_same, _other), saved_tensors_hooks(_other, _same)
    with first, second:
        saved_hooks.take_out(saved_tensors_hooks(lambda tensor: tensor, _same))
        assert saved_hooks.top_hooks(False) == (second.pack_hook, second.unpack_hook)
    assert saved_hooks.top_hooks(False) is None


@canary(saved_hooks, "torch._C._autograd._saved_tensors_hooks_is_enabled")
def test_where_hooks_are_allowed() -> None:
    assert saved_hooks.hooks_are_allowed()
    with disable_saved_tensors_hooks("not here"):
        assert not saved_hooks.hooks_are_allowed()
    seen: list[bool] = []

    def asks(x: torch.Tensor) -> torch.Tensor:
        seen.append(saved_hooks.hooks_are_allowed())
        return x.sin().sum()

    torch.func.grad(asks)(torch.ones(2))
    assert seen == [False]
    assert saved_hooks.hooks_are_allowed()


@canary(
    saved_hooks,
    "torch.utils.checkpoint._current_user_saved_tensors_hooks",
    "_user_hooks",
    "_checkpoint_internal",
)
def test_selective_checkpoints_see_what_is_below_ours() -> None:
    users: Any = getattr(checkpoint, "_current_user_saved_tensors_hooks", lambda: None)
    ours = saved_tensors_hooks(lambda tensor: tensor, _same)
    for below in (nullcontext(), saved_tensors_hooks(_same, _other)):
        with below:
            seen = users()
            saved_hooks.see_through(ours.pack_hook)
            ours.__enter__()
            assert users() == seen
            saved_hooks.take_out(ours)
