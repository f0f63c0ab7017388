"""How transformers names output heads, and PEFT adapters: what `"all-linear"` leaves out, and what a
target that names an adapter without the `.default` behind it means.

Both are told by the names of methods and attributes, and no library is imported: a model that somebody
wrote by the same conventions is treated in the same way. So this is loaded with the first plan, through
the entry point `surgery.plugins`, whether or not a library is there.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from surgery.planning.conventions import Adapted, register_adapted, register_left_out

_CLASSIFICATION_HEADS = ("score", "classifier")


def output_heads(model: nn.Module) -> Iterator[nn.Module]:
    """The output heads of the transformers models in `model`, as PEFT's "all-linear" finds them: what
    `get_output_embeddings()` returns, or if that is None a classification head."""
    for module in model.modules():
        find = getattr(type(module), "get_output_embeddings", None)
        if find is None:
            continue
        head = find(module)
        if head is not None:
            yield head
            continue
        for name in _CLASSIFICATION_HEADS:
            head = getattr(module, name, None)
            if isinstance(head, nn.Module):
                yield from head.modules()
                break


def adapter_parts(model: nn.Module) -> Iterator[nn.Module]:
    """What PEFT has put beside the layers that it adapts (`lora_A`, ...): everything in a module that
    has a `base_layer`, but the base layer."""
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Module):
            own = {id(part) for part in base.modules()}
            yield from (part for part in module.modules() if id(part) not in own)


def adapted(module: nn.Module) -> Adapted | None:
    """What a layer that PEFT adapts holds: under each name that its class lists (`lora_A`, `ia3_l`,
    `modules_to_save`), a container with a module or a parameter for every adapter. Of a module that is
    trained as a whole it keeps the original too, and runs a copy."""
    names = getattr(type(module), "adapter_layer_names", None)
    if not isinstance(names, (tuple, list)):
        return None
    containers: list[tuple[nn.Module, list[nn.Module]]] = []
    for name in names:
        one = module._modules.get(name)
        if isinstance(one, nn.ModuleDict):
            containers.append((one, list(one.children())))
        elif isinstance(one, nn.ParameterDict):
            containers.append((one, [one]))
    copies = module._modules.get("modules_to_save")
    original = module._modules.get("original_module")
    if copies is None or original is None:
        return Adapted(containers)
    return Adapted([*containers, (module, list(copies.children()))], {original: "original_module"})


register_adapted(adapted)
register_left_out(output_heads)
register_left_out(adapter_parts)
