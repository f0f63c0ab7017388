"""Tied weights: from chosen parameters to sites, each with all its users that drop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.nn.utils.parametrize import is_parametrized

from ..kinds.derived import computed, fix
from ..modules.masking import AFTER_FSDP, is_managed
from .catalogue import Catalogue, Owner
from .select import Choice, Key, in_model_order

Ties = Mapping[int, Sequence[tuple[Owner, str]]]
"""All users of every parameter that has several, by the parameter's id, in model order."""

Users = list[Choice]
"""Those users of one parameter that drop, in model order. The first gives the site its name."""


def with_ties(
    catalogue: Catalogue, choices: list[Choice], excluded: frozenset[Key], tied: Ties
) -> list[Choice]:
    """The choices and the other users of what they choose, but for those that are excluded: a tied
    weight drops wherever it is read. In model order."""
    chosen = {choice.key: choice for choice in choices}
    both = dict(chosen)
    for choice in choices:
        for owner, name in tied.get(id(choice.parameter), ()):
            key = id(owner.module), name
            unread = owner.in_graph and not catalogue.is_read(owner, name)
            if key not in both and key not in excluded and not unread:
                both[key] = Choice.of(owner, name, choice.config)
    return choices if len(both) == len(chosen) else in_model_order(catalogue, both)


def by_parameter(choices: list[Choice], problems: list[str]) -> list[Users]:
    """Every parameter once, by its users; what is wrong is added to `problems`."""
    sites: dict[int, Users] = {}
    problems += map(_missing, (choice for choice in choices if choice.parameter is None))
    for choice in (choice for choice in choices if choice.parameter is not None):
        users = sites.setdefault(id(choice.parameter), [])
        if users and users[0].config != choice.config:
            problems.append(_differently(choice, users[0]))
        else:
            users.append(choice)
    return list(sites.values())


def ties(catalogue: Catalogue) -> Ties:
    """All users of every parameter that has several, by the parameter's id."""
    first: dict[int, tuple[Owner, str]] = {}
    users: dict[int, list[tuple[Owner, str]]] = {}
    for owner in catalogue:
        for name, parameter in owner.parameters.items():
            if parameter is None:
                continue
            user = (owner, name)
            known = first.setdefault(id(parameter), user)
            if known is not user:
                users.setdefault(id(parameter), [known]).append(user)
    return users


def _differently(one: Choice, other: Choice) -> str:
    return (
        f"{one.full} is tied with {other.full}, but the two were given different options; give both "
        "the same"
    )


def _missing(choice: Choice) -> str:
    """Why a module has not the parameter that its kind drops, and the fix."""
    module, cls, name = choice.module, choice.owner.cls, choice.full
    if is_managed(module):
        return f"{name}: {AFTER_FSDP}"
    if is_parametrized(module, choice.name):
        return f"{name} is parametrized; {fix(module, choice.name)}, or exclude it"
    sources = [own for own in module._parameters if computed(cls, module, own) == choice.name]
    if sources:
        return (
            f"{name}: {cls.__name__} has no such parameter, it is computed from {sources[0]!r}; "
            f"{fix(module, choice.name)}, or exclude it"
        )
    return f"{name}: {cls.__name__} has no such parameter (replaced or None); exclude it"
