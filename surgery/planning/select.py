"""From patterns to weights: which parameters of which modules `targets` and `exclude` mean."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..kinds.kind import OTHER
from ..spec.config import DropConnectConfig, check_p
from ..spec.errors import NoMatchError, SurgeryError
from ..spec.forms import counted
from ..spec.plan import Plan, join
from .catalogue import Catalogue, Owner
from .conventions import left_out
from .predicates import is_predicate, predicate_name, true_of

ALL_LINEAR = "all-linear"

Key = tuple[int, str]
"""A parameter as (id of its owner's module, plain name)."""


class Choice(NamedTuple):
    """One selected parameter, and all that planning asks of it."""

    owner: Owner
    module: nn.Module
    """The owner's."""
    name: str
    """Plain name inside the owner."""
    parameter: Tensor | None
    """The parameter itself; None if the owner has none under this name."""
    config: DropConnectConfig

    @classmethod
    def of(cls, owner: Owner, name: str, config: DropConnectConfig) -> Choice:
        """The parameter with this plain name, to be dropped in this way."""
        return cls(owner, owner.module, name, owner.parameters.get(name), config)

    @property
    def key(self) -> Key:
        return id(self.module), self.name

    @property
    def full(self) -> str:
        """The first dotted name in the model."""
        return join(self.owner.names[0], self.name)

    @property
    def bias(self) -> str | None:
        """Name of the bias that goes with this weight, whether or not the module has one."""
        return self.owner.kind.bias(self.name)


def select(
    catalogue: Catalogue, targets: Any, exclude: Any, config: DropConnectConfig
) -> tuple[list[Choice], frozenset[Key]]:
    """The parameters that `targets` means and `exclude` does not.

    Args:
        targets: see `surgery.apply_dropconnect`.
        exclude: the same forms, or None.
        config: for every target that does not bring its own.

    Returns:
        the choices, in model order, and everything that `exclude` names.

    Raises:
        NoMatchError: a target or an exclusion matches nothing.
        SurgeryError: a target has none of the accepted forms.
    """
    chosen: dict[Key, Choice] = {}
    for target, its_config in _entries(targets, config):
        for owner, name in _resolve(catalogue, target, "targets"):
            key = id(owner.module), name
            if key not in chosen:
                chosen[key] = Choice.of(owner, name, its_config)
    if not isinstance(targets, Plan):  # a plan lists its biases
        for choice in [choice for choice in chosen.values() if choice.config.bias]:
            bias, owner = choice.bias, choice.owner
            if bias is not None and owner.parameters.get(bias) is not None:
                chosen.setdefault((choice.key[0], bias), Choice.of(owner, bias, choice.config))
    excluded = frozenset(
        (id(owner.module), name)
        for target, _ in (_entries(exclude, config) if exclude else ())
        for owner, name in _resolve(catalogue, target, "exclude")
    )
    for key in excluded:
        chosen.pop(key, None)
    if not chosen:
        raise NoMatchError(f"nothing is left of targets={targets!r} after exclude={exclude!r}")
    return in_model_order(catalogue, chosen), excluded


def in_model_order(catalogue: Catalogue, chosen: dict[Key, Choice]) -> list[Choice]:
    """The choices of a dict, which is emptied, in the order in which the model has its parameters."""
    ordered = []
    for owner in catalogue:
        ident = id(owner.module)
        for name in owner.parameters:
            choice = chosen.pop((ident, name), None)
            if choice is not None:
                ordered.append(choice)
    return ordered + list(chosen.values())  # what is left is missing; `prepare` says so


@dataclass(frozen=True)
class _Exact:
    """A parameter by its full name: what a `Plan` lists."""

    name: str


def _entries(targets: Any, config: DropConnectConfig) -> list[tuple[Any, DropConnectConfig]]:
    """`targets` in any accepted form, as (pattern or class, config) pairs."""
    if isinstance(targets, Plan):
        return [
            (_Exact(name), site.config)
            for site in targets
            for name in (site.name, *site.shared_with)
        ]
    if isinstance(targets, Mapping) and targets:
        return [(target, _config_for(value, config)) for target, value in targets.items()]
    if isinstance(targets, (str, type)) or is_predicate(targets):
        return [(targets, config)]
    if isinstance(targets, Sequence) and targets:
        return [(target, config) for target in targets]
    raise SurgeryError(
        f"targets must be a pattern, a module class, {ALL_LINEAR!r}, a function of (name, module), a "
        "list of these, a mapping of these to a p or a DropConnectConfig, or a Plan; got "
        f"{targets!r}"
    )


def _config_for(value: Any, config: DropConnectConfig) -> DropConnectConfig:
    if isinstance(value, DropConnectConfig):
        return value
    return config.replace(p=check_p(value, "p in targets"))


Pairs = list[tuple[Owner, str]]
"""Parameters as (owner, plain name in the owner)."""


def _resolve(catalogue: Catalogue, target: Any, where: str) -> Pairs:
    """What one target means; never empty. A parameter may be there twice."""
    pairs, replaced = _matched(catalogue, target, where), catalogue.conventions.replaced
    if not replaced or where == "exclude" or isinstance(target, _Exact):
        return pairs
    spelled = target if isinstance(target, str) else ""
    kept = [
        (owner, name)
        for owner, name in pairs
        if replaced.get(id(owner.module), "") in spelled  # "" is in every string
    ]
    if not kept:
        owner, name = pairs[0]
        raise NoMatchError(
            f"{where}: {target!r} matches only weights in whose place trained copies run, the first "
            f"of them {join(owner.name, name)!r}. Name the copies, or the path of the weight"
        )
    return kept


def _matched(catalogue: Catalogue, target: Any, where: str) -> Pairs:
    """What one target matches; never empty."""
    if isinstance(target, _Exact):
        owner_and_name = catalogue.parameter(target.name)
        if owner_and_name is None:
            raise _no_match(catalogue, target.name, where)
        return [owner_and_name]
    if isinstance(target, type):
        if not issubclass(target, nn.Module):
            raise SurgeryError(f"{where}: {target.__name__} is not a torch.nn.Module class")
        owners = [owner for owner in catalogue if isinstance(owner.module, target)]
        return _weights_of(catalogue, owners, target.__name__, where)
    if target == ALL_LINEAR:
        others = left_out(catalogue.model)
        linear = [owner for owner in catalogue if owner.kind.linear]
        owners = [owner for owner in linear if id(owner.module) not in others]
        if not owners:
            raise NoMatchError(
                f"{where}: {target!r} finds no linear layer in {type(catalogue.model).__name__}"
                f'{" but an output head" if linear else ""}; name what to drop, as "*.fc" or nn.LSTM'
            )
        return _weights_of(catalogue, owners, target, where)
    if is_predicate(target):
        owners = true_of(catalogue, target, where)
        return _weights_of(catalogue, owners, predicate_name(target), where)
    if not isinstance(target, str):
        raise SurgeryError(
            f"{where}: expected a pattern, a module class or a function of (name, module); got "
            f"{target!r}"
        )
    matches = matcher(target, where)
    owners = [owner for owner in catalogue if any(map(matches, owner.names))]
    if owners:
        return _weights_of(catalogue, owners, target, where)
    pairs = [
        (owner, name) for names, owner, name in catalogue.spelled() if any(map(matches, names))
    ]
    if not pairs:
        raise _no_match(catalogue, target, where)
    return pairs


def matcher(pattern: str, where: str) -> Callable[[str], bool]:
    """A predicate on dotted names. A glob `*.fc` also matches `fc` at the root."""
    if pattern.startswith("re:"):
        try:
            regex = re.compile(pattern[3:])
        except re.error as error:
            raise SurgeryError(
                f"{where}: {pattern!r} is not a regular expression: {error}"
            ) from None
        return lambda name: regex.fullmatch(name) is not None
    return lambda name: fnmatchcase(name, pattern) or fnmatchcase(f".{name}", pattern)


def _weights_of(catalogue: Catalogue, owners: list[Owner], target: str, where: str) -> Pairs:
    """The weights that the modules' kinds drop by default; for exclusions, all they own."""
    if not owners:
        raise _no_match(catalogue, target, where)
    pairs: Pairs = []
    inside: list[Owner] = []
    for owner in owners:
        if where == "exclude":
            pairs += _all_of(owner)
        pairs += _by_default(catalogue, owner)
        for part in map(catalogue.of, catalogue.conventions.inside.get(id(owner.module), ())):
            inside.append(part)
            pairs += _all_of(part) if part is owner or where == "exclude" else ()
            pairs += _by_default(catalogue, part)
    if not pairs:  # what is in containers may be of a class that only its library knows
        inside = [part for part in inside if not part.cls.__module__.startswith("torch.")]
        pairs = [pair for part in inside if part.kind is OTHER for pair in _all_of(part)]
    if pairs:
        return pairs
    first = owners[0]
    example = first.name
    own = [name for name, value in first.parameters.items() if value is not None]
    advice = (
        f"To drop one of its parameters, name it: {join(example, own[0])!r}"
        if own
        else f"To reach what is inside it, write {join(example, '*')!r}"
    )
    raise NoMatchError(
        f"{where}: {target!r} matches {counted(len(owners), 'module')} (the first is "
        f"{example or '(root)'!r}, a {type(first.module).__name__}), but none has weights that are "
        f"dropped by default. {advice}."
    )


def _all_of(owner: Owner) -> Pairs:
    return [(owner, name) for name in owner.parameters]


def _by_default(catalogue: Catalogue, owner: Owner) -> Iterator[tuple[Owner, str]]:
    """The weights that the kind of a module drops: its own, and of children that it reads itself."""
    for name in owner.kind.weights(owner.module):
        path, _, parameter = name.rpartition(".")
        yield catalogue.of(owner.module.get_submodule(path)) if path else owner, parameter


def _no_match(catalogue: Catalogue, target: str, where: str) -> NoMatchError:
    """The error that lists the names nearest to the target."""
    names = catalogue.all_names()
    wanted = re.sub(r"^re:|[*?\[\]\\^$()]", "", target).strip(".")
    parts = wanted.count(".") + 1
    ends = {".".join(name.split(".")[-parts:]): name for name in reversed(names)}
    near = [ends[one] for one in difflib.get_close_matches(wanted, ends, n=3, cutoff=0.7)]
    for name in difflib.get_close_matches(wanted, names, n=5, cutoff=0.3):
        near += [name] if name not in near else []
    tail = wanted.rsplit(".", 1)[-1].lower()
    if not near:  # by the last part: names of large models are long
        by_tail = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}
        near = [by_tail[one] for one in difflib.get_close_matches(tail, by_tail, n=5)]
    near += [name for name in names if tail and tail in name.lower() and name not in near][:5]
    hint = f" Nearest names: {', '.join(near[:6])}." if near else ""
    return NoMatchError(
        f"{where}: {target!r} matches no module and no parameter of {type(catalogue.model).__name__}."
        f"{_advice(target, names)}{hint} A '*' also matches dots; print(model) shows all modules."
    )


def _advice(target: str, names: list[str]) -> str:
    """What to write, where it can be guessed from how other libraries take names."""
    if target.replace("_", "-").lower() == ALL_LINEAR:
        return f" Write {ALL_LINEAR!r}."
    if re.search(r"[|()\\^$+]", target) and not target.startswith("re:"):
        return f" A regular expression begins with 're:': write {'re:' + target!r}."
    deeper = f"*.{target}"
    if any(fnmatchcase(name, deeper) for name in names):
        return f" A pattern is for whole names: write {deeper!r}."
    return ""
