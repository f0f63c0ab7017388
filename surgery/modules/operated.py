"""How a module holds DropConnect: its class is swapped for a subclass made here.

The module object stays; hooks, attributes and `isinstance` keep working. In the subclass

* the parameter `weight` is registered as `weight_raw`, in the same place and order;
* `module.weight` is a property: the masked weight while a forward runs, the raw `Parameter` otherwise;
* `forward` draws the masks, runs the forward of the original class, and lets the masks go.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..caching import kept_for_class
from ..errors import SurgeryError
from ..ops import draw_key, masked_linear
from ..ops.engine import is_traced
from ..ops.ordinary import is_dense
from ..plugins import load_plugins
from ..recompute import Recipe, call_recomputing
from ..scope import run_in_scope
from .functional import teach_functional_call
from .live import Open, check_unwritten, close, recipes_of, refuse_write, watched
from .masking import check_anchor, is_sharded, masked_weight
from .paper_modes import Factor, product_forward
from .product import LINEAR_PRODUCT
from .state import SiteState, live_name, raw_name, refusal_to_script
from .takers import Parametrizations, Qconfig, refuse_quantised, refuse_taking
from .watch import notice, refuse_recomputation

WRAPPERS = ("OptimizedModule", "DistributedDataParallel", "DataParallel")
"""Classes, told by name because importing them is slow, that only pass on to the one module inside."""


class DropConnectModule(nn.Module):
    """Marker and shared behaviour of every operated module: `isinstance(m, DropConnectModule)`.

    Instances are never constructed; `operate` in `surgery.surgeon` swaps the class of a module.
    """

    _dropconnect: dict[str, SiteState]
    """State by plain parameter name; empty for a module that only draws for its children."""

    _dropconnect_draws: tuple[str, ...]
    """Relative names of descendants whose weights this module's forward reads itself."""

    _dropconnect_scope: bool
    """Whether a site inside needs to know the outermost forward; see `surgery.moments`."""

    _dropconnect_class: tuple[type[nn.Module], tuple[str, ...]]
    """Arguments of `operated_class` that made this class."""

    OWN = ("_dropconnect", "_dropconnect_draws", "_dropconnect_scope", "_dropconnect_class")
    """Names of these."""

    qconfig = Qconfig()
    parametrizations = Parametrizations()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """`type(module)(...)` is a new module like the original: a plain one."""
        if args or kwargs:
            return cls._dropconnect_class[0](*args, **kwargs)
        return object.__new__(cls)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not passed on: a registry of classes must not see this one."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Assigning a `Parameter` to a plain name (tying, resizing) replaces the raw one."""
        state = self._dropconnect.get(name)
        if state is not None:
            refuse_quantised(state, param)
            if self.__dict__[state.live] is not None:
                refuse_write(self, state)
        super().register_parameter(raw_name(name) if name in self._dropconnect else name, param)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Accept plain keys and raw keys. With a plain key the anchor, which a plain checkpoint does
        not have, stays as it is."""
        for state in self._dropconnect.values():
            plain, raw = prefix + state.name, prefix + state.raw
            if plain in state_dict and raw not in state_dict:
                state_dict[raw] = state_dict.pop(plain)
                if state.anchor is not None:
                    state_dict.setdefault(prefix + state.anchor, getattr(self, state.anchor))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._fit_laws()

    def train(self, mode: bool = True) -> Any:
        """Here, too, a mask goes that a killed forward left: in `eval()` it would stay for ever."""
        for state in self._dropconnect.values():
            if self.__dict__[state.live] is not None and not runs_now(self):
                self.__dict__[state.live] = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._fit_laws()
        return self

    def _fit_laws(self) -> None:
        """Laws follow their weight to its device now: made inside a trace, they would be outputs of
        the compiled graph, and the next call would recompile."""
        for state in self._dropconnect.values():
            weight = getattr(self, state.raw)
            if weight is not None:
                state.law_for(weight)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the original class, since this one exists only at run time."""
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple) or len(reduced) < 3:
            raise TypeError(f"cannot copy or pickle an operated {type(self).__name__}")
        return (_new_operated, self._dropconnect_class, *reduced[2:])

    def __copy__(self) -> Any:
        """A shallow copy shares parameters, buffers and children, as that of a plain module; what
        surgery renames and keeps is its own, so that either can be stripped alone."""
        new = object.__new__(type(self))
        states = {name: copy.copy(state) for name, state in self._dropconnect.items()}
        own = {name: dict(self.__dict__[name]) for name in ("_parameters", "_buffers")}
        live = {state.live: None for state in states.values()}
        new.__dict__.update({**self.__dict__, **own, **live, "_dropconnect": states})
        return new

    def __prepare_scriptable__(self) -> Any:
        """Called by `torch.jit.script`, of this module and then of those inside."""
        for state in self._dropconnect.values():
            raise SurgeryError(refusal_to_script(state.site, "torch.jit.script"))
        return self

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        parts += [f"{s.name}: dropconnect p={s.p:g}" for s in self._dropconnect.values()]
        return ", ".join(part for part in parts if part)


def _new_operated(base: type[nn.Module], names: tuple[str, ...]) -> Any:
    load_plugins()  # a model that was unpickled must save as one that was operated on here
    return object.__new__(operated_class(base, names))


@kept_for_class
def operated_class(base: type[nn.Module], names: tuple[str, ...]) -> type[DropConnectModule]:
    """The subclass of `base` whose parameters `names` are operated.

    It has the name of `base`, which other libraries look at (`config.architectures`, accelerate's
    `no_split_module_classes`). Called with arguments, it makes a plain `base`.

    Raises:
        TypeError: `base` has no subclasses (its metaclass says so).
    """
    teach_functional_call()
    body: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_dropconnect_class": (base, names),
    }
    for name in names:
        body[name] = _weight_property(name)
    body["forward"] = _forward(base)
    if issubclass(base, nn.RNNBase):
        body["_flat_weights"] = property(_flat_weights, _ignore_flat_weights)
        # Dynamo runs RNNs eagerly; without this it would compile each helper of `_forward` alone.
        body["forward"] = torch.compiler.disable(body["forward"])  # type: ignore[no-untyped-call]
    if _is_laid_out_as_modules_are(base):
        return type(base.__name__, (DropConnectModule, base), body)
    metaclass = _marked_later(type(base))
    return cast(type[DropConnectModule], metaclass(base.__name__, (base, DropConnectModule), body))


def _is_laid_out_as_modules_are(base: type) -> bool:
    """Whether an object of this class can become one of a class whose first base is a module. Python
    looks along the first bases, and `class Net(abc.ABC, nn.Module)` leaves `nn.Module` out there."""
    cls: type | None = base
    while cls is not None and cls is not nn.Module:
        cls = cls.__base__
    return cls is nn.Module


def _marked_later(metaclass: type) -> Any:
    """A metaclass whose classes have the layout of their first base, `base`, and still look for
    attributes in the second one, `DropConnectModule`, first."""

    def mro(cls: type) -> list[type]:
        first, *others = type.mro(cls)
        others.remove(DropConnectModule)
        return [first, DropConnectModule, *others]

    return type(metaclass.__name__, (metaclass,), {"mro": mro, "__module__": metaclass.__module__})


def _weight_property(name: str) -> property:
    live, raw = live_name(name), raw_name(name)

    def get(self: Any) -> Any:
        used = self.__dict__[live]
        if not torch.compiler.is_compiling():
            if used is not None:
                self._dropconnect[name].drawn = True
            elif self.training and torch.is_grad_enabled():
                notice(self._dropconnect[name])
            if used is None:
                refuse_taking(sys._getframe(1).f_code, self._dropconnect[name])
        return getattr(self, raw) if used is None else used

    def refuse(self: nn.Module, value: Any) -> None:
        raise TypeError(
            f"cannot assign {type(value).__name__} to {name!r}: assign a torch.nn.Parameter, or write "
            f"to {raw!r} in place (DropConnect is in place; strip_dropconnect takes it out)"
        )

    def keep(self: nn.Module) -> None:
        raise AttributeError(
            f"cannot delete {name!r} while DropConnect is in place; call strip_dropconnect first"
        )

    return property(get, refuse, keep)


def _flat_weights(self: Any) -> list[Any]:
    """The list that `torch.nn.RNNBase` passes to its kernel, always read through the properties."""
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _ignore_flat_weights(self: Any, value: Any) -> None:
    """RNNBase rebuilds its list after moves and loads; here it is never stored."""


def _forward(base: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Somebody may have kept the bound method from before strip_dropconnect (accelerate does).
        if "_dropconnect" not in self.__dict__:
            return base.forward(self, *args, **kwargs)
        if self._dropconnect_scope:
            return run_in_scope(functools.partial(_dropping, base, self), args, kwargs)
        return _dropping(base, self, *args, **kwargs)

    # A code object of its own, because dynamo limits recompilations for each of them.
    forward.__code__ = forward.__code__.replace()  # type: ignore[attr-defined]
    del forward.__wrapped__  # accelerate would unwrap to a forward that does not drop
    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    return forward


def _dropping(base: type[nn.Module], module: Any, *args: Any, **kwargs: Any) -> Any:
    """One forward of the original class, with its masks."""
    fused = _fused_site(module)
    given = (*args, *kwargs.values())
    if fused is not None and len(given) == 1 and _can_be_fused(given[0]):
        return _fused(module, fused, given[0])
    opened: list[Open] = []
    result = None
    try:
        _open(module, opened)
        if opened:
            result = call_recomputing(recipes_of(opened), _inner(base, module), args, kwargs)
            close(opened)
    except (
        BaseException
    ) as error:  # not `finally`, which an interrupt can end before it did anything
        close(opened)
        for one in opened:  # nobody knows what would have been read
            one.state.drawn = True
        if isinstance(error, Exception):
            check_unwritten(module, opened)  # which autograd may have complained of
        raise
    if not opened:
        return _inner(base, module)(*args, **kwargs)
    check_unwritten(module, opened)
    return result


def _inner(base: type[nn.Module], module: Any) -> Callable[..., Any]:
    """What runs with the masks: the original forward, or a product in its place."""
    weight = _product_site(module)
    if weight is not None:
        return functools.partial(_by_product, module, weight)
    return functools.partial(base.forward, module)


def _fused_site(module: DropConnectModule) -> SiteState | None:
    """The weight of a Linear, if nothing but a mask by element is asked of it, in eager training: then
    one function does the product, its gradients and the masks, and autograd keeps no weight."""
    if len(module._dropconnect) != 1 or is_traced() or not torch.is_grad_enabled():
        return None
    (state,) = module._dropconnect.values()
    if state.product is not LINEAR_PRODUCT or not state.layout.is_elementwise:
        return None
    held = state.held_key is not None or module.__dict__[state.live] is not None
    if held or module._dropconnect_draws or state.mode(module.training) != "batch":
        return None
    return state if type(module._parameters.get(state.raw)) is nn.Parameter else None


def _can_be_fused(x: Any) -> bool:
    return type(x) is Tensor and is_dense(x) and x.ndim > 1


def _fused(module: Any, state: SiteState, x: Tensor) -> Tensor:
    """The forward of a Linear whose weight is masked by element."""
    state.drawn = True
    raw, anchor = module._parameters[state.raw], _anchor(module, state)
    law, parameters = state.law_for(raw), module._parameters
    bias = parameters["bias"] if "bias" in parameters else module.bias  # pruned or parametrized
    key = draw_key(raw.device, state.rank)
    return masked_linear(x, raw, bias, key, law, state.layout, anchor, state.name)


def _product_site(module: DropConnectModule) -> SiteState | None:
    """The weight of this module, if its product is to be replaced in this forward."""
    for state in module._dropconnect.values():
        if state.product is not None and state.mode(module.training) not in (None, "batch"):
            return state
    return None


def _by_product(module: Any, state: SiteState, *args: Tensor, **kwargs: Tensor) -> Any:
    """What the forward of a module with a product would return, with the paper's masks or moments."""
    (x,) = (*args, *kwargs.values())  # the name of the input differs from class to class
    weight = Factor(getattr(module, state.raw), state, _anchor(module, state))
    mode = state.mode(module.training)
    assert state.product is not None
    assert mode is not None
    return product_forward(state.product, module, x, weight, _bias(module), mode)


def _bias(module: Any) -> Factor | None:
    """The bias as a forward finds it: dropped by the product, or masked by now, or plain."""
    state = module._dropconnect.get("bias")
    if state is not None and state.mode(module.training) not in (None, "batch"):
        return Factor(getattr(module, state.raw), state, _anchor(module, state))
    return None if module.bias is None else Factor(module.bias)


def _anchor(module: Any, state: SiteState) -> Any:
    anchor = None if state.anchor is None else getattr(module, state.anchor)
    check_anchor(state, getattr(module, state.raw), anchor)
    return anchor


def _open(module: Any, opened: list[Open]) -> None:
    """Draw the masks of this forward call: of the module's own sites, and of those it reads for its
    children. A mask that a caller's scope has drawn stays."""
    _open_own(module, opened)
    for child in drawn_children(module):
        if not _any_sharded(child):
            _open_own(child, opened, outside=True)


def drawn_children(module: DropConnectModule) -> Iterator[DropConnectModule]:
    """The descendants whose weights this module's forward reads itself; not those that were replaced,
    removed or stripped since."""
    for path in module._dropconnect_draws:
        child: Any = module
        for part in path.split("."):
            child = getattr(child, part, None)
        if isinstance(child, DropConnectModule):
            yield child


def _any_sharded(child: DropConnectModule) -> bool:
    """Whether a child is sharded now: then it is gathered, and draws, in its own forward."""
    return any(is_sharded(getattr(child, state.raw)) for state in child._dropconnect.values())


def _open_own(module: Any, opened: list[Open], outside: bool = False) -> None:
    keys: dict[str, Tensor] = {}
    for state in module._dropconnect.values():
        mode = state.mode(module.training)
        if mode is None or (module.__dict__[state.live] is not None and runs_now(module)):
            continue
        if mode != "batch":
            if not torch.compiler.is_compiling():  # activation checkpoints in a graph forbid it
                state.drawn = True
            continue
        raw = getattr(module, state.raw)
        if not torch.compiler.is_compiling():
            if outside:
                state.drawn_outside = True
            elif state.drawn_outside:
                refuse_recomputation(state)
        if state.held_key is not None:
            key = state.held_key
        elif state.follows in keys:
            key = keys[state.follows]
        else:
            key = draw_key(raw.device, state.rank)
        keys[state.name] = key
        used, recipe = _used(module, state, raw, key)
        one = watched(module, state, used, recipe)
        opened.append(one)  # first, so that it is let go in any case
        object.__setattr__(module, state.live, one.used)
        if torch.compiler.is_compiling():  # else whoever reads it says so
            state.drawn = True


def _used(module: Any, state: SiteState, raw: Tensor, key: Tensor) -> tuple[Tensor, Recipe | None]:
    keep_law = not getattr(module, "_is_replica", False)
    return masked_weight(state, raw, _anchor(module, state), key, keep_law)


def operated_among(
    modules: Iterable[tuple[str, nn.Module]],
) -> Iterator[tuple[str, DropConnectModule]]:
    """Of named modules, those whose class has been swapped."""
    for name, module in modules:
        if isinstance(module, DropConnectModule):
            yield name, module


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and data-parallel wrappers."""
    while type(model).__name__ in WRAPPERS:
        model = next(model.children())
    return model


def runs_now(module: DropConnectModule) -> bool:
    """Whether a forward that drew a mask for this module is running, in any thread. A mask that is
    there while none is was left by a forward that was killed."""
    if torch.compiler.is_compiling():
        return True
    for frame in sys._current_frames().values():
        above: FrameType | None = frame
        while above is not None:
            if "_dropping" in above.f_code.co_name:
                opened = above.f_locals.get("opened") or ()
                if any(owner is module for owner, *_ in opened):
                    return True
            above = above.f_back
    return False


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class the module has without DropConnect."""
    if isinstance(module, DropConnectModule):
        return module._dropconnect_class[0]
    return type(module)
