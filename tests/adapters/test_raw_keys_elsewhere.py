"""Files with raw keys, and loaders that by themselves leave out keys which they do not know: they load
what is there, whatever of it the model drops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file
from torch import nn

from surgery import apply_dropconnect, plain_state_dict
from surgery.verbs.checkpoint import anchors
from surgery.verbs.raw_files import quiet


def make(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def operated(seed: int, *sites: str) -> nn.Module:
    return apply_dropconnect(make(seed), [*sites], p=0.3, toward="pretrained")


TAKES: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: make(2),
    "the same sites": lambda: operated(2, "0", "2"),
    "one of the two": lambda: operated(2, "0"),
    "one, toward zero": lambda: apply_dropconnect(make(2), "0", p=0.3),
}
"""What is loaded into."""
HAVE: dict[str, Callable[[], nn.Module]] = {
    "two": lambda: operated(1, "0", "2"),
    "one": lambda: operated(1, "2"),
    "none": lambda: make(1),
}
"""What was saved; "0" and "2" are what can be raw in it."""


def write(state: Any, folder: Path, form: str) -> Path:
    """A state dict as it is, in a file or in two with an index; returns what names it all."""
    state = {name: value.clone() for name, value in state.items()}
    with quiet():
        if form == "bin":
            torch.save(state, folder / "pytorch_model.bin")
            return folder / "pytorch_model.bin"
        if form == "safetensors":
            save_file(state, folder / "model.safetensors", {"format": "pt"})
            return folder / "model.safetensors"
        where = {name: f"part-{len(name) % 2}.safetensors" for name in state}
        for file in set(where.values()):
            part = {name: state[name] for name in state if where[name] == file}
            save_file(part, folder / file, {"format": "pt"})
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
        return index


def assert_loaded(model: nn.Module, source: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """All that `source` has; of the anchors that `model` has, those which were in the file."""
    wanted, found = plain_state_dict(source), plain_state_dict(model)
    assert list(found) == list(wanted)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    kept = {**before, **anchors(source)}
    for name, anchor in anchors(model).items():
        assert torch.equal(anchor, kept[name]), name


def own_anchors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in anchors(model).items()}


@pytest.mark.parametrize("have", HAVE)
@pytest.mark.parametrize("takes", TAKES)
class TestAccelerate:
    @pytest.mark.parametrize(
        ("form", "settings"),
        [
            ("safetensors", {"strict": True}),
            ("bin", {}),
            ("sharded", {}),
            ("sharded", {"device_map": {"": "cpu"}, "strict": True}),
        ],
        ids=["safetensors", "bin", "sharded", "device_map"],
    )
    def test_load_checkpoint_in_model(
        self, tmp_path: Path, form: str, settings: Any, takes: str, have: str
    ) -> None:
        accelerate = pytest.importorskip("accelerate")
        source, model = HAVE[have](), TAKES[takes]()
        before, file = own_anchors(model), write(source.state_dict(), tmp_path, form)
        accelerate.load_checkpoint_in_model(model, str(file), **settings)
        assert_loaded(model, source, before)

    def test_and_dispatch(self, tmp_path: Path, takes: str, have: str) -> None:
        accelerate = pytest.importorskip("accelerate")
        source, model = HAVE[have](), TAKES[takes]()
        before, file = own_anchors(model), write(source.state_dict(), tmp_path, "safetensors")
        where = {"0": "cpu", "1": "cpu", "2": "cpu"}
        accelerate.load_checkpoint_and_dispatch(model, str(file), device_map=where)
        assert_loaded(model, source, before)


@pytest.mark.parametrize("have", HAVE)
@pytest.mark.parametrize("takes", TAKES)
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_safetensors_load_model(tmp_path: Path, strict: bool, takes: str, have: str) -> None:
    source, model = HAVE[have](), TAKES[takes]()
    before, file = own_anchors(model), write(source.state_dict(), tmp_path, "safetensors")
    missing, unexpected = load_model(model, str(file), strict=strict)
    assert not missing
    assert not unexpected
    assert_loaded(model, source, before)


@pytest.mark.parametrize("have", HAVE)
@pytest.mark.parametrize("takes", TAKES)
@pytest.mark.parametrize("form", ["bin", "sharded"])
def test_hub_load_torch_model(tmp_path: Path, form: str, takes: str, have: str) -> None:
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("huggingface_hub.hub_mixin")
    source, model = HAVE[have](), TAKES[takes]()
    before = own_anchors(model)
    write(source.state_dict(), tmp_path, form)
    result = hub.load_torch_model(model, tmp_path, safe=form != "bin")
    assert not result.unexpected_keys
    assert_loaded(model, source, before)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_hub_mixin(tmp_path: Path, form: str) -> None:
    """From a folder, and as it reads a pickle that it has downloaded."""
    hub = pytest.importorskip("huggingface_hub")

    class Shared(nn.Sequential, hub.PyTorchModelHubMixin):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__(*make(2))

    source = operated(1, "0", "2")
    file = write(source.state_dict(), tmp_path, form)
    if form == "bin":
        assert_loaded(Shared._load_as_pickle(Shared(), str(file), "cpu", False), source, {})
    else:
        assert_loaded(Shared.from_pretrained(tmp_path), source, {})


@pytest.mark.parametrize("takes", TAKES)
def test_parts_of_transformers(tmp_path: Path, takes: str) -> None:
    from transformers.trainer_utils import load_sharded_checkpoint

    source, model = HAVE["two"](), TAKES[takes]()
    before = own_anchors(model)
    write(source.state_dict(), tmp_path, "sharded")
    result = load_sharded_checkpoint(model, tmp_path, strict=False)
    assert_loaded(model, source, before)
    if takes == "plain":  # Trainer would warn of weights that are missing
        assert result == ([], [])


def test_parts_of_transformers_say_what_is_missing(tmp_path: Path) -> None:
    from transformers.trainer_utils import load_sharded_checkpoint

    state = operated(1, "0").state_dict()
    state["other.weight_raw"] = state.pop("2.weight")
    write(state, tmp_path, "sharded")
    result = load_sharded_checkpoint(make(2), tmp_path, strict=False)
    assert result.missing_keys == ["2.weight"]
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        load_sharded_checkpoint(make(2), tmp_path)


def test_who_reads_a_file_by_hand_gets_what_is_in_it(tmp_path: Path) -> None:
    state = operated(1, "0").state_dict()
    assert set(load_file(write(state, tmp_path, "safetensors"))) == set(state)
    assert set(torch.load(write(state, tmp_path, "bin"))) == set(state)
    model = apply_dropconnect(make(2), "2", p=0.3)
    load_model(model, tmp_path / "model.safetensors")
    assert set(load_file(tmp_path / "model.safetensors")) == set(state)


class WithOwn(nn.Module):
    """A parameter of its own that is called as a raw one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.weight, self.weight_raw = (
                nn.Parameter(torch.randn(2)),
                nn.Parameter(torch.randn(2)),
            )


def test_names_of_the_models_own(tmp_path: Path) -> None:
    source, model = WithOwn(1), WithOwn(2)
    load_model(model, write(source.state_dict(), tmp_path, "safetensors"))
    assert_loaded(model, source, {})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_hub_save_torch_model(tmp_path: Path, safe: bool) -> None:
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("huggingface_hub.hub_mixin")
    model = operated(1, "0", "2")
    hub.save_torch_model(model, tmp_path, safe_serialization=safe)
    name = "model.safetensors" if safe else "pytorch_model.bin"
    stored = load_file(tmp_path / name) if safe else torch.load(tmp_path / name)
    assert set(stored) == set(make(1).state_dict())
    assert (tmp_path / "dropconnect.json").is_file()
