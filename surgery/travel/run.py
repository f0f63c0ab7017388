"""One forward in which values travel: what it is asked for, and what it has found."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from ..base.journal import Result, restoring
from .birth import Birth, Diagonal, OfDraws
from .numbers import LIMIT, Numbers
from .state import State, apart, carried_by, record

Carrier = Literal["none", "exact", "draws"]
"""How a forward carries covariances:

* `"none"`: it does not; entries of one value, and different values, are taken as independent;
* `"exact"`: every random number that is met becomes a column of the factors;
* `"draws"`: a column is one of some draws of everything that is random, less the mean. Functions are
  evaluated at them, so that they know what is common to the entries of a value, to all orders; means
  come from the formulas of `"none"`, and variances too, times a factor of draws.
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
        """How many there are: draws from the beginning, else so far."""
        self.records = records
        """Whether means get a graph, and births are kept, for backward passes."""
        self.dropout = dropout
        """Whether dropouts of the model drop."""
        self.births: list[Birth] = []
        self.settled: list[str] = []
        """Where a value became its mean, and what did that."""
        modules = [] if model is None else model.named_modules()
        self._names = {id(module): name for name, module in modules}
        self._births = 0

    @property
    def follows(self) -> bool:
        """Whether it follows how values covary: else births are no more than their variance."""
        return self.carrier != "none" or self.records

    def draws(self, state: State) -> Tensor | None:
        """The columns of a state, if they are draws."""
        return state.factors if self.carrier == "draws" else None

    def numbers(self) -> Numbers:
        """Random numbers of their own, the same in every run."""
        self._births += 1
        return Numbers(self._births)

    def born(self, state: State, birth: Birth) -> State:
        """The state with randomness added that is independent of all before."""
        mean = self._recorded(state.mean, birth)
        with apart():
            variance = state.variance + birth.variance
            factors = state.factors
            if self.carrier == "draws":
                drawn = birth.drawn(self.columns, birth.shared or self.numbers())
                new = drawn.mul_(1 / math.sqrt(self.columns)).to(mean.dtype)
                factors = new if factors is None else new.add_(factors)
            elif self.carrier == "exact":
                factors = self._extended(factors, birth, mean)
        return State(mean, variance, factors, swing=state.swing)

    def _recorded(self, mean: Tensor, birth: Birth) -> Tensor:
        """The mean; where the run records, as that by which outputs are differentiated."""
        if not self.records:
            return mean
        self.births.append(birth)
        return birth.added_to(mean)

    def born_apart(self, state: State, variance: Tensor) -> State:
        """The same for randomness that is independent between entries."""
        return self.born(state, Diagonal(variance))

    def after(
        self,
        mean: Tensor,
        moved: Tensor,
        new: Tensor,
        linear: Callable[[], Tensor | None],
        columns: Callable[[], Tensor | None],
        mixes: bool = False,
    ) -> State:
        """The state of a function of values.

        Args:
            mean: the expectation, with its graph.
            moved, new: the variance: that of the linear part, and what is left.
            linear: makes the columns of the linear part.
            columns: makes those of draws; see `of_draws`.
            mixes: whether entries are sums of many others, as `mixed` has it.
        """
        if not self.follows:
            return State(mean, moved + new)
        if self.carrier != "draws":
            with apart():
                state = State(mean, moved, linear())
            return self.born_apart(self.mixed(state) if mixes else state, new)
        with apart():
            found, variance = columns(), moved + new
        if found is not None and self.records:
            with apart():
                along = linear()
                rest = found if along is None else found - along
            mean = self._recorded(mean, OfDraws(new, rest))
        state = State(mean, variance, found)
        return self.mixed(state) if mixes else state

    def mixed(self, state: State) -> State:
        """A state whose entries are sums of many others. Its variance was computed as if these were
        independent; draws tell by how much that is off: for all features of a row together, and, as
        far as there are draws enough, for each entry."""
        factors = state.factors
        if factors is None:
            return state
        with apart():
            carried = carried_by(factors, state.variance.dtype)
            if self.carrier == "exact" or carried.ndim < 2:  # a row of one entry
                return State(state.mean, carried, factors)
            dims = (-1,) if carried.ndim <= 3 else tuple(range(1, carried.ndim))
            alone = state.variance.sum(dims, keepdim=True)
            ratio = carried.sum(dims, keepdim=True) / alone.clamp_min(torch.finfo(alone.dtype).tiny)
            rule = state.variance * ratio
            variance = torch.lerp(rule, carried, weight_of_draws(rule, carried, len(factors)))
            return State(state.mean, variance, factors)

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


def weight_of_draws(rule: Tensor, carried: Tensor, count: int) -> Tensor:
    """How much the variances of draws count beside those of a rule, from 0 to 1, for each example.

    Draws have a relative error of sqrt(2 / count). What the two differ by beyond that is the
    error of the rule: so each gets the weight that makes the error of both together least, as in
    empirical Bayes.
    """
    noise = 2 / count
    dims = tuple(range(1, rule.ndim))
    wrong, size = ((t.square().sum(dims, keepdim=True)) for t in (carried - rule, rule))
    off = (wrong / size.clamp_min(_TINY) - noise).clamp_min(0)
    return off / (off + noise)


_TINY = torch.finfo(torch.float32).tiny


def within(run: Run, call: Callable[[], Result]) -> Result:
    """What `call` returns; meanwhile it is the run of this thread. No context of a generator, which a
    traceback may hold, and which would end the next run when that is let go of."""

    def called() -> Result:
        _current.run = run
        record(run.records)
        return call()

    return restoring(_leave, called)


def _leave() -> None:
    record(False)
    _current.run = None
