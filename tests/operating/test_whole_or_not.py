"""A model is changed as a whole or not at all, whatever its classes are and whatever they hold."""

from __future__ import annotations

import abc
import copy
import gc
import pickle
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Generic, TypeVar

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    DropConnectModule,
    SurgeryError,
    apply_dropconnect,
    dropconnect_sites,
    hold_masks,
    load_dropconnect,
    plan_dropconnect,
    save_dropconnect,
    set_inference,
    set_p,
    strip_dropconnect,
)
from surgery.base.journal import Changes, Reversible, Step, at_once, restoring
from surgery.operating.suspend import reapplied
from surgery.verbs.checkpoint import anchors

from ..helpers import Snapshot

T = TypeVar("T")


class Slots:
    __slots__ = ("kept",)


class Registry:
    """Sees every subclass, as registries of models do, and wants to be told a key."""

    __slots__ = ()
    seen: ClassVar[list[type]] = []

    def __init_subclass__(cls, key: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Registry.seen.append(cls)


class Meta(abc.ABCMeta):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


class Own:
    """A layer that is operated itself, with an override that has to go on acting."""

    def __init__(self) -> None:
        super().__init__(4, 4)  # type: ignore[call-arg]
        self.moves = 0

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.moves += 1
        return super()._apply(*args, **kwargs)


class WithAbc(abc.ABC, Own, nn.Linear):
    pass


class WithGeneric(Generic[T], Own, nn.Linear):
    pass


class WithBoth(Own, Generic[T], abc.ABC, nn.Linear, metaclass=Meta):
    pass


class OfGeneric(WithBoth[int]):
    pass


class WithSlots(Slots, Own, nn.Linear):
    pass


class WithRegistry(Registry, Own, nn.Linear, key="a"):
    pass


class WithSlotsOfItsOwn(Own, nn.Linear):
    __slots__ = ("more",)


LAYOUTS = [
    WithAbc, WithGeneric, WithBoth, OfGeneric, WithSlots, WithRegistry, WithSlotsOfItsOwn,
]  # fmt: skip


@pytest.mark.parametrize("sampling", ["batch", "example"])
@pytest.mark.parametrize("cls", LAYOUTS, ids=[cls.__name__ for cls in LAYOUTS])
def test_classes_with_other_bases_first(cls: type[Any], sampling: str) -> None:
    class Net(abc.ABC, nn.Module):  # around the site: it is changed for sampling="example"
        def __init__(self) -> None:
            super().__init__()
            self.fc = cls()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    model, x = Net(), torch.randn(3, 4)
    before, seen = Snapshot(model), list(Registry.seen)
    apply_dropconnect(model, "fc", p=0.5, sampling=sampling)
    assert isinstance(model.fc, DropConnectModule)
    assert isinstance(model.fc, cls)
    assert not torch.equal(model(x), model(x))
    twin = copy.deepcopy(model)
    model.double().float()
    assert model.fc.moves == 2
    assert list(model.state_dict()) == ["fc.weight_raw", "fc.bias"]
    model.load_state_dict({"fc.weight": model.fc.weight_raw, "fc.bias": model.fc.bias})
    strip_dropconnect(model)
    model.fc.moves = 0
    assert Snapshot(model) == before
    assert type(strip_dropconnect(twin).fc) is cls
    assert Registry.seen == seen


def test_pickles_of_such_a_class() -> None:
    layer = apply_dropconnect(WithBoth(), "weight", p=0.5)
    loaded = pickle.loads(pickle.dumps(layer))
    assert type(strip_dropconnect(loaded)) is WithBoth


def test_a_class_without_subclasses_is_refused_by_name() -> None:
    class Final(type):
        def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> Any:
            if any(isinstance(base, Final) for base in bases):
                raise TypeError("no subclasses")
            return super().__new__(cls, name, bases, body)

    class Layer(nn.Linear, metaclass=Final):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Layer(4, 4))
    before = Snapshot(model)
    for verb in (plan_dropconnect, apply_dropconnect):
        with pytest.raises(SurgeryError, match=r"1 \(Layer\): its class has no subclasses"):
            verb(model, nn.Linear)
    assert Snapshot(model) == before


@pytest.mark.parametrize("how", ["attribute", "buffer", "parameter", "module"])
@pytest.mark.parametrize(
    "name", ["weight_anchor", "_weight_live", "_dropconnect", "_dropconnect_scope"]
)
def test_names_that_are_taken(name: str, how: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    match how:
        case "attribute":
            object.__setattr__(model[1], name, 1)
        case "buffer":
            model[1].register_buffer(name, torch.ones(4, 4))
        case "parameter":
            model[1].register_parameter(name, nn.Parameter(torch.ones(4, 4)))
        case "module":
            model[1].add_module(name, nn.ReLU())
    before = Snapshot(model)
    with pytest.raises(SurgeryError, match=rf"1.*already has an attribute {name!r}"):
        apply_dropconnect(model, nn.Linear, toward="pretrained")
    assert Snapshot(model) == before


def test_names_that_are_taken_around_a_site() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model._dropconnect_draws = 1  # type: ignore[assignment]
    with pytest.raises(SurgeryError, match=r"\(root\) \(Sequential\): .*'_dropconnect_draws'"):
        apply_dropconnect(model, "0", sampling="example")
    assert type(model[0]) is nn.Linear


def test_load_where_ties_differ(tmp_path: Path) -> None:
    """Another name of a tied weight is the first one; a weight that is tied in the file alone."""

    def model(tied: bool) -> nn.Module:
        made = nn.ModuleDict({"b": nn.Linear(4, 4), "a": nn.Linear(4, 4)})
        if tied:
            made["a"].weight = made["b"].weight
        return made

    save_dropconnect(apply_dropconnect(model(True), "*", toward="pretrained"), tmp_path)
    for fresh in (model(False), nn.ModuleDict(dict(reversed(model(True).items())))):
        before = Snapshot(fresh)
        try:
            load_dropconnect(fresh, tmp_path)
        except SurgeryError:
            assert Snapshot(fresh) == before


def test_changes_fail_as_a_whole() -> None:
    one, other, table = nn.Linear(2, 2), nn.Linear(2, 2), {"a": 1}
    changes = Changes()
    changes.put(table, {"a": 2})
    changes.set_class([one], type("Linear", (nn.Linear,), {}))
    changes.set_class([other], int)
    with pytest.raises(TypeError):
        changes.make()
    assert type(one) is type(other) is nn.Linear
    assert table == {"a": 1}


def test_resizing_that_fails_leaves_configurations() -> None:
    """A library writes the new size into its configuration, which may hold another, and then fails."""
    model = apply_dropconnect(nn.Sequential(nn.Embedding(8, 4)), "0")
    model.config = SimpleNamespace(words=8, of_text=SimpleNamespace(words=8))  # type: ignore[assignment]

    def resize() -> None:
        model.config.words = model.config.of_text.words = 9
        model[0].weight = nn.Parameter(torch.zeros(9, 4))
        raise ValueError("no memory")

    before = Snapshot(model)
    with pytest.raises(ValueError, match="no memory"):
        reapplied(model, resize)
    assert Snapshot(model) == before
    assert (model.config.words, model.config.of_text.words) == (8, 8)


@pytest.mark.parametrize("size", [5, 11])
def test_rows_that_stay_keep_their_anchors_when_a_weight_is_resized(size: int) -> None:
    """And new rows have the values that they begin with."""
    model = apply_dropconnect(nn.Sequential(nn.Embedding(8, 4)), "0", toward="pretrained")
    before = anchors(model)["0.weight"].clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    grown = torch.cat([model[0].weight.detach(), torch.randn(3, 4)])[:size]

    def resize() -> None:
        model[0].weight = nn.Parameter(grown)

    reapplied(model, resize)
    found, stay = anchors(model)["0.weight"], min(size, 8)
    assert torch.equal(found[:stay], before[:stay])
    assert torch.equal(found[stay:], grown[stay:])


def test_putting_back_is_not_left_before_its_end() -> None:
    """Interrupted twice: by the first interrupt in the body, and then while it is put back."""
    tries: list[int] = []

    def put_back() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise KeyboardInterrupt

    def body() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restoring(put_back, body)
    assert len(tries) == 3


def test_leaving_a_context_is_written_in_c() -> None:
    class Held(Reversible):
        def enter(self) -> tuple[Step, Step]:
            return at_once([]), at_once([])

    for context in (Held(), hold_masks(nn.Linear(2, 2))):
        assert type(context.__exit__).__name__ == "builtin_function_or_method"


def test_a_mask_of_a_killed_forward_goes() -> None:
    """What no interrupt should leave is noticed all the same: by eval, by a forward, by strip."""
    x = torch.randn(2, 4, 6)
    for end in (lambda m: m.eval(), lambda m: m(x), strip_dropconnect):
        layer = nn.Conv1d(4, 4, 3)
        model = apply_dropconnect(nn.Sequential(layer), "0", p=0.5)
        raw = layer.weight_raw
        layer.__dict__["_weight_live"] = torch.zeros_like(raw)
        end(model)
        assert layer.weight is raw


def test_the_next_forward_replaces_all_masks_of_a_killed_one() -> None:
    """Not the first of them alone: a mask of zeros would give an output of zeros."""
    layer = apply_dropconnect(nn.Conv1d(4, 4, 3, padding=1), ["weight", "bias"], p=0.01)
    torch.nn.init.ones_(layer.bias_raw)
    for name in ("weight", "bias"):
        layer.__dict__[f"_{name}_live"] = torch.zeros_like(getattr(layer, f"{name}_raw"))
    assert layer(torch.zeros(2, 4, 6)).any()


def test_strip_in_a_running_forward_is_refused() -> None:
    class Inside(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            with pytest.raises(SurgeryError, match=r"\(root\): its forward is running"):
                strip_dropconnect(self)
            return super().forward(x)

    apply_dropconnect(Inside(4, 4, 3), "weight", p=0.5)(torch.randn(2, 4, 6))


def test_a_forward_in_another_thread_is_left_alone() -> None:
    inside, asked = threading.Event(), threading.Event()

    class Waits(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            inside.set()
            asked.wait(20)
            return super().forward(x)

    layer = apply_dropconnect(Waits(4, 4, 3), "weight", p=1.0)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(layer(torch.ones(2, 4, 6))))
    thread.start()
    try:
        assert inside.wait(20)
        with pytest.raises(SurgeryError, match=r"\(root\): its forward is running"):
            strip_dropconnect(layer)
        layer.train()  # which removes what a killed forward has left
    finally:
        asked.set()
        thread.join()
    assert torch.equal(found[0], layer.bias[:, None].expand(2, 4, 4))
    assert type(strip_dropconnect(layer)) is Waits


def test_an_operated_class_is_an_ordinary_one() -> None:
    """Where Python allows it: its metaclass is that of the plain one."""
    layer = apply_dropconnect(nn.Conv1d(4, 4, 3), "weight", p=0.5)
    assert type(type(layer)) is type
    assert type(layer).__bases__ == (DropConnectModule, nn.Conv1d)


def test_classes_defined_in_a_function_are_freed() -> None:
    def classes() -> list[weakref.ref[type]]:
        class Layer(nn.Linear):
            pass

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc, self.rnn = Layer(4, 4), type("Rnn", (nn.LSTM,), {})(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(self.rnn(x)[0])

        model = apply_dropconnect(Net(), [nn.Linear], p=0.5, inference="moments")
        apply_dropconnect(model, nn.LSTM, p=0.5)
        model(torch.randn(2, 3, 4)).sum().backward()
        model.eval()(torch.randn(2, 3, 4))
        set_p(model, 0.1)
        set_inference(model, "mean")
        strip_dropconnect(model)
        return [weakref.ref(cls) for cls in (Layer, Net, type(model.rnn))]

    alive = [one for _ in range(3) for one in classes()]
    gc.collect()
    assert [ref() for ref in alive] == [None] * 9


def test_copy_copy_can_be_stripped_alone() -> None:
    """A shallow copy shares parameters and children, as that of a plain module, but not DropConnect."""
    for layer, x in ((nn.Linear(4, 4), torch.randn(2, 4)), (nn.LSTM(4, 4), torch.randn(2, 2, 4))):
        plain = layer(x)
        apply_dropconnect(layer, type(layer), p=0.5, toward="pretrained")
        shallow = copy.copy(layer)
        assert all(a is b for a, b in zip(shallow.parameters(), layer.parameters()))
        set_p(shallow, 0.25)
        assert {site.p for site in dropconnect_sites(layer)} == {0.5}
        for one, other in ((layer, shallow), (copy.copy(shallow), shallow)):
            strip_dropconnect(one)
            torch.testing.assert_close(one(x), plain)
            other.train()(x)
            torch.testing.assert_close(other.eval()(x), plain)
        torch.testing.assert_close(strip_dropconnect(shallow)(x), plain)
