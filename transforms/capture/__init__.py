"""A graph of any model, and a look at one that leaves it as it was."""

from .capture import Capture, CaptureError, capture, capture_of

__all__ = ["Capture", "CaptureError", "capture", "capture_of"]
