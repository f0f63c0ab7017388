"""Canaries of nested containers."""

from __future__ import annotations

import collections

from surgery.torch_private import trees

from .canary import canary

Pair = collections.namedtuple("Pair", "first second")


@canary(trees, "torch.utils._pytree.tree_leaves")
def test_leaves_come_in_order() -> None:
    assert trees.tree_leaves({"a": [1, (2, 3)], "b": Pair(4, "five")}) == [1, 2, 3, 4, "five"]
    assert trees.tree_leaves(6) == [6]
    assert trees.tree_leaves([]) == []


@canary(trees, "torch.utils._pytree.tree_leaves_with_path", "torch.utils._pytree.keystr")
def test_paths_are_written_as_in_python() -> None:
    found = trees.tree_leaves_with_path([1, (2, {"key": 3})])
    assert [(trees.keystr(path), leaf) for path, leaf in found] == [
        ("[0]", 1),
        ("[1][0]", 2),
        ("[1][1]['key']", 3),
    ]


@canary(trees, "torch.utils._pytree.tree_map")
def test_containers_stay_what_they_are() -> None:
    found = trees.tree_map(lambda leaf: leaf + 1, {"a": [1, Pair(2, 3)], "b": ()})
    assert found == {"a": [2, Pair(3, 4)], "b": ()}
    assert type(found["a"][1]) is Pair
