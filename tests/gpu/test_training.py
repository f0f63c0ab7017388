"""Autocast, scaled gradients, checkpoints, generators, ranks and copies on the device."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from surgery import apply_dropconnect
from surgery.ops import Law, Layout, draw_key, drop_weight, key_from_seed
from surgery.ops.hash import key_tensor

from ..internals import derived_key

NARROW = [torch.bfloat16, torch.float16]


def layer_on(device: str, p: float = 0.5, **options: Any) -> nn.Module:
    return apply_dropconnect(nn.Linear(32, 24).to(device), nn.Linear, p=p, **options)


def net_on(device: str) -> nn.Module:
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU()).to(device)
    return apply_dropconnect(net, nn.Linear, p=0.3)


def mask_of(model: nn.Module, device: str) -> Tensor:
    """Which weights the next mask of a Linear keeps."""
    with torch.no_grad():
        eye = torch.eye(model.in_features, device=device)
        return (model(eye) - model.bias) != 0


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_autocast_rounds_the_masked_weight_once(
    device: str, same_draws: Callable[[], None], dtype: torch.dtype, toward: str
) -> None:
    layer = layer_on(device, p=0.3, toward=toward)
    anchor = None if toward == "zero" else layer.weight.detach().clone()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.3)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach()
    x = torch.randn(8, 32, device=device, requires_grad=True)
    same_draws()
    with torch.autocast(device, dtype):
        out = layer(x)
        out.float().sum().backward()
    law, layout = Law.of(0.3, weight.device, weight.dtype), Layout.elements(weight.numel())
    used = drop_weight(weight, key_from_seed(1), law, layout, anchor)
    assert out.dtype == dtype
    expected = nn.functional.linear(x.detach().to(dtype), used.to(dtype), bias.to(dtype))
    torch.testing.assert_close(out.detach(), expected)
    assert layer.weight.grad.dtype == torch.float32
    kept = drop_weight(torch.ones_like(weight), key_from_seed(1), law, layout) != 0
    assert torch.equal(layer.weight.grad != 0, kept)
    of_x = torch.ones(8, 24, device=device, dtype=dtype) @ used.to(dtype)
    torch.testing.assert_close(x.grad.to(dtype), of_x)


@pytest.mark.parametrize("sampling", ["batch", "example", "gaussian"])
def test_scaled_gradients_train(device: str, sampling: str) -> None:
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1)).to(device)
    apply_dropconnect(net, nn.Linear, p=0.1, sampling=sampling)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    x = torch.randn(16, 4, device=device)
    y = x[:, :1] - x[:, 1:2]
    losses = []
    for _ in range(40):
        with torch.autocast(device, torch.float16):
            loss = nn.functional.mse_loss(net(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.detach())
    first, last = torch.stack(losses[:5]).mean(), torch.stack(losses[-5:]).mean()
    assert scaler.get_scale() == 2.0**10
    assert last < first / 2


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_checkpointing_recomputes_with_the_same_masks(
    device: str, reentrant: bool, autocast: bool
) -> None:
    net = net_on(device)
    x = torch.randn(8, 16, device=device)

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(11)
        net.zero_grad()
        inputs = x.clone().requires_grad_()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            out = run(inputs)
            if not autocast:  # a second time, with other masks; autocast would add up otherwise
                out = run(out)
        torch.rand(3, device=device)  # the generators move on between forward and backward
        draw_key(torch.device(device))
        out.float().square().sum().backward()
        return [inputs.grad, *(parameter.grad.clone() for parameter in net.parameters())]

    expected = gradients(net)
    found = gradients(lambda inputs: checkpoint(net, inputs, use_reentrant=reentrant))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def generator_state(device: str) -> Tensor:
    return torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()


def set_generator_state(device: str, state: Tensor) -> None:
    (torch.cuda.set_rng_state if device == "cuda" else torch.set_rng_state)(state)


def test_seeds_reproduce_masks_and_draws_differ(device: str) -> None:
    layer = layer_on(device)
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append([mask_of(layer, device) for _ in range(4)])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)
    assert len({tuple(mask.flatten().tolist()) for mask in runs[0]}) == 4
    torch.manual_seed(6)
    assert not torch.equal(mask_of(layer, device), runs[0][0])


def test_a_saved_state_of_the_generator_brings_masks_back(device: str) -> None:
    layer = layer_on(device)
    mask_of(layer, device)
    state = generator_state(device)
    expected = [mask_of(layer, device) for _ in range(2)]
    noise = torch.rand(4, device=device)
    set_generator_state(device, state)
    found = [mask_of(layer, device) for _ in range(2)]
    assert all(map(torch.equal, found, expected))
    assert torch.equal(torch.rand(4, device=device), noise)


def test_forked_generators_leave_the_others_alone(device: str) -> None:
    layer = layer_on(device)
    torch.manual_seed(1)
    expected = [mask_of(layer, device) for _ in range(2)]
    torch.manual_seed(1)
    found = [mask_of(layer, device)]
    with torch.random.fork_rng(devices=[0] if device == "cuda" else []):
        torch.manual_seed(9)
        inside = mask_of(layer, device)
    found.append(mask_of(layer, device))
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(inside, expected[1])


def test_ranks_have_masks_of_their_own(device: str, monkeypatch) -> None:
    keys = []
    for rank in range(3):
        torch.manual_seed(2)
        keys.append(key_tensor(draw_key(torch.device(device), rank), "cpu"))
    for rank in (1, 2):
        assert torch.equal(keys[rank], derived_key(keys[0], rank))
    layer = layer_on(device)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    masks = []
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        torch.manual_seed(2)
        masks.append(tuple(mask_of(layer, device).flatten().tolist()))
    assert len(set(masks)) == 3


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_copies_draw_as_the_original(device: str, copied: Callable) -> None:
    net = net_on(device)
    x = torch.randn(8, 16, device=device)
    net(x)  # with a law on the device
    other = copied(net)
    found = []
    for model in (net, other):
        torch.manual_seed(3)
        model.zero_grad()
        model(x).square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *found))


COLD = """
import sys, torch
before = "triton" in sys.modules
import surgery
assert ("triton" in sys.modules) == before, "import surgery imports triton"
from torch import nn
device = sys.argv[1]
layer = surgery.apply_dropconnect(nn.Linear(32, 32, bias=False), nn.Linear, p=0.5)
layer(torch.randn(4, 32)).sum().backward()
assert ("triton" in sys.modules) == before, "a model on the CPU imports triton"
layer.to(device)
layer.zero_grad()
x = torch.ones(4, 32, device=device, requires_grad=True)
layer(x).sum().backward()
kept = layer.weight.grad != 0
assert 0.3 < kept.float().mean() < 0.7
torch.testing.assert_close(x.grad[0], (layer.weight * kept * 2).sum(0), rtol=1e-4, atol=1e-5)
print("as it should be")
"""


def test_a_fresh_process(device: str) -> None:
    done = subprocess.run([sys.executable, "-c", COLD, device], capture_output=True, text=True)
    assert done.stdout.strip() == "as it should be", done.stderr
