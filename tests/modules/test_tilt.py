"""What makes neighbouring repetitions of a batch differ, while `mc_predict` looks whether they mix."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from ..internals import tilt


@pytest.mark.parametrize("samples", [1, 2, 3, 6, 7])
def test_neighbours_differ_and_the_middle_is_as_one_alone(samples: int) -> None:
    found = tilt(samples, 9, torch.device("cpu"), torch.float32)
    assert found.shape == (samples, 9)
    assert set(found.flatten().tolist()) == {0.5, 1.5}
    assert torch.equal(found[samples // 2], tilt(1, 9, found.device, found.dtype)[0])
    assert torch.equal(found[2:], found[:-2])
    for seen in (found, F.layer_norm(found, (9,)), F.rms_norm(found, (9,)), F.normalize(found)):
        assert not any(torch.allclose(one, other) for one, other in itertools.pairwise(seen))
