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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ...torch_private.gpu import current_device, is_compiled, runner
from ...torch_private.modes import dispatch_modes
from ...torch_private.tensors import is_batch, is_unwritten_zero
from ...torch_private.tracing import is_traced
from ..law import Mask
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


PRODUCT, INPUT_GRADIENT, WEIGHT_GRADIENT, MASKED_WEIGHTS, MASKED_SUM, FACTORS, DRAW, ADD_TWICE = (
    range(1, 9)
)
"""Numbers of kernels, as `extension/planned.h` has them."""

NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, None: -1}
"""Of dtypes there; -1 of what is not there."""


class Plan(NamedTuple):
    """A launch, for whoever repeats it without Python, on other tensors of these kinds and shapes."""

    key: tuple[int, ...]
    """Which kernel, the device, the numbers of dtypes, and shapes: as `extension` looks it up."""
    tensors: int
    """How many it is given; all of them lie so that wide loads are allowed."""
    masked: bool
    """Whether key and law follow, as numbers."""
    numbers: tuple[int, ...]
    """What follows then."""

    def parameters(self) -> tuple[int, ...]:
        """The size of each parameter that it is given."""
        of_mask = (8,) * 3 + (4,) * 6 if self.masked else ()
        return (8,) * self.tensors + of_mask + (4,) * len(self.numbers)


class Launched(NamedTuple):
    """A launch that has a plan."""

    plan: Plan
    compiled: Any
    grid: tuple[int, int, int]


MOST_PLANS = 4096
"""So many are kept: shapes can be others at each step."""


class Repeated:
    """What the extension shall repeat."""

    def __init__(self) -> None:
        self.wanted = False
        """Whether there is one, that can."""
        self.launched: list[Launched] = []
        """What it does not know yet."""
        self._noted: set[tuple[int, ...]] = set()

    def plan(
        self,
        kernel: int,
        tensors: tuple[Tensor | None, ...],
        kinds: tuple[Any, ...],
        about: tuple[Tensor | None, ...],
        shape: tuple[int, ...],
        mask: Mask | None,
        numbers: tuple[int, ...],
    ) -> Plan | None:
        """The plan of a launch; None of one that it cannot repeat.

        Args:
            kernel: one of the numbers above.
            tensors: that the kernel is given.
            kinds: their `form`.
            about: of which the dtypes are part of the key, and then the shape.
            mask: that the kernel is given, or None.
            numbers: that come after it.
        """
        if not self.wanted or len(kinds) != len(tensors) or 1 in numbers:
            return None  # Triton makes no parameter of a 1
        if mask is not None and not (mask.has_numbers() and mask.law.scale.dtype == torch.float32):
            return None
        device = next(one.device for one in tensors if one is not None)
        dtypes = (NUMBERS[None if one is None else one.dtype] for one in about)
        there = sum(one is not None for one in tensors)
        return Plan((kernel, device.index or 0, *dtypes, *shape), there, mask is not None, numbers)

    def note(self, plan: Plan, compiled: Any, grid: tuple[int, int, int]) -> None:
        """Let the extension know a launch."""
        if plan.key not in self._noted and len(self._noted) < MOST_PLANS:
            self._noted.add(plan.key)
            self.launched.append(Launched(plan, compiled, grid))

    def forget(self) -> None:
        """Let all be noted again: in tests."""
        self._noted.clear()


repeated = Repeated()


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
        self.made: dict[Any, Any] = {}
        """What Triton made, by the same."""

    def launch(
        self,
        grid: tuple[int, int, int],
        device: torch.device,
        key: tuple[Any, ...],
        args: tuple[Any, ...],
        constants: tuple[Any, ...],
        plan: Plan | None = None,
    ) -> bool:
        """Run it on the current stream of a device.

        Args:
            grid: number of programs.
            device: of the tensors.
            key: what the compiled kernel depends on beside the constants and the device: `form` of the
                tensors, and of each integer that Triton specialises on, whether 16 divides it and
                whether it is 1.
            args, constants: of the kernel, in its order: the constants last.
            plan: by which the extension may repeat it, if there is one.

        Returns:
            whether it runs; False where kernels cannot be compiled, of which a warning tells.
        """
        known = device.index, key, constants
        run = self.compiled.get(known)
        if run is not None and current_device() == device.index:
            run(grid, args + constants)
            if plan is not None:
                repeated.note(plan, self.made[known], grid)
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
            self.made[known] = compiled
            if plan is not None:
                repeated.note(plan, compiled, grid)
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
