"""One rank of two, of which the second is killed: `python dying_worker.py RANK STORE FOLDER WHERE`.

The first writes to `FOLDER/result` what came of it.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from surgery import (
    apply_dropconnect,
    dropconnect_sites,
    load_dropconnect,
    save_dropconnect,
    strip_dropconnect,
)

LIMIT = datetime.timedelta(seconds=60)
STEPS = 3


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def die(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_event(event: int) -> None:
    """Before Python does the n-th thing to a file."""
    left = event

    def count(name: str, args: Any) -> None:
        nonlocal left
        if name == "open" or name.startswith(("os.rename", "os.replace", "os.link", "os.remove")):
            left -= 1
            if left < 0:
                die()

    sys.addaudithook(count)


def die_at_call(number: int) -> None:
    """At the n-th call of a function of Python, or its end."""
    calls = iter(range(number))
    sys.setprofile(lambda *args: next(calls, None) is None and die())


def train(model: nn.Module, wrapped: nn.Module, rank: int, where: str, folder: Path) -> None:
    """Steps, and after each of them a save; the second rank dies in the second step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        dies = rank == 1 and step == 1
        if dies and where == "forward":
            model[2].register_forward_pre_hook(die)
        out = wrapped(torch.randn(4, 6))
        if dies and where == "backward":
            out.register_hook(die)
        out.square().sum().backward()
        optimizer.step()
        if dies and where == "save":
            die_at_event(3)
        if rank == 1:  # on one of them, as scripts do it; here the one that dies
            save_dropconnect(model, folder / "plan")
        if dies and where == "strip":
            die_at_call(40)
            strip_dropconnect(model)
        optimizer.zero_grad()


def main() -> None:
    rank, store, folder, where = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=LIMIT
    )
    model, began = net(), time.monotonic()
    own = [id(parameter) for parameter in model.parameters()]
    apply_dropconnect(model, "*", p=0.5, toward="pretrained")
    names = list(model.state_dict())
    wrapped = DistributedDataParallel(model)
    error = ""
    try:
        train(model, wrapped, rank, where, folder)
        dist.barrier()
    except RuntimeError as raised:
        error = str(raised)
    result = {"error": error, "seconds": time.monotonic() - began}
    result["whole"] = list(model.state_dict()) == names and len(dropconnect_sites(model)) == 2
    again = load_dropconnect(net(), folder / "plan")
    result["read"] = [site.name for site in dropconnect_sites(again)]
    strip_dropconnect(model)
    result["same"] = [id(parameter) for parameter in model.parameters()] == own
    result["plain"] = type(model[0]) is nn.Linear and [*model.state_dict()] == [*net().state_dict()]
    (folder / "result").write_text(json.dumps(result))
    os._exit(0)  # gloo may hang at its end when the other is gone


if __name__ == "__main__":
    main()
