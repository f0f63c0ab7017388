"""Bytes from file to file, in little memory, and whether they arrived."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import BinaryIO, NamedTuple

from ..spec.errors import SurgeryError
from ..stored.blocks import BLOCK, read_into, write_all

Progress = Callable[[int], object]
"""Is told how many more bytes are done."""

STRIDE = 1 << 26
"""Bytes that the kernel copies between two reports of progress: a multiple of the blocks of any file
system, so that one which can share blocks between files does."""


def nobody(done: int) -> None:
    """The progress that nobody wants to see."""


class Range(NamedTuple):
    """Bytes that one file has of another."""

    source: int
    """Where they begin in the file that is read."""
    target: int
    """Where they begin in the file that is written."""
    bytes: int


def joined(ranges: Sequence[Range]) -> list[Range]:
    """The same bytes in fewer ranges."""
    result: list[Range] = []
    for source, target, count in ranges:
        if result:
            start, into, before = result[-1]
            if (start + before, into + before) == (source, target):
                result[-1] = Range(start, into, before + count)
                continue
        result.append(Range(source, target, count))
    return result


def copy(
    source: BinaryIO,
    target: BinaryIO,
    ranges: Sequence[Range],
    progress: Progress = nobody,
    verify: bool = True,
) -> None:
    """Copy ranges of one file into another: by the kernel, where it can do that.

    Args:
        verify: read each part again from both files and compare them, while both are in the cache of
            the system: that costs little time.

    Raises:
        OSError: a file cannot be read or written, or ended early.
        SurgeryError: what was written is not what was read.
    """
    blocks = bytearray(BLOCK), bytearray(BLOCK)
    for one in joined(ranges):
        done = 0
        while done < one.bytes:
            part = Range(one.source + done, one.target + done, min(STRIDE, one.bytes - done))
            count = _by_kernel(source, target, part) or _by_hand(source, target, part)
            if verify:
                _compare(source, target, Range(part.source, part.target, count), blocks)
            done += count
            progress(count)


def _by_kernel(source: BinaryIO, target: BinaryIO, part: Range) -> int:
    """How many bytes were copied without passing through this process; 0 where that cannot be done."""
    if not hasattr(os, "copy_file_range"):
        return 0
    with suppress(OSError):  # another file system, an old kernel; of a true fault, reading tells
        return os.copy_file_range(
            source.fileno(), target.fileno(), part.bytes, part.source, part.target
        )
    return 0


def _by_hand(source: BinaryIO, target: BinaryIO, part: Range) -> int:
    source.seek(part.source)
    data = source.read(min(BLOCK, part.bytes))
    if not data:
        raise OSError("the file that is read became shorter meanwhile")
    target.seek(part.target)
    write_all(target, data)
    return len(data)


def _compare(
    source: BinaryIO, target: BinaryIO, part: Range, blocks: tuple[bytearray, bytearray]
) -> None:
    """Read both again, and raise `SurgeryError` unless these bytes are equal."""
    for done in range(0, part.bytes, BLOCK):
        count = min(BLOCK, part.bytes - done)
        one, other = blocks if count == BLOCK else (bytearray(count), bytearray(count))
        read_into(source, part.source + done, memoryview(one))
        read_into(target, part.target + done, memoryview(other))
        if one != other:
            raise SurgeryError(
                f"what was written is not what was read, near byte {part.source + done:,} of "
                f"{source.name}: disk or memory is at fault; nothing was changed"
            )
