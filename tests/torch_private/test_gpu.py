"""Canaries of the launch of a compiled kernel. Without a GPU it cannot be done: then what Triton's own
launch looks like has to do."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from surgery.torch_private import gpu

from .canary import canary


@canary(gpu, "torch._C._cuda_getDevice")
def test_the_current_device_is_known() -> None:
    if not torch.cuda.is_available():
        built = torch.backends.cuda.is_built()
        assert hasattr(torch._C, "_cuda_getDevice") == built
        assert built or gpu.current_device() == -1
    else:
        torch.cuda.init()
        assert gpu.current_device() == torch.cuda.current_device()


@canary(gpu, "torch._C._cuda_getCurrentRawStream")
def test_the_stream_is_a_number() -> None:
    if not torch.cuda.is_available():
        built = torch.backends.cuda.is_built()
        assert hasattr(torch._C, "_cuda_getCurrentRawStream") == built
        return
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert torch._C._cuda_getCurrentRawStream(0) == stream.cuda_stream


@canary(
    gpu, "CompiledKernel.run", "CompiledKernel.function", "CompiledKernel.packed_metadata of triton"
)
def test_tritons_own_launch_ends_as_ours() -> None:
    """`run(*grid, stream, function, metadata, launch metadata, enter hook, exit hook, *args)`."""
    pytest.importorskip("triton")
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    (given,) = re.findall(
        r"kernel\.run\((.*?)\*bound_args", inspect.getsource(JITFunction.run), re.S
    )
    arguments = [one.strip() for one in given.rstrip().rstrip(",").split(",")]
    assert arguments[:6] == [
        *("grid_0", "grid_1", "grid_2", "stream"),
        *("kernel.function", "kernel.packed_metadata"),
    ]
    assert len(arguments) == 9
    assert isinstance(CompiledKernel.run, property)  # it loads the kernel, and sets `function`
    assert "self.packed_metadata = " in inspect.getsource(CompiledKernel.__init__)


def test_the_interpreter_gives_no_compiled_kernel() -> None:
    assert not gpu.is_compiled(None)
