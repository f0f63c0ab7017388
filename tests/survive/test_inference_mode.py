"""What is done inside of inference mode leaves a model that trains.

A tensor that is made there can never be part of a backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    apply_dropconnect,
    bake_dropconnect,
    hold_masks,
    load_dropconnect,
    mc_predict,
    save_dropconnect,
    set_inference,
    set_p,
    strip_dropconnect,
)
from surgery.modules.places import places

from ..steps import assert_same, step_gradients
from ..zoo.subjects import BY_NAME

LINEAR, LSTM = BY_NAME["linear"], BY_NAME["lstm"]
X = LINEAR.inputs()

SAMPLINGS: list[dict[str, Any]] = [
    {"toward": "pretrained"},
    {"toward": "pretrained", "sampling": "example"},
    {"toward": "pretrained", "sampling": "gaussian"},
    {"inference": "moments", "bias": True},
]


def loaded(model: nn.Module, folder: Path) -> nn.Module:
    """With DropConnect as a folder has it, which is written outside of inference mode."""
    with torch.inference_mode(False):
        save_dropconnect(LINEAR.operated(toward="pretrained"), folder)
    return load_dropconnect(model, folder)


def first_run(model: nn.Module, folder: Path) -> nn.Module:
    """Its laws, kernels and buffers are made there."""
    model(X)
    model.eval()(X)
    return model.train()


def configured(model: nn.Module, folder: Path) -> nn.Module:
    set_p(model, 0.25)
    set_inference(model, "moments")
    model.eval()(X)
    set_inference(model, "mean")
    set_p(model, 0.5)
    return model.train()


def predicted(model: nn.Module, folder: Path) -> nn.Module:
    mc_predict(model, X, 3)
    return model


def held(model: nn.Module, folder: Path) -> nn.Module:
    with hold_masks(model):
        model(X)
        with torch.inference_mode(False):
            model(X).sum().backward()
    return model


def again(model: nn.Module, folder: Path) -> nn.Module:
    """Taken out and put in."""
    return apply_dropconnect(strip_dropconnect(model), "*", p=0.5, toward="pretrained")


def inference_tensors(model: nn.Module) -> Iterator[str]:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_inference():
            yield name
    for place in places(model):
        law, row = place.state.law, place.state.row
        assert law is not None
        assert row is not None
        made: list[Tensor] = [
            law.threshold,
            law.scale,
            law.ratio,
            row.index,
            row.table.thresholds,
            row.table.scales,
        ]
        if any(one.is_inference() for one in made):
            yield f"the law of {place.state.site}"


def assert_trains(model: nn.Module, expected: nn.Module) -> None:
    """As a model does that has never been there; also compiled."""
    assert not list(inference_tensors(model))
    assert_same(step_gradients(model, X), step_gradients(expected, X))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(X).sum().backward()


def test_apply() -> None:
    for options in SAMPLINGS:
        model = LINEAR.plain()
        with torch.inference_mode():
            apply_dropconnect(model, list(LINEAR.targets), p=0.5, **options)
        assert_trains(model, LINEAR.operated(**options))


def test_load(tmp_path: Path) -> None:
    model = LINEAR.plain()
    with torch.inference_mode():
        loaded(model, tmp_path)
    assert_trains(model, LINEAR.operated(toward="pretrained"))


@pytest.mark.parametrize("act", [first_run, configured, predicted, held, again])
def test_what_is_done_with_a_model(
    act: Callable[[nn.Module, Path], nn.Module], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"toward": "pretrained"}
    options["sampling"] = "example" if act is held else "batch"
    model = LINEAR.operated(**options)
    with torch.inference_mode():
        act(model, tmp_path)
    assert_trains(model, LINEAR.operated(**options))


@pytest.mark.parametrize("take_out", [strip_dropconnect, bake_dropconnect])
@pytest.mark.parametrize("subject", [LINEAR, LSTM], ids=lambda subject: subject.name)
def test_what_is_taken_out(take_out: Callable[..., nn.Module], subject: Any) -> None:
    model = subject.operated(toward="pretrained")
    with torch.inference_mode():
        model(subject.inputs())
        take_out(model)
    assert not any(p.is_inference() for p in model.parameters())
    model(subject.inputs()).sum().backward()
