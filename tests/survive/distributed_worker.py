"""One rank of a two-process job: `python distributed_worker.py RANK STORE RESULT`, with the folder of
checkpoints in the environment variable CHECKPOINTS.

Each case returns tensors, which go to a file; the tests compare the files of both ranks. gloo aborts
at shutdown in a few percent of runs, unmodified models too, so the exit status says nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from surgery import (
    apply_dropconnect,
    dropconnect_sites,
    load_dropconnect,
    plain_state_dict,
    raw_state_dict,
    save_dropconnect,
    set_p,
    strip_dropconnect,
)

sys.path.append(str(Path(__file__).parents[1] / "zoo"))  # after the installed packages
import mesh_cases  # type: ignore[import-not-found]
from subjects import BY_NAME  # type: ignore[import-not-found]

SUBJECT = BY_NAME["transformer"]


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {f"grad.{name}": whole(p.grad).clone() for name, p in model.named_parameters()}


def ddp(rank: int, ranks: str) -> dict[str, Any]:
    """Two steps with the same data and seed on both ranks."""
    model = SUBJECT.moved(ranks=ranks, toward="pretrained")
    wrapped = DistributedDataParallel(model)
    torch.manual_seed(3)
    out = wrapped(SUBJECT.inputs())
    out.square().sum().backward()
    found = grads(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    wrapped(SUBJECT.inputs()).square().sum().backward()
    optimizer.step()
    after = {f"after.{name}": value.clone() for name, value in model.state_dict().items()}
    wrapped.eval()
    return {"output": out.detach(), **found, **after, "eval": wrapped(SUBJECT.inputs()).detach()}


def ddp_independent(rank: int) -> dict[str, Any]:
    return ddp(rank, "independent")


def ddp_same(rank: int) -> dict[str, Any]:
    return ddp(rank, "same")


def ddp_generator(rank: int) -> dict[str, Any]:
    """Masks from a generator of their own, while torch's own is seeded otherwise in each process; and a
    copy that goes on from what was saved."""
    found: dict[str, Any] = {}
    for ranks in ("independent", "same"):
        model = SUBJECT.moved(ranks=ranks, generator=11)
        torch.manual_seed(100 + rank)
        before = torch.get_rng_state()
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            optimizer.zero_grad()
            out = wrapped(SUBJECT.inputs())
            out.square().sum().backward()
            optimizer.step()
            found |= {f"{ranks} {step} output": out.detach(), f"{ranks} {step}": grads(model)}
        found[f"{ranks} leaves torch's"] = torch.equal(torch.get_rng_state(), before)
        folder = Path(os.environ["CHECKPOINTS"]) / f"generator {ranks} {rank}"
        save_dropconnect(model, folder)
        again = load_dropconnect(SUBJECT.plain(), folder)
        again.load_state_dict(model.state_dict())
        outputs = [one(SUBJECT.inputs()) for one in (wrapped, DistributedDataParallel(again))]
        found[f"{ranks} goes on"] = torch.equal(*outputs)
    return found


def ddp_state_dict(rank: int) -> dict[str, Any]:
    """`get_model_state_dict` and `set_model_state_dict` around DDP, raw keys."""
    wrapped = DistributedDataParallel(SUBJECT.moved(toward="pretrained"))
    state: dict[str, Any] = get_model_state_dict(wrapped)
    changed = {name: value + 1 for name, value in state.items()}
    set_model_state_dict(wrapped, changed)
    found = {f"state.{name}": value.clone() for name, value in wrapped.module.state_dict().items()}
    return {**found, "keys": list(state)}


def fsdp_model(**options: Any) -> nn.Module:
    model = SUBJECT.moved(**options)
    mesh = init_device_mesh("cpu", (2,))
    for child in (model.self_attn, model.linear1, model.linear2):
        fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp(rank: int) -> dict[str, Any]:
    """Two steps on the same data and seed: what a single process computes."""
    model = fsdp_model(ranks="same", toward="pretrained")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(3)
    found: dict[str, Any] = {}
    for step in range(2):
        optimizer.zero_grad()
        out = model(SUBJECT.inputs())
        out.square().sum().backward()
        found |= {f"{step}.{name}": value for name, value in grads(model).items()}
        found[f"{step}.output"] = out.detach()
        optimizer.step()
        set_p(model, 0.25)
    return found


def fsdp_independent(rank: int) -> dict[str, Any]:
    model = fsdp_model()
    torch.manual_seed(3)
    out = model(SUBJECT.inputs())
    out.square().sum().backward()
    return {"output": out.detach(), **grads(model)}


def fsdp_errors(rank: int) -> dict[str, Any]:
    """Strip while sharded, and apply when sharded."""
    found: dict[str, Any] = {}
    model = fsdp_model()
    sharded = fully_shard(SUBJECT.plain(), mesh=init_device_mesh("cpu", (2,)))
    attempts: dict[str, Callable[[], object]] = {
        "strip": lambda: strip_dropconnect(model),
        "apply": lambda: apply_dropconnect(sharded, "linear1", p=0.5),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            found[name] = str(error)
    found["plain"] = {name: whole(value) for name, value in plain_state_dict(model).items()}
    found["output"] = model.eval()(SUBJECT.inputs()).detach()
    return found


def fsdp_state_dict(rank: int) -> dict[str, Any]:
    """A full state dict out of one sharded model and into another."""
    options = StateDictOptions(full_state_dict=True)
    model = fsdp_model(toward="pretrained")
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    found: dict[str, Any] = {f"got.{name}": value.clone() for name, value in state.items()}
    changed = {name: value + 1 for name, value in state.items()}
    load = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, changed if rank == 0 else {}, options=load)
    found |= {f"set.{name}": whole(value) for name, value in model.state_dict().items()}
    return found


def plain_keys(rank: int) -> dict[str, Any]:
    """Plain keys into DDP and into shards, by every way that torch has."""
    plain = {name: value + 1 for name, value in SUBJECT.plain().state_dict().items()}
    found: dict[str, Any] = {}
    ways: dict[str, dict[str, Any]] = {
        "ddp": {},
        "sharded": {},
        "full": {"full_state_dict": True},
        "broadcast": {"full_state_dict": True, "broadcast_from_rank0": True},
        "offload": {"full_state_dict": True, "cpu_offload": True},
    }
    for way, full in ways.items():
        moved = SUBJECT.moved(toward="pretrained")
        model = DistributedDataParallel(moved) if way == "ddp" else fsdp_model(toward="pretrained")
        given = dict(plain)
        if way == "sharded":
            shards: dict[str, Any] = plain_state_dict(model, get_model_state_dict(model))
            given = {
                name: distribute_tensor(plain[name], shard.device_mesh, shard.placements)
                for name, shard in shards.items()
            }
        if way == "broadcast" and rank > 0:
            given = {}
        result = set_model_state_dict(model, given, options=StateDictOptions(**full))
        assert not result.missing_keys
        assert not result.unexpected_keys
        state = (model.module if way == "ddp" else model).state_dict()
        found |= {f"{way}.{name}": whole(value).clone() for name, value in state.items()}
        raw = raw_state_dict(model, get_plain(model))
        found[f"keys.{way}"] = list(raw)
        model.load_state_dict(raw_state_dict(model, plain_state_dict(model)))
    return found


def get_plain(model: nn.Module) -> dict[str, Any]:
    """Without the names of wrappers, as torch gathers it."""
    options = StateDictOptions(full_state_dict=True)
    return plain_state_dict(model, get_model_state_dict(model, options=options))


def fsdp_checkpointing(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for way in ("plain", "checkpointed"):
        model = fsdp_model(ranks="same")
        torch.manual_seed(3)
        x = SUBJECT.inputs().requires_grad_()
        out = model(x) if way == "plain" else checkpoint(model, x, use_reentrant=False)
        out.square().sum().backward()
        found |= {f"{way}.{name}": value for name, value in grads(model).items()}
    return found


def fsdp1(rank: int) -> dict[str, Any]:
    """FSDP of the first version around an operated model, and before surgery."""
    found: dict[str, Any] = {}
    for own in (True, False):
        kept: dict[str, Any] = {"use_orig_params": own, "device_id": torch.device("cpu")}
        single = SUBJECT.moved(ranks="same")
        wrapped = FullyShardedDataParallel(SUBJECT.moved(ranks="same"), **kept)
        for name, model in (("single", single), ("wrapped", wrapped)):
            torch.manual_seed(3)
            out = model(SUBJECT.inputs())
            out.square().sum().backward()
            found[f"{own}.{name}"] = out.detach()
        found[f"{own}.sites"] = [site.parameter for site in dropconnect_sites(wrapped)]
        found[f"{own}.plain"] = dict(plain_state_dict(wrapped))
        late = FullyShardedDataParallel(SUBJECT.plain(), **kept)
        attempts: dict[str, Callable[[], object]] = {
            "strip": lambda model=wrapped: strip_dropconnect(model),
            "strip-inner": lambda model=wrapped: strip_dropconnect(model.module),
            "apply": lambda model=late: apply_dropconnect(model, "*linear1", p=0.5),
        }
        for name, attempt in attempts.items():
            try:
                attempt()
            except ValueError as error:
                found[f"{own}.{name}"] = str(error)
    return found


CASES = (
    ddp_independent,
    ddp_same,
    ddp_generator,
    ddp_state_dict,
    fsdp,
    fsdp_independent,
    fsdp_errors,
    fsdp_state_dict,
    plain_keys,
    fsdp_checkpointing,
    fsdp1,
    *mesh_cases.CASES,
)


def main() -> None:
    rank, store, result = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.save({case.__name__: case(rank) for case in CASES}, result)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
