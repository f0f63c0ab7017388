"""What a forward writes into a weight while it is masked is never lost in silence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery.transforms.operating.graph_surgeon  # noqa: F401  (what the entry point of torch.fx imports)
from surgery import (
    SurgeryError,
    apply_dropconnect,
    hold_masks,
    plan_dropconnect,
    strip_dropconnect,
)


def assign_data(module: nn.Module) -> None:
    module.weight.data = module.weight.data * 2


def assign_item(module: nn.Module) -> None:
    module.weight[0] = 1


def assign_item_of_data(module: nn.Module) -> None:
    module.weight.data[0] = 1


def assign_parameter(module: nn.Module) -> None:
    module.weight = nn.Parameter(torch.ones(4, 4))


def augment(module: nn.Module) -> None:
    module.weight *= 2


WRITES: dict[str, Callable[[nn.Module], object]] = {
    "mul_": lambda module: module.weight.mul_(2),
    "copy_": lambda module: module.weight.copy_(module.weight * 2),
    "view": lambda module: module.weight[1].zero_(),
    "detach": lambda module: module.weight.detach().t().mul_(2),
    "data": lambda module: module.weight.data.mul_(2),
    "data-twice": lambda module: module.weight.data.data.zero_(),
    "out": lambda module: torch.mul(module.weight, 2, out=module.weight.data),
    "init": lambda module: nn.init.zeros_(module.weight),
    "max_norm": lambda module: F.embedding(torch.arange(2), module.weight, max_norm=0.1),
    "assign-data": assign_data,
    "assign-item": assign_item,
    "assign-item-of-data": assign_item_of_data,
    "assign-parameter": assign_parameter,
    "augment": augment,
}


class Writer(nn.Module):
    """Reads its weight, writes to it, and reads it again."""

    def __init__(self, write: Callable[[nn.Module], object]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        with torch.no_grad():
            self.write(self)
        return y + F.linear(x, self.weight)


class WritesChild(nn.Module):
    """Reads the weight of its child, and writes to it."""

    def __init__(self, write: Callable[[nn.Module], object]) -> None:
        super().__init__()
        self.child = nn.Linear(4, 4)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.child.weight)
        with torch.no_grad():
            self.write(self.child)
        return y


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_write_while_masked_is_an_error_that_names_the_weight(write) -> None:
    sentence = r"weight: the forward of \w+ writes to it.*Exclude it, or write to"
    for cls in (Writer, WritesChild):
        model = apply_dropconnect(cls(write), "*weight", p=0.5)
        before = {name: value.clone() for name, value in model.named_parameters()}
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context(), pytest.raises(SurgeryError, match=sentence):
                model(torch.randn(3, 4))
            with context(), hold_masks(model), pytest.raises(SurgeryError, match=sentence):
                model(torch.randn(3, 4))
        for name, value in model.named_parameters():
            assert torch.equal(value, before[name])
        strip_dropconnect(model)


@pytest.mark.parametrize("compiled", [False, True])
def test_reading_is_no_write(compiled: bool) -> None:
    def read(module: nn.Module) -> None:
        module.weight.data.clone().mul_(2)
        module.weight.detach().norm()
        (module.weight.data + 1).t().zero_()
        copy = module.weight * 2
        copy[0] = module.weight[1]

    model = apply_dropconnect(Writer(read), "weight", p=0.5)
    before = model.weight.detach().clone()
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    run(torch.randn(3, 4)).sum().backward()
    model.eval()
    run(torch.randn(3, 4))
    assert model.weight_raw.grad is not None
    assert torch.equal(model.weight, before)


class Rescales(nn.Module):
    """As transformers' Rwkv does: weights are divided in eval, and multiplied again in train."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([child])
        self.scaled = False

    def forward(self, *inputs: Tensor) -> object:
        if self.scaled is self.training:
            with torch.no_grad():
                for layer in self.layers:
                    if self.training:
                        layer.weight.mul_(4)
                    elif hasattr(layer.weight, "quant_state"):
                        self.requantise(layer)
                    else:
                        layer.weight.data.div_(4)
                        layer.weight.data[0] = layer.weight.shape[0]
            self.scaled = not self.training
        for layer in self.layers:
            inputs = (layer(*inputs),)
        return inputs[0]

    def requantise(self, layer: nn.Module) -> None:
        layer.weight.data = layer.weight.data / layer.weight.quant_state


CHILDREN: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(4, 5), torch.ones(3, 4)),
    "conv": (lambda: nn.Conv1d(2, 3, 2), torch.ones(3, 2, 4)),
    "conv-transpose": (lambda: nn.ConvTranspose1d(2, 3, 2), torch.ones(3, 2, 4)),
    "embedding": (lambda: nn.Embedding(4, 5), torch.arange(4)),
}


@pytest.mark.parametrize("kind", CHILDREN)
@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_parent_only_writes_reaches_the_stored_weight(kind: str, compiled: bool) -> None:
    make, x = CHILDREN[kind]
    models = [Rescales(make()).eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    plain, model = models[0], apply_dropconnect(models[1], "layers.0", p=0.5)
    assert plan_dropconnect(plain, "layers.0", p=0.5)[0].drawn_by == ()
    torch._dynamo.reset()
    run = torch.compile(model, backend="eager") if compiled else model
    for training in (False, True, False, True, True):
        model.train(training)
        assert torch.equal(run(x), plain.train(training)(x)) is not training
        assert torch.equal(model.layers[0].weight, plain.layers[0].weight)
    strip_dropconnect(model)
    assert torch.equal(model.layers[0].weight, plain.layers[0].weight)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of a graph break, from dynamo itself
@pytest.mark.parametrize("fullgraph", [False, True], ids=["breaks", "fullgraph"])
def test_a_write_in_a_compiled_forward(fullgraph: bool) -> None:
    """In one trace or pieced together."""
    error = torch._dynamo.exc.Unsupported if fullgraph else SurgeryError
    names = "mul_ copy_ view detach data assign-item assign-item-of-data max_norm"
    for name in names.split():
        torch._dynamo.reset()
        model = apply_dropconnect(Writer(WRITES[name]), "weight", p=0.5)
        run = torch.compile(model, backend="eager", fullgraph=fullgraph)
        with pytest.raises(error, match="writes to it while it is masked"):
            run(torch.randn(3, 4))


class WritesInGraph(nn.Module):
    def __init__(self, write: Callable[[nn.Module], object]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4), requires_grad=False)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self)
        return x @ self.weight


@pytest.mark.parametrize("name", ["mul_", "view", "detach", "data", "copy_", "max_norm"])
def test_a_graph_that_writes_is_refused(name: str) -> None:
    graph = torch.fx.symbolic_trace(WritesInGraph(WRITES[name]))
    with pytest.raises(SurgeryError, match=r"writes into it|max_norm"):
        apply_dropconnect(graph, "weight", p=0.5)


def test_a_weight_can_be_assigned_after_a_forward_was_killed() -> None:
    """Which may have left its mask there."""
    model = apply_dropconnect(nn.Conv1d(2, 3, 2), nn.Conv1d, p=0.5)
    model.__dict__["_weight_live"] = torch.zeros(3, 2, 2)
    model.weight = value = nn.Parameter(torch.ones(3, 2, 2))
    assert strip_dropconnect(model).weight is value
