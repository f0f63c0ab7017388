"""A model, its plain twin to which the same things are done, and what has to hold between the two."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from surgery import SurgeryError, dropconnect_sites, plain_state_dict
from surgery.modules.node import Settle
from surgery.modules.operated import DropConnectModule, plain_class
from surgery.modules.own_generator import generator_of
from surgery.modules.places import SitesNode, places, plain_parameters, states_of

from ..helpers import REBUILT, bits_of
from ..internals import live_masks, own_notes
from ..survive.interrupts import left_behind
from . import parts


class Fault(AssertionError):
    """Something that was promised does not hold."""


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of the plain model under all their names."""
    for name, module in walk(model):
        for key, value in (*plain_parameters(module).items(), *_buffers(module).items()):
            if value is not None:
                yield f"{name}.{key}" if name else key, value


def memory_of(tensor: Tensor) -> Any:
    """Where the values of a tensor lie, and how they are read: what two have in common that are one."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


OF_GRAPHS = frozenset(
    ("_graph", "_code", "_lineno_map", "_prologue_start", "_load_state_dict_pre_hooks")
)
"""Attributes that surgery changes of graph modules, and of those that hold parameters for them."""


TABLES = ("_parameters", "_buffers", "_modules")
"""Of a module; surgery puts names of its own into them, so what is plain in them is looked at."""


def require(holds: bool, promise: str, *details: Any) -> None:
    if not holds:
        raise Fault(" ".join([promise, *map(str, details)]))


def children(module: nn.Module) -> dict[str, nn.Module | None]:
    """The children of the plain module."""
    return {k: m for k, m in module._modules.items() if not isinstance(m, (SitesNode, Settle))}


def walk(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of the plain model under all their names."""
    yield name, model
    for key, child in children(model).items():
        if child is not None:
            yield from walk(child, f"{name}.{key}" if name else key)


def _buffers(module: nn.Module) -> dict[str, Tensor | None]:
    anchors = {state.anchor for state in states_of(module).values()}
    return {name: value for name, value in module._buffers.items() if name not in anchors}


def shape(model: nn.Module, buffers: bool = True) -> list[Any]:
    """All that a plain model is, as the twin has it too: objects are numbers in order of appearance."""
    numbers: dict[int, int] = {}

    def number(thing: object) -> int:
        return numbers.setdefault(id(thing), len(numbers))

    found: list[Any] = []
    for name, module in walk(model):
        parameters = plain_parameters(module)
        found.append((name, number(module), class_of(module), module.training))
        found += [
            (key, p if p is None else (number(p), type(p), p.requires_grad, bits_of(p)))
            for key, p in parameters.items()
        ]
        for key, value in _buffers(module).items():
            found.append((key, bits_of(value) if buffers else None))
        found.append(vars(module).keys() - _ours(module))
    return found


def _ours(module: nn.Module) -> set[str]:
    """The attributes that surgery has put into a module."""
    ours = {*DropConnectModule.OWN, *(state.live for state in states_of(module).values())}
    in_graph = isinstance(module, fx.GraphModule) or plain_class(module) is nn.Module
    return ours | (OF_GRAPHS if in_graph else REBUILT)


def class_of(module: nn.Module) -> Any:
    """The plain class; every graph module has one of its own."""
    return "a graph" if isinstance(module, fx.GraphModule) else plain_class(module)


def objects(model: nn.Module, values: bool = True) -> list[Any]:
    """The same by identity: what stays when nothing has been done to the plain model."""
    found: list[Any] = []
    for name, module in walk(model):
        parameters, kept, ours = plain_parameters(module), vars(module), _ours(module)
        found.append((name, id(module), plain_class(module), module.training))
        found += [
            (key, id(value), None if key in TABLES else _inside(value))
            for key, value in kept.items()
            if key not in ours
        ]
        found.append([(key, id(child)) for key, child in children(module).items()])
        for key, p in (*parameters.items(), *_buffers(module).items()):
            found.append((key, id(p), p is not None and p.requires_grad))
            if values and p is not None:
                found.append((bits_of(p), bits_of(p.grad)))
    return found


def _inside(value: Any) -> Any:
    if not isinstance(value, dict):
        return None
    return (list(value), list(map(id, value.values()))) if value else ()


def dropping(model: nn.Module, around: bool = True) -> list[Any]:
    """All that DropConnect is in a model, by identity; `around`: with all who carry it."""
    return _told(model, id, around)


def signature(model: nn.Module) -> list[Any]:
    """All that a model is, comparable with a copy of it. Buffers and gradients do not count: they are
    what a forward may change."""
    numbers: dict[int, int] = {}
    told = _told(model, lambda thing: numbers.setdefault(id(thing), len(numbers)))
    return [told, shape(model, buffers=False)]


def _told(model: nn.Module, name_of: Callable[[Any], int], around: bool = True) -> list[Any]:
    """Who carries DropConnect, and what every site is told."""
    carried = [
        (name, plain_class(module), sorted(states_of(module)), own_notes(module))
        for name, module in walk(model)
        if around and isinstance(module, DropConnectModule)
    ]
    return carried + [
        (place.name, s.name, name_of(s), s.config, s.factor, s.inference, s.samples, s.follows,
         s.site, s.group, s.held_key is None, name_of(generator_of(s)), name_of(place.raw),
         name_of(place.anchor), bits_of(place.anchor))
        for place in places(model)
        for s in [place.state]
    ]  # fmt: skip


WAYS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
"""Contexts in which a forward is run."""


def backward(out: Tensor) -> Tensor:
    """Gradients of some loss; the output."""
    if out.requires_grad:
        out.double().square().sum().backward()
    return out.detach()


def set_mode(model: nn.Module, mode: bool) -> None:
    """Also of graphs from `torch.export`, which refuse `train` and `eval`."""
    for module in model.modules():
        module.training = mode


def _type_of(module: nn.Module) -> Any:
    """What of a module decides whether torch has its forward and its backward."""
    of = [(p.dtype, p.requires_grad) for p in module._parameters.values() if p is not None]
    hooks = len(module._forward_hooks), len(module._backward_hooks)
    return id(module), module.training, hooks, tuple(of)


class World:
    """What one sequence of actions works on."""

    def __init__(self, model: nn.Module, rng: Random) -> None:
        self.model, self.twin = model, copy.deepcopy(model)
        self.rng = rng
        self.x = torch.randn(2, 3, 6, dtype=torch.float64)
        self.log: list[str] = []
        self.rebase()

    def rebase(self) -> None:
        """From now on, these are the parameters that must stay the same objects."""
        self.known: dict[Any, bool] = {}
        """Whether the plain model trains, for what was asked of it so far."""
        self.own = list(self.model.parameters())
        self.optimizer = self.rng.choice([torch.optim.SGD, torch.optim.Adam])(
            self.own or [nn.Parameter(torch.zeros(1))], lr=0.01
        )

    @property
    def sites(self) -> list[str]:
        return [site.name for site in dropconnect_sites(self.model)]

    @property
    def operated(self) -> bool:
        return next(places(self.model), None) is not None

    def run(self, model: nn.Module, width: int = 6, way: str = "plain") -> Tensor:
        """The output of a model.

        Args:
            width: of the input; any but 6 is wrong.
            way: how the forward is run.
        """
        x = self.x[..., :width]
        with contextlib.ExitStack() as stack:
            if way in WAYS:
                stack.enter_context(WAYS[way]())
            if way == "checkpoint":
                return checkpoint(parts.called, model, x, use_reentrant=False)
            if way == "reentrant":
                return checkpoint(
                    parts.called, model, x.clone().requires_grad_(), use_reentrant=True
                )
            return parts.called(model, x)

    def trains(self, way: str = "plain") -> bool:
        """Whether a step of the plain model, as it is now, ends without an error: torch does not have
        everything in every type. Values make no difference to that."""
        about = way, tuple(map(_type_of, (module for _, module in walk(self.twin))))
        if about not in self.known:
            buffers = [(one, one.clone()) for one in self.twin.buffers()]
            try:
                backward(self.run(self.twin, way=way))
                self.known[about] = True
            except (RuntimeError, NotImplementedError):
                self.known[about] = False
            for buffer, value in buffers:
                buffer.copy_(value)
            self.twin.zero_grad()
        return self.known[about]

    def both(self, change: Callable[[nn.Module], Any]) -> None:
        """Do something to the model and to its twin."""
        change(self.model)
        change(self.twin)

    def follow(self) -> None:
        """Give the twin the values of the model, whose training is not its own."""
        with torch.no_grad():
            for (_, one), (_, other) in zip(walk(self.model), walk(self.twin), strict=True):
                pairs = (
                    *zip(plain_parameters(one).values(), other._parameters.values()),
                    *zip(_buffers(one).values(), other._buffers.values()),
                )
                for mine, its in pairs:
                    if mine is not None:
                        its.copy_(mine)

    def attempt(
        self, call: Callable[[], Any], *refusals: type[Exception], values: list[Any] | None = None
    ) -> bool:
        """Whether a verb did what it was asked for. If it refuses, nothing may have changed.

        Args:
            call: calls the verb.
            refusals: errors that are refusals, too.
            values: the objects of now, where they are known.
        """
        before = objects(self.model) if values is None else values, dropping(self.model)
        try:
            call()
            return True
        except (SurgeryError, *refusals) as error:
            after = objects(self.model), dropping(self.model)
            require(after == before, "a refusal leaves the model as it was:", repr(error))
            return False

    def unchanged(self, call: Callable[[], Any], values: bool = True, around: bool = True) -> Any:
        """What `call` returns, which may not change the plain model nor DropConnect.

        Args:
            values: whether values count.
            around: whether it counts which modules around sites follow their forward.
        """
        before = objects(self.model, values), dropping(self.model, around)
        result = call()
        after = objects(self.model, values), dropping(self.model, around)
        require(after[0] == before[0], "what changes nothing changed the plain model")
        require(after[1] == before[1], "what changes nothing changed DropConnect")
        return result

    def check(self) -> None:
        """What holds after every action."""
        left = left_behind()
        require(not left, "the thread is as it was:", left)
        own = [id(parameter) for parameter in self.own]
        require([id(p) for p in self.model.parameters()] == own, "parameters are the same objects")
        require(not list(live_masks(self.model)), "no mask outlives its forward")
        require(shape(self.model) == shape(self.twin), "the model is its twin")
        self.check_state_dict()

    def check_state_dict(self) -> None:
        """Raw keys in the plain order, anchors beside; and plain ones of the plain model."""
        plain, twins = plain_state_dict(self.model), self.twin.state_dict()
        require(list(plain) == list(twins), "plain keys are those of the plain model")
        # Whose values are those of the twin, as `shape` has said.
        own = {key: value for key, value in named_tensors(self.model)}
        same = [memory_of(value) == memory_of(own[key]) for key, value in plain.items()]
        require(all(same), "plain values are those of the plain model")
        renamed, anchors = {}, set()
        for place in places(self.model, remove_duplicate=False):
            prefix = f"{place.name}." if place.name else ""
            renamed[prefix + place.state.raw] = prefix + place.state.name
            if place.state.anchor is not None:
                anchors.add(prefix + place.state.anchor)
        found = list(self.model.state_dict())
        require(anchors <= set(found), "anchors are in the state dict")
        keys = [renamed.get(key, key) for key in found if key not in anchors]
        require(keys == list(twins), "raw keys have the plain order")

    def evaluated(self) -> bool:
        """Whether `eval()` of the model has to be the twin's: what its sites do then is the mean."""
        return all(place.state.inference == "mean" for place in places(self.model))
