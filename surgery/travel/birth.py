"""Where randomness begins: how much there is, and how the entries of a value share it.

A birth adds to a value. It says how much variance it adds, and gives what it adds in columns:
exact ones, one for each independent random number, or a sketch of all. `gram` gives the covariance
that births of the same numbers cause in the outputs, from their derivatives by what was added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.grams import weighted_gram

Signs = Callable[[tuple[int, ...], Tensor], Tensor]
Linear = Callable[[Tensor, Tensor], Tensor]
"""`product(x, weight)`: linear in both, row by row of x."""


LIMIT = 2**27
"""Numbers that columns of one value, or of a weight, may have: half a GiB."""


class Shared:
    """The random numbers of a mask that several products use: their births have the same."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._signed: Tensor | None = None

    def signs(self, purpose: int) -> Signs:
        """Random signs: for the same purpose the same, whenever as many are drawn."""

        def drawn(shape: tuple[int, ...], like: Tensor) -> Tensor:
            generator = torch.Generator(like.device).manual_seed(4 * self._seed + purpose)
            return drawn_signs(shape, like, generator)

        return drawn

    def signed(self, weight: Tensor, columns: int) -> Tensor:
        """(columns, *shape of the weight): the weight times signs. Made once, where it is not large."""
        if self._signed is not None:
            return self._signed
        signed = self.signs(0)((columns, *weight.shape), weight).mul_(weight)
        if signed.numel() <= LIMIT:
            self._signed = signed
        return signed


def drawn_signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs, of the device and dtype of a tensor."""
    drawn = torch.randint(0, 2, shape, generator=generator, device=like.device)
    return drawn.to(like.dtype).mul_(2).sub_(1)


class Birth:
    """Randomness that is added to a value, independent of all before, but of births with the same
    `shared`."""

    variance: Tensor
    """Of each entry of the value."""

    def __init__(self, variance: Tensor, shared: Shared | None = None) -> None:
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

    def sketched(self, columns: int, signs: Signs) -> Tensor:
        """(columns, *shape): what random signs in the place of the latents add, over the root of the
        number of columns."""
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

    def effects(self, by: Tensor, rows: int) -> Tensor:
        return of_examples(by * self.variance.sqrt(), rows).flatten(2)


class OfOutputs(Birth):
    """One number for each index of some dimensions, and shared by all other entries of an example:
    where one mask entry multiplies a whole channel, or the whole value."""

    def __init__(self, effect: Tensor, own: tuple[int, ...], shared: Shared | None = None) -> None:
        """
        Args:
            effect: what the number adds, signed; the shape of the value.
            own: dimensions along which there are several numbers, counted from the end.
        """
        super().__init__(effect.square(), shared)
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
        x: Tensor,
        weight: Tensor,
        shares_rows: bool,
        shared: Shared | None = None,
    ) -> None:
        """
        Args:
            x: (rows, ..., in): the root of the expected square of each input, signed.
            weight: (out, in): what a number multiplies, times its standard deviation.
            shares_rows: whether all rows of an example have the same numbers.
        """
        super().__init__(variance, shared)
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

    def effects(self, by: Tensor, rows: int) -> Tensor:
        effects = (by @ self.weight) * self.x
        apart = of_examples(effects, rows).flatten(2, -2)
        return apart.sum(2) if self.shares_rows else apart.flatten(2)


class OfWords(Birth):
    """Rows of an embedding: one number for each entry of a row, or for the whole row. The same word has
    the same in all places of an example."""

    def __init__(self, effect: Tensor, index: Tensor, whole: bool) -> None:
        """
        Args:
            effect: (rows, ..., out): what the numbers add, signed.
            index: (rows, ...): the words.
            whole: whether a word has one number.
        """
        super().__init__(effect.square())
        self.effect, self.index, self.whole = effect, index, whole

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

    def sketched(self, columns: int, signs: Signs) -> Tensor:
        effect, first = self._words()
        drawn = signs((columns, *effect.shape[:2], 1 if self.whole else effect.shape[-1]), effect)
        drawn = drawn.gather(2, first.expand(drawn.shape)) / math.sqrt(columns)
        return (drawn * effect).view(columns, *self.effect.shape)

    def effects(self, by: Tensor, rows: int) -> Tensor:
        effect, first = self._words()
        each = by.view(len(by), *effect.shape) * effect
        each = each.sum(-1, keepdim=True) if self.whole else each
        summed = torch.zeros_like(each).scatter_add_(2, first.expand(each.shape), each)
        return of_examples(summed, rows).flatten(2)


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
        shared: Shared | None = None,
    ) -> None:
        """
        Args:
            x: the mean of each input.
            columns: of the input, if it varies. They tell how its rows covary: E[x_s x_t] is what masks
                multiply.
            weight: what a mask entry multiplies, times its standard deviation.
            product: what combines them to the value.
            matrix: whether that is `x @ weight.T`.
            features: the dimension of the features in x, counted from the end.
        """
        super().__init__(variance, shared)
        assert shared is None or matrix
        self.x, self.columns, self.weight = x, columns, weight
        self.product, self.matrix, self.features = product, matrix, features
        self.drawn: Tensor | None = None
        """A draw of what varies of the input: that of each feature has signs of its own, since
        different mask entries multiply different features."""

    def latents(self, rows: int) -> int | None:
        return None

    def sketched(self, columns: int, signs: Signs) -> Tensor:
        shared, scale = self.shared, 1 / math.sqrt(columns)
        if self.columns is not None:
            of_draw = signs if shared is None else shared.signs(1)
            self.drawn = (self.columns * self._signs(len(self.columns), of_draw)).sum(0)
        if shared is not None and self.matrix:
            x = self.x.expand(columns, *self.x.shape)
            if self.columns is not None:
                own = self._signs(columns, shared.signs(2))
                x = x + self.columns * own * math.sqrt(columns)
            signed = shared.signed(self.weight, columns)
            return torch.einsum("k...i,koi->k...o", x, signed) * scale
        found = []
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

    def gram(self, by: Sequence[Tensor], rows: int, others: Sequence[Any] = ()) -> Tensor:
        births: list[OfWeights] = [self, *others]
        found = self._gram(by, [one.x for one in births], rows)
        if all(one.drawn is None for one in births):
            return found
        drawn = [torch.zeros_like(one.x) if one.drawn is None else one.drawn for one in births]
        return found + self._gram(by, drawn, rows)

    def _gram(self, by: Sequence[Tensor], inputs: Sequence[Tensor], rows: int) -> Tensor:
        if self.matrix:  # uses of one mask are like rows of one example
            x = _joined([of_examples(one.unsqueeze(0), rows).flatten(2, -2) for one in inputs], 2)[
                0
            ]
            own = _joined([of_examples(one, rows).flatten(2, -2) for one in by], 2)
            return weighted_gram(own, x, self.weight.square())
        grams = [
            self._of_example(of_examples(by[0], rows)[:, row], x)
            for row, x in enumerate(of_examples(inputs[0].unsqueeze(0), rows)[0])
        ]
        return torch.stack(grams)

    def _of_example(self, by: Tensor, x: Tensor) -> Tensor:
        """(outputs, outputs). `by`: (outputs, rows, ...); `x`: (rows, ...)."""
        pull: Any = torch.func.vjp(lambda weight: self.product(x, weight), self.weight)[1]
        (of_weight,) = torch.vmap(pull)(by)
        effects: Tensor = (of_weight * self.weight).flatten(1)
        return effects @ effects.t()


def of_examples(tensor: Tensor, rows: int) -> Tensor:
    """(n, examples * each, ...) as (n, examples, each, ...), also where there is nothing of some size."""
    each = tensor.shape[1] // max(1, rows)
    return tensor.reshape(len(tensor), rows, each, *tensor.shape[2:])


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def root(square: Tensor, sign_of: Tensor) -> Tensor:
    """The root of expected squares, with the sign of the mean."""
    return torch.copysign(square.sqrt(), sign_of)
