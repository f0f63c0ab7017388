"""A variance that varies: what an earlier layer drops scales what a site draws.

Given the latents e of all before, a pre-activation is Gaussian, with mean `m + F e` and variance
`v + G e`, where F are its columns and G is its swing, to first order. Over all latents it is a mixture
of Gaussians, with the cumulants 3 F.G of third and 3 G.G of fourth order. So (Gram and Charlier)

    E[f(u)]    grows by  F.G / 2 * E[f''']  +  G.G / 8 * E[f'''']
    column k   grows by  G_k / 2 * E[f'']

where derivatives are those of the Gaussian of the same variance, E[f^(n)] = E[f He_n] / deviation^n.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .state import State


class Swung(NamedTuple):
    """What is added to the moments of a function of a value."""

    mean: Tensor
    square: Tensor
    """To the expected square."""
    columns: Tensor


def of_swing(
    state: State, second: Tensor, third: Tensor, fourth: Tensor, third2: Tensor, fourth2: Tensor
) -> Swung:
    """What a swing adds.

    Args:
        second, third, fourth: E[f He_n].
        third2, fourth2: E[f^2 He_n].
    """
    assert state.swing is not None
    assert state.factors is not None
    swing = state.swing.to(state.variance.dtype)
    factors = state.factors[: len(swing)].to(swing.dtype)
    tiny = torch.finfo(swing.dtype).tiny
    inverse = torch.where(state.variance > tiny, state.variance.clamp_min(tiny).reciprocal(), 0)
    skewed = (factors * swing).sum(0) * inverse * inverse.sqrt() / 2
    heavy = swing.square().sum(0) * inverse.square() / 8
    return Swung(
        skewed * third + heavy * fourth,
        skewed * third2 + heavy * fourth2,
        swing * (second * inverse / 2),
    )
