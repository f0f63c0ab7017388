"""What is known of a module before anybody operates on it: which weights its kind drops, what their
dimensions mean, whether its forward is a product, and which weights a forward reads."""

from .kind import OTHER, Axes, Kind, follows_weight, kind_of, needs_axes, register_kind
from .product import product_of
from .torch_kinds import LINEAR, SEPARATE_PROJECTIONS, columns, conv_axes, rows

__all__ = [
    "LINEAR",
    "OTHER",
    "SEPARATE_PROJECTIONS",
    "Axes",
    "Kind",
    "columns",
    "conv_axes",
    "follows_weight",
    "kind_of",
    "needs_axes",
    "product_of",
    "register_kind",
    "rows",
]
