"""The module that a DropConnect node of a graph calls."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules.module import register_module_module_registration_hook

from ..moments.scope import in_scope, settle
from ..ops.hash import Key
from ..spec.errors import SurgeryError
from .dropping import mode_of_product
from .functional import teach_functional_call
from .masking import check_anchor, masked_weight
from .places import SitesNode
from .product_forward import Factor, product_forward
from .recompute import address_of, call_recomputing
from .state import SiteState, refusal_to_script

Slot = int | str
"""Where an argument stands in a call: a position, or a keyword."""


@dataclass(frozen=True)
class Call:
    """An operation that a DropConnect node replaces: the node has its arguments as they were."""

    op: str
    """`"call_function"` or `"call_method"`, as in `torch.fx.Node.op`."""

    target: Callable[..., Any] | str
    """The function, or the name of the method of the first argument."""

    function: str
    """Its name, the same in every dialect (`linear`, `addmm`, `matmul`)."""

    weight: Slot
    input: Slot
    bias: Slot | None
    """None if the call has no bias, or none that is a vector."""

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original operation."""
        if self.op == "call_method":
            return operator.methodcaller(str(self.target), *args[1:], **kwargs)(args[0])
        assert callable(self.target)
        return self.target(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Overloads such as `aten.linear.default` do not pickle; their names do."""
        if isinstance(self.target, OpOverload):
            return {**self.__dict__, "target": None, "overload": str(self.target)}
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        overload = state.pop("overload", None)
        if overload is not None:
            state["target"] = operator.attrgetter(overload)(torch.ops)
        self.__dict__.update(state)


class DropConnect(SitesNode):
    """Called by a node that graph surgery put in; `surgery.transforms` makes it.

    It lies beside its parameter: for `fc.weight_raw` it is `fc.weight_dropconnect`. It holds what is
    known of the site, and takes the raw parameter as an argument. It either

    * replaces the one operation that reads the weight, and takes the arguments of that operation; or
    * returns the masked weight, for operations of any kind and number. Then autograd keeps the masked
      weight that those operations save.

    It drops while its own `training` is True. `graph_module.train()` and `.eval()` set it; the module
    of a `torch.export`ed program refuses these, and `torch.nn.Module.train(graph_module, mode)` does
    the same there.
    """

    _is_impure = True
    """For `torch.fx`: not to be removed as dead code."""

    def __init__(self, states: dict[str, SiteState], call: Call | None = None) -> None:
        super().__init__()
        self.states = states
        """By plain parameter name: the weight, and the bias if it is dropped in the same node."""
        self.call = call
        """The operation that is replaced, or None."""
        self._loads_plain = False
        _teach_owners()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _teach_owners()

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by `torch.jit.script`."""
        raise SurgeryError(refusal_to_script(self._site, "torch.jit.script"))

    @property
    def name(self) -> str:
        """Plain name of the weight in the module that owns it."""
        return next(iter(self.states))

    def forward(
        self,
        *args: Any,
        anchor: Tensor | None = None,
        bias_anchor: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Either `(raw[, masked])`: the masked weight, the one given if there is one; or the arguments
        of the replaced operation. The anchors are what dropped weights go toward."""
        if any(isinstance(arg, torch.fx.Proxy) for arg in args):
            raise RuntimeError(
                f"{self._site}: a graph with DropConnect cannot be traced again, its masks would be "
                "constants; call strip_dropconnect first"
            )
        if self.call is not None:
            return self._replace(self.call, args, kwargs, anchor, bias_anchor)
        raw, *known = args
        if known:
            self._note()
            return known[0]
        return self._masked({self.name: raw}, {self.name: anchor})[0][self.name]

    def _replace(
        self,
        call: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        anchor: Tensor | None,
        bias_anchor: Tensor | None,
    ) -> Any:
        """The operation with masked weights, or its product done the paper's way."""
        state = self.states[self.name]
        raws = {self.name: _get(args, kwargs, call.weight)}
        anchors = {self.name: anchor}
        for name in list(self.states)[1:]:
            assert call.bias is not None
            raws[name], anchors[name] = _get(args, kwargs, call.bias), bias_anchor
        mode = mode_of_product(self.states.values(), self.training)
        if mode is not None and state.product is not None:
            self._note()
            x, bias = _get(args, kwargs, call.input), self._bias(call, args, kwargs, bias_anchor)
            check_anchor(state, raws[self.name], anchor)
            weight = Factor(raws[self.name], state, anchor)
            return product_forward(state.product, None, x, weight, bias, mode)
        used, recipes = self._masked(raws, anchors)
        args, kwargs = _put(args, kwargs, call.weight, used[self.name])
        for name in list(self.states)[1:]:
            assert call.bias is not None
            args, kwargs = _put(args, kwargs, call.bias, used[name])
        return call_recomputing(recipes, call.run, (args, kwargs), {})

    def _bias(
        self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], anchor: Tensor | None
    ) -> Factor | None:
        raw = None if call.bias is None else _get(args, kwargs, call.bias)
        if raw is None:
            return None
        state = next(iter(list(self.states.values())[1:]), None)
        if state is None or state.mode(self.training) in (None, "batch"):
            return Factor(raw)
        check_anchor(state, raw, anchor)
        return Factor(raw, state, anchor)

    def _masked(
        self, raws: dict[str, Tensor], anchors: dict[str, Tensor | None]
    ) -> tuple[dict[str, Tensor], dict[int, Any]]:
        """The weights that this call uses by name, and recipes to compute them again."""
        used = dict(raws)
        keys: dict[str | None, Key] = {}
        recipes: dict[int, Any] = {}
        for name, state in self.states.items():
            if state.mode(self.training) != "batch":
                continue
            self._note()
            raw = raws[name]
            key = state.held_key if state.held_key is not None else keys.get(state.follows)
            keys[name] = key = state.new_key(raw.device) if key is None else key
            used[name], recipe = masked_weight(state, raw, anchors[name], key)
            address = None if recipe is None else address_of(used[name])
            if address is not None:
                recipes[address] = recipe
        return used, recipes

    def _note(self) -> None:
        if not torch.compiler.is_compiling():
            for state in self.states.values():
                state.drawn = state.drawn or state.mode(self.training) is not None

    @property
    def _site(self) -> str:
        return self.states[self.name].site

    def accept_plain_keys(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Hook of the owner: a plain key stands for the raw one. The anchor, which a plain checkpoint
        does not have, stays as it is."""
        self._loads_plain = False
        for state in self.states.values():
            plain, raw = prefix + state.name, prefix + state.raw
            if plain in state_dict and raw not in state_dict:
                state_dict[raw] = state_dict.pop(plain)
                self._loads_plain = True

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: Any,
        *args: Any,
    ) -> None:  # fmt: skip
        """Runs after the owner's: with plain keys no anchor is missing."""
        owner = prefix.rpartition(".")[0].rpartition(".")[0]
        for state in self.states.values() if self._loads_plain else ():
            key = f"{owner}.{state.anchor}" if owner else state.anchor
            if key in missing:
                missing.remove(key)
        self._loads_plain = False
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *args)

    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Laws move with the weights, which are moved by the same function."""
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        for state in self.states.values():
            if state.law is not None:
                state.law_for(fn(state.law.scale))
        return self

    def extra_repr(self) -> str:
        parts = [f"{state.name}: dropconnect p={state.p:g}" for state in self.states.values()]
        return ", ".join(parts + ([f"in {self.call.function}"] if self.call else []))


class Settle(nn.Module):
    """Called on what a graph returns: plain tensors instead of Gaussians (`inference="moments"`),
    unless a forward around the graph does that."""

    def forward(self, value: Any) -> Any:
        return value if in_scope() else settle(value)


def _get(args: tuple[Any, ...], kwargs: dict[str, Any], slot: Slot) -> Any:
    return args[slot] if isinstance(slot, int) else kwargs[slot]


def _put(
    args: tuple[Any, ...], kwargs: dict[str, Any], slot: Slot, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(slot, int):
        return (*args[:slot], value, *args[slot + 1 :]), kwargs
    return args, {**kwargs, slot: value}


_taught = False


def _teach_owners() -> None:
    """From now on, whatever module a DropConnect is registered in learns to load plain keys.

    A hook on registration, because copies, pickles and passes of `torch.fx` build the owners anew, as
    empty modules, and put the children in.
    """
    global _taught
    teach_functional_call()
    if not _taught:
        register_module_module_registration_hook(_teach_owner)
        _taught = True


def _teach_owner(owner: nn.Module, name: str, child: nn.Module | None) -> None:
    if isinstance(child, DropConnect):
        forget(owner, child)
        # Without a reference to the owner: a GraphModule cannot be pickled with one to itself.
        owner._register_load_state_dict_pre_hook(child.accept_plain_keys)  # type: ignore[no-untyped-call]


def forget(owner: nn.Module, child: DropConnect) -> None:
    """Take the hook of a child out of its owner."""
    hooks: dict[int, Any] = owner._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if hook.hook == child.accept_plain_keys]:
        del hooks[key]
