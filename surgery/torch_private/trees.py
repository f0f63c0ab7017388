"""Nested containers: what lies in tuples, lists, dicts and registered classes, such as the outputs of
transformers.

torch has no public module for that, and a walk of our own would not know the classes that others have
registered with this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.utils import _pytree

tree_leaves: Callable[[Any], list[Any]] = _pytree.tree_leaves
"""What lies in a container, in order; of anything else, the thing itself."""

tree_leaves_with_path: Callable[[Any], Iterable[tuple[Any, Any]]] = _pytree.tree_leaves_with_path
"""The same, each with how to get there."""

keystr: Callable[[Any], str] = _pytree.keystr
"""Such a path as Python writes it: `[0]['ids']`."""

tree_map: Callable[[Callable[[Any], Any], Any], Any] = _pytree.tree_map
"""The same containers, with what a function makes of each thing in them."""
