"""Bytes in and out, in little memory."""

from __future__ import annotations

from typing import BinaryIO

BLOCK = 1 << 22
"""Bytes that are in memory at a time."""


def write_all(target: BinaryIO, data: bytes | bytearray | memoryview) -> None:
    """Write all of it to a file without a buffer."""
    rest = memoryview(data)
    while rest:
        rest = rest[target.write(rest) :]


def read_into(file: BinaryIO, at: int, block: memoryview) -> None:
    """Fill a block with the bytes of a file from there on. Raises `OSError` if they are not there."""
    file.seek(at)
    while block:
        count = file.readinto(block)  # type: ignore[attr-defined]
        if not count:
            raise OSError(f"a file ended early, at byte {file.tell():,}")
        block = block[count:]
