"""Which tensors the kernels take, and how one is launched at little cost to the host.

Training on a GPU is often bound by the host, which launches many small kernels. Triton's own launch
looks at every argument each time. Here the caller says in a few words what a compiled kernel depends
on, and the kernel that was compiled for that is launched at once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..ordinary import is_ordinary_there
from ..switch import compile_enabled, give_up
from ..tracing import is_traced

DEVICES = {"cuda", "xpu"}
"""Types of device that Triton compiles for, by their names in torch: "cuda" is AMD's name too."""

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})

INDEX = 1 << 30
"""Kernels count entries in int32, with room for the last block."""


@functools.cache
def has_triton() -> bool:
    """Whether triton is there. It is not imported."""
    return importlib.util.find_spec("triton") is not None


def is_there(tensor: Tensor) -> bool:
    """Whether a tensor is on a GPU."""
    return tensor.device.type in DEVICES


def takes(first: Tensor, *others: Tensor | None, strided: bool = False) -> bool:
    """Whether kernels can read tensors together: dense ones on one GPU, of floating dtypes, while
    nothing follows each operation. With `strided`, whether they could read contiguous copies."""
    device = first.device
    if device.type not in DEVICES or is_traced() or not (compile_enabled("gpu") and has_triton()):
        return False
    for tensor in (first, *others):  # not through smaller functions: the host's time counts here
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS or not (strided or tensor.is_contiguous()):
            return False
        if not is_ordinary_there(tensor) or (tensor is not first and tensor.device != device):
            return False
    return True


class Kernel:
    """A Triton kernel of a file in this folder.

    Args:
        file, name: where it is.
        options: of the compiler, such as `num_warps`.
    """

    def __init__(self, file: str, name: str, **options: Any) -> None:
        self._file, self.name = file, name
        # Sums of products are rounded twice, as by the formulas.
        self._options = {"enable_fp_fusion": False, **options}
        self._compiled: dict[Any, Any] = {}

    def launch(
        self,
        grid: tuple[int, int, int],
        device: torch.device,
        key: tuple[Any, ...],
        args: tuple[Any, ...],
        constants: tuple[Any, ...],
    ) -> bool:
        """Run it on the current stream of a device.

        Args:
            grid: number of programs.
            device: of the tensors.
            key: what the compiled kernel depends on beside the constants and the device: `form` of the
                tensors, and of each integer that Triton specialises on, whether 16 divides it and
                whether it is 1.
            args, constants: of the kernel, in its order: the constants last.

        Returns:
            whether it runs; False where kernels cannot be compiled, of which a warning tells.
        """
        known = device.index, key, constants
        compiled = self._compiled.get(known)
        if compiled is not None and _is_current(device):
            compiled[grid](*args, *constants)
            return True
        with _on(device):
            try:
                kernels = importlib.import_module(f"{__package__}.{self._file}")
                function = getattr(kernels, self.name)
                compiled = function[grid](*args, *constants, **self._options)
            except Exception as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                give_up("gpu", error)
                return False
        if hasattr(compiled, "packed_metadata"):  # not in the interpreter
            self._compiled[known] = compiled
        return True


def _on(device: torch.device) -> AbstractContextManager[Any]:
    if device.type == "cpu":  # in the interpreter
        return nullcontext()
    there: AbstractContextManager[Any] = torch.get_device_module(device).device(device.index)
    return there


def _is_current(device: torch.device) -> bool:
    """Whether kernels are launched on the device by now."""
    if device.type == "cuda":
        return torch.cuda.current_device() == device.index
    index: int = torch.get_device_module(device).current_device()
    return index == device.index


def form(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What a compiled kernel depends on of its tensors: their dtypes, and whether their addresses
    allow wide loads."""
    return tuple(
        None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16 == 0)
        for tensor in tensors
    )
