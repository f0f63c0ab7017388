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
from torch.nn import Parameter

from ...torch_private.gpu import current_device, is_compiled, runner
from ...torch_private.modes import dispatch_modes
from ...torch_private.tensors import is_batch, is_unwritten_zero
from ...torch_private.tracing import is_traced
from ..switch import compile_enabled, give_up

INTERPRETED: set[str] = set()
"""Types of device beside GPUs whose tensors kernels take: those of Triton's interpreter, in tests."""

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


@functools.cache
def has_triton() -> bool:
    """Whether triton is there. It is not imported."""
    return importlib.util.find_spec("triton") is not None


def is_there(tensor: Tensor) -> bool:
    """Whether a tensor is on a GPU that Triton compiles for; torch says CUDA of AMD's too."""
    return tensor.is_cuda or tensor.is_xpu or (tensor.is_cpu and "cpu" in INTERPRETED)


def takes(first: Tensor, *others: Tensor | None, strided: bool = False) -> bool:
    """Whether kernels can read tensors together: dense ones on one GPU, of floating dtypes, while
    nothing follows each operation. With `strided`, whether they could read contiguous copies."""
    return is_there(first) and not is_traced() and reads(first, *others, strided=strided)


def reads(first: Tensor, *others: Tensor | None, strided: bool = False) -> bool:
    """`takes` for tensors on a GPU, in code that is not traced."""
    if not (compile_enabled("gpu") and has_triton()) or dispatch_modes():
        return False  # to a mode, what kernels write would be memory that nobody has filled
    for tensor in (first, *others):
        if tensor is None:
            continue
        kind = type(tensor)  # asked here, one by one: the host's time counts, and these take little
        if (kind is not Tensor and kind is not Parameter) or tensor.dtype not in FLOATS:
            return False
        if not (strided or tensor.is_contiguous()) or tensor.layout is not torch.strided:
            return False
        if tensor.is_nested or tensor.is_neg() or is_unwritten_zero(tensor) or is_batch(tensor):
            return False
        if tensor is not first and tensor.device != first.device:
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
        self.compiled: dict[Any, Any] = {}
        """How to launch what was compiled, by index of the device, key and constants: see `launch`."""
        self.made: list[tuple[Any, Any]] = []
        """The same, and what Triton made, for whoever takes them from here."""

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
        run = self.compiled.get(known)
        if run is not None and current_device() == device.index:
            run(grid, args + constants)
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
        if device.type == "cuda" and is_compiled(compiled):
            self.compiled[known] = runner(compiled, device.index)
            self.made.append((known, compiled))
        return True


def _on(device: torch.device) -> AbstractContextManager[Any]:
    if device.type == "cpu":  # in the interpreter
        return nullcontext()
    there: AbstractContextManager[Any] = torch.get_device_module(device).device(device.index)
    return there


def form(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What a compiled kernel depends on of its tensors: their dtypes, and if not all addresses allow
    wide loads, which do."""
    kinds: list[Any] = []
    addresses = 0
    for tensor in tensors:  # no comprehensions: the host's time counts
        if tensor is None:
            kinds.append(None)
        else:
            kinds.append(tensor.dtype)
            addresses |= tensor.data_ptr()
    if addresses % 16:
        kinds += [tensor is not None and tensor.data_ptr() % 16 == 0 for tensor in tensors]
    return tuple(kinds)
