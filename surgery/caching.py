"""A cache that keeps the type of what it wraps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


def cached(function: Function) -> Function:
    """`functools.cache`, typed: mypy holds that classes of modules are not hashable."""
    return cast(Function, functools.cache(function))
