"""Laws shared by the sites of equal p, and laws of one's own for compiled graphs.

Making tensors is what a change of p costs, so sites share their law wherever Python runs. A compiled
graph takes laws as inputs, and is guarded by which of its inputs are one tensor: with shared laws it
would be compiled again when sites come to differ in p. So every site has a law of its own as well, as
soon as a first forward with a site is traced. It must exist before it is traced, since what is made in
a trace is an output of the graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor

from ..ops import Law

if TYPE_CHECKING:
    from .state import SiteState

_shared: WeakValueDictionary[tuple[float, torch.device, torch.dtype], Law] = WeakValueDictionary()
_sites: WeakSet[SiteState] = WeakSet()
_traced = False
"""Whether dynamo has traced the forward of a site in this process."""


def shared_law(p: float, device: torch.device, dtype: torch.dtype) -> Law:
    """The law of `p` for weights of that device and dtype: the same object as long as it is used."""
    law = _shared.get((p, device, dtype))
    if law is None:
        with torch._C._DisableFuncTorch():  # it outlives the transform that is running
            law = Law.of(p, device, dtype)
        if type(law.threshold) is Tensor:  # not a fake one, of a trace
            _shared[p, device, dtype] = law
    return law


def note_site(state: SiteState) -> None:
    """Remember a new site, for the first trace."""
    _sites.add(state)


def own_laws_exist() -> None:
    """Called while a forward with a site is traced: from now on every site has a law of its own."""
    global _traced
    if not _traced:
        _traced = True
        give_own_laws(_sites)


# What `torch.compiler.assume_constant_result` does, but it imports dynamo, which takes seconds: dynamo
# runs the function as it is, at trace time, and puts nothing of it into the graph.
own_laws_exist._dynamo_marked_constant = True  # type: ignore[attr-defined]


def give_own_laws(states: Iterable[SiteState]) -> None:
    """Bring the sites' own laws up to their shared ones, if anybody reads them."""
    if not _traced:
        return
    groups: dict[int, list[SiteState]] = {}
    for state in states:
        groups.setdefault(id(state.law), []).append(state)
    for group in groups.values():
        law = group[0].law
        if law is None:
            continue
        with torch._C._DisableFuncTorch():
            own = law.copies(len(group))
        for state, its in zip(group, own):
            state.own_law = its
