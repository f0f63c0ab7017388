"""Lightning: plain checkpoints from operated modules, averages without anchors, a Trainer callback.

Loaded through the entry point `surgery.plugins` once `lightning.pytorch` is imported.
"""

from surgery.adapters.lightning import saving  # noqa: F401  it teaches Lightning to save plainly
from surgery.adapters.lightning.callback import DropConnectCallback

__all__ = ["DropConnectCallback"]
