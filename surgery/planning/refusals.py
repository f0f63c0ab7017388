"""Why a parameter cannot be operated on, and what to do about it: a list of rules, asked in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kinds.derived import computed, fix
from ..kinds.kind import follows_weight, kind_of, needs_axes
from ..kinds.product import Demand, Product
from ..kinds.torch_kinds import SEPARATE_PROJECTIONS
from ..modules.masking import AFTER_FSDP, is_managed
from ..modules.operated import DropConnectModule, plain_class
from ..modules.state import live_name, refusal_to_cut
from ..modules.wrapped import rewired
from ..ops.part import part_of
from ..ops.part_mask import is_sharded
from ..spec.names import anchor_name, raw_name
from .catalogue import Catalogue, Owner
from .known import Known
from .select import Choice


class Candidate(NamedTuple):
    """A chosen parameter that a module has, and how the model uses it: what the rules look at."""

    user: Choice
    parameter: Tensor
    drawers: Sequence[tuple[nn.Module, str]]
    """The modules around the owner whose forward draws the mask, and the owner's name in each."""
    kind: str
    """How the parameter is read, as `Site.kind`."""
    product: Product | None
    """The product that is made of it and of nothing else."""
    varies: bool
    """Whether moments travel through the functions that read it, though it is of no product."""
    catalogue: Catalogue
    known: Known

    @classmethod
    def of(cls, user: Choice, catalogue: Catalogue, known: Known) -> Candidate:
        """Of a parameter that is there."""
        owner, drawers, varies = user.owner, known.drawers(user), False
        if catalogue.graphs is not None and owner.in_graph:
            kind = catalogue.graphs.kind(owner.module, user.name)
            product = catalogue.graphs.product(owner.module, user.name)
        else:
            alone = user.name == "weight" and not drawers
            kind, product = owner.kind.name, owner.kind.product(owner.cls) if alone else None
            varies = product is None and _varies(user, drawers)
        assert user.parameter is not None
        return cls(user, user.parameter, drawers, kind, product, varies, catalogue, known)

    @property
    def in_training(self) -> Product | None:
        """The product that its own module makes of it in training, if the modules around only read it
        in `eval()`."""
        owner = self.user.owner
        rest = all(kind_of(module).rests(plain_class(module)) for module, _ in self.drawers)
        if not (self.drawers and rest) or owner.in_graph or self.user.name != "weight":
            return None
        return owner.kind.product(owner.cls)


def _varies(user: Choice, drawers: Sequence[tuple[nn.Module, str]]) -> bool:
    """`Kind.varies` of all whose forwards read a parameter."""
    readers = [(module, f"{path}.{user.name}") for module, path in drawers]
    kinds = [(kind_of(module), plain_class(module), name) for module, name in readers]
    kinds = kinds or [(user.owner.kind, user.owner.cls, user.name)]
    return all(kind.varies(cls, name) for kind, cls, name in kinds)


Rule = Callable[[Candidate], "str | None"]


def refused(candidates: Iterable[Candidate]) -> Iterator[str]:
    """Why these parameters cannot be operated on and what to do about it, by name: of each the first
    reason."""
    rules: dict[int, list[Rule]] = {}
    for one in candidates:
        asked = rules.get(id(one.user.config))
        if asked is None:  # most have one config, which tells what need not be asked
            asked = rules[id(one.user.config)] = [rule for rule, if_ in RULES if if_(one)]
        for rule in asked:
            problem = rule(one)
            if problem is not None:
                yield f"{one.user.full} ({type(one.user.module).__name__}): {problem}"
                break


def _unlike_the_plan(one: Candidate) -> str | None:
    return one.known.unlike(one.user, one.kind)


def _in_place(one: Candidate) -> str | None:
    if one.user.name not in one.user.owner.states:
        return None
    return (
        "DropConnect is already in place here; call strip_dropconnect first, or exclude it. "
        "set_p changes p"
    )


def _scripted(one: Candidate) -> str | None:
    if not isinstance(one.user.module, torch.jit.ScriptModule):
        return None
    return "a scripted module cannot be operated on; apply before torch.jit.script"


def _forward_replaced(one: Candidate) -> str | None:
    for module in (one.user.module, *[drawer for drawer, _ in one.drawers]):
        if "forward" in module.__dict__ and rewired(module) is None:
            return (
                f"the forward of {type(module).__name__} has been replaced on the instance, so masks "
                "would never act; apply before accelerate hooks (device_map) or wrappers are added"
            )
    return None


def _bias_in_wrapper(one: Candidate) -> str | None:
    """transformers takes a bias out while it runs a forward whose inputs are cut, by its plain name."""
    owner = one.user.owner
    if "forward" not in owner.module.__dict__ or owner.kind.bias("weight") != one.user.name:
        return None
    return (
        f"a function around the forward of {type(owner.module).__name__} may look for the bias by its "
        "name; use bias=False, or exclude it"
    )


def _no_plain_tensor(one: Candidate) -> str | None:
    if type(one.parameter) in (nn.Parameter, Tensor):
        return None
    if isinstance(one.parameter, nn.parameter.UninitializedParameter):
        return "the parameter is lazy and has no shape yet; run the model once, then apply"
    if is_sharded(one.parameter):
        return _unlike_shards(one)
    return (
        f"the weight is a {type(one.parameter).__name__} (sharded or quantised); apply before "
        "fully_shard or quantisation"
    )


def _unlike_shards(one: Candidate) -> str | None:
    """Of a DTensor: why it is none that tensor parallelism has cut."""
    if is_managed(one.user.module):
        return "FSDP has sharded the weight; apply before fully_shard"
    try:
        part_of(one.parameter)
    except RuntimeError as error:
        return f"{error}; exclude it"
    return None


def _partitioned(one: Candidate) -> str | None:
    """DeepSpeed's ZeRO-3 empties parameters, and marks them; between forwards they have no values."""
    if not hasattr(one.parameter, "ds_id"):
        return None
    return (
        "DeepSpeed ZeRO-3 holds the parameter; apply before deepspeed.initialize, to a model that was "
        "not made inside deepspeed.zero.Init"
    )


def _managed(one: Candidate) -> str | None:
    return AFTER_FSDP if is_managed(one.user.module) else None


def _not_strided(one: Candidate) -> str | None:
    if one.parameter.layout is torch.strided:
        return None
    return (
        f"the weight has layout {one.parameter.layout}; only strided weights can be dropped: convert "
        "it with to_dense() first, or exclude it"
    )


def _no_float(one: Candidate) -> str | None:
    if one.parameter.is_floating_point():
        return None
    return f"the weight has dtype {one.parameter.dtype}; only floating-point weights can be dropped"


def _computed_from(one: Candidate) -> str | None:
    module = one.user.module
    weight = computed(one.user.owner.cls, module, one.user.name)
    if weight is None:
        return None
    return (
        f"{weight!r} is computed from it before a mask could act; {fix(module, weight)}, or "
        "exclude it"
    )


def _name_taken(one: Candidate) -> str | None:
    """A module that only graphs read keeps its class, and gets no attribute for the masked weight."""
    name = one.user.name
    added = [raw_name(name)] if one.user.owner.in_graph else [raw_name(name), live_name(name)]
    if one.user.config.toward == "pretrained":
        added.append(anchor_name(name))
    taken = _first_taken(one.user.module, added)
    return None if taken is None else _taken(taken)


def _no_anchor(one: Candidate) -> str | None:
    if not one.parameter.requires_grad:
        return "it is frozen, so it never leaves its pretrained value; exclude it or unfreeze it"
    if one.parameter.device.type == "meta":
        return 'it has no value yet to go toward; load the weights before toward="pretrained"'
    return None


def _refused_by_kind(one: Candidate) -> str | None:
    return one.user.owner.kind.refuse(one.user.module, one.user.name)


def _refused_by_graphs(one: Candidate) -> str | None:
    assert one.catalogue.graphs is not None
    return one.catalogue.graphs.problem(one.user.module, one.user.name, one.user.config)


def _refused_by_product(one: Candidate) -> str | None:
    """Of a parameter that nodes read, `_refused_by_graphs` has asked."""
    user, owner, demand = one.user, one.user.owner, Demand.of(one.user.config)
    if owner.in_graph:
        return None
    product = None if one.drawers else owner.kind.product(owner.cls)
    if one.drawers:
        reader = type(one.drawers[0][0]).__name__
        otherwise = f"replaces the product in its own forward, but {reader} reads the weight itself"
    elif product is None:
        otherwise = (
            "needs a forward that is a product of input and weight, and that of "
            f"{owner.cls.__name__} is not known to be one"
        )
    else:
        otherwise = f"is for the weight of {owner.cls.__name__} only"
    bias = product is not None and user.name == owner.kind.bias("weight")
    return demand.refused(one.product, otherwise, bias=bias, varies=one.varies)


def _product_that_is_cut(one: Candidate) -> str | None:
    """Of a weight that processes share, only what each can do with its part."""
    if not is_sharded(one.parameter) or not (one.product or one.varies):
        return None
    demand = Demand.of(one.user.config)
    by = one.product
    if demand.sampling == "example" and demand.inference != "moments" and by and by.is_matrix:
        return None
    return refusal_to_cut(str(demand.mode))


def _unit_without_meaning(one: Candidate) -> str | None:
    user, unit = one.user, one.user.config.unit
    if user.owner.kind.axes(user.module, user.name, one.parameter) is not None:
        return None
    return f'unit={unit!r} has no meaning for this parameter; use "element" or "tensor"'


def _packed_bias(one: Candidate) -> str | None:
    if one.user.name not in SEPARATE_PROJECTIONS:
        return None
    return (
        f"unit={one.user.config.unit!r} with bias=True would have to split one packed bias between "
        "three masks; use bias=False"
    )


def _never_read(one: Candidate) -> str | None:
    owner = one.user.owner
    if owner.in_graph or owner.kind.name != "other" or one.drawers:
        return None
    if one.known.reads_itself(one.user):
        return None
    return (
        f"neither {type(owner.module).__name__}.forward nor a parent's reads it as an attribute, so "
        "a mask would never act; name the module that uses it"
    )


def _against_the_run(one: Candidate) -> str | None:
    return one.known.problem(one.user, one.product)


def _not_followed(one: Candidate) -> str | None:
    return not_followed(one.catalogue, one.user.owner)


def _always(one: Candidate) -> bool:
    return True


def _needs_product(one: Candidate) -> bool:
    return Demand.of(one.user.config).mode is not None


RULES: tuple[tuple[Rule, Callable[[Candidate], bool]], ...] = (
    (_unlike_the_plan, _always),
    (_in_place, _always),
    (_scripted, _always),
    (_forward_replaced, _always),
    (_bias_in_wrapper, _always),
    (_no_plain_tensor, _always),
    (_managed, _always),
    (_partitioned, _always),
    (_not_strided, _always),
    (_no_float, _always),
    (_computed_from, _always),
    (_name_taken, _always),
    (_no_anchor, lambda one: one.user.config.toward == "pretrained"),
    (_refused_by_kind, _always),
    (_refused_by_graphs, lambda one: one.catalogue.graphs is not None),
    (_refused_by_product, _needs_product),
    (_product_that_is_cut, _needs_product),
    (_unit_without_meaning, lambda one: needs_axes(one.user.config.unit)),
    (_packed_bias, lambda one: one.user.config.bias and follows_weight(one.user.config.unit)),
    (_never_read, _always),
    (_against_the_run, _needs_product),
    (_not_followed, lambda one: one.user.config.inference == "moments"),
)
"""In this order: a rule may rely on what those before it have refused. With each, whether it is to be
asked, as far as the config and the model tell."""


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


def not_followed(catalogue: Catalogue, owner: Owner) -> str | None:
    """Why moments cannot reach an activation: nobody would settle what the site returns."""
    around = list(catalogue.enclosing(owner))
    if not around or not all("forward" in one.__dict__ for one in around):
        return None
    return (
        f"inference='moments' needs a forward around the site, and that of {type(around[0]).__name__} "
        "has been replaced on the instance; apply before accelerate hooks (device_map) or wrappers"
    )
