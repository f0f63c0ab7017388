"""Where randomness begins: how much there is, and how the entries of a value share it.

A birth adds to a value. It says how much variance it adds, and gives what it adds in columns:
exact ones, one for each independent random number, or of draws. `gram` gives the covariance
that births of the same numbers cause in the outputs, from their derivatives by what was added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .numbers import Numbers
from .state import State


class Birth:
    """Randomness that is added to a value, independent of all before, but of births with the same
    `shared` numbers."""

    variance: Tensor
    """Of each entry of the value."""

    def __init__(self, variance: Tensor, shared: Numbers | None = None) -> None:
        self.variance, self.shared = variance, shared
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

    def drawn(self, count: int, numbers: Numbers) -> Tensor:
        """(count, *shape): what draws add."""
        raise NotImplementedError

    def gram(self, by: Sequence[Tensor], rows: int, others: Sequence[Any] = ()) -> Tensor:
        """(rows, outputs, outputs): the covariance of the outputs that comes from here.

        Args:
            by: (outputs, *shape): derivatives of each output by what is added, here and by each other.
            others: births with the same numbers.
        """
        effects = self.effects(by[0], rows)
        for other, own in zip(others, by[1:]):
            effects = effects + other.effects(own, rows)
        by_row = effects.transpose(0, 1)
        return by_row @ by_row.transpose(1, 2)

    def effects(self, by: Tensor, rows: int) -> Tensor:
        """(outputs, rows, numbers): what numbers of variance 1 do to the outputs of each example."""
        raise NotImplementedError


class Diagonal(Birth):
    """Every entry has a number of its own."""

    def __init__(
        self, variance: Tensor, draws: Callable[[int, Numbers], Tensor] | None = None
    ) -> None:
        """
        Args:
            draws: what draws add, where it is not normal.
        """
        super().__init__(variance)
        self._draws = draws

    def latents(self, rows: int) -> int | None:
        shape = self.variance.shape
        return math.prod(shape[1:]) if shape and shape[0] == rows else None

    def exact(self, rows: int) -> Tensor:
        shape = self.variance.shape
        width = math.prod(shape[1:])  # which may be 0
        flat = self.variance.sqrt().reshape(rows, width)
        return torch.diag_embed(flat).transpose(0, 1).reshape(width, *shape)

    def drawn(self, count: int, numbers: Numbers) -> Tensor:
        if self._draws is not None:
            return self._draws(count, numbers)
        deviation = self.variance.sqrt()
        return deviation * numbers.normal((count, *deviation.shape), deviation)

    def effects(self, by: Tensor, rows: int) -> Tensor:
        return of_examples(by * self.variance.sqrt(), rows).flatten(2)


class OfDraws(Birth):
    """What is left of a function beside its slope, as draws know it: to all orders, and with what is
    common to the entries of a value."""

    def __init__(self, variance: Tensor, columns: Tensor) -> None:
        """
        Args:
            columns: (columns, *shape): of draws, over the root of their number.
        """
        super().__init__(variance)
        self.columns = columns

    def effects(self, by: Tensor, rows: int) -> Tensor:
        own, columns = (of_examples(t, rows).flatten(2) for t in (by, self.columns))
        return torch.einsum("obe,kbe->obk", own, columns.to(own.dtype))


class OfOutputs(Birth):
    """One number for each index of some dimensions, and shared by all other entries of an example:
    where one mask entry multiplies a whole channel, or the whole value."""

    def __init__(
        self,
        effect: Tensor,
        own: tuple[int, ...],
        ratio: Tensor | float,
        shared: Numbers | None = None,
        columns: Tensor | None = None,
    ) -> None:
        """
        Args:
            effect: what the number adds, signed; the shape of the value.
            own: dimensions along which there are several numbers, counted from the end.
            ratio: p / (1 - p) of the mask.
            columns: of the effect, if it varies.
        """
        super().__init__(effect.square(), shared)
        self.effect, self.own, self.ratio, self.columns = effect, own, ratio, columns

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

    def drawn(self, count: int, numbers: Numbers) -> Tensor:
        masks = numbers.masks((count, *self._view()), self.ratio, self.effect)
        if self.columns is None:
            return masks * self.effect
        return masks * torch.add(self.effect, self.columns, alpha=math.sqrt(count))

    def effects(self, by: Tensor, rows: int) -> Tensor:
        effects = by * self.effect
        split = of_examples(effects, rows)
        own = {dim % self.effect.ndim for dim in self.own}
        shared = [2 + dim for dim in range(1, self.effect.ndim) if dim not in own]
        return split.sum([2, *shared], keepdim=True).flatten(2)


class OfInputs(Birth):
    """One number for each feature of the input of a matrix product."""

    def __init__(
        self,
        variance: Tensor,
        state: State,
        weight: Tensor,
        shares_rows: bool,
        ratio: Tensor,
        shared: Numbers | None = None,
    ) -> None:
        """
        Args:
            state: of the input, (rows, ..., in).
            weight: (out, in): what a number multiplies, times its standard deviation.
            shares_rows: whether all rows of an example have the same numbers.
            ratio: p / (1 - p) of the mask.
        """
        super().__init__(variance, shared)
        x = state.at
        self.x = root(torch.addcmul(state.variance, x, x), x)
        """The root of the expected square of each input, signed."""
        self.state, self.weight, self.shares_rows, self.ratio = state, weight, shares_rows, ratio

    def latents(self, rows: int) -> int | None:
        alone = self.shares_rows or self.x[..., 0].numel() == rows
        return self.x.shape[-1] if alone else None

    def exact(self, rows: int) -> Tensor:
        columns = self.x.unsqueeze(-1) * self.weight.t()  # (rows, ..., in, out)
        return columns.movedim(-2, 0)

    def drawn(self, count: int, numbers: Numbers) -> Tensor:
        leading = [1 if self.shares_rows else size for size in self.x.shape[:-1]]
        masks = numbers.masks((count, *leading, self.x.shape[-1]), self.ratio, self.x)
        found = [
            (own * self.state.draw(draw)).to(self.weight.dtype) @ self.weight.t()
            for draw, own in enumerate(masks)
        ]
        return torch.stack(found)

    def effects(self, by: Tensor, rows: int) -> Tensor:
        effects = (by @ self.weight) * self.x
        apart = of_examples(effects, rows).flatten(2, -2)
        return apart.sum(2) if self.shares_rows else apart.flatten(2)


class OfWords(Birth):
    """Rows of an embedding: one number for each entry of a row, or for the whole row. The same word has
    the same in all places of an example."""

    def __init__(self, effect: Tensor, index: Tensor, whole: bool, ratio: Tensor) -> None:
        """
        Args:
            effect: (rows, ..., out): what the numbers add, signed.
            index: (rows, ...): the words.
            whole: whether a word has one number.
            ratio: p / (1 - p) of the mask.
        """
        super().__init__(effect.square())
        self.effect, self.index, self.whole, self.ratio = effect, index, whole, ratio

    def _words(self) -> tuple[Tensor, Tensor]:
        """(rows, words, out): the effect; and (rows, words, 1): where the same word stands first."""
        words = self.index.reshape(len(self.index), math.prod(self.index.shape[1:]))
        same = words.unsqueeze(-1) == words.unsqueeze(-2)
        first = same.to(torch.uint8).argmax(-1, keepdim=True)
        return self.effect.view(*words.shape, self.effect.shape[-1]), first

    def latents(self, rows: int) -> int | None:
        if len(self.index) != rows:
            return None
        return math.prod(self.index.shape[1:]) * (1 if self.whole else self.effect.shape[-1])

    def exact(self, rows: int) -> Tensor:
        effect, first = self._words()
        count, out = effect.shape[1:]
        at = torch.nn.functional.one_hot(first.squeeze(-1), count).to(effect.dtype)
        columns = at.permute(2, 0, 1).unsqueeze(-1) * effect  # (places, rows, words, out)
        if not self.whole:
            eye = torch.eye(out, dtype=effect.dtype, device=effect.device)
            columns = columns.unsqueeze(1) * eye.view(out, 1, 1, out)
        return columns.reshape(-1, *self.effect.shape)

    def drawn(self, count: int, numbers: Numbers) -> Tensor:
        effect, first = self._words()
        shape = (count, *effect.shape[:2], 1 if self.whole else effect.shape[-1])
        masks = numbers.masks(shape, self.ratio, effect)
        masks = masks.gather(2, first.expand(masks.shape))
        return (masks * effect).view(count, *self.effect.shape)

    def effects(self, by: Tensor, rows: int) -> Tensor:
        effect, first = self._words()
        each = by.view(len(by), *effect.shape) * effect
        each = each.sum(-1, keepdim=True) if self.whole else each
        summed = torch.zeros_like(each).scatter_add_(2, first.expand(each.shape), each)
        return of_examples(summed, rows).flatten(2)


def of_examples(tensor: Tensor, rows: int) -> Tensor:
    """(n, examples * each, ...) as (n, examples, each, ...), also where a size is 0. A number is all of
    one example."""
    tensor = tensor.unsqueeze(-1) if tensor.ndim == 1 else tensor
    each = tensor.shape[1] // max(1, rows)
    return tensor.reshape(len(tensor), rows, each, *tensor.shape[2:])


def root(square: Tensor, sign_of: Tensor) -> Tensor:
    """The root of expected squares, with the sign of the mean."""
    return torch.copysign(square.sqrt(), sign_of)
