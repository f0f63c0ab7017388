"""Canaries of what lies inside of an `nn.Module`."""

from __future__ import annotations

import inspect
import pickle
import sys
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from surgery.torch_private import modules

from .canary import canary


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros(1))
        self.child = nn.Linear(2, 2)
        self.bias = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@canary(modules, "nn.Module._parameters", "nn.Module._buffers", "nn.Module._modules")
def test_a_module_has_what_lies_in_its_dicts() -> None:
    """In their order, under their names, and by its attributes."""
    net = Net()
    assert list(net._parameters) == ["weight", "bias"]
    assert list(net._buffers) == ["seen"]
    assert list(net._modules) == ["child"]
    raw = net._parameters.pop("weight")
    net._parameters["weight_raw"] = raw
    assert net.weight_raw is raw
    assert [name for name, _ in net.named_parameters(recurse=False)] == ["bias", "weight_raw"]
    assert list(net.state_dict())[:3] == ["bias", "weight_raw", "seen"]
    net._buffers["anchor"] = torch.zeros(1)
    assert dict(net.named_buffers(recurse=False)).keys() == {"seen", "anchor"}
    net._modules["more"] = nn.ReLU()
    assert [name for name, _ in net.named_children()] == ["child", "more"]
    assert type(net.__dict__["_parameters"]) is dict


@canary(modules, "nn.Module._load_from_state_dict")
def test_a_class_takes_its_part_of_a_state_dict() -> None:
    class Other(Net):
        def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}old")
            super()._load_from_state_dict(state_dict, prefix, *args)

    outer = nn.Sequential(Other())
    state = outer.state_dict()
    state["0.old"] = state.pop("0.weight") + 1
    outer.load_state_dict(state)
    assert outer[0].weight.tolist() == [2, 2]


@canary(modules, "nn.Module._apply")
def test_a_class_is_moved_by_one_method() -> None:
    moved = []

    class Other(Net):
        def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
            moved.append(fn(torch.zeros(1)).dtype)
            return super()._apply(fn, *args, **kwargs)

    assert nn.Sequential(Other()).to(torch.float64)[0].weight.dtype is torch.float64
    assert moved == [torch.float64]
    nn.Sequential(Other()).to("meta")
    assert len(moved) == 2


@canary(modules, "nn.Module._call_impl")
def test_the_call_of_a_module_is_above_its_forward_and_its_hooks() -> None:
    codes = {modules.CALL, *(c for c in modules.CALL.co_consts if isinstance(c, CodeType))}
    owners = []

    def look(*_: Any) -> None:
        frame = sys._getframe(2)
        assert frame.f_code in codes
        while frame.f_code is not modules.CALL:
            frame = frame.f_back
        owners.append(frame.f_locals["self"])

    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            look()
            return x

    net = Looks()
    net(torch.ones(2))  # the short way, without hooks
    net.register_forward_pre_hook(lambda *_: look())
    net.register_forward_hook(lambda *_: look())
    net(torch.ones(2))
    assert [owner is net for owner in owners] == [True] * 4


@canary(modules, "torch.nn.modules.module.register_module_module_registration_hook")
def test_registrations_are_seen() -> None:
    """Also of what a copy of a graph puts in."""
    seen = []
    handle = modules.on_registration(lambda *given: seen.append(given[:2]))
    try:
        outer = nn.Sequential(nn.ReLU())
        assert seen == [(outer, "0")]
        outer.more = nn.ReLU()
        outer.add_module("last", nn.ReLU())
        assert seen[1:] == [(outer, "more"), (outer, "last")]
        graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(1, 1)))
        seen.clear()
        pickle.loads(pickle.dumps(graph))
        assert "0" in {name for _, name in seen}
    finally:
        handle.remove()


@canary(
    modules,
    "nn.Module._forward_pre_hooks",
    "nn.Module._forward_hooks",
    "torch.nn.modules.module._global_forward_pre_hooks",
    "torch.nn.modules.module._global_forward_hooks",
)
def test_the_hooks_around_a_forward_are_known() -> None:
    net, hooks = Net(), [lambda *_: None for _ in range(4)]
    everybodys = nn.modules.module
    handles = [
        net.register_forward_pre_hook(hooks[0]),
        net.register_forward_hook(hooks[1]),
        everybodys.register_module_forward_pre_hook(hooks[2]),
        everybodys.register_module_forward_hook(hooks[3]),
    ]
    try:
        assert list(modules.forward_hooks(net)) == hooks
        assert list(modules.pre_hooks(net)) == hooks[:1]
    finally:
        for handle in handles:
            handle.remove()
    assert not list(modules.forward_hooks(net))


@canary(modules, "torch.nn.utils.prune.BasePruningMethod._tensor_name")
def test_pruning_knows_its_weight() -> None:
    layer = prune.l1_unstructured(nn.Linear(2, 2), "weight", 0.5)
    (hook,) = modules.pre_hooks(layer)
    assert isinstance(hook, prune.BasePruningMethod)
    assert getattr(hook, modules.PRUNED) == "weight"


@canary(
    modules,
    "nn.Module._register_load_state_dict_pre_hook",
    "nn.Module._load_state_dict_pre_hooks",
    "torch.nn.modules.module._WrappedHook.hook",
)
def test_a_hook_sees_what_is_loaded_and_goes_again() -> None:
    """The hook is given no module, and a copy of the owner has it too."""
    net, seen = Net(), []

    def hook(state_dict: Any, prefix: str, *args: Any) -> None:
        seen.append(prefix)

    modules.before_loading(net, hook)
    outer = nn.Sequential(net)
    outer.load_state_dict(outer.state_dict())
    assert seen == ["0."]
    modules.not_before_loading(net, hook)
    outer.load_state_dict(outer.state_dict())
    assert seen == ["0."]


@canary(modules, "OrderedDict._metadata of a state dict")
def test_a_state_dict_tells_the_versions_of_modules() -> None:
    seen: list[Any] = []

    class Versioned(nn.Linear):
        _version = 7

        def _load_from_state_dict(
            self, state_dict: Any, prefix: str, versions: Any, *args: Any
        ) -> None:
            seen.append(versions.get("version"))
            super()._load_from_state_dict(state_dict, prefix, versions, *args)

    model = nn.Sequential(Versioned(2, 2))
    saved = model.state_dict()
    model.load_state_dict(saved)
    model.load_state_dict(modules.as_state_dict_of(saved, dict(saved)))
    model.load_state_dict(modules.as_state_dict_of(dict(saved), dict(saved)))
    assert seen == [7, 7, None]


@canary(modules, "nn.Module._state_dict_hooks")
def test_hooks_after_saving_are_in_a_dict() -> None:
    net = Net()
    before = dict(modules.hooks_after_saving(net))
    net.register_state_dict_post_hook(lambda module, state, prefix, meta: state.clear())
    assert len(modules.hooks_after_saving(net)) == len(before) + 1
    assert not net.state_dict()
    modules.hooks_after_saving(net).clear()
    assert net.state_dict()


CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3, groups=2, padding="same", padding_mode="circular"), (2, 4, 8)),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect"), (2, 4, 8, 8)),
    (nn.Conv3d(2, 3, 2, dilation=2), (2, 2, 5, 5, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS)
@canary(modules, "torch.nn.ConvNd._conv_forward")
def test_a_convolution_takes_another_weight(layer: Any, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.randn_like(layer.weight)
    found = modules.convolved(layer, x, weight, layer.bias)
    layer.weight.data = weight
    assert found.equal(layer(x))


@canary(modules, "nn.Module._is_replica")
def test_copies_of_data_parallel_are_marked() -> None:
    replica = Net()._replicate_for_data_parallel()
    assert getattr(replica, modules.REPLICA) is True
    assert not hasattr(Net(), modules.REPLICA)


@canary(modules, "_is_fsdp_managed_module")
def test_fsdp_marks_what_it_holds() -> None:
    """Both versions do. (The second does it in several processes only; tests/survive has these.)"""
    from torch.distributed.fsdp import _dynamo_utils, fully_shard

    net = Net()
    _dynamo_utils._annotate_modules_for_dynamo(net, set(), use_orig_params=True)
    assert net.__dict__[modules.MANAGED] is True
    source = Path(inspect.unwrap(fully_shard).__code__.co_filename).read_text()
    assert f".{modules.MANAGED} = True" in source
