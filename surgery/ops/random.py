"""Random numbers that are the same in forward and backward, in compiled graphs too; and seeds that the
host knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..torch_private.compiler import constant_in_traces, memory_budget
from ..torch_private.tracing import is_capturing, is_traced


def drawn(sampler: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """`sampler(*args, **kwargs)`, for a sampler of torch.

    With `torch._functorch.config.activation_memory_budget` below 1, the backward of a compiled graph
    may compute again whatever is not an input of the graph. Random numbers would be others then, and
    the gradients wrong (those of torch's own dropout are). So they are drawn outside of the graph,
    which breaks it; with `fullgraph=True` that is an error which says why.
    """
    if torch.compiler.is_dynamo_compiling() and _may_draw_again():
        return _outside_of_the_graph(sampler, *args, **kwargs)
    return sampler(*args, **kwargs)


@constant_in_traces
def _may_draw_again() -> bool:
    global _outside_of_the_graph
    if memory_budget() >= 1:
        return False
    # Now, and not at import: this imports dynamo.
    _outside_of_the_graph = torch.compiler.disable(_outside, reason=_WHY)
    return True


def _outside(sampler: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return sampler(*args, **kwargs)


_outside_of_the_graph: Callable[..., Tensor] = _outside

_WHY = (
    "DropConnect draws its masks outside of the graph while "
    "torch._functorch.config.activation_memory_budget is below 1: the graph's backward could draw "
    "others, and its gradients would be wrong. Set the budget to 1, or compile without fullgraph=True"
)


PHILOX_STEP = 4
"""Offsets of the generators of GPUs are multiples of it."""


def host_seed(device: torch.device) -> int | None:
    """A number of 64 bits that a draw from the generator of a GPU could have given: a function of its
    seed and offset. The offset moves on, as by a draw.

    None where the generator must draw itself: on other devices, in traced code, and in what is captured
    into a CUDA graph, which must draw anew in each replay.
    """
    if is_traced():
        return None
    generator = _generator_of(device)
    if generator is None or is_capturing():
        return None
    offset = generator.get_offset()
    generator.set_offset(offset + PHILOX_STEP)
    # Offsets count small draws: times an odd number, they reach all bits and no two of them meet.
    return int((generator.initial_seed() + offset * 0xD1342543DE82EF95) & ((1 << 64) - 1))


_SEEDED = frozenset({"cuda", "xpu"})
_generators: dict[torch.device, Any] = {}


def _generator_of(device: torch.device) -> Any:
    """The default generator of a GPU; None of other devices."""
    if device in _generators:
        return _generators[device]
    found = None
    if device.type in _SEEDED:
        module = torch.get_device_module(device)
        index = module.current_device() if device.index is None else device.index
        found = module.default_generators[index]
    if found is None or str(device) != device.type:  # else it depends on the current device
        _generators[device] = found
    return found


def default_generators(tensors: Iterable[Tensor]) -> list[torch.Generator]:
    """Torch's own: of the CPU, and of those GPUs that the tensors are on."""
    found = map(_generator_of, {tensor.device for tensor in tensors})
    return [torch.default_generator, *(one for one in found if one is not None)]
