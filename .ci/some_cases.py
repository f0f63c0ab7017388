"""A pytest plugin that keeps some cases of each test: `CASES=3 pytest -p some_cases` (0: all)."""

from __future__ import annotations

import os
import random

import pytest


def keep_some(items: list[pytest.Item], most: int, seed: int = 0) -> None:
    """Keep so many cases of each test, drawn at random, in the order in which they are."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    draw, most = random.Random(seed), most or len(items)
    kept = {one for of in cases.values() for one in draw.sample(of, min(most, len(of)))}
    items[:] = [item for item in items if item in kept]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What the environment says."""
    keep_some(items, int(os.environ.get("CASES", "0")))
