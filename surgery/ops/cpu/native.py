"""The kernels for the CPU: C++ of a few hundred lines, compiled by the machine's compiler at first use.

`kernels/*masks.cpp` and `kernels/products.cpp` compute those of `formula.py` and
`example_product.py` with the mask in registers, `kernels/activations.cpp` one of `expect.py`, and
`kernels/moments.cpp` those of `independent.py`.
`docs/performance.md` says what inductor reaches with the same formulas, and why that was not enough.
They take one to four seconds to compile. How they are compiled, kept and loaded is in `build.py`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...base.journal import Lock
from ...torch_private.modes import dispatch_modes
from ..hash import ROUND3, key_tensor
from ..law import Mask, Steps
from ..ordinary import is_ordinary
from ..part import Rows
from .build import NoCompiler, Source, load

_FLAGS = (
    *("-std=c++17", "-O3", "-funroll-loops", "-shared", "-fPIC"),
    # The formula's own rounding: no product and sum in one step but where the source says so.
    "-ffp-contract=off",
    # Nobody asks for floating-point exceptions; with them, no loop with a condition is vectorised.
    *("-fno-trapping-math", "-fno-math-errno"),
)
_EXTRAS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ())

Functions = Mapping[str, Sequence[Any]]
"""The functions of a library, with the types of their arguments."""

_POINTER, _INT, _SIZE, _WORD = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_uint32
_FLOAT = ctypes.c_float
_SIZES = ctypes.POINTER(ctypes.c_int64)
DROP_ARGUMENTS: list[Any] = [*[_POINTER] * 8, _SIZE, _WORD, _SIZE, _INT]
"""Of the functions that `DROP` in `kernels/drop.h` makes."""

_FLOATS = ("float32", "float64", "bfloat16")
_DROP = {f"drop_{name}": DROP_ARGUMENTS for name in _FLOATS}
_DROP_ROWS = {f"drop_rows_{name}": [*DROP_ARGUMENTS[:-1], *[_SIZE] * 2, _INT] for name in _FLOATS}
_DROP_SHARED = {f"drop_shared_{name}": [*[_POINTER] * 6, *[_SIZES] * 2, _INT] for name in _FLOATS}
_SIGNATURES: dict[str, dict[str, list[Any]]] = {
    "masks": _DROP,
    "shared": _DROP_SHARED,
    "example_masks": _DROP,
    "parts": _DROP_ROWS,
    "products": {
        "example_product": [_POINTER] * 8 + [_SIZE] * 3 + [_INT],
        "example_gradients": [_POINTER] * 10 + [_SIZE] * 3 + [_INT],
        "example_multipliers": [_POINTER] * 2 + [_SIZE],
    },
    "activations": {
        "excess": [_POINTER] * 3 + [_INT, _SIZE, _INT],
        "sample": [_POINTER] * 4 + [_SIZE, _INT],
    },
    "grams": {"weighted_gram": [_POINTER] * 4 + [_SIZE] * 5 + [_INT]},
    "moments": {
        "leaky_relu_moments": [_POINTER] * 5 + [_FLOAT, _SIZE, _INT],
        "gelu_moments": [_POINTER] * 5 + [_SIZE, _INT],
        "norm_moments": [_POINTER] * 6 + [_FLOAT, _INT, _SIZE, _SIZE, _INT],
        "softmax_moments": [_POINTER] * 4 + [_SIZE, _SIZE, _INT],
    },
}

NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}

_lock = Lock()
_libraries: dict[str, Any] = {}
_drop_functions: dict[tuple[str, torch.dtype], Any] = {}


def source(path: Path) -> Source:
    """A file as the kernels are compiled."""
    return Source(path, _FLAGS, _EXTRAS)


def open_library(functions: Functions, library: Path) -> Any:
    """The functions of a library.

    Raises:
        NoCompiler: it cannot be loaded, or has them not.
    """
    try:
        loaded = ctypes.CDLL(str(library))
        for function, arguments in functions.items():
            getattr(loaded, function).argtypes = arguments
            getattr(loaded, function).restype = None
    except (OSError, AttributeError) as error:
        raise NoCompiler(f"{library.name} cannot be used: {error}") from error
    return loaded


def library(name: str) -> Any:
    """The functions of `kernels/<name>.cpp`, which is compiled if it was not before.

    Raises:
        NoCompiler: there is no compiler, or it fails.
    """
    loaded = _libraries.get(name)
    return _lock.holding(partial(_loaded, name)) if loaded is None else loaded


def loaded(name: str) -> Any:
    """The same if it is there by now, else None."""
    return _libraries.get(name)


def _loaded(name: str) -> Any:
    if name not in _libraries:
        file = Path(__file__).parent / "kernels" / f"{name}.cpp"
        _libraries[name] = load(source(file), partial(open_library, _SIGNATURES[name]))
    return _libraries[name]


def takes(first: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels can read tensors together: ordinary ones on the CPU, dense, all of one type,
    which they know, while no mode looks on, to which what they write would be memory that nobody has
    filled."""
    if first.dtype not in NAMES or dispatch_modes():
        return False
    for tensor in (first, *others):
        if tensor is None:
            continue
        if tensor.dtype != first.dtype or not is_ordinary(tensor) or not tensor.is_contiguous():
            return False
    return True


def _run(function: Any, tensors: tuple[Tensor | None, ...], *numbers: float) -> None:
    """Call a function of a library: it takes addresses, numbers, and that of threads."""
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    function(*addresses, *numbers, torch.get_num_threads())


def _tensors_of(mask: Mask) -> tuple[Tensor, Tensor, Tensor]:
    """Key, threshold and scale, which the kernels read from memory."""
    return key_tensor(mask.key), mask.law.threshold, mask.law.scale


def drop(
    weight: Tensor | None,
    anchor: Tensor | None,
    grad: Tensor | None,
    used: Tensor | None,
    masked_grad: Tensor | None,
    mask: Mask,
    multiplier: int | None = None,
    start: int = 0,
) -> None:
    """Write `used`, the masked weight, and `masked_grad`, the masked gradient, with one mask.

    All tensors are dense and have one dtype and one number of entries. `weight` and `used` may be
    None, and so may `grad` and `masked_grad`, which may also be the same tensor.

    Args:
        mask: by element.
        multiplier: that of an example in round 3 of the hash; None for the mask of a batch.
        start: index of the first entry.
    """
    some = weight if weight is not None else grad
    assert some is not None
    name = "masks" if multiplier is None else "example_masks"
    function = _drop_functions.get((name, some.dtype))
    if function is None:
        function = getattr(library(name), f"drop_{NAMES[some.dtype]}")
        _drop_functions[name, some.dtype] = function
    key, law, _ = mask
    tensors = (weight, anchor, grad, used, masked_grad, key_tensor(key), law.threshold, law.scale)
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    threads = torch.get_num_threads()
    function(*addresses, start, (multiplier or 0) & 0xFFFFFFFF, some.numel(), threads)


_Four = ctypes.c_int64 * 4


def drop_shared(
    weight: Tensor, anchor: Tensor | None, used: Tensor, mask: Mask, steps: Steps
) -> None:
    """Write `used`, the masked weight, where entries share a mask entry.

    All tensors are dense and have one dtype and one number of entries. `steps`: the layout of the mask.
    """
    function = getattr(library("shared"), f"drop_shared_{NAMES[weight.dtype]}")
    sizes, apart = (_Four(*numbers) for numbers in steps)
    tensors = (weight, anchor, used, *_tensors_of(mask))
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    function(*addresses, sizes, apart, torch.get_num_threads())


def drop_rows(
    weight: Tensor | None,
    anchor: Tensor | None,
    grad: Tensor | None,
    used: Tensor | None,
    masked_grad: Tensor | None,
    mask: Mask,
    rows: Rows,
    multiplier: int = ROUND3,
) -> None:
    """`drop` for a part of a weight: rows that lie elsewhere in the whole.

    Args:
        mask: by element, of the whole.
        rows: where they lie.
        multiplier: that of an example in round 3 of the hash; else it is the mask of a batch.
    """
    some = weight if weight is not None else grad
    assert some is not None
    function = getattr(library("parts"), f"drop_rows_{NAMES[some.dtype]}")
    tensors = (weight, anchor, grad, used, masked_grad, *_tensors_of(mask))
    sizes = (rows.start, multiplier & 0xFFFFFFFF, some.numel(), rows.width, rows.stride)
    _run(function, tensors, *sizes)


def example_multipliers(examples: int, key: Tensor) -> Tensor:
    """`multipliers` of hash.py, with one call where that has thirty."""
    found = key.new_empty(examples)
    library("products").example_multipliers(key.data_ptr(), found.data_ptr(), examples)
    return found


def example_product(
    x: Tensor,
    kept: Tensor,
    dropped: Tensor | None,
    mask: Mask,
    multipliers: Tensor,
) -> Tensor:
    """`x_r @ W_r^T` for every row r, each with a mask of its own.

    Args:
        x: (rows, in), float32 and contiguous as all tensors here.
        kept: (out, in), the entries of W_r that are kept: with `dropped`, as they are used; without,
            before they are scaled.
        dropped: (out, in), the entries that are dropped; None is zero.
        mask: of example 0, by element.
        multipliers: int32, (rows,), of round 3 of the hash for each row.

    Returns:
        (rows, out).
    """
    product = x.new_empty(x.shape[0], kept.shape[0])
    tensors = (x, kept, dropped, *_tensors_of(mask), multipliers, product)
    _run(library("products").example_product, tensors, *product.shape, x.shape[1])
    return product


def example_gradients(
    grad: Tensor,
    x: Tensor,
    kept: Tensor,
    dropped: Tensor | None,
    mask: Mask,
    multipliers: Tensor,
    want_x: bool,
    want_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `example_product` by x and by the weight, with one hash for both.

    Args:
        grad: (rows, out), of the product.
        x, kept, dropped, mask, multipliers: see `example_product`.
    """
    of_x = torch.empty_like(x) if want_x else None
    of_weight = torch.empty_like(kept) if want_weight else None
    columns = grad.t().contiguous()
    masks = (*_tensors_of(mask), multipliers)
    tensors = (columns, x, kept, dropped, *masks, of_x, of_weight)
    _run(library("products").example_gradients, tensors, *grad.shape, x.shape[1])
    return of_x, of_weight


def excess(mean: Tensor, var: Tensor, rectified: bool = False) -> Tensor:
    """What a kink adds to an expectation: see `surgery.ops.expect.excess`.

    Args:
        mean, var: float32, dense and of one shape.
        rectified: whether to add relu(mean).
    """
    out = torch.empty_like(mean)
    _run(library("activations").excess, (mean, var, out), rectified, mean.numel())
    return out


def sample(mean: Tensor, var: Tensor, noise: Tensor, ratio: Tensor) -> None:
    """Draw from N(mean, ratio * var), in place: `mean` becomes the draw, `var` its derivative by var.

    Args:
        mean, var, noise: float32, dense and of one shape.
        ratio: float32, 0-d.
    """
    _run(library("activations").sample, (mean, var, noise, ratio), mean.numel())


def moments_of_entries(
    name: str, mean: Tensor, variance: Tensor, moves: bool, *parameters: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean and variance of a function of each entry, and its gain if it `moves`: see
    `surgery.ops.independent`.

    Args:
        name: of the function of the library.
        mean, variance: float32, dense and of one shape, as in the functions below.
    """
    first, second = torch.empty_like(mean), torch.empty_like(mean)
    gain = torch.empty_like(mean) if moves else None
    tensors = (mean, variance, first, second, gain)
    _run(getattr(library("moments"), name), tensors, *parameters, mean.numel())
    return first, second, gain


def moments_of_softmax(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Of a softmax along the last dimension."""
    first, second = torch.empty_like(mean), torch.empty_like(mean)
    tensors, width = (mean, variance, first, second), mean.shape[-1]
    _run(library("moments").softmax_moments, tensors, mean.numel() // width, width)
    return first, second


def moments_of_norm(
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """Of a norm along the last dimension."""
    first, second = torch.empty_like(mean), torch.empty_like(mean)
    tensors, width = (mean, variance, weight, bias, first, second), mean.shape[-1]
    sizes = (eps, int(centred), mean.numel() // width, width)
    _run(library("moments").norm_moments, tensors, *sizes)
    return first, second


def weighted_gram(by: Tensor, x: Tensor, square: Tensor) -> Tensor:
    """What `surgery.ops.grams.weighted_gram` computes; float32 and contiguous."""
    outputs, examples, rows, out = by.shape
    found = x.new_empty(examples, outputs, outputs)
    sizes = (outputs, examples, rows, out, x.shape[-1])
    _run(library("grams").weighted_gram, (by, x, square, found), *sizes)
    return found
