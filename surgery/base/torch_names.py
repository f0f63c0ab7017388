"""One name for a torch function, however it is given.

`F.relu`, `torch.relu_`, `Tensor.relu`, `"relu"` (the name of a method), `aten.relu_.default`,
`torch.ops.aten.relu` and `nn.ReLU` all have the name `"relu"`. `Tensor.__radd__`, `operator.iadd` and
`aten.add.Tensor` have the name `"add"`. `surgery.moments.torch_functions` says what the functions do.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

_ASSIGNING = "add and floordiv lshift matmul mod mul or pow rshift sub truediv xor"
WRITERS = {f"i{name}": name for name in _ASSIGNING.split()}
"""Python's operators that assign, as `x += y`, and those that they apply. On tensors all of them write
into `x`, but for `imatmul`: tensors have no such method, so that Python makes a new one."""

_SYNONYMS = {
    "absolute": "abs",
    **{f"arc{name}": f"a{name}" for name in ("cos", "cosh", "sin", "sinh", "tan", "tanh")},
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "log_sigmoid": "logsigmoid",
    "moveaxis": "movedim",
    "multiply": "mul",
    "negative": "neg",
    "not_equal": "ne",
    "pos": "positive",
    "radd": "add",
    "rmul": "mul",
    "subtract": "sub",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "swish": "silu",
    "true_divide": "div",
    "truediv": "div",
}
"""Other names of the same function: Python's operators, and torch's synonyms."""

_UNDERSCORED = (
    "alpha_dropout conv_transpose1d conv_transpose2d conv_transpose3d embedding_bag "
    "feature_alpha_dropout group_norm gru_cell layer_norm leaky_relu log_softmax lstm_cell rms_norm"
)
"""Functions whose class has the same name, without underscores."""

_MODULES = {
    **{name.replace("_", ""): name for name in _UNDERSCORED.split()},
    **{f"{kind}norm{n}d": f"{kind}_norm" for kind in ("batch", "instance") for n in (1, 2, 3)},
    "multiheadattention": "multi_head_attention_forward",
    "rnncell": "rnn_tanh_cell",
    "softmax2d": "softmax",
    "syncbatchnorm": "batch_norm",
}
"""From the name of a class of `torch.nn`, in small letters, to its function, where they differ."""


def spelling(function: Any) -> str:
    """The name by which a function is called, which tells whether it writes: `relu_` for
    `Tensor.relu_` and `aten.relu_.default`, `iadd` for `operator.iadd` and `Tensor.__iadd__`.

    Args:
        function: a Python function or method, the name of a method, or an operator of `torch.ops`, with
            its overload or without.
    """
    if isinstance(function, str):
        name = function
    else:
        function = getattr(function, "overloadpacket", function)
        # Formatted: dynamo of torch 2.14 knows a method's name as a constant in no other way.
        name = f"{getattr(function, '__name__', type(function).__name__)}"
        if getattr(operator, name, None) is function:
            return name.strip("_")  # `operator.and_` is `and`, which is a word of Python
    return name[2:-2] if name.startswith("__") else name


def canonical(name: str) -> str:
    """`softmax` for `_softmax`, `relu` for `relu_`, `add` for `radd` and `iadd`."""
    name = name.strip("_")
    name = WRITERS.get(name, name)
    return _SYNONYMS.get(name, name)


def name_of(function: Any) -> str:
    """The one name of a function, given in any of the forms of `spelling`, or as a module or a class of
    modules that calls it."""
    if isinstance(function, nn.Module):
        function = type(function)
    if isinstance(function, type) and issubclass(function, nn.Module):
        return _name_of_class(function)
    return canonical(spelling(function))


def _name_of_class(module_class: type[nn.Module]) -> str:
    """That of the first class of `torch.nn` which it is or inherits from; a class that torch does not
    know has its own name in small letters."""
    classes = (cls for cls in module_class.__mro__ if cls is not nn.Module)
    known = next((cls for cls in classes if vars(nn).get(cls.__name__) is cls), module_class)
    name = known.__name__.lower().removeprefix("lazy")
    return _MODULES.get(name, name)


def of_two(name: str, args: Sequence[Any]) -> str:
    """`maximum` for `torch.max(x, y)`, which `torch.max(x, dim)` and `torch.max(x)` are not; the same
    for `min`; any other name as it is."""
    two = name in ("max", "min") and len(args) == 2 and not isinstance(args[1], int)
    return f"{name}imum" if two else name


def is_of_torch(function: Any) -> bool:
    """Whether torch itself has this function, or this class of modules."""
    name = getattr(function, "__name__", None)
    spaces = (torch, nn.functional, torch.Tensor, nn)
    return isinstance(name, str) and any(getattr(one, name, None) is function for one in spaces)


def writes(name: str) -> bool:
    """Whether a function of this `spelling` writes its result into its first argument."""
    if name in WRITERS:
        return name != "imatmul"
    return name == "setitem" or name.endswith("_")


def twin_of(name: str) -> Any:
    """The function that returns what the one of this `spelling` would write; None if there is none."""
    if name in WRITERS:
        return getattr(torch.Tensor, f"__{WRITERS[name]}__")
    plain = name.removesuffix("_")
    twin = getattr(torch.Tensor, plain, None) or getattr(nn.functional, plain, None)
    return twin if callable(twin) else None  # `requires_grad` is none
