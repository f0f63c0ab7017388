"""An operated Linear in eager training, in C++.

    eager.h                 `_MaskedLinear` of `linear.py` again, a node of autograd without Python
    operators.h             the operators of `linear_operators.py`, for compiled graphs
    example.h, gaussian.h   the other samplings on a GPU: `_Eager` of `example_operators.py`, and
                            `_GaussianLinear` of `gaussian_linear.py`
    planned.h               launches of the GPU's kernels that repeat those of Python
    linear.cpp              the module, which has all of them
    loading.py              when it is compiled and loaded, and which kernels it knows

The host needs a fraction of the time, which is what training with small layers waits for, most of all
on a GPU. It is compiled against the installed torch (about half a minute, in the background, once) and
then kept in the folder of the kernels; until then, and where it cannot be compiled, Python does all.
"""

from . import loading

__all__ = ["loading"]
