"""What a model is given and what it returns, when its samples run together: nested containers of
tensors that have the batch as their first dimension."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..spec.errors import SurgeryError
from ..torch_private.trees import keystr, tree_leaves_with_path, tree_map
from .arguments import Arguments, Forward

Select = str | Callable[[Any], Any] | None
"""Which part of an output is looked at: its name, a function of the output, or None."""


@dataclass(frozen=True)
class Batch:
    """The arguments of one forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: int
    """Examples: the first size of the tensors."""

    @classmethod
    def of(cls, arguments: Arguments) -> Batch:
        """The arguments that a forward is given.

        Raises:
            SurgeryError: the first sizes of the tensors differ, or there is no tensor.
        """
        return cls(*arguments, _rows_of(*arguments))

    def call(self, model: nn.Module, count: int = 1) -> Any:
        """What the model returns for so many repetitions of the batch, one after the other."""
        if count == 1:
            return model(*self.args, **self.kwargs)

        def repeated(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != self.rows:
                return value
            return value.repeat(count, *(1 for _ in value.shape[1:]))

        args, kwargs = tree_map(repeated, (self.args, self.kwargs))
        return model(*args, **kwargs)

    def shapes(self) -> tuple[Any, ...]:
        """The shapes of all tensors in it."""
        leaves = tree_leaves_with_path((self.args, self.kwargs))
        return tuple(value.shape for _, value in leaves if isinstance(value, Tensor))


def is_loader(inputs: Any) -> bool:
    """Whether inputs are an iterable of batches, and not one batch."""
    return isinstance(inputs, Iterable) and not isinstance(
        inputs, (Tensor, Mapping, tuple, list, str)
    )


def batches_of(loader: Iterable[Any], forward: Forward, device: torch.device) -> Iterator[Batch]:
    """The batches of a loader, on a device, without what the forward does not need.

    Raises:
        SurgeryError: the forward does not take a batch, or it has sizes that differ; the message says
            which batch.
    """

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    for index, inputs in enumerate(loader):
        try:
            yield Batch.of(tree_map(moved, forward.taken(inputs)))
        except SurgeryError as error:
            raise SurgeryError(f"batch {index} of the loader: {error}") from None


def _rows_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The first size that the tensors have: all arguments; where none is one, all inside of them."""
    found: dict[str, tuple[int, ...]] = {}
    inside: dict[str, tuple[int, ...]] = {}
    for name, value in (
        *((f"inputs[{i}]", value) for i, value in enumerate(args)),
        *kwargs.items(),
    ):
        if isinstance(value, Tensor):
            found |= {name: tuple(value.shape)} if value.ndim else {}
            continue
        for path, leaf in tree_leaves_with_path(value):
            if isinstance(leaf, Tensor) and leaf.ndim:
                inside[f"{name}{keystr(path)}"] = tuple(leaf.shape)
    shapes = found or inside
    sizes = {shape[0] for shape in shapes.values()}
    if not shapes:
        types = ", ".join(type(value).__name__ for value in (*args, *kwargs.values()))
        raise SurgeryError(
            f"got no tensor, but ({types}). Arrays become tensors by torch.as_tensor, a data set comes "
            "in a DataLoader"
        )
    if len(sizes) != 1 or 0 in sizes:
        described = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise SurgeryError(
            f"every input tensor must have the batch as its first dimension; got {described}. Move the "
            "batch there, or expand what all examples share"
        )
    return sizes.pop()


def tensor_of(outputs: Any, rows: int, select: Select) -> Tensor:
    """The tensor of an output that is looked at: what `select` says, else `logits`, else the first one.

    Raises:
        SurgeryError: there is none, it has not one row for each example, or it holds no real numbers.
    """
    if callable(select):
        chosen = select(outputs)
    elif select is not None:
        chosen = _named(outputs, select)
        if chosen is None:
            raise SurgeryError(
                f"the model returned a {type(outputs).__name__} without {select!r}; output= names "
                "one of its parts, or is a function that takes it and returns a tensor"
            )
    else:
        logits = _named(outputs, "logits")
        found = list(_tensors_in(outputs if logits is None else logits))
        rowed = [one for one in found if one.ndim and len(one) == rows] or found
        chosen = next((one for one in rowed if one.is_floating_point()), next(iter(rowed), None))
    if not isinstance(chosen, Tensor):
        raise SurgeryError(
            f"the model returned a {type(outputs).__name__}, in which there is no tensor to look at; "
            "give output=, the name of a part of it or a function that returns a tensor"
        )
    if chosen.ndim == 0 or chosen.shape[0] != rows:
        raise SurgeryError(
            f"the output has shape {tuple(chosen.shape)}, but the batch has {rows} rows; it must "
            "come first"
        )
    if not chosen.is_floating_point():
        raise SurgeryError(
            f"the output has {chosen.dtype}: of decisions neither mean nor entropy says anything. Give "
            "output=, the name of the logits or a function that returns them; for shares of votes, one "
            "that returns one_hot(...).float(), with class_dim=None"
        )
    return chosen


def _named(outputs: Any, name: str) -> Any:
    """A part of an output by its name; None if it has none."""
    if isinstance(outputs, Mapping):
        return outputs.get(name)
    return getattr(outputs, name, None)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested mappings, sequences and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors_in(item)
    elif is_dataclass(value):
        for one in fields(value):
            yield from _tensors_in(getattr(value, one.name))
