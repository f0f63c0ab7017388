"""What must hold for DropConnect on a model: looked at for one model and its inputs."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from surgery import (
    NoMatchError,
    Plan,
    SurgeryError,
    apply_dropconnect,
    plain_state_dict,
    plan_dropconnect,
    strip_dropconnect,
)
from surgery.kinds import kind_of

from ..expected import keep
from ..helpers import Snapshot
from ..internals import note_keys

P = 0.5
FEW_DRAWS = 6
"""A weight with more masks in a forward has hardly an entry that all of them drop."""

Inputs = Mapping[str, Any]


class Failed(Exception):
    """Something does not hold."""


@dataclass
class Found:
    """What the checks found on the way."""

    sites: int = 0
    drew: int = 0
    """Sites that the training forward used, so that their gradient was compared with the mask."""
    refused: dict[str, str] = field(default_factory=dict)
    """By site: the rule."""
    refused_linear: int = 0
    """How many of these `"all-linear"` means."""
    left_out: list[str] = field(default_factory=list)
    """Checks that the plain model does not pass by itself."""


def check(model: nn.Module, inputs: Inputs) -> Found:
    """Plan, apply, evaluate, save, load, strip, train.

    Args:
        model: plain, in `eval()`; changed only in gradients, buffers and the training flag.
        inputs: keyword arguments with which it runs.

    Raises:
        Failed: what does not hold.
    """
    found = Found()
    every = targets_of(model)
    expected = evaluated(model, inputs)
    again = evaluated(model, inputs)
    repeats = same(expected, again)
    if not repeats:
        found.left_out.append("eval() of the plain model is not repeatable")
    if _applied(model, "all-linear", found):
        _evaluates(model, inputs, expected if repeats else None)
        strip_dropconnect(model)
    found.refused_linear = len(found.refused)
    plan = _planned(model, every, found)
    if plan is None:
        return found
    before = Snapshot(model)
    with tempfile.TemporaryDirectory() as folder:
        saved = _saved(model, Path(folder, "plain"), found)
        apply_dropconnect(model, plan)
        _evaluates(model, inputs, expected if repeats else None)
        if saved is not None:
            _compare_saved(model, Path(folder), saved, found)
        strip_dropconnect(model)
    if before != Snapshot(model) and not _changes_itself(model, inputs):
        raise Failed("strip did not give back the model")
    found.sites = len(plan)
    _train(model, inputs, plan, found)
    return found


def targets_of(model: nn.Module) -> list[Any]:
    """Every weight with two dimensions and more: by its module's kind, else by its name."""
    targets: list[Any] = []
    classes = [cls for cls in {type(m): m for m in model.modules()}.items()]
    for cls, module in classes:
        kind = kind_of(module)
        if kind.name != "other" and kind.weights(module):
            targets.append(cls)
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, ParametrizationList):
            continue  # the weight that is computed from it is named with its module
        if kind_of(owner).name == "other" and parameter.ndim >= 2:
            targets.append(f"re:{re.escape(name)}")
    return targets


_PROBLEM = re.compile(r"^  - ([\w.\-]+)(?: \((\w+)\))?:? ?(.*)$", re.M)


def _planned(model: nn.Module, targets: Any, found: Found) -> Plan | None:
    """The plan without what is refused, which is noted; None if nothing is left."""
    return (
        _accepted(partial(plan_dropconnect, model, targets, p=P), model, found) if targets else None
    )


def _applied(model: nn.Module, targets: Any, found: Found) -> bool:
    """Apply to what is not refused, without a plan before it; whether anything is left."""
    return _accepted(partial(apply_dropconnect, model, targets, p=P), model, found) is not None


def _accepted(verb: Callable[..., Any], model: nn.Module, found: Found) -> Any:
    """What a verb returns once all that it refuses is excluded; None if nothing is left."""
    exclude: list[str] = []
    for _ in range(60):
        try:
            return verb(exclude=exclude or None)
        except NoMatchError:
            return None
        except SurgeryError as error:
            problems = [p for p in _PROBLEM.findall(str(error)) if p[0] != "..."]
            if not problems:
                raise Failed(f"a refusal that names no site: {error}") from error
            for site, cls, rule in problems:
                found.refused[site] = f"{cls}: {rule}"
                exclude.append(_exclusion(model, site))
            if any("is parametrized" in rule for _, _, rule in problems):
                exclude += _parametrized(model, found, problems[0][2])
    raise Failed("refusals without end")


def _parametrized(model: nn.Module, found: Found, rule: str) -> list[str]:
    """Exclusions of all that is refused for the same reason: an error names eight."""
    names = [name for name, one in model.named_modules() if is_parametrized(one)]
    found.refused |= {f"{name}.weight": f": {rule}" for name in names}
    return [f"re:{re.escape(name)}" for name in names]


def _exclusion(model: nn.Module, site: str) -> str:
    """What leaves a site out: its name, or that of its module where it is no parameter any more."""
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return f"re:{re.escape(site if site in known else site.rpartition('.')[0])}"


def evaluated(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The tensors that `eval()` gives, with one seed."""
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors_of(model.eval()(**inputs))


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in an output: in containers, and in objects that have some as attributes."""
    found: list[Tensor] = []
    queue, seen = [output], set()
    for item in queue:
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, Mapping):
            queue += item.values()
        elif isinstance(item, (list, tuple)):
            queue += item
    return found


def same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether all entries are equal; not a number equals itself."""
    return len(some) == len(others) and all(
        one.shape == other.shape and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
        for one, other in zip(some, others)
    )


def _evaluates(model: nn.Module, inputs: Inputs, expected: list[Tensor] | None) -> None:
    if expected is not None and not same(evaluated(model, inputs), expected):
        raise Failed("eval() of the operated model is not that of the plain one")


def _saved(model: nn.Module, folder: Path, found: Found) -> dict[str, Tensor] | None:
    """What the plain model writes; None if it cannot be saved."""
    try:
        model.save_pretrained(folder)
    except Exception as error:
        found.left_out.append(f"the plain model is not saved: {line_of(error)}")
        return None
    return _tensors_in(folder)


def _tensors_in(folder: Path) -> dict[str, Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def _compare_saved(model: nn.Module, folder: Path, saved: dict[str, Tensor], found: Found) -> None:
    """The files of the operated model are those of the plain one, and load as they do."""
    model.save_pretrained(folder / "operated")
    files = _tensors_in(folder / "operated")
    if list(files) != list(saved) or not same([*files.values()], [*saved.values()]):
        raise Failed("save_pretrained did not write the plain weights")
    if _config_in(folder / "operated") != _config_in(folder / "plain"):
        raise Failed("save_pretrained did not write the plain config")
    mine = plain_state_dict(model)
    try:
        given = _loaded(model, folder / "operated")
        if list(given) == list(mine) and same([*given.values()], [*mine.values()]):
            return
    except Exception:
        given = {}
    try:
        expected = _loaded(model, folder / "plain")
    except Exception as error:
        found.left_out.append(f"what the plain model wrote does not load: {line_of(error)}")
        return
    if list(given) != list(expected) or not same([*given.values()], [*expected.values()]):
        raise Failed("what save_pretrained wrote does not load as what the plain model wrote")


def _config_in(folder: Path) -> str:
    return (folder / "config.json").read_text(encoding="utf-8")


def _loaded(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    torch.manual_seed(0)  # weights that a file has not are drawn
    state: dict[str, Tensor] = _plain_class(model).from_pretrained(folder).state_dict()
    return state


def _plain_class(model: Any) -> Any:
    made = getattr(type(model), "_dropconnect_class", None)
    return type(model) if made is None else made[0]


def _changes_itself(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a forward of the plain model changes attributes: then a snapshot tells nothing."""
    before = Snapshot(model)
    evaluated(model, inputs)
    return before != Snapshot(model)


def trained(model: nn.Module, inputs: Inputs) -> None:
    """One training forward and backward, from one seed; gradients are new."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    outputs = tensors_of(model.train()(**inputs))
    learned = [one for one in outputs if one.requires_grad and one.is_floating_point()]
    total = sum((one.float() ** 2).sum() + one.float().sum() for one in learned)
    if not isinstance(total, Tensor):
        raise Failed("no output requires a gradient")
    total.backward()


def _train(model: nn.Module, inputs: Inputs, plan: Plan, found: Found) -> None:
    identities = {name: id(parameter) for name, parameter in _named(model)}
    apply_dropconnect(model, plan)
    try:
        with recorded_keys() as keys, warned() as messages:
            trained(model, inputs)
    except Exception:
        strip_dropconnect(model)
        try:
            trained(model, inputs)
        except Exception as error:
            why = f"the plain model does not train with these inputs: {line_of(error)}"
            found.left_out.append(why)
            return
        raise
    if messages:
        raise Failed(messages[0])
    gradients = {name: parameter.grad for name, parameter in _named(model)}
    strip_dropconnect(model)
    if identities != {name: id(parameter) for name, parameter in _named(model)}:
        raise Failed("strip after training did not give back the parameters")
    for site in plan:
        names = [site.name, *site.shared_with]
        drawn = [key for name in names for key in keys.get(name, [])]
        grad = gradients[f"{site.name}_raw"]
        if grad is None:
            grad = torch.zeros(site.shape)
        if not drawn:
            if grad.count_nonzero():
                raise Failed(f"{site.name} ({site.kind}) is used in training and never dropped")
            continue  # a layer that these inputs do not reach, an expert that no token chose
        found.drew += 1
        if len(drawn) > FEW_DRAWS:
            continue
        dropped = torch.stack([keep(key, P, *site.shape) for key in drawn]).sum(0) == 0
        wrong = int(grad[dropped].count_nonzero())
        if wrong:
            of = int(dropped.sum())
            raise Failed(
                f"{site.name} ({site.kind}): {wrong} of {of} dropped entries have a gradient"
            )


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return model.named_parameters(remove_duplicate=False)


@contextmanager
def recorded_keys() -> Iterator[dict[str, list[Tensor]]]:
    """The keys that forwards draw inside, by the plain dotted name of the place."""
    keys: dict[str, list[Tensor]] = {}
    with pytest.MonkeyPatch.context() as patch:
        note_keys(patch, lambda name, key: keys.setdefault(name, []).append(key))
        yield keys


@contextmanager
def warned() -> Iterator[list[str]]:
    """What surgery warns of inside."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(w.message) for w in caught if "not dropped" in str(w.message)]


def line_of(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
