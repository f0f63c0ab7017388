"""What only CUDA has: memory that is counted, graphs, streams, waits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import apply_dropconnect, set_p

from .. import internals

MEGA = 2**20


def peak(work: Callable[[], object]) -> float:
    """MB that a call needs beyond what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MEGA


@pytest.mark.parametrize("toward", ["zero", "pretrained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_of_examples_never_exist(cuda: str, dtype: torch.dtype, toward: str) -> None:
    """The paper's size, where they would take 512 MB in float32: three passes, with their results."""
    layer = nn.Linear(1024, 1024, device=cuda, dtype=dtype)
    apply_dropconnect(layer, nn.Linear, p=0.5, sampling="example", toward=toward)
    x = torch.randn(128, 1024, device=cuda, dtype=dtype, requires_grad=True)
    grad = torch.randn(128, 1024, device=cuda, dtype=dtype)

    def passes() -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(grad)

    passes()
    layer.zero_grad()
    x.grad = None
    assert peak(lambda: layer(x).backward(grad)) <= 8


def test_masked_weights_of_sequences_come_in_blocks(cuda: str) -> None:
    """Where an example has many rows they are written, 160 MB at a time, of 400 here."""
    layer = nn.Linear(1024, 1024, device=cuda)
    apply_dropconnect(layer, nn.Linear, p=0.5, sampling="example")
    x = torch.randn(100, 17, 1024, device=cuda, requires_grad=True)
    grad = torch.randn(100, 17, 1024, device=cuda)
    layer(x).backward(grad)
    layer.zero_grad()
    x.grad = None
    assert peak(lambda: layer(x).backward(grad)) <= 200


def test_a_step_keeps_no_masked_weight(cuda: str) -> None:
    """What autograd keeps for backward is what it keeps for the plain layer."""
    plain = nn.Linear(1024, 1024, device=cuda)
    layer = apply_dropconnect(nn.Linear(1024, 1024, device=cuda), nn.Linear, p=0.5)
    x = torch.randn(8, 1024, device=cuda, requires_grad=True)
    kept = []
    for model in (plain, layer):
        model(x).sum().backward()
        before = torch.cuda.memory_allocated()
        out = model(x)
        kept.append(torch.cuda.memory_allocated() - before)
        out.sum().backward()
    assert kept[1] <= kept[0] + 4096


@pytest.mark.parametrize("sampling", ["batch", "example", "gaussian"])
def test_a_step_waits_for_nothing(cuda: str, sampling: str) -> None:
    """No site makes the host wait for the device."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).cuda()
    apply_dropconnect(model, nn.Linear, p=0.3, sampling=sampling)
    x = torch.randn(8, 64, device=cuda)
    for mode in ("default", "error"):  # the first compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            model(x).square().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(weight.grad is not None for weight in model.parameters())


class Captured:
    """Forward and backward of a Linear without bias, as a CUDA graph; of its identity, so that the
    output is the masked weight, transposed."""

    def __init__(self, p: float, width: int = 64, **options: Any) -> None:
        self.layer = nn.Linear(width, width, bias=False).cuda()
        apply_dropconnect(self.layer, nn.Linear, p=p, **options)
        self.x = torch.eye(width, device="cuda", requires_grad=True)
        self.grad = torch.randn(width, width, device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self.layer.zero_grad()
        self.x.grad = None
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = self._run()

    def _run(self) -> Tensor:
        self.layer.weight.grad = self.x.grad = None
        out = self.layer(self.x)
        out.backward(self.grad)
        return out.detach()

    def replay(self) -> tuple[Tensor, Tensor, Tensor]:
        """The masked weight, and the gradients of the weight and of x."""
        self.graph.replay()
        return self.out.t().clone(), self.layer.weight.grad.clone(), self.x.grad.clone()


@pytest.mark.parametrize("ranks", ["same", "independent"])
def test_each_replay_of_a_graph_draws_a_mask(cuda: str, ranks: str) -> None:
    captured = Captured(p=0.5, ranks=ranks)
    masks = set()
    for _ in range(4):
        used, of_weight, of_x = captured.replay()
        kept = used != 0
        assert 0.4 < kept.float().mean() < 0.6
        assert torch.equal(used[kept], 2 * captured.layer.weight.detach()[kept])
        assert torch.equal(of_weight != 0, kept)
        torch.testing.assert_close(of_x, captured.grad @ used, rtol=1e-4, atol=1e-4)
        masks.add(tuple(kept.flatten().tolist()))
    assert len(masks) == 4


def test_seeds_reproduce_replays(cuda: str) -> None:
    captured = Captured(p=0.5)
    runs = []
    for _ in range(2):
        torch.manual_seed(4)
        runs.append([captured.replay()[0] for _ in range(3)])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("first", [0.5, 0.0, 1.0])
def test_set_p_takes_effect_in_the_next_replay(cuda: str, first: float) -> None:
    captured = Captured(p=first)
    weight = captured.layer.weight.detach()
    for p in (0.2, 1.0, 0.0, 0.75):
        set_p(captured.layer, p)
        used, of_weight, _ = captured.replay()
        kept = used != 0
        assert abs(float(kept.float().mean()) - (1 - p)) < 0.06
        if p < 1:
            torch.testing.assert_close(used[kept], weight[kept] / (1 - p))
        assert torch.equal(of_weight != 0, kept)


@pytest.mark.parametrize("sampling", ["example", "gaussian"])
def test_replays_of_other_samplings_draw_anew(cuda: str, sampling: str) -> None:
    captured = Captured(p=0.5, sampling=sampling)
    outs = [captured.replay()[0] for _ in range(3)]
    assert not torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[1], outs[2])


def test_eager_calls_go_on_after_a_capture(cuda: str) -> None:
    captured = Captured(p=0.5)
    captured.replay()
    outs = [captured.layer(captured.x).detach() for _ in range(2)]
    assert not torch.equal(*outs)
    set_p(captured.layer, 0.0)
    torch.testing.assert_close(captured.layer(captured.x).t(), captured.layer.weight)


@pytest.mark.parametrize("by_python", [True, False])
def test_two_streams_do_not_disturb_each_other(
    cuda: str, by_python: bool, request: pytest.FixtureRequest
) -> None:
    if by_python:
        same_draws: Callable[[], object] = request.getfixturevalue("same_draws")
    else:
        assert internals.compile_extension()
        same_draws = partial(torch.manual_seed, 11)
    layers = [nn.Linear(1024, 1024, bias=False).cuda() for _ in range(2)]
    for layer in layers:
        apply_dropconnect(layer, nn.Linear, p=0.5)
    x = torch.randn(64, 1024, device=cuda)

    def gradients(streams: list[torch.cuda.Stream]) -> list[Tensor]:
        same_draws()
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        for layer in layers:
            layer.weight.grad = None
        for _ in range(5):
            for layer, stream in zip(layers, streams, strict=True):
                with torch.cuda.stream(stream):
                    layer(x).square().sum().backward()
        torch.cuda.synchronize()
        return [layer.weight.grad.clone() for layer in layers]

    here = torch.cuda.current_stream()
    gradients([here, here])  # by Python, which compiles kernels that the extension launches
    internals.compile_extension()
    expected = gradients([here, here])
    found = gradients([torch.cuda.Stream(), torch.cuda.Stream()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
