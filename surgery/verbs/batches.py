"""What a model is given and what it returns, when its samples run together: nested containers of
tensors that have the batch as their first dimension."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.walk import unwrapped
from ..spec.errors import SurgeryError
from ..torch_private.trees import keystr, tree_leaves_with_path, tree_map

LABELS = ("labels", "label", "label_ids")
"""What batches of training sets have beside the inputs."""

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
    def of(cls, inputs: Any) -> Batch:
        """A tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.

        Raises:
            SurgeryError: the first sizes of the tensors differ, or there is no tensor.
        """
        args, kwargs = _arguments(inputs)
        return cls(args, kwargs, _rows_of(args, kwargs))

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


def batches_of(loader: Iterable[Any], model: nn.Module, device: torch.device) -> Iterator[Batch]:
    """The batches of a loader, on a device, without what the forward does not need: labels, and what
    comes after its last positional argument.

    Raises:
        SurgeryError: a batch has sizes that differ; the message says which batch.
    """
    for index, inputs in enumerate(loader):
        args, kwargs = _arguments(inputs)
        args, kwargs = tree_map(
            lambda value: value.to(device) if isinstance(value, Tensor) else value,
            (_taken(model, args), _without_labels(model, kwargs)),
        )
        try:
            yield Batch(args, kwargs, _rows_of(args, kwargs))
        except SurgeryError as error:
            raise SurgeryError(f"batch {index} of the loader: {error}") from None


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def _taken(model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """As many positional arguments as the forward takes: of `(x, y)` only `x` where it has no second
    one."""
    parameters = inspect.signature(unwrapped(model).forward).parameters.values()
    if any(one.kind is one.VAR_POSITIONAL for one in parameters):
        return args
    places = [
        one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    ]
    return args[: len(places)]


def _without_labels(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without labels, but for those that the forward cannot do without."""
    parameters = inspect.signature(unwrapped(model).forward).parameters
    needed = {name for name, one in parameters.items() if one.default is one.empty}
    return {k: v for k, v in kwargs.items() if k not in LABELS or k in needed}


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
    if len(sizes) != 1 or 0 in sizes:
        described = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "no tensor"
        raise SurgeryError(
            f"every input tensor must have the batch as its first dimension; got {described}. Move the "
            "batch there, or expand what all examples share"
        )
    return sizes.pop()


def tensor_of(outputs: Any, rows: int, select: Select) -> Tensor:
    """The tensor of an output that is looked at: what `select` says, else `logits`, else the first one.

    Raises:
        SurgeryError: there is none, or it has not one row for each example.
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
        chosen = next((one for one in found if one.ndim and len(one) == rows), None)
        chosen = next(iter(found), None) if chosen is None else chosen
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
