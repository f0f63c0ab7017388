"""Modules: their kinds, what they read, and how an operated one behaves."""

from ..kinds.kind import Axes, Kind, kind_of, register_kind
from .operated import DropConnectModule
from .state import SiteState

__all__ = ["Axes", "DropConnectModule", "Kind", "SiteState", "kind_of", "register_kind"]
