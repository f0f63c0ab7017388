"""DropConnect for the length of a `with`."""

from __future__ import annotations

from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from ..base.journal import Reversible, Step, surely
from ..modules.places import carriers
from ..modules.walk import named_modules
from ..spec.config import DropConnectConfig
from ..spec.errors import SurgeryError
from .apply import apply_dropconnect, strip_dropconnect

Model = TypeVar("Model", bound=nn.Module)


class dropconnect(Reversible, Generic[Model]):
    """A context manager: DropConnect is in place inside, and taken out at the end, also after an error.

        with dropconnect(model, ["*.fc*"], p=0.3):
            train(model)
        model.save_pretrained("out")                    # the plain model

    `as` gives the model. It is stripped of all that is in place at the end, also of what was put in
    inside; if nothing is any more, that is no error. The object can be entered again.

    Entered by hand, hold the object: the block ends when Python frees it, so that an interrupt which
    comes before the block begins leaves nothing behind. `contextlib.ExitStack` holds it.

    Args:
        model: a model without DropConnect.
        targets, p, exclude, config, example_inputs, generator, **options: as for
            `surgery.apply_dropconnect`. They are looked at when the block is entered.

    Raises:
        SurgeryError, ValueError, TypeError: as `surgery.apply_dropconnect`, when the block is entered;
            also if the model has DropConnect already. As `surgery.strip_dropconnect`, when it is left.
    """

    def __init__(
        self,
        model: Model,
        targets: Any,
        p: float | None = None,
        *,
        exclude: Any = None,
        config: DropConnectConfig | None = None,
        example_inputs: Any = None,
        generator: torch.Generator | int | None = None,
        **options: Any,
    ) -> None:
        self._model = model
        self._apply: Step = partial(
            apply_dropconnect,
            model,
            targets,
            p,
            exclude=exclude,
            config=config,
            example_inputs=example_inputs,
            generator=generator,
            **options,
        )

    def enter(self) -> tuple[Step, Step]:
        if carriers(named_modules(self._model)):
            raise SurgeryError(
                f"{type(self._model).__name__} has DropConnect in place, which the end of this block "
                "would take out too: add sites to it with apply_dropconnect, or strip it first"
            )
        return self._apply, partial(surely, partial(_take_out, [self._model]))

    def __enter__(self) -> Model:  # type: ignore[override]
        """Put DropConnect in place.

        Returns:
            the model.
        """
        super().__enter__()
        return self._model


def _take_out(entered: list[nn.Module]) -> None:
    """Strip the model of a block that is left. Once: Python closes the object again when it frees it,
    and by then the model may have been operated on anew."""
    for model in entered:
        strip_dropconnect(model, missing_ok=True)
    entered.clear()
