"""Which processes draw alike, from one process group to the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from surgery.modules.ranks import note_mesh, replica


class Mesh:
    """What is looked at of a mesh."""

    def __init__(self, *ranks: int) -> None:
        self.mesh: Tensor = torch.tensor(ranks)


@pytest.fixture
def start(tmp_path: Path) -> Any:
    """Starts a process group of one process, and ends the one before."""
    stores = iter(range(9))

    def begin() -> None:
        end()
        store = f"file://{tmp_path / str(next(stores))}"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)

    def end() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    yield begin
    end()


def test_the_largest_mesh_counts(start: Any) -> None:
    start()
    for ranks, first in (((3,), 0), ((4, 5), 4), ((8, 9), 4), ((6, 7, 8), 6)):
        note_mesh(Mesh(*ranks))
        assert replica() == first


def test_a_mesh_of_an_earlier_process_group_is_forgotten(start: Any) -> None:
    """Replicas of a later run would draw alike."""
    start()
    kept = dist.group.WORLD  # as a wrapper holds it that outlives the run
    note_mesh(Mesh(4, 5, 6))
    start()
    assert replica() == 0
    note_mesh(Mesh(1, 2))
    assert replica() == 1
    dist.destroy_process_group()
    del kept
    start()
    assert replica() == 0
