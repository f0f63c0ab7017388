"""One operated module: how it draws masks, runs its forward with them, and lets them go.

In a training forward, `dropping` asks `masking` for keys (`SiteState.new_key`) and for masked weights
(`surgery.ops.mask`), and lets the original forward read them.
"""

from ..aliases import old_attributes
from ..kinds.kind import Axes, Kind, kind_of, register_kind
from .operated import DropConnectModule
from .state import SiteState

__getattr__ = old_attributes(__name__)

__all__ = ["Axes", "DropConnectModule", "Kind", "SiteState", "kind_of", "register_kind"]
