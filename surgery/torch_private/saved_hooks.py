"""The stack of hooks that decide what autograd keeps of a tensor.

Putting a pair of hooks on it and taking the last one off is public:
`torch.autograd.graph.saved_tensors_hooks`. Looking at it is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint

top_hooks: Callable[[bool], tuple[Any, Any] | None]
top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
"""`top_hooks(False)` is the pair (pack, unpack) that acts now, or None.

Ours hand every tensor that is no masked weight on to those that were there before. Without it,
activation checkpoints and `save_on_cpu` around an operated module would lose its activations.
"""

_pop: Callable[[], None] = torch._C._autograd._pop_saved_tensors_default_hooks
"""What leaving `saved_tensors_hooks` does, without the call of a Python function: it is done in each
forward. Without it, leave the hooks by their `__exit__`."""

hooks_are_allowed: Callable[[], bool]
hooks_are_allowed = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]
"""Whether hooks may be put on: inside of `disable_saved_tensors_hooks` and of transforms of
`torch.func` they may not, and doing it raises. Without it, operated modules would raise there."""


_users: Callable[[], Any] | None
_users = getattr(checkpoint, "_current_user_saved_tensors_hooks", None)
"""Since torch 2.14: the hooks that what a selective checkpoint keeps may go through."""


def see_through(pack: Any) -> None:
    """Let selective activation checkpoints see the hooks below this function, and not it, while it is
    on the stack: it hands on to the checkpoint what they keep. Without it, torch 2.14 would warn, and
    with `respect_saved_tensors_hooks=True` a checkpoint would ask itself without end."""
    if _users is not None:
        pack._user_hooks = _users()
        pack._checkpoint_internal = True


def take_out(hooks: saved_tensors_hooks) -> None:
    """Take a pair of hooks off the stack, and what somebody who was killed inside has left on top of
    it; if it is there."""
    above = []
    while (top := top_hooks(False)) is not None:
        _pop()
        if top[0] is hooks.pack_hook:
            if _users is not None:  # the graph keeps the function, and no other hooks by it
                hooks.pack_hook._user_hooks = None
            return
        above.append(top)
    for pack, unpack in reversed(above):
        saved_tensors_hooks(pack, unpack).__enter__()
