"""How a formula is run: fused by inductor where that is possible, else as it is, in chunks.

The compiled and the plain run execute the same operations and give the same bits. Three cases never
compile: weights so small that a compiled call gains nothing, tensors that are not plain (meta, fake,
subclasses), and code that is itself being traced, where the formula becomes part of that graph.
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

from .hash import advance_key

Formula = Callable[..., Tensor]

SMALL = 1 << 13
"""Below this many weights the plain formula takes no longer than a compiled call."""

CHUNK = 1 << 16
"""The plain formula works on this many weights at a time: its int32 temporaries stay in cache."""

_lock = threading.Lock()
_compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
_broken = False


def compile_enabled() -> bool:
    """Whether formulas are compiled: not switched off by `DROPCONNECT_COMPILE=0`, nor found not to
    work on this machine."""
    return not _broken and os.environ.get("DROPCONNECT_COMPILE", "1") != "0"


def is_traced() -> bool:
    """Whether the calling code is being traced, by `torch.compile` or by a `torch.func` transform."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


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
    if is_traced():
        return formula(*args)
    used: Tensor | None = run_compiled(formula, weight, weight.numel(), args)
    if used is not None:
        return used
    if mask is None:
        return _in_chunks(formula, weight, anchor, key, threshold, scale)
    return formula(*args)


def run_compiled(
    formula: Callable[..., Any], weight: Tensor, entries: int, args: tuple[Any, ...]
) -> Any:
    """`formula(*args)`, compiled; None where compiling does not work, or is not worth it for so many
    mask entries. `weight` is the argument that says where it runs."""
    if entries >= SMALL and _is_plain(weight) and compile_enabled():
        try:
            return _compile(formula)(*args)
        except Exception as error:
            if not _is_of_compiler(error):
                raise
            _give_up(error)
    return None


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (Tensor, torch.nn.Parameter) and weight.device.type in ("cpu", "cuda")


def _in_chunks(
    formula: Formula,
    weight: Tensor,
    anchor: Tensor | None,
    key: Tensor,
    threshold: Tensor,
    scale: Tensor,
) -> Tensor:
    numel = weight.shape[0]
    if numel <= CHUNK or weight.device.type != "cpu":
        return formula(weight, anchor, key, threshold, scale, None)
    used = torch.empty_like(weight)
    for start in range(0, numel, CHUNK):
        part = slice(start, min(start + CHUNK, numel))
        towards = None if anchor is None else anchor[part]
        moved = advance_key(key, start)
        used[part] = formula(weight[part], towards, moved, threshold, scale, None)
    return used


def _compile(formula: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled formula. `torch.compile` imports triton when called, so it is called late."""
    compiled = _compiled.get(formula)
    if compiled is None:
        with _lock:
            compiled = _make_compiled(formula)
            _compiled[formula] = compiled
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
        "torch.compile does not work here, so DropConnect masks are computed by the slower plain "
        f"formula (the results are the same). Install a C++ compiler to speed it up, or set "
        f"DROPCONNECT_COMPILE=0 to silence this. Reason: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )
