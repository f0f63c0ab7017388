"""Random numbers that are the same in forward and backward, in compiled graphs too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _may_draw_again() -> bool:
    import torch._functorch.config as config

    budget: float = config.activation_memory_budget
    return budget < 1


def _outside(sampler: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return sampler(*args, **kwargs)


_outside_of_the_graph: Callable[..., Tensor] = torch.compiler.disable(  # type: ignore[no-untyped-call]
    _outside,
    reason="DropConnect draws its masks outside of the graph while "
    "torch._functorch.config.activation_memory_budget is below 1: the graph's backward could draw "
    "others, and its gradients would be wrong. Set the budget to 1, or compile without fullgraph=True",
)
