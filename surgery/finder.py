"""How the core asks what a model does with its weights; `surgery.transforms` answers by looking on
while the model runs once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .config import DropConnectConfig
from .errors import SurgeryError
from .moments.elementwise import JOINT
from .plan import Use

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Seen:
    """What one run of a model showed."""

    uses: Mapping[str, tuple[Use, ...]]
    """By the dotted plain name of every parameter."""

    input_shapes: Mapping[str, tuple[Shape | None, ...]]
    """For each use, the shape of what the weight acts on, where it is known."""

    batch: Shape | None
    """Shape of the first tensor among the inputs, if the user gave them."""

    running: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    """By the dotted plain name of every parameter: for each place of use, the names of the modules
    whose forward was running, the outermost first."""

    def problem(self, name: str, config: DropConnectConfig) -> str | None:
        """Why what was seen does not allow this, and what to do about it; or None."""
        for use, shape in zip(self.uses.get(name, ()), self.input_shapes.get(name, ())):
            problem = _joint(use, config) or _batch_elsewhere(use, config, shape, self.batch)
            if problem is not None:
                return problem
        return None


def _joint(use: Use, config: DropConnectConfig) -> str | None:
    if config.inference != "moments" or config.samples is not None or use.activation not in JOINT:
        return None
    return (
        f"inference='moments' needs an elementwise activation, and its {use.op} in {use.by!r} is "
        f"followed by {use.activation}; give samples=Z to estimate it by draws, or use "
        "inference='mean' for it"
    )


def _batch_elsewhere(
    use: Use, config: DropConnectConfig, shape: Shape | None, batch: Shape | None
) -> str | None:
    dim = config.example_dim
    if config.sampling != "example" or dim == "all" or shape is None or batch is None:
        return None
    if not -len(shape) <= dim < len(shape) or not -len(batch) <= dim < len(batch):
        return None
    if shape[dim] == batch[dim]:
        return None
    return (
        f"sampling='example' takes dimension {dim} of its input for the examples; its {use.op} in "
        f"{use.by!r} gets shape {shape}, but the model's input has shape {batch}. Set example_dim "
        "('all': a mask for every row), or exclude it"
    )


Finder = Callable[[Any, Any], "Seen | None"]

_finders: list[Finder] = []


def register_finder(finder: Finder) -> None:
    """Called by the plugin.

    `finder(model, example_inputs)` runs the model once. Without `example_inputs` it returns None
    unless it can make them itself.
    """
    _finders[:] = [finder]


def look(model: Any, example_inputs: Any) -> Seen | None:
    """Run the model once and see what it does; None if there is nothing to run it with.

    Raises:
        SurgeryError: the model does not run with `example_inputs`, or there is nobody to look.
    """
    if _finders:
        return _finders[0](model, example_inputs)
    if example_inputs is None:
        return None
    raise SurgeryError("example_inputs needs surgery.transforms, which is not installed")


class Look:
    """A run of a model, made when somebody asks for it, once."""

    def __init__(self, model: Any, example_inputs: Any) -> None:
        self._model, self._inputs = model, example_inputs
        self._seen: Seen | None = None
        self._looked = False

    def __call__(self) -> Seen | None:
        """What a run shows: with the inputs that the user gave, or of a transformers model with
        dummies; None if there is nothing to run it with.

        Raises:
            SurgeryError: the model does not run with the inputs that were given.
        """
        if not self._looked:
            self._seen = look(self._model, self._inputs)
            self._looked = True
        return self._seen

    def given(self) -> Seen | None:
        """What a run with the user's inputs shows; None if there are none."""
        return None if self._inputs is None else self()

    @property
    def uses(self) -> Mapping[str, tuple[Use, ...]]:
        """The uses that were seen so far."""
        return {} if self._seen is None else self._seen.uses
