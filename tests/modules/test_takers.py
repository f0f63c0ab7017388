"""Quantisation, pruning and norms of an operated model: noticed at once, by name, with nothing done."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.ao.quantization as quantization
import torch.nn.utils.prune as prune
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import prepare_fx
from torch.nn.utils import parametrizations, parametrize

from surgery import SurgeryError, apply_dropconnect, set_p, strip_dropconnect

from ..helpers import Snapshot

pytestmark = pytest.mark.filterwarnings("ignore")  # all of this is deprecated


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.t()


class Packed(Tensor):
    """As torchao's: the values are in other tensors."""

    @staticmethod
    def __new__(cls, values: Tensor) -> Packed:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values: Tensor) -> None:
        self.values_ = values

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values_"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[override]
        return Packed(args[0].values_)


def static(model: nn.Module) -> None:
    model.qconfig = quantization.get_default_qconfig("x86")
    try:
        quantization.prepare(model.eval())
    finally:
        del model.qconfig
        model.train()


def training_aware(model: nn.Module) -> None:
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    try:
        quantization.prepare_qat(model)
    finally:
        del model.qconfig


def by_graph(model: nn.Module) -> None:
    try:
        prepare_fx(
            model.eval(), quantization.get_default_qconfig_mapping("x86"), (torch.randn(3, 4),)
        )
    finally:
        model.train()


def replace(value: Callable[[], Tensor]) -> Callable[[nn.Module], None]:
    def put(model: nn.Module) -> None:
        model[0].weight = nn.Parameter(value(), requires_grad=False)

    return put


TAKERS: dict[str, Callable[[nn.Module], object]] = {
    "dynamic": lambda model: quantization.quantize_dynamic(model, {nn.Linear}),
    "static": static,
    "qat": training_aware,
    "fx": by_graph,
    "integers": replace(lambda: torch.zeros(4, 4, dtype=torch.int8)),
    "packed": replace(lambda: Packed(torch.zeros(4, 4))),
    "prune": lambda model: prune.l1_unstructured(model[0], "weight", 0.3),
    "prune-structured": lambda model: prune.ln_structured(model[0], "weight", 0.3, 2, 0),
    "prune-all": lambda model: prune.global_unstructured(
        [(model[0], "weight")], prune.L1Unstructured, amount=0.2
    ),
    "weight-norm": lambda model: nn.utils.weight_norm(model[0]),
    "new-weight-norm": lambda model: parametrizations.weight_norm(model[0]),
    "new-spectral-norm": lambda model: parametrizations.spectral_norm(model[0]),
    "orthogonal": lambda model: parametrizations.orthogonal(model[0]),
    "parametrize": lambda model: parametrize.register_parametrization(
        model[0], "weight", Symmetric()
    ),
}


@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS.keys())
def test_refused_by_name_with_nothing_done(take: Callable[[nn.Module], object]) -> None:
    several = ({}, {"sampling": "example"}, {"toward": "pretrained"})
    for options in several[:1] if take is by_graph else several:
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        plain = Snapshot(model)
        apply_dropconnect(model, nn.Linear, p=0.5, **options)
        before = Snapshot(model[0])
        sentence = r"0\.weight: DropConnect is in place.*call strip_dropconnect first"
        with pytest.raises(SurgeryError, match=sentence):
            take(model)
        assert Snapshot(model[0]) == before
        model(torch.randn(3, 4)).sum().backward()
        model.zero_grad()
        strip_dropconnect(model)
        model.__dict__.pop("qconfig", None)
        assert Snapshot(model) == plain


def test_a_raw_weight_that_was_pruned_is_noticed_by_strip() -> None:
    model = apply_dropconnect(nn.Linear(4, 4), nn.Linear, p=0.5)
    prune.l1_unstructured(model, "weight_raw", 0.3)
    set_p(model, 0.2)
    model(torch.randn(3, 4)).sum().backward()
    with pytest.raises(SurgeryError, match=r"weight: 'weight_raw' is computed.*prune\.remove"):
        strip_dropconnect(model)
    prune.remove(model, "weight_raw")
    strip_dropconnect(model)
    assert int((model.weight == 0).sum()) == 5


def test_what_was_there_before_stays() -> None:
    """A qconfig that a module has, and parametrizations of its other parameters."""
    model = nn.Linear(4, 4)
    model.qconfig = kept = quantization.get_default_qconfig("x86")
    apply_dropconnect(model, nn.Linear, p=0.5)
    assert model.qconfig is kept
    assert not parametrize.is_parametrized(model)
    parametrize.register_parametrization(model, "bias", nn.Identity())
    assert parametrize.is_parametrized(model, "bias")
    model(torch.randn(3, 4)).sum().backward()
    parametrize.remove_parametrizations(model, "bias")
    strip_dropconnect(model)
    assert model.qconfig is kept
