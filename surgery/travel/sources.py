"""What varies although it is given plain tensors: dropouts."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..base.torch_names import name_of
from ..moments.torch_functions import DROPOUTS
from .recurrent import RECURRENT, is_packed
from .run import Run
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
