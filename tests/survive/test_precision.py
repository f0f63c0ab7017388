"""Autocast, narrow and wide dtypes, and moves after surgery."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from surgery import apply_dropconnect, hold_masks, set_p, strip_dropconnect

from ..steps import (
    anchor,
    assert_drops,
    assert_same,
    raw,
    skip_unless_autocast,
    step_gradients,
    tensors,
)
from ..zoo.subjects import BY_NAME, Subject

NARROW = [torch.bfloat16, torch.float16]


def converted(
    subject: Subject, dtype: torch.dtype, **options: str
) -> tuple[nn.Module, torch.Tensor]:
    x = subject.inputs()
    return subject.moved(**options).to(dtype), x if subject.words else x.to(dtype)


@pytest.mark.parametrize("dtype", [*NARROW, torch.float64], ids=str)
@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_conversion_after_surgery(subject: Subject, dtype: torch.dtype, toward: str) -> None:
    """Like surgery after conversion, bit for bit: weights, anchors and masks."""
    model, x = converted(subject, dtype, toward=toward)
    late = apply_dropconnect(subject.plain().to(dtype), list(subject.targets), p=0.5, toward=toward)
    late.load_state_dict(model.state_dict())
    assert {value.dtype for value in model.state_dict().values()} == {dtype}
    assert_same(step_gradients(model, x), step_gradients(late, x))
    assert_drops(model, x)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_masks_do_not_depend_on_dtype(subject: Subject, dtype: torch.dtype) -> None:
    narrow, x = converted(subject, dtype)
    wide, wide_x = converted(subject, torch.float64)
    found, expected = step_gradients(narrow, x), step_gradients(wide, wide_x)
    for site in subject.sites:
        dropped = expected[site] == 0
        assert 0 < dropped.sum() < dropped.numel()
        assert torch.count_nonzero(found[site][dropped]) == 0


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_eval_in_narrow_dtype_is_the_plain_model(subject: Subject, dtype: torch.dtype) -> None:
    model, x = converted(subject, dtype)
    out = model.eval()(x)
    assert torch.equal(out, strip_dropconnect(model)(x))


def rounding(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest relative error of an output or a gradient."""
    pairs = [(found[name].double(), value.double()) for name, value in exact.items()]
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)


def test_autocast(subject: Subject) -> None:
    """The mask acts on the stored weight; autocast rounds the product, as that of the plain model."""
    skip_unless_autocast(subject)
    model, x = subject.moved(), subject.inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step_gradients(model, x)
        plain = step_gradients(subject.plain(), x)
    exact = step_gradients(model, x)
    for name, value in found.items():
        assert name == "output" or value.dtype == torch.float32
    assert rounding(found, exact) < 2 * rounding(plain, step_gradients(subject.plain(), x))
    for site in subject.sites:
        assert torch.count_nonzero(found[site][exact[site] == 0]) == 0


def test_autocast_draws_again_at_each_call(subject: Subject) -> None:
    """Autocast caches casts of parameters; a masked weight must never be one of them."""
    skip_unless_autocast(subject)
    model, x = subject.moved(), subject.inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(1)
        outs = [model(x) for _ in range(4)]
        torch.manual_seed(1)
        again = [model(x) for _ in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(outs, again))
    assert not any(torch.equal(outs[0], out) for out in outs[1:])


def test_autocast_eval_is_the_plain_model(subject: Subject) -> None:
    skip_unless_autocast(subject)
    model, x = subject.operated().eval(), subject.inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
        assert torch.equal(out, subject.plain().eval()(x))


@pytest.mark.parametrize("move", ["double", "half", "bfloat16"])
def test_moves_keep_set_p(subject: Subject, move: str) -> None:
    model, x = subject.operated(), subject.inputs()
    getattr(model, move)()
    set_p(model, 0.0)
    plain = getattr(subject.plain(), move)()
    x = x if subject.words else getattr(x, move)()
    assert torch.equal(model(x), plain(x))
    set_p(model, 0.5)
    assert_drops(model, x)


def test_there_and_back_again(subject: Subject) -> None:
    model = subject.operated(toward="pretrained")
    before = tensors(model)
    model.double().float()
    assert_same(tensors(model), before)
    assert {raw(site) for site in subject.sites} <= set(before)
    assert {anchor(site) for site in subject.sites} <= set(before)
    x = subject.inputs()
    assert_same(step_gradients(model, x), step_gradients(subject.operated(toward="pretrained"), x))


def test_move_while_masks_are_held() -> None:
    subject = BY_NAME["gru-cell"]
    model, x = subject.operated(), subject.inputs()
    with hold_masks(model):
        first = model(x)
        model.double()
        second = model(x.double())
    torch.testing.assert_close(second, first.double(), rtol=1e-5, atol=1e-6)
