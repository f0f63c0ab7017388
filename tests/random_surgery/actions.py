"""All that is done to models and to graphs."""

from . import interrupted, life, structure, verbs  # noqa: F401  (each registers its own)
from .choices import ACTIONS, Action

OF_MODELS: list[Action] = sorted(ACTIONS, key=lambda one: one.__name__)
"""In an order that no import decides."""

OF_GRAPHS = [
    one for one in OF_MODELS if one not in (structure.replace, structure.assign, structure.share)
]
"""A parameter that a graph reads is replaced under its raw name, and its modules are its own."""

FIRST: Action = verbs.apply
