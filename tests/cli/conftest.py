"""These tests write files with raw keys, which else warns."""

from ..checkpoints.conftest import _no_warning  # noqa: F401
