"""How far mean and variance travel, as `tree` shows it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from surgery import SurgeryError, apply_dropconnect, plan_dropconnect, predict_moments
from surgery.transforms import tree


class Sorting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(-1).values + x


def test_functions_that_settle_values_are_marked_where_they_are() -> None:
    layers = [nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Sorting()) for _ in range(2)]
    model = apply_dropconnect(nn.Sequential(*layers, nn.Linear(4, 2)), "*", p=0.3)
    found = predict_moments(model, torch.randn(3, 4))
    lines = tree(model, moments=found).splitlines()
    marked = [line for line in lines[:-1] if "✂" in line]
    assert ["Sorting" in line and line.endswith("✂ sort") for line in marked] == [True]
    assert lines[-1] == "variance is lost at 2 functions (✂)"
    assert tree(model) == "\n".join(line.replace("✂ sort", "").rstrip() for line in lines[:-1])


def test_variance_that_goes_all_the_way() -> None:
    model = apply_dropconnect(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "0", p=0.3)
    text = tree(model, moments=predict_moments(model, torch.randn(3, 4)))
    assert text == f"{tree(model)}\nvariance travels to the output"


def test_sites_without_moments_are_known_at_rest() -> None:
    """A plan says the same, and `predict_moments` refuses for the same reason."""
    model = nn.ModuleDict({"pair": nn.Bilinear(3, 3, 4), "fc": nn.Linear(4, 2)})
    assert str(plan_dropconnect(model, "fc", inference="moments")).endswith(
        "every site has moments"
    )
    assert "moments" not in str(plan_dropconnect(model, "fc"))
    plan = plan_dropconnect(model, ["fc", "pair.weight"], p=0.3)
    apply_dropconnect(model, "fc", p=0.3)
    assert tree(model, moments=True).endswith("every site has moments")
    apply_dropconnect(model, "pair.weight", p=0.3)
    last = tree(model, moments=True).splitlines()[-1]
    assert last == "no moments: pair.weight: no moments are known of what reads it"
    assert plan[0].no_moments == "no moments are known of what reads it"
    assert str(plan).splitlines()[2].endswith("no moments")
    assert plan[1].no_moments is None
    with pytest.raises(SurgeryError, match=r"pair\.weight: no moments are known of what reads it"):
        predict_moments(model, torch.randn(2, 3))
