"""Targets that are functions: `(name, module) -> bool`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ..spec.errors import NoMatchError, SurgeryError
from .catalogue import Catalogue, Owner

Predicate = Callable[[str, nn.Module], bool]


def is_predicate(target: Any) -> bool:
    """Whether a target is a function of (name, module). A class or a module can be called too, and is
    none."""
    return callable(target) and not isinstance(target, (type, nn.Module))


def predicate_name(predicate: Predicate) -> str:
    """What messages call it."""
    return str(getattr(predicate, "__qualname__", None) or type(predicate).__qualname__)


def true_of(catalogue: Catalogue, predicate: Predicate, where: str) -> list[Owner]:
    """The modules of which a predicate is true, under any of their names; at least one.

    Args:
        catalogue: of the model.
        predicate: called with the dotted name of a module, `""` for the model itself, and the module.
        where: `"targets"` or `"exclude"`, for messages.

    Raises:
        NoMatchError: it is true of none.
        SurgeryError: it does not take two arguments, fails, or returns no bool; the message names the
            module.
    """
    said = f"{where}: the function {predicate_name(predicate)}"
    _check_signature(predicate, said)
    found = [
        owner
        for owner in catalogue
        if any(_is_true(predicate, name, owner.module, said) for name in owner.names)
    ]
    if not found:
        raise NoMatchError(
            f"{said} is true of no module of {type(catalogue.model).__name__}. It is asked of modules "
            "only; a parameter is named by a pattern ('*.weight_ih_l0')"
        )
    return found


def _check_signature(predicate: Predicate, said: str) -> None:
    try:
        inspect.signature(predicate).bind("", None)
    except TypeError as error:
        raise SurgeryError(
            f"{said} must take two arguments, the dotted name of a module and the module: {error}"
        ) from None
    except ValueError:  # written in C, and does not tell
        return


def _is_true(predicate: Predicate, name: str, module: nn.Module, said: str) -> bool:
    of = f"for {name or '(root)'!r} ({type(module).__name__})"
    try:
        answer = predicate(name, module)
    except Exception as error:
        raise SurgeryError(f"{said} raised {type(error).__name__} {of}: {error}") from error
    if not isinstance(answer, bool):
        raise SurgeryError(f"{said} must return True or False, and returned {answer!r} {of}")
    return answer
