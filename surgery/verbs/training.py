"""What a training loop does with DropConnect, whoever runs the loop: the callbacks of transformers and
of Lightning are made of this."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..modules.own_generator import as_generator
from ..modules.places import places, states_in
from ..modules.state import change_p
from ..modules.walk import modules_of
from ..operating.surgeon import can_undo
from ..operating.suspend import suspended
from ..planning.in_place import unused_sites
from ..spec.config import DropConnectConfig
from ..spec.errors import SurgeryError
from ..spec.forms import counted
from ..spec.plan import Plan, Site
from .apply import apply_dropconnect, dropconnect_sites, plan_dropconnect, strip_dropconnect
from .checkpoint import anchors
from .schedules import Schedule, make_schedule


class Training:
    """DropConnect in the models that one training loop trains.

    Args:
        targets, p, exclude, config, generator, options: as for `apply_dropconnect`; p is 0.1 unless
            given here or by `config`. None for targets means the sites that are in place, and
            `"all-linear"` if there are none.
        schedule, warmup: see `make_schedule`.
        strip_at_end: take DropConnect out when training ends.
    """

    def __init__(
        self,
        targets: Any,
        p: float | None,
        exclude: Any,
        config: DropConnectConfig | None,
        schedule: str | Schedule,
        warmup: float,
        strip_at_end: bool,
        generator: torch.Generator | int | None,
        options: Mapping[str, Any],
    ) -> None:
        self.targets = targets
        self.exclude = exclude
        self.has_options = p is not None or config is not None or bool(options)
        base = config if config is not None else DropConnectConfig(p=0.1)
        self.config = base.replace(**options if p is None else {"p": p, **options})
        self.schedule = make_schedule(schedule, warmup)
        self.moves_p = schedule != "constant" or warmup > 0.0
        self.strip_at_end = strip_at_end
        self.generator = as_generator(generator)
        self._looked_for_unused = False
        self._done: weakref.ref[nn.Module] | None = None
        """The model that was seen to: it may be trained again."""

    def apply(self, model: nn.Module) -> None:
        """Put in place what is missing.

        Raises:
            SurgeryError: a site is in place with other options.
        """
        sites = dropconnect_sites(model)
        if not sites.sites:
            apply_dropconnect(
                model,
                self._wants,
                exclude=self.exclude,
                config=self.config,
                generator=self.generator,
            )
        elif self._done is None or self._done() is not model:
            have = {name: site for site in sites for name in (site.name, *site.shared_with)}
            wanted = self._wanted(model, sites)
            check = self.targets is not None or self.has_options
            wrong = [one for one in wanted if check and _differs(have.get(one.name), one)]
            if wrong:
                raise SurgeryError(
                    f"{wrong[0].name} has DropConnect already, with {have[wrong[0].name].config}, and "
                    f"this callback is for {wrong[0].config}; give both the same, or exclude it here, "
                    "or call strip_dropconnect first"
                )
            missing = Plan(tuple(one for one in wanted if one.name not in have))
            if missing.sites:
                apply_dropconnect(model, missing, generator=self.generator)
        self._done = weakref.ref(model)

    def wants_anchors(self, model: nn.Module) -> bool:
        """Whether the model has anchors, or would have."""
        if dropconnect_sites(model):
            return bool(anchors(model))
        plan = plan_dropconnect(model, self._wants, exclude=self.exclude, config=self.config)
        return any(site.config.toward == "pretrained" for site in plan)

    def move_p(self, model: nn.Module, done: float) -> None:
        """Move p as the schedule says: every site's own, by the same factor.

        Args:
            done: 0 at the first step of training, 1 at the last.
        """
        if self.moves_p:
            change_p(states_in(model), factor=self.schedule(done))

    def look_for_unused(self, model: nn.Module, compiled: bool) -> None:
        """After the first step, warn of sites that never dropped anything."""
        if self._looked_for_unused:
            return
        if any(site.p > 0 for site in states_in(model)):
            self._looked_for_unused = True
            unused = unused_sites(model, compiled=compiled)
            if unused:
                warnings.warn(
                    f"the first training step did not use {counted(len(unused), 'DropConnect site')}, "
                    f"the first is {unused[0]!r}: exclude them, or check that the model calls them",
                    stacklevel=3,
                )

    def end(self, model: nn.Module) -> None:
        """Give every site its full p again; strip, if asked to."""
        change_p(states_in(model))
        if self.strip_at_end and dropconnect_sites(model):
            strip_dropconnect(model)

    def _wanted(self, model: nn.Module, sites: Plan) -> Plan:
        """The sites that a model should have which has some."""
        if self.targets is None:
            return Plan(tuple(dataclasses.replace(one, config=self.config) for one in sites))
        if not can_undo(model):  # FSDP holds it: no site can be added
            return Plan()
        return suspended(
            model,
            lambda: plan_dropconnect(model, self.targets, exclude=self.exclude, config=self.config),
        )

    @property
    def _wants(self) -> Any:
        return "all-linear" if self.targets is None else self.targets


def _differs(there: Site | None, wanted: Site) -> bool:
    """Whether a site is in place with other options; what `eval()` does may be changed at any time."""
    if there is None:
        return False
    same = wanted.config.replace(inference=there.config.inference, samples=there.config.samples)
    return same != there.config


def rates(model: nn.Module) -> dict[str, float]:
    """What to log beside a loss; nothing for a model without DropConnect.

    `dropconnect_p` is the greatest p of any site now. `dropconnect_fraction` is the share of all
    parameters of the model that one training forward drops on average: the sum over sites of p times
    the size of the weight, divided by the number of parameters. A site with `sampling="gaussian"`
    counts as the masks whose noise it draws.
    """
    at = list(places(model))
    if not at:
        return {}
    sizes = {
        id(one): one.numel()
        for module in modules_of(model)
        for one in module._parameters.values()
        if one is not None
    }
    dropped = {id(place.raw): place.state.p * sizes.get(id(place.raw), 0) for place in at}
    total = max(sum(sizes.values()), 1)
    return {
        "dropconnect_p": max(place.state.p for place in at),
        "dropconnect_fraction": sum(dropped.values()) / total,
    }
