"""`predict_moments` on the device, beside the CPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from surgery import apply_dropconnect, predict_moments


@pytest.mark.parametrize("form", ["diagonal", 8, "full"])
def test_predictions_are_those_of_the_cpu(device: str, form: Any) -> None:
    """Masks are the same bits on every device, so that draws are, too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3)).eval()
    x = torch.randn(4, 6) if form == "full" else torch.randn(4, 5, 6)
    apply_dropconnect(model, nn.Linear, p=0.2)
    expected = predict_moments(model, x, form)
    found = predict_moments(model.to(device), x.to(device), form)
    assert found.mean.device.type == torch.device(device).type
    found = found.cpu()
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.variance, expected.variance, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", ["diagonal", 8, "outputs", "full"])
@pytest.mark.parametrize(
    ("sampling", "unit"),
    [
        *itertools.product(["batch", "example"], ["element", "input", "output", "tensor"]),
        *itertools.product(["gaussian"], ["element", "output"]),
    ],
)
def test_every_form_of_every_site(device: str, sampling: Any, unit: Any, form: Any) -> None:
    """The random numbers of other draws are the device's own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(device).eval()
    apply_dropconnect(model, nn.Linear, p=0.2, sampling=sampling, unit=unit)
    found, again = (predict_moments(model, torch.ones(4, 6, device=device), form) for _ in range(2))
    assert bool(found.mean.isfinite().all())
    assert bool((found.variance > 0).all())
    assert torch.equal(found.mean, again.mean)
    assert found.mutual_information is not None
    assert bool(found.mutual_information.isfinite().all())
