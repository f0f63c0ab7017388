"""How a module holds DropConnect: its class is swapped for a subclass made here.

The module object stays; hooks, attributes and `isinstance` keep working. In the subclass

* the parameter `weight` is registered as `weight_raw`, in the same position;
* `module.weight` is a property: the masked weight while a forward runs, the raw `Parameter` otherwise;
* `forward` draws the masks, runs the forward of the original class, and lets the masks go.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from ..base.caching import kept_for_class
from ..base.plugins import load_plugins
from ..moments.scope import run_in_scope
from ..spec.errors import SurgeryError
from ..spec.names import raw_name
from ..torch_private.recurrent import FLAT_WEIGHTS, KEEPERS
from .dropping import dropping, runs_now
from .flat import flat_weights
from .functional import teach_functional_call
from .keys import take_plain_keys
from .live import refuse_write
from .places import StatesHolder, states_in
from .state import live_name, refusal_to_script
from .takers import Parametrizations, Qconfig, refuse_quantised, refuse_taking
from .watch import notice


class DropConnectModule(StatesHolder):
    """What every operated module has: test `isinstance(m, DropConnectModule)`.

    Nobody constructs one: `surgery.operating` swaps the class of a module that exists.
    """

    _dropconnect_draws: tuple[str, ...]
    """Relative names of the descendants for which this module's forward draws masks, because it reads
    their weights itself."""

    _dropconnect_scope: bool
    """Whether a site inside asks which forward is the outermost one; see `surgery.moments.scope`."""

    _dropconnect_class: tuple[type[nn.Module], tuple[str, ...]]
    """Arguments of `operated_class` that made this class."""

    OWN = ("_dropconnect", "_dropconnect_draws", "_dropconnect_scope", "_dropconnect_class")
    """Names of these."""

    qconfig = Qconfig()
    parametrizations = Parametrizations()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """`type(module)(...)` makes a new module of the original class, without DropConnect."""
        if args or kwargs:
            return cls._dropconnect_class[0](*args, **kwargs)
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Nothing for a module that has DropConnect. A class may put it in place when it is
        constructed; then Python takes what `__new__` returns for one that is not initialised yet."""
        if "_dropconnect" not in self.__dict__:
            super().__init__(*args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Nothing: a base class that registers its subclasses must not see this one."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Assigning a `Parameter` to a plain name (tying, resizing) replaces the raw parameter.

        Raises:
            SurgeryError: it is quantised, or a forward is running that reads the masked weight.
        """
        state = self._dropconnect.get(name)
        if state is not None:
            refuse_quantised(state, param)
            if self.__dict__[state.live] is not None and runs_now(self):
                refuse_write(self, state)
        super().register_parameter(raw_name(name) if name in self._dropconnect else name, param)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Accept plain keys and raw keys. With a plain key the anchor, which a plain checkpoint does
        not have, stays as it is."""
        for state in take_plain_keys(state_dict, prefix, self._dropconnect.values()):
            if state.anchor is not None:
                state_dict.setdefault(prefix + state.anchor, getattr(self, state.anchor))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._fit_laws()

    def train(self, mode: bool = True) -> Any:
        """As for every module. A mask that a killed forward has left is removed here too: in `eval()`
        no forward would replace it."""
        for state in self._dropconnect.values():
            if self.__dict__[state.live] is not None and not runs_now(self):
                self.__dict__[state.live] = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._fit_laws()
        return self

    def _fit_laws(self) -> None:
        """Create the laws now, on the device of their weight. If they were created during tracing, they
        would be outputs of the compiled graph, and the next call would recompile."""
        for state in self._dropconnect.values():
            weight = getattr(self, state.raw)
            if weight is not None:
                state.law_for(weight)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles refer to the original class, since this one exists only at run time.

        Raises:
            TypeError: the class says in a way of its own how it is copied.
        """
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple) or len(reduced) < 3:
            raise TypeError(f"cannot copy or pickle an operated {type(self).__name__}")
        return (_new_operated, self._dropconnect_class, *reduced[2:])

    def __copy__(self) -> Any:
        """A shallow copy shares parameters, buffers and children with the original, as that of a plain
        module does. Names and states are its own, so that either of the two can be stripped alone."""
        new = object.__new__(type(self))
        states = {name: copy.copy(state) for name, state in self._dropconnect.items()}
        own = {name: dict(self.__dict__[name]) for name in ("_parameters", "_buffers")}
        live = {state.live: None for state in states.values()}
        new.__dict__.update({**self.__dict__, **own, **live, "_dropconnect": states})
        return new

    def __prepare_scriptable__(self) -> Any:
        """`torch.jit.script` calls this, of the module and then of those inside.

        Raises:
            SurgeryError: the module has a site.
        """
        for state in self._dropconnect.values():
            raise SurgeryError(refusal_to_script(state.site, "torch.jit.script"))
        return self

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        parts += [f"{s.name}: dropconnect p={s.p:g}" for s in self._dropconnect.values()]
        return ", ".join(part for part in parts if part)


def _new_operated(base: type[nn.Module], names: tuple[str, ...]) -> Any:
    load_plugins()  # adapters make an unpickled model save plain keys, too
    return object.__new__(operated_class(base, names))


@kept_for_class
def operated_class(base: type[nn.Module], names: tuple[str, ...]) -> type[DropConnectModule]:
    """The subclass of `base` whose parameters `names` are operated.

    It has the name of `base`, because other libraries look at that (`config.architectures`,
    accelerate's `no_split_module_classes`).

    Raises:
        TypeError: `base` forbids subclasses.
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
        body[FLAT_WEIGHTS] = property(flat_weights, _ignore_flat_weights)
        for name in KEEPERS:
            body[name] = _of_stored_weights(getattr(base, name))
        # Dynamo runs RNNs eagerly; without this it would compile each helper of `_forward` alone.
        body["forward"] = torch.compiler.disable(body["forward"])
    if issubclass(base, nn.TransformerEncoder):
        body["use_nested_tensor"] = NestedTensors()
    if _is_laid_out_as_modules_are(base):
        return type(base.__name__, (DropConnectModule, base), body)
    metaclass = _marked_later(type(base))
    return cast(type[DropConnectModule], metaclass(base.__name__, (base, DropConnectModule), body))


def _is_laid_out_as_modules_are(base: type) -> bool:
    """Whether `__class__` of an object of this class may be set to a class whose first base is a
    module. Python compares both along their first bases: it refuses for `class Net(abc.ABC,
    nn.Module)`, whose first base is no module."""
    cls: type | None = base
    while cls is not None and cls is not nn.Module:
        cls = cls.__base__
    return cls is nn.Module


def _marked_later(metaclass: type) -> Any:
    """A metaclass for classes with the bases `(base, DropConnectModule)`. Python takes their memory
    layout from `base`, and yet looks for attributes in `DropConnectModule` first."""

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


class NestedTensors:
    """The option of `nn.TransformerEncoder` to compute with nested tensors, by a kernel of its own for
    a whole layer. It is off while moments travel, of which neither knows."""

    def __get__(self, module: Any, owner: type) -> Any:
        if module is None or "use_nested_tensor" not in module.__dict__:
            raise AttributeError("use_nested_tensor")
        training = module.training
        if any(state.mode(training) == "moments" for state in states_in(module)):
            return False
        return module.__dict__["use_nested_tensor"]

    def __set__(self, module: Any, value: Any) -> None:
        module.__dict__["use_nested_tensor"] = value


def _ignore_flat_weights(self: Any, value: Any) -> None:
    """Nothing: `nn.RNNBase` assigns this list after moves and loads; here a property makes it."""


def _of_stored_weights(method: Callable[[Any], None]) -> Callable[[Any], None]:
    """A method of `nn.RNNBase` that looks for new weights, or moves the weights into one block of
    memory. While masked weights are read instead of the stored ones, it does nothing."""

    @functools.wraps(method)
    def of_stored(self: Any) -> None:
        if all(self.__dict__[state.live] is None for state in self._dropconnect.values()):
            method(self)

    return of_stored


def _forward(base: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Somebody may have kept the bound method from before strip_dropconnect (accelerate does).
        if not isinstance(self, DropConnectModule):
            return base.forward(self, *args, **kwargs)
        if self._dropconnect_scope:
            return run_in_scope(functools.partial(dropping, base, self), args, kwargs)
        return dropping(base, self, *args, **kwargs)

    # A code object of its own, because dynamo limits recompilations for each of them.
    forward.__code__ = forward.__code__.replace()  # type: ignore[attr-defined]
    del forward.__wrapped__  # accelerate would unwrap to a forward that does not drop
    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    return forward


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class the module has without DropConnect."""
    if isinstance(module, DropConnectModule):
        return module._dropconnect_class[0]
    return type(module)
