"""Tied weights: from chosen parameters to sites, each with all its users that drop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..kinds.derived import computed, fix
from ..modules.masking import AFTER_FSDP, is_managed
from ..modules.operated import plain_class
from .catalogue import Catalogue
from .select import Choice, Key, in_model_order

Ties = Mapping[int, Sequence[tuple[nn.Module, str]]]
"""All users of every parameter that has several, by the parameter's id, in model order."""

Users = tuple[list[Choice], Tensor]
"""One parameter and those of its users that drop, in model order. The first gives the site its name."""


def with_ties(
    catalogue: Catalogue, choices: list[Choice], excluded: frozenset[Key], tied: Ties
) -> list[Choice]:
    """The choices and the other users of what they choose, but for those that are excluded: a tied
    weight drops wherever it is read. In model order."""
    chosen = {(id(choice.module), choice.name): choice for choice in choices}
    found = dict(chosen)
    for choice in choices:
        for module, name in tied.get(id(catalogue.own(choice.module).get(choice.name)), ()):
            key = id(module), name
            unread = catalogue.is_in_graph(module) and not catalogue.is_read(module, name)
            if key not in found and key not in excluded and not unread:
                found[key] = Choice(module, name, choice.config)
    return choices if len(found) == len(chosen) else in_model_order(catalogue, found)


def by_parameter(catalogue: Catalogue, choices: list[Choice], problems: list[str]) -> list[Users]:
    """Every parameter once, with its users; what is wrong is added to `problems`."""
    found: dict[int, Users] = {}
    for choice in choices:
        parameter = catalogue.own(choice.module).get(choice.name)
        if parameter is None:
            problems.append(_missing(catalogue, choice))
            continue
        users, _ = found.setdefault(id(parameter), ([], parameter))
        if users and users[0].config != choice.config:
            problems.append(_differently(catalogue, choice, users[0]))
            continue
        users.append(choice)
    return list(found.values())


def ties(catalogue: Catalogue) -> Ties:
    """All users of every parameter that has several, by the parameter's id."""
    first: dict[int, tuple[nn.Module, str]] = {}
    users: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in catalogue.modules.values():
        for name, parameter in catalogue.own(module).items():
            if parameter is None:
                continue
            user = (module, name)
            known = first.setdefault(id(parameter), user)
            if known is not user:
                users.setdefault(id(parameter), [known]).append(user)
    return users


def _differently(catalogue: Catalogue, choice: Choice, other: Choice) -> str:
    one, two = (catalogue.full(user.module, user.name) for user in (choice, other))
    return f"{one} is tied with {two}, but the two were given different options; give both the same"


def _missing(catalogue: Catalogue, choice: Choice) -> str:
    """Why a module has not the parameter that its kind drops, and the fix."""
    module, name = choice.module, catalogue.full(choice.module, choice.name)
    if is_managed(module):
        return f"{name}: {AFTER_FSDP}"
    if is_parametrized(module, choice.name):
        return f"{name} is parametrized; {fix(module, choice.name)}, or exclude it"
    cls = plain_class(module)
    sources = [own for own in module._parameters if computed(cls, module, own) == choice.name]
    if sources:
        return (
            f"{name}: {cls.__name__} has no such parameter, it is computed from {sources[0]!r}; "
            f"{fix(module, choice.name)}, or exclude it"
        )
    return f"{name}: {cls.__name__} has no such parameter (replaced or None); exclude it"
