"""Raw and plain keys, strictly, with `assign`, and from the meta device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from surgery import apply_dropconnect, plain_state_dict, raw_state_dict, strip_dropconnect

from ..steps import anchor, assert_drops, assert_same, raw, step_gradients, tensors
from ..zoo.subjects import BY_NAME, Subject


def other_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict like the model's, with other values in it."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in model.state_dict().items()
    }


def test_keys_are_raw_in_the_plain_order(subject: Subject) -> None:
    plain, operated = subject.plain().state_dict(), subject.operated().state_dict()
    renamed = {raw(site): site for site in subject.sites}
    assert [renamed.get(key, key) for key in operated] == list(plain)
    assert set(renamed) <= set(operated)


def test_plain_state_dict_is_the_plain_models(subject: Subject) -> None:
    assert_same(plain_state_dict(subject.operated()), dict(subject.plain().state_dict()))


class Versioned(nn.Linear):
    """Whose weight lay transposed in files of its first form, which have no version."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, versions, *args) -> None:
        if versions.get("version", 1) < 2:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"].T
        super()._load_from_state_dict(state_dict, prefix, versions, *args)


def test_renamed_state_dicts_tell_the_versions_of_modules() -> None:
    """Else such a class takes what it has just saved for the old form."""
    plain, operated = nn.Sequential(Versioned(3, 3)), nn.Sequential(Versioned(3, 3))
    apply_dropconnect(operated, "0")
    plain.load_state_dict(plain_state_dict(operated))
    assert torch.equal(plain[0].weight, operated[0].weight)
    operated.load_state_dict(raw_state_dict(operated, plain.state_dict()))
    assert torch.equal(operated[0].weight, plain[0].weight)


class TestRawStateDict:
    """`raw_state_dict`, the inverse of `plain_state_dict`."""

    @pytest.mark.parametrize("toward", ["zero", "pretrained"])
    def test_is_the_inverse(self, subject: Subject, toward: str) -> None:
        model = subject.operated(toward=toward)
        state = model.state_dict()
        back = raw_state_dict(model, plain_state_dict(model))
        assert [key for key in back if key in state] == list(back)
        assert_same({key: back[key] for key in state}, dict(state))
        assert_same(raw_state_dict(model, state), dict(state))

    def test_of_a_plain_model_changes_nothing(self, subject: Subject) -> None:
        state = dict(subject.plain().state_dict())
        assert_same(raw_state_dict(subject.plain(), state), state)

    def test_the_recipe_for_partial_loads(self, subject: Subject) -> None:
        model = subject.operated(toward="pretrained")
        site = subject.sites[0]
        value = torch.randn_like(model.state_dict()[raw(site)])
        given = {site: value, "somebody.else": torch.ones(1)}
        found = raw_state_dict(model, given)
        assert list(found) == [raw(site), anchor(site), "somebody.else"]
        own = model.state_dict()
        own.update({key: value for key, value in found.items() if key in own})
        before = tensors(model)
        model.load_state_dict(own)
        after = tensors(model)
        assert torch.equal(after[raw(site)], value)
        assert_same({**before, raw(site): value}, after)

    def test_both_keys_stay_an_error(self) -> None:
        model = apply_dropconnect(nn.Sequential(nn.Linear(2, 2)), "0", p=0.5)
        both = {**model.state_dict(), "0.weight": torch.zeros(2, 2)}
        with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.weight"):
            model.load_state_dict(raw_state_dict(model, both))

    def test_tied_weights_under_both_names(self) -> None:
        embedding, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        head.weight = embedding.weight
        model = apply_dropconnect(
            nn.Sequential(embedding, head), ["0", "1"], p=0.5, toward="pretrained"
        )
        value = torch.randn(5, 4)
        found = raw_state_dict(model, {"0.weight": value, "1.weight": value})
        assert set(found) == set(model.state_dict())
        model.load_state_dict(found)
        assert torch.equal(model[0].weight, value)
        assert set(raw_state_dict(model, {"1.weight": value})) == {
            "1.weight_raw",
            "1.weight_anchor",
        }

    def test_names_with_and_without_wrappers(self) -> None:
        """`checkpoint_wrapper` hides its name from state dicts, `torch.compile` and DDP do not."""
        inner = apply_dropconnect(nn.Sequential(nn.Linear(2, 2)), "0", p=0.5)
        shown: Any = torch.compile(nn.DataParallel(inner), backend="eager")
        hidden = nn.Sequential(checkpoint_wrapper(inner))
        for model in (shown, hidden):
            plain = plain_state_dict(model)
            assert not any("_raw" in key for key in plain)
            assert_same(raw_state_dict(model, plain), dict(model.state_dict()))
            model.load_state_dict(plain)
        assert list(plain_state_dict(shown, inner.state_dict())) == ["0.weight", "0.bias"]
        assert list(raw_state_dict(shown, plain_state_dict(inner))) == ["0.weight_raw", "0.bias"]


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("keys", ["raw", "plain"])
def test_loads_strictly(subject: Subject, keys: str, assign: bool) -> None:
    source = subject.operated() if keys == "raw" else subject.plain()
    wanted = other_values(source)
    given = copy.deepcopy(wanted)
    model = subject.operated()
    before = dict(model.named_parameters())
    result = model.load_state_dict(given, strict=True, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert list(given) == list(wanted), "load_state_dict must not change its argument"
    assert_same(plain_state_dict(model), plain_state_dict(source, wanted))
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, nn.Parameter)
        assert (parameter is before[name]) is not assign
    reference = subject.plain()
    reference.load_state_dict(plain_state_dict(source, wanted))
    apply_dropconnect(reference, list(subject.targets), p=0.5)
    x = subject.inputs()
    assert_same(step_gradients(model, x), step_gradients(reference, x))


@pytest.mark.parametrize("keys", ["raw", "plain"])
def test_a_missing_key_is_a_strict_error(subject: Subject, keys: str) -> None:
    source = subject.operated() if keys == "raw" else subject.plain()
    values = other_values(source)
    site = subject.sites[0]
    del values[raw(site) if keys == "raw" else site]
    with pytest.raises(RuntimeError, match=f"Missing key.*{raw(site)}"):
        subject.operated().load_state_dict(values)


def test_both_keys_are_a_strict_error(subject: Subject) -> None:
    """A checkpoint of the peers has both names after an eval; which one counts is nobody's guess."""
    model = subject.operated()
    site = subject.sites[0]
    values = {**other_values(model), site: torch.zeros(model.state_dict()[raw(site)].shape)}
    with pytest.raises(RuntimeError, match=f"Unexpected key.*{site}"):
        model.load_state_dict(values)


def test_shape_mismatch_names_the_raw_key(subject: Subject) -> None:
    model = subject.operated()
    site = subject.sites[0]
    values = {**plain_state_dict(model), site: torch.zeros(1, 2, 3, 4, 5)}
    with pytest.raises(RuntimeError, match=f"size mismatch for {raw(site)}"):
        model.load_state_dict(values)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
class TestAnchors:
    def test_raw_checkpoint_carries_them(self, subject: Subject, assign: bool) -> None:
        source = subject.operated(toward="pretrained")
        saved = other_values(source)
        assert {anchor(site) for site in subject.sites} <= set(saved)
        model = subject.operated(toward="pretrained")
        model.load_state_dict(copy.deepcopy(saved), assign=assign)
        assert_same(tensors(model), saved)

    def test_plain_checkpoint_keeps_those_in_place(self, subject: Subject, assign: bool) -> None:
        model = subject.operated(toward="pretrained")
        before = tensors(model)
        saved = other_values(subject.plain())
        result = model.load_state_dict(copy.deepcopy(saved), assign=assign)
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        assert_same(plain_state_dict(model), saved)
        for site in subject.sites:
            assert torch.equal(model.state_dict()[anchor(site)], before[anchor(site)])
        assert_drops(model, subject.inputs())

    def test_raw_checkpoint_without_them_is_an_error(self, subject: Subject, assign: bool) -> None:
        model = subject.operated(toward="pretrained")
        site = subject.sites[0]
        saved = other_values(model)
        del saved[anchor(site)]
        with pytest.raises(RuntimeError, match=f"Missing key.*{anchor(site)}"):
            model.load_state_dict(saved, assign=assign)


@pytest.mark.parametrize("keys", ["raw", "plain"])
def test_meta_then_to_empty_then_load(subject: Subject, keys: str) -> None:
    with torch.device("meta"):
        model = subject.make()
    apply_dropconnect(model, list(subject.targets), p=0.5)
    source = subject.operated() if keys == "raw" else subject.plain()
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    x = subject.inputs()
    assert_same(step_gradients(model, x), step_gradients(subject.operated(), x))


@pytest.mark.parametrize("keys", ["raw", "plain"])
def test_meta_then_assign(subject: Subject, keys: str) -> None:
    with torch.device("meta"):
        model = subject.make()
    apply_dropconnect(model, list(subject.targets), p=0.5)
    source = subject.operated() if keys == "raw" else subject.plain()
    model.load_state_dict(source.state_dict(), assign=True)
    x = subject.inputs()
    assert_same(step_gradients(model, x), step_gradients(subject.operated(), x))
    assert_same(dict(strip_dropconnect(model).state_dict()), dict(subject.plain().state_dict()))


def test_meta_forward_keeps_shapes(subject: Subject) -> None:
    with torch.device("meta"):
        model = subject.make()
        x = torch.empty(subject.inputs().shape, dtype=subject.inputs().dtype)
        shape = model(x).shape
        apply_dropconnect(model, list(subject.targets), p=0.5)
        assert model(x).shape == shape


def test_tied_weight_loads_once_for_both_users() -> None:
    embedding, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embedding.weight
    model = apply_dropconnect(nn.Sequential(embedding, head), ["0", "1"], p=0.5)
    saved = {key: torch.randn(5, 4) for key in ("0.weight_raw",)}
    saved["1.weight_raw"] = saved["0.weight_raw"]
    model.load_state_dict(saved)
    assert model[0].weight is model[1].weight
    assert torch.equal(model[1].weight, saved["0.weight_raw"])


def test_lstm_assigned_weights_are_those_it_runs() -> None:
    """torch's own LSTM keeps a flat list that goes stale on such loads."""
    subject = BY_NAME["lstm"]
    model = subject.operated().eval()
    model.load_state_dict(other_values(model), assign=True)
    plain = subject.plain().eval()
    plain.load_state_dict(plain_state_dict(model))
    x = subject.inputs()
    assert torch.equal(model(x), plain(x))
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.count_nonzero(model(x)) == 0
