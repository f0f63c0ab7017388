"""Where other code holds on to a module, its class or its forward, or changes it after apply."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery import (
    DropConnectModule,
    apply_dropconnect,
    dropconnect_sites,
    hold_masks,
    strip_dropconnect,
)


class Reader(nn.Module):
    """Reads its child's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight)


def test_a_forward_kept_from_before_strip_still_runs() -> None:
    layer = apply_dropconnect(nn.Linear(8, 8), "*", p=0.5)
    kept, x = layer.forward, torch.randn(2, 8)
    strip_dropconnect(layer)
    assert torch.equal(kept(x), layer(x))


def test_forward_keeps_its_signature_but_cannot_be_unwrapped() -> None:
    """accelerate unwraps `__wrapped__`, which would lead past the masks."""
    layer = apply_dropconnect(nn.LSTM(4, 4), "*", p=0.5)
    plain = nn.Linear(8, 8)
    assert inspect.signature(apply_dropconnect(nn.Linear(8, 8), "*").forward) == inspect.signature(
        plain.forward
    )
    assert not hasattr(apply_dropconnect(nn.Linear(8, 8), "*").forward, "__wrapped__")
    assert isinstance(layer, nn.LSTM)


def test_replaced_child_of_a_reader_runs_plain() -> None:
    model = apply_dropconnect(Reader(), "*.fc", p=0.5)
    model.fc = nn.Linear(8, 8)
    x = torch.randn(2, 8)
    assert torch.equal(model(x), F.linear(x, model.fc.weight))


def test_a_model_whose_drawn_child_was_removed_can_be_stripped() -> None:
    model = nn.Sequential(Reader(), nn.Linear(8, 8))
    apply_dropconnect(model, nn.Linear, p=0.5)
    del model[0].fc
    assert [site.name for site in dropconnect_sites(model)] == ["1.weight"]
    strip_dropconnect(model)
    assert type(model[0]) is Reader


def test_stripped_child_of_a_reader_runs_plain() -> None:
    attention = apply_dropconnect(nn.MultiheadAttention(8, 2), nn.MultiheadAttention, p=0.5)
    strip_dropconnect(attention.out_proj)
    x = torch.randn(3, 1, 8)
    attention(x, x, x)[0].sum().backward()
    assert [site.name for site in dropconnect_sites(attention)] == ["in_proj_weight"]


def test_the_class_of_an_operated_module_makes_plain_modules() -> None:
    layer = apply_dropconnect(nn.Linear(8, 8), "*", p=0.5)
    fresh = type(layer)(8, 3)
    assert type(fresh) is nn.Linear
    assert fresh.weight.shape == (3, 8)


def test_registries_of_classes_do_not_see_ours() -> None:
    registry: dict[str, type] = {}

    class Block(nn.Module):
        def __init_subclass__(cls, **kwargs: object) -> None:
            registry[cls.__name__] = cls

    class Own(Block, nn.Linear):
        pass

    apply_dropconnect(Own(4, 4), "*", p=0.5)
    assert registry == {"Own": Own}


def test_copies_made_while_masks_are_held_hold_none() -> None:
    cell = apply_dropconnect(nn.GRUCell(4, 4), "*", p=0.5)
    x, h = torch.randn(2, 4), torch.randn(2, 4)
    with hold_masks(cell):
        first = cell(x, h)
        twin = copy.deepcopy(cell)
        assert torch.equal(cell(x, h), first)
    assert not torch.equal(twin(x, h), twin(x, h))


def test_parameter_list_in_a_loop() -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.ParameterList([nn.Parameter(torch.ones(64)) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            for scale in self.scales:
                x = x * scale
            return x

    model = apply_dropconnect(Scales(), "re:scales\\.\\d", p=0.5)
    out = model(torch.ones(64))
    assert 0.5 < (out == 0).float().mean() < 0.95


def test_strip_warns_of_a_site_that_never_dropped() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = apply_dropconnect(Half(), nn.Linear, p=0.5)
    model(torch.randn(2, 4))
    with pytest.warns(UserWarning, match=r"1 DropConnect site never dropped.*'spare\.weight'"):
        strip_dropconnect(model)
    assert not any(isinstance(module, DropConnectModule) for module in model.modules())
