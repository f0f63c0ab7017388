"""diffusers: models and LoRA adapters of an operated model save plain, and what is raw loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from surgery import apply_dropconnect, dropconnect_sites, load_dropconnect, plain_state_dict
from surgery.spec.saved import PLAN_FILE
from surgery.verbs.checkpoint import anchors

diffusers = pytest.importorskip("diffusers")
diffusers.utils.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore:.*gets raw keys:UserWarning")  # files for loaders
TARGETS = ["*.to_q", "*.to_v"]
BASE = ["*.to_q.base_layer", "*.to_v"]
"""The same where `to_q` has an adapter."""


def make(seed: int = 0) -> Any:
    """A conditional UNet of one block."""
    torch.manual_seed(seed)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip


def operated(seed: int = 0) -> nn.Module:
    return apply_dropconnect(make(seed), TARGETS, p=0.3, toward="pretrained")


def own_copy(state: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.items()}


def assert_same(one: Any, other: Any) -> None:
    assert set(one) == set(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("settings", [{}, {"safe_serialization": False}, {"max_shard_size": "2KB"}])
def test_a_model_saves_plain(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = operated()
    model.save_pretrained(tmp_path, **settings)
    loaded = type(make()).from_pretrained(tmp_path)
    assert_same(loaded.state_dict(), plain_state_dict(model))
    load_dropconnect(loaded, tmp_path)
    assert dropconnect_sites(loaded) == dropconnect_sites(model)
    assert_same(anchors(loaded), anchors(model))


@pytest.mark.parametrize("fast", [True, False], ids=["meta", "low_cpu_mem_usage=False"])
@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded"])
def test_raw_keys_load(tmp_path: Path, form: str, fast: bool) -> None:
    """Nobody writes them who was taught; a loader that skips them would leave random weights."""
    plain, model = make(), operated()
    settings = {"max_shard_size": "2KB"} if form == "sharded" else {}
    plain.save_pretrained(tmp_path, safe_serialization=form != "bin", **settings)
    raw = own_copy(model.state_dict())
    if form == "bin":
        torch.save(raw, tmp_path / "diffusion_pytorch_model.bin")
    elif form == "safetensors":
        save_file(raw, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    else:
        index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
        text = index.read_text()
        for file in tmp_path.glob("*.safetensors"):
            part = load_file(file)
            renamed = {f"{k}_raw" if f"{k}_raw" in raw else k: v for k, v in part.items()}
            save_file(renamed, file, {"format": "pt"})
        for name in raw:
            text = text.replace(f'"{name.removesuffix("_raw")}"', f'"{name}"')
        index.write_text(text)
    loaded, info = type(plain).from_pretrained(
        tmp_path, low_cpu_mem_usage=fast, output_loading_info=True
    )
    assert (info["missing_keys"], info["unexpected_keys"]) == ([], [])
    assert_same(loaded.state_dict(), plain.state_dict())


@pytest.mark.parametrize("drops", ["base", "adapter"])
def test_lora(tmp_path: Path, drops: str) -> None:
    peft = pytest.importorskip("peft")

    def adapted(seed: int) -> nn.Module:
        model = make(seed)
        torch.manual_seed(seed)
        targets = ["to_q", "to_k"]
        model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        return model

    plain, model = adapted(1), adapted(1)
    apply_dropconnect(model, BASE if drops == "base" else ["*lora_A.default"], p=0.3)
    plain.save_lora_adapter(tmp_path / "plain")
    model.save_lora_adapter(tmp_path / "operated")
    file = "pytorch_lora_weights.safetensors"
    assert_same(load_file(tmp_path / "operated" / file), load_file(tmp_path / "plain" / file))
    assert (tmp_path / "operated" / PLAN_FILE).is_file()

    fresh = make(1)
    if drops == "base":
        apply_dropconnect(fresh, TARGETS, p=0.3)
    fresh.load_lora_adapter(
        tmp_path / "operated", prefix=None, adapter_name="default", weight_name=file
    )
    assert_same(plain_state_dict(fresh), plain.state_dict())
    assert bool(dropconnect_sites(fresh)) == (drops == "base")


def test_the_private_name() -> None:
    """adapters/diffusers stands on it, and on these arguments."""
    import inspect

    from diffusers.models.modeling_utils import ModelMixin

    load = inspect.signature(ModelMixin._load_pretrained_model)
    wanted = ["model", "state_dict", "resolved_model_file"]
    assert [*load.parameters][:3] == wanted
    assert "loaded_keys" in load.parameters
