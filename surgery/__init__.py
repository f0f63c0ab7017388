"""DropConnect by surgery on models that already exist.

from surgery import apply_dropconnect, strip_dropconnect

apply_dropconnect(model, targets=["*.fc*"], p=0.3)   # in place; returns the model
...                                                  # train as always
strip_dropconnect(model)                             # the plain model again, bit for bit
"""

from pathlib import Path

from .aliases import old_attributes, understand_old_names
from .modules import DropConnectModule
from .modules.keys import plain_state_dict, raw_state_dict
from .spec.config import DropConnectConfig
from .spec.errors import NoMatchError, NotOperatedError, SurgeryError
from .spec.plan import Plan, Site, Use
from .verbs.apply import (
    apply_dropconnect,
    dropconnect_sites,
    hold_masks,
    plan_dropconnect,
    set_p,
    strip_dropconnect,
)
from .verbs.checkpoint import load_dropconnect, save_dropconnect
from .verbs.inference import set_inference
from .verbs.predict import MCPrediction, mc_predict
from .verbs.temporary import dropconnect

__version__ = "0.1.0"

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "adapters").is_dir():
    # Python was started in a checkout and found this folder before the installed package: let it find
    # `surgery.adapters` and `surgery.transforms`, which lie beside this folder there.
    __path__.append(str(_checkout))

understand_old_names()
__getattr__ = old_attributes(__name__)

__all__ = [
    "DropConnectConfig",
    "DropConnectModule",
    "MCPrediction",
    "NoMatchError",
    "NotOperatedError",
    "Plan",
    "Site",
    "SurgeryError",
    "Use",
    "apply_dropconnect",
    "dropconnect",
    "dropconnect_sites",
    "hold_masks",
    "load_dropconnect",
    "mc_predict",
    "plain_state_dict",
    "plan_dropconnect",
    "raw_state_dict",
    "save_dropconnect",
    "set_inference",
    "set_p",
    "strip_dropconnect",
]
