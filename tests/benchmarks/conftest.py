"""The benchmarks are a folder of scripts beside the package: import it as it imports itself."""

from __future__ import annotations

import importlib.util
import sys
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks"

if find_spec("matplotlib") is None:
    collect_ignore_glob = ["test_*.py"]  # what the extra `examples` installs is not there
else:
    # Not by a folder on sys.path: the root holds `transforms` and `adapters` too.
    spec = importlib.util.spec_from_file_location(
        "benchmarks", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks"] = package
    spec.loader.exec_module(package)
