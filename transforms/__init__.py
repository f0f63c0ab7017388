"""Transforms of graphs: capture one, find what uses each weight, operate on one, draw one.

Loaded through the entry point `surgery.plugins`; the verbs of `surgery` then work on graphs too.
"""

from surgery.finder import register_finder
from surgery.graphs import register_graph_surgeon

from .capture import Capture, CaptureError, capture, capture_of
from .draw import draw
from .find import Findings, find, look
from .graph_surgery import Surgeon
from .record import record
from .tree import tree

register_finder(look)
register_graph_surgeon(Surgeon())

__all__ = [
    "Capture",
    "CaptureError",
    "Findings",
    "capture",
    "capture_of",
    "draw",
    "find",
    "record",
    "tree",
]
