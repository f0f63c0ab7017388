"""The compiler of the kernels, watched: `CXX` names a script that writes down what it compiles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

WATCHED = """#!/bin/sh
for library; do :; done  # the last argument
sleep ${SECONDS_OF_A_COMPILER:-0}
made={made}/$(basename "$library")
[ -f "$made" ] && cp "$made" "$library" || { c++ "$@" && cp "$library" "$made"; } || exit 1
basename "$library" .so >> {log}
"""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was compiled already: the script copies it then."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def compiled(
    made: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], list[str]]:
    """Gives the names of the sources that the compiler was asked for."""
    folder = tmp_path_factory.mktemp("compiler")
    script, log = folder / "c++", folder / "log"
    log.touch()
    script.write_text(WATCHED.replace("{made}", str(made)).replace("{log}", str(log)))
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return lambda: log.read_text().split()
