"""What varies although it is given plain tensors: dropouts, and embeddings that drop."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..base.torch_names import name_of
from ..moments.torch_functions import DROPOUTS
from .birth import OfOutputs
from .call import Call
from .recurrent import RECURRENT, is_packed
from .run import Run, Table
from .state import certain
from .value import Travelling


class Sources(TorchFunctionMode):
    """Sees the torch functions of a run, also those of plain tensors."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        name = name_of(func)
        if name == "embedding" and self._run.tables:
            call = Call.of(func, args, given)
            table = self._run.tables.get(id(call.argument(1, "weight")))
            if table is not None:
                return looked_up(self._run, call, table)
        drops = self._run.dropout and (name in DROPOUTS or _drops_inside(name, args, given))
        if drops and args and type(args[0]) is Tensor and args[0].is_floating_point():
            return func(Travelling.of(self._run, certain(args[0])), *args[1:], **given)
        return func(*args, **given)


def _drops_inside(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function has a dropout inside of it."""
    if name == "multi_head_attention_forward":
        return bool(kwargs.get("dropout_p", args[10] if len(args) > 10 else 0))
    if name in RECURRENT:
        return bool(args[6 if is_packed(args) else 5])
    return False


def looked_up(run: Run, call: Call, table: Table) -> Travelling:
    """Rows of an embedding that drops. A word that comes twice counts as two words."""
    index, weight = call.first, call.argument(1, "weight")
    with torch.no_grad():
        state = certain(F.embedding(index, weight.detach()))
        fresh = F.embedding(index, table.variance).to(state.variance.dtype)
    if table.unit == "element":
        return Travelling.of(run, run.born_apart(state, fresh))
    leading = tuple(range(-fresh.ndim, -1))
    own = {"input": leading, "output": (-1,), "tensor": ()}[table.unit]
    effect = torch.where(state.at < 0, -fresh.sqrt(), fresh.sqrt())
    return Travelling.of(run, run.born(state, OfOutputs(effect, own)))
