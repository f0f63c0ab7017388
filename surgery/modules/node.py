"""The module that a DropConnect node of a graph calls."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..base.caching import cached
from ..moments.scope import in_scope, settle
from ..spec.errors import SurgeryError
from ..torch_private.modules import before_loading, not_before_loading, on_registration
from .functional import teach_functional_call
from .keys import take_plain_keys
from .masking import Operand, draw_keys, masked_weight
from .places import SitesNode
from .product_forward import drops_in_product, product_forward, replaced_product
from .recompute import Recipe, call_recomputing
from .state import SiteState, refusal_to_script

Slot = int | str
"""Where an argument stands in a call: a position, or a keyword."""


@dataclass(frozen=True)
class Call:
    """An operation that a DropConnect node replaces. The node has the arguments of the operation."""

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
        if hasattr(self.target, "overloadpacket"):
            return {**self.__dict__, "target": None, "overload": str(self.target)}
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        overload = state.pop("overload", None)
        if overload is not None:
            state["target"] = operator.attrgetter(overload)(torch.ops)
        self.__dict__.update(state)


class DropConnectNode(SitesNode):
    """Called by a node that graph surgery put in; `surgery.transforms` makes it.

    It lies beside its parameter: for `fc.weight_raw` it is `fc.weight_dropconnect`. It has the state of
    the site, and takes the raw parameter as an argument. It either

    * replaces the one operation that reads the weight, and takes the arguments of that operation; or
    * returns the masked weight, for operations of any kind and number. Then autograd keeps the masked
      weight itself, not its key.

    It drops while its own `training` is True. `graph_module.train()` and `.eval()` set it; the module
    of a `torch.export`ed program refuses these, and `torch.nn.Module.train(graph_module, mode)` does
    the same there.
    """

    _is_impure = True
    """For `torch.fx`: dead-code elimination must not remove the node."""

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

    def _get_name(self) -> str:
        """In the repr."""
        return "DropConnect"

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
        """Without a call that is replaced: `forward(raw)` returns the masked weight, and `forward(raw,
        masked)` returns `masked`, which another node has made. With one: the arguments and the result
        are those of the replaced operation.

        Args:
            anchor: where dropped entries of the weight go; None is zero.
            bias_anchor: the same for a bias that is dropped in this node.

        Raises:
            RuntimeError: the graph is traced again, or a weight has not the shape of its anchor.
        """
        if any(isinstance(arg, torch.fx.Proxy) for arg in args):
            raise RuntimeError(
                f"{self._site}: a graph with DropConnect cannot be traced again, its masks would be "
                "constants; call strip_dropconnect first"
            )
        self._note()
        anchors = anchor, bias_anchor
        if self.call is not None:
            return self._replace(self.call, args, kwargs, anchors)
        raw, *known = args
        if known:
            return known[0]
        (used,), _ = self._masked(self._operands([raw], anchors))
        return used

    def _operands(self, raws: list[Tensor], anchors: tuple[Tensor | None, ...]) -> list[Operand]:
        return [Operand(*one) for one in zip(raws, self.states.values(), anchors)]

    def _replace(
        self,
        call: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        anchors: tuple[Tensor | None, ...],
    ) -> Any:
        """The operation with masked weights, or with its product replaced."""
        slots = [slot for slot in (call.weight, call.bias) if slot is not None]
        slots = slots[: len(self.states)]
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        operands = self._operands([given[slot] for slot in slots], anchors)
        replaced = replaced_product(self.states.values(), self.training)
        if replaced is not None:
            bias = None if call.bias is None else given[call.bias]
            if drops_in_product(operands[-1].state, self.training) and len(operands) > 1:
                bias = operands[-1]
            return product_forward(replaced[1], None, given[call.input], operands[0], bias)
        used, recipes = self._masked(operands)
        given.update(zip(slots, used))
        args = tuple(given[i] for i in range(len(args)))
        kwargs = {key: given[key] for key in kwargs}
        return call_recomputing(recipes, call.run, (args, kwargs), {})

    def _masked(self, operands: list[Operand]) -> tuple[list[Tensor], list[Recipe]]:
        """The weights that this call uses, and recipes to compute them again."""
        used = [operand.raw for operand in operands]
        recipes = []
        dropped = [i for i, f in enumerate(operands) if f.state.mode(self.training) == "batch"]
        for i, key in zip(dropped, draw_keys([operands[i] for i in dropped])):
            used[i], recipe = masked_weight(operands[i], key)
            if recipe is not None:
                recipes.append(recipe)
        return used, recipes

    def _note(self) -> None:
        if not torch.compiler.is_compiling():
            for state in self.states.values():
                state.drawn = state.drawn or state.mode(self.training) is not None

    @property
    def _site(self) -> str:
        return self.states[self.name].site

    def accept_plain_keys(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Hook that runs before the owner loads a state dict: plain keys are taken for raw ones. An
        anchor, which a plain checkpoint does not have, stays as it is."""
        self._loads_plain = bool(take_plain_keys(state_dict, prefix, self.states.values()))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: Any,
        *args: Any,
    ) -> None:  # fmt: skip
        """Runs after the owner has loaded. If the keys were plain, the anchors are not missing."""
        owner = prefix.rpartition(".")[0].rpartition(".")[0]
        for state in self.states.values() if self._loads_plain else ():
            key = f"{owner}.{state.anchor}" if owner else state.anchor
            if key in missing:
                missing.remove(key)
        self._loads_plain = False
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *args)

    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Move the laws as `fn` moves the weights: to another device or dtype."""
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        for state in self.states.values():
            if state.law is not None:
                state.law_for(fn(state.law.scale))
        return self

    def extra_repr(self) -> str:
        parts = [f"{state.name}: dropconnect p={state.p:g}" for state in self.states.values()]
        return ", ".join(parts + ([f"in {self.call.function}"] if self.call else []))


DropConnect = DropConnectNode
"""The name in pickles from before this class had its own."""


class Settle(nn.Module):
    """Called on what a graph returns. It replaces Gaussians (`inference="moments"`) by tensors, unless
    a forward around the graph will do that."""

    def forward(self, value: Any) -> Any:
        return value if in_scope() else settle(value)


@cached
def _teach_owners() -> None:
    """From now on every module in which a DropConnectNode is registered can load plain keys.

    This is a hook on the registration of children, because copies, pickles and passes of `torch.fx`
    build owners as new, empty modules, and then register the children.
    """
    teach_functional_call()
    on_registration(_teach_owner)


def _teach_owner(owner: nn.Module, name: str, child: nn.Module | None) -> None:
    if isinstance(child, DropConnectNode):
        forget(owner, child)
        before_loading(owner, child.accept_plain_keys)


def forget(owner: nn.Module, child: DropConnectNode) -> None:
    """Remove the hook that `child` has in its owner."""
    not_before_loading(owner, child.accept_plain_keys)
