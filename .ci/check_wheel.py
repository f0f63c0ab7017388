"""Check that a wheel holds every package of the source tree, and nothing else.

A folder that pyproject.toml does not list works in an editable install and is missing here.

    python .ci/check_wheel.py dist/*.whl
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"surgery": "surgery", "transforms": "surgery/transforms", "adapters": "surgery/adapters"}


def expected() -> set[str]:
    """Paths in the wheel of every source under the three package folders."""
    found = {"surgery/py.typed"}
    for folder, package in FOLDERS.items():
        paths = [path for kind in ("*.py", "*.cpp", "*.h") for path in (ROOT / folder).rglob(kind)]
        for path in paths:
            found.add(f"{package}/{path.relative_to(ROOT / folder).as_posix()}")
    return found


def main(wheel: str) -> int:
    """Compare; 0 if the wheel is complete."""
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    missing, surplus = sorted(expected() - shipped), sorted(shipped - expected())
    for name in missing:
        print(f"missing from the wheel: {name} (is its folder in pyproject's packages?)")
    for name in surplus:
        print(f"in the wheel but not in the source tree: {name}")
    print(f"{Path(wheel).name}: {len(shipped)} files")
    return 1 if missing or surplus else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
