"""What is told of the uses of every parameter of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from surgery.planning.runs import Act
from surgery.spec.plan import Use

from ..capture.capture import Capture

Shape = tuple[int, ...]


@dataclass(eq=False, repr=False)
class Findings(Mapping[str, tuple[Use, ...]]):
    """The uses of every parameter, by its dotted name in the plain model. `print(findings)` shows a
    table. Tied parameters have the same uses under each of their names."""

    _uses: dict[str, tuple[Use, ...]]

    input_shapes: dict[str, tuple[Shape | None, ...]]
    """For each use of a parameter, the shape of what the weight acts on, at its first call; None where
    the graph does not know shapes (`symbolic_trace`)."""

    tied: tuple[tuple[str, ...], ...]
    """Groups of names of the same parameter."""

    capture: Capture | None
    """How the graph was captured; None for a graph of other origin."""

    running: dict[str, tuple[tuple[str, ...], ...]]
    """For each parameter and place where it is used, the names of the modules whose forward is running
    there, the outermost first; the root is `""`."""

    acts: dict[str, tuple[Act, ...]]
    """For each parameter, every different way in which it acted; see `surgery.planning.runs`."""

    @property
    def unused(self) -> tuple[str, ...]:
        """The parameters that no torch function was seen to use in this run. What an extension does
        outside torch's functions cannot be seen."""
        return tuple(name for name, uses in self._uses.items() if not uses)

    def __getitem__(self, name: str) -> tuple[Use, ...]:
        return self._uses[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._uses)

    def __len__(self) -> int:
        return len(self._uses)

    def __str__(self) -> str:
        width = max((len(name) for name in self), default=0)
        lines = [f"{name.ljust(width)}  {_listed(uses)}" for name, uses in self.items()]
        return "\n".join([*([] if self.capture is None else [str(self.capture)]), *lines])


def _listed(uses: tuple[Use, ...]) -> str:
    words = [
        f"{use} by {use.by or '(root)'}" + (f" -> {use.activation}" if use.activation else "")
        for use in uses
    ]
    return ", ".join(words) or "unused"
