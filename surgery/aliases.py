"""Names that modules had before they moved into rooms: pickles, and code that imports by them.

An old name is found when it is imported, and is the moved module itself, so that a class has one
identity. It works until release 1.0; an import by it warns.

What else old pickles need stands where it is read: `SiteState.__setstate__`, `Layout.__setstate__`, the
old class name in `surgery.modules.node`. Old files of JSON: `MIGRATIONS` in `surgery.spec.forms`.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_SAME_NAME = (
    ("", "base", "caching files journal plugins"),
    ("", "spec", "config plan errors forms"),
    ("", "moments", "scope torch_functions"),
    ("modules", "kinds", "product examples reads source derived"),
    ("ops", "torch_private", "tracing"),
    ("ops", "ops.cpu", "native build cache workspace"),
    ("", "modules", "recompute keys"),
    ("", "planning", "catalogue select ties known refusals prepare graphs"),
    ("", "operating", "surgeon"),
    ("", "verbs", "inference predict checkpoint savers schedules"),
    ("adapters.transformers", "verbs", "schedules"),
    ("transforms", "transforms.capture", "record inputs untouched"),
    ("transforms", "transforms.reading", "uses roles find"),
    ("transforms", "transforms.operating", "insert remove graph_image"),
    ("transforms", "transforms.drawing", "outline tree dot draw"),
)
"""Modules that kept their own name: package from which, package to which, names."""

MOVED = {
    **{
        f"{old}.{name}".strip("."): f"{new}.{name}"
        for old, new, names in _SAME_NAME
        for name in names.split()
    },
    "modules.paper_modes": "modules.product_forward",
    "modules.kinds": "kinds",
    "finder": "planning.runs",
    "plain": "operating.suspend",
    "api": "verbs.apply",
    "transforms.ops": "transforms.reading.operations",
    "transforms.follow": "transforms.reading.activation",
    "transforms.survey": "transforms.operating.model_graphs",
    "transforms.graph_surgery": "transforms.operating.graph_surgeon",
    "transforms.boxes": "transforms.drawing.diagram",
    "transforms.flow": "transforms.drawing.module_diagram",
}
"""From the old name of a module to the new one, both below `surgery`."""


class _Aliases(MetaPathFinder, Loader):
    """Finds what nobody else does: modules under their old names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        root, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if root == __package__ and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The moved module."""
        new = f"{__package__}.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(
            f"{spec.name} is now {new}; the old name goes with release 1.0",
            DeprecationWarning,
            stacklevel=2,
        )
        module = importlib.import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: it ran under its own name, which importlib has just overwritten."""
        spec = module.__spec__
        if spec is not None:
            module.__spec__ = spec.loader_state


def old_attributes(package: str) -> Callable[[str], ModuleType]:
    """A `__getattr__` for a package: modules that were attributes of it are still."""

    def get(name: str) -> ModuleType:
        old = f"{package}.{name}"
        if old.partition(".")[2] not in MOVED:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(old)

    return get


def behind_functions(package: str) -> None:
    """For a package that has functions with the old names of modules: let imports find those modules at
    once. Imported through `_Aliases`, a module would take the place of the function in the package."""
    for old, new in MOVED.items():
        parent, _, name = old.rpartition(".")
        if f"{__package__}.{parent}" == package and hasattr(sys.modules[package], name):
            sys.modules[f"{__package__}.{old}"] = importlib.import_module(f"{__package__}.{new}")


def understand_old_names() -> None:
    """Let imports find modules under their old names."""
    if not any(isinstance(finder, _Aliases) for finder in sys.meta_path):
        sys.meta_path.append(_Aliases())
