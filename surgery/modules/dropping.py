"""One forward of an operated module: masks are drawn, the forward of the original class runs with
them, and they are let go."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..torch_private.modules import REPLICA
from .flat import flat_of, open_flat
from .fused import fused_forward
from .live import Open, check_unwritten, close, is_of_another_thread, recipes_of, watched
from .masking import Factor, draw_keys, is_sharded, masked_weight
from .product_forward import drops_in_product, product_forward, replaced_product
from .recompute import call_recomputing
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
    replaced = replaced_product(module._dropconnect.values(), module.training)
    if replaced is not None:
        return functools.partial(_by_product, module, *replaced)
    return functools.partial(base.forward, module)


def _by_product(module: Any, state: SiteState, mode: str, *args: Tensor, **kwargs: Tensor) -> Any:
    """What the forward of a module with a product would return, in one of the modes of products."""
    if len(args) != 1 or kwargs:  # as the forward of the class takes it, under whatever name
        forward = module._dropconnect_class[0].forward
        _, *args = inspect.signature(forward).bind(module, *args, **kwargs).arguments.values()  # type: ignore[assignment]
    (x,) = args
    of_bias = module._dropconnect.get("bias")
    # Where the product does not drop the bias, it is masked by now, or plain.
    bias = _factor(module, of_bias) if drops_in_product(of_bias, module.training) else module.bias
    return product_forward(mode, module, x, _factor(module, state), bias)


def _factor(module: Any, state: SiteState) -> Factor:
    anchor = None if state.anchor is None else getattr(module, state.anchor)
    return Factor(getattr(module, state.raw), state, anchor)


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
    """Draw the masks of a module's own sites. `outside`: for the forward of a module around it."""
    flat = None if outside or torch.compiler.is_compiling() else flat_of(module)
    factors = [_factor(module, state) for state in _to_mask(module, outside)]
    if not factors:
        return
    keep_law = not getattr(module, REPLICA, False)
    for factor, key in zip(factors, draw_keys(factors)):
        if flat is not None and factor.state.name in flat.names:
            flat.add(factor, key)
        else:
            used, recipe = masked_weight(factor, key, keep_law)
            _hand_out(module, watched(module, factor.state, used, recipe), opened)
    if flat is not None and flat.masks:
        for one in open_flat(module, flat):
            _hand_out(module, one, opened)


def _to_mask(module: Any, outside: bool) -> list[SiteState]:
    """The sites that this call masks: not those that have a mask now, or that a product drops."""
    compiling = torch.compiler.is_compiling()
    states = []
    for state in module._dropconnect.values():
        mode = state.mode(module.training)
        if mode is None or (module.__dict__[state.live] is not None and runs_now(module)):
            continue
        if mode == "batch":
            states.append(state)
        if compiling:  # activation checkpoints in a graph forbid to note anything
            continue
        if mode != "batch":
            state.drawn = True
        elif outside:
            state.drawn_outside = True
        elif state.drawn_outside:
            refuse_recomputation(state)
    return states


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
