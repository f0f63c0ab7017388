"""torch.distributed.checkpoint: plain keys load into an operated model, sharded or not, and
`get_plain_state_dict` has them.

Its setters match keys by themselves before they call `model.load_state_dict`. Loaded through the entry
point `surgery.plugins` once they can have been called; its getters still return raw keys and names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.distributed.checkpoint import state_dict as setters

from surgery.modules.keys import plain_keys, plain_state_dict, raw_state_dict
from surgery.verbs.savers import teach_function


def get_plain_state_dict(
    model: nn.Module, optimizers: Any = (), *, options: setters.StateDictOptions | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """torch's `get_state_dict` with the names that the model has without DropConnect, and no anchors:
    to be saved for a plain model, or to be loaded from its checkpoint.

    `set_state_dict` of torch takes both back. `save_dropconnect` writes the plan and the anchors.

    Args:
        model: operated or not, in DDP, FSDP2 or cut by tensor parallelism.
        optimizers: one or several.
        options: of torch's function.

    Returns:
        the state dicts of the model and of the optimizers.
    """
    of_model, of_optimizers = setters.get_state_dict(model, optimizers, options=options)
    plain = {raw: name for raw, name in plain_keys(model).items() if name is not None}
    return plain_state_dict(model, of_model), _renamed(of_optimizers, plain)


def _takes_plain(load: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(load)

    def taught(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        model, given = call.arguments["model"], call.arguments
        if given.get("model_state_dict"):
            given["model_state_dict"] = _raw_model(model, given["model_state_dict"])
        if given.get("optim_state_dict"):
            raw = {plain: raw for raw, plain in plain_keys(model).items() if plain is not None}
            given["optim_state_dict"] = _renamed(given["optim_state_dict"], raw)
        return load(*call.args, **call.kwargs)

    return taught


def _raw_model(model: Any, given: dict[Any, Any]) -> dict[Any, Any]:
    if isinstance(next(iter(given)), nn.Module):  # by submodule, which torch deprecates
        return {module: raw_state_dict(module, part) for module, part in given.items()}
    return raw_state_dict(model, given)


def _renamed(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The state of an optimizer by other names of parameters: the state by name and the groups of
    names, or both flattened into dotted keys."""
    if not names:
        return dict(given)
    if "state" not in given:
        return {_rename_inside(key, names): value for key, value in given.items()}
    groups = [
        {**group, "params": [names.get(name, name) for name in group["params"]]}
        if "params" in group
        else group
        for group in given.get("param_groups", [])
    ]
    state = {names.get(name, name): value for name, value in given["state"].items()}
    return {**given, "state": state, "param_groups": groups}


def _rename_inside(key: str, names: Mapping[str, str]) -> str:
    """`state.<name>.<what>` or `param_groups.<name>.<what>` with the other name."""
    head, *parts = key.split(".")
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        if name in names:
            return ".".join([head, names[name], *parts[end:]])
    return key


for name in ("set_model_state_dict", "set_optimizer_state_dict", "set_state_dict"):
    teach_function(getattr(setters, name), _takes_plain)
