"""Why a parameter cannot be operated on, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..kinds.derived import computed, fix
from ..kinds.product import Demand
from ..kinds.table import SEPARATE_PROJECTIONS, follows_weight, kind_of, layout_of, needs_axes
from ..modules.masking import AFTER_FSDP, is_managed
from ..modules.operated import DropConnectModule, plain_class
from ..modules.places import states_of
from ..modules.state import anchor_name, live_name, raw_name
from .catalogue import Catalogue
from .graphs import Survey
from .known import Known
from .select import Choice


def why_not(
    user: Choice, parameter: Tensor, parents: list[nn.Module], known: Known, graphs: Survey | None
) -> str | None:
    """Why this parameter cannot be operated on and what to do about it, or None.

    Args:
        user: the parameter, and what is to be done to it.
        parameter: itself.
        parents: the modules around it whose forward would draw its mask.
        known: of how the model uses it.
        graphs: what the graphs in the model read, if it has any.
    """
    module, name, config = user.module, user.name, user.config
    if name in states_of(module):
        return (
            "DropConnect is already in place here; call strip_dropconnect first, or exclude it. "
            "set_p changes p"
        )
    if isinstance(module, torch.jit.ScriptModule):
        return "a scripted module cannot be operated on; apply before torch.jit.script"
    for reader in (module, *parents):
        if "forward" in reader.__dict__:
            return (
                f"the forward of {type(reader).__name__} has been replaced on the instance, so masks "
                "would never act; apply before accelerate hooks (device_map) or wrappers are added"
            )
    if type(parameter) not in (nn.Parameter, Tensor):
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            return "the parameter is lazy and has no shape yet; run the model once, then apply"
        return (
            f"the weight is a {type(parameter).__name__} (sharded or quantised); apply before "
            "fully_shard, tensor parallelism or quantisation"
        )
    if is_managed(module):
        return AFTER_FSDP
    if parameter.layout is not torch.strided:
        return (
            f"the weight has layout {parameter.layout}; only strided weights can be dropped: convert "
            "it with to_dense() first, or exclude it"
        )
    if not parameter.is_floating_point():
        return f"the weight has dtype {parameter.dtype}; only floating-point weights can be dropped"
    weight = computed(plain_class(module), module, name)
    if weight is not None:
        return (
            f"{weight!r} is computed from it before a mask could act; {fix(module, weight)}, or "
            "exclude it"
        )
    in_graph = graphs is not None and graphs.owns(module)
    added = [raw_name(name)] if in_graph else [raw_name(name), live_name(name)]
    if config.toward == "pretrained":
        added.append(anchor_name(name))
    taken = _first_taken(module, added)
    if taken is not None:
        return _taken(taken)
    if config.toward == "pretrained":
        if not parameter.requires_grad:
            return (
                "it is frozen, so it never leaves its pretrained value; exclude it or unfreeze it"
            )
        if parameter.device.type == "meta":
            return 'it has no value yet to go toward; load the weights before toward="pretrained"'
    kind = kind_of(module)
    refused = kind.refuse(module, name)
    if refused is None and graphs is not None:
        refused = graphs.problem(module, name, config)
    if refused is None and not in_graph:
        refused = _no_product(user, parents)
    if refused is not None:
        return refused
    if needs_axes(config.unit) and layout_of(module, name, parameter, config.unit) is None:
        return f'unit={config.unit!r} has no meaning for this parameter; use "element" or "tensor"'
    if config.bias and follows_weight(config.unit) and name in SEPARATE_PROJECTIONS:
        return (
            f"unit={config.unit!r} with bias=True would have to split one packed bias between three "
            "masks; use bias=False"
        )
    if not in_graph and kind.name == "other" and not parents and not known.reads_itself(user):
        return (
            f"neither {type(module).__name__}.forward nor a parent's reads it as an attribute, so "
            "a mask would never act; name the module that uses it"
        )
    return None


def no_class(module: nn.Module, new_class: Callable[[], type]) -> str | None:
    """Why a module cannot get the class of an operated one, which `new_class` returns, or None."""
    try:
        new_class()
    except TypeError as error:
        return f"its class has no subclasses, and DropConnect needs one ({error}); exclude it"
    taken = _first_held(module, DropConnectModule.OWN)
    return None if taken is None else _taken(taken)


def _taken(name: str) -> str:
    return f"the module already has an attribute {name!r}; rename that first"


def _first_taken(module: nn.Module, names: Sequence[str]) -> str | None:
    """The first of these names that a module has an attribute of. `nn.Module` makes an error with a
    message to say no, so it is asked only if a class changes how attributes are found."""
    cls = type(module)
    if cls.__getattr__ is not nn.Module.__getattr__:
        return next((name for name in names if hasattr(module, name)), None)
    for name in names:
        if hasattr(cls, name):
            return name
    return _first_held(module, names)


def _first_held(module: nn.Module, names: Sequence[str]) -> str | None:
    """The first of these names under which a module itself, not its class, has something."""
    for table in (module.__dict__, module._parameters, module._buffers, module._modules):
        if table and not table.keys().isdisjoint(names):
            return next(name for name in names if name in table)
    return None


def _no_product(user: Choice, parents: list[nn.Module]) -> str | None:
    """Why this site cannot be sampled per example, or its moments be had, if it is to be."""
    demand = Demand.of(user.config)
    if demand.mode is None:
        return None
    cls, kind = plain_class(user.module), kind_of(user.module)
    product = None if parents else kind.product(cls)
    if parents:
        reader = type(parents[0]).__name__
        otherwise = f"replaces the product in its own forward, but {reader} reads the weight itself"
    elif product is None:
        otherwise = (
            "needs a forward that is a product of input and weight, and that of "
            f"{cls.__name__} is not known to be one"
        )
    else:
        otherwise = f"is for the weight of {cls.__name__} only"
    bias = product is not None and user.name == kind.bias("weight")
    return demand.refused(product if user.name == "weight" else None, otherwise, bias=bias)


def not_followed(catalogue: Catalogue, module: nn.Module) -> str | None:
    """Why moments cannot reach an activation: nobody would settle what the site returns."""
    around = list(catalogue.enclosing(module))
    if not around or not all("forward" in one.__dict__ for one in around):
        return None
    return (
        f"inference='moments' needs a forward around the site, and that of {type(around[0]).__name__} "
        "has been replaced on the instance; apply before accelerate hooks (device_map) or wrappers"
    )
