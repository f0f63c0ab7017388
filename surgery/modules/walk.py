"""The modules of a model. Every verb walks over them, and the generators of `nn.Module`, which hand
each module up through all the levels above it, take several times as long."""

from __future__ import annotations

from torch import nn

WRAPPERS = ("OptimizedModule", "DistributedDataParallel", "DataParallel")
"""Classes, told by name because importing them is slow, that only pass on to the one module inside."""


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> list[tuple[str, nn.Module]]:
    """What `model.named_modules(remove_duplicate=remove_duplicate)` yields."""
    named: list[tuple[str, nn.Module]] = []
    seen: set[nn.Module] = set()
    todo = [("", model)]
    while todo:
        name, module = todo.pop()
        if remove_duplicate:
            if module in seen:
                continue
            seen.add(module)
        named.append((name, module))
        if module._modules:
            prefix = f"{name}." if name else ""
            children = module._modules.items()
            todo += [(prefix + key, child) for key, child in children if child is not None][::-1]
    return named


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and data-parallel wrappers."""
    while type(model).__name__ in WRAPPERS:
        model = next(model.children())
    return model
