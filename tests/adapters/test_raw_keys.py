"""A checkpoint with raw keys, which somebody wrote who was not taught: a plain model loads it, and
nothing is made anew in silence."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from surgery import apply_dropconnect, plain_state_dict, strip_dropconnect

pytestmark = pytest.mark.filterwarnings("ignore:.*gets raw keys:UserWarning")  # as it should

TARGETS = {
    "bert": ["all-linear"],
    "gpt2": ["all-linear", "*.wte"],  # tied
    "t5": ["all-linear", "shared"],  # tied three times
    "mixtral": [
        "*.self_attn.*",
        "*.gate_up_proj",
        "*.down_proj",
    ],  # files have each expert by itself
}


def own_copy(state: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.items()}


def assert_same(one: Any, other: Any) -> None:
    assert set(one) == set(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def write_raw(model: Any, folder: Path, form: str) -> None:
    """What `save_pretrained` would write, with the keys of the operated model."""
    state = own_copy(model.state_dict())
    model.config.save_pretrained(folder)
    if form == "bin":
        torch.save({**state}, folder / "pytorch_model.bin")
    elif form == "safetensors":
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    else:
        names = list(state)
        where = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
        for file in set(where.values()):
            part = {name: state[name] for name in names if where[name] == file}
            save_file(part, folder / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def loaded(kind: Any, folder: Any, **settings: Any) -> nn.Module:
    model, info = kind.from_pretrained(folder, output_loading_info=True, **settings)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "mixtral"])
def test_from_pretrained_of_a_folder(tiny: Any, tmp_path: Path, name: str, form: str) -> None:
    model = tiny(name)
    apply_dropconnect(model, TARGETS[name], p=0.3, toward="pretrained")
    write_raw(model, tmp_path, form)
    assert_same(loaded(type(tiny(name)), tmp_path).state_dict(), plain_state_dict(model))


ON_DISK = {"bert": "bert.encoder", "gpt2": "transformer.h", "mixtral": "model.layers"}


@pytest.mark.parametrize("form", ["safetensors", "sharded", "bin"])
@pytest.mark.parametrize("name", ON_DISK)
def test_parts_on_disk(tiny: Any, tmp_path: Path, name: str, form: str) -> None:
    """`device_map` with "disk": weights stay in the files, and are found there by their raw keys."""
    model = apply_dropconnect(tiny(name), TARGETS[name], p=0.3, toward="pretrained")
    write_raw(model, tmp_path, form)
    base, inside = ON_DISK[name].split(".")
    where = {key: "cpu" for key, _ in model.named_children() if key != base}
    where |= {f"{base}.{key}": "cpu" for key, _ in model.get_submodule(base).named_children()}
    where[f"{base}.{inside}"] = "disk"
    settings: dict[str, Any] = {"device_map": where, "experts_implementation": "eager"}
    model.config._experts_implementation = "eager"  # others want memory that is aligned
    if form == "bin":  # transformers writes what stays on disk anew
        settings["offload_folder"] = tmp_path / "offload"
    fresh = loaded(type(tiny(name)), tmp_path, **settings).eval()
    assert any(parameter.is_meta for parameter in fresh.parameters())
    ids = torch.arange(12).view(2, 6)
    expected = strip_dropconnect(model).eval()(input_ids=ids).logits
    assert torch.equal(fresh(input_ids=ids).logits, expected)


def test_the_loader_of_zero3(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code, without DeepSpeed: this process has all parameters."""
    from transformers.integrations import deepspeed

    whole = SimpleNamespace(GatheredParameters=lambda *args, **kwargs: nullcontext())
    place = SimpleNamespace(current_device_name=lambda: "cpu")
    accelerator = SimpleNamespace(get_accelerator=lambda: place)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=whole))
    monkeypatch.setitem(sys.modules, "deepspeed.accelerator", accelerator)
    monkeypatch.setattr(deepspeed, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *args, **kwargs: None)
    model = apply_dropconnect(tiny("bert"), "all-linear", p=0.3, toward="pretrained")
    with torch.no_grad():
        for value in model.parameters():
            value.normal_()
    fresh = tiny("bert")
    errors, missing = deepspeed._load_state_dict_into_zero3_model(fresh, model.state_dict())
    assert not errors
    assert not missing
    assert_same(fresh.state_dict(), plain_state_dict(model))


def test_from_pretrained_of_a_state_dict(tiny: Any) -> None:
    model = apply_dropconnect(tiny("bert"), "all-linear", p=0.3, toward="pretrained")
    settings = {"config": model.config, "state_dict": model.state_dict()}
    fresh = loaded(type(tiny("bert")), None, **settings)
    assert_same(fresh.state_dict(), plain_state_dict(model))


def test_another_prefix(tiny: Any, tmp_path: Path) -> None:
    """The base model from the files of one with a head."""
    model = apply_dropconnect(tiny("bert"), ["*.query", "*.key"], p=0.3)
    write_raw(model, tmp_path, "safetensors")
    base = transformers.AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    plain = plain_state_dict(model)
    for key, value in base.state_dict().items():
        assert torch.equal(value, plain[f"bert.{key}"]), key


class WithOwn(transformers.PreTrainedModel):
    """A parameter of its own that is called as a raw one, and a buffer as an anchor."""

    config_class = transformers.BertConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.ones(2))
        self.weight_raw = nn.Parameter(torch.ones(2))
        self.register_buffer("weight_anchor", torch.ones(2))
        self.post_init()


def test_names_of_the_models_own(tmp_path: Path) -> None:
    model = WithOwn(transformers.BertConfig())
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.randn(2))
    model.save_pretrained(tmp_path)
    assert_same(loaded(WithOwn, tmp_path).state_dict(), model.state_dict())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_adapter(tiny: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    model = peft.get_peft_model(tiny("bert"), config)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({f"{key}_raw": value for key, value in load_file(file).items()}, file)
    fresh = peft.PeftModel.from_pretrained(tiny("bert"), tmp_path)
    assert_same(fresh.state_dict(), model.state_dict())
