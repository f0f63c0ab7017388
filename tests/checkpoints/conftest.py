"""These tests write files with raw keys, which else warns."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from surgery.verbs.raw_files import quiet


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    with quiet():
        yield
