"""Whose forward reads a weight: found in the source, so that no mask is drawn where none acts."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import apply_dropconnect, dropconnect_sites, plan_dropconnect
from surgery.kinds.reads import forward_in_source, forward_of

from ..expected import keep, masked


class Base(nn.Module):
    """Has children to read; the subclasses differ in how their forward reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.items = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))


class Direct(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight, self.proj.bias)


class PositionalOnly(Base):
    def forward(self, x: Tensor, /) -> Tensor:
        return F.linear(x, self.proj.weight, self.proj.bias)


class Alias(Base):
    def forward(self, x: Tensor) -> Tensor:
        proj = self.proj
        weight = proj.weight
        return F.linear(x, weight)


class InMethod(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        return x @ self.proj.weight.t()


class Inherited(InMethod):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Positions(nn.Embedding):
    """Has a second way to its forward."""

    def look_up(self, x: Tensor) -> Tensor:
        return super().forward(x)


class CallsMethodOfChild(nn.Module):
    """Its child's forward reads the weight, and so does a method that is called beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = Positions(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.positions(x) - self.positions.look_up(x)


def test_a_method_of_a_child_reads_under_the_mask_of_its_forward(keys: list[Tensor]) -> None:
    model = CallsMethodOfChild()
    (site,) = plan_dropconnect(model, "positions", p=0.5)
    assert site.drawn_by == ("",)
    apply_dropconnect(model, "positions", p=0.5).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model(torch.arange(5))
    assert len(keys) == 1
    assert torch.equal(out, torch.zeros(5, 4))  # two masks, or none in one of them, would differ


def test_methods_that_every_module_has_are_no_readers() -> None:
    class Calls(Base):
        def forward(self, x: Tensor) -> Tensor:
            self.proj.requires_grad_(True)
            return self.proj(x) + self.proj.weight.sum().detach() + len(self.items.extra_repr())

    assert forward_in_source(Calls).methods == frozenset()


class InLoop(Base):
    def forward(self, x: Tensor) -> Tensor:
        for item in self.items:
            x = F.linear(x, item.weight)
        return x


class InComprehension(Base):
    def forward(self, x: Tensor) -> Any:
        return sum(F.linear(x, item.weight) for item in self.items)


class Enumerated(Base):
    def forward(self, x: Tensor) -> Tensor:
        for _, item in enumerate(self.items):
            x = F.linear(x, item.weight)
        return x


class Zipped(Base):
    def forward(self, x: Tensor) -> Any:
        return sum([F.linear(part, item.weight) for part, item in zip([x, x, x], self.items)])


class Nested(Base):
    def forward(self, x: Tensor) -> Tensor:
        for _, (item, factor) in enumerate(zip(reversed(self.items), (1, 2, 3))):
            x = factor * F.linear(x, item.weight)
        return x


class FromDict(Base):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        for _name, item in self.items.items():
            x = F.linear(x, item.weight)
        return x


class Indexed(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.items[1].weight)


class Calls(Base):
    def forward(self, x: Tensor) -> Tensor:
        for item in self.items:
            x = item(x)
        return self.proj(x)


class Metadata(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.proj.weight.dtype)
        scale = self.proj.weight.shape[0] * self.proj.weight.size(1)
        return self.proj(x.to(self.proj.weight.device)) / scale


class Computed(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self, "ta" + "ble"))


class Property(Base):
    @property
    def w(self) -> Tensor:
        return self.proj.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


class Ternary(Base):
    def forward(self, x: Tensor) -> Tensor:
        proj = self.proj if self.training else self.other
        return F.linear(x, proj.weight)


class Pair(Base):
    def forward(self, x: Tensor) -> Tensor:
        first, second = self.other, self.proj
        return F.linear(x, first(x) * second.weight)


class Walrus(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, w.weight) if (w := self.proj) is not None else x


class LiteralLoop(Base):
    def forward(self, x: Tensor) -> Any:
        return sum(F.linear(x, part.weight) for part in (self.proj, self.other))


class Named(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self, "proj").weight)  # noqa: B009


class Submodule(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.get_submodule("proj").weight)


class Table(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._modules["proj"].weight)


class Asks(Base):
    """As T5's feed-forward does."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.proj.weight, Tensor) and self.proj.weight.dtype != torch.int8:
            x = x.to(self.proj.weight.dtype)
        return self.proj(x) if self.proj.weight is not None else x


PROJ = ("proj", "weight")
READERS = {
    "property": (Property, PROJ),
    "ternary": (Ternary, PROJ),
    "pair": (Pair, PROJ),
    "walrus": (Walrus, PROJ),
    "literal-loop": (LiteralLoop, PROJ),
    "getattr": (Named, PROJ),
    "get-submodule": (Submodule, PROJ),
    "module-table": (Table, PROJ),
    "direct": (Direct, PROJ),
    "positional-only": (PositionalOnly, PROJ),
    "alias": (Alias, PROJ),
    "in-method": (InMethod, PROJ),
    "inherited": (Inherited, PROJ),
    "in-loop": (InLoop, ("items", "2", "weight")),
    "in-comprehension": (InComprehension, ("items", "0", "weight")),
    "enumerated": (Enumerated, ("items", "0", "weight")),
    "zipped": (Zipped, ("items", "0", "weight")),
    "nested": (Nested, ("items", "0", "weight")),
    "from-dict": (FromDict, ("items", "a", "weight")),
    "indexed": (Indexed, ("items", "1", "weight")),
}


@pytest.mark.parametrize(("cls", "path"), READERS.values(), ids=READERS.keys())
def test_reads_of_a_child(cls: type[nn.Module], path: tuple[str, ...]) -> None:
    assert forward_in_source(cls).reads(path)
    assert forward_in_source(cls).complete


@pytest.mark.parametrize("cls", [Calls, Metadata, Asks])
def test_calling_a_child_or_asking_for_its_shape_is_not_reading(cls) -> None:
    assert not forward_in_source(cls).reads(PROJ)
    assert not forward_in_source(cls).reads(("items", "0", "weight"))


def test_another_index_is_not_read() -> None:
    assert not forward_in_source(Indexed).reads(("items", "0", "weight"))


def test_computed_names_make_the_answer_incomplete() -> None:
    assert not forward_in_source(Computed).complete


def test_encoders_call_their_layers() -> None:
    """They look at the weights of the layers, to choose a path."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 4, batch_first=True), 1)
    assert not forward_of(type(encoder), encoder).reads(("layers", "0", "linear1", "weight"))


class FromBefore(Base):
    """Uses in a round what the round before it has named."""

    def forward(self, x: Tensor) -> Tensor:
        last = None
        for item in self.items:
            if last is not None:
                x = F.linear(x, last)
            last = item.weight
        return x


class OnlyNamed(Base):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.proj.weight
        return self.proj(x.to(weight.dtype)).view(len(weight), -1)


def test_the_uses_of_a_local_name_count() -> None:
    assert forward_in_source(FromBefore).reads(("items", "0", "weight"))
    assert not forward_in_source(OnlyNamed).reads(PROJ)


READ_SITES = {
    "direct": (Direct, "proj"),
    "alias": (Alias, "proj"),
    "in-method": (InMethod, "proj"),
    "inherited": (Inherited, "proj"),
    "in-loop": (InLoop, "items.*"),
    "in-comprehension": (InComprehension, "items.*"),
    "enumerated": (Enumerated, "items.*"),
    "zipped": (Zipped, "items.*"),
    "nested": (Nested, "items.*"),
    "from-dict": (FromDict, "items.?"),
    "indexed": (Indexed, "items.1"),
}


@pytest.mark.parametrize(("cls", "targets"), READ_SITES.values(), ids=READ_SITES.keys())
def test_the_parent_draws(cls: type[nn.Module], targets: str, keys) -> None:
    module = cls().double()
    plain = copy.deepcopy(module)
    apply_dropconnect(module, targets, p=0.5)
    x = torch.randn(2, 4, dtype=torch.float64)
    output = module(x)
    sites = list(dropconnect_sites(module))
    assert {site.drawn_by for site in sites} == {("",)}
    for key, site in zip(keys, sites, strict=True):
        weight = plain.get_parameter(site.name)
        weight.data = masked(weight.data, keep(key, 0.5, 4, 4), 0.5)
    assert torch.equal(output, plain(x))


@pytest.mark.parametrize("cls", [Calls, Metadata])
def test_the_child_draws(cls, keys) -> None:
    module = apply_dropconnect(cls(), "proj", p=0.5)
    module(torch.randn(2, 4))
    assert len(keys) == 1
    assert [site.drawn_by for site in dropconnect_sites(module)] == [()]


class ReadsAndCalls(Base):
    """Uses one weight twice in one forward: multiplied by, and called."""

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) + F.linear(x, self.proj.weight)


def test_a_weight_that_is_read_and_called_has_one_mask(keys) -> None:
    module = apply_dropconnect(ReadsAndCalls(), "proj", p=0.5)
    x = torch.eye(4)
    output = module(x) - module.proj.bias
    assert len(keys) == 1
    used = masked(module.proj.weight, keep(keys[0], 0.5, 4, 4), 0.5)
    torch.testing.assert_close(output, 2 * used.t(), rtol=1e-5, atol=1e-6)


class Grand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Sequential(Base())
        self.other = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.deep[0].proj.weight)


def test_a_grandparent_draws(keys) -> None:
    module = apply_dropconnect(Grand(), "deep.0.proj", p=0.5)
    x = torch.randn(2, 4)
    output = module(x)
    used = masked(module.deep[0].proj.weight, keep(keys[0], 0.5, 4, 4), 0.5)
    assert torch.equal(output, F.linear(x, used))


def test_a_replaced_child_module_of_a_drawing_parent() -> None:
    """Dropping only what the child is called with: the attention's heads stay as they are."""
    module = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
        2,
        enable_nested_tensor=False,
    )
    apply_dropconnect(module, "*linear?", p=0.5)
    assert {site.drawn_by for site in dropconnect_sites(module)} == {
        ("layers.0",),
        ("layers.1",),
    }


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "padded"])
@pytest.mark.parametrize("targets", ["all-linear", nn.MultiheadAttention, "*"], ids=str)
def test_encoder_fast_path_in_eval_is_the_plain_model(targets, nested: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    plain = copy.deepcopy(encoder)
    apply_dropconnect(encoder, targets, p=0.5)
    x = torch.randn(3, 4, 8)
    padding = torch.tensor([[False, False, True, True]] * 3)
    for mask in (None, padding):
        with torch.no_grad():
            expected = plain(x, src_key_padding_mask=mask)
            assert torch.equal(encoder(x, src_key_padding_mask=mask), expected)


def test_encoder_fast_path_with_sampling_drops(keys) -> None:
    """The fast kernel reads the children's weights itself, and must get the masked ones."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True).eval()
    plain = copy.deepcopy(layer)
    targets = [nn.MultiheadAttention, "linear*"]
    apply_dropconnect(layer, targets, p=0.5, inference="sample")
    x = torch.randn(3, 4, 8)
    with torch.no_grad():
        output = layer(x)
        for key, site in zip(keys, dropconnect_sites(layer), strict=True):
            weight = plain.get_parameter(site.name)
            weight.data = masked(weight.data, keep(key, 0.5, *weight.shape), 0.5)
        assert torch.equal(output, plain(x))


def traced(module: nn.Module) -> torch.fx.GraphModule:
    return torch.fx.symbolic_trace(module)


def test_traced_graph_that_calls_the_child(keys) -> None:
    graph = apply_dropconnect(traced(nn.Sequential(nn.Linear(4, 4))), "0", p=0.5)
    graph(torch.randn(2, 4))
    assert len(keys) == 1


def test_traced_graph_that_reads_the_child(keys) -> None:
    """Tracing leaves a bare module that holds the parameters; the graph reads them."""
    graph = apply_dropconnect(traced(Direct()), "proj.weight", p=0.5)
    assert [site.drawn_by for site in dropconnect_sites(graph)] == [("",)]
    x = torch.randn(2, 4)
    output = graph(x)
    used = masked(graph.proj.weight_raw, keep(keys[0], 0.5, 4, 4), 0.5)
    assert torch.equal(output, F.linear(x, used, graph.proj.bias))


def test_mamba_projection_is_drawn_by_the_mixer(keys, tiny) -> None:
    model = tiny("mamba", num_hidden_layers=1).train()
    plain = copy.deepcopy(model)
    apply_dropconnect(model, "*.dt_proj", p=0.5)
    (site,) = dropconnect_sites(model)
    assert site.drawn_by == ("backbone.layers.0.mixer",)
    ids = torch.randint(0, 12, (2, 5))
    output = model(ids, use_cache=False).logits
    (key,) = keys
    weight = plain.get_parameter(site.name)
    weight.data = masked(weight.data, keep(key, 0.5, *weight.shape), 0.5)
    assert torch.equal(output, plain(ids, use_cache=False).logits)
