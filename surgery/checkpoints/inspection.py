"""What a checkpoint holds, from its headers alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..spec.errors import printable
from ..spec.forms import counted
from ..spec.plan import Plan, as_text
from .roles import Role, Roles, missing_sites
from .weights import Weights, read_weights


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint."""

    key: str
    role: Role
    """`"raw"`: a weight while DropConnect is in place. `"anchor"`: where it goes when it is dropped.
    `"plain"`: anything else."""
    dtype: str
    """As safetensors names it: `F32`, `BF16`, ..."""
    shape: tuple[int, ...]
    bytes: int
    file: str
    """Name of the file that holds it."""

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**vars(self), "shape": list(self.shape)}


@dataclass(frozen=True)
class Inspection:
    """What `inspect_checkpoint` found. `print(inspection)` shows a table."""

    path: Path
    tensors: tuple[StoredTensor, ...]
    """In the order of the files."""
    plan: Plan | None
    """What `dropconnect.json` beside the files says; None if there is none."""
    anchors: str | None
    """The file of anchors that belongs to the plan."""
    metadata: dict[str, str]
    """Of all headers."""
    notes: tuple[str, ...]
    """What does not go together."""

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors)

    def count(self, role: Role) -> int:
        """How many tensors have a role."""
        return sum(tensor.role == role for tensor in self.tensors)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "path": str(self.path),
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "counts": {role: self.count(role) for role in ("plain", "raw", "anchor")},
            "bytes": self.bytes,
            "plan": None if self.plan is None else self.plan.to_json(),
            "anchors": self.anchors,
            "metadata": self.metadata,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        several = len({tensor.file for tensor in self.tensors}) > 1
        rows = [("key", "role", "dtype", "shape", "size", *(["file"] if several else []))]
        for one in self.tensors:
            size = human(one.bytes)
            cells = printable(one.key), one.role, one.dtype, as_text(one.shape), size
            rows.append((*cells, *([one.file] if several else [])))
        lines = table(rows)
        kinds = [f"{self.count(role)} {role}" for role in ("raw", "plain", "anchor")]
        types = Counter(tensor.dtype for tensor in self.tensors)
        lines.append(
            f"{counted(len(self.tensors), 'tensor')} ({', '.join(kinds)}), {human(self.bytes)}, "
            f"{', '.join(sorted(types)) or 'no dtype'}"
        )
        lines += [f"metadata {printable(k)}: {printable(v)}" for k, v in self.metadata.items()]
        if self.plan is not None:
            lines += ["", f"the plan beside it{self._anchored()}:", str(self.plan)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _anchored(self) -> str:
        return "" if self.anchors is None else f", with its anchors in {self.anchors}"


def inspect_checkpoint(path: str | os.PathLike[str]) -> Inspection:
    """Say what a checkpoint holds: which keys are raw, plain and anchors, of which dtype and size, and
    the plan that lies beside. Only headers are read, so that it takes as long for any size.

    Args:
        path: a safetensors file, an index of several, or a folder with one checkpoint.

    Raises:
        SurgeryError: there is no checkpoint, a file of it is damaged, or they do not go together.
        OSError: one cannot be read.

    Example:
        >>> print(inspect_checkpoint("out"))
    """
    weights = read_weights(Path(path))
    roles = Roles(weights.tensors(), weights.plan)
    tensors = tuple(
        StoredTensor(key, roles[key], entry.dtype, entry.shape, entry.bytes, name)
        for name, key, entry in weights.entries()
    )
    metadata = {
        key: value
        for header in weights.headers.values()
        for key, value in (header.metadata or {}).items()
    }
    notes = tuple(_notes(weights, roles))
    anchors = None if weights.anchors is None else weights.anchors["file"]
    return Inspection(Path(path), tensors, weights.plan, anchors, metadata, notes)


def _notes(weights: Weights, roles: Roles) -> list[str]:
    notes = []
    keys = [key for _, key, _ in weights.entries()]
    if weights.plan is not None:
        missing = missing_sites(weights.plan, roles, keys)
        if missing:
            lacks = counted(len(missing), "site")
            notes.append(f"the plan has {lacks} of which nothing is stored: {missing[:4]}")
    taken = [key for key in roles.keys("raw") if roles.plain(key) in keys]
    if taken:
        notes.append(f"{counted(len(taken), 'raw key')} with the plain key beside: {taken[:4]}")
    return notes


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * w for w in widths), *lines[1:]]


def human(count: int) -> str:
    """A number of bytes, short."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count} B"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:,.3g} GB"
