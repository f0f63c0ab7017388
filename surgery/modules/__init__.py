"""One operated module: how it draws masks, runs its forward with them, and lets them go."""

from ..kinds.kind import Axes, Kind, kind_of, register_kind
from .operated import DropConnectModule
from .state import SiteState

__all__ = ["Axes", "DropConnectModule", "Kind", "SiteState", "kind_of", "register_kind"]
