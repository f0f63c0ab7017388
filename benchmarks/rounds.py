"""What the third round of the hash costs: the kernel of a mask, beside the same one with two rounds."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from surgery.ops import Law, draw_key
from surgery.ops.cpu import native
from surgery.ops.cpu.build import NoCompiler, find_compiler
from surgery.ops.cpu.native import DROP_ARGUMENTS

from .measure import Settings, Work, interleaved
from .rows import NANO, OURS, PLAIN, Row, in_unit

P = 0.5
SOURCE = Path(__file__).with_suffix(".cpp")
HEADERS = Path(native.__file__).parent / "kernels"
FUNCTIONS = {f"drop_{name}": DROP_ARGUMENTS for name in ("two", "three")}
SIDES = (256, 1024, 4096)
"""Of weights: one that the second cache holds, one that the third does, and one that none does."""


def third_round(settings: Settings) -> list[Row]:
    """Nanoseconds a weight, mask and apply, and with the masked gradient beside it, as in backward."""
    sides = [settings.size(side) for side in (SIDES[:2] if settings.quick else SIDES)]
    try:
        kernels = _compiled()
    except NoCompiler as error:
        return [Row("mask", "third round of the hash", "ns", skipped=str(error))]
    return [_row(kernels, side, both, settings) for side in sides for both in (False, True)]


def _compiled() -> Any:
    """Both kernels, compiled as those of the library are."""
    compiler, _ = find_compiler()
    with TemporaryDirectory() as folder:
        library = Path(folder) / "rounds.so"
        for command in native.source(SOURCE).commands(compiler, str(library)):
            done = subprocess.run([*command, f"-I{HEADERS}"], capture_output=True, check=False)
            if done.returncode == 0:
                return native.open_library(FUNCTIONS, library)
    raise NoCompiler(f"{shlex.join(compiler)} fails")


def _row(kernels: Any, side: int, both: bool, settings: Settings) -> Row:
    weight, grad = torch.randn(side, side), torch.randn(side, side)
    used, masked = torch.empty_like(weight), torch.empty_like(weight)
    law, key = Law.of(P, weight.device, weight.dtype), draw_key(weight.device)
    beside = (grad, used, masked) if both else (None, used, None)
    tensors = (weight, None, *beside, key, law.threshold, law.scale)
    places = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    threads = torch.get_num_threads()

    def kernel(name: str) -> Work:
        function = getattr(kernels, f"drop_{name}")
        return lambda: function(*places, 0, 0, weight.numel(), threads)

    found = interleaved({PLAIN: kernel("two"), OURS: kernel("three")}, settings)
    work = f"third round of the hash, a weight of {side}x{side}" + (
        " and its gradient" if both else ""
    )
    note = "plain has two rounds, which is not random enough"
    return Row("mask", work, "ns", None, in_unit(found, NANO / weight.numel()), note=note)
