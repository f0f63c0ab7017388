"""The tables in which compiled graphs find the p of each site."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from surgery import apply_dropconnect, set_p
from surgery.modules.laws import LawTable
from surgery.modules.places import states_in

from ..steps import assert_same, gradients, step_gradients


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def stack(count: int, p: float = 0.5) -> nn.Sequential:
    return apply_dropconnect(nn.Sequential(*(nn.Linear(4, 4) for _ in range(count))), "*", p=p)


def read(model: nn.Module) -> list[tuple[int, float]]:
    """Threshold and scale of each site as a graph reads them."""
    laws = [state.row.law() for state in states_in(model)]
    return [(int(law.threshold), float(law.scale)) for law in laws]


def shared(model: nn.Module) -> list[tuple[int, float]]:
    """The same as eager code reads them."""
    return [(int(state.law.threshold), float(state.law.scale)) for state in states_in(model)]


def test_graphs_and_eager_code_read_the_same() -> None:
    model = stack(5)
    assert read(model) == shared(model)
    for p, targets in ((0.1, None), (0.9, "2"), (1.0, "4"), (0.0, "1")):
        set_p(model, p, targets)
        assert read(model) == shared(model)
    assert len(set(read(model))) == 4


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_a_p_of_its_own(again: Any) -> None:
    model = stack(2)
    other = again(model)
    set_p(other, 0.1)
    assert read(model) == shared(model) == shared(stack(2))
    assert read(other) == shared(other) == shared(stack(2, p=0.1))


@pytest.mark.parametrize("move", [nn.Module.double, lambda m: m.to("meta")], ids=["double", "meta"])
def test_a_move_takes_the_law_along(move: Any) -> None:
    model = move(stack(2, p=0.3))
    weight = model[0].weight
    for state in states_in(model):
        assert state.row.table.fits(weight)
        assert state.row.law().scale.device == state.row.index.device == weight.device
    if weight.device.type != "meta":
        set_p(model, 0.2)
        assert read(model) == shared(model)


def test_what_a_change_of_p_makes_is_two_tensors_a_table() -> None:
    model = stack(64)
    tables = {state.row.table for state in states_in(model)}
    rows = [state.row for state in states_in(model)]
    before = [(table.thresholds, table.scales) for table in tables]
    values = [[tensor.clone() for tensor in tensors] for tensors in before]
    set_p(model, 0.1)
    assert [state.row for state in states_in(model)] == rows
    for table, (thresholds, scales), kept in zip(tables, before, values):
        assert table.thresholds is not thresholds
        assert table.scales is not scales
        # whoever holds the old ones, such as a backward, still finds the old p
        assert all(map(torch.equal, (thresholds, scales), kept))


def test_sites_beyond_one_table() -> None:
    count = LawTable.SIZE + 1
    model = stack(count)
    assert len({state.row.table for state in states_in(model)}) >= 2
    assert len({(state.row.table, state.row.number) for state in states_in(model)}) == count
    set_p(model, 0.25)
    assert set(read(model)) == set(shared(model))
    assert {threshold for threshold, _ in read(model)} == {-(2**30)}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_layers_that_are_compiled_alone_share_a_graph_whatever_their_p() -> None:
    """As people do to compile a deep model in a short time."""
    counter = CompileCounterWithBackend("aot_eager")
    model, x = nn.ModuleList(Layer() for _ in range(6)), torch.randn(3, 8)
    apply_dropconnect(model, nn.Linear, p=0.5)
    runs = [torch.compile(layer, backend=counter, fullgraph=True) for layer in model]

    def forward() -> None:
        value = x
        for run in runs:
            value = run(value)

    forward()
    first = counter.frame_count
    set_p(model, 0.1, "1.*")
    set_p(model, 0.9, "4.two")
    forward()
    assert counter.frame_count == first <= 2  # the first input needs no gradient


def test_a_compiled_backward_under_way_keeps_its_p() -> None:
    model, x = stack(2), torch.randn(3, 4)
    expected = step_gradients(model, x)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    torch.manual_seed(7)
    out = run(x)
    set_p(model, 0.9)
    out.square().sum().backward()
    assert_same({**gradients(model), "output": out}, expected)


def test_copies_of_a_compiled_model_are_compiled_once() -> None:
    model, x = stack(3), torch.randn(3, 4)
    counter = CompileCounterWithBackend("aot_eager")
    for p, one in ((0.5, model), (0.2, copy.deepcopy(model)), (0.7, copy.deepcopy(model))):
        set_p(one, p)
        torch.compile(one, backend=counter, fullgraph=True)(x)
    set_p(model, 0.3)
    torch.compile(model, backend=counter, fullgraph=True)(x)
    assert counter.frame_count <= 2  # torch compiles its Sequential anew for another instance
