"""`inference="moments"` in transformers: the MLPs of tiny models, against one written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import apply_dropconnect, mc_predict, set_inference, strip_dropconnect
from surgery.travel import Travelling

from ..zoo.tiny import tiny

pytest.importorskip("transformers")
P = 0.3


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 99, (3, 5))}


def moments(site: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of a pre-activation; what comes in varies as well, if sites lie before."""
    mean, variance = x, torch.zeros_like(x)
    if isinstance(x, Travelling):
        mean, variance = x.state().mean, x.state().variance
    weight = site.weight if isinstance(site, nn.Linear) else site.weight.t()
    second = variance + P / (1 - P) * (mean**2 + variance)
    return F.linear(mean, weight, site.bias), F.linear(second, weight**2)


def integral(f: Callable[[Tensor], Tensor], mean: Tensor, variance: Tensor) -> Tensor:
    z = torch.linspace(-9, 9, 4001, dtype=mean.dtype)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    return (f(mean[..., None] + variance.sqrt()[..., None] * z) * density).sum(-1)


def gelu_new(u: Tensor) -> Tensor:
    return 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


def gated(mlp: Any, x: Tensor) -> Tensor:
    up = moments(mlp.up_proj, x)[0]
    return integral(F.silu, *moments(mlp.gate_proj, x)) * up


@dataclass(frozen=True)
class Case:
    model: str
    inputs: Callable[[], dict[str, Tensor]]
    targets: list[str]
    reads: str
    """The module whose input is what the activation makes of the sites."""
    mlp: str
    """The module whose input is that of the sites."""
    by_hand: Callable[[Any, Tensor], Tensor]


CASES = {
    "bert": Case(
        "bert", tokens, ["*intermediate.dense"], "bert.encoder.layer.1.output.dense",
        "bert.encoder.layer.1.intermediate.dense",
        lambda site, x: integral(F.gelu, *moments(site, x)),
    ),
    "llama": Case(
        "llama", tokens, ["*gate_proj", "*up_proj"], "model.layers.1.mlp.down_proj",
        "model.layers.1.mlp", gated,
    ),
    "gpt2": Case(
        "gpt2", tokens, ["*c_fc"], "transformer.h.1.mlp.c_proj", "transformer.h.1.mlp.c_fc",
        lambda site, x: integral(gelu_new, *moments(site, x)),
    ),
    "t5": Case(
        "t5", lambda: {**tokens(), "labels": torch.randint(0, 99, (3, 4))}, ["*DenseReluDense.wi"],
        "decoder.block.1.layer.2.DenseReluDense.wo", "decoder.block.1.layer.2.DenseReluDense.wi",
        lambda site, x: integral(torch.relu, *moments(site, x)),
    ),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def build(case: Case, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = tiny(case.model).double().eval()
    with torch.no_grad():
        for weight in model.parameters():  # initial weights of transformers hide every effect
            weight.mul_(4)
    return apply_dropconnect(model, case.targets, p=P, inference="moments", **options)


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found = model(**inputs)
    assert all(not isinstance(value, Tensor) or type(value) is Tensor for value in found.values())
    return found.logits


@every_case
def test_one_mlp_by_hand(case: Case) -> None:
    model, seen = build(case), {}
    for name in (case.mlp, case.reads):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
    logits(model, case.inputs())
    with torch.no_grad():
        wanted = case.by_hand(model.get_submodule(case.mlp), seen[case.mlp])
    found = seen[case.reads]
    assert isinstance(found, Travelling)
    gap = (found.expectation() - wanted).square().mean().sqrt()
    assert gap < 0.01 * wanted.std()


@every_case
def test_deterministic_plain_outputs(case: Case) -> None:
    model, inputs = build(case), case.inputs()
    found = logits(model, inputs)
    assert torch.equal(found, logits(model, inputs))
    assert found.isfinite().all()
    with set_inference(model, "mean"):
        plain = logits(model, inputs)
    assert not torch.allclose(found, plain)
    strip_dropconnect(model)
    assert torch.equal(logits(model, inputs), plain)


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "gpt2", "t5"])
def test_every_linear_layer_at_once(name: str) -> None:
    """Attention sees means; hidden states and attentions are tensors too."""
    model = apply_dropconnect(tiny(name).eval(), "all-linear", p=P, inference="moments")
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)} if name == "vit" else tokens()
    if name == "t5":
        inputs["labels"] = torch.randint(0, 99, (3, 4))
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True, return_dict=True)
        as_tuple = model(**inputs, return_dict=False)
    states = outputs.get("hidden_states") or outputs["decoder_hidden_states"]
    assert {type(state) for state in states} == {Tensor}
    assert torch.equal(as_tuple[1 if name == "t5" else 0], outputs.logits)
    assert outputs.logits.isfinite().all()


def test_generation_and_uncertainty() -> None:
    model = build(CASES["llama"])
    prompt = torch.randint(0, 99, (2, 4))
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    first, second = (model.generate(prompt, **options) for _ in range(2))
    assert first.shape == (2, 7)
    assert torch.equal(first, second)
    found = mc_predict(model, {"input_ids": prompt}, samples=4, seed=1)
    assert found.entropy.shape == (2, 4)
    assert found.variance.max() > 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_compiled() -> None:
    torch._dynamo.reset()
    model, inputs = build(CASES["bert"]), tokens()
    compiled: Any = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, inputs), logits(model, inputs))
