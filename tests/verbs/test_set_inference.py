"""`set_inference`: what `eval()` does, for good or for a while."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    NoMatchError,
    NotOperatedError,
    SurgeryError,
    apply_dropconnect,
    dropconnect_sites,
    set_inference,
    set_p,
    strip_dropconnect,
)

from ..helpers import Snapshot


def mlp(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
    model = nn.Sequential(inner, nn.GELU(), nn.Linear(8, 3)).eval()
    return apply_dropconnect(model, nn.Linear, p=0.4, **options)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 6)


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def test_every_mode(x: Tensor) -> None:
    model = mlp()
    plain = model(x)
    set_inference(model, "moments")
    moments = model(x)
    assert torch.equal(moments, model(x))
    assert not torch.equal(moments, plain)
    set_inference(model, "moments", samples=3)
    assert not torch.equal(model(x), model(x))
    set_inference(model, "sample")
    assert not torch.equal(model(x), model(x))
    set_inference(model, "mean")
    assert torch.equal(model(x), plain)


def test_context_restores_modes_and_classes(x: Tensor) -> None:
    model = mlp()
    before, plain = Snapshot(model), model(x)
    with set_inference(model, "moments"):
        inside = model(x)
        with set_inference(model, "sample"):
            assert not torch.equal(model(x), inside)
        assert torch.equal(model(x), inside)
    assert Snapshot(model) == before
    assert torch.equal(model(x), plain)


def test_context_restores_on_error_and_the_number_of_draws() -> None:
    model = mlp(inference="moments", samples=7)
    with pytest.raises(KeyError), set_inference(model, "mean"):
        raise KeyError
    assert {(s.config.inference, s.config.samples) for s in dropconnect_sites(model)} == {
        ("moments", 7)
    }


def test_classes_follow_the_mode() -> None:
    """A module without a site is operated on only while a site needs to know its forward."""
    model = mlp()
    before = classes(model)
    set_inference(model, "moments", targets="0.0")
    assert type(model) is not nn.Sequential
    assert isinstance(model, nn.Sequential)
    set_inference(model, "mean")
    assert classes(model) == before
    assert type(model) is nn.Sequential


@pytest.mark.parametrize("how", ["options", "set"])
def test_strip_afterwards_is_exact(how: str, x: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 3)).eval()
    before = Snapshot(model)
    if how == "options":
        apply_dropconnect(model, nn.Linear, inference="moments", sampling="example")
    else:
        set_inference(apply_dropconnect(model, nn.Linear), "moments")
    model(x)
    strip_dropconnect(model)
    assert Snapshot(model) == before


def test_same_as_the_option(x: Tensor) -> None:
    switched = mlp()
    set_inference(switched, "moments")
    assert torch.equal(switched(x), mlp(inference="moments")(x))


def test_targets(x: Tensor) -> None:
    model, both = mlp(), mlp(inference="moments")
    plain = model(x)
    set_inference(model, "moments", targets="0.0")
    assert [site.config.inference for site in dropconnect_sites(model)] == [
        "moments",
        "mean",
        "mean",
    ]
    one = model(x)
    assert not torch.equal(one, plain)
    set_inference(model, "moments", targets="0.2")
    torch.testing.assert_close(model(x), both(x))  # nothing follows the last site


def test_p_changes_what_moments_say(x: Tensor) -> None:
    model = mlp(inference="moments")
    first = model(x)
    set_p(model, 0.1)
    second = model(x)
    assert not torch.equal(first, second)
    set_p(model, 0)
    assert torch.equal(model(x), strip_dropconnect(model)(x))


def test_refused_for_other_modules() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ConvTranspose1d(4, 6, 2))
    apply_dropconnect(model, "*")
    before = Snapshot(model)
    message = r"needs a forward that is a product .* 1 site without, the first is '1\.weight"
    with pytest.raises(SurgeryError, match=message + ".*Name the others in targets.*unchanged"):
        set_inference(model, "moments")
    assert Snapshot(model) == before
    assert {site.config.inference for site in dropconnect_sites(model)} == {"mean"}
    set_inference(model, "moments", targets="0")
    set_inference(model, "sample")


def test_refused_for_kernels_that_share_an_input_mask() -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU())
    apply_dropconnect(model, "0", unit="input")
    with pytest.raises(
        SurgeryError,
        match=r"another unit than 'input'; 1 site without, the first is '0\.weight'",
    ):
        set_inference(model, "moments")
    with pytest.raises(
        SurgeryError, match=r"weight \(Conv1d\): with unit='input' one mask .* use another unit"
    ):
        apply_dropconnect(nn.Conv1d(4, 6, 3), nn.Conv1d, unit="input", inference="moments")


def test_wrong_arguments_change_nothing() -> None:
    model = mlp()
    before = Snapshot(model)
    with pytest.raises(ValueError, match="inference must be one of 'mean', 'moments', 'sample'"):
        set_inference(model, "median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="samples=5 is the number of draws of inference='moments'"):
        set_inference(model, "sample", samples=5)
    with pytest.raises(ValueError, match="samples must be a positive number"):
        set_inference(model, "moments", samples=0)
    with pytest.raises(NoMatchError, match="nothing"):
        set_inference(model, "moments", targets="nothing")
    with pytest.raises(NotOperatedError, match="Linear has no DropConnect in place"):
        set_inference(nn.Linear(2, 2), "moments")
    assert Snapshot(model) == before


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_modes_switch_under_compile(x: Tensor) -> None:
    torch._dynamo.reset()
    model = mlp()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        modes: Any = ("mean", "moments", "mean", "moments")
        for mode in modes:
            set_inference(compiled, mode)
            torch.testing.assert_close(compiled(x), model(x))
        set_inference(compiled, "sample")
        assert not torch.equal(compiled(x), compiled(x))
        with set_inference(model, "moments"), torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(compiled(x), model(x))


def test_training_is_not_touched(x: Tensor, keys: list[Tensor]) -> None:
    model = mlp().train()
    for mode in ("mean", "moments", "sample"):
        set_inference(model, mode)
        keys.clear()
        model(x)
        assert len(keys) == 3


def test_one_context_manager_entered_twice() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(3, 8)
    apply_dropconnect(model, "0")
    plain = model(x)
    sampling = set_inference(model, "sample")
    for _ in range(2):
        with sampling:
            assert not torch.equal(model(x), plain)
        assert torch.equal(model(x), plain)


class Around(nn.Linear):
    """Has a weight of its own, and in its forward the moments of its child go through a relu."""

    def __init__(self) -> None:
        super().__init__(8, 3)
        self.inner = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.inner(x).relu())


@pytest.mark.parametrize("targets", [("inner", "weight"), ("weight", "inner")])
def test_what_follows_its_forward_may_be_operated_too(x: Tensor, targets: tuple[str, ...]) -> None:
    """Before or after the site inside, whose moments go on to where the forward around it ends."""
    model = Around().eval()
    both, plain = copy.deepcopy(model), model(x)
    expected = apply_dropconnect(model, "inner", p=0.4, inference="moments")(x)
    for target in targets:
        inference = "moments" if target == "inner" else "mean"
        apply_dropconnect(both, target, p=0.4, inference=inference)
    assert torch.equal(both(x), expected)
    assert not torch.allclose(plain, expected)
