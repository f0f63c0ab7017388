"""Which part of a pre-activation a view is, and whether two views have elements in common."""

from __future__ import annotations

from typing import Any

from .torch_functions import SPLITTING

Step = tuple[Any, int | None, tuple[int, ...]]
"""A view: its name and arguments, which of several results it is, and the shape it was taken of."""

Piece = tuple[Step, ...]


def disjoint(one: Piece, other: Piece) -> bool:
    """Whether two views of one tensor surely have no element in common."""
    for (name, index, shape), (other_name, other_index, _) in zip(one, other):
        if name == other_name and index == other_index:
            continue
        if name == other_name:
            return name is not None and name[0] in SPLITTING
        return _apart(name, other_name, shape)
    return False


def _apart(one: Any, other: Any, shape: tuple[int, ...]) -> bool:
    """Whether two indexings, as `u[..., :n]` and `u[..., n:]`, surely choose no entry in common:
    along one dimension their ranges are disjoint. `shape` is that of the indexed tensor."""
    if one is None or other is None or one[0] != "getitem" or other[0] != "getitem":
        return False
    first, second = _index(one), _index(other)
    if len(first) != len(second):
        return False
    if first and first[0] is Ellipsis and second[0] is Ellipsis:
        first, second = first[1:], second[1:]
        shape = shape[len(shape) - len(first) :]
    for left, right, size in zip(first, second, shape):
        if not isinstance(left, (int, slice)) or not isinstance(right, (int, slice)):
            return False
        if set(_chosen(left, size)).isdisjoint(_chosen(right, size)):
            return True
    return False


def _index(key: Any) -> tuple[Any, ...]:
    index = key[1][0]
    return index if isinstance(index, tuple) else (index,)


def _chosen(index: int | slice, size: int) -> range:
    if isinstance(index, slice):
        return range(*index.indices(size))
    return range(index % size, index % size + 1)
