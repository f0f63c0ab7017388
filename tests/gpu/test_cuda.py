"""What only a GPU can show. The benchmarks of `benchmarks/gpu.py` measure there."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from surgery import apply_dropconnect, hold_masks, set_p
from surgery.ops import Law, Layout, drop_weight, key_from_seed

# Warnings are errors in this suite. These are torch's own: hints for its users, not for us.
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32:UserWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_masks_have_the_bits_of_the_cpu(p: float, dtype: torch.dtype) -> None:
    weight, key = torch.randn(301, 257).to(dtype), key_from_seed(3)
    for layout in (Layout.elements(weight.numel()), Layout.shared((301, 257), (0,))):
        here, there = (
            drop_weight(
                weight.to(device), key.to(device), Law.of(p, torch.device(device), dtype), layout
            )
            for device in ("cpu", "cuda")
        )
        assert torch.equal(here, there.cpu())


@pytest.mark.parametrize("sampling", ["batch", "example", "gaussian"])
def test_a_step_waits_for_nothing(sampling: str) -> None:
    """No site makes the host wait for the device."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).cuda()
    apply_dropconnect(model, nn.Linear, p=0.3, sampling=sampling)
    x = torch.randn(8, 64, device="cuda")
    for mode in ("default", "error"):  # the first compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            model(x).square().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_gradients_have_the_mask_of_the_forward() -> None:
    layer = apply_dropconnect(nn.Linear(48, 32, bias=False).cuda(), nn.Linear, p=0.5)
    x = torch.randn(8, 48, device="cuda", requires_grad=True)
    grad = torch.randn(8, 32, device="cuda")
    with hold_masks(layer):
        used = layer(torch.eye(48, device="cuda")).t().detach()
        layer(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ used)
    expected = torch.where(used == 0, 0, 2 * grad.t() @ x.detach())
    torch.testing.assert_close(layer.weight.grad, expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_one_graph_for_every_p(mode: str) -> None:
    torch._dynamo.reset()
    model = apply_dropconnect(nn.Linear(64, 64).cuda(), nn.Linear, p=0.5)
    counter = CompileCounterWithBackend("inductor")
    x = torch.randn(8, 64, device="cuda")
    run = torch.compile(model, backend=counter, fullgraph=True)
    if mode == "reduce-overhead":  # CUDA graphs
        run = torch.compile(model, mode=mode, fullgraph=True)
    outs = []
    for p in (0.5, 0.2, 1.0, 0.0):
        set_p(model, p)
        outs.append(run(x).detach().clone())
        run(x).sum().backward()
    assert counter.frame_count == (mode == "default")
    torch.testing.assert_close(outs[2], layer_bias(model).expand_as(outs[2]))
    torch.testing.assert_close(outs[3], nn.functional.linear(x, model.weight, model.bias))


def layer_bias(layer: nn.Linear) -> torch.Tensor:
    return layer.bias.detach()


def test_an_lstm_runs_by_cudnn_as_it_does_on_the_cpu() -> None:
    model = nn.LSTM(16, 32, num_layers=2)
    x = torch.randn(5, 3, 16)
    apply_dropconnect(model, nn.LSTM, p=1.0)  # no key, which the devices would draw differently
    expected = model(x)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of chunks: see docs/performance.md
        found = model.cuda()(x.cuda())[0]
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
