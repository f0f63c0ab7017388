"""The verbs that `interrupts.py` interrupts, on small models of every kind, and the form of a model."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import surgery.transforms
from surgery import (
    apply_dropconnect,
    bake_dropconnect,
    dropconnect,
    hold_masks,
    load_dropconnect,
    mc_predict,
    plan_dropconnect,
    predict_moments,
    save_dropconnect,
    set_inference,
    set_p,
    strip_dropconnect,
)
from surgery.modules import DropConnectModule
from surgery.modules.operated import plain_class
from surgery.modules.places import places
from surgery.verbs.savers import resizes_plain, teach, writes_plain

from ..internals import live_masks, own_notes


class Net(nn.Module):
    """Every kind of site: fused, masked, read by the parent, recurrent, tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.conv(self.embed(words).mT).mT
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(torch.relu(self.fc(self.lstm(x)[0])))

    def save_pretrained(self, directory: str) -> list[str]:
        return list(self.state_dict())

    def resize_token_embeddings(self, size: int) -> None:
        old = self.embed.weight
        self.embed.weight = nn.Parameter(old.new_zeros(size, 8))
        # Not in `torch.no_grad()`, which an interrupt at its end leaves on, in plain models too.
        self.embed.weight.data[:7] = old.data
        self.embed.num_embeddings = size
        self.head.weight = self.embed.weight
        self.head.out_features = size


teach(Net, "save_pretrained", writes_plain)
teach(Net, "resize_token_embeddings", resizes_plain)


class Functional(nn.Module):
    """For graphs: parameters that nodes read."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(nn.functional.linear(x, self.w, self.b)) @ self.w)


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


WORDS = torch.arange(12).view(3, 4) % 7
FLOATS = torch.linspace(-1, 1, 24).view(3, 8)


def net() -> nn.Module:
    return Net().train()


def graph() -> nn.Module:
    return torch.fx.symbolic_trace(Functional())


def operate(model: nn.Module, **options: Any) -> nn.Module:
    targets: Any = [nn.Embedding, nn.Conv1d, nn.MultiheadAttention, nn.LSTM, nn.Linear]
    if isinstance(model, torch.fx.GraphModule):
        targets = "*"
    return apply_dropconnect(model, targets, p=0.5, **{"toward": "pretrained", **options})


def inputs_of(model: nn.Module) -> Tensor:
    return WORDS if isinstance(model, Net) else FLOATS


def form(model: nn.Module, own: list[nn.Parameter]) -> Any:
    """All that must be as before or as after: comparable between models that were built alike."""
    number = {id(parameter): place for place, parameter in enumerate(own)}
    modules = []
    for name, module in model.named_modules(remove_duplicate=False):
        operated = isinstance(module, DropConnectModule)
        cls: Any = plain_class(module) if operated else type(module).__qualname__
        modules.append(
            (
                name,
                cls,
                sorted(vars(module)),
                [(key, number.get(id(p)), total(p)) for key, p in module._parameters.items()],
                [(key, b.tolist()) for key, b in module._buffers.items() if b is not None],
                module.training,
                len(list(live_masks(module))),
                own_notes(module),
                len(module._load_state_dict_pre_hooks),
            )
        )
    states = [
        (place.name, s.name, s.config, s.rate, s.factor, s.inference, s.samples, s.held_key, s.held,
         s.group, s.law is not None and s.law.scale.tolist())
        for place in places(model)
        for s in [place.state]
    ]  # fmt: skip
    graphs = [
        (
            [(n.name, n.op, str(n.target), str(n.args), str(n.kwargs)) for n in m.graph.nodes],
            m.code,
            sorted(m.graph._graph_namespace._used_names),
        )
        for m in model.modules()
        if isinstance(m, torch.fx.GraphModule)
    ]
    return modules, states, graphs


def total(parameter: Tensor | None) -> float | None:
    """Of its values, which a verb may change."""
    return None if parameter is None else parameter.detach().double().sum().item()


class Verb:
    """Something to interrupt."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        prepare: Callable[[nn.Module], Any],
        run: Callable[[nn.Module], Any],
        retry: bool = True,
        seeded: bool = False,
        between: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        self.build, self.prepare, self.run = build, prepare, run
        self.retry, self.seeded, self.between = retry, seeded, between

    def fresh(self) -> tuple[nn.Module, list[nn.Parameter], Tensor]:
        torch.manual_seed(0)
        torch.set_grad_enabled(True)
        model = self.build()
        own = list(model.parameters())
        with torch.no_grad():
            plain = copy.deepcopy(model).eval()(inputs_of(model))
        self.prepare(model)
        torch.manual_seed(1)
        return model, own, plain

    def forms(self) -> list[Any]:
        """Before, after, and what else is whole."""
        model, own, _ = self.fresh()
        found = [form(model, own)]
        self.run(model)
        found.append(form(model, own))
        if self.between is not None:
            self.between(model)
            found.append(form(model, own))
        return found


FOLDER, SAVED = tempfile.mkdtemp(), tempfile.mkdtemp()


def _saved(model: nn.Module) -> None:
    twin = operate(copy.deepcopy(model))
    with torch.no_grad():
        for module in twin.modules():
            for buffer in module.buffers(recurse=False):
                buffer.zero_()
    save_dropconnect(twin, FOLDER)


def _nothing(model: nn.Module) -> None:
    pass


def _hold(model: nn.Module) -> None:
    with hold_masks(model):
        model(inputs_of(model))


def _step(model: nn.Module) -> None:
    model(inputs_of(model)).sum().backward()
    model.zero_grad()


def _with_inference(model: nn.Module) -> None:
    with set_inference(model, "moments"):
        pass


def _with_dropconnect(model: nn.Module) -> None:
    with dropconnect(model, nn.Linear, p=0.5):
        pass


def _linear_sites(model: nn.Module) -> None:
    apply_dropconnect(model, nn.Linear, p=0.5)
    model(FLOATS)


def _laws(model: nn.Module) -> None:
    operate(model, toward="zero")
    model(inputs_of(model))


VERBS = {
    "apply": Verb(net, _nothing, operate),
    "extend": Verb(
        net,
        lambda m: apply_dropconnect(m, nn.Conv1d, p=0.2),
        lambda m: apply_dropconnect(m, [nn.LSTM, "fc"], p=0.5),
    ),
    "plan": Verb(net, operate, lambda m: plan_dropconnect(m, "fc.bias")),
    "strip": Verb(net, operate, strip_dropconnect),
    "bake": Verb(net, operate, lambda m: bake_dropconnect(m, 1)),
    "save": Verb(net, operate, lambda m: m.save_pretrained(FOLDER)),
    "resize": Verb(net, operate, lambda m: m.resize_token_embeddings(9), retry=False),
    "set_inference": Verb(Mlp, _linear_sites, lambda m: set_inference(m, "moments")),
    "with set_inference": Verb(
        Mlp, _linear_sites, _with_inference, between=lambda m: set_inference(m, "moments")
    ),
    "with dropconnect": Verb(Mlp, _nothing, _with_dropconnect),
    "hold_masks": Verb(net, operate, _hold),
    "set_p": Verb(net, _laws, lambda m: set_p(m, 0.25)),
    "mc_predict": Verb(
        Mlp, _linear_sites, lambda m: mc_predict(m, FLOATS, samples=4, seed=3), seeded=True
    ),
    "predict_moments": Verb(Mlp, _linear_sites, lambda m: predict_moments(m, FLOATS)),
    "save_dropconnect": Verb(net, operate, lambda m: save_dropconnect(m, SAVED)),
    "load": Verb(net, _saved, lambda m: load_dropconnect(m, FOLDER)),
    "step": Verb(net, operate, _step),
    "step, per example": Verb(
        Mlp, lambda m: apply_dropconnect(m, nn.Linear, p=0.5, sampling="example"), _step
    ),
    "load_state_dict": Verb(net, operate, lambda m: m.load_state_dict(surgery.plain_state_dict(m))),
    "deepcopy": Verb(net, operate, copy.deepcopy),
    "pickle": Verb(net, operate, lambda m: pickle.loads(pickle.dumps(m))),
    "graph: apply": Verb(graph, _nothing, operate),
    "graph: strip": Verb(graph, operate, strip_dropconnect),
    "graph: bake": Verb(graph, operate, lambda m: bake_dropconnect(m, 1)),
    "graph: step": Verb(graph, operate, _step),
    "find": Verb(net, operate, lambda m: surgery.transforms.find(m, WORDS)),
}
