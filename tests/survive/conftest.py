"""Every test that takes `subject` runs once for each kind of site."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ..zoo.subjects import SUBJECTS, Subject
from .checkpoints_of_one import write


@pytest.fixture(params=SUBJECTS, ids=lambda subject: subject.name)
def subject(request: pytest.FixtureRequest) -> Subject:
    return request.param


def run_ranks(
    worker: Path, folder: Path, ranks: int = 2, patience: float = 150
) -> list[dict[str, Any]]:
    """What each rank of a job of `worker` wrote: started as `python WORKER RANK STORE RESULT`."""
    logs = [open(folder / f"log{rank}", "w+") for rank in range(ranks)]  # noqa: SIM115
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                str(worker),
                str(rank),
                str(folder / "store"),
                str(folder / f"{rank}.pt"),
            ],
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
            env={**os.environ, "CHECKPOINTS": str(folder / "checkpoints")},
        )
        for rank in range(ranks)
    ]
    for process in processes:
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    found = []
    for rank, log in enumerate(logs):
        log.seek(0)
        text = log.read()
        log.close()
        assert (folder / f"{rank}.pt").exists(), f"rank {rank} failed:\n{text[-4000:]}"
        found.append(torch.load(folder / f"{rank}.pt"))
    return found


@pytest.fixture(scope="session")
def job_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the job of two processes has its files."""
    return tmp_path_factory.mktemp("job")


@pytest.fixture(scope="session")
def job(job_folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks wrote: one start of processes for all tests."""
    write(job_folder / "checkpoints" / "one")
    return run_ranks(Path(__file__).with_name("distributed_worker.py"), job_folder)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The models are tiny: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
