"""One forward of an operated module: draw the masks, run the forward of the original class with them,
and let them go."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..kinds.kind import kind_of_class
from ..ops.part_mask import is_sharded
from ..torch_private.compiler import constant_in_traces
from ..torch_private.modules import REPLICA
from .flat import flat_of, open_flat
from .fused import fused_forward, traced_forward
from .live import Open, check_unwritten, close, is_of_another_thread, watched
from .masking import Operand, draw_keys, is_managed, masked_weight
from .product_forward import drops_in_product, product_forward, replaced_product
from .recompute import call_recomputing
from .state import SiteState
from .varying import Varying
from .watch import refuse_recomputation


def dropping(base: type[nn.Module], module: Any, *args: Any, **kwargs: Any) -> Any:
    """One forward of an operated module. `base`: its original class.

    Raises:
        SurgeryError: the forward has written to a masked weight.
    """
    if len(args) == 1 and not kwargs:
        if torch.compiler.is_dynamo_compiling():
            fused = traced_forward(module, args[0])
        else:
            fused = fused_forward(module, args[0])
        if fused is not None:
            return fused
    opened: list[Open] = []
    result = None
    try:
        _open(module, opened)
        if opened:
            recipes = [one.recipe for one in opened if one.recipe is not None]
            result = call_recomputing(recipes, _inner(base, module), args, kwargs)
            close(opened)
    except BaseException as error:
        close(opened)  # not in `finally`: an interrupt can end that before it has done anything
        for one in opened:  # the forward ended early: it might have read all of them
            one.state.drawn = True
        if isinstance(error, Exception):
            check_unwritten(module, opened)  # a write may be what the error complains of
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
    bias = _operand(module, of_bias) if drops_in_product(of_bias, module.training) else module.bias
    return product_forward(mode, module, x, _operand(module, state), bias)


def _operand(module: Any, state: SiteState) -> Operand:
    anchor = None if state.anchor is None else getattr(module, state.anchor)
    return Operand(getattr(module, state.raw), state, anchor)


def _open(module: Any, opened: list[Open]) -> None:
    """Draw the masks of this forward call: of the module's own sites, and of those descendants whose
    weights its forward reads. A mask that a forward around this one has drawn stays."""
    _open_own(module, opened)
    if _rests(module):
        return
    for child in drawn_children(module):
        weights = [getattr(child, state.raw) for state in child._dropconnect.values()]
        # Those that FSDP has sharded are gathered in the child's own forward, which draws.
        if not (any(map(is_sharded, weights)) and is_managed(child)):
            _open_own(child, opened, outside=True)


def _rests(module: Any) -> bool:
    """Whether the forward of a module only calls the descendants that it would draw for: in training,
    if nobody has put something else in the place of the methods that call them or of their forwards."""
    if not (module.training and module._dropconnect_draws):
        return False
    methods = _callers(module._dropconnect_class[0])
    if not methods or any(name in module.__dict__ for name in methods):
        return False
    return not any("forward" in child.__dict__ for child in drawn_children(module))


@constant_in_traces
def _callers(base: type[nn.Module]) -> Sequence[str]:
    return kind_of_class(base).rests(base)


def drawn_children(module: Any) -> Iterator[Any]:
    """The descendants for which a module's forward draws masks; not those that were replaced, removed
    or stripped since surgery was done."""
    for path in module._dropconnect_draws:
        child: Any = module
        for part in path.split("."):
            child = getattr(child, part, None)
        if isinstance(child, nn.Module) and "_dropconnect" in child.__dict__:
            yield child


def _open_own(module: Any, opened: list[Open], outside: bool = False) -> None:
    """Draw the masks of a module's own sites. `outside`: for the forward of a module around it."""
    flat = None if outside or torch.compiler.is_compiling() else flat_of(module)
    masked, varying = _to_open(module, outside)
    for state in varying:
        weight = Varying.of(_operand(module, state))
        _hand_out(module, Open(module, state, weight, 0, None), opened)
    operands = [_operand(module, state) for state in masked]
    if not operands:
        return
    keep_law = not getattr(module, REPLICA, False)
    for operand, key in zip(operands, draw_keys(operands)):
        if flat is not None and operand.state.name in flat.names:
            flat.add(operand, key)
        else:
            used, recipe = masked_weight(operand, key, keep_law)
            _hand_out(module, watched(module, operand.state, used, recipe), opened)
    if flat is not None and flat.masks:
        for one in open_flat(module, flat):
            _hand_out(module, one, opened)


def _to_open(module: Any, outside: bool) -> tuple[list[SiteState], list[SiteState]]:
    """The sites that this call masks, and those of which moments travel: not those that have a mask
    now, or that a product drops."""
    compiling = torch.compiler.is_compiling()
    states: list[SiteState] = []
    varying: list[SiteState] = []
    for state in module._dropconnect.values():
        mode = state.mode(module.training)
        if mode is None or (module.__dict__[state.live] is not None and runs_now(module)):
            continue
        if mode == "batch":
            states.append(state)
        elif mode == "moments" and state.varies:
            varying.append(state)
        if compiling:  # activation checkpoints in a graph forbid to note anything
            continue
        if mode != "batch":
            state.drawn = True
        elif outside:
            state.drawn_outside = state.drawn_outside or torch.is_grad_enabled()
        elif state.drawn_outside:
            refuse_recomputation(state)
    return states, varying


def _hand_out(module: Any, one: Open, opened: list[Open]) -> None:
    """Set a masked weight, so that the forward reads it."""
    opened.append(one)  # first: after an interrupt between the two, `close` lets it go
    object.__setattr__(module, one.state.live, one.used)
    if torch.compiler.is_compiling():  # in eager mode the property notes it, when it is read
        one.state.drawn = True


def runs_now(module: Any) -> bool:
    """Whether a forward that drew a mask for this module is running.

    If none is and there is a mask, then a forward that was killed has left it. Only forwards in the
    main thread are killed, so a mask of another thread is always in use. (Nor could one ask: looking at
    the frames of other threads takes a lock under which CPython may collect garbage, and block for
    ever.)

    This thread is searched for frames of `dropping` by name, and for their local `opened`.
    """
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
