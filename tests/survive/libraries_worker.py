"""One rank of a job about libraries: `python libraries_worker.py RANK STORE RESULT`, with the cases in
the environment variable CASES, the number of ranks in RANKS, and a folder in CHECKPOINTS."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from surgery import (
    apply_dropconnect,
    dropconnect_sites,
    load_dropconnect,
    plain_state_dict,
    set_inference,
    strip_dropconnect,
)

sys.path.append(str(Path(__file__).parents[1] / "zoo"))  # after the installed packages
import integers  # type: ignore[import-not-found]

FOLDER = Path(os.environ.get("CHECKPOINTS", "."))
WORDS = torch.arange(32).view(4, 8)


def whole(value: Any) -> Tensor:
    found: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return found.detach().clone()


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape, **heads))


def trained(model: Any) -> dict[str, Tensor]:
    """The logits and the gradients of one step."""
    model.train().zero_grad()
    torch.manual_seed(3)
    out = model(input_ids=WORDS, labels=WORDS)
    out.loss.backward()
    grads = plain_state_dict(model, {name: p.grad for name, p in model.named_parameters()})
    return {"logits": whole(out.logits), **{name: whole(grad) for name, grad in grads.items()}}


def without_gradients(model: Any) -> Tensor:
    torch.manual_seed(5)
    with torch.no_grad():
        return whole(model(input_ids=WORDS).logits)


TP_OPTIONS: dict[str, dict[str, Any]] = {
    "batch": {},
    "pretrained": {"toward": "pretrained"},
    "example": {"sampling": "example"},
}


def transformers_tensor_parallel(rank: int) -> dict[str, Any]:
    """`from_pretrained(tp_plan="auto")`, against the model in one process."""
    from transformers import LlamaForCausalLM

    if rank == 0:
        llama().save_pretrained(FOLDER / "llama")
    dist.barrier()
    found: dict[str, Any] = {}
    for name, options in TP_OPTIONS.items():
        targets = ["all-linear"] if name == "example" else ["all-linear", "*embed_tokens"]
        models: dict[str, Any] = {
            "one": LlamaForCausalLM.from_pretrained(FOLDER / "llama"),
            "cut": LlamaForCausalLM.from_pretrained(FOLDER / "llama", tp_plan="auto"),
        }
        cut = models["cut"]
        before = dict(cut.named_parameters())
        forwards = {path: one.__dict__.get("forward") for path, one in cut.named_modules()}
        apply_dropconnect(models["one"], targets, p=0.4, ranks="same", **options)
        apply_dropconnect(cut, targets, p=0.4, **options)
        for way, model in models.items():
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.5)
            found[f"{name} {way}"] = trained(model)
            set_inference(model.eval(), "sample")
            found[f"{name} {way} sampled"] = without_gradients(model)
            set_inference(model, "mean")
            found[f"{name} {way} mean"] = without_gradients(model)
        cut.save_pretrained(FOLDER / f"tp {name}")
        dist.barrier()
        again = LlamaForCausalLM.from_pretrained(FOLDER / f"tp {name}")
        load_dropconnect(again, FOLDER / f"tp {name}")
        spread = LlamaForCausalLM.from_pretrained(FOLDER / f"tp {name}", tp_plan="auto")
        load_dropconnect(spread, FOLDER / f"tp {name}")
        for way, model in {**models, "again": again, "spread": spread}.items():
            found[f"{name} {way} state"] = {
                key: whole(value) for key, value in model.state_dict().items()
            }
        strip_dropconnect(cut)
        after = dict(cut.named_parameters())
        found[f"{name} stripped"] = (
            list(before) == list(after)
            and all(before[key] is after[key] for key in before)
            and all(one.__dict__.get("forward") is forwards[p] for p, one in cut.named_modules())
        )
    biased = LlamaForCausalLM.from_pretrained(FOLDER / "llama", tp_plan="auto")
    linear = biased.model.layers[0].mlp.down_proj
    linear.bias = nn.Parameter(torch.zeros(32))
    try:
        apply_dropconnect(biased, "*down_proj", p=0.5, bias=True)
    except ValueError as error:
        found["bias"] = str(error)
    return found


def use_fsdp_on_the_cpu() -> None:
    """accelerate uses FSDP on accelerators only; here that one check is taken out."""
    from accelerate import state
    from accelerate.utils import DistributedType

    init = state.AcceleratorState.__init__

    def as_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.AcceleratorState.__init__ = as_fsdp


def accelerate_fsdp2(rank: int) -> dict[str, Any]:
    """Two steps, `save_state` and `load_state`, `save_model`."""
    use_fsdp_on_the_cpu()
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model: Any = apply_dropconnect(llama(), "all-linear", p=0.3, toward="pretrained", ranks="same")
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    torch.manual_seed(3)

    def step() -> None:
        optimizer.zero_grad()
        accelerator.backward(model(input_ids=WORDS, labels=WORDS).loss)
        optimizer.step()

    step()
    accelerator.save_state(str(FOLDER / "state"))
    accelerator.save_model(model, str(FOLDER / "accelerate"))
    found: dict[str, Any] = {"class": type(model).__name__}
    found["saved"] = {name: whole(value) for name, value in model.state_dict().items()}
    step()
    found["second"] = {name: whole(value) for name, value in model.state_dict().items()}
    accelerator.load_state(str(FOLDER / "state"))
    found["loaded"] = {name: whole(value) for name, value in model.state_dict().items()}
    step()
    found["resumed"] = {name: whole(value) for name, value in model.state_dict().items()}
    return found


def trainer_fsdp2(rank: int) -> dict[str, Any]:
    """Three steps, and the last of them again from a checkpoint."""
    use_fsdp_on_the_cpu()
    from transformers import Trainer, TrainingArguments

    from surgery.adapters.transformers.callback import DropConnectCallback

    kind = os.environ["STATE_DICT_TYPE"]
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(128).view(16, 8) % 64]

    def run(resume: str | None) -> Any:
        model = apply_dropconnect(llama(), "all-linear", p=0.3, toward="pretrained")
        if resume is not None:
            with torch.no_grad():
                for tensor in model.state_dict().values():
                    tensor.zero_()
        arguments = TrainingArguments(
            str(FOLDER / "trainer"),
            use_cpu=True,
            fsdp=True,
            fsdp_config={
                "version": 2,
                "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
                "state_dict_type": kind,
            },
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            per_device_train_batch_size=4,
            max_steps=3,
            save_steps=1,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[DropConnectCallback()])
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    first = run(None)
    files = sorted(path.name for path in (FOLDER / "trainer" / "checkpoint-2").iterdir())
    dist.barrier()
    found = {"files": files, "history": first.state.log_history}
    found["first"] = {name: whole(v) for name, v in first.model.state_dict().items()}
    again = run(str(FOLDER / "trainer" / "checkpoint-2"))
    found["again"] = {name: whole(v) for name, v in again.model.state_dict().items()}
    found["sites"] = len(dropconnect_sites(again.model))
    return found


ZERO: dict[str, dict[str, Any]] = {
    "batch": {},
    "pretrained": {"toward": "pretrained"},
    "input": {"unit": "input"},
    "example": {"sampling": "example"},
    "gaussian": {"sampling": "gaussian"},
}


def deepspeed_zero3(rank: int) -> dict[str, Any]:
    """Partitioned parameters, against the model in one process."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }

    def engine_of(model: nn.Module) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]

    def step(model: Any, backward: Any) -> Tensor:
        torch.manual_seed(3)
        out: Tensor = model(integers.ids())
        backward((out * torch.arange(5)).sum())
        return out.detach()

    found: dict[str, Any] = {}
    for name, options in ZERO.items():
        targets = ["up", "down", "head"] + ["words"] * ("sampling" not in options)
        one, model = integers.net(), integers.net()
        for each in (one, model):
            apply_dropconnect(each, targets, p=0.5, ranks="same", **options)
            integers.train_a_little(each)
        engine = engine_of(model)
        found[f"{name} one"] = {"output": step(one, lambda loss: loss.backward())}
        found[f"{name} zero"] = {"output": step(engine, engine.backward)}
        found[f"{name} one"] |= {n: p.grad for n, p in one.named_parameters()}
        found[f"{name} zero"] |= {
            n: safe_get_full_grad(p).clone() for n, p in engine.module.named_parameters()
        }
    strip_dropconnect(engine.module)
    plain = strip_dropconnect(one)
    found["stripped one"], found["stripped zero"] = (
        {"output": step(each, lambda loss: None)} for each in (plain, engine)
    )
    late = engine_of(integers.net()).module
    with deepspeed.zero.Init(config_dict_or_path=settings):
        inside = integers.Net()
    for when, refused in (("after", late), ("inside", inside)):
        try:
            apply_dropconnect(refused, "up", p=0.5)
        except ValueError as error:
            found[when] = str(error)
    return found


def replicas(rank: int) -> dict[str, Any]:
    """FSDP2 over two replicas of two processes each, which share the weights."""
    from mesh_cases import SITES, cut  # type: ignore[import-not-found]
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    found: dict[str, Any] = {}
    for ranks in ("same", "independent"):
        for toward in ("zero", "pretrained"):
            model: Any = apply_dropconnect(integers.net(), SITES, p=0.5, ranks=ranks, toward=toward)
            cut(model, mesh["tp"])
            for child in model.children():
                fully_shard(child, mesh=mesh["dp"])
            fully_shard(model, mesh=mesh["dp"])
            integers.train_a_little(model)
            found[f"{ranks} {toward}"] = integers.step(model)
    return found


def compiled(rank: int) -> dict[str, Any]:
    """A model that is cut, compiled, against itself in eager mode."""
    from mesh_cases import LINEARS, cut

    found: dict[str, Any] = {}
    for toward in ("zero", "pretrained"):
        model = apply_dropconnect(cut(integers.net()), LINEARS, p=0.5, toward=toward)
        integers.train_a_little(model)
        found[f"{toward} eager"] = integers.step(model)
        model.compile(backend="aot_eager")
        found[f"{toward} compiled"] = integers.step(model)
    return found


def main() -> None:
    rank, store, result = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    world = os.environ["RANKS"]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world}
    os.environ |= {"LOCAL_WORLD_SIZE": world, "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if rank == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            store.with_suffix(".port").write_text(str(free.getsockname()[1]))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=int(world))
    dist.barrier()
    os.environ["MASTER_PORT"] = store.with_suffix(".port").read_text()
    cases = os.environ["CASES"].split(",")
    torch.save({case: globals()[case](rank) for case in cases}, result)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
