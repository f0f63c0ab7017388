"""Masks made permanent in files: the bits of `bake_dropconnect`, and DARE."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from surgery import (
    NoMatchError,
    SurgeryError,
    apply_dropconnect,
    bake_checkpoint,
    bake_dropconnect,
    save_dropconnect,
)
from surgery.checkpoints.copies import copies
from surgery.checkpoints.weights import WrongUse, read_weights
from surgery.verbs.bake import baked_key

from ..expected import keep, masked
from .raw import expected, names, operated, read, same, write


@pytest.mark.parametrize("toward", ["zero", "pretrained"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_raw_file_is_baked_as_its_model_is(shards: int, toward: str, tmp_path: Path) -> None:
    model = operated(toward)
    folder = write(model, tmp_path / "raw", shards)
    done = bake_checkpoint(folder, tmp_path / "out", seed=7)
    bake_dropconnect(model, seed=7)
    found = read(tmp_path / "out")
    assert same(found, expected(model))
    assert done.seed == 7
    assert len(done.baked) == 4
    assert done.tensors == len(found)
    assert "config.json" in names(tmp_path / "out")
    assert "dropconnect.json" not in names(tmp_path / "out")


@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_a_plain_file_with_its_plan_too(toward: str, tmp_path: Path) -> None:
    """As `save_pretrained` writes them: the anchors lie in a file of their own."""
    model = operated(toward)
    save_dropconnect(model, tmp_path / "in")
    save_file(expected(model), tmp_path / "in" / "model.safetensors")
    bake_checkpoint(tmp_path / "in", tmp_path / "out", seed=7)
    bake_dropconnect(model, seed=7)
    assert same(read(tmp_path / "out"), expected(model))


def pair(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], ...]:
    """A pretrained checkpoint, and one that was fine-tuned from it and has a new head."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20)).to(dtype)
    pretrained = {key: value.clone() for key, value in model.state_dict().items()}
    tuned = {key: value + 0.1 * torch.randn_like(value) for key, value in pretrained.items()}
    tuned |= {"score.weight": torch.ones(2, 20, dtype=dtype), "step": torch.tensor(9)}
    for name, tensors in (("pretrained", pretrained), ("tuned", tuned)):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
    return pretrained, tuned


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dare_is_the_formula(dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit as the library rounds it, and up to that as the paper writes it: of the delta, drop
    a part and divide the rest by 1 - p."""
    pretrained, tuned = pair(tmp_path, dtype)
    p = 0.75
    done = bake_checkpoint(
        tmp_path / "tuned", tmp_path / "out", seed=1, toward=tmp_path / "pretrained", p=p
    )
    assert done.unlike == ("score.weight",)
    assert set(done.baked) == set(pretrained)
    found = read(tmp_path / "out")
    assert found.keys() == tuned.keys()
    for key in pretrained:
        weight, anchor = tuned[key], pretrained[key]
        mask = keep(baked_key(1, key), p, *weight.shape)
        assert torch.equal(found[key], masked(weight, mask, p, anchor))
        delta = weight.double() - anchor.double()
        paper = anchor.double() + mask * delta / (1 - p)
        ulp = torch.finfo(dtype).eps if dtype != torch.bfloat16 else 2**-7
        assert (found[key].double() - paper).abs().max() < 16 * ulp * weight.abs().max().double()
        assert torch.equal(found[key][mask == 0], anchor[mask == 0])
    for key in ("score.weight", "step"):
        assert torch.equal(found[key], tuned[key])


def test_dare_of_the_model_and_of_the_files_are_one(tmp_path: Path) -> None:
    pretrained, tuned = pair(tmp_path)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    model.load_state_dict(pretrained)
    apply_dropconnect(model, nn.Linear, p=0.9, toward="pretrained", bias=True)
    model.load_state_dict({key: tuned[key] for key in pretrained})
    bake_dropconnect(model, seed=4)
    bake_checkpoint(tmp_path / "tuned", tmp_path / "o", 4, toward=tmp_path / "pretrained", p=0.9)
    found = read(tmp_path / "o")
    assert same({key: found[key] for key in pretrained}, dict(model.state_dict()))


def test_the_mean_over_seeds_is_the_fine_tuned_checkpoint(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # it would take most of the time
    pretrained, tuned = pair(tmp_path)
    p, count, key = 0.5, 150, "0.weight"
    total, out = torch.zeros(30, 40), tmp_path / "out.safetensors"
    for seed in range(count):
        source, toward = tmp_path / "tuned", tmp_path / "pretrained"
        bake_checkpoint(source, out, seed, toward=toward, p=p, targets=key)
        total += load_file(out)[key]
        out.unlink()
    error = (tuned[key] - pretrained[key]).abs() * (p / (1 - p) / count) ** 0.5
    z = (total / count - tuned[key]) / error
    assert z.abs().max() < 5
    assert 0.9 < z.std() < 1.1


def test_patterns_choose_keys(tmp_path: Path) -> None:
    _, tuned = pair(tmp_path)
    out = tmp_path / "out"
    done = bake_checkpoint(
        tmp_path / "tuned", out, 0, p=1.0, targets=["*.weight", "re:0.*"], exclude="1.*"
    )
    found = read(out)
    assert set(done.baked) == {"0.weight", "0.bias", "score.weight"}
    for key in tuned:
        assert torch.equal(found[key], tuned[key] * (0 if key in done.baked else 1))


def test_a_seed_is_drawn_and_told(tmp_path: Path) -> None:
    pair(tmp_path)
    first = bake_checkpoint(tmp_path / "tuned", tmp_path / "a", p=0.5)
    other = bake_checkpoint(tmp_path / "tuned", tmp_path / "b", p=0.5)
    again = bake_checkpoint(tmp_path / "tuned", tmp_path / "c", first.seed, p=0.5)
    assert first.seed == again.seed != other.seed
    assert same(read(tmp_path / "a"), read(tmp_path / "c"))
    assert not same(read(tmp_path / "a"), read(tmp_path / "b"))


def plain_model() -> dict[str, Tensor]:
    """Weights of all sorts, the embedding stored twice, as a tied head is by `torch.save`."""
    torch.manual_seed(5)
    words = torch.randn(50, 8)
    return {
        "embed.weight": words,
        "norm.weight": torch.ones(8),
        "norm.bias": torch.zeros(8),
        "bn.running_mean": torch.randn(8),
        "bn.running_var": torch.rand(8),
        "fc.weight": torch.randn(8, 8),
        "fc.bias": torch.randn(8),
        "conv.weight": torch.randn(3, 8, 2, 2),
        "ids": torch.arange(8).view(2, 4),
        "head.weight": words.clone(),
    }


WITH_DIMENSIONS = {"embed.weight", "fc.weight", "conv.weight", "head.weight"}


def test_without_targets_neither_biases_nor_norms_are_masked(tmp_path: Path) -> None:
    """As `apply_dropconnect` does by default."""
    state = plain_model()
    save_file(state, tmp_path / "in.safetensors")
    done = bake_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors", 2, p=0.5)
    found = load_file(tmp_path / "out.safetensors")
    assert set(done.baked) == WITH_DIMENSIONS
    for key, value in state.items():
        assert torch.equal(found[key], value) == (key not in done.baked)
    targets = ["fc.bias", "norm.*"]
    done = bake_checkpoint(
        tmp_path / "in.safetensors", tmp_path / "some.safetensors", 2, p=0.5, targets=targets
    )
    assert set(done.baked) == {"fc.bias", "norm.weight", "norm.bias"}


def test_dare_masks_all_parameters_and_no_statistics(tmp_path: Path) -> None:
    state = plain_model()
    save_file(state, tmp_path / "before.safetensors")
    tuned = {key: value + 1 for key, value in state.items()}
    save_file(tuned, tmp_path / "in.safetensors")
    out, toward = tmp_path / "out.safetensors", tmp_path / "before.safetensors"
    done = bake_checkpoint(tmp_path / "in.safetensors", out, 2, p=0.5, toward=toward)
    assert set(done.baked) == WITH_DIMENSIONS | {"norm.weight", "norm.bias", "fc.bias"}
    found = load_file(out)
    for key in ("bn.running_mean", "bn.running_var", "ids"):
        assert torch.equal(found[key], tuned[key])
    for key in done.baked:
        site = "embed.weight" if key == "head.weight" else key
        mask = keep(baked_key(2, site), 0.5, *state[key].shape)
        assert torch.equal(found[key], masked(tuned[key], mask, 0.5, state[key]))


def test_a_new_bias_of_zeros_is_no_copy_of_another(tmp_path: Path) -> None:
    """Else it would go toward what that one was."""
    save_file({"fc.bias": torch.ones(4)}, tmp_path / "before.safetensors")
    save_file({"fc.bias": torch.zeros(4), "new.bias": torch.zeros(4)}, tmp_path / "in.safetensors")
    out, toward = tmp_path / "out.safetensors", tmp_path / "before.safetensors"
    done = bake_checkpoint(tmp_path / "in.safetensors", out, 2, p=1.0, toward=toward)
    assert (done.baked, done.unlike) == (("fc.bias",), ("new.bias",))
    found = load_file(out)
    assert torch.equal(found["fc.bias"], torch.ones(4))
    assert torch.equal(found["new.bias"], torch.zeros(4))


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("toward", [None, "both", "embed.weight", "head.weight"])
@pytest.mark.parametrize("targets", [None, "embed.*", "head.*", "*.weight"])
def test_what_is_stored_twice_stays_equal(
    shards: int, toward: str | None, targets: str | None, tmp_path: Path
) -> None:
    state = plain_model()
    before = {key: value * 0.5 for key, value in state.items() if value.is_floating_point()}
    if toward not in (None, "both"):
        del before[{"embed.weight": "head.weight", "head.weight": "embed.weight"}[toward]]
    save_file(before, tmp_path / "before.safetensors")
    source = tmp_path / "in"
    source.mkdir()
    weight_map = {}
    for number, keys in enumerate([[*state]] if shards == 1 else [[*state][:5], [*state][5:]]):
        name = f"model-{number}.safetensors"
        save_file({key: state[key] for key in keys}, source / name)
        weight_map |= dict.fromkeys(keys, name)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    options: dict[str, Any] = {"p": 0.5, "targets": targets}
    if toward is not None:
        options["toward"] = tmp_path / "before.safetensors"
    done = bake_checkpoint(source, tmp_path / "out", 2, **options)
    found = read(tmp_path / "out")
    assert {"embed.weight", "head.weight"} <= set(done.baked)
    assert torch.equal(found["embed.weight"], found["head.weight"])
    mask = keep(baked_key(2, "embed.weight"), 0.5, 50, 8)
    anchor = None if toward is None else state["embed.weight"] * 0.5
    assert torch.equal(found["head.weight"], masked(state["head.weight"], mask, 0.5, anchor))
    assert done.unlike == ()


def test_a_part_of_a_tied_weight_cannot_be_excluded(tmp_path: Path) -> None:
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(plain_model(), source)
    words = r"'head\.weight' is excluded, and 'embed\.weight'.* \(a tied weight\).* both or none"
    for targets in (None, "embed.*"):
        with pytest.raises(SurgeryError, match=words):
            bake_checkpoint(source, out, 0, p=0.5, targets=targets, exclude="head.*")
        assert not out.exists()
    exclude = ["head.*", "embed.*"]
    assert set(bake_checkpoint(source, out, 0, p=0.5, exclude=exclude).baked) == {
        "fc.weight",
        "conv.weight",
    }


def test_the_users_of_a_tied_weight_that_do_not_drop_are_baked_too(tmp_path: Path) -> None:
    """As in the model, in which the weight is one."""
    model = nn.ModuleDict({"embed": nn.Embedding(50, 8), "head": nn.Linear(8, 50, bias=False)})
    model["head"].weight = model["embed"].weight
    apply_dropconnect(model, [nn.Embedding, nn.Linear], p=0.5, exclude="head")
    save_dropconnect(model, tmp_path)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert set(state) == {"embed.weight_raw", "head.weight"}
    save_file(state, tmp_path / "model.safetensors")
    done = bake_checkpoint(tmp_path, tmp_path / "out", seed=7)
    bake_dropconnect(model, seed=7)
    assert same(read(tmp_path / "out"), dict(model.state_dict()))
    assert set(done.baked) == {"embed.weight", "head.weight"}


def test_copies_are_told_by_all_their_bytes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("surgery.checkpoints.copies._BEGIN", 8)
    monkeypatch.setattr("surgery.checkpoints.copies.BLOCK", 16)
    one = torch.arange(12.0)
    state = {"a": one, "b": one.clone(), "c": one.view(3, 4).clone(), "d": one.int()}
    state |= {"e": torch.cat([one[:11], one[:1]]), "f": one.clone(), "g": torch.zeros(0)}
    state |= {"h": torch.zeros(0), "ones": torch.ones(9), "more ones": torch.ones(9)}
    state |= {"near": torch.tensor([1.0, 1, 1, 1, 2]), "too": torch.tensor([1.0, 1, 1, 1, 2])}
    save_file(state, tmp_path / "in.safetensors")
    assert copies(read_weights(tmp_path / "in.safetensors")) == {
        "b": "a",
        "f": "a",
        "too": "near",
    }


def test_what_cannot_be_baked_is_refused(tmp_path: Path) -> None:
    pair(tmp_path)
    tuned, pretrained, out = tmp_path / "tuned", tmp_path / "pretrained", tmp_path / "out"
    small = tmp_path / "small.safetensors"
    save_file({"0.weight": torch.ones(2, 2)}, small)
    for words, kind, options in (
        ("there is no dropconnect.json beside", WrongUse, {}),
        ("need p; without it, the plan says all that", WrongUse, {"toward": pretrained}),
        ("'x.*' matches no key; the first key is", NoMatchError, {"p": 0.5, "targets": "x.*"}),
        ("'x.*' matches no key", NoMatchError, {"p": 0.5, "exclude": "x.*"}),
        ("no weight is left", NoMatchError, {"p": 0.5, "exclude": "*"}),
        ("'step' is I64; only F64", SurgeryError, {"p": 0.5, "targets": "step"}),
        ("its anchor F32", SurgeryError, {"p": 0.5, "toward": small}),
        ("toward has no 'score.weight'", SurgeryError,
         {"p": 0.5, "toward": pretrained, "targets": "score.*"}),
        ("p is the probability", ValueError, {"p": 1.5}),
        ("there is no", WrongUse, {"p": 0.5, "toward": tmp_path / "none"}),
    ):  # fmt: skip
        with pytest.raises(kind, match=words):
            bake_checkpoint(tuned, out, 0, **options)
        assert not out.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"unit": "output"}, "unit='output', for which its module is needed"),
        ({"sampling": "gaussian"}, "sampling='gaussian', for which its module is needed"),
    ],
)
def test_sites_that_need_their_module(options: dict, words: str, tmp_path: Path) -> None:
    model = apply_dropconnect(nn.Sequential(nn.Linear(4, 4)), "0", **options)
    with pytest.raises(SurgeryError, match=words):
        bake_checkpoint(write(model, tmp_path / "raw"), tmp_path / "out", 0)


def test_anchors_that_are_damaged_or_gone(tmp_path: Path) -> None:
    model = operated()
    save_dropconnect(model, tmp_path / "in")
    save_file(expected(model), tmp_path / "in" / "model.safetensors")
    (path,) = (tmp_path / "in").glob("dropconnect_anchors-*")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(SurgeryError, match=r"its content does not match dropconnect\.json"):
        bake_checkpoint(tmp_path / "in", tmp_path / "out", 0)
    path.unlink()
    with pytest.raises((OSError, SurgeryError), match="dropconnect_anchors"):
        bake_checkpoint(tmp_path / "in", tmp_path / "out", 0)


def test_a_plan_of_another_model(tmp_path: Path) -> None:
    save_dropconnect(operated(), tmp_path)
    tensors = {key: value for key, value in expected(operated()).items() if "fc" not in key}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SurgeryError, match=r"the plan has 'fc.weight', of which .* has no weight"):
        bake_checkpoint(tmp_path, tmp_path / "out", 0)
