"""Lightning: plain checkpoints from operated modules, averages without anchors, a Trainer callback.

For both of its packages, `lightning` and `pytorch-lightning`. Loaded through the entry points
`surgery.plugins` (`unified`, `separate`) once one is imported.
"""

from typing import TYPE_CHECKING, Any

from surgery.adapters.lightning.packages import imported
from surgery.adapters.lightning.saving import teach_package

if TYPE_CHECKING:
    from surgery.adapters.lightning.callback import DropConnectCallback

__all__ = ["DropConnectCallback"]


for _package in imported():
    teach_package(_package)


def __getattr__(name: str) -> Any:
    """It is a callback of the package that is imported by then."""
    if name == "DropConnectCallback":
        from surgery.adapters.lightning.callback import DropConnectCallback

        return DropConnectCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
