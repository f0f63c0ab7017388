"""Every kind of module: training uses the masked weights, eval the original ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from surgery import apply_dropconnect, dropconnect_sites, set_p, strip_dropconnect
from surgery.spec.plan import join

from ..expected import keep, masked
from ..helpers import plain_parameter, site_names
from ..zoo.kinds import Case, every_case

P = 0.4


def tensors(output: Any) -> list[Tensor]:
    """The tensors in the output of any module."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, (tuple, PackedSequence)):
        return [tensor for part in output for tensor in tensors(part)]
    return []


def loss(output: Any) -> Any:
    return sum(tensor.sin().sum() for tensor in tensors(output) if tensor.is_floating_point())


def equal(a: Any, b: Any) -> bool:
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    return bool(pairs) and all(torch.equal(x, y) for x, y in pairs)


def operated(case: Case, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The operated module, and a plain copy."""
    module = case.build()
    plain = copy.deepcopy(module)
    options = {"p": P, **options}
    return apply_dropconnect(module, case.target_of(module), **options), plain


@every_case
def test_default_weights(case: Case) -> None:
    module, _ = operated(case)
    assert tuple(site.name for site in dropconnect_sites(module)) == case.weights


@every_case
def test_training_uses_the_masked_weights(case: Case, keys) -> None:
    """Outputs and gradients are those of the plain module with masked weights, bit by bit."""
    module, plain = operated(case)
    inputs = case.inputs()
    output = module(*inputs)
    loss(output).backward()
    masks = {}
    for key, name in zip(keys, site_names(module), strict=True):
        weight = plain.get_parameter(name)
        masks[name] = keep(key, P, *weight.shape)
        weight.data = masked(weight.data, masks[name], P)
    expected = plain(*inputs)
    loss(expected).backward()
    assert set(masks) == set(case.weights)
    assert equal(output, expected)
    for name, child in module.named_modules():
        for parameter, value in plain.get_submodule(name)._parameters.items():
            if value is not None:
                full = join(name, parameter)
                grad = masked(value.grad, masks[full], P) if full in masks else value.grad
                assert torch.equal(plain_parameter(child, parameter).grad, grad), full


@every_case
def test_one_mask_per_site_and_call(case: Case, keys) -> None:
    """Drawn anew at every call, and the same again from the same seed."""
    module, _ = operated(case)
    inputs = case.inputs()
    torch.manual_seed(5)
    outputs = []
    for calls in range(1, 7):
        outputs.append(module(*inputs))
        assert len(keys) == calls * len(case.weights)
    assert len({tuple(key.tolist()) for key in keys}) == len(keys)
    assert not all(equal(outputs[0], other) for other in outputs[1:])
    torch.manual_seed(5)
    assert equal(module(*inputs), outputs[0])


@every_case
def test_eval_is_the_plain_module(case: Case, keys) -> None:
    module, plain = operated(case)
    inputs = case.inputs()
    module(*inputs)
    keys.clear()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert equal(module.eval()(*inputs), plain.eval()(*inputs))
    assert keys == []


@every_case
def test_inference_sample_keeps_dropping_in_eval(case: Case, keys) -> None:
    module, plain = operated(case, inference="sample")
    module.eval()
    plain.eval()
    inputs = case.inputs()
    for grad in (True, False):
        keys.clear()
        masks = copy.deepcopy(plain)
        with torch.set_grad_enabled(grad):
            output = module(*inputs)
            for key, name in zip(keys, site_names(module), strict=True):
                weight = masks.get_parameter(name)
                weight.data = masked(weight.data, keep(key, P, *weight.shape), P)
            assert equal(output, masks(*inputs))


@every_case
def test_the_ends_of_p(case: Case, keys) -> None:
    """At 0 the plain module, and nothing is drawn; at 1 everything is dropped."""
    module, plain = operated(case, p=0.0)
    inputs = case.inputs()
    assert equal(module(*inputs), plain(*inputs))
    assert keys == []
    set_p(module, 1.0)
    for name in case.weights:
        plain.get_parameter(name).data.zero_()
    assert equal(module(*inputs), plain(*inputs))


@every_case
def test_toward_pretrained_starts_from_the_plain_module(case: Case) -> None:
    """While weights are at their anchor, a mask changes nothing but rounding."""
    module, plain = operated(case, toward="pretrained")
    inputs = case.inputs()
    pairs = zip(tensors(module(*inputs)), tensors(plain(*inputs)), strict=True)
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


@every_case
def test_toward_pretrained_masks_the_change(case: Case, keys) -> None:
    module, plain = operated(case, toward="pretrained")
    inputs = case.inputs()
    for name in site_names(module):
        owner, _, parameter = name.rpartition(".")
        plain_parameter(module.get_submodule(owner), parameter).data.mul_(1.5).add_(0.1)
    output = module(*inputs)
    for key, name in zip(keys, site_names(module), strict=True):
        weight = plain.get_parameter(name)
        moved = weight.data * 1.5 + 0.1
        weight.data = masked(moved, keep(key, P, *weight.shape), P, anchor=weight.data)
    assert equal(output, plain(*inputs))


@every_case
def test_weights_read_as_before(case: Case) -> None:
    """`module.weight` is the raw parameter: before and after a forward, in both modes, and after a
    forward that failed."""
    module, _ = operated(case)
    for _ in range(2):
        assert_reads_raw(module, case)
        module(*case.inputs())
        module.train(not module.training)
    with pytest.raises(Exception):  # noqa: B017, PT011
        module(torch.randn(1, 1, 1, 1, 1, 1))
    assert_reads_raw(module, case)
    strip_dropconnect(module)


def assert_reads_raw(module: nn.Module, case: Case) -> None:
    for name in case.weights:
        owner, _, parameter = name.rpartition(".")
        child = module.get_submodule(owner)
        assert getattr(child, parameter) is plain_parameter(child, parameter)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_narrow_dtypes(dtype: torch.dtype, toward: str, keys) -> None:
    """The masked weight is computed in float32 and rounded once."""
    plain = nn.Linear(6, 4).to(dtype)
    module = apply_dropconnect(copy.deepcopy(plain), nn.Linear, p=P, toward=toward)
    with torch.no_grad():
        module.weight.add_(0.5)
    x = torch.randn(3, 6).to(dtype)
    output = module(x)
    anchor = plain.weight.data if toward == "pretrained" else None
    plain.weight.data = masked(module.weight.data, keep(keys[0], P, 4, 6), P, anchor)
    assert output.dtype == dtype
    assert torch.equal(output, plain(x))


@every_case
def test_train_eval_train(case: Case, keys) -> None:
    module, plain = operated(case)
    inputs = case.inputs()
    module(*inputs)
    assert equal(module.eval()(*inputs), plain.eval()(*inputs))
    module.train()(*inputs)
    assert len(keys) == 2 * len(case.weights)
    assert set(module.state_dict()) == {
        f"{name}_raw" if name in case.weights else name for name in plain.state_dict()
    }
