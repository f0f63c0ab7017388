"""One forward of an operated module: masks are drawn, the forward of the original class runs with
them, and they are let go."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.hash import Key
from .flat import flat_of, open_flat
from .fused import fused_forward
from .live import Open, check_unwritten, close, is_of_another_thread, recipes_of, watched
from .masking import check_anchor, is_sharded, masked_weight
from .product_forward import Factor, product_forward
from .recompute import Recipe, call_recomputing
from .state import SiteState
from .watch import refuse_recomputation


def dropping(base: type[nn.Module], module: Any, *args: Any, **kwargs: Any) -> Any:
    """One forward of the original class, with its masks."""
    if len(args) == 1 and not kwargs:
        fused = fused_forward(module, args[0])
        if fused is not None:
            return fused
    opened: list[Open] = []
    result = None
    try:
        _open(module, opened)
        if opened:
            result = call_recomputing(recipes_of(opened), _inner(base, module), args, kwargs)
            close(opened)
    except BaseException as error:
        close(opened)  # not in `finally`, which an interrupt can end before it did anything
        for one in opened:  # nobody knows what would have been read
            one.state.drawn = True
        if isinstance(error, Exception):
            check_unwritten(module, opened)  # which autograd may have complained of
        raise
    if not opened:
        return _inner(base, module)(*args, **kwargs)
    check_unwritten(module, opened)
    return result


def _inner(base: type[nn.Module], module: Any) -> Callable[..., Any]:
    """What runs with the masks: the original forward, or a product in its place."""
    found = _product_site(module)
    if found is not None:
        return functools.partial(_by_product, module, *found)
    return functools.partial(base.forward, module)


def _product_site(module: Any) -> tuple[SiteState, str] | None:
    """The weight of this module and its mode, if its product is to be replaced in this forward."""
    states = module._dropconnect.values()
    weight = next((state for state in states if state.product is not None), None)
    mode = None if weight is None else mode_of_product(states, module.training)
    return None if weight is None or mode is None else (weight, mode)


def mode_of_product(states: Iterable[SiteState], training: bool) -> str | None:
    """The mode of a weight, or of its bias where that alone has a p; None if the product stays."""
    for state in states:
        mode = state.mode(training)
        if mode is not None and mode != "batch":
            return mode
    return None


def _by_product(module: Any, state: SiteState, mode: str, *args: Tensor, **kwargs: Tensor) -> Any:
    """What the forward of a module with a product would return, with the paper's masks or moments."""
    if len(args) != 1 or kwargs:  # as the forward of the class takes it, under whatever name
        forward = module._dropconnect_class[0].forward
        _, *args = inspect.signature(forward).bind(module, *args, **kwargs).arguments.values()  # type: ignore[assignment]
    (x,) = args
    weight = Factor(getattr(module, state.raw), state, _anchor(module, state))
    assert state.product is not None
    return product_forward(state.product, module, x, weight, _bias(module), mode)


def _bias(module: Any) -> Factor | None:
    """The bias as a forward finds it: dropped by the product, or masked by now, or plain."""
    state = module._dropconnect.get("bias")
    if state is not None and state.mode(module.training) not in (None, "batch"):
        return Factor(getattr(module, state.raw), state, _anchor(module, state))
    return None if module.bias is None else Factor(module.bias)


def _anchor(module: Any, state: SiteState) -> Any:
    anchor = None if state.anchor is None else getattr(module, state.anchor)
    check_anchor(state, getattr(module, state.raw), anchor)
    return anchor


def _open(module: Any, opened: list[Open]) -> None:
    """Draw the masks of this forward call: of the module's own sites, and of those it reads for its
    children. A mask that a caller's scope has drawn stays."""
    _open_own(module, opened)
    for child in drawn_children(module):
        if not _any_sharded(child):
            _open_own(child, opened, outside=True)


def drawn_children(module: Any) -> Iterator[Any]:
    """The descendants whose weights this module's forward reads itself; not those that were replaced,
    removed or stripped since."""
    for path in module._dropconnect_draws:
        child: Any = module
        for part in path.split("."):
            child = getattr(child, part, None)
        if isinstance(child, nn.Module) and "_dropconnect" in child.__dict__:
            yield child


def _any_sharded(child: Any) -> bool:
    """Whether a child is sharded now: then it is gathered, and draws, in its own forward."""
    return any(is_sharded(getattr(child, state.raw)) for state in child._dropconnect.values())


def _open_own(module: Any, opened: list[Open], outside: bool = False) -> None:
    keys: dict[str, Key] = {}
    compiling = torch.compiler.is_compiling()
    flat = None if outside or compiling else flat_of(module)
    for state in module._dropconnect.values():
        mode = state.mode(module.training)
        if mode is None or (module.__dict__[state.live] is not None and runs_now(module)):
            continue
        if mode != "batch":
            if not compiling:  # activation checkpoints in a graph forbid it
                state.drawn = True
            continue
        raw = getattr(module, state.raw)
        if not compiling:
            if outside:
                state.drawn_outside = True
            elif state.drawn_outside:
                refuse_recomputation(state)
        if state.held_key is not None:
            key = state.held_key
        elif state.follows in keys:
            key = keys[state.follows]
        else:
            key = state.new_key(raw.device)
        keys[state.name] = key
        if flat is not None and state.name in flat.names:
            flat.add(state, key, state.law_for(raw), _anchor(module, state))
            continue
        used, recipe = _used(module, state, raw, key)
        _hand_out(module, watched(module, state, used, recipe), opened)
    if flat is not None and flat.masks:
        for one in open_flat(module, flat):
            _hand_out(module, one, opened)


def _used(module: Any, state: SiteState, raw: Tensor, key: Key) -> tuple[Tensor, Recipe | None]:
    keep_law = not getattr(module, "_is_replica", False)
    return masked_weight(state, raw, _anchor(module, state), key, keep_law)


def _hand_out(module: Any, one: Open, opened: list[Open]) -> None:
    """Let the forward read a masked weight."""
    opened.append(one)  # first, so that it is let go in any case
    object.__setattr__(module, one.state.live, one.used)
    if torch.compiler.is_compiling():  # else whoever reads it says so
        one.state.drawn = True


def runs_now(module: Any) -> bool:
    """Whether a forward that drew a mask for this module is running. A mask that is there while none
    is was left by a forward that was killed, which happens in the main thread alone: a mask of another
    thread is taken for one that is used. (To look at the frames of other threads can block all of them:
    CPython holds a lock for that, under which it may collect garbage.)"""
    if torch.compiler.is_compiling():
        return True
    for state in module._dropconnect.values():
        if is_of_another_thread(module.__dict__[state.live]):
            return True
    above: FrameType | None = sys._getframe()
    while above is not None:
        if "dropping" in above.f_code.co_name:
            opened = above.f_locals.get("opened") or ()
            if any(owner is module for owner, *_ in opened):
                return True
        above = above.f_back
    return False
