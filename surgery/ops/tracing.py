"""Whether the calling code is followed by something that sees each tensor operation."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_traced() -> bool:
    """Whether the calling code must be plain tensor operations, because something follows each of them:
    `torch.compile`, a `torch.func` transform, or forward-mode AD."""
    if forward_ad._current_level >= 0 or torch.compiler.is_compiling():
        return True
    return torch._C._are_functorch_transforms_active()
