"""Which processes draw alike. Those that hold parts of one weight must: together they are one model.

Tensor parallelism says so by the mesh of its weights (DTensors). What lies beside them in the model is
whole in every process, and has to drop alike in all of these too, or they would compute different
activations where one is assumed: so the mesh is remembered for the process.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor

from ..ops.hash import Key, key_tensor
from ..torch_private.tracing import is_traced

_known: list[tuple[int, int]] = []
"""Of the largest mesh that shares a model with this process: how many processes, and the first one."""

_world: list[Any] = []
"""The process group in which that is so, as a weak reference: ranks mean something else in another."""


def note_mesh(mesh: Any) -> None:
    """Remember that the processes of a mesh share a model."""
    size, first = _of_mesh(mesh)
    if size > (_known[0][0] if _is_known() else 1):
        _known[:] = [(size, first)]
        _world[:] = [weakref.ref(torch.distributed.group.WORLD)]


def _is_known() -> bool:
    if not _known or torch.compiler.is_compiling():  # no graph is compiled anew for another group
        return bool(_known)
    world = _world[0]()
    return world is not None and world is torch.distributed.group.WORLD


@functools.lru_cache(maxsize=256)
def _of_mesh(mesh: Any) -> tuple[int, int]:
    ranks = mesh.mesh.flatten().tolist()
    return len(ranks), min(ranks)


def replica() -> int:
    """In distributed training, a number that processes have in common if they share a model, and no
    others have: the rank of the first of them."""
    return _known[0][1] if _is_known() else torch.distributed.get_rank()


def check_alike(key: Key, mesh: Any, site: str) -> None:
    """Raise `RuntimeError` if the processes of a mesh have drawn different keys. Asks all of them."""
    if is_traced() or mesh.size() == 1:
        return
    words = key_tensor(key).to(torch.int64)
    highest = torch.cat([words, -words]).to(mesh.device_type)
    for dim in range(mesh.ndim):
        torch.distributed.all_reduce(
            highest, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim)
        )
    if not _is_same(highest):
        raise RuntimeError(
            f"{site}: the processes that share this weight have drawn different keys, so their parts "
            "would not be parts of one mask. Seed them alike: torch.manual_seed with one seed for all "
            "processes of a tensor-parallel group"
        )


def _is_same(highest: Tensor) -> bool:
    words, negated = highest.chunk(2)
    return bool((words == -negated).all())
