"""Bytes in and out of files that take and give a few at a time."""

from __future__ import annotations

import io
from typing import Any

import pytest

from surgery.stored.blocks import read_into, write_all


class Slow(io.BytesIO):
    """Three bytes at a time, as pipes and full disks may."""

    def write(self, data: Any) -> int:
        return super().write(data[:3])

    def readinto(self, block: Any) -> int:
        return super().readinto(memoryview(block)[:3])


def test_all_is_written_and_read() -> None:
    file, block = Slow(), bytearray(9)
    write_all(file, b"0123456789")
    assert file.getvalue() == b"0123456789"
    read_into(file, 1, memoryview(block))
    assert block == b"123456789"


def test_a_file_that_ends_early() -> None:
    with pytest.raises(OSError, match="a file ended early, at byte 4"):
        read_into(Slow(b"0123"), 2, memoryview(bytearray(3)))
