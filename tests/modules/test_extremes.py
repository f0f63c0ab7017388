"""Infinities, NaN, subnormal numbers and p at its ends, in every kind of module.

Eager, it is the plain module with weights that are masked by the formula, to the bit; compiled, it is
what it is in eager code.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from transformers.pytorch_utils import Conv1D

from surgery import SurgeryError, apply_dropconnect, set_p, strip_dropconnect
from surgery.modules.places import places
from surgery.ops import key_from_seed
from surgery.spec.plan import join

from ..expected import keep, masked
from ..helpers import bits
from ..internals import note_keys
from ..zoo.kinds import CASES, Case, rand, tokens

SPECIAL = (math.inf, -math.inf, math.nan, -0.0, 1e-39, 1e-45)
"""The last two are subnormal in float32."""
RATES = (1e-12, 0.5, 0.999, 1 - 1e-12)
ALL = {
    **CASES,
    "conv1d-of-transformers": Case(lambda: Conv1D(4, 6), rand(3, 6), ("weight",)),
    "embedding-bag": Case(lambda: nn.EmbeddingBag(9, 5), tokens, ("weight",)),
}

every_kind = pytest.mark.parametrize("case", ALL.values(), ids=ALL.keys())

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]
"""What torch says of itself."""


def spoil(tensor: Tensor, rng: Random) -> None:
    """Two of the entries become special, the second no finite number."""
    flat = tensor.detach().view(-1)
    for values in (SPECIAL, SPECIAL[:3]):
        flat[rng.randrange(len(flat))] = rng.choice(values)


def inputs_of(case: Case, rng: Random) -> tuple[Any, ...]:
    """Of float32, some of them with special entries."""
    torch.manual_seed(rng.randrange(99))
    found = tuple(map(_single, case.inputs()))
    if rng.random() < 0.5:
        chosen = next(_floats(found), None)
        if chosen is not None:
            spoil(chosen, rng)
    return found


def _single(x: Any) -> Any:
    if isinstance(x, tuple) and not isinstance(x, PackedSequence):
        return tuple(map(_single, x))
    is_float = isinstance(x, PackedSequence) or x.is_floating_point()
    return x.float() if is_float else x


def _floats(output: Any) -> Iterator[Tensor]:
    """The tensors of floats in an input or in an output."""
    if isinstance(output, (tuple, PackedSequence)):
        for part in output:
            yield from _floats(part)
    elif isinstance(output, Tensor) and output.is_floating_point():
        yield output


def step(module: nn.Module, run: Callable[..., Any], inputs: Any, seed: int = 7) -> list[Tensor]:
    """Outputs, and the gradients of all parameters."""
    module.zero_grad()
    torch.manual_seed(seed)
    outputs = list(_floats(run(*inputs)))
    torch.manual_seed(seed + 1)
    torch.autograd.backward(outputs, [torch.randn_like(one) for one in outputs])
    parameters = list(module.parameters())
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    return [*(one.detach() for one in outputs), *grads]


def operated(case: Case, rng: Random, **how: Any) -> nn.Module:
    """With special numbers in weights and anchors."""
    module = case.build().float()
    for name in case.weights:
        spoil(module.get_parameter(name), rng)
    apply_dropconnect(module, case.target_of(module), **how)
    for place in places(module):
        if place.anchor is not None:  # the weights have left them
            with torch.no_grad():
                place.raw.mul_(1.25)
            spoil(place.raw, rng)
    return module


def by_formula(module: nn.Module, inputs: Any, keys: list[Tensor]) -> list[Tensor]:
    """The same of the plain module whose weights are masked beforehand, with masked gradients."""
    plain = strip_dropconnect(copy.deepcopy(module))
    # Where nothing drops or all, no key is drawn, and any will do.
    drawn = keys or [key_from_seed(0)] * len(list(places(module)))
    masks = []
    for place, key in zip(places(module), drawn, strict=True):
        view, p = place.state.layout.view, place.state.rate
        p = 1.0 if p > 1 - 2**-33 else p  # what it is rounded to
        weight = plain.get_parameter(join(place.name, place.state.name))
        mask = keep(key, p, *place.state.layout.mask)
        anchor = None if place.anchor is None else place.anchor.view(view)
        weight.data = masked(weight.data.view(view), mask, p, anchor).view(weight.shape)
        masks.append((weight, mask, p, view))
    found = step(plain, plain, inputs)
    names = {id(p): index for index, p in enumerate(plain.parameters())}
    first = len(found) - len(names)
    for weight, mask, p, view in masks:
        at = first + names[id(weight)]
        found[at] = masked(found[at].view(view), mask, p).view(weight.shape)
    return found


HOW = ({}, {"toward": "pretrained"}, pytest.param({"unit": "input"}, marks=pytest.mark.slow))


@every_kind
@pytest.mark.parametrize("how", HOW, ids=str)
def test_eager_it_is_the_plain_module_with_masked_weights(
    case: Case, how: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    rng, finite = Random(request.node.name), set()
    for p in RATES:
        try:
            module = operated(case, rng, p=p, **how)
        except SurgeryError:
            pytest.skip(f"not for {how}")
        inputs, keys = inputs_of(case, rng), list[Tensor]()
        with pytest.MonkeyPatch.context() as patch:
            note_keys(patch, lambda site, key, keys=keys: keys.append(key))
            found = step(module, module, inputs)
        expected = by_formula(module, inputs, keys)
        again = step(module, module, inputs)  # by the extension, where there is one for it
        for one, other, wanted in zip(found, again, expected, strict=True):
            assert torch.equal(bits(one), bits(wanted))
            assert torch.equal(bits(other), bits(wanted))
            finite |= set(one.isfinite().flatten().tolist())
    assert finite == {True, False}


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize("sampling", ["batch", "example"])
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.compiler)]
)
@torch._inductor.config.patch(fallback_random=True)
def test_compiled_it_is_the_eager_one(
    backend: str, sampling: str, case: Case, request: pytest.FixtureRequest
) -> None:
    """To the bit; from inductor, which multiplies and adds in another order, up to rounding."""
    torch._dynamo.reset()
    rng = Random(request.node.name)
    try:
        module = operated(case, rng, p=0.5, sampling=sampling)
    except SurgeryError:
        pytest.skip(f"no sampling by {sampling}")
    run = torch.compile(module, backend=backend)
    for p in RATES * 2:
        set_p(module, p)
        with torch.no_grad():
            for place in places(module):
                place.raw.normal_()
                spoil(place.raw, rng)
        inputs = inputs_of(case, rng)
        found, expected = step(module, run, inputs), step(module, module, inputs)
        for one, wanted in zip(found, expected, strict=True):
            if backend == "aot_eager":
                assert torch.equal(bits(one), bits(wanted))
            else:
                torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
