"""Names that modules had before they moved into rooms: pickles, and code that imports by them.

An old name is found when it is imported, and is the moved module itself, so that a class has one
identity. It works until release 1.0; an import by it warns.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "caching": "base.caching",
    "files": "base.files",
    "journal": "base.journal",
    "plugins": "base.plugins",
    "config": "spec.config",
    "plan": "spec.plan",
    "errors": "spec.errors",
    "forms": "spec.forms",
    "scope": "moments.scope",
    "torch_functions": "moments.torch_functions",
    "modules.kinds": "kinds",
    "modules.product": "kinds.product",
    "modules.examples": "kinds.examples",
    "modules.reads": "kinds.reads",
    "modules.source": "kinds.source",
    "modules.derived": "kinds.derived",
    "ops.tracing": "torch_private.tracing",
    "ops.native": "ops.cpu.native",
    "ops.build": "ops.cpu.build",
    "ops.cache": "ops.cpu.cache",
    "ops.workspace": "ops.cpu.workspace",
    "recompute": "modules.recompute",
    "keys": "modules.keys",
    "modules.paper_modes": "modules.product_forward",
    "catalogue": "planning.catalogue",
    "select": "planning.select",
    "ties": "planning.ties",
    "known": "planning.known",
    "refusals": "planning.refusals",
    "prepare": "planning.prepare",
    "finder": "planning.runs",
    "graphs": "planning.graphs",
    "surgeon": "operating.surgeon",
    "plain": "operating.suspend",
    "api": "verbs.apply",
    "inference": "verbs.inference",
    "predict": "verbs.predict",
    "checkpoint": "verbs.checkpoint",
    "savers": "verbs.savers",
    "schedules": "adapters.transformers.schedules",
    "transforms.record": "transforms.capture.record",
    "transforms.inputs": "transforms.capture.inputs",
    "transforms.untouched": "transforms.capture.untouched",
    "transforms.ops": "transforms.reading.operations",
    "transforms.uses": "transforms.reading.uses",
    "transforms.roles": "transforms.reading.roles",
    "transforms.follow": "transforms.reading.activation",
    "transforms.find": "transforms.reading.find",
    "transforms.survey": "transforms.operating.model_graphs",
    "transforms.insert": "transforms.operating.insert",
    "transforms.remove": "transforms.operating.remove",
    "transforms.graph_surgery": "transforms.operating.graph_surgeon",
    "transforms.graph_image": "transforms.operating.graph_image",
    "transforms.outline": "transforms.drawing.outline",
    "transforms.tree": "transforms.drawing.tree",
    "transforms.boxes": "transforms.drawing.diagram",
    "transforms.flow": "transforms.drawing.module_diagram",
    "transforms.dot": "transforms.drawing.dot",
    "transforms.draw": "transforms.drawing.draw",
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


def understand_old_names() -> None:
    """Let imports find modules under their old names."""
    if not any(isinstance(finder, _Aliases) for finder in sys.meta_path):
        sys.meta_path.append(_Aliases())
