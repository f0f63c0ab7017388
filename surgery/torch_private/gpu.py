"""How a compiled Triton kernel is launched at little cost to the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
