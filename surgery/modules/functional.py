"""`torch.func.functional_call` of an operated model takes plain names too.

That function sets attributes by name, and knows by name which parameters are tied. While DropConnect is
in place `weight` is no name of a parameter: given that, it would not replace the weights that are tied
to it, or fail in the middle and leave in the model what it had set until then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..base.caching import cached
from ..spec.errors import SurgeryError
from ..torch_private.functional import wrap_functional_call
from .keys import plain_keys, raw_state_dict


@cached
def teach_functional_call() -> None:
    """From now on plain names are replaced by raw ones before `functional_call` sees them."""
    wrap_functional_call(_with_raw_names)


def _with_raw_names(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def taught(module: nn.Module, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        raw_of = {} if torch.compiler.is_dynamo_compiling() else _plain_names_in(module, tensors)
        if not raw_of:
            return call(module, tensors, *args, **kwargs)
        raw = raw_state_dict(module, tensors)
        try:
            return call(module, raw, *args, **kwargs)
        finally:  # the call puts into the dict what the forward has assigned
            tensors.update({name: raw[raw_of.get(name, name)] for name in tensors})

    return taught


def _plain_names_in(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, str]:
    """The raw name by plain name, for those of `tensors` that have the plain name of a site.

    Raises:
        SurgeryError: one is given under both names.
    """
    raw_of = {plain: raw for raw, plain in plain_keys(module).items() if plain in tensors}
    for plain, raw in raw_of.items():
        if raw in tensors:
            raise SurgeryError(
                f"{plain!r} and {raw!r} are one weight: give functional_call one of them"
            )
    return {plain: raw for plain, raw in raw_of.items() if plain is not None}
