"""Options are checked in one place and survive JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import ChainMap
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery import DropConnectConfig
from surgery.spec.forms import FORMAT_VERSION

samplings: st.SearchStrategy[Any] = st.one_of(
    st.just({"sampling": "batch"}),
    st.builds(dict, sampling=st.just("example"), example_dim=st.integers(-3, 3) | st.just("all")),
    st.builds(dict, sampling=st.just("gaussian"), unit=st.sampled_from(["element", "output"])),
)
inferences: st.SearchStrategy[Any] = st.one_of(
    st.builds(dict, inference=st.sampled_from(["mean", "sample"])),
    st.builds(dict, inference=st.just("moments"), samples=st.none() | st.integers(1, 99)),
)
others: st.SearchStrategy[Any] = st.builds(
    dict,
    p=st.floats(0, 1),
    unit=st.sampled_from(["element", "input", "output", "tensor"]),
    toward=st.sampled_from(["zero", "pretrained"]),
    bias=st.booleans(),
    ranks=st.sampled_from(["independent", "same"]),
)
configs = st.builds(
    lambda *parts: DropConnectConfig(**dict(ChainMap(*parts))), samplings, inferences, others
)


def test_defaults() -> None:
    assert dataclasses.asdict(DropConnectConfig()) == {
        "p": 0.5,
        "unit": "element",
        "toward": "zero",
        "sampling": "batch",
        "example_dim": 0,
        "inference": "mean",
        "samples": None,
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
def test_p_of_another_type(p: Any) -> None:
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
        ("sampling", "'batch', 'example', 'gaussian'"),
        ("inference", "'mean', 'moments', 'sample'"),
        ("ranks", "'independent', 'same'"),
    ],
)
@pytest.mark.parametrize("value", ["other", "", None, 0], ids=repr)
def test_choices_are_listed(field: str, allowed: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} must be one of {allowed}; got {value!r}"):
        DropConnectConfig(**{field: value})


@pytest.mark.parametrize("value", [[], {}], ids=repr)
def test_unhashable_choice(value: Any) -> None:
    with pytest.raises(ValueError, match="unit must be one of"):
        DropConnectConfig(unit=value)


@pytest.mark.parametrize("bias", [0, 1, "yes", None], ids=repr)
def test_bias_is_a_bool(bias: Any) -> None:
    with pytest.raises(TypeError, match="bias must be True or False; got"):
        DropConnectConfig(bias=bias)


@pytest.mark.parametrize("dim", [None, "rows", 1.0, True], ids=repr)
def test_example_dim_is_a_dimension(dim: Any) -> None:
    with pytest.raises(
        ValueError, match="example_dim must be a dimension of the input or 'all'; got"
    ):
        DropConnectConfig(sampling="example", example_dim=dim)


@pytest.mark.parametrize("sampling", ["batch", "gaussian"])
def test_example_dim_goes_with_example(sampling: Any) -> None:
    message = f"example_dim='all' says where .* no meaning for sampling='{sampling}'"
    with pytest.raises(ValueError, match=message):
        DropConnectConfig(sampling=sampling, example_dim="all")


@pytest.mark.parametrize("count", [0, -1, True, 2.0, "10"], ids=repr)
def test_samples_is_a_positive_number(count: Any) -> None:
    with pytest.raises(ValueError, match="samples must be a positive number of draws or None; got"):
        DropConnectConfig(inference="moments", samples=count)


@pytest.mark.parametrize("inference", ["mean", "sample"])
def test_samples_go_with_moments(inference: Any) -> None:
    message = f"samples=10 .* no meaning for inference='{inference}'"
    with pytest.raises(ValueError, match=message):
        DropConnectConfig(inference=inference, samples=10)


@pytest.mark.parametrize("unit", ["input", "tensor"])
def test_gaussian_noise_is_for_single_pre_activations(unit: Any) -> None:
    with pytest.raises(
        ValueError, match=f"unit='{unit}' drops several together; use sampling=.example"
    ):
        DropConnectConfig(sampling="gaussian", unit=unit)


def test_form_of_an_older_release_is_read() -> None:
    form = DropConnectConfig(p=0.1).to_json()
    del form["example_dim"], form["samples"]
    assert DropConnectConfig.from_json(form) == DropConnectConfig(p=0.1)


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
