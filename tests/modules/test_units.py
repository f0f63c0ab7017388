"""What a unit means: Dropout of inputs, of outputs, of the whole weight, with the same mask."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import apply_dropconnect

from ..expected import keep, masked
from ..helpers import plain_parameter
from ..internals import states_of
from ..zoo.kinds import CASES, Case

P = 0.4
SCALE = 1 / (1 - round(P * 2**32) / 2**32)

Reference = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(plain module, key, input) -> what Dropout with the mask of that key gives."""


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def drop(key: Tensor, *shape: int) -> Tensor:
    return keep(key, P, *shape) * SCALE


def linear_input(m: Any, key: Tensor, x: Tensor) -> Tensor:
    return m(x * drop(key, m.in_features))


def linear_output(m: Any, key: Tensor, x: Tensor) -> Tensor:
    return m(x) * drop(key, m.out_features)


def conv_input(m: Any, key: Tensor, x: Tensor) -> Tensor:
    return m(x * drop(key, m.in_channels, *([1] * (x.ndim - 2))))


def conv_output(m: Any, key: Tensor, x: Tensor) -> Tensor:
    return m(x) * drop(key, m.out_channels, *([1] * (x.ndim - 2)))


def embedding_input(m: Any, key: Tensor, x: Tensor) -> Tensor:
    """A word is dropped wherever it stands: the embedding dropout of AWD-LSTM."""
    return m(x) * drop(key, m.num_embeddings)[x].unsqueeze(-1)


def embedding_output(m: Any, key: Tensor, x: Tensor) -> Tensor:
    return m(x) * drop(key, m.embedding_dim)


INPUTS: dict[str, Reference] = {
    "linear": linear_input,
    "conv1d": conv_input,
    "conv1d-groups": conv_input,
    "conv2d": conv_input,
    "conv2d-depthwise": conv_input,
    "conv3d": conv_input,
    "conv-transpose1d": conv_input,
    "conv-transpose2d": conv_input,
    "conv-transpose3d": conv_input,
    "embedding": embedding_input,
}
PAIRS: dict[Reference, Reference] = {
    linear_input: linear_output,
    conv_input: conv_output,
    embedding_input: embedding_output,
}
OUTPUTS: dict[str, Reference] = {name: PAIRS[input_of] for name, input_of in INPUTS.items()}


def pair(case: Case, **options: Any) -> tuple[Any, Any]:
    module = case.build()
    plain = copy.deepcopy(module)
    return apply_dropconnect(module, case.target_of(module), p=P, **options), plain


@pytest.mark.parametrize("name", INPUTS)
def test_input_unit_is_dropout_of_the_input(name: str, keys) -> None:
    module, plain = pair(CASES[name], unit="input")
    (x,) = CASES[name].inputs()
    output = module(x)
    close(output, INPUTS[name](plain, keys[0], x))


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_unit_with_bias_is_dropout_of_the_output(name: str, keys) -> None:
    module, plain = pair(CASES[name], unit="output", bias=True)
    (x,) = CASES[name].inputs()
    output = module(x)
    assert len(keys) == 1  # the bias takes the mask of its weight
    close(output, OUTPUTS[name](plain, keys[0], x))


@pytest.mark.parametrize("name", OUTPUTS)
def test_tensor_unit_with_bias_drops_the_whole_output(name: str, keys) -> None:
    """Stochastic depth: all or nothing, both of which are seen in 20 calls."""
    module, plain = pair(CASES[name], unit="tensor", bias=True)
    (x,) = CASES[name].inputs()
    outputs = [module(x) for _ in range(20)]
    kept = [bool(keep(key, P, 1)) for key in keys]
    assert len(keys) == 20
    assert {True, False} == set(kept)
    for whole, output in zip(kept, outputs, strict=True):
        close(output, plain(x) * SCALE * whole)


def test_input_unit_equals_nn_dropout(keys) -> None:
    """The formula that `nn.Dropout` uses, on the input, with the mask that was drawn."""
    module, plain = pair(CASES["linear"], unit="input")
    (x,) = CASES["linear"].inputs()
    output = module(x)
    mask = keep(keys[0], P, 6).bool()
    dropout = nn.Dropout(P)
    drawn = dropout(torch.ones(100_000, dtype=torch.float64))
    assert float(drawn.max()) == pytest.approx(SCALE, rel=1e-9)  # nn.Dropout scales as we do
    close(output, F.linear(torch.where(mask, x * SCALE, 0.0), plain.weight, plain.bias))


GATES = {"rnn-cell": 1, "gru-cell": 3, "lstm-cell": 4}


@pytest.mark.parametrize("name", GATES)
def test_input_unit_of_a_cell_is_dropout_of_the_hidden_state(name: str, keys) -> None:
    """Variational dropout of Gal and Ghahramani: the previous state enters every gate masked."""
    module, plain = pair(CASES[name], unit="input")
    x, state = CASES[name].inputs()
    hidden = state[0] if name == "lstm-cell" else state
    output = module(x, state)
    dropped = hidden * drop(keys[0], 4)
    expected = plain(x, (dropped, state[1]) if name == "lstm-cell" else dropped)
    if name == "gru-cell":  # its last line mixes in the undropped state
        gates = F.linear(x, plain.weight_ih, plain.bias_ih)
        recurrent = F.linear(dropped, plain.weight_hh, plain.bias_hh)
        (i_r, i_z, i_n), (h_r, h_z, h_n) = gates.chunk(3, 1), recurrent.chunk(3, 1)
        reset, update = torch.sigmoid(i_r + h_r), torch.sigmoid(i_z + h_z)
        expected = (1 - update) * torch.tanh(i_n + reset * h_n) + update * hidden
    pairs = zip(output, expected) if name == "lstm-cell" else [(output, expected)]
    for ours, theirs in pairs:
        close(ours, theirs)


def shape_of_mask(case: str, name: str, unit: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Mask shapes of the kinds without a Dropout reference above: gates and packed projections."""
    rows, columns = shape[0], shape[1:]
    if unit == "tensor":
        return (1,)
    if unit == "output":
        return (rows, *[1 for _ in columns])
    if name == "in_proj_weight":
        return (3, 1, *columns)
    return (1, *columns)


MATRICES = ["lstm", "lstm-projection", "gru", "lstm-cell", "attention", "attention-separate"]


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("unit", ["input", "output", "tensor"])
def test_units_of_recurrent_and_attention_weights(name: str, unit: str, keys) -> None:
    case = CASES[name]
    module, plain = pair(case, unit=unit)
    inputs = case.inputs()
    output = module(*inputs)
    for key, weight_name in zip(keys, case.weights, strict=True):
        weight = plain.get_parameter(weight_name)
        mask = keep(key, P, *shape_of_mask(name, weight_name, unit, tuple(weight.shape)))
        if mask.ndim == 3:  # query, key and value have masks of their own
            mask = mask.expand(3, weight.shape[0] // 3, weight.shape[1]).reshape(weight.shape)
        weight.data = masked(weight.data, mask, P)
    expected = plain(*inputs)
    ours, theirs = (o if isinstance(o, Tensor) else o[0] for o in (output, expected))
    assert torch.equal(ours, theirs)


BIASES = {
    "linear": {"weight": "bias"},
    "conv2d": {"weight": "bias"},
    "lstm-bidirectional": {
        f"weight_hh_l{n}{end}": f"bias_hh_l{n}{end}" for n in (0, 1) for end in ("", "_reverse")
    },
    "gru-cell": {"weight_hh": "bias_hh"},
    "attention": {"in_proj_weight": "in_proj_bias", "out_proj.weight": "out_proj.bias"},
}


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("unit", ["element", "input", "output", "tensor"])
def test_bias_follows_where_its_weight_has_one_mask_entry_for_it(name, unit, keys) -> None:
    """By output and as a whole a bias shares its weight's mask; otherwise it has one of its own."""
    case = CASES[name]
    module, _ = pair(case, unit=unit, bias=True)
    module(*case.inputs())
    pairs = BIASES[name]
    assert len(keys) == len(pairs) * (1 if unit in ("output", "tensor") else 2)
    for weight, bias in pairs.items():
        owner, _, parameter = bias.rpartition(".")
        states = {state.name: state for state in states_of(module.get_submodule(owner))}
        follows = weight.rpartition(".")[2] if unit in ("output", "tensor") else None
        assert states[parameter].follows == follows


@pytest.mark.parametrize("unit", ["element", "input"])
def test_bias_has_its_own_mask(unit: str, keys) -> None:
    """A bias is the weight of a constant input 1: one entry each, or one for all by input."""
    module, plain = pair(CASES["linear"], unit=unit, bias=True)
    (x,) = CASES["linear"].inputs()
    output = module(x)
    shapes = {"element": ((4, 6), (4,)), "input": ((1, 6), (1,))}[unit]
    weight = masked(plain.weight, keep(keys[0], P, *shapes[0]), P)
    bias = masked(plain.bias, keep(keys[1], P, *shapes[1]), P)
    assert torch.equal(output, F.linear(x, weight, bias))


@pytest.mark.parametrize("unit", ["element", "input", "output", "tensor"])
@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_expectation_of_the_output_is_the_plain_output(unit: str, toward: str, check_mean) -> None:
    """A Linear is linear in its weight: the mean over masks is the plain output."""
    module, plain = pair(CASES["linear"], unit=unit, toward=toward, bias=True)
    plain_parameter(module, "weight").data.add_(0.3)
    plain.weight.data.add_(0.3)
    (x,) = CASES["linear"].inputs()
    check_mean(lambda: module(x), plain(x).detach(), 2000)
