"""One forward in which values travel: what it is asked for, and what it has found."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from .birth import LIMIT, Birth, Diagonal, Shared, drawn_signs
from .state import State, apart, record

Carrier = Literal["none", "exact", "sketch"]
"""How a forward carries covariances:

* `"none"`: it does not; entries of one value, and different values, are taken as independent;
* `"exact"`: every random number that is met becomes a column of the factors;
* `"sketch"`: random signs spread all of them over a fixed number of columns. Products of columns
have the
  right expectation; a relative error of sqrt(2 / columns) is averaged over the entries of a value.
"""


class TooWide(Exception):
    """The exact factors of a value would take too much memory, or there are none."""


class Run:
    """What rules need to know beside the values."""

    def __init__(
        self,
        model: nn.Module | None = None,
        rows: int = 0,
        carrier: Carrier = "none",
        columns: int = 0,
        records: bool = False,
        dropout: bool = False,
    ) -> None:
        self.rows = rows
        """Examples of the batch."""
        self.carrier = carrier
        self.columns = columns
        """How many there are: of a sketch from the beginning, else so far."""
        self.records = records
        """Whether means get a graph, and births are kept, for backward passes."""
        self.dropout = dropout
        """Whether dropouts of the model drop."""
        self.births: list[Birth] = []
        self.settled: list[str] = []
        """Where a value became its mean, and what did that."""
        modules = [] if model is None else model.named_modules()
        self._names = {id(module): name for name, module in modules}
        self._generators: dict[torch.device, torch.Generator] = {}
        self._masks = 0

    @property
    def follows(self) -> bool:
        """Whether it follows how values covary: else births are no more than their variance."""
        return self.carrier != "none" or self.records

    def signs(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Random signs from a generator of the run, the same in every run."""
        device = like.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(0)
        return drawn_signs(shape, like, self._generators[device])

    def shared(self) -> Shared:
        """The random numbers of a mask that several products will use."""
        self._masks += 1
        return Shared(self._masks)

    def born(self, state: State, birth: Birth) -> State:
        """The state with randomness added that is independent of all before."""
        mean = state.mean
        if self.records:
            mean = birth.added_to(mean)
            self.births.append(birth)
        with apart():
            variance = state.variance + birth.variance
            factors = state.factors
            if self.carrier == "sketch":
                signs = self.signs if birth.shared is None else birth.shared.signs(0)
                new = birth.sketched(self.columns, signs).to(mean.dtype)
                factors = new if factors is None else factors + new
            elif self.carrier == "exact":
                factors = self._extended(factors, birth, mean)
        return State(mean, variance, factors, swing=state.swing)

    def born_apart(self, state: State, variance: Tensor) -> State:
        """The same for randomness that is independent between entries."""
        return self.born(state, Diagonal(variance))

    def mixed(self, state: State) -> State:
        """A state whose entries are sums of many others. Its variance was computed as if these were
        independent; a sketch tells by how much the sum is off, for all features of a row together."""
        factors = state.factors
        if factors is None:
            return state
        with apart():
            carried = factors.to(state.variance.dtype).square().sum(0)
            if self.carrier == "exact":
                return State(state.mean, carried, factors)
            dims = (-1,) if carried.ndim <= 3 else tuple(range(1, carried.ndim))
            alone = state.variance.sum(dims, keepdim=True)
            ratio = carried.sum(dims, keepdim=True) / alone.clamp_min(torch.finfo(alone.dtype).tiny)
            return State(state.mean, state.variance * ratio, factors)

    def _extended(self, factors: Tensor | None, birth: Birth, mean: Tensor) -> Tensor:
        """The factors with columns of their own for what is born."""
        count = birth.latents(self.rows) if birth.shared is None else None
        if count is None or (self.columns + count) * mean.numel() > LIMIT:
            raise TooWide
        old = mean.new_zeros(self.columns, *mean.shape)
        if factors is not None:
            old[: len(factors)] = factors
        self.columns += count
        return torch.cat([old, birth.exact(self.rows).to(mean.dtype)])

    def settles(self, function: str) -> None:
        """Note that a value is replaced by its mean."""
        if self is ALONE:
            return
        where = f"{self._module()}: {function}"
        if where not in self.settled:
            self.settled.append(where)

    def _module(self) -> str:
        """The name of the innermost module whose forward is running."""
        frame = sys._getframe(2)
        above = frame.f_back
        while above is not None:
            own = above.f_locals.get("self")
            if isinstance(own, nn.Module) and id(own) in self._names:
                return self._names[id(own)] or type(own).__name__
            above = above.f_back
        return "?"


ALONE = Run()
"""That of forwards which nobody has asked for more than the mean: of `inference="moments"`."""


class _Current(threading.local):
    run: Run | None = None


_current = _Current()


def running() -> Run | None:
    """The run of this thread; None outside of one."""
    return _current.run


@contextmanager
def current(run: Run) -> Iterator[None]:
    """Inside, it is the run of this thread."""
    try:
        _current.run = run
        record(run.records)
        yield
    finally:
        record(False)
        _current.run = None
