"""Inside `hold_masks` every forward call uses the same masks."""

from __future__ import annotations

import copy
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    NotOperatedError,
    apply_dropconnect,
    dropconnect_sites,
    hold_masks,
    set_p,
    strip_dropconnect,
)

from ..expected import keep, masked
from ..helpers import Snapshot, plain_parameter
from ..kinds.test_kinds import equal
from ..zoo.kinds import Case, every_case

P = 0.5
CELLS = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}
every_cell = pytest.mark.parametrize("cls", CELLS.values(), ids=CELLS.keys())


def unroll(cell: nn.Module, xs: Tensor) -> Tensor:
    state = None
    for x in xs:
        state = cell(x, state)
    return state[0] if isinstance(state, tuple) else state


@every_cell
@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_one_mask_for_a_sequence(cls, toward: str, keys) -> None:
    """Output and gradient are those of a loop with one explicitly masked weight."""
    cell = cls(6, 4).double()
    plain = copy.deepcopy(cell)
    xs = torch.randn(5, 3, 6, dtype=torch.float64)
    apply_dropconnect(cell, cls, p=P, toward=toward)
    raw = plain_parameter(cell, "weight_hh")
    with torch.no_grad():
        raw.add_(0.1)
    with hold_masks(cell):
        output = unroll(cell, xs)
        output.sin().sum().backward()
    (key,) = keys
    mask = keep(key, P, *raw.shape)
    anchor = plain.weight_hh.detach().clone() if toward == "pretrained" else None
    plain.weight_hh.data = masked(raw.data, mask, P, anchor)
    expected = unroll(plain, xs)
    expected.sin().sum().backward()
    assert torch.equal(output, expected)
    gradient = masked(plain.weight_hh.grad, mask, P)
    torch.testing.assert_close(raw.grad, gradient, rtol=1e-12, atol=1e-14)
    assert torch.equal(cell.weight_ih.grad, plain.weight_ih.grad)


@every_case
def test_calls_inside_agree_and_outside_differ(case: Case) -> None:
    module = case.build()
    apply_dropconnect(module, case.target_of(module), p=P)
    inputs = case.inputs()
    with hold_masks(module):
        inside = [module(*inputs) for _ in range(3)]
    with hold_masks(module):
        again = [module(*inputs) for _ in range(2)]
    assert equal(inside[0], inside[1])
    assert equal(inside[0], inside[2])
    assert equal(again[0], again[1])
    outside = [module(*inputs) for _ in range(6)]
    assert not all(equal(outside[0], other) for other in outside[1:])
    before = Snapshot(module)
    with hold_masks(module):
        module(*inputs)
    assert Snapshot(module) == before


def layer(**options) -> nn.Linear:
    return apply_dropconnect(nn.Linear(8, 8), nn.Linear, **{"p": P, **options})


def test_gradients_accumulate_over_several_backwards(keys) -> None:
    module = layer()
    x = torch.randn(2, 8)
    with hold_masks(module):
        for _ in range(3):
            module(x).sum().backward()
        mask = keep(keys[0], P, 8, 8)
    once = masked(torch.ones(2, 8).t() @ x, mask, P)
    torch.testing.assert_close(module.weight.grad, 3 * once)


def test_optimizer_step_inside_is_seen(keys) -> None:
    """The mask stays, the weight moves: the next forward uses the new value."""
    module = layer()
    x = torch.randn(2, 8)
    with hold_masks(module):
        module(x)
        with torch.no_grad():
            module.weight.mul_(2)
        mask = keep(keys[0], P, 8, 8)
        expected = nn.functional.linear(x, masked(module.weight, mask, P), module.bias)
        assert torch.equal(module(x), expected)


class Change:
    """Something that changes what a held masked weight was computed from."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module

    def assign_data(self) -> None:
        self.module.weight_raw.data = torch.randn(8, 8)

    def assign_parameter(self) -> None:
        self.module.weight = nn.Parameter(torch.randn(8, 8))

    def write(self) -> None:
        with torch.no_grad():
            self.module.weight_raw.add_(1)

    def step_through_data(self) -> None:
        """As optimisers do that write to `.data`, whose version is its own."""
        self.module(torch.randn(2, 8)).sum().backward()
        self.module.weight_raw.data.add_(1)

    def swap(self) -> None:
        torch.utils.swap_tensors(self.module.weight_raw, nn.Parameter(torch.randn(8, 8)))

    def load(self) -> None:
        self.module.load_state_dict({"weight": torch.randn(8, 8), "bias": torch.zeros(8)})

    def load_by_assignment(self) -> None:
        values = {"weight": torch.randn(8, 8), "bias": torch.zeros(8)}
        self.module.load_state_dict(values, assign=True)

    def move_anchor(self) -> None:
        self.module.weight_anchor.add_(1)

    def replace_anchor(self) -> None:
        self.module.weight_anchor = torch.randn(8, 8)

    def assign_data_of_anchor(self) -> None:
        self.module.weight_anchor.data = torch.randn(8, 8)

    def new_p(self) -> None:
        set_p(self.module, 0.2)
        set_p(self.module, float(torch.rand(())))

    def widen(self) -> None:
        self.module.double().float()


@pytest.mark.parametrize("name", [name for name in vars(Change) if name[0] != "_"])
def test_what_changes_inside_is_seen(name: str, keys) -> None:
    """So often that ids and addresses are used again."""
    module = layer(toward="pretrained")
    x = torch.eye(8)
    change = Change(module)
    with torch.no_grad():
        module.weight.add_(1)
    for _ in range(20):
        with hold_masks(module):
            module(x)
            for _ in range(3):
                getattr(change, name)()
                (site,) = dropconnect_sites(module)
                mask = keep(keys[-1], site.p, 8, 8)
                used = masked(module.weight, mask, site.p, module.weight_anchor)
                expected = nn.functional.linear(x, used, module.bias)
                torch.testing.assert_close(module(x), expected)


def test_a_loop_computes_the_masked_weight_once(masked_weights) -> None:
    cell = apply_dropconnect(nn.GRUCell(6, 4), nn.GRUCell, p=P)
    with hold_masks(cell):
        unroll(cell, torch.randn(5, 3, 6)).sum().backward()
    assert len(masked_weights) == 1


def test_no_grad_then_grad_inside() -> None:
    """A forward without gradients first must not cut the graph of a later one."""
    module = layer()
    x = torch.randn(2, 8)
    with hold_masks(module):
        with torch.no_grad():
            first = module(x)
        second = module(x)
        second.sum().backward()
    assert torch.equal(first, second)
    assert module.weight.grad is not None


def test_new_p_inside_acts_with_the_same_bits() -> None:
    """A smaller p keeps a superset of what a larger p keeps."""
    module = layer()
    x = torch.eye(8)
    with hold_masks(module):
        few = (module(x) - module.bias) != 0
        set_p(module, 0.1)
        many = (module(x) - module.bias) != 0
    assert bool((many | ~few).all())
    assert int(many.sum()) > int(few.sum())


def test_bias_follows_its_weight_inside(keys) -> None:
    module = layer(unit="output", bias=True)
    with hold_masks(module):
        output = module(torch.randn(2, 8))
        mask = keep(keys[0], P, 8)
    assert torch.equal(output != 0, mask.bool().expand(2, 8))


def test_eval_inside_is_the_plain_module() -> None:
    module = layer()
    x = torch.randn(2, 8)
    with hold_masks(module.eval()):
        assert torch.equal(module(x), nn.functional.linear(x, module.weight, module.bias))


def test_seed_reproduces_held_masks() -> None:
    module = layer()
    x = torch.randn(2, 8)
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        with hold_masks(module):
            outputs.append(module(x))
    assert torch.equal(*outputs)


def test_nested_is_an_error_and_the_outer_goes_on() -> None:
    module = layer()
    x = torch.randn(2, 8)
    with hold_masks(module):
        first = module(x)
        with (
            pytest.raises(RuntimeError, match=r"hold_masks is already active.*leave that context"),
            hold_masks(module),
        ):
            pass
        assert torch.equal(module(x), first)


def test_part_of_a_model_can_be_held() -> None:
    model = nn.ModuleList([layer(), layer()])
    x = torch.randn(2, 8)
    with hold_masks(model[0]):
        assert torch.equal(model[0](x), model[0](x))
        assert not torch.equal(model[1](x), model[1](x))
        with pytest.raises(RuntimeError, match="already active"), hold_masks(model):
            pass
        with hold_masks(model[1]):
            assert torch.equal(model[1](x), model[1](x))


def test_exit_after_an_error() -> None:
    module, x = layer(), torch.eye(8)
    with pytest.raises(ZeroDivisionError), hold_masks(module):
        raise ZeroDivisionError
    assert not torch.equal(module(x), module(x))
    with hold_masks(module):
        pass


def test_plain_model() -> None:
    with (
        pytest.raises(NotOperatedError, match="Linear has no DropConnect in place to hold"),
        hold_masks(nn.Linear(2, 2)),
    ):
        pass


def test_strip_after_holding() -> None:
    module = nn.Linear(8, 8)
    before = Snapshot(module)
    apply_dropconnect(module, nn.Linear)
    with hold_masks(module):
        module(torch.randn(1, 8))
    strip_dropconnect(module)
    assert Snapshot(module) == before


def test_replicas_hold_the_masks_of_their_own_weights() -> None:
    """Replicas in threads share what a module knows of a site, and hold one mask at a time."""
    model = apply_dropconnect(nn.Sequential(nn.Linear(8, 8, bias=False)), "*", p=P)
    x = torch.randn(3, 8)
    wrong: list[Any] = []

    def replica(module: nn.Module, factor: float) -> nn.Module:
        twin = module._replicate_for_data_parallel()
        twin._modules = {n: replica(child, factor) for n, child in module._modules.items()}
        twin._parameters = {
            n: None if p is None else (p.detach() * factor).requires_grad_()
            for n, p in module._parameters.items()
        }
        return twin

    def work(twin: nn.Module, factor: float) -> None:
        try:
            for _ in range(200):
                output = twin(x)
                output.sum().backward()
                if not torch.allclose(output, expected * factor, atol=1e-5):
                    wrong.append(factor)
        except BaseException as error:
            wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with hold_masks(model):
            expected = model(x).detach()
            threads = [
                threading.Thread(target=work, args=(replica(model, factor), factor))
                for factor in (2.0, 3.0, 4.0)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
