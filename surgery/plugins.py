"""How other people's software plugs in: the entry-point group `surgery.plugins`.

An entry point is named after a module of the library it adapts and points to a module of the adapter,
which registers kinds (`surgery.modules.kinds.register_kind`) and teaches savers (`surgery.savers`) when
imported. It is imported only once the module it is named after has been: a model of a library that
was never imported cannot exist, so `import surgery` stays light.
"""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points

from .caching import cached

GROUP = "surgery.plugins"

_loaded: set[str] = set()


@cached
def _entries() -> tuple[EntryPoint, ...]:
    """Read once: it looks at the metadata of every package that is installed."""
    return tuple(entry_points(group=GROUP))


def load_plugins() -> None:
    """Import the plugins of every library that is imported by now."""
    for entry in _entries():
        if entry.value not in _loaded and entry.name in sys.modules:
            entry.load()
            _loaded.add(entry.value)
