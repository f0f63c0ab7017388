"""What is done to the model of `zoo/integers.py`, by the workers and by the tests."""

from __future__ import annotations

from typing import Any

SITES = ["words", "up", "down", "head"]
LINEARS = ["up", "down", "head"]
OPTIONS: dict[str, dict[str, Any]] = {
    "element": {},
    "pretrained": {"toward": "pretrained"},
    "bias": {"bias": True},
    "input": {"unit": "input"},
    "output": {"unit": "output", "bias": True},
    "tensor": {"unit": "tensor", "toward": "pretrained"},
}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "batch": {},
    "example": {"sampling": "example"},
    "rows": {"sampling": "example", "example_dim": "all"},
}
