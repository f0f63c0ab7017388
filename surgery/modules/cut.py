"""A product whose weight processes share (a DTensor, by tensor parallelism): what each computes.

With its outputs cut, a process has all of the input and some of the outputs. With its inputs cut, it
has some features of the input, and its product is one summand of the pre-activation.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..ops.part_mask import is_sharded
from .state import refusal_to_cut


def _types() -> Any:
    """`torch.distributed.tensor`, which is imported where there is a DTensor, and takes long to be."""
    return cast(Any, torch.distributed).tensor


class Cut(NamedTuple):
    """How a matrix is cut over the processes of a mesh, and with it what goes in and comes out."""

    mesh: Any
    dim: int | None
    """0: outputs are cut; 1: inputs; None: every process has all of it."""
    came: Any
    """The placement that the input has to have."""
    shape: tuple[int, ...]
    """Of the whole pre-activation."""

    @classmethod
    def of(cls, weight: Any, columns: bool, x: Any, examples: int | None, site: str) -> Cut:
        """Of one call.

        Args:
            weight: a DTensor.
            columns: whether it is stored in x out.
            x: the input; a plain tensor is taken for one that all processes have.
            examples: their dimension in `x`; None if each row is one.
            site: for messages.

        Raises:
            RuntimeError: the mesh has two dimensions, or the examples are cut.
        """
        if weight.device_mesh.ndim > 1:
            option = "sampling='example' on a mesh of two dimensions"
            raise RuntimeError(f"{site}: {refusal_to_cut(option)}")
        (placement,) = weight.placements
        dim = None if placement.is_replicate() else int(placement.dim)
        if columns and dim is not None:
            dim = 1 - dim
        came: Any = _types().Shard(x.ndim - 1) if dim == 1 else _types().Replicate()
        own = x.placements[0] if dim is None and is_sharded(x) else came
        if own.is_shard() and dim is None and own.dim != x.ndim - 1:
            if examples in (None, own.dim):
                raise RuntimeError(
                    f"{site}: sampling='example' needs all examples in each process, and dimension "
                    f"{own.dim} of the input is cut; use sampling='batch' for it"
                )
            came = own
        outputs = weight.shape[1 if columns else 0]
        return cls(weight.device_mesh, dim, came, (*x.shape[:-1], outputs))

    @property
    def shared_gradient(self) -> Any:
        """The placement of the gradient of what every process has, and uses for its own rows or
        outputs."""
        alike = self.dim is None and self.came.is_replicate()
        return _types().Replicate() if alike else _types().Partial()

    def input(self, x: Any) -> Tensor:
        """What this process has of the input."""
        gradient = self.came if self.came.is_shard() else self.shared_gradient
        return _local(self._spread(x), self.came, gradient)

    def weight(self, weight: Any) -> Tensor:
        """What this process has of the weight."""
        (own,) = weight.placements
        return _local(weight, own, self.shared_gradient if self.dim is None else own)

    def bias(self, bias: Any) -> Tensor:
        """What this process adds of the bias: with inputs cut, each adds its share of all of it."""
        bias = self._spread(bias)
        if self.dim == 0:
            return _local(bias, _types().Shard(0), _types().Shard(0))
        own = _local(bias, _types().Replicate(), self.shared_gradient)
        return own / self.mesh.size() if self.dim == 1 else own

    def output(self, u: Tensor) -> Any:
        """The pre-activation, of what this process has of it."""
        own = self.came
        if self.dim is not None:
            own = _types().Partial() if self.dim == 1 else _types().Shard(u.ndim - 1)
        stride = torch.empty(self.shape, device="meta").stride()
        return _types().DTensor.from_local(
            u, self.mesh, [own], run_check=False, shape=torch.Size(self.shape), stride=stride
        )

    def _spread(self, tensor: Any) -> Any:
        if is_sharded(tensor):
            return tensor
        return _types().DTensor.from_local(
            tensor, self.mesh, [_types().Replicate()], run_check=False
        )


def _local(tensor: Any, placement: Any, gradient: Any) -> Tensor:
    moved = tensor.redistribute(placements=[placement])
    local: Tensor = moved.to_local(grad_placements=[gradient])
    return local
