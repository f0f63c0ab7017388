"""Every model type of the installed transformers, one after the other.

python -m tests.sweep                      # make sweep: all, into out/sweep.jsonl, and the page
python -m tests.sweep bert t5 vit          # only these types, printed
python -m tests.sweep --again failed       # what failed before once more, and all that is missing

A sweep that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
import transformers

import surgery.adapters.transformers
import surgery.transforms  # noqa: F401

from .models import Case, cases
from .page import FAILED, write
from .run import Result, results


def main() -> int:
    """1 if something failed."""
    given = parse()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if given.types:
        found = list(_told(results([c for c in cases() if c.model_type in given.types])))
    else:
        _sweep(given)
        found = list(_read(given.output).values())
        write(found, given.page)
    counted = Counter(str(one["status"]) for one in found)
    print(dict(counted))
    return int(counted[FAILED] > 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("types", nargs="*", help="model types; all if none is given")
    parser.add_argument("--output", type=Path, default=Path("out/sweep.jsonl"))
    parser.add_argument("--page", type=Path, default=Path("docs/architectures.md"))
    parser.add_argument("--workers", type=int, default=1, help="models at a time")
    parser.add_argument("--again", nargs="*", default=[], help="statuses to look at once more")
    return parser.parse_args()


def _sweep(given: argparse.Namespace) -> None:
    """Add what is missing to the file of results."""
    known = _read(given.output)
    todo = [case for case in cases() if _is_missing(case, known, given.again)]
    given.output.parent.mkdir(parents=True, exist_ok=True)
    with given.output.open("a", encoding="utf-8") as file:
        for result in _told(results(todo, given.workers)):
            file.write(json.dumps(result) + "\n")
            file.flush()


def _is_missing(case: Case, known: dict[str, Result], again: list[str]) -> bool:
    return str(case) not in known or known[str(case)]["status"] in again


def _read(path: Path) -> dict[str, Result]:
    """The last result of each case that is in the file."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {result["case"]: result for result in map(json.loads, lines)}


def _told(found: Iterable[Result]) -> Iterator[Result]:
    """The same results, printed as they come."""
    for one in found:
        refused = "; ".join(f"{name}: {rule}" for name, rule in one.get("refused", {}).items())
        what = f"{one.get('sites', '')} {one.get('reason', '')}{refused}"
        line = f"{one['case']:<44}{one['status']:<16}{one['seconds']:6.1f} s  {what}"
        print(line[:300], flush=True)
        yield one


if __name__ == "__main__":
    sys.exit(main())
