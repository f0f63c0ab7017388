"""How a formula is run: by a kernel where there is one, else as it is, in chunks.

    CPU     the C++ kernels of `native.py`, compiled at first use
    GPU     what inductor makes of the formula, at first use
    else    the formula, in chunks, so that memory stays bounded; with one warning if that is because
            compiling failed

All give the same bits. Code that is being traced gets the formula, which becomes part of its graph.
"""

from __future__ import annotations

import inspect
import os
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..caching import cached, lasting
from . import native
from .hash import advance_key, mix_into, spread
from .ordinary import is_batched
from .workspace import Block, borrow, give_back

Formula = Callable[..., Tensor]

CHUNK = 1 << 18
"""The plain formula works on this many weights at a time: smaller parts spend their time in calls, and
the int32 temporaries of larger ones leave the cache."""

INDUCTOR = frozenset({"cuda"})
"""Types of device on which formulas are compiled by inductor."""

_lock = threading.Lock()
_compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
_enabled = os.environ.get("DROPCONNECT_COMPILE", "1") != "0"
_broken = False


def compile_enabled() -> bool:
    """Whether anything is compiled: not switched off by `DROPCONNECT_COMPILE=0`, nor found not to
    work on this machine."""
    return _enabled and not _broken


def set_compile_enabled(enabled: bool) -> bool:
    """Switch compiling on or off; returns what it was. At the start, the environment variable
    `DROPCONNECT_COMPILE` tells."""
    global _enabled
    before, _enabled = _enabled, enabled
    return before


def is_traced() -> bool:
    """Whether the calling code must be plain tensor operations, because something follows each of them:
    `torch.compile`, a `torch.func` transform, or forward-mode AD."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return True
    return torch._C._are_functorch_transforms_active()


def run(
    formula: Formula,
    weight: Tensor,
    anchor: Tensor | None,
    key: Tensor,
    threshold: Tensor,
    scale: Tensor,
    mask: tuple[int, ...] | None,
) -> Tensor:
    """Evaluate `formula` on these arguments; see `surgery.ops.mask.masked_formula` for them."""
    args = (weight, anchor, key, threshold, scale, mask)
    if is_traced() or is_batched(weight):
        return formula(*args)
    if mask is None:
        used = masks(weight, anchor, None, (key, threshold, scale))
        if used is not None:
            return used
    compiled: Tensor | None = run_compiled(formula, weight, args)
    if compiled is not None:
        return compiled
    if mask is None:
        return _in_chunks(formula, weight, anchor, key, threshold, scale)
    return formula(*args)


Law = tuple[Tensor, Tensor, Tensor]
"""Key, threshold and scale of a mask."""


def masks(
    weight: Tensor,
    anchor: Tensor | None,
    grad: Tensor | None,
    law: Law,
    block: Block | None = None,
) -> Tensor | None:
    """The masked weight, by the kernel for the CPU.

    Args:
        weight, anchor: of one shape; the anchor may be None.
        grad: of that shape, or None. It gets the same mask, in place.
        law: key, threshold and scale.
        block: memory in which to put the masked weight.

    Returns:
        None where there is no kernel for these tensors; then nothing was done.
    """
    given = [tensor for tensor in (weight, anchor, grad) if tensor is not None]
    if is_traced() or not native.takes(*given) or not has_kernels("masks"):
        return None
    used = torch.empty_like(weight) if block is None else block.view(weight)
    if block is None and not native.takes(used):  # a mode that makes tensors of its own
        return None
    native.drop(weight, anchor, grad, used, grad, law)
    return used


def has_kernels(name: str) -> bool:
    """Whether there are kernels of that name for the CPU; the first question compiles them."""
    if not compile_enabled():
        return False
    try:
        native.library(name)
    except native.NoCompiler as error:
        _give_up(error)
        return False
    return True


def run_compiled(formula: Callable[..., Any], weight: Tensor, args: tuple[Any, ...]) -> Any:
    """`formula(*args)`, compiled by inductor; None where that is not the way, or does not work.
    `weight` is the argument that says where it runs."""
    plain = type(weight) in (Tensor, torch.nn.Parameter)
    if plain and weight.device.type in INDUCTOR and compile_enabled():
        try:
            return _compile(formula)(*args)
        except Exception as error:
            if not _is_of_compiler(error):
                raise
            _give_up(error)
    return None


def _in_chunks(
    formula: Formula,
    weight: Tensor,
    anchor: Tensor | None,
    key: Tensor,
    threshold: Tensor,
    scale: Tensor,
) -> Tensor:
    numel = weight.shape[0]
    if anchor is None and weight.dtype in _NARROW and native.takes(weight):
        return _masked_in_chunks(weight, key, threshold, scale)
    if numel <= CHUNK or weight.device.type != "cpu":
        return formula(weight, anchor, key, threshold, scale, None)
    used = torch.empty_like(weight)
    for start in range(0, numel, CHUNK):
        part = slice(start, min(start + CHUNK, numel))
        towards = None if anchor is None else anchor[part]
        moved, places = advance_key(key, start), _places(CHUNK)[: part.stop - start]
        used[part] = formula(weight[part], towards, moved, threshold, scale, None, places)
    return used


_NARROW = (torch.float32, torch.bfloat16)


def _masked_in_chunks(weight: Tensor, key: Tensor, threshold: Tensor, scale: Tensor) -> Tensor:
    """What `masked_formula` gives without an anchor, to the bit, with as few passes over memory as it
    has steps."""
    used = torch.empty_like(weight)
    every = _places(CHUNK)
    blocks = [borrow(every) for _ in range(2)]
    z, spare = (torch.empty_like(every) if block is None else block.view(every) for block in blocks)
    least = int(threshold)
    for start in range(0, len(weight), CHUNK):
        into, part = used[start : start + CHUNK], weight[start : start + CHUNK]
        z, spare, places = (tensor[: len(part)] for tensor in (z, spare, every))
        mix_into(places, advance_key(key, start), z, spare)
        exact = into.dtype == scale.dtype
        wide = torch.mul(part.to(scale.dtype), scale, out=into if exact else None)
        wide.view(torch.int32).bitwise_and_(_ones_where_kept(z, least))
        if not exact:
            into.copy_(wide)
    for block in blocks:
        give_back(block)
    return used


def _ones_where_kept(z: Tensor, least: int) -> Tensor:
    """All bits one where z >= least, else zero; in place. A comparison would give bool, and what torch
    does with those takes several times as long as with int32."""
    if least == -(1 << 31):
        return z.fill_(-1)
    return z.clamp_(least - 1, least).neg_().add_(least - 1)


@cached
def _places(count: int) -> Tensor:
    """The spread indices of a chunk, which are the same for all of them."""
    with lasting():
        return spread(torch.arange(count, dtype=torch.int32, device="cpu"))


def _compile(formula: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled formula. `torch.compile` imports triton when called, so it is called late."""
    compiled = _compiled.get(formula)
    if compiled is None:
        with _lock:
            compiled = _compiled.get(formula)
            if compiled is None:
                compiled = _compiled[formula] = _make_compiled(formula)
    return compiled


class _NoCompiler(RuntimeError):
    """`torch.compile` could not even be called."""


def _make_compiled(formula: Callable[..., Any]) -> Callable[..., Any]:
    try:
        with warnings.catch_warnings():
            # where warnings are errors, torch's own deprecations would look like a broken compiler
            warnings.simplefilter("ignore")
            import torch._inductor.compile_fx
        options: dict[str, Any] = {}
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            # one entry for each dtype, device, rank of the mask and presence of an anchor
            options["recompile_limit"] = 64
        return torch.compile(formula, dynamic=True, fullgraph=True, **options)
    except Exception as error:
        raise _NoCompiler(str(error) or type(error).__name__) from error


def _is_of_compiler(error: Exception) -> bool:
    """Whether an error says that compiling failed, rather than the formula's own work."""
    if isinstance(error, _NoCompiler):
        return True
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    return isinstance(error, (TorchDynamoException, CppCompileError, InvalidCxxCompiler))


def _give_up(error: BaseException) -> None:
    global _broken
    with _lock:
        if _broken:
            return
        _broken = True
    reason = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__
    warnings.warn(
        "No kernels can be compiled here, so DropConnect masks are computed by the slower plain "
        f"formula (the results are the same). Install a C++ compiler to speed it up, or set "
        f"DROPCONNECT_COMPILE=0 to silence this. Reason: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )
