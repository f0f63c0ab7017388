"""What is written into a value that travels: `h[:, 1] = y`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import apply_dropconnect, predict_moments


class Written(nn.Module):
    """A column of the first layer is a number, or that of another layer, if `given` says so."""

    def __init__(self, given: Any) -> None:
        super().__init__()
        self.fc, self.other, self.given = nn.Linear(4, 3), nn.Linear(4, 3), given

    def forward(self, x: Tensor) -> Tensor:
        found = self.fc(x) * 1.0
        if self.given is not None:
            found[:, 1] = self.other(x)[:, 1] if self.given == "other" else self.given
        return found


@pytest.mark.parametrize("covariance", ["diagonal", "full", 2])
@pytest.mark.parametrize("given", [2.0, "other"])
def test_an_entry_has_the_moments_of_what_is_written(given: Any, covariance: Any) -> None:
    x, whole, written = torch.randn(5, 4), Written(None), Written(given)
    written.load_state_dict(whole.state_dict())
    apply_dropconnect(whole, "fc", p=0.3)
    apply_dropconnect(written, "*" if given == "other" else "fc", p=0.3)
    expected = predict_moments(whole, x, covariance)
    found = predict_moments(written, x, covariance)
    mean, variance = expected.mean.clone(), expected.variance.clone()
    mean[:, 1], variance[:, 1] = 2.0, 0.0
    if given == "other":
        alone = nn.Sequential(written.other)
        other = predict_moments(alone, x, covariance)
        mean[:, 1], variance[:, 1] = other.mean[:, 1], other.variance[:, 1]
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.variance, variance)
