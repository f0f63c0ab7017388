"""Operators of a graph: what `torch.compile` calls as it is.

They have no gradient of their own. `torch.library.custom_op` gives every operator a function of Python
that asks whether one is wanted, at each call, also of compiled code, where none ever is: that takes
longer than a small product. So what is differentiable is another operator, made of these. Dynamo, which
takes a millisecond for each step of a formula, sees that one; what compiles the graph sees the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("surgery", "FRAGMENT")


def operator(schema: str, function: Callable[..., Any], shape: Callable[..., Any]) -> Any:
    """An operator without a gradient. The extension may have it in C++.

    Args:
        schema: name, arguments and results, without the namespace.
        function: what it does, on any device.
        shape: the same for fake tensors.
    """
    name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"surgery::{name}", shape, lib=_library)
    return getattr(torch.ops.surgery, name).default


def composite(schema: str, formula: Callable[..., Any]) -> Any:
    """An operator that is made of others, and differentiable if these are."""
    name = _library.define(schema, tags=())
    _library.impl(name, formula, "CompositeImplicitAutograd")
    return getattr(torch.ops.surgery, name).default
