"""Transforms of graphs: capture one, find what uses each weight, operate on one, draw one.

Loaded through the entry point `surgery.plugins`; the verbs of `surgery` then work on graphs too.
"""

from surgery.aliases import behind_functions
from surgery.planning.graphs import register_graph_surgeon
from surgery.planning.runs import register_runner

from .capture.capture import Capture, CaptureError, capture, capture_of
from .capture.record import record
from .drawing.draw import draw
from .drawing.tree import tree
from .operating.graph_surgeon import Surgeon
from .reading.find import find, watch_run
from .reading.findings import Findings

register_runner(watch_run)
register_graph_surgeon(Surgeon())
behind_functions(__name__)

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
