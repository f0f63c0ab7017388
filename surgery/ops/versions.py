"""How often a tensor was changed in place: what autograd checks of the tensors that it keeps."""

from __future__ import annotations

from torch import Tensor

from ..torch_private.tensors import version_of


def check_unmodified(name: str, weight: Tensor, version: int) -> None:
    """What autograd does for the tensors that it keeps.

    Raises:
        RuntimeError: `weight` was changed in place since it was at `version`.
    """
    now = version_of(weight)
    if now != version:
        raise RuntimeError(
            f"the weight {name!r} has been modified by an inplace operation since the forward pass: it "
            f"is at version {now}, expected version {version}. Call backward() before the "
            "optimizer step."
        )
