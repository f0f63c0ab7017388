"""Laws shared by the sites of equal p, and tables of laws for compiled graphs.

Making tensors is what a change of p costs, so sites share their law wherever Python runs. A compiled
graph takes tensors as inputs, and is guarded by which of them are one: with shared laws it would be
compiled again when sites come to differ in p. So it reads a table instead, which all sites share
whatever their p is, at a row of each site's own. A change of p makes a new table: two tensors.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from functools import partial
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..base.caching import cached
from ..base.journal import Lock, surely
from ..ops import Law
from ..ops.law import law_dtype, law_numbers
from ..torch_private.modes import lasting

_shared: WeakValueDictionary[tuple[float, torch.device, torch.dtype], Law] = WeakValueDictionary()


def shared_law(p: float, device: torch.device, dtype: torch.dtype) -> Law:
    """The law of `p` for weights of that device and dtype: the same object as long as it is used."""
    law = _shared.get((p, device, dtype))
    if law is None:
        with lasting():
            law = Law.of(p, device, dtype)
        if type(law.threshold) is Tensor:  # not a fake one, of a trace
            _shared[p, device, dtype] = law
    return law


@cached
def _indices(device: torch.device) -> tuple[Tensor, ...]:
    """The numbers of the rows of a table, int64, shape (1,) each: for all tables of a device."""
    with lasting():
        return torch.arange(LawTable.SIZE, device=device).view(-1, 1).unbind()


class LawTable:
    """The laws of up to `SIZE` sites whose weights are on one device."""

    SIZE = 1024

    thresholds: Tensor
    """int32, shape (SIZE,)."""
    scales: Tensor
    """float32 or float64, shape (SIZE,)."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self._dtype = device, dtype
        self._thresholds = array("i", [0]) * self.SIZE
        self._scales = array("d" if dtype == torch.float64 else "f", [1.0]) * self.SIZE
        self._indices = _indices(device)
        self._taken = 0
        self._captured: list[Tensor] = []
        """Thresholds and scales that are written to, and never replaced: for CUDA graphs."""
        self.publish()
        if device.type != "cpu":  # now, because nothing can be made while a graph is captured
            with lasting():
                self._captured = [self.thresholds.clone(), self.scales.clone()]

    @property
    def is_full(self) -> bool:
        return self._taken == self.SIZE

    def fits(self, weight: Tensor) -> bool:
        """Whether the laws can be used with `weight`."""
        return self.device == weight.device and self._dtype == law_dtype(weight.dtype)

    def add(self, threshold: int, scale: float) -> Row:
        """A row for a new site. Nobody reads there yet, so tensors may change; call `added` then."""
        number = self._taken
        self._taken = number + 1
        self._thresholds[number] = threshold
        self._scales[number] = scale
        return Row(self, number, self._indices[number])

    def added(self) -> None:
        """Give the graphs the rows that were added. On the CPU the tensors are the arrays."""
        if self.device.type != "cpu":
            self.publish()
            self.show()

    def copies(self) -> tuple[array[int], array[float]]:
        """Thresholds and scales to write to: what a backward under way reads is left alone."""
        return self._thresholds[:], self._scales[:]

    def publish(self) -> None:
        """Give the graphs what was put."""
        self.__dict__.update(self.published(self._thresholds, self._scales))

    def show(self) -> None:
        """Let CUDA graphs that were captured see what is published."""
        for seen, values in zip(self._captured, (self.thresholds, self.scales)):
            seen.copy_(values)

    def captured(self, number: int) -> Law:
        """The law of a row as replays of a CUDA graph shall see it: as it is then."""
        thresholds, scales = self._captured
        return Law(thresholds[number], scales[number])

    def published(self, thresholds: array[int], scales: array[float]) -> dict[str, Any]:
        """The attributes of a table with these numbers."""
        with lasting():
            return {
                "_thresholds": thresholds,
                "_scales": scales,
                "thresholds": torch.frombuffer(thresholds, dtype=torch.int32).to(self.device),
                "scales": torch.frombuffer(scales, dtype=self._dtype).to(self.device),
            }


class Row:
    """Where a graph finds the law of one site."""

    def __init__(self, table: LawTable, number: int, index: Tensor) -> None:
        self.table = table
        self.number = number
        self.index = index
        """The number as a tensor, int64, shape (1,). An int would be compiled into the graph, which
        layers that are compiled one by one share."""

    def law(self) -> Law:
        """The law as part of a graph."""
        threshold, scale = (
            values.index_select(0, self.index).squeeze(0)
            for values in (self.table.thresholds, self.table.scales)
        )
        return Law(threshold, scale)


class HasLaw(Protocol):
    """What a site has to do with laws; `surgery.modules.state.SiteState` is one."""

    rate: float
    """p without the factor of a schedule."""
    factor: float
    law: Law | None
    row: Row | None

    @property
    def p(self) -> float: ...


_lock = Lock()
"""Of all tables."""
_open: dict[tuple[torch.device, torch.dtype], LawTable] = {}
"""The tables that new sites are put into."""


def give_laws(sites: Iterable[tuple[HasLaw, Tensor]]) -> None:
    """Give sites the law of their p on the device of their weight, and a row of their own in a table.

    One pass for all sites of a model, of which neighbours mostly have the same law. In a trace nothing
    is given: what is made there does not last.
    """
    _lock.holding(partial(_give_laws, sites))


def _give_laws(sites: Iterable[tuple[HasLaw, Tensor]]) -> None:
    last: tuple[float, torch.device, torch.dtype] | None = None
    table: LawTable | None = None
    touched: set[LawTable] = set()
    given: list[tuple[HasLaw, Row, Law]] = []
    for state, weight in sites:
        wanted = state.p, weight.device, weight.dtype
        if wanted != last:
            last, law = wanted, shared_law(*wanted)
            threshold, scale = law_numbers(state.p)
            key = weight.device, law_dtype(weight.dtype)
            table = None
        if type(law.threshold) is not Tensor:
            continue
        if table is None or table.is_full:
            table = _open_table(*key)
            touched.add(table)
        given.append((state, table.add(threshold, scale), law))
    for used in touched:
        used.added()
    # The row first: if an interrupt comes between, there is no law, and this is done again.
    for state, row, law in given:
        state.row = row
        state.law = law


def _open_table(device: torch.device, dtype: torch.dtype) -> LawTable:
    """One that has room."""
    table = _open.get((device, dtype))
    if table is None or table.is_full:
        table = _open[device, dtype] = LawTable(device, dtype)
    return table


def change_laws(states: Iterable[HasLaw], p: float | None, factor: float) -> None:
    """Give sites the law of `p * factor`, or None: of their own p times `factor`.

    All of them, or none if an interrupt comes: new laws are made first, and putting them in place is
    not left before it is done. One pass with little in it, since a schedule does this at every step.
    Neighbours mostly have the same law, and then get the same new one.
    """
    _lock.holding(partial(_change_laws, states, p, factor))


def _change_laws(states: Iterable[HasLaw], p: float | None, factor: float) -> None:
    runs: list[tuple[list[HasLaw], float, Law | None]] = []
    run: list[HasLaw] = []
    old: Law | None = None
    law: Law | None = None
    last: float | None = None
    table: LawTable | None = None
    written: dict[LawTable, tuple[array[int], array[float]]] = {}
    for state in states:
        rate = state.rate if p is None else p
        if state.law is not old or rate != last:
            old, last = state.law, rate
            numbers = law_numbers(rate * factor)
            if old is not None:
                law = shared_law(rate * factor, old.threshold.device, old.scale.dtype)
            run = []
            runs.append((run, rate, None if old is None else law))
        run.append(state)
        row = state.row
        if row is None:
            continue
        if row.table is not table:
            table = row.table
            if table not in written:
                written[table] = table.copies()
            thresholds, scales = written[table]
        thresholds[row.number], scales[row.number] = numbers
    news = [(table, table.published(*numbers_of)) for table, numbers_of in written.items()]

    def put() -> None:
        for table, new in news:
            table.__dict__.update(new)
            table.show()
        for run, rate, law in runs:
            for state in run:
                state.rate, state.factor, state.law = rate, factor, law

    try:
        put()
    except BaseException:
        surely(put)
        raise
