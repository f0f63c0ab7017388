"""Random numbers that are the same in forward and backward, in compiled graphs too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..caching import constant_in_traces


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
    import torch._functorch.config as config

    global _outside_of_the_graph
    if config.activation_memory_budget >= 1:
        return False
    # Now, and not at import: this imports dynamo.
    _outside_of_the_graph = torch.compiler.disable(_outside, reason=_WHY)  # type: ignore[no-untyped-call]
    return True


def _outside(sampler: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return sampler(*args, **kwargs)


_outside_of_the_graph: Callable[..., Tensor] = _outside

_WHY = (
    "DropConnect draws its masks outside of the graph while "
    "torch._functorch.config.activation_memory_budget is below 1: the graph's backward could draw "
    "others, and its gradients would be wrong. Set the budget to 1, or compile without fullgraph=True"
)
