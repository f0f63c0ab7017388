"""`torch.export` (non-strict): evaluation and training mode, run and compared."""

from __future__ import annotations

import pytest
import torch

from surgery import set_p

from ..steps import assert_drops
from ..zoo.subjects import Subject


def test_eval_is_the_plain_model(subject: Subject) -> None:
    model, x = subject.operated().eval(), subject.inputs()
    program = torch.export.export(model, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), subject.plain().eval()(x))
    assert not any("randint" in str(node.target) for node in program.graph.nodes)


def test_sampled_eval_draws_the_eager_masks(subject: Subject) -> None:
    model, x = subject.moved(inference="sample").eval(), subject.inputs()
    program = torch.export.export(model, (x,), strict=False)
    exported = program.module()
    assert_drops(exported, x)
    for run in (0, 1):
        torch.manual_seed(run)
        found = exported(x)
        torch.manual_seed(run)
        torch.testing.assert_close(found, model(x))


@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_training_draws_the_eager_masks(subject: Subject, toward: str) -> None:
    model, x = subject.moved(toward=toward), subject.inputs()
    exported = torch.export.export(model, (x,), strict=False).module()
    assert_drops(exported, x)
    torch.manual_seed(7)
    found = exported(x)
    torch.manual_seed(7)
    torch.testing.assert_close(found, model(x))


def test_the_model_is_left_as_it_was(subject: Subject) -> None:
    """Nothing that the trace made stays in the model: no mask, no law of fake tensors."""
    model, x = subject.operated(), subject.inputs()
    torch.manual_seed(7)
    expected = model(x)
    torch.export.export(model, (x,), strict=False)
    torch.manual_seed(7)
    assert torch.equal(model(x), expected)
    set_p(model, 0.1)
    assert_drops(model, x)
