"""The birth of masks by element, which all rows of an example share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import Law
from ..ops.grams import weighted_gram
from .birth import Birth, of_examples
from .numbers import Numbers
from .state import State

Linear = Callable[[Tensor, Tensor], Tensor]
"""`product(x, weight)`: linear in both, row by row of x."""


class OfWeights(Birth):
    """One number for each mask entry of a weight, shared by all rows of an example.

    What draws add has what comes in, too: `(x + dx) M - x W`, where M is the masked weight of a draw,
    W its expectation, and dx the deviation of the input. So an earlier layer scales what this one
    draws.
    """

    def __init__(
        self,
        variance: Tensor,
        state: State,
        weight: Tensor,
        moving: Tensor,
        law: Law,
        deviation: Tensor,
        product: Linear,
        matrix: bool,
        features: int,
        shared: Numbers | None = None,
    ) -> None:
        """
        Args:
            state: of the input.
            weight: the expectation of the masked weight.
            moving: what a mask entry multiplies, W - A; `weight` itself where that is all of it.
            law: the drop probability.
            deviation: the standard deviation of each entry of the masked weight, signed as `moving`.
            product: what combines input and weight to the value.
            matrix: whether that is `x @ weight.T`.
            features: the dimension of the features in x, counted from the end.
        """
        super().__init__(variance, shared)
        assert shared is None or matrix
        self.state, self.x = state, state.at
        self.weight, self.moving, self.law, self.deviation = weight, moving, law, deviation
        self.product, self.matrix, self.features = product, matrix, features
        self._numbers: Numbers | None = None

    def latents(self, rows: int) -> int | None:
        return None

    def drawn(self, count: int, numbers: Numbers) -> Tensor:
        self._numbers, x = numbers, self.x
        middle = self.product(x, self.weight.to(x.dtype))
        fixed = None if self.moving is self.weight else (self.weight - self.moving).to(x.dtype)

        def whole(masked: Tensor) -> Tensor:
            return masked.to(x.dtype) if fixed is None else masked.to(x.dtype) + fixed

        if self.shared is not None and self.matrix:
            masked = numbers.all_masked(self.moving, self.law, count)
            if masked is not None:
                inputs = torch.stack([self.state.draw(draw).to(x.dtype) for draw in range(count)])
                return torch.einsum("k...i,koi->k...o", inputs, whole(masked)).sub_(middle)
        found = torch.empty(count, *middle.shape, dtype=middle.dtype, device=middle.device)
        for draw, own in enumerate(numbers.masked(self.moving, self.law, count)):
            one = self.state.draw(draw).to(x.dtype)
            torch.sub(self.product(one, whole(own)), middle, out=found[draw])
        return found

    def varied(self) -> Tensor | None:
        """A draw of what varies of the input: that of each feature has signs of its own, since
        different mask entries multiply different features. It tells how rows covary: E[x_s x_t] is
        what masks multiply."""
        x, columns = self.x, self.state.factors
        if columns is None or self._numbers is None:
            return None
        shape = [1] * x.ndim
        shape[self.features] = x.shape[self.features]
        signs = self._numbers.signs((len(columns), *shape), x)
        return (columns.to(x.dtype) * signs).sum(0)

    def gram(self, by: Sequence[Tensor], rows: int, others: Sequence[Any] = ()) -> Tensor:
        births: list[OfWeights] = [self, *others]
        if not others and self.matrix and math.prod(self.x.shape[:-1]) == rows:
            return super().gram(by, rows)  # an example has one row: its outputs are independent
        found = self._gram(by, [one.x for one in births], rows)
        varied = [one.varied() for one in births]
        if all(one is None for one in varied):
            return found
        inputs = [torch.zeros_like(b.x) if one is None else one for b, one in zip(births, varied)]
        return found + self._gram(by, inputs, rows)

    def effects(self, by: Tensor, rows: int) -> Tensor:
        return of_examples(by * self.variance.sqrt(), rows).flatten(2)

    def _gram(self, by: Sequence[Tensor], inputs: Sequence[Tensor], rows: int) -> Tensor:
        if self.matrix:  # uses of one mask are like rows of one example
            x = _joined([of_examples(one.unsqueeze(0), rows).flatten(2, -2) for one in inputs])[0]
            own = _joined([of_examples(one, rows).flatten(2, -2) for one in by])
            return weighted_gram(own, x, self.deviation.square())
        grams = [
            self._of_example(of_examples(by[0], rows)[:, row], x)
            for row, x in enumerate(of_examples(inputs[0].unsqueeze(0), rows)[0])
        ]
        return torch.stack(grams)

    def _of_example(self, by: Tensor, x: Tensor) -> Tensor:
        """(outputs, outputs). `by`: (outputs, rows, ...); `x`: (rows, ...)."""
        pull: Any = torch.func.vjp(lambda weight: self.product(x, weight), self.deviation)[1]
        (of_weight,) = torch.vmap(pull)(by)
        effects: Tensor = (of_weight * self.deviation).flatten(1)
        return effects @ effects.t()


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
