"""What lies inside of an `nn.Module`: its call, its hooks, and what others of torch leave in it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as of_all
from torch.nn.modules.module import register_module_module_registration_hook

COMMON = ("_parameters", "_buffers", "_modules", "_load_from_state_dict", "_apply")
"""Names of `nn.Module` that are used wherever they are needed, and not only here.

The first three are the dicts in which a module has its parameters, buffers and children, in order.
Surgery renames a parameter by changing what is in the dict; the public ways would move it to the end.
The other two are methods that every module class may override, as torch's own do: how a module takes
its part of a state dict, and how it is moved to a device or dtype.
"""

CALL: CodeType = nn.Module._call_impl.__code__
"""The code of a call of a module, around its hooks and its forward. Without it, a weight that a forward
reads could not be told from one that is read outside of any."""

on_registration = register_module_module_registration_hook
"""Lets a function see each child that a module gets: `on_registration(hook)`, `hook(owner, name,
child)`. Public; but copies, pickles and passes of torch.fx have to put children in by what calls it."""


def forward_hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks around the forward of a module, those of all modules included. Without them, a hook
    that reads a weight would be taken for the forward."""
    for table in (
        *(module._forward_pre_hooks, module._forward_hooks),
        *(of_all._global_forward_pre_hooks, of_all._global_forward_hooks),
    ):
        yield from table.values()


def pre_hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks before its forward. Pruning and the norms of weights are among them, as objects."""
    yield from module._forward_pre_hooks.values()


PRUNED = "_tensor_name"
"""Where the hook of `torch.nn.utils.prune` keeps the name of the weight that it computes. Without it,
the refusal of a pruned weight could not say which call takes the pruning out."""


def before_loading(owner: nn.Module, hook: Callable[..., Any]) -> None:
    """Let `hook(state_dict, prefix, ...)` see what is loaded into a module.

    The public `register_load_state_dict_pre_hook` gives the hook the module too, by a reference that is
    kept in the module: a GraphModule cannot be pickled with one to itself.
    """
    owner._register_load_state_dict_pre_hook(hook)


def not_before_loading(owner: nn.Module, hook: Callable[..., Any]) -> None:
    """Take such a hook out again. The handle that would do it is not in copies and pickles."""
    hooks: dict[int, Any] = owner._load_state_dict_pre_hooks
    for key in [key for key, held in hooks.items() if held.hook == hook]:
        del hooks[key]


def as_state_dict_of(source: Mapping[str, Any], items: dict[str, Any]) -> dict[str, Any]:
    """A state dict of these items, with the versions of modules that `source` has, if it has any.

    Without them, a module class whose form changed once takes what it has just saved for the old form.
    """
    versions = getattr(source, "_metadata", None)
    if versions is None:
        return items
    found: dict[str, Any] = OrderedDict(items)
    found._metadata = versions  # type: ignore[attr-defined]
    return found


def hooks_after_saving(owner: nn.Module) -> dict[int, Any]:
    """What `register_state_dict_post_hook` puts hooks into. It is written down before one is put in, so
    that the hook is gone afterwards wherever an interrupt lands."""
    return owner._state_dict_hooks


def convolved(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the forward of a convolution computes, with another weight: `F.conv1d` and its like, after
    the padding that the module asks for. Without it, its modes of padding had to be done again here."""
    u: Tensor = module._conv_forward(x, weight, bias)
    return u


_CONVOLVED = frozenset(cls._conv_forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def filters(module: Any) -> tuple[Any, ...] | None:
    """Stride, padding, dilation and groups, if `torch.convolution` with these is all that `convolved`
    does."""
    stride, padding, dilation = module.stride, module.padding, module.dilation
    if not type(stride) is type(padding) is type(dilation) is tuple:
        return None
    if module.padding_mode != "zeros" or module.transposed:
        return None
    if getattr(module._conv_forward, "__func__", None) not in _CONVOLVED:  # overridden or replaced
        return None
    return stride, padding, dilation, module.groups


REPLICA = "_is_replica"
"""An attribute of the copies that `nn.DataParallel` makes for one forward, which share what is kept of
p: without it, each would write there what is on its device."""

MANAGED = "_is_fsdp_managed_module"
"""An attribute of modules whose parameters FSDP holds, of either version, by their present names.
Without it, surgery would rename parameters under it."""
