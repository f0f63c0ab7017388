"""The walk over modules yields what nn.Module's own does, and kinds found before are forgotten."""

from __future__ import annotations

import pytest
from torch import nn

from surgery.modules import kind_of, register_kind
from surgery.modules.walk import named_modules

from ..internals import own_table_of_kinds


def shared() -> nn.Module:
    """With a module under three names, an empty container, and a name without a module."""
    layer = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model = nn.Sequential(layer, nn.ModuleList(), nn.Sequential(layer, nn.Linear(2, 2)), layer)
    model.register_module("nothing", None)
    return model


@pytest.mark.parametrize("remove_duplicate", [True, False])
@pytest.mark.parametrize("model", [shared(), nn.Linear(2, 2), nn.MultiheadAttention(4, 2)])
def test_walk_is_that_of_torch(model: nn.Module, remove_duplicate: bool) -> None:
    wanted = list(model.named_modules(remove_duplicate=remove_duplicate))
    found = named_modules(model, remove_duplicate)
    assert [name for name, _ in found] == [name for name, _ in wanted]
    assert all(one is other for (_, one), (_, other) in zip(found, wanted, strict=True))


def test_a_kind_registered_later_is_found() -> None:
    class Mine(nn.Linear):
        pass

    with own_table_of_kinds():
        assert kind_of(Mine(2, 2)).name == "linear"
        register_kind(kind_of(Mine(2, 2)).but(name="mine", classes=(Mine,)))
        assert kind_of(Mine(2, 2)).name == "mine"
        assert kind_of(nn.Linear(2, 2)).name == "linear"
    assert kind_of(Mine(2, 2)).name == "linear"
