"""Options are checked in one place and survive JSON."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery import DropConnectConfig
from surgery.config import FORMAT_VERSION

configs = st.builds(
    DropConnectConfig,
    p=st.floats(0, 1),
    unit=st.sampled_from(["element", "input", "output", "tensor"]),
    toward=st.sampled_from(["zero", "pretrained"]),
    sampling=st.just("batch"),
    inference=st.sampled_from(["mean", "sample"]),
    bias=st.booleans(),
    ranks=st.sampled_from(["independent", "same"]),
)


def test_defaults() -> None:
    assert dataclasses.asdict(DropConnectConfig()) == {
        "p": 0.5,
        "unit": "element",
        "toward": "zero",
        "sampling": "batch",
        "inference": "mean",
        "bias": False,
        "ranks": "independent",
    }


@pytest.mark.parametrize("p", [-0.1, 1.0001, math.nan, math.inf, -math.inf, 30])
def test_p_out_of_range(p: float) -> None:
    with pytest.raises(
        ValueError, match=r"p is the probability of dropping and must be in \[0, 1\]"
    ):
        DropConnectConfig(p=p)


@pytest.mark.parametrize("p", ["0.5", None, True, [0.5]], ids=repr)
def test_p_of_another_type(p: object) -> None:
    with pytest.raises(TypeError, match=r"a number in \[0, 1\]; got"):
        DropConnectConfig(p=p)


@pytest.mark.parametrize("p", [0, 1])
def test_p_becomes_a_float(p: int) -> None:
    config = DropConnectConfig(p=p)
    assert type(config.p) is float
    assert config.p == p


@pytest.mark.parametrize(
    ("field", "allowed"),
    [
        ("unit", "'element', 'input', 'output', 'tensor'"),
        ("toward", "'zero', 'pretrained'"),
        ("sampling", "'batch'"),
        ("inference", "'mean', 'sample'"),
        ("ranks", "'independent', 'same'"),
    ],
)
@pytest.mark.parametrize("value", ["other", "", None, 0], ids=repr)
def test_choices_are_listed(field: str, allowed: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} must be one of {allowed}; got {value!r}"):
        DropConnectConfig(**{field: value})


@pytest.mark.parametrize("value", [[], {}], ids=repr)
def test_unhashable_choice(value: object) -> None:
    with pytest.raises(ValueError, match="unit must be one of"):
        DropConnectConfig(unit=value)


@pytest.mark.parametrize("bias", [0, 1, "yes", None], ids=repr)
def test_bias_is_a_bool(bias: object) -> None:
    with pytest.raises(TypeError, match="bias must be True or False; got"):
        DropConnectConfig(bias=bias)


def test_frozen_keyword_only_and_hashable() -> None:
    config = DropConnectConfig(p=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.p = 0.2
    with pytest.raises(TypeError):
        DropConnectConfig(0.1)
    assert {config: 1}[DropConnectConfig(p=0.1)] == 1


def test_replace_validates_again() -> None:
    assert DropConnectConfig(p=0.1, bias=True).replace(p=0.2) == DropConnectConfig(p=0.2, bias=True)
    with pytest.raises(ValueError, match="got 2"):
        DropConnectConfig().replace(p=2)


@given(configs)
def test_json_round_trip(config: DropConnectConfig) -> None:
    text = json.dumps(config.to_json())
    assert DropConnectConfig.from_json(json.loads(text)) == config


def test_json_form_does_not_change_when_read() -> None:
    form = DropConnectConfig().to_json()
    DropConnectConfig.from_json(form)
    assert form == DropConnectConfig().to_json()
    assert form["version"] == FORMAT_VERSION


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, None, "1"], ids=repr)
def test_other_versions_are_refused(version: object) -> None:
    form = {**DropConnectConfig().to_json(), "version": version}
    message = f"format {version!r}; this release reads format {FORMAT_VERSION}"
    with pytest.raises(ValueError, match=message):
        DropConnectConfig.from_json(form)


def test_unknown_fields_are_refused() -> None:
    form = {**DropConnectConfig().to_json(), "colour": 1, "age": 2}
    with pytest.raises(ValueError, match=r"unknown fields \['age', 'colour'\]"):
        DropConnectConfig.from_json(form)


def test_values_in_json_are_validated() -> None:
    with pytest.raises(ValueError, match="must be in"):
        DropConnectConfig.from_json({**DropConnectConfig().to_json(), "p": 7})
