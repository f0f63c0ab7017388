"""Tensor parallelism of transformers, FSDP2 of accelerate and Trainer, DeepSpeed's ZeRO-3, and FSDP2
around tensor parallelism: each a job of processes on the CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from surgery import apply_dropconnect, convert_checkpoint

from ..zoo.integers import net, step, train_a_little
from .conftest import run_ranks
from .mesh_options import SITES

WORKER = Path(__file__).with_name("libraries_worker.py")

pytestmark = pytest.mark.slow

State = dict[str, Tensor]


def run(folder: Path, monkeypatch: Any, case: str, ranks: int = 2, **names: str) -> list[Any]:
    """What each rank found in a case."""
    for name, value in {"CASES": case, "RANKS": str(ranks), **names}.items():
        monkeypatch.setenv(name, value)
    (folder / "checkpoints").mkdir()
    return [rank[case] for rank in run_ranks(WORKER, folder, ranks, patience=400)]


def assert_near(found: State, expected: State, rounding: float = 1e-5) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=rounding, atol=rounding), name


def assert_equal(found: State, expected: State) -> None:
    assert set(found) == set(expected)
    assert not [name for name, value in expected.items() if not torch.equal(found[name], value)]


def test_tensor_parallelism_of_transformers(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("transformers")
    for found in run(tmp_path, monkeypatch, "transformers_tensor_parallel"):
        for name in ("batch", "pretrained", "example"):
            assert_near(found[f"{name} cut"], found[f"{name} one"])
            kept = found[f"{name} one"]["model.layers.0.mlp.down_proj.weight"] != 0
            if name == "batch":
                assert 0.5 < kept.float().mean() < 0.7  # the masks act: p is 0.4
                same = found[f"{name} cut"]["model.layers.0.mlp.down_proj.weight"] != 0
                assert torch.equal(same, kept)
            for mode in ("sampled", "mean"):
                cut, one = found[f"{name} cut {mode}"], found[f"{name} one {mode}"]
                assert torch.allclose(cut, one, rtol=1e-5, atol=1e-5)
            for way in ("cut", "again", "spread"):
                assert_equal(found[f"{name} {way} state"], found[f"{name} one state"])
            assert found[f"{name} stripped"]
        assert "use bias=False" in found["bias"]


def test_fsdp2_of_accelerate(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    for found in run(tmp_path, monkeypatch, "accelerate_fsdp2"):
        assert found["class"].startswith("FSDP")
        assert_equal(found["loaded"], found["saved"])
        assert_equal(found["resumed"], found["second"])
        assert not torch.equal(
            found["second"]["model.norm.weight"], found["saved"]["model.norm.weight"]
        )
        plain = load_file(tmp_path / "checkpoints" / "accelerate" / "model.safetensors")
        expected = {
            name.removesuffix("_raw"): value
            for name, value in found["saved"].items()
            if not name.endswith("_anchor")
        }
        assert_equal(plain, expected)


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_fsdp2_of_trainer(tmp_path: Path, monkeypatch, kind: str) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    ranks = run(tmp_path, monkeypatch, "trainer_fsdp2", STATE_DICT_TYPE=kind)
    for rank, found in enumerate(ranks):
        assert_equal(found["again"], found["first"])
        assert found["sites"] == 14
        assert [one["dropconnect_p"] for one in found["history"] if "loss" in one] == [0.3] * 3
        folder = tmp_path / "checkpoints" / "trainer" / "checkpoint-3"
        if kind == "FULL_STATE_DICT":
            assert {"model.safetensors", "dropconnect.json"} <= set(found["files"])
            file = folder / "model.safetensors"
        else:  # as docs/many-processes.md says
            file = tmp_path / f"plain{rank}.safetensors"
            dcp_to_torch_save(folder / "pytorch_model_fsdp_0", file.with_suffix(".pt"))
            convert_checkpoint(file.with_suffix(".pt"), file, "surgery")
        expected = {
            name.removesuffix("_raw"): value
            for name, value in found["first"].items()
            if not name.endswith("_anchor")
        }
        assert_equal(load_file(file), expected)


def test_zero3_of_deepspeed(tmp_path: Path, monkeypatch) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    for found in run(tmp_path, monkeypatch, "deepspeed_zero3"):
        for name in ("batch", "pretrained", "input", "example", "gaussian", "stripped"):
            assert_equal(found[f"{name} zero"], found[f"{name} one"])
        for when in ("after", "inside"):
            assert "DeepSpeed ZeRO-3 holds the parameter" in found[when]
            assert "apply before deepspeed.initialize" in found[when]


def test_compiled(tmp_path: Path, monkeypatch) -> None:
    for found in run(tmp_path, monkeypatch, "compiled"):
        for toward in ("zero", "pretrained"):
            assert_equal(found[f"{toward} compiled"], found[f"{toward} eager"])


def test_replicas_differ_and_the_processes_of_one_do_not(tmp_path: Path, monkeypatch) -> None:
    ranks = run(tmp_path, monkeypatch, "replicas", ranks=4)
    for toward in ("zero", "pretrained"):
        model = apply_dropconnect(net(), SITES, p=0.5, toward=toward)
        train_a_little(model)
        expected = step(model)
        for found in ranks:
            assert_equal(found[f"same {toward}"], expected)
        outputs = [found[f"independent {toward}"]["output"] for found in ranks]
        assert torch.equal(outputs[0], expected["output"])
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[2], outputs[3])
        assert not torch.equal(outputs[0], outputs[2])
