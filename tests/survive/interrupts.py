"""Interrupt the verbs everywhere, and look at what is left.

    python -m tests.survive.interrupts [--every N] [--signals SECONDS] [VERB ...]

prints, for each verb, how many interrupts landed and how many left something that is neither as before
nor as after, or that cannot be retried, stripped, and be the checkpoint again.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import pickle
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from surgery import (
    apply_dropconnect,
    hold_masks,
    load_dropconnect,
    mc_predict,
    save_dropconnect,
    set_inference,
    set_p,
    strip_dropconnect,
)
from surgery.modules import DropConnectModule
from surgery.modules.places import places
from surgery.savers import resizes_plain, teach, writes_plain
from surgery.scope import in_scope

OURS = (
    str(Path(surgery.__file__).parent),
    str(Path(surgery.__file__).parent.parent / "transforms"),
)


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
        cls: Any = type(module)._dropconnect_class if operated else type(module).__qualname__
        modules.append(
            (
                name,
                cls,
                sorted(vars(module)),
                [(key, number.get(id(p))) for key, p in module._parameters.items()],
                [(key, b.tolist()) for key, b in module._buffers.items() if b is not None],
                module.training,
                [vars(module)[s.live] is None for s in module._dropconnect.values()]
                if operated
                else [],
                (module._dropconnect_draws, module._dropconnect_scope) if operated else (),
                len(module._load_state_dict_pre_hooks),
            )
        )
    states = [
        (place.name, s.name, s.config, s.rate, s.factor, s.inference, s.draws, s.held_key, s.held,
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


def surroundings() -> Any:
    """What belongs to the thread, not to the model."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks, in_scope(), torch.is_grad_enabled()


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


FOLDER = tempfile.mkdtemp()


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


def _linear_sites(model: nn.Module) -> None:
    apply_dropconnect(model, nn.Linear, p=0.5)
    model(FLOATS)


def _laws(model: nn.Module) -> None:
    operate(model, toward="zero")
    model(inputs_of(model))


VERBS = {
    "apply": Verb(net, _nothing, operate),
    "strip": Verb(net, operate, strip_dropconnect),
    "save": Verb(net, operate, lambda m: m.save_pretrained(FOLDER)),
    "resize": Verb(net, operate, lambda m: m.resize_token_embeddings(9), retry=False),
    "set_inference": Verb(Mlp, _linear_sites, lambda m: set_inference(m, "moments")),
    "with set_inference": Verb(
        Mlp, _linear_sites, _with_inference, between=lambda m: set_inference(m, "moments")
    ),
    "hold_masks": Verb(net, operate, _hold),
    "set_p": Verb(net, _laws, lambda m: set_p(m, 0.25)),
    "mc_predict": Verb(
        Mlp, _linear_sites, lambda m: mc_predict(m, FLOATS, samples=4, seed=3), seeded=True
    ),
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
    "graph: step": Verb(graph, operate, _step),
    "find": Verb(net, operate, lambda m: surgery.transforms.find(m, WORDS)),
}


class AtOpcode:
    """Raises `KeyboardInterrupt` before one instruction of Python code, counted from the start."""

    def __init__(self, count: int | None, everywhere: bool) -> None:
        self.left, self.everywhere, self.seen = count, everywhere, 0

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        file = frame.f_code.co_filename
        if not self.everywhere and not file.startswith(OURS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._local

    def _local(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "opcode":
            self.seen += 1
            if self.seen == self.left:
                raise KeyboardInterrupt
        return self._local


def run_traced(call: Callable[[], Any], count: int | None, everywhere: bool) -> tuple[bool, int]:
    """Whether the interrupt landed, and how many instructions were run."""
    tracer = AtOpcode(count, everywhere)
    sys.settrace(tracer)
    try:
        call()
    except KeyboardInterrupt:
        return True, tracer.seen
    finally:
        sys.settrace(None)
    return False, tracer.seen


def problem(verb: Verb, model: nn.Module, own: Any, plain: Tensor, forms: list[Any]) -> str | None:
    """What is wrong with a model after an interrupt, or None."""
    if surroundings() != (None, False, True):
        return f"the thread: {surroundings()}"
    try:
        found = form(model, own)
        if found not in forms:
            return "neither before nor after"
        if verb.retry and found == forms[0]:
            verb.run(model)
            if form(model, own) != forms[1]:
                return "a retry ends elsewhere"
        if next(places(model), None) is not None:
            strip_dropconnect(model)
        with torch.no_grad():
            same = torch.equal(model.eval()(inputs_of(model))[..., :7], plain[..., :7])
    except Exception as error:
        return f"afterwards: {type(error).__name__}: {error}"
    same_objects = all(a is b for a, b in zip(model.parameters(), own))
    if not same or (not same_objects and verb.retry):
        return "stripped, it is another model"
    return None


def sweep(
    verb: Verb, every: int = 1, start: int = 1, everywhere: bool = False
) -> tuple[int, Counter[str]]:
    """Interrupt at every n-th instruction; how many landed, and what was wrong after how many."""
    forms = verb.forms()
    landed, wrong = 0, Counter[str]()
    for count in itertools.count(start, every):
        model, own, plain = verb.fresh()
        state = torch.get_rng_state()
        hit, _ = run_traced(lambda: verb.run(model), count, everywhere)  # noqa: B023
        if not hit:
            return landed, wrong
        landed += 1
        if verb.seeded and not torch.equal(state, torch.get_rng_state()):
            wrong["the generator"] += 1
            continue
        found = problem(verb, model, own, plain, forms)
        if found is not None:
            wrong[found] += 1
    raise AssertionError("unreachable")


def by_signals(verb: Verb, seconds: float) -> tuple[int, Counter[str]]:
    """Interrupt by real signals at random times, for so long."""
    forms = verb.forms()
    model, *_ = verb.fresh()
    began = time.perf_counter()
    verb.run(model)
    longest = 1.5 * (time.perf_counter() - began)
    landed, wrong, end = 0, Counter[str](), time.perf_counter() + seconds

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        while time.perf_counter() < end:
            model, own, plain = verb.fresh()
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, longest))
                verb.run(model)
                signal.setitimer(signal.ITIMER_REAL, 0)
                continue
            except (KeyboardInterrupt, Exception):  # C++ may make another error of an interrupt
                landed += 1
            found = problem(verb, model, own, plain, forms)
            if found is not None:
                wrong[found] += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return landed, wrong


def _chosen(names: list[str]) -> Iterator[tuple[str, Verb]]:
    for name in names or VERBS:
        yield name, VERBS[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verbs", nargs="*")
    parser.add_argument("--every", type=int, default=1, help="instructions from one to the next")
    parser.add_argument("--everywhere", action="store_true", help="in torch's frames too")
    parser.add_argument("--signals", type=float, default=0.0, help="seconds of real signals each")
    options = parser.parse_args()
    total = bad = 0
    for name, verb in _chosen(options.verbs):
        if options.signals:
            landed, wrong = by_signals(verb, options.signals)
        else:
            landed, wrong = sweep(verb, options.every, 1, options.everywhere)
        total, bad = total + landed, bad + sum(wrong.values())
        print(
            f"{name:20} {landed:7} landed {sum(wrong.values()):6} broken {dict(wrong)}", flush=True
        )
    print(f"{'all':20} {total:7} landed {bad:6} broken")


if __name__ == "__main__":
    main()
