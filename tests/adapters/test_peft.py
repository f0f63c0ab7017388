"""PEFT: what "all-linear" takes of an adapted model, and that adapter files are plain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from surgery import apply_dropconnect, dropconnect_sites, plan_dropconnect
from surgery.checkpoint import PLAN_FILE

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def adapted(make: Any) -> Any:
    config = peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
    return peft.get_peft_model(make("bert"), config)


def test_all_linear_takes_base_layers_and_no_adapters(adapted: Any) -> None:
    names = [site.name for site in plan_dropconnect(adapted, "all-linear")]
    assert any(name.endswith("query.base_layer.weight") for name in names)
    assert not any("lora_" in name for name in names)


def test_adapter_file_is_plain(adapted: Any, make: Any, tmp_path: Path) -> None:
    apply_dropconnect(adapted, ["*.lora_A.*", "*.lora_B.*"], p=0.3)
    adapted.save_pretrained(tmp_path)
    assert not any("_raw" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert (tmp_path / PLAN_FILE).is_file()
    assert len(dropconnect_sites(adapted)) > 0
    loaded = peft.PeftModel.from_pretrained(make("bert"), tmp_path)
    saved = {n.replace("_raw", ""): p for n, p in adapted.named_parameters() if "lora_" in n}
    assert all(torch.equal(p, saved[n]) for n, p in loaded.named_parameters() if "lora_" in n)
