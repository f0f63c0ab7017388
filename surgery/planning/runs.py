"""How the core asks what a model does with its weights; `surgery.transforms` answers by looking on
while the model runs once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..kinds.examples import where_examples_lie
from ..kinds.product import Product
from ..spec.config import DropConnectConfig
from ..spec.errors import SurgeryError
from ..spec.plan import Use

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Act:
    """One way in which a weight acted in a run of a model."""

    op: str
    by: str
    """As in `Use`."""
    shape: Shape | None
    """Of what it acts on: of the input of its module, if that is a product of input and weight."""


@dataclass(frozen=True)
class Run:
    """What one run of a model showed."""

    uses: Mapping[str, tuple[Use, ...]]
    """By the dotted plain name of every parameter."""

    acts: Mapping[str, tuple[Act, ...]]
    """By the same names: every different one."""

    given: tuple[Shape, ...]
    """Shapes of the tensors that the model was given, if the user gave them."""

    running: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    """By the dotted plain name of every parameter: for each place of use, the names of the modules
    whose forward was running, the outermost first."""

    def problem(
        self, name: str, config: DropConnectConfig, product: Product, by: Collection[str]
    ) -> str | None:
        """Why what the run showed does not allow this, and what to do about it; or None.

        Args:
            name: of the parameter.
            config: what is to be done to it.
            product: what its module or node computes.
            by: names of the modules whose forward does.
        """
        for act in self.acts.get(name, ()):
            if act.by in by:
                problem = self._elsewhere(act, config, product)
                if problem is not None:
                    return problem
        return None

    def _elsewhere(self, act: Act, config: DropConnectConfig, product: Product) -> str | None:
        if config.sampling != "example" or act.shape is None or not self.given:
            return None
        return where_examples_lie(act.shape, config.example_dim, product.features, self.given)[1]


Runner = Callable[[Any, Any], "Run | None"]

_runners: list[Runner] = []


def register_runner(runner: Runner) -> None:
    """Called by the plugin.

    `runner(model, example_inputs)` runs the model once. Without `example_inputs` it returns None
    unless it can make them itself. It raises a `SurgeryError` if the model does not run with them.
    """
    _runners[:] = [runner]


register_finder = register_runner
"""The name that it had before."""


class RunOnce:
    """A run of a model, made when somebody asks for it, once."""

    def __init__(self, model: Any, example_inputs: Any) -> None:
        self._model, self._inputs = model, example_inputs
        self._run: Run | None = None
        self._done = False

    def __call__(self) -> Run | None:
        """What the run showed: with the inputs that the user gave, or of a transformers model with
        dummies; None if there is nothing to run it with.

        Raises:
            SurgeryError: the model does not run with the inputs that were given, or there are some
                and nobody to run it.
        """
        if not self._done:
            if _runners:
                self._run = _runners[0](self._model, self._inputs)
            elif self._inputs is not None:
                raise SurgeryError(
                    "example_inputs needs surgery.transforms, which is not installed"
                )
            self._done = True
        return self._run

    def given(self) -> Run | None:
        """What a run with the user's inputs showed; None if there are none."""
        return None if self._inputs is None else self()

    @property
    def uses(self) -> Mapping[str, tuple[Use, ...]]:
        """The uses that are known so far."""
        return {} if self._run is None else self._run.uses
