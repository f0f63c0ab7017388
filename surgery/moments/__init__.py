"""`inference="moments", samples=Z`, the paper's: draws of a pre-activation go through the activation.
Without draws, mean and variance travel through the whole model: `surgery.travel`.

A site returns a `Gaussian`, which torch functions take for a tensor. Elementwise functions, softmax
and layer norms are put off; whatever else reads it gets the expectation. So `gelu(x)`,
`x * sigmoid(1.702 * x)` and `0.5 * x * (1 + tanh(...))` are one function of one Gaussian each, however
they are written, and `act(gate) * up` is a product of independent factors.

    (f(u_1) + ... + f(u_Z)) / Z,  u_z ~ N(mean, variance)               (Wan et al. 2013, section 3.2)

Here too are the table of torch's functions, and the scope in which values are no tensors yet.
"""

from . import functions
from .gaussian import Gaussian, Points, Source, points_of_two

__all__ = ["Gaussian", "Points", "Source", "functions", "points_of_two"]
