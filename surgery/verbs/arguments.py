"""What the forward of a model takes, and what of a batch that is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..modules.walk import unwrapped
from ..spec.errors import SurgeryError

LABELS = ("labels", "label", "label_ids")
"""What batches of training sets have beside the inputs, as transformers' Trainer calls it."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Those of one call: by place, and by name."""


class Forward:
    """The arguments that the forward of a model takes, looked up once.

    Wrappers that pass all on to the module inside (`torch.compile`, DDP, PEFT) take what that takes.
    """

    def __init__(self, model: nn.Module) -> None:
        module = _that_takes(model)
        self._signature = _signature(module)
        given = self._signature.parameters.values()
        self._name = f"{type(module).__name__}.forward"
        self._places = [
            one for one in given if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
        ]
        self._any_place = any(one.kind is one.VAR_POSITIONAL for one in given)
        self._any_name = any(one.kind is one.VAR_KEYWORD for one in given)
        self._needed = {
            one.name
            for one in given
            if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        }
        # transformers' encoder-decoders, of which labels are inputs where the decoder has no others
        self._shifts_labels = hasattr(module, "prepare_decoder_input_ids_from_labels")

    def given(self, inputs: Any) -> Arguments:
        """A tensor, a tuple or list of positional arguments, or a mapping of keyword arguments, all of
        which are passed.

        Raises:
            SurgeryError: the forward does not take them.
        """
        args, kwargs = _arguments(inputs)
        hint = self._hint_of_names(inputs, "(inputs,)")
        if isinstance(inputs, list):
            if len(inputs) > 1 and all(map(self._is_of_names, inputs)):
                raise SurgeryError(f"inputs is a list of {len(inputs)} mappings{_OF_BATCHES}")
            hint = f". It is a list{_OF_BATCHES}"
        self._check(args, kwargs, hint)
        return args, kwargs

    def taken(self, inputs: Any) -> Arguments:
        """What the forward takes of a batch of a loader: without targets.

        Raises:
            SurgeryError: the forward does not take it, or what is a target in it cannot be seen.
        """
        args, kwargs = _arguments(inputs)
        args, kwargs = self._without_targets(args), self._without_labels(kwargs)
        self._check(args, kwargs, self._hint_of_names(inputs, "((b,) for b in loader)"))
        return args, kwargs

    def _hint_of_names(self, inputs: Any, instead: str) -> str:
        """What to write if a mapping was meant as the one argument, and not as several by name."""
        if not isinstance(inputs, Mapping) or len(self._needed) != 1:
            return ""
        (name,) = self._needed
        return (
            f". A mapping is taken for arguments by name; if it is {name!r} itself, write {instead}"
        )

    def _without_targets(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Of `(x, y)` as many as the forward needs. What it could do without is a target too, if it has
        the form of one."""
        if self._any_place:
            return args
        needed = max(1, sum(one.name in self._needed for one in self._places))
        free = [one.name for one in self._places[needed:]]
        for name, part in zip(free, args[needed:]):
            if not _looks_like_labels(part):
                inputs = [one.name for one in self._places[:needed]]
                with_it = ", ".join(f"{one!r}: {one}" for one in (*inputs, name))
                alone = inputs[0] if needed == 1 else f"({', '.join(inputs)})"
                raise SurgeryError(
                    f"of its {len(args)} parts {self._name} needs {needed}, and it cannot be seen "
                    f"whether another one is a target or its {name!r}. Give batches of inputs alone, "
                    f"such as ({alone} for {', '.join(inputs)}, *_ in loader), or mappings, such as "
                    f"({{{with_it}}} for {', '.join(inputs)}, {name}, *_ in loader)"
                )
        return args[:needed]

    def _without_labels(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Without labels, but for those that the forward cannot do without, and what it has no name
        for."""
        needs = self._shifts_labels and not any(name.startswith("decoder_in") for name in kwargs)
        return {
            name: value
            for name, value in kwargs.items()
            if (self._any_name or name in self._signature.parameters)
            and (name not in LABELS or needs or name in self._needed)
        }

    def _is_of_names(self, value: Any) -> bool:
        return isinstance(value, Mapping) and any(
            name in self._signature.parameters for name in value
        )

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any], hint: str = "") -> None:
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            takes = ", ".join(self._signature.parameters)
            raise SurgeryError(f"{self._name} takes ({takes}): {error}{hint}") from None


_OF_BATCHES = (
    ", which is taken for the positional arguments of one batch; give batches as iter([...])"
)


def _that_takes(model: nn.Module) -> nn.Module:
    """The module whose forward says what it takes."""
    module = unwrapped(model)
    base = getattr(module, "get_base_model", None)  # of PEFT
    return unwrapped(base()) if callable(base) else module


def _signature(module: nn.Module) -> inspect.Signature:
    try:
        return inspect.signature(module.forward)
    except (TypeError, ValueError):  # written in C
        return inspect.signature(_anything)


def _anything(*args: Any, **kwargs: Any) -> None:
    """Takes what there is."""


def _arguments(inputs: Any) -> Arguments:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def _looks_like_labels(part: Any) -> bool:
    """Whether it has a number or a name for each example, and no more."""
    if isinstance(part, Tensor):
        return part.ndim == 1
    plain = (str, int, float)
    return isinstance(part, (tuple, list)) and all(isinstance(one, plain) for one in part)
