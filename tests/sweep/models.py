"""The models that are swept, and how one of them is made small enough to run."""

from __future__ import annotations

import importlib
import inspect
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from .check import line_of
from .inputs import guesses
from .shrink import factors, shrink

LARGEST = 40_000_000
"""Parameters; a model that is not smaller is not made."""

COMMON = (
    "bert", "roberta", "distilbert", "albert", "electra", "deberta-v2", "xlm-roberta", "modernbert",
    "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "mixtral", "mamba", "t5", "bart",
    "vit", "swin", "resnet", "convnext", "dinov2", "detr", "segformer", "dpt", "videomae",
    "wav2vec2", "whisper", "clip", "llava", "blip", "layoutlm", "layoutlmv3", "patchtst",
)  # fmt: skip
"""Model types of which every class with a head is swept, one of each family."""


PATIENCE = 2.0
"""Seconds of computing in which inputs for a model of one size are looked for."""


class NotBuilt(Exception):
    """There is no model to look at: not made, or it does not run."""


@dataclass(frozen=True)
class Case:
    """A model type, and one of its classes."""

    model_type: str
    head: str = ""
    """The family of heads, as transformers' auto classes name it; empty for the model without one."""

    def __str__(self) -> str:
        return f"{self.model_type}/{self.head}" if self.head else self.model_type


def cases() -> list[Case]:
    """Every model type without a head, and common ones with one of each family."""
    found = [Case(name) for name in CONFIG_MAPPING_NAMES if isinstance(name, str)]
    seen = {str(modeling_auto.MODEL_MAPPING_NAMES.get(case.model_type)) for case in found}
    for head, names in _families().items():
        with_it = [name for name in COMMON if name in names] or list(names)[:1]
        new = [name for name in with_it if str(names[name]) not in seen]
        seen.update(str(names[name]) for name in new)
        found += [Case(name, head) for name in new]
    return found


def _families() -> dict[str, dict[str, Any]]:
    """(family, {model type: name of the class}) of transformers' auto classes."""
    begin, end = "MODEL_FOR_", "_MAPPING_NAMES"
    return {
        name.removeprefix(begin).removesuffix(end).lower(): dict(names)
        for name, names in sorted(vars(modeling_auto).items())
        if name.startswith(begin) and name.endswith(end)
    }


def class_of(case: Case) -> Any:
    """The class of a case.

    Raises:
        NotBuilt: there is none.
    """
    names = _families()[case.head] if case.head else modeling_auto.MODEL_MAPPING_NAMES
    name = names.get(case.model_type)
    if name is not None:
        first = name if isinstance(name, str) else name[0]
        cls: Any = getattr(importlib.import_module("transformers"), first, None)
        if cls is not None and getattr(cls, "forward", None) is not nn.Module.forward:
            return cls
    config = CONFIG_MAPPING[case.model_type]
    try:
        module = importlib.import_module(config.__module__.replace("configuration_", "modeling_"))
    except ModuleNotFoundError:
        raise NotBuilt("the type has no model of its own") from None
    own: list[Any] = [found for found in vars(module).values() if _is_of(found, module, config)]
    if not own:
        raise NotBuilt("the type has no PreTrainedModel of its own")
    return own[0]


def _is_of(found: Any, module: Any, config: Any) -> bool:
    """Whether something in a module is a class of model for a config, with a forward."""
    if not inspect.isclass(found) or found.__module__ != module.__name__:
        return False
    cls: Any = found
    if not issubclass(cls, PreTrainedModel) or cls.config_class is not config:
        return False
    return cls.forward is not nn.Module.forward


@dataclass(frozen=True)
class Built:
    """A small model, and what it runs with."""

    model: nn.Module
    inputs: dict[str, Any]
    factor: int
    """What its widths were divided by."""

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def build(case: Case) -> Built:
    """The smallest model of a case that runs, with inputs, in `eval()`.

    Raises:
        NotBuilt: no size or no input suits; the reason of the first try.
    """
    try:
        cls = class_of(case)
    except ImportError as error:
        raise NotBuilt(f"not made: {line_of(error)}") from error
    reasons: list[str] = []
    failures = 0
    try:
        smaller = factors(CONFIG_MAPPING[case.model_type]())
    except Exception as error:
        raise NotBuilt(f"not made: {line_of(error)}") from error
    for factor in smaller:
        try:
            model = _made(cls, case.model_type, factor)
        except NotBuilt as error:
            reasons.append(str(error))
            continue
        except Exception as error:
            reasons.append(f"not made: {line_of(error)}")
            if isinstance(error, ImportError):
                break
            continue
        try:
            return Built(model, _suiting(model), factor)
        except Exception as error:
            reasons.append(f"does not run: {line_of(error)}")
            failures += 1
            if failures == 4:
                break
    runs = [reason for reason in reasons if reason.startswith("does not run")]
    raise NotBuilt((runs or reasons)[0])


def _made(cls: Any, model_type: str, factor: int) -> nn.Module:
    with torch.device("meta"):  # to see how large it would be
        size = sum(p.numel() for p in cls(_config(model_type, factor)).parameters())
    if size > LARGEST:
        raise NotBuilt(f"too large: {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model: nn.Module = cls(_config(model_type, factor)).eval()
    return model.float()


def _config(model_type: str, factor: int) -> Any:
    config = shrink(CONFIG_MAPPING[model_type](), factor)
    if hasattr(config, "validate"):  # a model that cannot be saved tells little
        config.validate()
    return config


def _suiting(model: nn.Module) -> dict[str, Any]:
    """Inputs that a model runs with."""
    first: Exception | None = None
    begun = time.process_time()
    for inputs in guesses(model):
        if first is not None and time.process_time() - begun > PATIENCE:
            break
        try:
            with torch.no_grad():
                model(**inputs)
        except Exception as error:
            first = first or error
        else:
            return inputs
    raise first or NotBuilt("no inputs to try")
