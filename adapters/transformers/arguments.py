"""DropConnect as arguments of a Trainer, beside `neftune_noise_alpha` and the others."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers.trainer import Trainer

from surgery.adapters.transformers.callback import DropConnectCallback
from surgery.base.caching import cached
from surgery.verbs.savers import Method, teach


@dataclass
class DropConnectFields:
    """What `with_dropconnect` adds to a class of arguments."""

    dropconnect_p: float | None = field(
        default=None,
        metadata={"help": "Probability of dropping a weight; 0.1 if only targets are given."},
    )
    dropconnect_targets: list[str] | None = field(
        default=None,
        metadata={"help": "Names or globs of what to drop; all-linear if only p is given."},
    )
    dropconnect_exclude: list[str] | None = field(
        default=None, metadata={"help": "Names or globs of what not to drop."}
    )
    dropconnect_schedule: Literal["constant", "linear", "cosine"] = field(
        default="constant", metadata={"help": "How p falls to 0 over training."}
    )
    dropconnect_warmup: float = field(
        default=0.0, metadata={"help": "Fraction of training over which p rises from 0."}
    )
    dropconnect_unit: Literal["element", "input", "output", "tensor"] = field(
        default="element", metadata={"help": "What shares one mask entry."}
    )
    dropconnect_toward: Literal["zero", "pretrained"] = field(
        default="zero", metadata={"help": "Where a dropped weight goes; pretrained is mixout."}
    )
    dropconnect_sampling: Literal["batch", "example", "gaussian"] = field(
        default="batch", metadata={"help": "How often a mask is drawn."}
    )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By the class of arguments that it extends: `training_args.bin` is a pickle."""
        kind = type(self)
        if kind.__module__ == __name__:
            return _rebuilt, (kind.__mro__[2], self.__dict__)
        return super().__reduce_ex__(protocol)  # somebody's own subclass


@cached
def with_dropconnect(arguments: type[Any]) -> type[Any]:
    """A class of training arguments that takes DropConnect along.

        args = with_dropconnect(TrainingArguments)("out", dropconnect_p=0.1)
        Trainer(model, args, ...).train()

    Any Trainer that gets such arguments puts a `DropConnectCallback` in, if `dropconnect_p` or
    `dropconnect_targets` is given. The names and meanings are those of its arguments, with
    `dropconnect_` before. `HfArgumentParser` takes the class as well (`--dropconnect_p 0.1`).

    Args:
        arguments: `TrainingArguments`, or the class that a Trainer wants: `SFTConfig`, `DPOConfig`, ...
    """
    name = f"DropConnect{arguments.__name__}"
    bases = (DropConnectFields, arguments)
    own = {"__module__": __name__, "__doc__": arguments.__doc__}
    made: type[Any] = dataclass(type(name, bases, own))
    return made


def _rebuilt(arguments: Any, values: dict[str, Any]) -> Any:
    """Arguments from a pickle, which are not checked again."""
    made = object.__new__(with_dropconnect(arguments))
    made.__dict__.update(values)
    return made


def _callback(args: Any) -> DropConnectCallback | None:
    """The callback that a Trainer with these arguments should have."""
    if not isinstance(args, DropConnectFields):
        return None
    if args.dropconnect_p is None and args.dropconnect_targets is None:
        return None
    return DropConnectCallback(
        args.dropconnect_targets,
        args.dropconnect_p,
        exclude=args.dropconnect_exclude,
        schedule=args.dropconnect_schedule,
        warmup=args.dropconnect_warmup,
        unit=args.dropconnect_unit,
        toward=args.dropconnect_toward,
        sampling=args.dropconnect_sampling,
    )


def _with_callback(init: Method) -> Method:
    """For `Trainer.__init__`: the callback of its arguments."""

    @functools.wraps(init)
    def better(trainer: Any, *args: Any, **kwargs: Any) -> None:
        init(trainer, *args, **kwargs)
        callback = _callback(trainer.args)
        if callback is not None:
            trainer.add_callback(callback)

    return better


teach(Trainer, "__init__", _with_callback)
