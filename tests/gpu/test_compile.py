"""Compiled models on the device, in each mode."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from surgery import apply_dropconnect, set_p

MODES = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


@pytest.fixture(autouse=True)
def quickly() -> Iterator[None]:
    """Dynamo starts anew, and products are not tuned, which takes a minute."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of torch, while it imports itself
        import torch._inductor.compile_fx
        import torch._inductor.config as config

    torch._dynamo.reset()
    with config.patch(max_autotune_gemm_backends="ATEN"):
        yield
    torch._dynamo.reset()


@pytest.mark.compiler
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_draws_masks_and_sees_every_p(device: str, mode: str) -> None:
    layer = apply_dropconnect(nn.Linear(64, 64, bias=False).to(device), nn.Linear, p=0.5)
    x = torch.eye(64, device=device, requires_grad=True)
    grad = torch.randn(64, 64, device=device)
    run = torch.compile(layer, mode=mode, fullgraph=True)
    masks = set()
    for p in (0.5, 0.5, 0.2, 1.0, 0.0):
        set_p(layer, p)
        torch.compiler.cudagraph_mark_step_begin()
        layer.weight.grad = x.grad = None
        out = run(x)
        used = out.detach().t().clone()
        out.backward(grad)
        kept = used != 0
        assert abs(float(kept.float().mean()) - (1 - p)) < 0.06
        if p < 1:
            torch.testing.assert_close(used[kept], layer.weight.detach()[kept] / (1 - p))
        assert torch.equal(torch.ne(layer.weight.grad, 0), kept)
        torch.testing.assert_close(x.grad, grad @ used, rtol=1e-4, atol=1e-4)
        masks.add(tuple(kept.flatten().tolist()))
    assert len(masks) == 5


@pytest.mark.compiler
def test_one_graph_for_every_p(device: str) -> None:
    model = apply_dropconnect(nn.Linear(64, 64).to(device), nn.Linear, p=0.5)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(8, 64, device=device)
    for p in (0.5, 0.2, 1.0, 0.0):
        set_p(model, p)
        run(x).sum().backward()
    assert counter.frame_count == 1


@pytest.mark.compiler
@pytest.mark.parametrize("sampling", ["example", "gaussian"])
def test_other_samplings_train_in_a_graph(device: str, sampling: str) -> None:
    layer = nn.Linear(32, 16).to(device)
    apply_dropconnect(layer, nn.Linear, p=0.5, sampling=sampling)
    run = torch.compile(layer, fullgraph=True)
    x = torch.randn(8, 32, device=device, requires_grad=True)
    outs = []
    for _ in range(2):
        layer.zero_grad()
        outs.append(run(x))
        outs[-1].sum().backward()
        assert layer.weight.grad.isfinite().all()
    assert not torch.equal(*outs)
    set_p(layer, 0.0)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(run(x), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.compiler
def test_autocast_in_a_graph(device: str) -> None:
    layer = apply_dropconnect(nn.Linear(64, 64, bias=False).to(device), nn.Linear, p=0.5)
    run = torch.compile(layer, fullgraph=True)
    x = torch.eye(64, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = run(x)
    used = out.detach().t()
    kept = used != 0
    out.float().sum().backward()
    assert used.dtype == torch.bfloat16
    assert torch.equal(used[kept], (2 * layer.weight.detach()).bfloat16()[kept])
    assert torch.equal(layer.weight.grad != 0, kept)
