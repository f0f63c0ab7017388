"""When the extension is compiled and loaded, and which kernels it knows."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import logging
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...base.journal import Lock
from ...torch_private.gpu import Handle, addresses, handle_of
from ...torch_private.tracing import is_capturing
from ..cpu import native, workspace
from ..cpu.build import NoCompiler, Source, load, load_kept
from ..gpu.launch import NUMBERS, Launched, repeated
from ..gpu.masks import BLOCK, kinds_of, mask_kernel, parameters
from ..switch import compile_enabled

product: Callable[..., Tensor | None] | None = None
"""None until it is loaded.

    product(x, weight, bias, about, rank)

x: (..., in), or (examples, in, ...). weight: masked with a new key. bias: (out,), or None.
about: law, layout and anchor of the mask, the weight's name, and how it is multiplied: see
`product.How`. rank: see `draw_key`.

Returns what the plain forward returns, differentiable. None, and nothing is done, where Python has to
do it: no gradients are recorded, tensors are more than dense values, a CUDA graph is captured, a kernel
has not been launched by Python before.
"""

mask: Callable[..., Tensor | None] | None = None
"""The masked weight alone, in the same way: `mask(weight, (anchor, mask, dtype))` of `ops/mask.py`."""

example: Callable[..., Tensor | None] | None = None
gaussian: Callable[..., Tensor | None] | None = None
"""The same for other samplings, on a GPU. None until it is loaded, and where there is no driver.

    example(x, weight, bias, (anchor, mask, ...))
    gaussian(x, weight, bias, (anchor, ratio), noise)

See `example_operators.py` and `gaussian_linear.py`.
"""

PATIENCE = 500
"""Products after which it is worth half a minute of the compiler: a script that ends before trains
nothing."""

_log = logging.getLogger("surgery")
_lock = Lock()
_products = 0
_asked = False
_module: Any = None
masks_taken = 0
"""How many of `mask_kernel` it was given."""
_shares = False
"""Whether it was given the kernels of the CPU for weights that share mask entries."""
_kept: list[Handle] = []
"""Of the kernels that the extension launches."""
_in_python: dict[str, Callable[..., Any]] = {}


def source() -> Source:
    """The file, and how it is compiled against the installed torch."""
    root = Path(torch.__file__).parent
    headers = (
        *(f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"),
        f"-I{sysconfig.get_path('include')}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    )
    libraries = (f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch_python")
    return Source(
        Path(__file__).with_name("linear.cpp"),
        ("-O2", "-w", "-shared", "-fPIC", "-fvisibility=hidden", *headers),
        (("-std=c++20",), ("-std=c++17",)),
        libraries,
        (torch.__version__, sysconfig.get_config_var("SOABI") or ""),
    )


def use(**functions: Callable[..., Any]) -> None:
    """Say who does what the extension leaves to Python: `eager`, `example`, `gaussian`, `mask`, the
    gradients of nodes; `product`, `gradients` and `drop`, what the operators of a graph do;
    and `steps`, how a layout is counted."""
    _in_python.update(functions)


def note_product() -> None:
    """Count a product, or a masked weight of a training, that Python has computed, and take the
    extension into use if it is there by now.

    The first one looks in the cache. It is compiled in the background after `PATIENCE` of them.
    """
    global _products, _asked
    if _module is not None:
        take_kernels()
        return
    _products += 1
    if _products == 1 and compile_enabled("cpu"):
        _lock.holding(lambda: _install(load_kept(source(), _opened)))
    elif _products >= PATIENCE and not _asked and compile_enabled("cpu"):
        _asked = True
        threading.Thread(target=_compile, name="dropconnect-compiler", daemon=True).start()


def compile_now() -> bool:
    """Compile the extension, or load it, and wait for that. Whether it is there."""
    if _module is None and compile_enabled("cpu"):
        _compile()
    take_kernels()
    return _module is not None


def take_kernels() -> None:
    """Let the extension know the kernels that are there by now. Python calls it after whatever the
    extension has left to it, since a kernel of a GPU is compiled when Python launches it."""
    global product, mask, example, gaussian, masks_taken, _shares
    if _module is None:
        return
    if product is None:
        try:
            masks = native.library("masks")
        except NoCompiler:
            masks = None
        if masks is not None:
            _take_on_cpu(masks, "drop")
        driver = addresses()
        if driver is not None:
            _module.use_driver(*driver)
            example, gaussian, repeated.wanted = _module.example, _module.gaussian, True
        product, mask = _module.product, _module.mask
    if not _shares and (shared := native.loaded("shared")) is not None:
        _take_on_cpu(shared, "drop_shared")
        _shares = True
    if len(mask_kernel.made) > masks_taken and not is_capturing():
        for known in tuple(mask_kernel.made)[masks_taken:]:
            _take_mask(known, mask_kernel.made[known])
        masks_taken = len(mask_kernel.made)
    while repeated.launched:
        _take_launch(repeated.launched.pop())


def on_the_gpu() -> bool:
    """Whether it is there, after `compile_now`, and can launch on NVIDIA's GPUs."""
    return addresses() is not None and compile_now()


def release() -> None:
    """Free the memory for masked weights that nobody uses now, here and in Python."""
    workspace.release()
    if _module is not None:
        _module.release()


def _compile() -> None:
    _lock.holding(_compile_once)


def _compile_once() -> None:
    try:
        if _module is None:
            _install(load(source(), _opened))
    except NoCompiler as error:
        _log.info("DropConnect's extension is not compiled, and Python does its work: %s", error)


def _opened(library: Path) -> Any:
    loader = importlib.machinery.ExtensionFileLoader("linear", str(library))
    spec = importlib.util.spec_from_loader("linear", loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise NoCompiler(f"{library.name} cannot be used: {error}") from error
    return module


def _install(module: Any) -> None:
    global _module
    if module is not None and _module is None:
        names = "eager", "product", "gradients", "example", "gaussian", "mask", "drop", "steps"
        module.otherwise(*(_in_python[name] for name in names))
        _module = module


def _take_on_cpu(library: Any, name: str) -> None:
    """Let it call the functions of a library, one for each dtype."""
    for dtype, of_dtype in native.NAMES.items():
        function = getattr(library, f"{name}_{of_dtype}", None)
        if function is not None:
            address = ctypes.cast(function, ctypes.c_void_p).value
            _module.use_cpu(NUMBERS[dtype], address, name == "drop_shared")


def _take_mask(known: Any, compiled: Any) -> None:
    """Let it launch a kernel of `gpu/masks.py`, if that has the parameters which it would give."""
    kinds = kinds_of(known)
    if kinds is None:
        return
    weight, used, grad, anchor, sixteen = kinds
    handle = handle_of(compiled)
    if handle is None or grad not in (False, used) or anchor not in (False, weight):
        return
    expected = parameters(bool(anchor), bool(grad))
    if not _has(handle, expected, known):
        return
    numbers = NUMBERS[weight], NUMBERS[used]
    beside = bool(anchor), bool(grad), sixteen
    of_kernel = handle.function, handle.threads, handle.shared, BLOCK
    _module.use_gpu(known[0], *numbers, *beside, *of_kernel)


def _take_launch(launched: Launched) -> None:
    """The same for a kernel that is launched as before."""
    plan, compiled, grid = launched
    handle = handle_of(compiled)
    if handle is not None and _has(handle, plan.parameters(), plan):
        of_kernel = handle.function, handle.threads, handle.shared
        _module.use_plan(plan.key, *of_kernel, grid, plan.numbers)


def _has(handle: Handle, expected: tuple[int, ...], known: Any) -> bool:
    """Whether a kernel has the parameters which the extension gives, and perhaps two of Triton's own;
    then it is kept."""
    given, of_triton = handle.parameters[: len(expected)], handle.parameters[len(expected) :]
    if given != expected or of_triton not in ((), (8,), (8, 8)):
        _log.warning("the extension does not know how to launch %s: %s", known, handle.parameters)
        return False
    _kept.append(handle)
    return True
