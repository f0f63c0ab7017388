"""`make soak`: train for a long time, and see that nothing grows.

    python -m tests.adapters.soak [--minutes M]

A Trainer run with a schedule of p, a checkpoint and a resume from it, again and again in one process,
on a model that is made anew each time; in the second half of the time under `torch.compile`. A line for
each round: what the process holds. It fails if the last rounds hold more than the first after the
warm-up. Of compiled models torch keeps tensors when they are gone, of plain ones too: there, tensors
and memory are not judged.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo
import transformers

from surgery import DropConnectModule, plain_state_dict, strip_dropconnect
from surgery.adapters.transformers import DropConnectCallback

from ..zoo.tiny import tiny
from .conftest import batch

WARM_UP = 4
"""Rounds that may still fill caches, of both models."""

STEPS, SAVE_AT = 20, 10


class Held(NamedTuple):
    """What a process holds between two rounds."""

    megabytes: float
    """Resident memory."""
    files: int
    threads: int
    classes: int
    """Operated classes that live."""
    tensors: int
    frames: int
    """That dynamo has compiled, since the round began."""


def subclasses(cls: type[Any]) -> int:
    return sum(1 + subclasses(one) for one in cls.__subclasses__())


def held(before: int) -> Held:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Held(
        pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
        subclasses(DropConnectModule),
        sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()),
        frames() - before,
    )


def frames() -> int:
    return int(torch._dynamo.utils.counters["frames"]["ok"])


def trainer(model: Any, folder: str, compiled: bool) -> Any:
    rows = batch(model, rows=32, seed=1)
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=4,
            save_steps=SAVE_AT,
            logging_steps=5,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            torch_compile=compiled,
            torch_compile_backend="eager" if compiled else None,
        ),
        train_dataset=[{name: value[i] for name, value in rows.items()} for i in range(32)],
        callbacks=[
            DropConnectCallback("all-linear", p=0.3, toward="pretrained", schedule="cosine")
        ],
    )


def one_round(number: int, folder: str, compiled: bool) -> None:
    """Train, and again from the middle; both must end with the same bits."""
    name = ("bert", "gpt2")[number % 2]
    torch._dynamo.reset()
    ends = []
    for resume in (False, True):
        model = tiny(name)
        run = trainer(model, folder, compiled)
        run.train(resume_from_checkpoint=f"{folder}/checkpoint-{SAVE_AT}" if resume else None)
        ends.append({key: value.clone() for key, value in plain_state_dict(model).items()})
        strip_dropconnect(model)
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def grew(rounds: list[Held], compiled: bool) -> list[str]:
    """What the last rounds hold more of than the first ones after the warm-up."""
    first, last = rounds[WARM_UP : WARM_UP + 4], rounds[-4:]
    found = []
    for field in ("files", "threads", "classes", "frames", *([] if compiled else ["tensors"])):
        before, after = (sorted(getattr(one, field) for one in part) for part in (first, last))
        if before != after:
            found.append(f"{field}: {before} at first, {after} at last")
    least, now = (min(one.megabytes for one in part) for part in (first, last))
    if not compiled and now > least + max(20.0, 0.05 * least):
        found.append(f"memory: {least:.0f} MB at first, {now:.0f} MB at last")
    return found


def rounds_for(minutes: float, compiled: bool) -> list[Held]:
    """So many minutes of rounds."""
    end = time.monotonic() + 60 * minutes
    print("| round | MB | open files | threads | classes | tensors | compiled |")
    print("|---|---|---|---|---|---|---|")
    rounds: list[Held] = []
    while time.monotonic() < end or len(rounds) < WARM_UP + 8:
        before = frames()
        with tempfile.TemporaryDirectory() as folder:
            one_round(len(rounds), folder, compiled)
        now = held(before)
        rounds.append(now)
        print(f"| {len(rounds)} | {now.megabytes:.0f}", *now[1:], "", sep=" | ", flush=True)
    return rounds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    minutes = parser.parse_args().minutes
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = []
    for compiled in (False, True):
        rounds = rounds_for(minutes / 2, compiled)
        steps = len(rounds) * (2 * STEPS - SAVE_AT)
        print(f"{len(rounds)} rounds{', compiled' if compiled else ''}, {steps} steps")
        found += grew(rounds, compiled)
    print(*found or ["nothing grew"], sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
