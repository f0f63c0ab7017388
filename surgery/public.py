"""The public names of `surgery`, and where they come from. `surgery` takes them from here.

The rooms are imported here and not in `surgery/__init__.py`: the command line works on files that are
longer than the memory, in less memory than `import torch` takes.
"""

from .base.plugins import watch_imports as watch_imports
from .checkpoints.bake import bake_checkpoint
from .checkpoints.convert import convert_checkpoint
from .checkpoints.inspection import Inspection, inspect_checkpoint
from .checkpoints.strip import strip_checkpoint
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
from .verbs.bake import bake_dropconnect
from .verbs.checkpoint import load_dropconnect, save_dropconnect
from .verbs.gaussians import LowRank, Prediction
from .verbs.inference import set_inference
from .verbs.moments import predict_moments
from .verbs.predict import mc_predict
from .verbs.prediction import MCPrediction
from .verbs.temporary import dropconnect

__all__ = [
    "DropConnectConfig",
    "DropConnectModule",
    "Inspection",
    "LowRank",
    "MCPrediction",
    "NoMatchError",
    "NotOperatedError",
    "Plan",
    "Prediction",
    "Site",
    "SurgeryError",
    "Use",
    "apply_dropconnect",
    "bake_checkpoint",
    "bake_dropconnect",
    "convert_checkpoint",
    "dropconnect",
    "dropconnect_sites",
    "hold_masks",
    "inspect_checkpoint",
    "load_dropconnect",
    "mc_predict",
    "plain_state_dict",
    "plan_dropconnect",
    "predict_moments",
    "raw_state_dict",
    "save_dropconnect",
    "set_inference",
    "set_p",
    "strip_checkpoint",
    "strip_dropconnect",
]
