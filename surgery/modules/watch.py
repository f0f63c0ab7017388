"""Notice a forward that reads a weight for which nobody draws a mask there.

Neither the source nor a run shows every reader. In training the property of a weight still hands out
the raw parameter to one that was not seen; then the weight is not dropped there, and nothing else would
tell.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
import warnings
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

from torch.utils import checkpoint

from ..kinds.reads import METADATA
from ..torch_private.modules import CALL, forward_hooks
from ..torch_private.tracing import backward_number
from .state import SiteState

_INNER = {CALL, *(code for code in CALL.co_consts if isinstance(code, CodeType))}
"""What runs hooks and the forward when a module is called."""

_ASKS = ("isinstance", "hasattr", "type", "id", "len")
"""Functions that look at an object and not at its values."""


def notice(state: SiteState) -> None:
    """Warn, once for a site, if a forward in training reads the value of the raw parameter.

    Called by the property, so that the frame of the reader is two above. Reads outside of any forward
    (a penalty on the weights), in hooks, and of a tensor's `dtype` or `shape` are nobody's fault.
    """
    if state.undropped_by is not None or state.mode(training=True) is None:
        return
    frame = sys._getframe(2)
    reader = _reader(frame)
    if reader is None or not _reads_value(frame.f_code, frame.f_lineno, state.name):
        return
    refuse_recomputation(state)
    state.undropped_by = reader
    warnings.warn(
        f"{state.site} is read by {reader} where no mask is drawn for it, so that it is not dropped "
        "there: give apply_dropconnect example_inputs, which shows who reads a weight, or exclude it",
        stacklevel=3,
    )


def refuse_recomputation(state: SiteState) -> None:
    """For a read with no mask drawn: what a backward recomputes had one, if the forward around drew it.

    Raises:
        RuntimeError: it had, and is gone.
    """
    if state.drawn_outside and backward_number() != -1:
        raise RuntimeError(
            f"activation checkpointing recomputes what reads {state.site}, and the forward that draws "
            "its mask is not part of that (drawn_by in dropconnect_sites): checkpoint the module that "
            "draws, as a whole, or exclude the site"
        )


def _reader(frame: FrameType | None) -> str | None:
    """Whose forward a frame is part of; None if it is part of none."""
    below: FrameType | None = None
    recomputed = False
    while frame is not None:
        if frame.f_code in _INNER:
            while frame.f_code is not CALL and frame.f_back is not None:
                frame = frame.f_back
            module = frame.f_locals.get("self")
            if below is not None and below.f_code in _codes_of_hooks(module):
                return None
            return f"the forward of {type(module).__name__}"
        recomputed = recomputed or frame.f_code.co_filename == checkpoint.__file__
        below, frame = frame, frame.f_back
    return "a recomputation of activations" if recomputed else None


def _codes_of_hooks(module: Any) -> set[Any]:
    """The code of the hooks around a forward."""
    return {code for hook in forward_hooks(module) for code in _codes(hook)}


def _codes(hook: Any) -> Iterator[Any]:
    while isinstance(hook, functools.partial):
        hook = hook.func
    call = hook if inspect.isfunction(hook) or inspect.ismethod(hook) else type(hook).__call__
    yield getattr(call, "__code__", None)


@functools.lru_cache(maxsize=1024)
def _reads_value(code: CodeType, line: int, name: str) -> bool:
    """Whether what a line reads as `<something>.name` is more than the form of a tensor; True if the
    source does not tell."""
    try:
        lines, start = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return True
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    here = line - max(start, 1) + 1
    found = [node for node in ast.walk(tree) if _is_read(node, name) and _is_on(node, here)]
    return not found or any(_is_value(node, parents) for node in found)


def _is_on(node: ast.AST, line: int) -> bool:
    first, last = getattr(node, "lineno", line), getattr(node, "end_lineno", None)
    return bool(first <= line <= (first if last is None else last))


def _is_read(node: ast.AST, name: str) -> bool:
    match node:
        case ast.Attribute(attr=found, ctx=ast.Load()):
            return found == name
        case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=found), *_]):
            return bool(found == name)
        case _:
            return False


def _is_value(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether the value of a tensor is used at a node of a tree."""
    match parents.get(node):
        case ast.Attribute(attr="data") as data if isinstance(
            parents.get(data), (ast.Attribute, ast.Subscript)
        ):
            return _is_value(data, parents)
        case ast.Attribute(attr="data", ctx=ast.Store()) | ast.Subscript(ctx=ast.Store()):
            return False  # it is written
        case ast.Attribute(attr=name) as method:
            call = parents.get(method, method)
            writes = name.endswith("_") and isinstance(parents.get(call), ast.Expr)
            return not writes and name not in METADATA
        case ast.Call(func=ast.Name(id=function)) if node is not None:
            return function not in _ASKS
        case ast.Compare(ops=ops):
            return not all(isinstance(op, (ast.Is, ast.IsNot)) for op in ops)
        case ast.Assign(targets=[ast.Name(id=name)]) as assigned:
            return any(_is_value(use, parents) for use in _uses(name, assigned, parents))
        case ast.Expr():
            return False
        case _:
            return True


def _uses(name: str, node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[ast.AST]:
    """Where the function around a node reads a local name."""
    while node in parents and not isinstance(node, ast.FunctionDef):
        node = parents[node]
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part.id == name and isinstance(part.ctx, ast.Load):
            yield part
