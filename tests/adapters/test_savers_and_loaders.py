"""What others write of an operated model is plain, and what they read lands in it, raw keys too."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

from surgery import (
    apply_dropconnect,
    dropconnect_sites,
    load_dropconnect,
    plain_state_dict,
    strip_dropconnect,
)
from surgery.verbs.checkpoint import anchors

accelerate = pytest.importorskip("accelerate")
SITES = ["embed", "first"]
pytestmark = pytest.mark.filterwarnings("ignore:.*gets raw keys:UserWarning")  # files for loaders


class Net(nn.Module):
    """A tied weight, a buffer, and weights by seed."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed, self.first = nn.Embedding(9, 4), nn.Linear(4, 4)
            self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Any) -> Any:
        return self.head(self.norm(self.first(self.embed(x))))


def operated(seed: int) -> Net:
    return apply_dropconnect(Net(seed), SITES, p=0.3, toward="pretrained")


def kept(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in anchors(model).items()}


def assert_same(one: Any, other: Any) -> None:
    assert set(one) == set(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def own_copy(state: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.items()}


def test_arguments_by_name(tiny: Any, tmp_path: Path) -> None:
    for model in (tiny("bert"), apply_dropconnect(tiny("bert"), "all-linear", p=0.3)):
        model.save_pretrained(save_directory=tmp_path)
        stored = load_file(tmp_path / "model.safetensors")
        assert_same(stored, plain_state_dict(model))
        assert model.resize_token_embeddings(new_num_tokens=101).num_embeddings == 101


@pytest.mark.parametrize("keys", ["plain", "raw"])
def test_safetensors_load_model(tmp_path: Path, keys: str) -> None:
    source, model, file = operated(1), operated(2), tmp_path / "model.safetensors"
    before = kept(model)
    if keys == "plain":
        save_model(Net(1), str(file))
    else:
        state = source.state_dict()
        shared = [name for name in state if name.startswith("head.")]
        save_file({name: state[name] for name in state if name not in shared}, file)
    assert load_model(model, file) == (set(), [])  # type: ignore[comparison-overlap]
    assert_same(plain_state_dict(model), plain_state_dict(source))
    assert_same(anchors(model), before if keys == "plain" else anchors(source))


def test_safetensors_save_model(tmp_path: Path) -> None:
    save_model(Net(1), str(tmp_path / "plain"))
    save_model(operated(1), str(tmp_path / "operated"))
    assert_same(load_file(tmp_path / "operated"), load_file(tmp_path / "plain"))


def test_a_damaged_file_is_the_loaders_error(tmp_path: Path) -> None:
    model, file = operated(1), tmp_path / "model.safetensors"
    file.write_bytes(b"nothing")
    before = own_copy(model.state_dict())
    with pytest.raises(safetensors.SafetensorError):
        load_model(model, file)
    assert_same(model.state_dict(), before)


def test_hub_mixin(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")

    class Shared(Net, hub.PyTorchModelHubMixin):  # type: ignore[name-defined]
        pass

    model = apply_dropconnect(Shared(seed=1), SITES, p=0.3, toward="pretrained")
    model.save_pretrained(tmp_path)
    loaded = Shared.from_pretrained(tmp_path, seed=2)
    assert_same(loaded.state_dict(), Net(1).state_dict())
    load_dropconnect(loaded, tmp_path)
    assert_same(anchors(loaded), anchors(model))


class TestAccelerate:
    @pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
    def test_save_model(self, tmp_path: Path, safe: bool) -> None:
        run = accelerate.Accelerator(cpu=True)
        run.save_model(operated(1), tmp_path, safe_serialization=safe)
        if safe:
            stored = load_file(tmp_path / "model.safetensors")
        else:
            stored = torch.load(tmp_path / "pytorch_model.bin")
        plain = Net(1).state_dict()
        assert set(plain) - set(stored) <= {"head.weight", "embed.weight"}
        assert_same(stored, {name: plain[name] for name in stored})
        assert_same(anchors(load_dropconnect(Net(2), tmp_path)), anchors(operated(1)))

    @pytest.mark.parametrize("keys", ["plain", "raw"])
    @pytest.mark.parametrize("device_map", [None, {"": "cpu"}], ids=["", "device_map"])
    @pytest.mark.parametrize("form", ["safetensors", "bin", "sharded"])
    def test_load_checkpoint(self, tmp_path: Path, form: str, device_map: Any, keys: str) -> None:
        source = operated(1) if keys == "raw" else Net(1)
        state, model = own_copy(source.state_dict()), operated(2)
        if form == "bin":
            torch.save(state, tmp_path / "pytorch_model.bin")
        elif form == "safetensors":
            save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
        else:
            write_shards(state, tmp_path)
        before = kept(model)
        accelerate.load_checkpoint_in_model(model, tmp_path, device_map=device_map)
        assert_same(plain_state_dict(model), Net(1).state_dict())
        assert model.head.weight is model.embed.weight
        assert_same(anchors(model), before if keys == "plain" else anchors(source))

    @pytest.mark.filterwarnings("error")
    def test_state_of_a_run(self, tmp_path: Path) -> None:
        """Of use to the run alone: raw keys, anchors with them."""
        run = accelerate.Accelerator(cpu=True)
        model = run.prepare(operated(1))
        run.save_state(tmp_path)
        before = own_copy(model.state_dict())
        for value in (*model.parameters(), *model.buffers()):
            value.data += 1
        run.load_state(tmp_path)
        assert_same(model.state_dict(), before)

    @pytest.mark.parametrize("sites", [[], ["first"]], ids=["plain", "fewer"])
    def test_a_run_is_not_resumed_without_its_sites(self, tmp_path: Path, sites: list[str]) -> None:
        run = accelerate.Accelerator(cpu=True)
        run.prepare(operated(1))
        run.save_state(tmp_path)
        other, model = accelerate.Accelerator(cpu=True), Net(2)
        if sites:
            apply_dropconnect(model, sites, p=0.3, toward="pretrained")
        other.prepare(model)
        with pytest.raises(RuntimeError, match=r"embed\.weight_raw"):
            other.load_state(tmp_path)


def write_shards(state: dict[str, torch.Tensor], folder: Path) -> None:
    """One file for each of two halves, and the index."""
    names = list(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: state[name] for name in part}, folder / file, {"format": "pt"})
    where = {name: file for file, part in halves.items() for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("keys", ["plain", "raw"])
def test_sharded_checkpoint_of_transformers(tmp_path: Path, keys: str) -> None:
    from transformers.trainer_utils import load_sharded_checkpoint

    source, model = operated(1) if keys == "raw" else Net(1), operated(2)
    write_shards(own_copy(source.state_dict()), tmp_path)
    result = load_sharded_checkpoint(model, tmp_path, strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same(plain_state_dict(model), Net(1).state_dict())


def test_sentence_transformers(tmp_path: Path) -> None:
    """Modules that write their own state dict, and names of the whole model in the plan."""
    library = pytest.importorskip("sentence_transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")
    modules = library.sentence_transformer.modules
    embed = modules.StaticEmbedding(tokenizers.Tokenizer(words), embedding_dim=8)
    model = library.SentenceTransformer(modules=[embed, modules.Dense(8, 4)], device="cpu")
    plain = copy.deepcopy(model)
    apply_dropconnect(model, ["0.embedding.weight", "1.linear"], p=0.3, toward="pretrained")
    model.save_pretrained(str(tmp_path))
    loaded = library.SentenceTransformer(str(tmp_path), device="cpu")
    assert_same(loaded.state_dict(), plain.state_dict())
    load_dropconnect(loaded, tmp_path)
    assert dropconnect_sites(loaded) == dropconnect_sites(model)
    assert_same(anchors(loaded), anchors(model))


@pytest.mark.parametrize("first", ["apply", "average"])
def test_averaged_model(first: str) -> None:
    """The average of parameters, whichever of the two copies is operated on when it is made."""
    model = Net(1)
    if first == "apply":
        apply_dropconnect(model, SITES, p=0.3, toward="pretrained")
    average = AveragedModel(model, use_buffers=True)
    if first == "average":
        apply_dropconnect(model, SITES, p=0.3)
    average.update_parameters(model)
    for parameter in model.parameters():
        parameter.data += 2
    average.update_parameters(model)
    plain = AveragedModel(Net(1)).state_dict()
    found = plain_state_dict(average)
    assert list(found) == list(plain)
    for name in ("module.embed.weight", "module.first.weight", "module.first.bias"):
        assert torch.allclose(found[name], plain[name] + 1)
    average.load_state_dict(plain)
    if first == "apply":
        strip_dropconnect(average)
    assert_same(average.state_dict(), plain)


@pytest.mark.parametrize("give", [lambda m: m.parameters(), lambda m: m.named_parameters()])
def test_optimizer_state_of_the_plain_model(give: Callable[[nn.Module], Any]) -> None:
    """By position, with and without names: an optimizer's state is the plain model's."""
    plain, model = Net(1), operated(1)
    trained = torch.optim.AdamW(give(plain), lr=0.1)
    plain(torch.arange(8)).square().sum().backward()
    trained.step()
    resumed = torch.optim.AdamW(give(model), lr=0.1)
    resumed.load_state_dict(trained.state_dict())
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        assert torch.equal(resumed.state[ours]["exp_avg"], trained.state[theirs]["exp_avg"])
