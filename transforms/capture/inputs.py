"""Inputs for one run of a model: those that the user gives, or dummies for a transformers model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.torch_private.trees import keystr, tree_leaves_with_path

Shape = tuple[int, ...]

ROWS, LENGTH = 2, 7
"""Batch size and sequence length of dummy inputs; odd, and unlike usual sizes of heads."""


_ROW_BY_ROW = ("input_ids", "attention_mask", "token_type_ids", "inputs_embeds")
"""Ends of the names of transformers' inputs that have one row for each example. Images, positions and
states may have other leading sizes."""


@dataclass(frozen=True)
class Inputs:
    """What a forward is called with."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def for_one_pass(self, model: nn.Module) -> Inputs:
        """The same without a key-value cache, if the model takes `use_cache`."""
        has_cache = hasattr(getattr(model, "config", None), "use_cache")
        if not has_cache or not _takes(model, "use_cache"):
            return self
        return Inputs(self.args, {**self.kwargs, "use_cache": False})

    def without_labels(self, model: nn.Module) -> Inputs:
        """The same without `labels`, if the model can do without."""
        if "labels" not in self.kwargs:
            return self
        parameter = inspect.signature(model.forward).parameters.get("labels")
        if parameter is not None and parameter.default is parameter.empty:
            return self
        return Inputs(self.args, {k: v for k, v in self.kwargs.items() if k != "labels"})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with a name: `input_ids`, or `args[0]`, `args[1][0]`."""
        for name, given in (("args", list(self.args)), *self.kwargs.items()):
            for path, value in tree_leaves_with_path(given):
                if isinstance(value, Tensor):
                    yield f"{name}{keystr(path)}", value

    def disagreement(self, *, every: bool) -> str | None:
        """The leading sizes of the inputs if they differ, as in `input_ids 4, attention_mask 3`; of
        every input, or only of those that always have one row for each example."""
        sizes = {
            name: value.shape[0]
            for name, value in self.tensors()
            if value.ndim and (every or name.endswith(_ROW_BY_ROW))
        }
        if len(set(sizes.values())) < 2:
            return None
        return ", ".join(f"{name} {size}" for name, size in sizes.items())


def given_inputs(example_inputs: Any) -> Inputs:
    """One tensor, positional arguments (a tuple or list) or keyword arguments (a mapping).

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(example_inputs, Tensor):
        return Inputs((example_inputs,))
    if isinstance(example_inputs, Mapping):
        return Inputs(kwargs=dict(example_inputs))
    if isinstance(example_inputs, (tuple, list)):
        return Inputs(tuple(example_inputs))
    raise TypeError(
        f"example_inputs is a {type(example_inputs).__name__}; give a tensor, a tuple of positional "
        'arguments or a mapping of keyword arguments, such as {"input_ids": ids}'
    )


def dummy_inputs(model: nn.Module) -> Inputs | None:
    """Inputs made from the config of a transformers model; None for any other model, and for inputs
    that cannot be made from it. No labels."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or not isinstance(main, str):
        return None
    rows = 1 if _wants_one_row(model, config) else ROWS
    made: dict[str, Any] = {}
    for name in dict.fromkeys((main, *_also(config, main))):
        if _takes(model, name):
            shape = _SHAPES[name](config) if name in _SHAPES else None
            if shape is None:
                return _own_dummies(model, main)
            made[name] = _values(name, (rows, *shape), config).to(_device(model))
    return Inputs(kwargs=made)


def _wants_one_row(model: nn.Module, config: Any) -> bool:
    """Sequence classifiers on top of a language model find each row's last token by the padding id."""
    return hasattr(model, "score") and getattr(config, "pad_token_id", None) is None


def _also(config: Any, main: str) -> Iterator[str]:
    """Names of the other inputs that a model wants beside its main one."""
    if main == "input_ids":
        yield "attention_mask"
        if getattr(config, "vision_config", None) is not None:
            yield "pixel_values"
    if getattr(config, "is_encoder_decoder", False):
        yield "decoder_input_ids"


def _own_dummies(model: nn.Module, main: str) -> Inputs | None:
    """The `dummy_inputs` of the model, if they have its main input."""
    own = getattr(model, "dummy_inputs", None)
    if not isinstance(own, Mapping) or main not in own:
        return None
    return Inputs(kwargs={name: value.to(_device(model)) for name, value in own.items()})


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _takes(model: nn.Module, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _setting(config: Any, name: str, part: str) -> Any:
    """A setting of a config, or of the config of a part of the model."""
    value = getattr(config, name, None)
    return getattr(getattr(config, part, None), name, None) if value is None else value


def _text(config: Any) -> Shape | None:
    return None if _setting(config, "vocab_size", "text_config") is None else (LENGTH,)


def _pixels(config: Any) -> Shape:
    """Models without an image size (convolutional ones) take any."""
    size = _setting(config, "image_size", "vision_config") or 64
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return (_setting(config, "num_channels", "vision_config") or 3, height, width)


def _features(config: Any) -> Shape | None:
    """Whisper's: two frames of the spectrogram for each position."""
    bins, positions = (getattr(config, n, None) for n in ("num_mel_bins", "max_source_positions"))
    return None if bins is None or positions is None else (bins, 2 * positions)


_SHAPES: dict[str, Callable[[Any], Shape | None]] = {
    "input_ids": _text,
    "attention_mask": _text,
    "decoder_input_ids": _text,
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": lambda config: (8000,),
}
"""Shape of one row, from the config; None if it cannot be known."""


def _values(name: str, shape: Shape, config: Any) -> Tensor:
    """Words that differ, a mask of ones, or numbers from -1 to 1."""
    if name == "attention_mask":
        return torch.ones(shape, dtype=torch.long)
    if name.endswith("input_ids"):
        size: int = _setting(config, "vocab_size", "text_config")
        return (torch.arange(math.prod(shape)) % size).view(shape)
    return torch.linspace(-1, 1, math.prod(shape)).view(shape)
