"""Values that travel with mean, variance and covariance through a whole model.

    value        `Travelling`: what a forward takes for a tensor
    call         a call of a torch function, which finds its rule, or settles its values
    state, run   what is known of a value; what one forward is asked for
    birth        what is added where randomness begins: at sites, and where a function is not linear
    rules        what a torch function does to the moments; each file has the rules of one family
    site         what a site of DropConnect adds
    weight       a weight that drops, where a function takes it as an argument

To first order, a covariance moves as tangents do. A forward can carry it in three ways (`Carrier`); the
covariance of the outputs alone comes from a backward pass for each of them (`adjoint`).
"""

from . import attention, elementwise, joint, linear, pairs, pooling, recurrent, shapes
from .numbers import Numbers
from .run import ALONE, Run, TooWide, running, within
from .site import Site, site_value
from .state import State
from .value import Travelling
from .weight import Weight, WeightTensor

__all__ = [
    "ALONE",
    "Numbers",
    "Run",
    "Site",
    "State",
    "TooWide",
    "Travelling",
    "Weight",
    "WeightTensor",
    "attention",
    "elementwise",
    "joint",
    "linear",
    "pairs",
    "pooling",
    "recurrent",
    "running",
    "shapes",
    "site_value",
    "within",
]
