"""What is made once and kept."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast
from weakref import WeakValueDictionary, ref

Function = TypeVar("Function", bound=Callable[..., Any])


def cached(function: Function) -> Function:
    """`functools.cache` with the type of what it wraps: mypy holds that classes of modules are not
    hashable."""
    return cast(Function, functools.cache(function))


Key = TypeVar("Key")
Value = TypeVar("Value")


class PerObject(Generic[Key, Value]):
    """What is known of classes or functions, for as long as these live. A value must not refer to its
    key. (`WeakKeyDictionary` takes ten times as long for an answer.)"""

    def __init__(self) -> None:
        self._known: dict[int, tuple[ref[Any], Value]] = {}

    def get(self, key: Key, make: Callable[[Key], Value]) -> Value:
        """The value of `key`; made if there is none."""
        known = self._known.get(id(key))
        # Compare the object, not only its id: an interrupt may have left the entry of a dead one.
        if known is not None and known[0]() is key:
            return known[1]
        value, place, table = make(key), id(key), self._known
        table[place] = ref(key, lambda _: table.pop(place, None)), value
        return value

    def clear(self) -> None:
        self._known.clear()


def cached_weakly(function: Function) -> Function:
    """`cached` for a function whose first argument is a class or a function: it is not kept alive."""
    known: PerObject[Any, dict[Any, Any]] = PerObject()

    @functools.wraps(function)
    def remembered(key: Any, *args: Any) -> Any:
        found = known.get(key, lambda _: {})
        if args not in found:
            found[args] = function(key, *args)
        return found[args]

    return cast(Function, remembered)


def kept_for_class(make: Callable[[type, tuple[str, ...]], type]) -> Any:
    """`cached` for a function that makes subclasses of a class. One of a class that was defined inside
    a function lives as long as it is used: kept here, it would keep that class for ever."""
    lasting: dict[tuple[type, tuple[str, ...]], type] = {}
    used: WeakValueDictionary[tuple[int, tuple[str, ...]], type] = WeakValueDictionary()

    @functools.wraps(make)
    def made(base: type, names: tuple[str, ...]) -> type:
        found = lasting.get((base, names)) or used.get((id(base), names))
        if found is None:
            found = used[id(base), names] = make(base, names)
            if _is_importable(base):
                lasting[base, names] = found
        return found

    return made


def _is_importable(cls: type) -> bool:
    """Whether its module has the class under its name, and so keeps it anyway."""
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is cls
