"""The public verbs."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..base.journal import Changes, Reversible, Step
from ..base.plugins import load_plugins
from ..modules.masking import Operand, draw_keys
from ..modules.own_generator import as_generator, draw_from
from ..modules.places import Place, carriers, places
from ..modules.state import change_p
from ..modules.walk import named_modules
from ..operating.surgeon import operate, undo
from ..ops import release
from ..ops.hash import key_tensor
from ..planning.in_place import current_plan, states_named, unused_sites, was_trained
from ..planning.prepare import Prepared, prepare
from ..planning.runs import RunOnce
from ..spec.config import DropConnectConfig, check_p
from ..spec.errors import NotOperatedError, SurgeryError
from ..spec.forms import counted
from ..spec.plan import Plan
from ..torch_private.modes import outside_of_inference
from .raw_files import remember

Model = TypeVar("Model", bound=nn.Module)


def plan_dropconnect(
    model: nn.Module,
    targets: Any,
    p: float | None = None,
    *,
    exclude: Any = None,
    config: DropConnectConfig | None = None,
    example_inputs: Any = None,
    generator: torch.Generator | int | None = None,
    **options: Any,
) -> Plan:
    """The sites that `apply_dropconnect` with the same arguments would operate on.

    Changes nothing. Arguments and errors are those of `apply_dropconnect`. With `example_inputs`, and
    for a transformers model on a dummy batch without, the model runs once, and the plan says which
    operations use each weight and which activation follows (`Site.uses`).
    """
    load_plugins()
    run = RunOnce(model, example_inputs)
    run()  # whether or not a decision depends on it: the plan shows the uses
    return _prepare(model, targets, p, exclude, config, generator, options, run).plan()


def apply_dropconnect(
    model: Model,
    targets: Any,
    p: float | None = None,
    *,
    exclude: Any = None,
    config: DropConnectConfig | None = None,
    example_inputs: Any = None,
    generator: torch.Generator | int | None = None,
    **options: Any,
) -> Model:
    """Put DropConnect on the weights that `targets` names, in place.

    In training, each forward call of a module uses `A + m * (W - A) / (1 - p)` for its weight `W`,
    with a fresh keep mask `m` (Wan et al. 2013, section 3, scaled so that the expectation is `W`).
    In `eval()` the model is the one it was, unless `inference="sample"`.

    The parameter is stored as `<name>_raw`; `module.<name>` still reads it. Nothing is copied, so an
    optimizer made before or after goes on working. A model that already has DropConnect is extended
    by sites it does not have.

    Args:
        model: any `torch.nn.Module`. It is changed only if the whole plan can be carried out.
        targets: what to drop. One of, or a list of:

            * a glob over module names (`"*.fc*"`, which also finds `fc1` at the root), meaning the
              weights which that kind of module drops by default: no biases, no norms, and for an
              RNN its `weight_hh`. A glob that matches no module is tried on parameter names, and
              then means exactly those (`"*.weight_ih_l0"`).
            * `"re:..."`, a regular expression that must match the whole name, otherwise the same.
            * a module class.
            * `"all-linear"`: every Linear and transformers Conv1D except the output head.
            * a function `(name, module) -> bool`, asked of every module with its dotted name: those
              for which it returns True.

            Or a mapping of any of these to a p or a `DropConnectConfig` (the first match counts),
            or a `Plan`.
        p: probability of dropping, in [0, 1], of every target that does not bring its own. Default
            0.5.
        exclude: what not to drop, in the same forms. A module's name excludes all it owns. Of a tied
            weight, the users that are not excluded drop.
        config: all options at once; `p` and `options` replace its fields.
        example_inputs: a tensor, a tuple of positional arguments or a mapping of keyword arguments to
            run the model with once, in `eval()`, before anything is changed. What is seen (a weight
            that a helper function reads, where the batch lies, what follows a weight) is then
            checked before surgery instead of at the first forward. Without, a transformers model runs
            on a dummy batch if the source of its forwards leaves open who reads a weight.
        generator: where the masks of these sites come from: a `torch.Generator` that only they use, or
            a seed for a new one on the CPU. They do not depend on what else draws random numbers then,
            and nothing else depends on them. `save_dropconnect` saves its state, a copy of the model
            has a copy of it, and activation checkpoints have the same masks again. Compiled graphs
            break at each site; CUDA graphs and `torch.export` in training are refused. None: torch's
            own generator of the device.
        **options: fields of `DropConnectConfig`: `unit`, `toward`, `sampling`, `example_dim`,
            `inference`, `samples`, `bias`, `ranks`.

    Returns:
        the same model.

    Raises:
        NoMatchError: a pattern matches nothing; the message lists the nearest names.
        SurgeryError: a site cannot be operated on (already operated, quantised, sharded, read by
            nothing, ...); the message names the site, the rule and the fix.
        ValueError, TypeError: an option has a wrong value, or is given twice.

    Example:
        >>> model = torch.nn.Sequential(OrderedDict(fc1=nn.Linear(8, 8), fc2=nn.Linear(8, 2)))
        >>> apply_dropconnect(model, targets=["*.fc*"], p=0.3)
    """
    load_plugins()
    run = RunOnce(model, example_inputs)
    prepared = _prepare(model, targets, p, exclude, config, generator, options, run)
    operate(prepared)
    remember(model)
    return model


def strip_dropconnect(model: Model, *, missing_ok: bool = False) -> Model:
    """Take DropConnect out of `model`, in place: the exact inverse of `apply_dropconnect`.

    Every parameter is the same object under its old name and at its old place; classes, hooks and
    tying are as before. Where sites are gone since (with a part that was replaced), what was changed
    around them is made plain.

    Args:
        model: operated.
        missing_ok: whether a model without DropConnect is returned as it is, for scripts that do not
            know whether there is any.

    Returns:
        the same model.

    Raises:
        NotOperatedError: no DropConnect is in place, and `missing_ok` is False.
        SurgeryError: something else changed the class of a module since (`fully_shard`).

    Warns (`UserWarning`) of sites that never dropped anything although the model was trained: it does
    not use them, or uses them in a way that the plan did not see.
    """
    modules = named_modules(model)
    if missing_ok and not carriers(modules):
        return model
    unused = unused_sites(model) if was_trained(modules) else []
    undo(model, modules)
    release()
    if unused:
        warnings.warn(
            f"{counted(len(unused), 'DropConnect site')} never dropped anything, the first is "
            f"{unused[0]!r}: exclude them, or check how the model reads them",
            stacklevel=2,
        )
    return model


def dropconnect_sites(model: nn.Module) -> Plan:
    """The sites that are in place in `model` now; an empty plan if there are none."""
    return current_plan(model)


def set_p(model: nn.Module, p: float, targets: Any = None) -> None:
    """Change the drop probability of sites in place, without recompiling compiled models.

    Args:
        p: probability of dropping, in [0, 1].
        targets: which sites, as in `apply_dropconnect`; None means all. A weight takes the bias that
            `bias=True` dropped with it along, and all its users if it is tied.

    Raises:
        NotOperatedError: the model, or a parameter that `targets` names, has no DropConnect.
    """
    value = check_p(p)
    change_p(states_named(model, targets), value)


class hold_masks(Reversible, contextlib.ContextDecorator):
    """Every mask drawn once, now, and used by every forward call until exit.

    For loops written by hand over cells, which need one mask for a whole sequence (Gal and Ghahramani
    2016; AWD-LSTM):

        with hold_masks(cell):
            for x in sequence:
                h = cell(x, h)

    Masked weights stay in memory until exit. With activation checkpointing, call `backward` inside.

    Raises:
        NotOperatedError: no DropConnect is in place.
        SurgeryError: a site has `sampling="gaussian"`.
        RuntimeError: masks are already held.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def enter(self) -> tuple[Step, Step]:
        at = list(places(self._model))
        if not at:
            raise NotOperatedError.none_in(self._model, " to hold")
        noisy = [place.state.site for place in at if place.state.sampling == "gaussian"]
        if noisy:
            raise SurgeryError(
                f"{noisy[0]}: sampling='gaussian' draws noise, which has no mask to hold; use "
                "sampling='example'"
            )
        if any(place.state.held_key is not None for place in at):
            raise RuntimeError(
                "hold_masks is already active on this model; leave that context first"
            )
        change, back = Changes(), Changes()
        with outside_of_inference():  # a backward may keep them
            keys = list(_keys_to_hold(at))
        for place, key in zip(at, keys):
            change.put(place.state.__dict__, {"held_key": key})
            back.put(place.state.__dict__, {"held_key": None, "held": None})
        return change.at_once(), back.at_once()


def _keys_to_hold(at: list[Place]) -> Iterator[Tensor]:
    """One key for each place, in order; a bias that goes with its weight has that one's."""
    for _, of_one in itertools.groupby(at, lambda place: id(place.owner)):
        keys = draw_keys([Operand(place.raw, place.state, None) for place in of_one])
        yield from map(key_tensor, keys)  # compiled graphs take tensors


def _prepare(
    model: nn.Module,
    targets: Any,
    p: float | None,
    exclude: Any,
    config: DropConnectConfig | None,
    generator: torch.Generator | int | None,
    options: dict[str, Any],
    run: RunOnce,
) -> Prepared:
    own = as_generator(generator)
    if isinstance(targets, Plan) and (p is not None or config is not None or options):
        raise ValueError("a Plan brings the p and the options of every site; give it alone")
    base = config if config is not None else DropConnectConfig()
    if p is not None:
        options = {"p": check_p(p), **options}
    config = base.replace(**options) if options else base
    prepared = prepare(model, targets, exclude, config, run)
    draw_from(prepared.states(), own)
    return prepared
