"""Law 1: what cannot be done is refused with site, rule and fix, and the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from surgery import (
    NoMatchError,
    SurgeryError,
    apply_dropconnect,
    plan_dropconnect,
    strip_dropconnect,
)

from ..helpers import Snapshot


class Unread(nn.Module):
    """A parameter that no forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 3))
        self.used = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.used


class Multiplies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.experts[0]


class Wrapped(nn.Parameter):
    """Stands for a sharded or quantised parameter class."""


def replaced_forward() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.forward = lambda x: F.linear(x, layer.weight)  # type: ignore[assignment]
    return layer


def operated() -> nn.Module:
    return apply_dropconnect(nn.Linear(3, 3), nn.Linear)


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.5)


def of_layout(convert: Callable[[Tensor], Tensor]) -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(convert(layer.weight.detach()))
    return layer


def managed() -> nn.Module:
    """Marked as FSDP marks what it wraps."""
    layer = nn.Linear(3, 3)
    layer._is_fsdp_managed_module = True  # type: ignore[assignment]
    return layer


def integer() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    return layer


def special() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.weight = Wrapped(layer.weight.data)
    return layer


def partitioned() -> nn.Module:
    """As DeepSpeed's ZeRO-3 leaves a parameter between forwards: marked, and empty."""
    layer = nn.Linear(3, 3)
    layer.weight.ds_id = 0  # type: ignore[attr-defined]
    layer.weight.data = torch.empty(0)
    return layer


def taken() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.weight_raw = 1  # type: ignore[assignment]
    return layer


def frozen() -> nn.Module:
    return nn.Linear(3, 3).requires_grad_(False)


def tied() -> nn.Module:
    model = nn.ModuleDict({"site": nn.Linear(3, 3), "twin": nn.Linear(3, 3)})
    model["twin"].weight = model["site"].weight
    return model


@dataclass(frozen=True)
class Refusal:
    """A part that is refused, and the words that the message must hold besides the site."""

    make: Callable[[], nn.Module]
    rule: str
    fix: str
    targets: Any = "*site*"
    options: dict[str, Any] = field(default_factory=dict)
    site: str = "site.weight"


PRETRAINED = {"toward": "pretrained"}
REFUSALS = {
    "twice": Refusal(operated, "already in place", "strip_dropconnect first, or exclude it"),
    "replaced-forward": Refusal(replaced_forward, "replaced on the instance", "apply before"),
    "lazy": Refusal(lambda: nn.LazyLinear(3), "has no shape yet", "run the model once"),
    "subclass": Refusal(special, "the weight is a Wrapped", "apply before fully_shard"),
    "zero-3": Refusal(partitioned, "DeepSpeed ZeRO-3 holds", "apply before deepspeed.initialize"),
    "integer": Refusal(integer, "torch.int8", "only floating-point"),
    "taken": Refusal(taken, "'weight_raw'", "rename that first"),
    "frozen": Refusal(frozen, "it is frozen", "exclude it or unfreeze it", options=PRETRAINED),
    "meta": Refusal(
        lambda: nn.Linear(3, 3, device="meta"),
        "no value yet",
        "load the weights",
        options=PRETRAINED,
    ),
    "max-norm": Refusal(lambda: nn.Embedding(3, 3, max_norm=1.0), "max_norm", "without max_norm"),
    "sparse": Refusal(lambda: nn.Embedding(3, 3, sparse=True), "sparse", "sparse=False"),
    "bag-max-norm": Refusal(
        lambda: nn.EmbeddingBag(3, 3, max_norm=1.0), "max_norm", "without max_norm"
    ),
    "unit": Refusal(
        Multiplies,
        "unit='input' has no meaning",
        '"element" or "tensor"',
        targets="site.experts",
        options={"unit": "input"},
        site="site.experts",
    ),
    "unread": Refusal(
        Unread,
        "neither Unread.forward nor a parent's",
        "name the module that uses it",
        targets="site.table",
        site="site.table",
    ),
    "parametrized": Refusal(
        lambda: parametrizations.weight_norm(nn.Linear(3, 3)), "is parametrized", "remove_param"
    ),
    "pruned": Refusal(pruned, "computed from 'weight_orig'", "prune.remove(module, 'weight')"),
    "pruned-by-name": Refusal(
        pruned,
        "'weight' is computed from it",
        "prune.remove(module, 'weight')",
        targets="site.weight_orig",
        site="site.weight_orig",
    ),
    "parametrized-by-name": Refusal(
        lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
        "is computed from it",
        "remove_parametrizations",
        targets="site.parametrizations.weight.original1",
        site="site.parametrizations.weight.original1",
    ),
    "fsdp": Refusal(managed, "FSDP holds", "apply before FSDP"),
    "packed-bias": Refusal(
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=3),
        "split one packed bias",
        "use bias=False",
        options={"unit": "output", "bias": True},
        site="site.q_proj_weight",
    ),
    "two-configs": Refusal(
        tied,
        "given different options",
        "give both the same",
        targets={"site.site": 0.1, "site.twin": 0.2},
        site="site.twin.weight",
    ),
}
every_refusal = pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS.keys())


class Whole(nn.Module):
    """A model with good sites before and after the refused one."""

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self.before = nn.Linear(3, 3)
        self.site = site
        self.after = nn.LSTM(3, 3)


@every_refusal
@pytest.mark.parametrize("verb", [apply_dropconnect, plan_dropconnect], ids=["apply", "plan"])
def test_refusal_names_site_rule_and_fix_and_changes_nothing(refusal: Refusal, verb) -> None:
    model = Whole(refusal.make())
    before = Snapshot(model)
    targets = refusal.targets
    everything = targets if isinstance(targets, dict) else ["before", targets, "after"]
    with pytest.raises(SurgeryError) as caught:
        verb(model, everything, p=0.3, **refusal.options)
    message = str(caught.value)
    assert "the model is unchanged" in message
    for part in (refusal.site, refusal.rule, refusal.fix):
        assert part in message
    assert Snapshot(model) == before


def test_all_problems_are_listed_at_once() -> None:
    model = nn.Sequential(*(integer() for _ in range(10)))
    with pytest.raises(SurgeryError) as caught:
        apply_dropconnect(model, nn.Linear)
    message = str(caught.value)
    assert [f"{n}.weight" in message for n in range(10)] == [True] * 8 + [False] * 2
    assert "... and 2 more" in message


@pytest.mark.parametrize("bad", [None, 3, "linear", [nn.Linear(2, 2)]], ids=repr)
def test_not_a_module(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module; got"):
        apply_dropconnect(bad, "*")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"p": 1.5}, ValueError, "p is the probability of dropping and must be in [0, 1]; got 1.5"),
        ({"p": "high"}, TypeError, "got 'high'"),
        ({"unit": "row"}, ValueError, "unit must be one of 'element', 'input'"),
        ({"colour": 1}, TypeError, "colour"),
        ({"targets": {"0": 2.0}}, ValueError, "p in targets"),
        ({"targets": []}, SurgeryError, "targets must be a pattern, a module class"),
        ({"targets": 3}, SurgeryError, "targets must be a pattern, a module class"),
        (
            {"targets": [None]},
            SurgeryError,
            "targets: expected a pattern, a module class or a function",
        ),
        ({"targets": int}, SurgeryError, "int is not a torch.nn.Module class"),
        ({"targets": "re:("}, SurgeryError, "'re:(' is not a regular expression"),
        ({"targets": "0", "exclude": "0"}, NoMatchError, "nothing is left"),
        ({"targets": "0", "exclude": "nine"}, NoMatchError, "exclude: 'nine' matches no module"),
        ({"targets": "1"}, NoMatchError, "none has weights that are dropped by default"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_arguments_change_nothing(arguments, error, words) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    before = Snapshot(model)
    with pytest.raises(error) as caught:
        apply_dropconnect(model, **{"targets": "0", **arguments})
    assert words in str(caught.value)
    assert Snapshot(model) == before


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_scripted_module() -> None:
    scripted = torch.jit.script(nn.Linear(3, 3))
    model = nn.Sequential(nn.Linear(3, 3), scripted)
    with pytest.raises(SurgeryError, match=r"1\.weight .*apply before torch\.jit\.script"):
        apply_dropconnect(model, ["0", "1.weight"])
    assert type(model[0]) is nn.Linear


def test_parametrized_module_works_where_its_parametrization_is_not_touched() -> None:
    """Only the parametrized parameter is refused: its bias is an ordinary one."""
    model = parametrizations.weight_norm(nn.Linear(3, 3))
    plan = plan_dropconnect(model, "bias")
    assert [site.name for site in plan] == ["bias"]
    assert parametrize.is_parametrized(model)


def test_assigning_and_deleting_while_operated() -> None:
    layer = operated()
    with pytest.raises(
        TypeError, match=r"cannot assign Tensor to 'weight': assign a torch\.nn\.Par"
    ):
        layer.weight = torch.zeros(3, 3)
    with pytest.raises(
        AttributeError, match="cannot delete 'weight' while DropConnect is in place"
    ):
        del layer.weight


def test_resized_weight_with_an_anchor() -> None:
    layer = apply_dropconnect(nn.Linear(3, 3), nn.Linear, toward="pretrained")
    layer.weight = nn.Parameter(torch.randn(5, 3))
    with pytest.raises(
        RuntimeError, match=r"'weight' has shape \(5, 3\).*anchor has \(3, 3\).*Strip"
    ):
        layer(torch.randn(1, 3))


def test_strip_refuses_a_class_that_was_changed_since() -> None:
    layer = operated()
    own = type(layer)
    layer.__class__ = type("FSDPLinear", (own,), {})
    with pytest.raises(SurgeryError, match=r"changed to FSDPLinear .*plain_state_dict"):
        strip_dropconnect(layer)
    assert isinstance(layer, own)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize(
    "convert",
    [Tensor.to_sparse, Tensor.to_sparse_csr, Tensor.to_sparse_csc, Tensor.to_mkldnn],
    ids=lambda convert: convert.__name__,
)
def test_layouts_that_are_not_strided(convert: Callable[[Tensor], Tensor]) -> None:
    every: Any = (
        {},
        {"sampling": "gaussian"},
        {"sampling": "example"},
        {"toward": "pretrained"},
    )
    for options in every:
        with pytest.raises(
            SurgeryError, match=r"^weight.*layout torch\..*to_dense|- weight .*layout"
        ):
            apply_dropconnect(of_layout(convert), nn.Linear, p=0.5, **options)


def _drop_by_others(module: nn.Module, name: str) -> nn.Module:
    """What WeightDrop of awd-lstm does to a module."""
    raw = module._parameters.pop(name)
    module.register_parameter(f"{name}_raw", nn.Parameter(raw.data))
    setattr(module, name, raw.data * 2)
    return module


COMPUTED = {
    "prune": (lambda m, n: prune.l1_unstructured(m, n, 0.3), ["orig"], "prune.remove"),
    "weight-norm": (torch.nn.utils.weight_norm, ["g", "v"], "remove_weight_norm"),
    "spectral-norm": (torch.nn.utils.spectral_norm, ["orig"], "remove_spectral_norm"),
    "weight-drop": (_drop_by_others, ["raw"], r"WeightDrop\?"),
}
OWNERS = {
    "lstm": (lambda: nn.LSTM(3, 3, 2), "weight_hh_l0"),
    "gru": (lambda: nn.GRU(3, 3, bidirectional=True), "weight_hh_l0_reverse"),
    "rnn": (lambda: nn.RNN(3, 3), "weight_ih_l0"),
    "lstm-cell": (lambda: nn.LSTMCell(3, 3), "weight_hh"),
    "linear": (lambda: nn.Linear(3, 3), "weight"),
    "conv": (lambda: nn.ConvTranspose2d(3, 3, 2), "weight"),
    "embedding": (lambda: nn.Embedding(3, 3), "weight"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight"),
    "other": (Multiplies, "experts"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("way", COMPUTED)
def test_weights_that_somebody_computes_before_the_forward(way: str) -> None:
    """By the name of the module, and by that of the parameter, on every kind of module."""
    compute, endings, fix = COMPUTED[way]
    for make, name in OWNERS.values():
        model = nn.Sequential(compute(make(), name) or nn.Identity())
        before = Snapshot(model)
        for ending in endings:
            with pytest.raises(SurgeryError, match=f"{name}' is computed from it.*{fix}"):
                apply_dropconnect(model, f"*.{name}_{ending}", p=0.5)
        if "experts" not in name and "ih" not in name:
            with pytest.raises(SurgeryError, match=f"0.{name}: .*computed from .*{fix}"):
                apply_dropconnect(model, "0", p=0.5)
        assert Snapshot(model) == before


def test_an_rnn_with_one_layer_parametrized_is_not_dropped_in_part() -> None:
    for norm in (parametrizations.weight_norm, parametrizations.spectral_norm):
        model = norm(nn.LSTM(3, 3, 2), "weight_hh_l1")
        with pytest.raises(SurgeryError, match=r"weight_hh_l1 is parametrized; .*remove_param"):
            apply_dropconnect(model, "", p=0.5)
        apply_dropconnect(model, "weight_hh_l0", p=0.5)


def test_a_weight_that_is_not_there() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].register_parameter("weight", None)
    before = Snapshot(model)
    with pytest.raises(SurgeryError, match=r"0.weight: Linear has no such parameter .*exclude it"):
        apply_dropconnect(model, "0", p=0.5)
    assert Snapshot(model) == before
