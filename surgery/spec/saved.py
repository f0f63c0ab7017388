"""`dropconnect.json`, which lies beside a checkpoint, and the file of anchors that it names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .errors import SurgeryError
from .forms import Reader, check_links, fields, file_name, maybe, migrated, read_json, text
from .plan import Plan

PLAN_FILE = "dropconnect.json"
ANCHORS_FILE = "dropconnect_anchors.safetensors"
"""The name of the file of anchors in the first release; now their digest comes before the dot."""

_ARE_ANCHORS = re.compile(r"dropconnect_anchors(-[0-9a-f]{16})?\.safetensors")


def are_anchors(name: str) -> bool:
    """Whether a file of this name holds anchors."""
    return _ARE_ANCHORS.fullmatch(name) is not None


def read_saved(
    path: Path, more: Mapping[str, Reader[Any]] = MappingProxyType({})
) -> Mapping[str, Any]:
    """What a `dropconnect.json` says: `"plan"`, a `Plan`, and `"anchors"`, which are None or name their
    `"file"` and its `"sha256"`.

    Args:
        more: readers of what needs torch, `"generators"`; without, that is not looked at.

    Raises:
        OSError: there is no file, or it cannot be read.
        SurgeryError: it is damaged, or of a newer version, or one of both is a link that leads out of
            the folder.
    """
    check_links(path.parent, [path.name])
    form = read_json(path)
    try:
        read = fields(migrated(form, "file", "it"), "it", _FILE, {**_MAY_BE, **more})
    except SurgeryError as error:
        raise SurgeryError(f"cannot read {path}: {error}") from error
    if read["anchors"] is not None:
        check_links(path.parent, [read["anchors"]["file"]])
    return read


def _record(form: Any, where: str) -> dict[str, Any]:
    return fields(form, where, {"file": file_name, "sha256": text})


_FILE: dict[str, Reader[Any]] = {"plan": Plan.from_json, "anchors": maybe(_record)}
_MAY_BE: dict[str, Reader[Any]] = {"generators": lambda value, where: value}
