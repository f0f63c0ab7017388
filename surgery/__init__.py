"""DropConnect by surgery on models that already exist.

from surgery import apply_dropconnect, strip_dropconnect

apply_dropconnect(model, targets=["*.fc*"], p=0.3)   # in place; returns the model
...                                                  # train as always
strip_dropconnect(model)                             # the plain model again, bit for bit
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .aliases import old_attributes, understand_old_names
from .base.plugins import Watch

if TYPE_CHECKING:
    from .public import *  # noqa: F403
    from .public import __all__ as __all__

__version__ = "0.1.0"

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "adapters").is_dir():
    # Python was started in a checkout and found this folder before the installed package: let it find
    # `surgery.adapters` and `surgery.transforms`, which lie beside this folder there.
    __path__.append(str(_checkout))  # noqa: F405

understand_old_names()


def _take_public() -> None:
    """Import the rooms, and have their public names here; and let libraries that come later be
    adapted."""
    public = import_module(f"{__name__}.public")
    public.watch_imports()
    globals().update({name: getattr(public, name) for name in ("__all__", *public.__all__)})


def __getattr__(name: str) -> Any:
    """Import the rooms when one of their names is first asked for."""
    is_ours = name == "__all__" or not name.startswith("__")
    if is_ours and "__all__" not in globals():
        _take_public()
        if name in globals():
            return globals()[name]
    return old_attributes(__name__)(name)


def __dir__() -> list[str]:
    if "__all__" not in globals():
        _take_public()
    return sorted(globals())


def _with_torch(fullname: str) -> Sequence[Callable[[], object]]:
    """What is done when a module has been imported: files of torch may name our operators."""
    return [_take_public] if fullname == "torch" and f"{__name__}.public" not in sys.modules else []


if "torch" in sys.modules:
    _take_public()
else:  # later: the command line does not need it
    sys.meta_path.insert(0, Watch(_with_torch))
