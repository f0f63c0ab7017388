"""The law of each site: one shared by sites of equal p, and a row in a table for compiled graphs.

What a change of p costs is the tensors that it makes. In eager code sites of equal p share one law. A
compiled graph must not: dynamo guards which of its inputs are the same tensor, and would compile it
again when two sites come to differ in p. So a graph reads its laws from a table that all sites of a
device share, each at a row of its own, and a change of p makes two tensors for each table. (Tensors of
its own for each site would need no table, but a schedule, which changes p at every step, would then
take several times as long.)
"""

from __future__ import annotations

import itertools
import weakref
from array import array
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..base.caching import cached
from ..base.journal import Lock, restoring
from ..ops import Law
from ..ops.law import law_dtype, law_numbers
from ..torch_private.modes import lasting
from ..torch_private.tracing import is_capturing, is_graphed

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


class Published:
    """What compiled graphs read of all tables: an attribute for each, `(thresholds, scales)`.

    If each site led to its table by a reference of its own, then dynamo would guard, for each, that all
    of them are one object, at several times the cost of any other guard.
    """


_published = Published()
_numbers = itertools.count()


class Values(NamedTuple):
    """The numbers of a table."""

    thresholds: array[int]
    scales: array[float]
    tensors: tuple[Tensor, Tensor]
    """The same: int32, and float32 or float64, shape (SIZE,) each."""


class LawTable:
    """The laws of up to `SIZE` sites whose weights are on one device."""

    SIZE = 1024

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self._dtype = device, dtype
        self.name = f"table{next(_numbers)}"
        weakref.finalize(self, vars(_published).pop, self.name, None)
        self._thresholds = array("i", [0]) * self.SIZE
        self._scales = array("d" if dtype == torch.float64 else "f", [1.0]) * self.SIZE
        self._indices = _indices(device)
        self.taken = 0
        """How many rows have a site."""
        self._captured: list[Tensor] = []
        """Thresholds and scales for CUDA graphs, which read from fixed addresses: they are written to,
        and never replaced."""
        self.publish()
        if device.type != "cpu":  # now, because no tensor can be made while a graph is captured
            with lasting():
                self._captured = [self.thresholds.clone(), self.scales.clone()]

    @property
    def thresholds(self) -> Tensor:
        """int32, shape (SIZE,)."""
        found: Tensor = getattr(_published, self.name)[0]
        return found

    @property
    def scales(self) -> Tensor:
        """float32 or float64, shape (SIZE,)."""
        found: Tensor = getattr(_published, self.name)[1]
        return found

    def fits(self, weight: Tensor) -> bool:
        """Whether the laws can be used with `weight`."""
        return self.device == weight.device and self._dtype == law_dtype(weight.dtype)

    def add(self, threshold: int, scale: float) -> Row:
        """A row for a new site. Call `added` after the last one: no graph reads a new row yet, so that
        tensors which graphs read may change."""
        number = self.taken
        self.taken = number + 1
        self._thresholds[number] = threshold
        self._scales[number] = scale
        return Row(self, number, self._indices[number])

    def added(self) -> None:
        """Let graphs read the rows that were added. On the CPU the tensors see the arrays anyway."""
        if self.device.type != "cpu":
            self.publish()
            self.show()

    def copies(self) -> tuple[array[int], array[float]]:
        """Thresholds and scales to write to. A backward under way still reads the old ones."""
        return self._thresholds[:], self._scales[:]

    def publish(self) -> None:
        """Let graphs read what the arrays say."""
        self.put(self.published(self._thresholds, self._scales))

    def put(self, values: Values) -> None:
        """Let graphs read these."""
        self._thresholds, self._scales, tensors = values
        setattr(_published, self.name, tensors)

    def show(self) -> None:
        """Let captured CUDA graphs read what is published."""
        for seen, values in zip(self._captured, (self.thresholds, self.scales)):
            seen.copy_(values)

    def captured(self, number: int) -> Law:
        """The law of a row for a CUDA graph: each replay reads the p of that time."""
        thresholds, scales = self._captured
        return Law(thresholds[number], scales[number])

    def published(self, thresholds: array[int], scales: array[float]) -> Values:
        """These numbers as a table has them."""
        with lasting():
            tensors = (
                torch.frombuffer(thresholds, dtype=torch.int32).to(self.device),
                torch.frombuffer(scales, dtype=self._dtype).to(self.device),
            )
        return Values(thresholds, scales, tensors)


def published(name: str) -> tuple[Tensor, Tensor]:
    """Thresholds and scales of a table, for the graph that is being traced."""
    tensors: tuple[Tensor, Tensor] = getattr(_published, name)
    return tensors


class Row:
    """Where a graph reads the law of one site."""

    def __init__(self, table: LawTable, number: int, index: Tensor) -> None:
        self.table = table
        self.name = table.name
        self.number = number
        self.index = index
        """The number as a tensor, int64, shape (1,). An int would be compiled into the graph, which
        layers that are compiled one by one share."""

    def law(self) -> Law:
        """The law, read in the graph that is being traced: its tensors are 0-d."""
        thresholds, scales = published(self.name)
        threshold = thresholds.index_select(0, self.index).squeeze(0)
        return Law(threshold, scales.index_select(0, self.index).squeeze(0))


class HasLaw:
    """What a site has to do with laws: what `SiteState` has from here."""

    site: str
    rate: float
    """p without the factor of a schedule."""
    factor: float
    law: Law | None
    """The law of `p`, which sites of equal p share; None until there is a device for it."""
    row: Row | None
    """Where compiled graphs read the law."""

    @property
    def p(self) -> float:
        """The drop probability now."""
        return self.rate * self.factor

    def law_for(self, raw: Tensor, keep: bool = True) -> Law:
        """The law for a weight as it is now: made again when the weight has another device or dtype.

        Args:
            raw: the stored parameter.
            keep: whether a law that is made may be kept. False in a replica, whose state is that of the
                original.

        Raises:
            RuntimeError: it has to be made, and a CUDA graph is being captured.
        """
        if is_graphed():
            return self._law_in_trace(raw, keep)
        return self.law_now(raw, keep)

    def law_now(self, raw: Tensor, keep: bool = True) -> Law:
        """`law_for` in code that nothing traces."""
        law = self.law
        if raw.is_cuda and is_capturing():
            return self._law_in_capture(raw)
        if law is None or not law.fits(raw):
            law = shared_law(self.p, raw.device, raw.dtype)
            if keep:
                give_laws([(self, raw)])
        return law

    def _law_in_capture(self, raw: Tensor) -> Law:
        """The law in memory that `set_p` writes to."""
        if self.row is None or not self.row.table.fits(raw):
            raise RuntimeError(
                f"{self.site}: nothing can be made while a CUDA graph is captured. Run the model once "
                "before, on the device and in the mode of the capture"
            )
        return self.row.table.captured(self.row.number)

    def _law_in_trace(self, raw: Tensor, keep: bool) -> Law:
        if not torch.compiler.is_dynamo_compiling():
            return Law.of(self.p, raw.device, raw.dtype)  # constants of the graph
        row = self.row
        if row is not None:
            _, scales = published(row.name)
            if scales.device == raw.device and scales.dtype == law_dtype(raw.dtype):
                return row.law()
        law = self.law
        if law is None or not law.fits(raw):  # the weight was moved by hand
            law = Law.of(self.p, raw.device, raw.dtype)
            if keep:
                self.law = law
        return law


_lock = Lock()
"""Of all tables."""
_open: dict[tuple[torch.device, torch.dtype], LawTable] = {}
"""The tables that new sites are put into."""


def give_laws(sites: Iterable[tuple[HasLaw, Tensor]]) -> None:
    """Give sites the law of their p on the device of their weight, and a row of their own in a table.

    One pass for all sites of a model; neighbours mostly have the same law. In a trace nothing is given,
    because tensors that are made there do not outlive it.
    """
    _lock.holding(partial(_give_laws, sites))


def _give_laws(sites: Iterable[tuple[HasLaw, Tensor]]) -> None:
    last: tuple[float, torch.device, torch.dtype] | None = None
    touched: set[LawTable] = set()
    given: list[tuple[HasLaw, Row, Law]] = []
    for state, weight in sites:
        wanted = state.p, weight.device, weight.dtype
        if wanted != last:
            last, law = wanted, shared_law(*wanted)
            numbers = law_numbers(state.p)
        if type(law.threshold) is not Tensor:
            continue
        table = _open_table(weight.device, law.scale.dtype)
        touched.add(table)
        given.append((state, table.add(*numbers), law))
    for used in touched:
        used.added()
    # The row first: if an interrupt comes between, there is no law, and this is done again.
    for state, row, law in given:
        state.row = row
        state.law = law


def _open_table(device: torch.device, dtype: torch.dtype) -> LawTable:
    """The table of a device with room for another row; a new one if that is full."""
    table = _open.get((device, dtype))
    if table is None or table.taken == table.SIZE:
        table = _open[device, dtype] = LawTable(device, dtype)
    return table


def change_laws(states: Iterable[HasLaw], p: float | None, factor: float) -> None:
    """Give sites the law of `p * factor`, or None: of their own p times `factor`.

    All sites, or none if an interrupt comes: new laws are made first, and once the first site has its
    new law, the others get theirs before the interrupt goes on. A schedule does this at every step, so
    sites are grouped in runs of neighbours with the same law: each run gets one new law.
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
            table.put(new)
            table.show()
        for run, rate, law in runs:
            for state in run:
                state.rate, state.factor, state.law = rate, factor, law

    restoring(put, lambda: None)
