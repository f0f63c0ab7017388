"""Recurrent layers, step by step: gates are sums and products, and one mask serves all steps.

What is born at a step covaries with what is born at the others: draws and backward passes have that.
That the state depends on the mask it is multiplied by, is left out of the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec.errors import SurgeryError
from .call import Call, rule
from .pairs import mixture
from .shapes import dropped_inside
from .value import Travelling

States = tuple[Any, ...]
"""What goes from step to step: the hidden state first, (rows, hidden); of an LSTM its cell, too."""

Step = Callable[[Any, States, Any, Any], States]
"""From the part of the gates that the input makes, the states, and weight and bias of the rest."""


def _lstm(given: Any, states: States, weight: Any, bias: Any) -> States:
    hidden, cell = states
    gates: Any = given + F.linear(hidden, weight, bias)
    let_in, keep, new, show = gates.chunk(4, -1)
    cell = torch.sigmoid(keep) * cell + torch.sigmoid(let_in) * torch.tanh(new)
    return torch.sigmoid(show) * torch.tanh(cell), cell


def _gru(given: Any, states: States, weight: Any, bias: Any) -> States:
    (hidden,) = states
    of_hidden: Any = F.linear(hidden, weight, bias)
    reset, keep, new = given.chunk(3, -1)
    its_reset, its_keep, its_new = of_hidden.chunk(3, -1)
    new = torch.tanh(new + torch.sigmoid(reset + its_reset) * its_new)
    return (mixture(torch.sigmoid(keep + its_keep), hidden, new),)


def _plain(activation: Callable[[Any], Any]) -> Step:
    def step(given: Any, states: States, weight: Any, bias: Any) -> States:
        return (activation(given + F.linear(states[0], weight, bias)),)

    return step


_STEPS: dict[str, Step] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": _plain(torch.tanh),
    "rnn_relu": _plain(torch.relu),
}


RECURRENT = frozenset(_STEPS)
"""Functions of all layers."""


def is_packed(args: Sequence[Any]) -> bool:
    """Whether these are the arguments of such a function for a packed sequence."""
    return isinstance(args[3], (tuple, list))


@rule(*(f"{name}_cell" for name in _STEPS), weights=True)
def cell(call: Call) -> Any:
    """One step."""
    given, state, w_ih, w_hh, b_ih, b_hh = (*call.args, None, None)[:6]
    step = _STEPS[call.name.removesuffix("_cell")]
    states = tuple(state) if isinstance(state, (tuple, list)) else (state,)
    found = step(F.linear(given, w_ih, b_ih), states, w_hh, b_hh)
    return found if len(found) > 1 else found[0]


class _Weights(NamedTuple):
    """Of one layer in one direction."""

    of_input: Any
    of_hidden: Any
    input_bias: Any = None
    hidden_bias: Any = None
    projection: Any = None


class _Steps(NamedTuple):
    """How steps lie in a sequence. One of each."""

    apart: Callable[[Any], Sequence[Any]]
    """The steps of a sequence, (rows of the step, width) each."""
    together: Callable[[Sequence[Any]], Any]
    """A sequence of steps."""
    sizes: Sequence[int]
    """Rows of each step. Those that a step lacks have ended before: the last ones."""


@rule(*_STEPS, weights=True)
def layers(call: Call) -> Any:
    """All layers and directions, of padded or packed sequences."""
    packed = is_packed(call.args)
    if packed:
        x, sizes, state, weights, biased, count, dropout, _, both_ways = call.args
        steps = _packed_steps(call, sizes)
    else:
        x, state, weights, biased, count, dropout, _, both_ways, batch_first = call.args
        x = x if batch_first else x.transpose(0, 1)  # examples come first
        steps = _padded_steps(call, x)
    initial = tuple(state) if isinstance(state, (tuple, list)) else (state,)
    step, directions = _STEPS[call.name], 2 if both_ways else 1
    sets = _sets(list(weights), bool(biased), count * directions)
    ends: list[States] = []
    for layer in range(count):
        if layer:
            x = dropped_inside(call.run, x, dropout)
        found = []
        for direction in range(directions):
            index = layer * directions + direction
            begin = tuple(one[index] for one in initial)
            outputs, end = _through(step, x, steps, begin, sets[index], backwards=direction == 1)
            found.append(outputs)
            ends.append(end)
        x = torch.cat(found, -1) if directions == 2 else found[0]
    last = tuple(torch.stack(one) for one in zip(*ends))
    return x if packed or batch_first else x.transpose(0, 1), *last


def _sets(weights: list[Any], biased: bool, count: int) -> list[_Weights]:
    """The weights of every layer and direction, from torch's list of all."""
    each = len(weights) // count
    found = []
    for index in range(count):
        own = weights[index * each : (index + 1) * each]
        biases = own[2:4] if biased else [None, None]
        projection = own[-1] if each in (3, 5) else None
        found.append(_Weights(own[0], own[1], biases[0], biases[1], projection))
    return found


def _padded_steps(call: Call, x: Any) -> _Steps:
    """(rows, steps, width)"""
    run = call.run
    if run.records and x.shape[0] % run.rows:
        raise SurgeryError(
            f"backward passes need the examples along the first dimension: there are {run.rows}, and "
            f"a recurrent layer gets {x.shape[0]}; give the model the batch first, or covariance= a "
            "number of draws or 'diagonal'"
        )
    return _Steps(
        lambda sequence: sequence.unbind(1), lambda found: torch.stack(list(found), 1),
        [x.shape[0]] * x.shape[1],
    )  # fmt: skip


def _packed_steps(call: Call, sizes: Tensor) -> _Steps:
    """(rows of all steps, width)"""
    if call.run.records:
        raise SurgeryError(
            "backward passes do not know packed sequences, whose examples lie in another order; give "
            "covariance= a number of draws or 'diagonal', or the model padded sequences"
        )
    counts: list[int] = sizes.tolist()
    return _Steps(lambda data: data.split(counts), lambda found: torch.cat(list(found)), counts)


def _through(
    step: Step, x: Any, steps: _Steps, begin: States, weights: _Weights, backwards: bool
) -> tuple[Any, States]:
    """One layer in one direction: its outputs, and the states where each example ends."""
    given = steps.apart(F.linear(x, weights.of_input, weights.input_bias))
    order = range(len(given))[::-1] if backwards else range(len(given))
    states = tuple(one[: steps.sizes[order[0]]] for one in begin)
    outputs: list[Any] = [None] * len(given)
    ended: list[States] = []
    for now, then in pairwise((*order, None)):
        assert now is not None
        states = step(given[now], states, weights.of_hidden, weights.hidden_bias)
        if weights.projection is not None:
            states = (F.linear(states[0], weights.projection), *states[1:])
        outputs[now] = states[0]
        rows = steps.sizes[now] if then is None else steps.sizes[then]
        if rows < steps.sizes[now]:
            ended.append(tuple(one[rows:] for one in states))
            states = tuple(one[:rows] for one in states)
        elif rows > steps.sizes[now]:
            more = (one[steps.sizes[now] : rows] for one in begin)
            states = tuple(torch.cat(two) for two in zip(states, more))
    if ended:
        states = tuple(torch.cat(parts) for parts in zip(states, *ended[::-1]))
    return steps.together(outputs), states


@rule("pack_padded_sequence")
def pack(call: Call) -> Any:
    """(rows of all steps, width) of a padded sequence, and how many rows each step has."""
    value, lengths, batch_first = call.args
    if not isinstance(value, Travelling):
        return NotImplemented
    first, second = value.shape[:2]
    index = torch.arange(first * second).view(first, second, 1)
    picked, sizes = call.func(index, lengths, batch_first)
    flat: Any = value.flatten(0, 1)
    return flat[picked.flatten().to(value.device)], sizes


@rule("pad_packed_sequence")
def pad(call: Call) -> Any:
    """The inverse."""
    data, sizes, batch_first, padding, total = call.args
    if not isinstance(data, Travelling):
        return NotImplemented
    index = torch.arange(data.shape[0]).unsqueeze(1)
    picked, lengths = call.func(index, sizes, batch_first, -1, total)
    picked = picked.squeeze(-1).to(data.device)
    there = (picked >= 0).to(data.dtype).view(*picked.shape, *(1,) * (data.ndim - 1))
    varying: Any = data
    return varying[picked.clamp_min(0)] * there + (1 - there) * padding, lengths
