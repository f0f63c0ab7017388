"""The kernels for the CPU: C++ of a few hundred lines, compiled by the machine's compiler at first use.

`kernels/masks.cpp` and `kernels/products.cpp` compute the formulas of `mask.py` and
`example_product.py` with the mask in registers, `kernels/activations.cpp` one of `expect.py`.
`docs/performance.md` says what inductor reaches with the same formulas, and why that was not enough.
Each library is compiled once (one to four seconds) and kept in a folder of the user's cache.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import whole_file
from .hash import LAST

SOURCES = Path(__file__).parent / "kernels"

FLAGS = (
    *("-std=c++17", "-O3", "-funroll-loops", "-shared", "-fPIC"),
    # The formula's own rounding: no product and sum in one step but where the source says so.
    "-ffp-contract=off",
    # Nobody asks for floating-point exceptions; with them, no loop with a condition is vectorised.
    *("-fno-trapping-math", "-fno-math-errno"),
)
EXTRAS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ())
"""The first of these that a compiler takes is used."""

_POINTER, _INT, _SIZE, _WORD = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_uint32
_SIGNATURES: dict[str, dict[str, list[Any]]] = {
    "masks": {
        f"drop_{name}": [_POINTER] * 8 + [_SIZE, _WORD, _SIZE, _INT]
        for name in ("float32", "float64", "bfloat16")
    },
    "products": {
        "example_product": [_POINTER] * 8 + [_SIZE] * 3 + [_INT],
        "example_gradients": [_POINTER] * 10 + [_SIZE] * 3 + [_INT],
    },
    "activations": {
        "excess": [_POINTER] * 3 + [_SIZE, _INT],
        "sample": [_POINTER] * 4 + [_SIZE, _INT],
    },
}

_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}

_lock = threading.RLock()
_libraries: dict[str, Any] = {}
_drop_functions: dict[torch.dtype, Any] = {}


class NoCompiler(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says why."""


def library(name: str) -> Any:
    """The functions of `kernels/<name>.cpp`, which is compiled if it was not before.

    Raises:
        NoCompiler: there is no compiler, or it fails.
    """
    found = _libraries.get(name)
    if found is None:
        with _lock:
            found = _libraries.get(name)
            if found is None:
                found = _libraries[name] = _load(name)
    return found


def _load(name: str) -> Any:
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    program = shutil.which(compiler[0])
    if program is None:
        raise NoCompiler(f"no C++ compiler ({compiler[0]}) on the path")
    try:
        path = _folder() / f"{name}-{_fingerprint(program, compiler)}.so"
        if not path.exists():
            _build(compiler, SOURCES / f"{name}.cpp", path)
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise NoCompiler(str(error)) from error
    for function, arguments in _SIGNATURES[name].items():
        getattr(loaded, function).argtypes = arguments
        getattr(loaded, function).restype = None
    return loaded


def _folder() -> Path:
    """Where compiled kernels lie: `DROPCONNECT_CACHE_DIR`, else a folder of the user's cache, else one
    that lasts as long as the process."""
    given = os.environ.get("DROPCONNECT_CACHE_DIR")
    if given:
        folder = Path(given)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(base).expanduser() / "dropconnect-surgery"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # read-only, or no home
        return Path(tempfile.mkdtemp(prefix="dropconnect-surgery-"))


def _fingerprint(program: str, compiler: list[str]) -> str:
    """Of all that a compiled kernel depends on: sources, flags, compiler and processor."""
    parts: list[Any] = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    stat = os.stat(program)
    parts += [FLAGS, EXTRAS, compiler, os.path.realpath(program), stat.st_size, stat.st_mtime_ns]
    parts += [platform.system(), platform.machine(), _processor()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def _processor() -> str:
    """What `-march=native` looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(told)}))


def _build(compiler: list[str], source: Path, path: Path) -> None:
    """Compile beside `path`, then rename: processes that build at the same time do not meet."""
    with whole_file(path) as unfinished:
        for command in _commands(compiler, source, unfinished):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                return
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise NoCompiler(f"{shlex.join(compiler)} fails (exit {done.returncode}): {said[0]}")


def _commands(compiler: list[str], source: Path, output: str) -> Iterator[list[str]]:
    for extras in EXTRAS:
        yield [*compiler, *FLAGS, *extras, str(source), "-o", output]


def takes(first: Tensor, *others: Tensor) -> bool:
    """Whether the kernels can read tensors together: ordinary ones on the CPU, dense, all of one type,
    which they know."""
    if first.dtype not in _NAMES:
        return False
    for tensor in (first, *others):
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return False
        if tensor.dtype != first.dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return False
    return True


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def drop(
    weight: Tensor | None,
    anchor: Tensor | None,
    grad: Tensor | None,
    used: Tensor | None,
    masked_grad: Tensor | None,
    law: tuple[Tensor, Tensor, Tensor],
    multiplier: int = LAST,
    start: int = 0,
) -> None:
    """Write `used`, the masked weight, and `masked_grad`, the masked gradient, with one mask.

    All tensors are dense and have one dtype and one number of entries. `weight` and `used` may be
    None, and so may `grad` and `masked_grad`, which may also be the same tensor.

    Args:
        law: key, threshold and scale.
        multiplier: the last one of the hash.
        start: index of the first entry.
    """
    some = weight if weight is not None else grad
    assert some is not None
    function = _drop_functions.get(some.dtype)
    if function is None:
        function = getattr(library("masks"), f"drop_{_NAMES[some.dtype]}")
        _drop_functions[some.dtype] = function
    tensors = (weight, anchor, grad, used, masked_grad, *law)
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    threads = torch.get_num_threads()
    function(*addresses, start, multiplier & 0xFFFFFFFF, some.numel(), threads)


def example_product(
    x: Tensor,
    kept: Tensor,
    dropped: Tensor | None,
    law: tuple[Tensor, Tensor, Tensor],
    multipliers: Tensor,
) -> Tensor:
    """`x_r @ W_r^T` for every row r, each with a mask of its own.

    Args:
        x: (rows, in), float32 and contiguous as all tensors here.
        kept: (out, in), the entries of W_r that are kept: with `dropped`, as they are used; without,
            before they are scaled.
        dropped: (out, in), the entries that are dropped; None is zero.
        law: key, threshold and scale.
        multipliers: int32, (rows,), the last factor of the hash of each row.

    Returns:
        (rows, out).
    """
    product = x.new_empty(x.shape[0], kept.shape[0])
    tensors = (x, kept, dropped, *law, multipliers, product)
    sizes = (*product.shape, x.shape[1])
    function = library("products").example_product
    function(*map(_address, tensors), *sizes, torch.get_num_threads())
    return product


def example_gradients(
    grad: Tensor,
    x: Tensor,
    kept: Tensor,
    dropped: Tensor | None,
    law: tuple[Tensor, Tensor, Tensor],
    multipliers: Tensor,
    want_x: bool,
    want_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `example_product` by x and by the weight, with one hash for both.

    Args:
        grad: (rows, out), of the product.
        x, kept, dropped, law, multipliers: see `example_product`.
    """
    of_x = torch.empty_like(x) if want_x else None
    of_weight = torch.empty_like(kept) if want_weight else None
    columns = grad.t().contiguous()
    tensors = (columns, x, kept, dropped, *law, multipliers, of_x, of_weight)
    sizes = (*grad.shape, x.shape[1])
    function = library("products").example_gradients
    function(*map(_address, tensors), *sizes, torch.get_num_threads())
    return of_x, of_weight


def excess(mean: Tensor, var: Tensor) -> Tensor:
    """What a kink adds to an expectation: see `surgery.ops.expect.excess`.

    Args:
        mean, var: float32, dense and of one shape.
    """
    found = torch.empty_like(mean)
    addresses = map(_address, (mean, var, found))
    library("activations").excess(*addresses, mean.numel(), torch.get_num_threads())
    return found


def sample(mean: Tensor, var: Tensor, noise: Tensor, ratio: Tensor) -> None:
    """Draw from N(mean, ratio * var), in place: `mean` becomes the draw, `var` its derivative by var.

    Args:
        mean, var, noise: float32, dense and of one shape.
        ratio: float32, 0-d.
    """
    addresses = map(_address, (mean, var, noise, ratio))
    library("activations").sample(*addresses, mean.numel(), torch.get_num_threads())
