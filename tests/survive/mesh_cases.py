"""Cases of `distributed_worker.py` about tensor parallelism and checkpoints that processes share."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import columns  # type: ignore[import-not-found]
import torch
from integers import (  # type: ignore[import-not-found]
    ids,
    net,
    step,
    train_a_little,
    whole,
)
from mesh_options import LINEARS, OPTIONS, SAMPLINGS, SITES  # type: ignore[import-not-found]
from torch import nn
from torch.distributed.checkpoint.state_dict import set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from surgery import (
    apply_dropconnect,
    hold_masks,
    load_dropconnect,
    mc_predict,
    plain_state_dict,
    save_dropconnect,
    set_inference,
    strip_dropconnect,
)


def targets(sampling: str) -> list[str]:
    return SITES if sampling == "batch" else LINEARS


def cut(model: nn.Module, mesh: Any = None) -> nn.Module:
    """Outputs of `up` and inputs of `down`; words by their numbers; the head stays whole."""
    mesh = init_device_mesh("cpu", (2,)) if mesh is None else mesh
    plan = {
        "words": RowwiseParallel(input_layouts=Replicate()),
        "up": ColwiseParallel(use_local_output=False),
        "down": RowwiseParallel(),
    }
    return parallelize_module(model, mesh, plan)


def tensor_parallel(rank: int) -> dict[str, Any]:
    """Every option, surgery before and after the model is cut; ranks draw alike by themselves."""
    found: dict[str, Any] = {}
    for sampling, how in SAMPLINGS.items():
        for name, options in OPTIONS.items():
            for order in ("before", "after"):
                model: nn.Module = net()
                if order == "after":
                    cut(model)
                apply_dropconnect(model, targets(sampling), p=0.5, **how, **options)
                if order == "before":
                    cut(model)
                train_a_little(model)
                found[f"{sampling} {name} {order}"] = step(model)
    return found


def sequence_parallel(rank: int) -> dict[str, Any]:
    """Sequences are cut between `down` and the head; the head's weight is cut too, or it is whole."""
    found: dict[str, Any] = {}
    heads = {
        "batch": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        "example": SequenceParallel(use_local_output=False),
    }
    for sampling, head in heads.items():
        model = apply_dropconnect(net(), LINEARS, p=0.5, **SAMPLINGS[sampling])
        plan = {
            "up": ColwiseParallel(use_local_output=False),
            "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
            "head": head,
        }
        parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
        found[sampling] = step(model)
    return found


def other_layers(rank: int) -> dict[str, Any]:
    """Weights that are stored in x out, and those of experts, cut by hand along each dimension."""
    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {}
    for case, (_, options) in columns.CASES.items():
        for dim in columns.CUTS:
            module = columns.built(case)
            if dim is not None and dim >= next(module.parameters()).ndim:
                continue
            for name, parameter in list(module.named_parameters()):
                cut_here = dim if name != "bias" else (0 if dim == 1 else None)
                placement: Any = Replicate() if cut_here is None else Shard(cut_here)
                shared = distribute_tensor(parameter.detach(), mesh, [placement])
                setattr(module, name, nn.Parameter(shared))
            apply_dropconnect(module, columns.targets(case), p=0.5, **options)
            train_a_little(module)
            x = distribute_tensor(columns.inputs(), mesh, [Replicate()])
            found[f"{case} {dim}"] = columns.passed(module, x)
    return found


def around_shards(rank: int) -> dict[str, Any]:
    """What else is done with a model that is cut."""
    plain = cut(net())
    before = dict(plain.named_parameters())
    operated = apply_dropconnect(plain, SITES, p=0.5, toward="pretrained")
    first = step(operated)["output"]
    torch.manual_seed(3)
    with torch.no_grad(), hold_masks(operated):
        held = [whole(operated(ids())) for _ in range(2)]
    set_inference(operated.eval(), "sample")
    torch.manual_seed(3)
    with torch.no_grad():
        sampled = whole(operated(ids()))
    predicted = mc_predict(operated, ids(), samples=3, seed=5).mean
    set_inference(operated, "mean")
    mean = whole(operated(ids()))
    raw_keys = list(operated.state_dict())
    strip_dropconnect(operated)
    after = dict(operated.named_parameters())
    return {
        "first": first,
        "held": held,
        "sampled": sampled,
        "predicted": whole(predicted),
        "mean": mean,
        "raw keys": raw_keys,
        "same": list(before) == list(after) and all(before[n] is after[n] for n in before),
        "classes": [type(module).__name__ for module in operated.modules()],
    }


def shard_errors(rank: int) -> dict[str, Any]:
    """What is refused, by name; and ranks that are seeded differently."""
    found: dict[str, Any] = {}
    late = apply_dropconnect(net(), "up", p=0.5, sampling="gaussian")
    moments = apply_dropconnect(net(), "up", p=0.5, inference="moments").eval()
    apart = cut(apply_dropconnect(net(), LINEARS, p=0.5))

    def seeded_apart() -> None:
        torch.manual_seed(rank)
        apart(ids())

    attempts: dict[str, Callable[[], object]] = {
        "gaussian at apply": lambda: apply_dropconnect(cut(net()), "up", sampling="gaussian"),
        "moments at apply": lambda: apply_dropconnect(cut(net()), "down", inference="moments"),
        "gaussian in forward": lambda: cut(late)(ids()),
        "moments in forward": lambda: cut(moments)(ids()),
        "seeds": seeded_apart,
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except (ValueError, RuntimeError) as error:
            found[name] = str(error)
    return found


def spread_models() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """The ways in which processes share a model."""
    mesh = init_device_mesh("cpu", (2,))
    return {"ddp": DistributedDataParallel, "fsdp": partial(_sharded, mesh=mesh), "tp": cut}


def _sharded(model: nn.Module, mesh: Any) -> nn.Module:
    fully_shard(model, mesh=mesh)
    return model


def trained(model: nn.Module) -> torch.optim.Optimizer:
    """One step, with momentum: after a second, sums would be rounded."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    step(model)
    optimizer.step()
    return optimizer


def sharded_checkpoints(rank: int) -> dict[str, Any]:
    """Write what two processes share, and read what one process wrote (`FOLDER/one/...`)."""
    from surgery.adapters.distributed import get_plain_state_dict

    folder = Path(os.environ["CHECKPOINTS"])
    found: dict[str, Any] = {}
    for way, spread in spread_models().items():
        given: dict[str, Any] = {"p": 0.5, "toward": "pretrained", "ranks": "same"}
        model = spread(apply_dropconnect(net(), SITES, **given))
        of_model, of_optimizer = get_plain_state_dict(model, trained(model))
        save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder / way)
        if way == "tp" or rank == 0:
            save_dropconnect(getattr(model, "module", model), folder / way)
        found[f"{way} keys"] = list(of_model)
        for reader in ("operated", "plain"):
            again: nn.Module = net()
            if reader == "operated":
                load_dropconnect(again, folder / "one")
            again = spread(again)
            optimizer = torch.optim.SGD(again.parameters(), lr=0.5, momentum=0.5)
            step(again)
            optimizer.step()  # so that it has a state to be overwritten
            state, optim = get_plain_state_dict(again, optimizer)
            load({"model": state, "optimizer": optim}, checkpoint_id=folder / "one")
            set_state_dict(again, optimizer, model_state_dict=state, optim_state_dict=optim)
            inner = getattr(again, "module", again)
            found[f"{way} {reader}"] = {
                **{name: whole(value) for name, value in plain_state_dict(inner).items()},
                **{name: whole(one) for name, one in inner.named_buffers()},
                **{
                    f"momentum.{name}": whole(optimizer.state[one]["momentum_buffer"])
                    for name, one in plain_state_dict(inner, dict(inner.named_parameters())).items()
                },
            }
    return found


CASES = (
    tensor_parallel,
    sequence_parallel,
    other_layers,
    around_shards,
    shard_errors,
    sharded_checkpoints,
)
