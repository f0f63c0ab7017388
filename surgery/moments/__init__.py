"""`inference="moments"`: a pre-activation travels as mean and variance to the activation that follows.

A site returns a `Gaussian`, which torch functions take for a tensor. Elementwise functions are put
off; whatever else reads it gets the expectation. So `gelu(x)`, `x * sigmoid(1.702 * x)` and
`0.5 * x * (1 + tanh(...))` are one function of one Gaussian each, however they are written, and
`act(gate) * up` is a product of independent factors.

    E[f(u)],  u ~ N(mean, variance)                                   (Wan et al. 2013, section 3.2)

Linear operations make the expectation exact. Layer norms divide by the root of the expected square.
Attention and pooling see the mean, as in `inference="mean"`.
"""

from . import functions
from .gaussian import Gaussian, Points, Source

__all__ = ["Gaussian", "Points", "Source", "functions"]
