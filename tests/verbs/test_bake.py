"""One mask made permanent: the formula to the bit, plain afterwards, whole or not at all."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    NotOperatedError,
    SurgeryError,
    apply_dropconnect,
    bake_dropconnect,
    dropconnect_sites,
    hold_masks,
    set_p,
)
from surgery.verbs.bake import baked_key

from ..checkpoints.raw import Net
from ..expected import keep, masked
from ..helpers import Snapshot

TARGETS = [nn.Embedding, nn.LSTM, nn.Linear]


def trained(**options) -> tuple[Net, dict[str, Tensor], dict[str, Tensor]]:
    """An operated model, its weights, and what they were at surgery, by plain name."""
    torch.manual_seed(0)
    model = Net()
    anchors = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = [name for name, _ in model.named_parameters()]
    apply_dropconnect(model, TARGETS, **{"p": 0.25, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    weights = {n: p.detach().clone() for n, p in zip(names, model.parameters())}
    return model, weights, anchors


@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_every_weight_is_the_formula(toward: str) -> None:
    model, weights, anchors = trained(toward=toward)
    own = [id(parameter) for parameter in model.parameters()]
    sites = [site.name for site in dropconnect_sites(model)]
    assert bake_dropconnect(model, seed=5) is model
    assert [id(parameter) for parameter in model.parameters()] == own
    assert model.head.weight is model.embed.weight
    for name, baked in model.named_parameters():
        weight = weights[name]
        if name not in sites:
            assert torch.equal(baked, weight)
            continue
        mask = keep(baked_key(5, name), 0.25, *weight.shape)
        anchor = anchors[name] if toward == "pretrained" else None
        assert torch.equal(baked, masked(weight, mask, 0.25, anchor)), name
        assert 0 < int(mask.sum()) < mask.numel()
    assert type(model.fc) is nn.Linear
    model(torch.arange(7)[None])


@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_the_mean_over_seeds_is_the_weight(toward: str) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(6, 6)
    anchor = layer.weight.detach().clone() if toward == "pretrained" else torch.zeros(6, 6)
    apply_dropconnect(layer, nn.Linear, p=0.4, toward=toward)
    with torch.no_grad():
        layer.weight_raw.add_(torch.randn(6, 6))
    weight = layer.weight_raw.detach().clone()
    count = 200
    draws = torch.stack([bake_dropconnect(copy.deepcopy(layer), n).weight for n in range(count)])
    error = (weight - anchor).abs() * (0.4 / 0.6 / count) ** 0.5
    z = (draws.mean(0) - weight) / error
    assert z.abs().max() < 4.5
    assert 0.6 < z.std() < 1.4  # it is an error of this size, and not of another


def test_seeds_and_generators() -> None:
    def baked(**how) -> Tensor:
        torch.manual_seed(3)
        return bake_dropconnect(trained()[0], **how).fc.weight

    torch.manual_seed(3)
    assert torch.equal(baked(seed=1), baked(seed=1))
    assert not torch.equal(baked(seed=1), baked(seed=2))
    first = torch.Generator().manual_seed(4)
    second = torch.Generator().manual_seed(4)
    assert torch.equal(baked(generator=first), baked(generator=second))
    assert not torch.equal(baked(generator=first), baked(generator=torch.Generator()))
    model = trained()[0]
    torch.manual_seed(9)
    one = bake_dropconnect(copy.deepcopy(model)).fc.weight
    two = bake_dropconnect(copy.deepcopy(model)).fc.weight
    torch.manual_seed(9)
    assert torch.equal(bake_dropconnect(model).fc.weight, one)
    assert not torch.equal(one, two)
    with pytest.raises(ValueError, match="a seed or a generator, not both"):
        bake_dropconnect(trained()[0], 1, generator=first)


def test_the_mask_depends_on_the_name_and_not_on_the_order() -> None:
    one, two = trained()[0], trained()[0]
    set_p(two, 0.0, [nn.LSTM, nn.Embedding])  # nothing is drawn for these
    bake_dropconnect(one, 8)
    bake_dropconnect(two, 8)
    assert torch.equal(one.fc.weight, two.fc.weight)
    assert not torch.equal(one.embed.weight, two.embed.weight)


@pytest.mark.parametrize("unit", ["input", "output", "tensor"])
def test_units_and_biases_share_entries(unit: str) -> None:
    layer = apply_dropconnect(nn.Linear(8, 8), nn.Linear, p=0.5, unit=unit, bias=True)
    for seed in range(20):
        one = bake_dropconnect(copy.deepcopy(layer), seed)
        kept = one.weight != 0
        if unit == "input":
            assert torch.equal(kept, kept[:1].expand_as(kept))
        else:
            assert torch.equal(kept, kept[:, :1].expand_as(kept))
            assert torch.equal(one.bias != 0, kept[:, 0])
        if unit == "tensor":
            assert kept.all() or not kept.any()


def test_the_p_of_the_moment_counts() -> None:
    model, weights, _ = trained()
    set_p(model, 1.0, "fc")
    set_p(model, 0.0, "lstm")
    bake_dropconnect(model, 0)
    assert not model.fc.weight.any()
    assert torch.equal(model.lstm.weight_hh_l0, weights["lstm.weight_hh_l0"])


def test_held_masks_do_not_count() -> None:
    model = trained()[0]
    expected = bake_dropconnect(copy.deepcopy(model), 1)
    with hold_masks(model):
        bake_dropconnect(model, 1)
    assert torch.equal(model.fc.weight, expected.fc.weight)


def test_graphs() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(nn.functional.linear(x, self.w))

    graph = torch.fx.symbolic_trace(Functional())
    code = graph.code
    apply_dropconnect(graph, "w", p=0.5)
    bake_dropconnect(graph, 2)
    assert graph.code == code
    mask = keep(baked_key(2, "w"), 0.5, 4, 4)
    assert torch.equal(graph.w, 2.0 * mask.float())


def test_what_cannot_be_baked_is_refused_and_left_alone() -> None:
    with pytest.raises(NotOperatedError, match="no DropConnect in place to bake"):
        bake_dropconnect(nn.Linear(2, 2))
    model = apply_dropconnect(nn.Linear(4, 4), nn.Linear, sampling="gaussian")
    before = Snapshot(model)
    with pytest.raises(SurgeryError, match="draws noise, which has no mask to bake"):
        bake_dropconnect(model, 0)
    assert Snapshot(model) == before
    inner = trained()[0]
    inner.fc.__class__ = type("Changed", (type(inner.fc),), {})
    before = Snapshot(inner)
    with pytest.raises(SurgeryError, match="its class was changed to Changed"):
        bake_dropconnect(inner, 0)
    assert Snapshot(inner) == before


@pytest.mark.parametrize(
    "seed", [torch.Generator(), "1", 1.0, True], ids=lambda seed: type(seed).__name__
)
def test_a_seed_is_an_integer(seed) -> None:
    model = apply_dropconnect(nn.Sequential(nn.Linear(3, 3)), "0", p=0.5)
    before = Snapshot(model)
    with pytest.raises(TypeError, match="seed must be an integer"):
        bake_dropconnect(model, seed)
    assert Snapshot(model) == before


def test_in_inference_mode() -> None:
    """What surgery makes there (anchors, baked weights) can be trained afterwards."""
    baked, mixed = (nn.Sequential(nn.Linear(3, 3)) for _ in range(2))
    apply_dropconnect(baked, "0", p=0.5)
    with torch.inference_mode():
        bake_dropconnect(baked, 1)
        apply_dropconnect(mixed, "0", p=0.5, toward="pretrained")
    for model in (baked, mixed):
        model(torch.randn(2, 3)).sum().backward()
        model.load_state_dict(model.state_dict())
        assert not any(tensor.is_inference() for tensor in model.state_dict().values())
