"""What graphs make of a parameter: its kind, the meaning of its dimensions, and its bias."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from surgery.kinds.kind import OTHER
from surgery.kinds.torch_kinds import columns, conv_axes, rows
from surgery.modules import Axes, Kind

from .operations import function_of
from .uses import UsingNode, plain_name

_KINDS = {
    **dict.fromkeys(("linear", "addmm", "matmul", "grouped_mm", "bilinear"), "linear"),
    **dict.fromkeys(("lstm", "gru", "rnn"), "rnn"),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_cell"), "rnn-cell"),
    "conv": "conv",
    "embedding": "embedding",
    "attention": "attention",
}
"""The kind of weight that an operation has."""


@dataclass(frozen=True)
class Role:
    """What the graph makes of one parameter. Plain data: it outlives the graph."""

    kind: str = "other"
    default: bool = False
    """Whether a target that names the owner means it."""
    axes: str | None = None
    """`"rows"`, `"columns"` or `"conv"`: the meaning of the dimensions."""
    groups: int = 1
    transposed: bool = False
    bias: str | None = None
    """Name of the parameter of the same owner that is added to the result."""


def role_of(uses: Iterable[UsingNode]) -> Role:
    """What the uses of a parameter agree on. Where they differ in what its dimensions mean, `axes` is
    None; if none is known, the role is `Role()`."""
    roles = dict.fromkeys(map(_role_of_use, uses))
    known = [role for role in roles if role.kind != "other"]
    if not known:
        return Role()
    first = next((role for role in known if role.default), known[0])
    same = all(role.axes == first.axes for role in known)
    bias = first.bias if len(known) == 1 else None
    return replace(first, axes=first.axes if same else None, bias=bias)


def _role_of_use(use: UsingNode) -> Role:
    kind = _KINDS.get(use.operation.name, "other")
    function = function_of(use.node, use.read.graph_module)
    if kind == "other" or function == "scaled_dot_product_attention":
        return Role()
    parameter = use.read.owner._parameters.get(str(use.read.node.target).rpartition(".")[2])
    dims = 0 if parameter is None else parameter.ndim
    if not use.is_weight or dims < 2:
        return Role(kind, axes="rows" if dims == 1 else None)
    bias = _bias_name(use)
    if kind == "rnn":
        return Role(kind, _is_recurrent(use), "rows", bias=bias)
    if kind == "rnn-cell":
        return Role(kind, True, "rows", bias=bias)
    if kind == "conv":
        groups, transposed = _conv(use)
        return Role(kind, True, "conv", groups, transposed, bias)
    columns_first = (use.operation.order == "in_out") != use.flipped
    known = use.operation.order is not None and dims == 2
    return Role(kind, True, ("columns" if columns_first else "rows") if known else None, bias=bias)


def _parameters_of(use: UsingNode) -> list[Any]:
    listed = use.operation.argument(use.node, use.operation.weight)
    return list(listed) if isinstance(listed, (list, tuple)) else [listed]


def _stride(use: UsingNode) -> int:
    """Parameters of one layer in one direction: 2, 4 with biases, one more with a projection."""
    flags: Any = use.node.args[len(use.operation.arguments) :]
    layers, directions = (int(flags[1]), 1 + bool(flags[4])) if len(flags) > 4 else (1, 1)
    return max(len(_parameters_of(use)) // (layers * directions), 1)


def _is_recurrent(use: UsingNode) -> bool:
    """Whether a parameter of an RNN is a hidden-to-hidden weight: the second of its layer."""
    return _parameters_of(use).index(use.value) % _stride(use) == 1


def _bias_name(use: UsingNode) -> str | None:
    """Name of the bias that goes with the weight, if it is a parameter of the same owner."""
    if use.operation.name in ("lstm", "gru", "rnn"):
        listed, stride = _parameters_of(use), _stride(use)
        index = listed.index(use.value)
        node = listed[index + 2] if stride >= 4 and index % stride < 2 else None
    else:
        node = use.operation.argument(use.node, use.operation.bias)
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    path, _, name = str(node.target).rpartition(".")
    return plain_name(use.read.owner, name) if path == use.read.path else None


def _conv(use: UsingNode) -> tuple[int, bool]:
    """Groups of a convolution, and whether it is transposed."""
    function, args = function_of(use.node, use.read.graph_module), use.node.args
    if function == "convolution":
        return int(_at(args, 8, 1)), bool(_at(args, 6, False))
    groups: Any = use.node.kwargs.get("groups", _at(args, 6, 1))
    return int(groups), "transpose" in function


def _at(args: tuple[Any, ...], index: int, default: Any) -> Any:
    return args[index] if index < len(args) else default


def kind_of_roles(roles: dict[str, Role]) -> Kind:
    """The kind of a module whose parameters play these roles."""
    kinds = {role.kind for role in roles.values() if role.default}
    return OTHER.but(
        name=kinds.pop() if len(kinds) == 1 else "graph",
        weights=lambda module: tuple(name for name, role in roles.items() if role.default),
        axes=lambda module, name, weight: _axes(roles.get(name, Role()), weight),
        bias=lambda name: roles.get(name, Role()).bias,
        linear=any(role.kind == "linear" and role.default for role in roles.values()),
    )


def _axes(role: Role, weight: Tensor) -> Axes | None:
    if role.axes == "conv":
        return conv_axes(weight, role.groups, role.transposed)
    if role.axes == "columns":
        return columns(nn.Module(), "", weight)
    return None if role.axes is None else rows("", weight)
