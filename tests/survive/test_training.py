"""Training loops: optimisers, accumulation, mode switches, hooks, errors, inference mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgery import apply_dropconnect, hold_masks, set_p, strip_dropconnect

from ..internals import live_masks
from ..steps import (
    assert_drops,
    assert_same,
    gradients,
    rounding_without_grad,
    step,
    step_gradients,
    tensors,
)
from ..zoo.subjects import BY_NAME, Subject


def trajectory(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> list[Tensor]:
    torch.manual_seed(9)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        out = model(x)
        loss = out.square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD], ids=["adamw", "sgd"])
def test_optimizer_made_before_or_after_surgery(subject: Subject, make: type) -> None:
    x = subject.inputs()
    early_model = subject.plain()
    early = make(early_model.parameters(), lr=0.05)
    apply_dropconnect(early_model, list(subject.targets), p=0.5)
    late_model = subject.operated()
    late = make(late_model.parameters(), lr=0.05)
    assert trajectory(early_model, early, x) == trajectory(late_model, late, x)
    assert_same(tensors(early_model), tensors(late_model))


def test_optimizer_goes_on_after_strip(subject: Subject) -> None:
    x = subject.inputs()
    model = subject.operated()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    trajectory(model, optimizer, x)
    strip_dropconnect(model)
    before = tensors(model)
    trajectory(model, optimizer, x)
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_p_zero_trains_exactly_like_the_plain_model(subject: Subject) -> None:
    x = subject.inputs()
    plain, model = subject.plain(), subject.operated(p=0.0)
    losses = [trajectory(m, torch.optim.AdamW(m.parameters(), lr=0.05), x) for m in (plain, model)]
    assert losses[0] == losses[1]
    assert_same(tensors(strip_dropconnect(model)), tensors(plain))


def test_gradient_accumulation_adds_up(subject: Subject) -> None:
    x = subject.inputs()
    model = subject.operated()
    parts = [step_gradients(model, x, seed) for seed in (1, 2)]
    model.zero_grad()
    for seed in (1, 2):
        step(model, x, seed)
    total = gradients(model)
    assert_same(total, {name: parts[0][name] + parts[1][name] for name in total})


def test_two_forwards_before_one_backward(subject: Subject) -> None:
    """The second call's masks do not replace those that the first call's backward needs."""
    x = subject.inputs()
    model = subject.operated()
    parts = [step_gradients(model, x, seed) for seed in (1, 2)]
    model.zero_grad()
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.append(model(x).float().square().sum())
    for loss in losses:
        loss.backward()
    total = gradients(model)
    assert_same(total, {name: parts[0][name] + parts[1][name] for name in total})


def test_train_eval_cycles(subject: Subject) -> None:
    x = subject.inputs()
    plain, model = subject.plain().eval(), subject.operated()
    expected_keys = list(model.state_dict())
    for _ in range(3):
        model.train()
        assert_drops(model, x)
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))
        assert torch.equal(model(x), plain(x))
        assert list(model.state_dict()) == expected_keys


def test_eval_gradients_are_the_plain_models(subject: Subject) -> None:
    x = subject.inputs()
    model = subject.operated().eval()
    assert_same(step_gradients(model, x), step_gradients(subject.plain().eval(), x))


def test_seed_reproduces_and_calls_differ(subject: Subject) -> None:
    x = subject.inputs()
    model = subject.operated()
    torch.manual_seed(1)
    first = [model(x) for _ in range(3)]
    torch.manual_seed(1)
    second = [model(x) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not torch.equal(first[0], first[1])


def test_inference_mode(subject: Subject) -> None:
    x = subject.inputs()
    model = subject.operated(inference="sample").eval()
    with torch.inference_mode():
        assert_drops(model, x)
    expected = step_gradients(subject.operated(inference="sample").eval(), x)
    assert_same(step_gradients(model, x), expected)


def test_no_grad_and_grad_see_the_same_masks(subject: Subject) -> None:
    x = subject.inputs()
    model = subject.operated()
    out = step(model, x)
    torch.manual_seed(7)
    with torch.no_grad():
        found = model(x)
    assert_same({"output": found}, {"output": out}, rounding_without_grad(subject))


def test_hooks_registered_before_surgery_fire(subject: Subject) -> None:
    model, x = subject.plain(), subject.inputs()
    fired: list[str] = []
    model.register_forward_pre_hook(lambda *_: fired.append("pre"))
    model.register_forward_hook(lambda *_: fired.append("post"))
    if not subject.words:
        x.requires_grad_()
        model.register_full_backward_hook(lambda *_: fired.append("backward"))
    model.get_parameter(subject.sites[0]).register_hook(lambda _: fired.append("gradient"))
    apply_dropconnect(model, list(subject.targets), p=0.5)
    step(model, x)
    strip_dropconnect(model)
    expected = (
        ["gradient", "post", "pre"] if subject.words else ["backward", "gradient", "post", "pre"]
    )
    assert sorted(fired) == expected


class Failure(Exception):
    pass


class FailWhileMasked(TorchFunctionMode):
    """Raise in the first torch function that is called while a mask is live, or `at`, where a function
    has the masked weight and nobody else."""

    def __init__(self, model: nn.Module, at: object) -> None:
        super().__init__()
        self.model, self.at = model, at

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is self.at or any(True for _ in live_masks(self.model)):
            raise Failure
        return func(*args, **(kwargs or {}))


def test_error_in_forward_leaves_no_mask(subject: Subject) -> None:
    model, x = subject.operated(), subject.inputs()
    fused = torch.nn.functional.linear if subject.name == "linear" else None
    with pytest.raises(Failure), FailWhileMasked(model, fused):
        model(x)
    assert not list(live_masks(model))
    assert_drops(model, x)
    assert_same(tensors(strip_dropconnect(model)), tensors(subject.plain()))


def test_set_p_between_forward_and_backward(subject: Subject) -> None:
    model, x = subject.operated(), subject.inputs()
    expected = step_gradients(model, x)
    model.zero_grad()
    torch.manual_seed(7)
    out = model(x)
    set_p(model, 0.1)
    out.square().sum().backward()
    assert_same({**gradients(model), "output": out.detach()}, expected)


def test_weight_changed_before_backward_is_an_error() -> None:
    subject = BY_NAME["linear"]
    model = subject.operated()
    out = model(subject.inputs())
    with torch.no_grad():
        model[2].weight.add_(1.0)
    with pytest.raises(RuntimeError, match=r"the weight 'weight' has been modified by an inplace"):
        out.sum().backward()


def test_frozen_site_still_drops_and_passes_gradients(subject: Subject) -> None:
    model = subject.operated()
    x = subject.inputs()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert_drops(model, x)
    if not subject.words:
        x = x.clone().requires_grad_()
        model(x).sum().backward()
        assert x.grad is not None


def test_double_backward() -> None:
    subject = BY_NAME["linear"]
    model = subject.operated().double()
    x = subject.inputs().double().requires_grad_()

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return model(x)

    assert torch.autograd.gradgradcheck(run, (x,))


def test_held_masks_over_a_mode_switch(subject: Subject) -> None:
    x = subject.inputs()
    model = subject.operated()
    with hold_masks(model):
        first = model(x)
        model.eval()
        assert torch.equal(model(x), subject.plain().eval()(x))
        model.train()
        assert torch.equal(model(x), first)
    assert_drops(model, x)


def test_held_masks_are_passed_by_several_backward_calls(subject: Subject) -> None:
    x = subject.inputs()
    model = subject.operated()
    with hold_masks(model):
        once = step_gradients(model, x)
        step(model, x)
        twice = gradients(model)
    assert_same(twice, {name: 2 * once[name] for name in twice})


def test_flatten_parameters_of_an_rnn() -> None:
    subject = BY_NAME["lstm"]
    model, x = subject.operated(), subject.inputs()
    expected = step_gradients(model, x)
    model.rnn.flatten_parameters()
    assert_same(step_gradients(model, x), expected)
    strip_dropconnect(model).rnn.flatten_parameters()
    assert torch.equal(model(x), subject.plain()(x))


def test_lbfgs_with_one_mask_for_a_step() -> None:
    """It compares losses of several evaluations. With held masks it takes the steps that it takes on a
    model whose masks are constants."""
    x, y = torch.randn(16, 6, dtype=torch.float64), torch.randn(16, 4, dtype=torch.float64)
    layer = nn.Linear(6, 4).double()
    weight, bias = (p.detach().clone().requires_grad_() for p in layer.parameters())
    apply_dropconnect(layer, nn.Linear, p=0.5)

    def fit(parameters: list[Tensor], predict: Callable[[], Tensor]) -> None:
        optimizer = torch.optim.LBFGS(parameters, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (predict() - y).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)

    with hold_masks(layer):
        ones = torch.ones_like(weight)
        kept = (layer(torch.eye(6, dtype=torch.float64)) - layer.bias).t().detach() != 0
        fit(list(layer.parameters()), lambda: layer(x))
    fit([weight, bias], lambda: x @ (weight * torch.where(kept, 2 * ones, 0)).t() + bias)
    torch.testing.assert_close(layer.weight, weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.bias, bias, rtol=1e-9, atol=1e-9)
