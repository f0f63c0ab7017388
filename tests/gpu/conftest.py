"""These tests are for a GPU. `DROPCONNECT_TEST_DEVICE=cpu` runs on the CPU, with the kernels in
Triton's interpreter, whatever does not need CUDA itself: so they are tried where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery.ops import key_from_seed

from .. import internals

HERE = Path(__file__).parent
ON_CPU = not torch.cuda.is_available() and os.environ.get("DROPCONNECT_TEST_DEVICE") == "cpu"

TORCHS_OWN = (
    "TensorFloat32 tensor cores for float32",  # a hint of inductor
    "Please use the new API settings to control TF32",
    "Synchronization debug mode is a prototype",
    "Attempting to run cuBLAS, but there was no current CUDA context",  # first of a backward thread
    "The CUDA Graph is empty",  # of inductor, which captures nothing first
    "The AccumulateGrad node's stream does not match",  # of a layer that changes its stream
    "Not enough SMs to use max_autotune_gemm mode",
    "Online softmax is disabled on the fly",
)
"""Beginnings of warnings that torch gives its users with plain models too. All others are errors."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        for message in TORCHS_OWN:
            item.add_marker(pytest.mark.filterwarnings(f"ignore:{message}"))
        if not torch.cuda.is_available():
            needs_cuda = "cuda" in getattr(item, "fixturenames", ())
            if needs_cuda or not ON_CPU:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def cuda() -> str:
    """The device, for what no other has."""
    return "cuda"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device that is tested."""
    if torch.cuda.is_available():
        yield "cuda"
        return
    numpy = pytest.importorskip("numpy")
    internals.set_constant(monkeypatch, "interpreted devices", {"cpu"})
    with numpy.errstate(all="ignore"):  # a GPU does not warn of what overflows
        yield "cpu"


@pytest.fixture
def same_draws(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Keys and noise are the same on every device. Call it before each run: then draws start anew.
    The extension draws by itself: see `test_extension.py`."""
    internals.without_extension(monkeypatch)
    count = 0

    def restart() -> None:
        nonlocal count
        count = 0

    def draw(device: torch.device, rank: int = 0) -> Tensor:
        nonlocal count
        count += 1
        return key_from_seed(count)

    randn = torch.randn

    def noise(
        *size: Any,
        dtype: torch.dtype = torch.float32,
        device: Any = "cpu",
        requires_grad: bool = False,
    ) -> Tensor:
        nonlocal count
        count += 1
        generator = torch.Generator().manual_seed(count)
        values = randn(*size, generator=generator, dtype=torch.float64)
        return values.to(device, dtype).requires_grad_(requires_grad)

    def noise_like(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return noise(*like.shape, dtype=dtype or like.dtype, device=like.device)

    internals.replace_draw_key(monkeypatch, draw)
    monkeypatch.setattr(torch, "randn", noise)
    monkeypatch.setattr(torch, "randn_like", noise_like)
    return restart
