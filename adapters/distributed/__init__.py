"""torch.distributed.checkpoint: plain keys load into an operated model, sharded or not.

Its setters match keys by themselves before they call `model.load_state_dict`. Loaded through the entry
point `surgery.plugins` once they can have been called; its getters still return raw keys and names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.checkpoint import state_dict as setters

from surgery.modules.keys import plain_keys, raw_state_dict
from surgery.verbs.savers import teach_function


def _takes_plain(load: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(load)

    def taught(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        model, given = call.arguments.get("model"), call.arguments
        if given.get("model_state_dict"):
            given["model_state_dict"] = _raw_model(model, given["model_state_dict"])
        if given.get("optim_state_dict"):
            given["optim_state_dict"] = _raw_optimizer(model, given["optim_state_dict"])
        return load(*call.args, **call.kwargs)

    return taught


def _raw_model(model: Any, given: dict[Any, Any]) -> dict[Any, Any]:
    if isinstance(next(iter(given)), nn.Module):  # by submodule, which torch deprecates
        return {module: raw_state_dict(module, part) for module, part in given.items()}
    return raw_state_dict(model, given)


def _raw_optimizer(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The state by parameter name and the groups of names, or both flattened into dotted keys."""
    raw = {plain: raw for raw, plain in plain_keys(model).items() if plain is not None}
    if not raw:
        return given
    if "state" not in given:
        return {_rename_inside(key, raw): value for key, value in given.items()}
    groups = [
        {**group, "params": [raw.get(name, name) for name in group["params"]]}
        if "params" in group
        else group
        for group in given.get("param_groups", [])
    ]
    state = {raw.get(name, name): value for name, value in given["state"].items()}
    return {**given, "state": state, "param_groups": groups}


def _rename_inside(key: str, raw: dict[str, str]) -> str:
    """`state.<name>.<what>` or `param_groups.<name>.<what>` with the raw name."""
    head, *parts = key.split(".")
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        if name in raw:
            return ".".join([head, raw[name], *parts[end:]])
    return key


for name in ("set_model_state_dict", "set_optimizer_state_dict", "set_state_dict"):
    teach_function(getattr(setters, name), _takes_plain)
