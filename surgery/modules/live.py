"""A masked weight while a forward reads it as `module.weight`, and whether somebody wrote to it.

What a forward writes into a masked weight would be lost when it ends. It cannot be carried over to the
stored weight, because a dropped entry does not tell what the stored one should become. So such a
forward ends with an error that names the weight. A parent's forward that only writes to the weight of
its child draws no mask for it (see `surgery.kinds.reads`): it writes to the stored weight, and nothing
is lost.
"""

from __future__ import annotations

import itertools
import operator
from threading import get_ident
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ..spec.errors import SurgeryError
from ..torch_private.compiler import (
    break_graph,
    fake_of,
    look_in_trace,
    node_of,
    nodes_from_the_end,
    object_of,
    result_of,
)
from ..torch_private.tensors import counter, memory_of, no_torch_function, version_of
from ..torch_private.tracing import is_graphed
from ..travel import Weight
from .recompute import Recipe
from .state import SiteState


class LiveWeight(Tensor):
    """A masked weight that notices writes through `.data`, which do not change the version of a tensor.

    Like `torch.nn.Parameter` it takes no part in `__torch_function__`: operations return plain tensors.
    """

    __torch_function__ = no_torch_function

    aliases: list[LiveWeight]
    """What `.data` of this weight, and of these aliases, has returned. Each has its own version."""
    assigned: bool
    """Whether `.data` was assigned."""
    thread: int
    """The id of the thread that made it."""
    beside: dict[str, Tensor]
    """Of an RNN whose weights share memory: those that are not masked, by name; see `flat.py`."""

    @classmethod
    def of(cls, tensor: Tensor, aliases: list[LiveWeight]) -> LiveWeight:
        """A view of `tensor`: the two share one version."""
        if tensor.requires_grad and not torch.is_grad_enabled():
            with torch.enable_grad():  # so that the view requires a gradient, too
                live = tensor.as_subclass(cls)
        else:
            live = tensor.as_subclass(cls)
        live.aliases, live.assigned, live.thread = aliases, False, get_ident()
        return live

    @property
    def data(self) -> Tensor:
        """An alias that autograd does not see."""
        alias = LiveWeight.of(_DATA.__get__(self), self.aliases)
        self.aliases.append(alias)
        return alias

    @data.setter
    def data(self, value: Tensor) -> None:
        self.assigned = True
        _DATA.__set__(self, value)

    def was_written(self, version: int) -> bool:
        """Whether somebody wrote since it was at `version`."""
        of_data = any(counter(alias) or alias.assigned for alias in self.aliases)
        return of_data or self.assigned or counter(self) != version


_DATA: Any = Tensor.data


class Open(NamedTuple):
    """A masked weight that was made for one forward."""

    owner: Any
    """The module that has the site."""
    state: SiteState
    used: Any
    """The masked weight, as the forward gets it."""
    version: int
    """Its version when it was made."""
    recipe: Recipe | None
    """None if autograd keeps it."""


def watched(owner: Any, state: SiteState, used: Tensor, recipe: Recipe | None) -> Open:
    """The masked weight `used` of a site, as it is handed out."""
    if torch.compiler.is_dynamo_compiling():
        look_in_trace(_mark, _check_now, None, state, used, 0)
        return Open(owner, state, used, 0, recipe)
    live = used
    if type(used) is Tensor and not is_graphed():
        live = LiveWeight.of(used, [])
    return Open(owner, state, live, version_of(live), recipe)


def is_of_another_thread(live: Any) -> bool:
    """Whether a masked weight was made in another thread."""
    return type(live) is LiveWeight and live.thread != get_ident()


def close(opened: list[Open]) -> None:
    """Let masked weights go: `module.weight` is the stored one again."""
    for one in opened:
        object.__setattr__(one.owner, one.state.live, None)


def check_unwritten(reader: nn.Module, opened: list[Open]) -> None:
    """Raise `SurgeryError` if one of the masked weights was written to.

    Args:
        reader: the module whose forward had them.
        opened: what it had.
    """
    for one in opened:
        if isinstance(one.used, Weight):
            continue  # which has no values to write to
        if torch.compiler.is_dynamo_compiling():
            look_in_trace(_look, _check_now, reader, one.state, one.used, one.version)
        else:
            _check_now(reader, one.state, one.used, one.version)


def _check_now(reader: nn.Module, state: SiteState, used: Any, version: int) -> None:
    written = used.was_written(version) if type(used) is LiveWeight else version_of(used) != version
    if written or state.written:
        refuse_write(reader, state)


def refuse_write(writer: nn.Module, state: SiteState) -> NoReturn:
    """Raise the `SurgeryError` for a masked weight that is written to."""
    raise SurgeryError(_sentence(writer, state))


def _sentence(writer: nn.Module, state: SiteState) -> str:
    return (
        f"{state.site}: the forward of {type(writer).__name__} writes to it while it is masked, and "
        f"that would be lost. Exclude it, or write to {state.raw!r}, or write before the forward"
    )


def _mark(context: Any) -> None:
    fake = fake_of(context, "used")
    fake._dropconnect_version = counter(fake)


def _look(context: Any) -> None:
    """Break the graph if a masked weight was written to. The fake tensors of a trace have versions as
    real ones have, and so have those that share their memory."""
    node = node_of(context, "used")
    used = result_of(node)
    made = getattr(used, "_dropconnect_version", None)
    if made is None:  # after a break: the masked weight was made in another graph
        break_graph(context, "a masked weight")
    nodes = itertools.takewhile(lambda other: other is not node, nodes_from_the_end(context))
    since = list(nodes)
    aliases = [value for value in map(result_of, since) if _is_alias(value, used)]
    written = counter(used) != made or any(counter(alias) not in (0, made) for alias in aliases)
    if written or any(_is_item_of(used, other) for other in since):
        reader, state = object_of(context, "reader"), object_of(context, "state")
        state.written = True
        break_graph(context, _sentence(reader, state))


def _is_item_of(used: Tensor, node: Any) -> bool:
    """Whether a node is `used[...] = value`, which torch 2.9 does not do on fake tensors: no version
    tells of it."""
    return node.target is operator.setitem and _is_alias(result_of(node.args[0]), used)


def _is_alias(value: Any, used: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return memory_of(value) == memory_of(used)
