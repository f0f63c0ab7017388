"""`record`: what it sees of one run, and that it leaves no trace."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from surgery import SurgeryError, apply_dropconnect
from surgery.transforms.capture.record import record

from ...zoo.traits import Branches, Functional, Restless, WantsLabels


def owners(graph: fx.GraphModule, function: Any) -> list[list[str]]:
    """For each call of a function, the modules whose forward was running, outermost first."""
    return [
        list(node.meta["nn_module_stack"])
        for node in graph.graph.find_nodes(op="call_function", target=function)
    ]


def test_the_graph_replays_the_run_and_shares_the_parameters() -> None:
    model, x = Functional().eval(), torch.randn(2, 4)
    graph = record(model, x)
    with torch.no_grad():
        assert torch.equal(graph(x)[0], model(x))
        other = torch.randn(2, 4)
        assert torch.equal(graph(other)[0], model(other))
    assert graph.w is model.w
    assert graph.stack is model.stack


@pytest.mark.parametrize("name", ["minilm", "gpt2", "t5", "mixtral", "vit"])
def test_graphs_of_transformers_replay(name: str, tiny) -> None:
    model = tiny(name).eval()
    if name == "vit":
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    else:
        inputs = {"input_ids": torch.randint(0, 99, (2, 5))}
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(0, 99, (2, 3))
    graph = record(model, inputs)
    with torch.no_grad():
        wanted = model(**inputs)[0]
        assert any(torch.equal(out, wanted) for out in graph(*inputs.values()))


def test_the_modules_whose_forward_runs() -> None:
    class Direct(nn.Module):
        """Calls a child's forward itself, and reads another child's weight."""

        def __init__(self) -> None:
            super().__init__()
            self.called = nn.Sequential(nn.Linear(4, 4))
            self.direct, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.direct.forward(self.called(x)), self.read.weight)

    graph = record(Direct(), torch.randn(2, 4))
    assert owners(graph, F.linear) == [["", "called", "called.0"], ["", "direct"], [""]]


def test_shapes_are_of_the_results() -> None:
    graph = record(nn.Linear(4, 3), torch.randn(5, 2, 4))
    (linear,) = graph.graph.find_nodes(op="call_function", target=F.linear)
    assert tuple(linear.meta["shape"]) == (5, 2, 3)
    assert [tuple(node.meta["shape"]) for node in linear.args] == [(5, 2, 4), (3, 4), (3,)]


@pytest.mark.parametrize(("sign", "read"), [(1.0, ["up"]), (-1.0, ["down"])])
def test_the_branch_that_the_data_takes(sign: float, read: list[str]) -> None:
    graph = record(Branches(), sign * torch.ones(2, 4))
    attributes = {str(n.target) for n in graph.graph.find_nodes(op="get_attr")}
    assert attributes == {f"{module}.{name}" for module in read for name in ("weight", "bias")}


def test_positional_keyword_and_nested_inputs() -> None:
    model, x, y = WantsLabels(), torch.randn(2, 4), torch.tensor([1, 2])
    for inputs in ((x, y), [x, y], {"x": x, "labels": y}):
        graph = record(model, inputs)
        assert torch.equal(graph(x, y)[0], model.eval()(x, y))
    cell, state = nn.LSTMCell(4, 3), (torch.randn(2, 3), torch.randn(2, 3))
    graph = record(cell, (x, state))
    names = [node.target for node in graph.graph.find_nodes(op="placeholder")]
    assert names == ["args_0", "args_1_0", "args_1_1"]
    assert all(map(torch.equal, graph(x, *state), cell(x, state)))


def test_in_place_writes_and_indices() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.clone()
            y[:, 0] = 2 * x[:, 1]
            y += 1
            y.relu_()
            return y[torch.tensor([1, 0]), ..., None].mT

    x = torch.randn(2, 4)
    graph = record(Writes(), x)
    assert torch.equal(graph(x)[0], Writes()(x))


def state_of(model: Restless) -> list[Any]:
    modules = list(model.modules())
    return [
        [list(vars(module).items()) for module in modules],
        [
            [list(vars(module)[t].items()) for t in ("_parameters", "_buffers")]
            for module in modules
        ],
        [module.training for module in modules],
    ]


def test_nothing_of_the_model_is_changed() -> None:
    model = Restless()
    model.norm.eval()
    hooks: list[Any] = []
    model.fc.register_forward_hook(lambda module, args, out: hooks.append(module))
    before, random = state_of(model), torch.get_rng_state()
    values = {name: value.clone() for name, value in model.state_dict().items()}
    record(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), random)
    after = state_of(model)
    for old, new in zip(before[0], after[0]):
        assert [name for name, _ in old] == [name for name, _ in new]
        assert all(a is b for (_, a), (_, b) in zip(old, new))
    assert all(
        name == other and a is b
        for old_tables, new_tables in zip(before[1], after[1])
        for old, new in zip(old_tables, new_tables)
        for (name, a), (other, b) in zip(old, new)
    )
    assert before[2] == after[2] == [True, True, False, True]
    assert all(torch.equal(values[name], value) for name, value in model.state_dict().items())
    assert hooks == [model.fc]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_failing_forward_leaves_no_trace_either() -> None:
    model = WantsLabels().train()
    before = dict(vars(model))
    with pytest.raises(TypeError, match="labels"):
        record(model, torch.randn(2, 4))
    assert vars(model) == before
    assert "forward" not in vars(model.fc)
    assert model.fc.training
    assert torch.is_grad_enabled()


def test_operated_modules_are_recorded_plain(keys) -> None:
    model = apply_dropconnect(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), "*", p=0.5)
    graph = record(model, torch.randn(2, 4))
    assert keys == []
    assert [n.target for n in graph.graph.find_nodes(op="get_attr")] == ["0.weight", "0.bias"]
    assert graph.get_parameter("0.weight") is model[0].weight_raw
    assert "dropconnect" in repr(model)


def test_there_are_no_gradients_and_no_training() -> None:
    seen: list[tuple[bool, bool]] = []

    class Look(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((torch.is_grad_enabled(), self.training))
            return x + 1

    record(nn.Sequential(Look()).train(), torch.randn(2))
    assert seen == [(False, False)]


def test_intermediate_results_are_let_go() -> None:
    alive: list[int] = []
    seen: list[weakref.ref[Tensor]] = []

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            alive.append(sum(ref() is not None for ref in seen))
            y = x + 1
            seen.append(weakref.ref(y))
            return y

    gc.collect()
    record(nn.Sequential(*(Watch() for _ in range(20))), torch.randn(2))
    assert max(alive) <= 2


def test_compiled_models_are_not_compiled_for_it() -> None:
    calls: list[int] = []

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        calls.append(1)
        return graph.forward

    model: Any = torch.compile(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), backend=backend)
    graph = record(model, torch.randn(2, 4))
    assert calls == []
    assert [n.target for n in graph.graph.find_nodes(op="get_attr")] == [
        "_orig_mod.0.weight",
        "_orig_mod.0.bias",
    ]


def test_inputs_of_another_type() -> None:
    with pytest.raises(
        TypeError, match=r'is a int; give a tensor, a tuple .* \{"input_ids": ids\}'
    ):
        record(nn.Linear(4, 3), 5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript() -> None:
    model = nn.Sequential(nn.ReLU(), torch.jit.script(nn.Linear(4, 3)))
    with pytest.raises(
        SurgeryError, match="1 is a TorchScript module, which cannot be looked into"
    ):
        record(model, torch.randn(2, 4))


def test_lazy_parameters() -> None:
    with pytest.raises(SurgeryError, match="run it once on real inputs first"):
        record(nn.LazyLinear(3), torch.randn(2, 4))
