"""Changes that are made as a whole or not at all, wherever an interrupt lands.

Python raises `KeyboardInterrupt` between two instructions of Python code, never inside a function
written in C. So a change is written down first, as a list of *steps*, each a call into C
(`dict.update`, `object.__setattr__`), and then all steps are taken by one more call into C, which for
Python is one instruction. The same holds for what takes a change back.

Where Python code has to work on the thing itself (the graphs of torch.fx), the steps that put it back
are written down before it starts, and taken if it does not end. And since an interrupt can come when
nothing but the putting back is left, that is done once more by whoever catches it:

    try:
        result = call()
        put_back()
        return result
    except BaseException:
        surely(put_back)
        raise
"""

from __future__ import annotations

import io
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, repeat
from typing import Any, TypeVar

from torch import Tensor, nn

Result = TypeVar("Result")
Self = TypeVar("Self", bound="Reversible")

Step = Callable[[], Any]
"""A `functools.partial` of a function written in C, which runs no Python code."""

_take: Callable[[Step], Any] = partial.__call__  # type: ignore[assignment]


def at_once(steps: Iterable[Step]) -> Callable[[], Any]:
    """A call that takes these steps with nothing in between. A second call does nothing."""
    return partial(deque, map(_take, list(steps)), 0)


def surely(step: Callable[[], Any]) -> None:
    """Call until it ends, also when interrupts come meanwhile. For handlers that raise again; `step`
    must be safe to call twice."""
    while True:
        try:
            step()
            break
        except Exception:
            raise
        except BaseException:  # an interrupt; the one that is being handled will do
            continue


def restoring(put_back: Callable[[], Any], call: Callable[[], Result]) -> Result:
    """What `call` returns, after `put_back`, which has to end and may be called more than once."""
    try:
        result = call()
        put_back()
        return result
    except BaseException:  # not `finally`, which an interrupt can end before it has done anything
        surely(put_back)
        raise


class Lock:
    """Lets one thread at a time call something.

    `with` on a lock of `threading` can be interrupted between its block and its release: the lock stays
    taken, and the next call waits for ever.
    """

    def __init__(self) -> None:
        self._lock: Any = threading.RLock()  # one that knows whose it is

    def holding(self, call: Callable[[], Result]) -> Result:
        """What `call` returns, which no other thread calls meanwhile."""

        def taken() -> Result:
            self._lock.acquire()
            return call()

        return restoring(self._let_go, taken)

    def _let_go(self) -> None:
        while self._lock._is_owned():
            self._lock.release()


class Changes:
    """Steps that change objects; nothing happens before `make`.

    Like steps are kept together and taken by one `map`: a model may have thousands of modules.
    """

    def __init__(self) -> None:
        self._objects: list[object] = []
        self._classes: list[type] = []
        self._filled: list[dict[str, Any]] = []
        self._contents: list[Mapping[str, Any]] = []
        self._changed: list[dict[str, Any]] = []
        self._items: list[Mapping[str, Any]] = []
        self._poorer: list[dict[str, Any]] = []
        self._keys: list[str] = []
        self._others: list[Step] = []
        """Of dicts of other types, which have methods of their own."""

    def set_class(self, things: Sequence[object], cls: type) -> None:
        """Change the class of objects."""
        self._objects += things
        self._classes += [cls] * len(things)

    def fill(self, table: dict[str, Any], content: Mapping[str, Any]) -> None:
        """Give a dict this content, in this order; the dict object stays, for those who hold it."""
        if type(table) is dict:
            self._filled.append(table)
            self._contents.append(content)
        else:
            self._others += partial(table.clear), partial(table.update, content)

    def put(self, table: dict[str, Any], items: Mapping[str, Any]) -> None:
        """Set items of a dict."""
        if type(table) is dict:
            self._changed.append(table)
            self._items.append(items)
        else:
            self._others.append(partial(table.update, items))

    def drop(self, table: dict[str, Any], *keys: str) -> None:
        """Delete items of a dict, if they are there."""
        if type(table) is not dict:
            self._others += [partial(table.pop, key, None) for key in keys]
            return
        self._poorer += [table] * len(keys)
        self._keys += keys

    def drop_attributes(self, things: Sequence[object], names: Sequence[str]) -> None:
        """Delete attributes that are items of the `__dict__` of objects, if they are there."""
        tables = [thing.__dict__ for thing in things]
        for name in names:
            self._poorer += tables
            self._keys += [name] * len(tables)

    def take(self, steps: Iterable[Step]) -> None:
        """Take steps that somebody else wrote down."""
        self._others += steps

    def at_once(self) -> Callable[[], Any]:
        """A call that changes everything with nothing in between."""
        steps = chain(
            _set_classes(self._objects, self._classes),  # the only ones that can fail
            map(dict.clear, self._filled),
            map(dict.update, self._filled, self._contents),
            map(dict.update, self._changed, self._items),
            map(dict.pop, self._poorer, self._keys, repeat(None)),
            map(_take, self._others),
        )
        return partial(deque, steps, 0)

    def make(self) -> None:
        """Change everything.

        Raises:
            TypeError: a class does not fit its object; nothing was changed.
        """
        classes = list(map(type, self._objects))
        make = self.at_once()
        back: Step = partial(deque, _set_classes(self._objects, classes), 0)
        try:
            make()
        except TypeError:
            surely(back)
            raise


def _set_classes(things: list[object], classes: list[type]) -> Iterator[object]:
    # nn.Module's __setattr__ would look for a parameter first.
    return map(object.__setattr__, things, repeat("__class__"), classes)


def image(modules: Iterable[nn.Module]) -> list[Step]:
    """Steps that make modules what they are now: class, attributes, and what lies in their dicts."""
    steps: list[Step] = []
    for module in modules:
        held = module.__dict__
        steps.append(partial(object.__setattr__, module, "__class__", type(module)))
        steps += partial(held.clear), partial(held.update, dict(held))
        for value in held.values():
            steps += content(value)
    return steps


def content(value: Any) -> list[Step]:
    """Steps that give a dict, list or set what it holds now; none for anything else."""
    if isinstance(value, (dict, set)):
        return [partial(value.clear), partial(value.update, value.copy())]
    if isinstance(value, list):
        return [partial(value.__setitem__, slice(None), value[:])]
    return []


def data_of(parameters: Iterable[Tensor]) -> list[Step]:
    """Steps that let parameters hold the memory again that they hold now."""
    return [partial(setattr, parameter, "data", parameter.data) for parameter in parameters]


class Reversible(io.IOBase):
    """Base of context managers that change something, and put it back when they are left.

    `IOBase` for its `__exit__`, which is written in C and calls `close`. One written in Python can be
    interrupted before its first instruction, and then nothing would ever be put back.
    """

    def enter(self) -> tuple[Step, Step]:
        """What changes something and what puts it back, each one call into C. Changes nothing yet."""
        raise NotImplementedError

    def __enter__(self: Self) -> Self:
        change, back = self.enter()
        try:
            self.__dict__["close"] = back  # found before the method of the class
            change()
            return self
        except BaseException:
            surely(back)
            raise

    def close(self) -> None:
        """Nothing to put back: it was not entered."""
