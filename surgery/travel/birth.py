"""Where randomness begins: how much there is, and how the entries of a value share it.

A birth adds to a value. It says how much variance it adds, and gives what it adds in columns:
exact ones, one for each independent random number, or a sketch of all. `gram` gives the covariance
that it causes in the outputs, from their derivatives by what was added.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.grams import weighted_gram

Signs = Callable[[tuple[int, ...], Tensor], Tensor]
Linear = Callable[[Tensor, Tensor], Tensor]
"""`product(x, weight)`: linear in both, row by row of x."""


class Birth:
    """Randomness that is added to a value, independent of all before."""

    variance: Tensor
    """Of each entry of the value."""

    def __init__(self, variance: Tensor) -> None:
        self.variance = variance
        self.delta: Tensor | None = None
        """The mean of the value that it was added to."""

    def added_to(self, mean: Tensor) -> Tensor:
        """The mean as the tensor by which outputs are differentiated."""
        own = mean.view_as(mean) if mean.requires_grad else mean.detach().requires_grad_()
        self.delta = own
        return own

    def latents(self, rows: int) -> int | None:
        """How many independent numbers each example has; None if they are not given one by one."""
        raise NotImplementedError

    def exact(self, rows: int) -> Tensor:
        """(latents, *shape): what each of them adds. Examples use the same columns: they do not
        meet."""
        raise NotImplementedError

    def sketched(self, columns: int, signs: Signs) -> Tensor:
        """(columns, *shape): what random signs in the place of the latents add, over the root of the
        number of columns."""
        raise NotImplementedError

    def gram(self, by: Tensor, rows: int) -> Tensor:
        """(rows, outputs, outputs): the covariance of the outputs that comes from here.

        Args:
            by: (outputs, *shape): derivatives of each output by what is added.
        """
        raise NotImplementedError


class Diagonal(Birth):
    """Every entry has a number of its own."""

    def latents(self, rows: int) -> int | None:
        shape = self.variance.shape
        return math.prod(shape[1:]) if shape and shape[0] == rows else None

    def exact(self, rows: int) -> Tensor:
        shape = self.variance.shape
        width = math.prod(shape[1:])  # which may be 0
        flat = self.variance.sqrt().reshape(rows, width)
        return torch.diag_embed(flat).transpose(0, 1).reshape(width, *shape)

    def sketched(self, columns: int, signs: Signs) -> Tensor:
        root = (self.variance / columns).sqrt()
        return root * signs((columns, *root.shape), root)

    def gram(self, by: Tensor, rows: int) -> Tensor:
        return _gram(_rows_of(by * self.variance.sqrt(), rows))


class OfOutputs(Birth):
    """One number for each index of some dimensions, and shared by all other entries of an example:
    where one mask entry multiplies a whole channel, or the whole value."""

    def __init__(self, effect: Tensor, own: tuple[int, ...]) -> None:
        """
        Args:
            effect: what the number adds, signed; the shape of the value.
            own: dimensions along which there are several numbers, counted from the end.
        """
        super().__init__(effect.square())
        self.effect, self.own = effect, own

    def _sizes(self) -> list[int]:
        return [self.effect.shape[dim] for dim in self.own]

    def _view(self) -> tuple[int, ...]:
        """The shape in which numbers broadcast to the value."""
        own = {dim % self.effect.ndim for dim in self.own}
        return tuple(size if dim in own else 1 for dim, size in enumerate(self.effect.shape))

    def latents(self, rows: int) -> int | None:
        return math.prod(self._sizes())

    def exact(self, rows: int) -> Tensor:
        count = math.prod(self._sizes())
        eye = torch.eye(count, dtype=self.effect.dtype, device=self.effect.device)
        return eye.view(count, *self._view()) * self.effect

    def sketched(self, columns: int, signs: Signs) -> Tensor:
        drawn = signs((columns, *self._view()), self.effect)
        return drawn * self.effect / math.sqrt(columns)

    def gram(self, by: Tensor, rows: int) -> Tensor:
        effects = by * self.effect
        split = effects.reshape(len(by), rows, -1, *self.effect.shape[1:])
        own = {dim % self.effect.ndim for dim in self.own}
        shared = [2 + dim for dim in range(1, self.effect.ndim) if dim not in own]
        summed = split.sum([2, *shared])
        return _gram(summed.reshape(len(by), rows, -1))


class OfInputs(Birth):
    """One number for each feature of the input of a matrix product."""

    def __init__(self, variance: Tensor, x: Tensor, weight: Tensor, shares_rows: bool) -> None:
        """
        Args:
            x: (rows, ..., in): the root of the expected square of each input, signed.
            weight: (out, in): what a number multiplies, times its standard deviation.
            shares_rows: whether all rows of an example have the same numbers.
        """
        super().__init__(variance)
        self.x, self.weight, self.shares_rows = x, weight, shares_rows

    def latents(self, rows: int) -> int | None:
        alone = self.shares_rows or self.x[..., 0].numel() == rows
        return self.x.shape[-1] if alone else None

    def exact(self, rows: int) -> Tensor:
        columns = self.x.unsqueeze(-1) * self.weight.t()  # (rows, ..., in, out)
        return columns.movedim(-2, 0)

    def sketched(self, columns: int, signs: Signs) -> Tensor:
        leading = [1 if self.shares_rows else size for size in self.x.shape[:-1]]
        view = (columns, *leading, self.x.shape[-1])
        return (self.x * signs(view, self.x) / math.sqrt(columns)) @ self.weight.t()

    def gram(self, by: Tensor, rows: int) -> Tensor:
        effects = (by @ self.weight) * self.x
        apart = effects.reshape(len(by), rows, -1, self.x.shape[-1])
        return _gram(apart.sum(2) if self.shares_rows else apart.flatten(2))


class OfWeights(Birth):
    """One number for each mask entry of a weight, shared by all rows of an example."""

    def __init__(
        self,
        variance: Tensor,
        x: Tensor,
        columns: Tensor | None,
        weight: Tensor,
        product: Linear,
        matrix: bool,
        features: int,
    ) -> None:
        """
        Args:
            x: the mean of each input; without columns the root of its expected square, signed.
            columns: of the input. They tell how its rows covary: E[x_s x_t] is what masks multiply.
            weight: what a mask entry multiplies, times its standard deviation.
            product: what combines them to the value.
            matrix: whether that is `x @ weight.T`.
            features: the dimension of the features in x, counted from the end.
        """
        super().__init__(variance)
        self.x, self.columns, self.weight = x, columns, weight
        self.product, self.matrix, self.features = product, matrix, features
        self.drawn: Tensor | None = None
        """A draw of what varies of the input: that of each feature has signs of its own, since
        different mask entries multiply different features."""

    def latents(self, rows: int) -> int | None:
        return None

    def sketched(self, columns: int, signs: Signs) -> Tensor:
        scale, found = 1 / math.sqrt(columns), []
        if self.columns is not None:
            self.drawn = (self.columns * self._signs(len(self.columns), signs)).sum(0)
        for column in range(columns):
            x = self.x
            if self.columns is not None:
                x = x + self.columns[column] * self._signs(1, signs)[0] * math.sqrt(columns)
            weight = self.weight * signs(tuple(self.weight.shape), self.weight)
            found.append(self.product(x, weight))
        return torch.stack(found) * scale

    def _signs(self, count: int, signs: Signs) -> Tensor:
        """One for each column and feature."""
        shape = [1] * self.x.ndim
        shape[self.features] = self.x.shape[self.features]
        return signs((count, *shape), self.x)

    def gram(self, by: Tensor, rows: int) -> Tensor:
        found = self._gram(by, self.x, rows)
        return found if self.drawn is None else found + self._gram(by, self.drawn, rows)

    def _gram(self, by: Tensor, inputs: Tensor, rows: int) -> Tensor:
        if self.matrix:
            each = math.prod(inputs.shape[:-1]) // max(1, rows)
            x = inputs.reshape(rows, each, inputs.shape[-1])
            by = by.reshape(len(by), rows, each, by.shape[-1])
            return weighted_gram(by, x, self.weight.square())
        grams = [
            self._of_example(by.unflatten(1, (rows, -1))[:, row], x)
            for row, x in enumerate(inputs.unflatten(0, (rows, -1)))
        ]
        return torch.stack(grams)

    def _of_example(self, by: Tensor, x: Tensor) -> Tensor:
        """(outputs, outputs). `by`: (outputs, rows, ...); `x`: (rows, ...)."""
        pull: Any = torch.func.vjp(lambda weight: self.product(x, weight), self.weight)[1]
        (of_weight,) = torch.vmap(pull)(by)
        effects: Tensor = (of_weight * self.weight).reshape(len(by), -1)
        return effects @ effects.t()


def _rows_of(values: Tensor, rows: int) -> Tensor:
    """(outputs, rows, rest)."""
    return values.reshape(len(values), rows, -1)


def _gram(effects: Tensor) -> Tensor:
    """(rows, outputs, outputs) of effects (outputs, rows, numbers)."""
    by_row = effects.transpose(0, 1)
    return by_row @ by_row.transpose(1, 2)


def root(square: Tensor, sign_of: Tensor) -> Tensor:
    """The root of expected squares, with the sign of the mean."""
    return torch.where(sign_of < 0, -1.0, 1.0).to(square.dtype) * square.sqrt()
