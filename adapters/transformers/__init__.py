"""HuggingFace transformers: its Conv1D, plain checkpoints from operated models, a Trainer callback,
and the same as arguments of a Trainer.

Loaded through the entry point `surgery.plugins` once `transformers` models can exist; importing it by
hand does the same.
"""

from typing import TYPE_CHECKING, Any

import surgery.adapters.transformers.models  # noqa: F401  it tells the core about transformers

if TYPE_CHECKING:
    from surgery.adapters.transformers.arguments import with_dropconnect
    from surgery.adapters.transformers.callback import DropConnectCallback

__all__ = ["DropConnectCallback", "with_dropconnect"]


def __getattr__(name: str) -> Any:
    """Both pull in Trainer's dependencies, so they are imported when asked for."""
    if name == "DropConnectCallback":
        from surgery.adapters.transformers.callback import DropConnectCallback

        return DropConnectCallback
    if name == "with_dropconnect":
        from surgery.adapters.transformers.arguments import with_dropconnect

        return with_dropconnect
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
