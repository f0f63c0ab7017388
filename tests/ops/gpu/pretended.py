"""A driver that launches kernels in Triton's interpreter: so the extension, which gives it addresses
and numbers, runs on the CPU as on a GPU."""

from __future__ import annotations

import ctypes
import importlib
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from surgery.ops.extension import loading
from surgery.ops.gpu import launch, masks
from surgery.torch_private.gpu import Handle

from ...internals import extension_module

_POINTERS = ctypes.POINTER(ctypes.c_void_p)
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, _POINTERS, _POINTERS
)
_CAPTURING = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))
_CONTEXT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_size_t))
_STREAM = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int32, _POINTERS)

THREADS, SHARED = 96, 5

_TAKING = {name: getattr(loading, name) for name in ("note_product", "take_kernels")}
"""As they are where no test has replaced them."""


class Compiled(NamedTuple):
    """A kernel as Triton would have compiled it, for arguments like these."""

    name: str
    function: Any
    args: tuple[Any, ...]
    constants: tuple[Any, ...]

    def sizes(self) -> tuple[int, ...]:
        """Of its parameters: Triton makes none of what is None."""
        return tuple(8 if isinstance(arg, Tensor) else 4 for arg in self.args if arg is not None)


class Driver:
    """Knows kernels by their number, which stands for the address of a function."""

    def __init__(self) -> None:
        self.kernels: list[Compiled] = []
        self.launched: list[str] = []
        """The names of those that the extension has launched."""
        self.problems: list[BaseException] = []
        self.without_context: set[int] = set()
        """The ids of threads in which nothing was launched that makes a context of CUDA."""
        self.functions = (
            _LAUNCH(self._launch),
            _CONTEXT(self._context),
            _CAPTURING(lambda stream, status: 0),
            _STREAM(lambda device, stream: 0),
        )

    def addresses(self) -> tuple[int, ...]:
        """As `torch_private.gpu.addresses` has them."""
        found = (ctypes.cast(one, ctypes.c_void_p).value or 0 for one in self.functions)
        return tuple(found)

    def handle(self, compiled: Compiled) -> Handle:
        self.kernels.append(compiled)
        parameters = *compiled.sizes(), 8, 8
        return Handle(compiled, len(self.kernels), THREADS, SHARED, parameters)

    def _context(self, place: Any) -> int:
        place[0] = threading.get_ident() not in self.without_context
        return 0

    def _launch(self, number: int, *given: Any) -> int:
        *shape, shared, _, parameters, extra = given
        try:
            compiled = self.kernels[number - 1]
            assert (*shape[3:], shared) == (THREADS, 1, 1, SHARED)
            assert not extra
            args = tuple(_read(compiled.args, parameters))
            compiled.function[tuple(shape[:3])](*args, *compiled.constants)
            self.launched.append(compiled.name)
        except BaseException as error:  # nothing gets through C
            self.problems.append(error)
            return 1
        return 0


def _read(like: tuple[Any, ...], parameters: Any) -> Iterator[Any]:
    """Arguments as they lie in memory. Where nobody follows a pointer it is one of another tensor,
    which the interpreter would not stand: there, what Python was given."""
    at, seen = 0, {}
    for one in like:
        if one is None:
            yield None
            continue
        address, at = parameters[at], at + 1
        if not isinstance(one, Tensor):
            kind = ctypes.c_float if isinstance(one, float) else ctypes.c_int32
            yield kind.from_address(address).value
            continue
        memory = ctypes.c_void_p.from_address(address).value
        assert memory
        if memory not in seen:
            size = math.prod(one.shape) * one.element_size()
            buffer = (ctypes.c_char * size).from_address(memory)
            seen[memory] = torch.frombuffer(buffer, dtype=one.dtype).view(one.shape)
        same = seen[memory].shape == one.shape and seen[memory].dtype == one.dtype
        yield seen[memory] if same else one
    assert all(parameters[at : at + 2])  # for memory of Triton's own


@contextmanager
def pretended(patch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """The CPU as a GPU, of which the extension takes what Python has launched."""
    assert loading.compile_now()
    driver, module = Driver(), extension_module()
    python = launch.Kernel.launch

    def noted(
        self: Any, grid: Any, device: Any, key: Any, args: Any, constants: Any, plan: Any = None
    ) -> bool:
        done = python(self, grid, device, key, args, constants, plan)
        file = importlib.import_module(f"{launch.__package__}.{self._file}")
        compiled = Compiled(self.name, getattr(file, self.name), args, constants)
        if plan is not None:
            launch.repeated.note(plan, compiled, grid)
        elif self.name == "drop":
            self.made[0, key, constants] = compiled
            loading.masks_taken = 0  # the same again, for tensors of other shapes
        return done

    patch.setattr(launch.Kernel, "launch", noted)
    patch.setattr(loading, "handle_of", driver.handle)
    patch.setattr(loading, "masks_taken", 0)
    patch.setattr(launch.repeated, "wanted", True)
    launch.repeated.forget()
    for name in ("product", "mask", "example", "gaussian"):
        patch.setattr(loading, name, getattr(module, name))
    for name, function in _TAKING.items():
        patch.setattr(loading, name, function)
    module.use_driver(*driver.addresses())
    module.pretend(True)
    try:
        yield driver
    finally:
        module.pretend(False)
        module.forget()
        launch.repeated.forget()
        launch.repeated.launched.clear()
        masks.mask_kernel.made.clear()
        if driver.problems:
            raise driver.problems[0]
