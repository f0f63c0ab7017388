"""How other people's software plugs in: the entry-point group `surgery.plugins`.

An entry point is named after a module of the library it adapts and points to a module of the adapter,
which registers kinds (`surgery.modules.register_kind`) and teaches savers (`surgery.verbs.savers`)
when imported. It is imported only once the module it is named after has been, so `import surgery` stays
light: as soon as that module is, if it is imported after surgery, and else with the next plan. So a
process that begins by loading what another has saved loads it right.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, cast

from .caching import cached

GROUP = "surgery.plugins"

_loaded: set[str] = set()
_loading: set[str] = set()


@cached
def _entries() -> tuple[EntryPoint, ...]:
    """Read once: it looks at the metadata of every package that is installed."""
    return tuple(entry_points(group=GROUP))


def load_plugins() -> None:
    """Import the plugins of every library that is imported by now."""
    for entry in _waiting():
        if entry.name in sys.modules:
            _load(entry)


def watch_imports() -> None:
    """From now on import the plugins of a library when it is imported. What these are is not looked up
    before something is."""
    if _watch not in sys.meta_path:
        sys.meta_path.insert(0, _watch)


def _waiting() -> list[EntryPoint]:
    return [entry for entry in _entries() if entry.value not in _loaded]


def _load(entry: EntryPoint) -> None:
    """Import a plugin; nothing if that is under way, as its imports bring what it waits for too."""
    if entry.value in _loading:
        return
    _loading.add(entry.value)
    try:
        entry.load()
        _loaded.add(entry.value)
    finally:
        _loading.discard(entry.value)


class Watch(MetaPathFinder):
    """Finds what other finders find, and has something done when certain modules have been imported."""

    def __init__(self, calls_for: Callable[[str], Sequence[Callable[[], object]]]) -> None:
        """
        Args:
            calls_for: from the name of a module to what is called once that has run.
        """
        self._calls_for = calls_for
        self._looks_up = False
        """Whether that is being asked, for which Python may import something."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self._looks_up:
            return None
        self._looks_up = True
        try:
            calls = self._calls_for(fullname)
        finally:
            self._looks_up = False
        if not calls:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec: Any = find(fullname, path, target) if find and finder is not self else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader.exec_module = _then(spec.loader.exec_module, calls)
                return cast(ModuleSpec, spec)
        return None


def _then(
    run: Callable[[ModuleType], Any], calls: Sequence[Callable[[], object]]
) -> Callable[..., None]:
    def exec_module(module: ModuleType) -> None:
        run(module)
        for call in calls:
            # The library is not at fault if its plugin fails: the next verb will say what is wrong.
            with contextlib.suppress(Exception):
                call()

    return exec_module


def _loads(fullname: str) -> list[Callable[[], object]]:
    return [partial(_load, entry) for entry in _waiting() if entry.name == fullname]


_watch = Watch(_loads)
