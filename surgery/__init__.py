"""DropConnect by surgery on models that already exist.

from surgery import apply_dropconnect, strip_dropconnect

apply_dropconnect(model, targets=["*.fc*"], p=0.3)   # in place; returns the model
...                                                  # train as always
strip_dropconnect(model)                             # the plain model again, bit for bit
"""

from pathlib import Path

from .api import (
    apply_dropconnect,
    dropconnect_sites,
    hold_masks,
    plan_dropconnect,
    set_p,
    strip_dropconnect,
)
from .checkpoint import load_dropconnect, save_dropconnect
from .config import DropConnectConfig
from .errors import NoMatchError, NotOperatedError, SurgeryError
from .inference import set_inference
from .keys import plain_state_dict, raw_state_dict
from .modules import DropConnectModule
from .plan import Plan, Site, Use
from .predict import MCPrediction, mc_predict

__version__ = "0.1.0"

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "adapters").is_dir():
    # Python was started in a checkout and found this folder before the installed package: let it find
    # `surgery.adapters` and `surgery.transforms`, which lie beside this folder there.
    __path__.append(str(_checkout))

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
