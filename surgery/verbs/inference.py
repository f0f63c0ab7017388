"""What `eval()` does, changed on a model that is already operated."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from ..base.journal import Changes, Reversible, Step, at_once
from ..modules.places import Place, moved_by, places, without_moments
from ..modules.state import SiteState
from ..modules.walk import unwrapped
from ..operating.scopes import rescope
from ..planning.catalogue import Catalogue
from ..planning.in_place import states_named
from ..planning.refusals import not_followed
from ..spec.config import Inference
from ..spec.errors import SurgeryError
from ..spec.forms import counted


class set_inference(Reversible):
    """Change what `eval()` does, in place; as a context manager, until exit.

        set_inference(model, "moments")                 # from now on
        with set_inference(model, "sample"):            # only inside
            ...

    With `"moments"`, mean and variance travel from operation to operation until the outermost forward
    ends, and that returns the expectation: `predict_moments(...).mean`, to the bit. A part that is
    called alone returns its own. Gradients flow; `torch.compile` and `torch.export` make one graph.

    Args:
        model: operated; compiled models recompile once for each mode.
        mode: `"mean"` (the weight as it is), `"moments"` (the expectation over the masks) or
            `"sample"` (keep dropping).
        samples: for `"moments"`, that many draws of each pre-activation go through the activation that
            follows, and their mean goes on: the paper's inference (Wan et al. 2013, section 3.2). None
            draws nothing.
        targets: which sites, as in `apply_dropconnect`; None means all.

    Raises:
        NotOperatedError: the model, or a parameter that `targets` names, has no DropConnect.
        SurgeryError: `"moments"` for a site that is not the weight of a linear layer or convolution;
            the model is unchanged.
        ValueError: the mode is unknown, or `samples` does not go with it.
    """

    def __init__(
        self, model: nn.Module, mode: Inference, samples: int | None = None, targets: Any = None
    ) -> None:
        self._model = unwrapped(model)
        states = states_named(model, targets)
        for state in states:  # raises if they do not go together
            state.config.replace(inference=mode, samples=samples)
        if mode == "moments":
            _check_moments(self._model, states, samples is not None)
            _check_followed(self._model, states)
        self._states, self._mode, self._samples = states, mode, samples
        changes, self._back = self._changes()
        changes.make()
        self._is_set = True

    def _changes(self) -> tuple[Changes, Step]:
        """What sets the mode, and a step that sets what was before."""
        changes, before, configs = Changes(), Changes(), {}
        for state in self._states:
            changes.put(state.__dict__, state.with_inference(self._mode, self._samples))
            before.put(state.__dict__, state.with_inference(state.inference, state.samples))
            configs[id(state)] = state.config.replace(inference=self._mode, samples=self._samples)
        rescope(changes, self._model, configs)
        # Listed twice: if an interrupt ends the first, the second runs when Python frees this object.
        # So nothing here may refer to it.
        return changes, at_once([before.at_once(), *[partial(_rescope_now, self._model)] * 2])

    def enter(self) -> tuple[Step, Step]:
        if self._is_set:
            self._is_set = False
            return at_once([]), self._back
        changes, back = self._changes()  # the second `with` of one object
        return changes.at_once(), back


def _rescope_now(model: nn.Module) -> None:
    changes = Changes()
    rescope(changes, model)
    changes.make()


def _check_followed(model: nn.Module, states: list[SiteState]) -> None:
    catalogue, named = Catalogue(model), set(map(id, states))
    for place in places(model):
        if id(place.state) not in named:
            continue
        problem = not_followed(catalogue, catalogue.of(place.owner))
        if problem is not None:
            raise SurgeryError(f"{place.state.site}: {problem}. The model is unchanged")


def _check_moments(model: nn.Module, states: list[SiteState], draws: bool) -> None:
    named = set(map(id, states))
    chosen = [place for place in places(model) if id(place.state) in named]
    without = [place.state.site for place in chosen if not _has_moments(place, named, draws)]
    if without:
        raise SurgeryError(
            "inference='moments' needs a forward that is a product of input and weight, or that of an "
            "attention, a recurrent layer or an embedding of torch without samples=, and for a "
            f"convolution another unit than 'input'; {counted(len(without), 'site')} without, the "
            f"first is {without[0]!r}. Name the others in targets, or use 'sample'. The model is "
            "unchanged"
        )


def _has_moments(place: Place, named: set[int], draws: bool) -> bool:
    """Whether mean and variance are known: of the bias of a product, with its weight."""
    by = moved_by(place)
    return id(by) in named and without_moments(by, draws) is None
