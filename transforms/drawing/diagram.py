"""What a picture is made of: boxes, arrows between them, and frames around repeated layers."""

from __future__ import annotations

from dataclasses import dataclass, field

from .outline import Part, Weight


@dataclass(frozen=True)
class Box:
    """What is drawn as one box."""

    key: str
    title: str
    kind: str = ""
    """Class of the module, or the operation; may be empty."""
    role: str = "module"
    """`module`, `op`, `symbol` (a sum), `input` or `output`."""
    weights: tuple[Weight, ...] = ()
    path: str = ""
    """Dotted name of the module that it belongs to; the key starts with it."""
    frames: tuple[str, ...] = ()
    """Paths of the repeated layers that it is in, outermost first."""


@dataclass
class Diagram:
    """Boxes in the order in which they run, arrows between them, and frames of repeated layers."""

    boxes: dict[str, Box] = field(default_factory=dict)
    arrows: dict[tuple[str, str], None] = field(default_factory=dict)
    """An ordered set."""
    frames: dict[str, Part] = field(default_factory=dict)
    """Repeated layers, by path."""
