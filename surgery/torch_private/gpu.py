"""How a compiled Triton kernel is launched at little cost to the host."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
"""Where CUDA launches kernels by now; there is no such name in builds without CUDA. The public
`torch.cuda.current_device` first looks whether CUDA has been initialised, at each launch."""


def is_compiled(kernel: Any) -> bool:
    """Whether a launch has given a compiled kernel: one that `runner` takes."""
    return hasattr(kernel, "packed_metadata")


def runner(compiled: Any, index: int) -> Callable[[tuple[int, int, int], tuple[Any, ...]], None]:
    """How a compiled kernel is launched: by the call with which Triton's own way ends, and inductor's.

    Without Triton's hooks for profilers, which it would look up each time. Without this, kernels are
    launched by `function[grid](*args)`, which takes several times as long.

    Args:
        compiled: what a launch on a device has returned.
        index: of the device.
    """
    stream_of = torch._C._cuda_getCurrentRawStream
    launch, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def run(grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        launch(*grid, stream_of(index), function, metadata, None, None, None, *args)

    return run


class Handle(NamedTuple):
    """A compiled kernel as the driver of NVIDIA's GPUs launches it."""

    compiled: Any
    """What Triton made: when it goes, the kernel is unloaded."""
    function: int
    threads: int
    shared: int
    """Bytes of shared memory."""
    parameters: tuple[int, ...]
    """The size of each."""


def handle_of(compiled: Any) -> Handle | None:
    """For code that launches a kernel without Python; None where that takes more than a handle, or
    nobody says which parameters it has."""
    about, driver = compiled.metadata, _driver()
    plain = getattr(about, "num_ctas", 1) == 1
    for more in ("launch_cooperative_grid", "launch_pdl", "global_scratch_size"):
        plain = plain and not getattr(about, more, False)
    if driver is None or not plain:
        return None
    sizes: list[int] = []
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    function = ctypes.c_void_p(compiled.function)
    for number in range(64):
        if driver.cuFuncGetParamInfo(function, number, ctypes.byref(offset), ctypes.byref(size)):
            break
        sizes.append(size.value)
    threads = about.num_warps * 32
    return Handle(compiled, compiled.function, threads, about.shared, tuple(sizes))


def addresses() -> tuple[int, ...] | None:
    """Of the driver's `cuLaunchKernel`, `cuCtxGetCurrent` and `cuStreamIsCapturing`, and of torch's
    function that tells the current stream, for code in C++; None where there is no such driver."""
    driver = _driver()
    if driver is None:
        return None
    of_driver = driver.cuLaunchKernel, driver.cuCtxGetCurrent, driver.cuStreamIsCapturing
    functions = *of_driver, _stream_function()
    return tuple(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)


def _stream_function() -> Any:
    """One of those that code has which was compiled ahead of time: their ABI is stable."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    return ctypes.CDLL(str(library)).aoti_torch_get_current_cuda_stream


@functools.cache
def _driver() -> Any:
    if torch.version.hip is not None:
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        _ = driver.cuLaunchKernel, driver.cuCtxGetCurrent, driver.cuStreamIsCapturing
        _ = driver.cuFuncGetParamInfo  # since CUDA 12.4
        _stream_function()
    except (OSError, AttributeError):
        return None
    return driver
