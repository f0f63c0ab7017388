"""An operated Linear in eager training, in C++.

`linear.cpp` is `_MaskedLinear` of `linear.py` again, a node of autograd that Python has no part in: the
host needs a fraction of the time, which is what training with small layers waits for, most of all on a
GPU. It is compiled against the installed torch (about half a minute, in the background, once) and then
kept in the folder of the kernels; until then, and where it cannot be compiled, Python does the same.
"""

from . import loading

__all__ = ["loading"]
