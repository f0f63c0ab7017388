"""The modules of a model. Every verb walks over them, and the generators of `nn.Module`, which hand
each module up through all the levels above it, take several times as long."""

from __future__ import annotations

from torch import nn

WRAPPERS = ("OptimizedModule", "DistributedDataParallel", "DataParallel")
"""Classes, told by name because importing them is slow, that only pass on to the one module inside."""

Modules = list[tuple[str, nn.Module]]
"""The modules of a model with their dotted names, in model order."""


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> Modules:
    """What `model.named_modules(remove_duplicate=remove_duplicate)` yields."""
    named: Modules = []
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


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Every module once, in any order. Without names this takes half the time."""
    seen: dict[nn.Module, None] = {}
    todo: list[nn.Module | None] = [model]
    while todo:
        module = todo.pop()
        if module is None or module in seen:
            continue
        seen[module] = None
        if module._modules:
            todo += module._modules.values()
    return list(seen)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and data-parallel wrappers."""
    while type(model).__name__ in WRAPPERS:
        model = next(model.children())
    return model
