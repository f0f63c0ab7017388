"""Tensor parallelism of torch: the processes of a mesh draw alike from when a model is cut.

Loaded through the entry point `surgery.plugins` once `torch.distributed.tensor` is imported. Without
it, a weight that is not cut, and is read before the first one that is, would drop differently in the
processes of the mesh at the first forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch.distributed.tensor import distribute_module

from surgery.modules.ranks import note_mesh
from surgery.verbs.savers import teach_function


def _notes_mesh(distribute: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(distribute)

    def taught(*args: Any, **kwargs: Any) -> Any:
        mesh = signature.bind(*args, **kwargs).arguments.get("device_mesh")
        result = distribute(*args, **kwargs)
        if mesh is not None:
            note_mesh(mesh)
        return result

    return taught


teach_function(distribute_module, _notes_mesh)
