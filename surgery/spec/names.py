"""Under which names a module, and a file of its state dict, has the tensors of a site."""

from __future__ import annotations

RAW, ANCHOR = "_raw", "_anchor"


def raw_name(name: str) -> str:
    """Name of the stored parameter while DropConnect is in place."""
    return name + RAW


def anchor_name(name: str) -> str:
    """Name of the buffer that holds the pretrained weight, for `toward="pretrained"`."""
    return name + ANCHOR
