"""RNN weights that lie in one piece of memory, as cuDNN has them: masked in a copy of it. Here on the
CPU, whose results must be those of masked weights in memory of their own, to the bit."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from surgery import apply_dropconnect, hold_masks, strip_dropconnect

from ..internals import note_flat_weights, set_constant

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")

RNNS = {
    "lstm": lambda: nn.LSTM(6, 16),
    "lstm-both-ways": lambda: nn.LSTM(6, 16, num_layers=2, bidirectional=True),
    "lstm-projection": lambda: nn.LSTM(6, 16, num_layers=2, proj_size=8),
    "gru-no-bias": lambda: nn.GRU(6, 16, num_layers=2, bias=False),
    "rnn": lambda: nn.RNN(6, 16, nonlinearity="relu"),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "element": {},
    "bias": {"bias": True},
    "pretrained": {"toward": "pretrained"},
    "output": {"unit": "output"},
}


def flattened(rnn: nn.Module, room: int = 7) -> nn.Module:
    """The weights in one piece, in an order that is not theirs, with room at the end. Sizes here are
    multiples of 16, since products may round otherwise at other addresses."""
    weights = list(rnn.parameters())[::-1]
    whole = torch.zeros(sum(weight.numel() for weight in weights) + room, dtype=weights[0].dtype)
    start = 0
    for weight in weights:
        part = whole[start : start + weight.numel()].view_as(weight)
        weight.data = part.copy_(weight.detach())
        start += weight.numel()
    return rnn


@pytest.fixture
def memories(monkeypatch) -> list[Tensor]:
    """Every piece of memory that was made for masked weights."""
    made: list[Tensor] = []
    note_flat_weights(monkeypatch, made.append)
    return made


def on(monkeypatch, *devices: str) -> None:
    set_constant(monkeypatch, "devices of flat weights", set(devices))


def run(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Outputs and gradients of a step, in which the model is called with each input."""
    torch.manual_seed(5)
    outputs = [model(x)[0] for x in inputs]
    loss = sum(output.square().sum() for output in outputs)
    leaves = [p for p in model.parameters() if p.requires_grad]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", RNNS)
def test_the_same_as_with_memory_of_their_own(name, options, memories, monkeypatch) -> None:
    model = flattened(RNNS[name]())
    apply_dropconnect(model, "*", p=0.4, **OPTIONS[options])
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1)  # away from the anchor
    x = torch.randn(5, 3, 6, requires_grad=True)

    def without_gradients() -> list[Tensor]:
        found = []
        for switch in (torch.no_grad(), torch.inference_mode()):
            with switch:  # torch may have kernels of its own for that, which round otherwise
                torch.manual_seed(5)
                found.append(model(x)[0])
        return found

    on(monkeypatch)
    expected, twice, plain = run(model, x), run(model, x, 2 * x), without_gradients()
    assert memories == []
    on(monkeypatch, "cpu")
    assert all(map(torch.equal, run(model, x), expected))
    assert len(memories) == 2  # forward and backward
    # Of a weight that is not masked, gradients of both calls are added up in another order.
    torch.testing.assert_close(run(model, x, 2 * x), twice)
    assert len(memories) == 6
    assert all(map(torch.equal, without_gradients(), plain))


def test_what_the_forward_reads(monkeypatch) -> None:
    """Every weight at the offset of the stored one, in one piece; none of them a view that could not be
    written to; and `flatten_parameters` leaves them there."""
    model = flattened(nn.LSTM(6, 16, num_layers=2))
    raws = [model.get_parameter(name) for name in model._flat_weights_names]
    apply_dropconnect(model, "*", p=0.4)
    seen: list[list[Tensor]] = []
    monkeypatch.setattr(
        nn.LSTM, "check_forward_args", lambda self, *_: seen.append(self._flat_weights)
    )
    rebuilt: list[int] = []
    monkeypatch.setattr(nn.LSTM, "_init_flat_weights", lambda self: rebuilt.append(1))
    on(monkeypatch, "cpu")
    model(torch.randn(5, 3, 6))
    model.eval()(torch.randn(5, 3, 6))
    assert rebuilt == []
    weights, stored = seen
    assert all(one is other for one, other in zip(stored, raws))
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    assert weights[0].untyped_storage().data_ptr() != raws[0].untyped_storage().data_ptr()
    assert weights[0].untyped_storage().nbytes() == raws[0].untyped_storage().nbytes()
    for weight, raw, name in zip(weights, raws, model._flat_weights_names):
        assert weight.storage_offset() == raw.storage_offset()
        assert weight.stride() == raw.stride()
        assert weight.requires_grad
        assert torch.equal(weight, raw) == ("hh" not in name or "bias" in name)


def test_a_forward_around_it_may_call_flatten_parameters(monkeypatch) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = flattened(nn.LSTM(6, 16))

        def forward(self, x: Tensor) -> Tensor:
            self.rnn.flatten_parameters()
            return self.rnn(x)[0]

    model = apply_dropconnect(Encoder(), nn.LSTM, p=0.4)
    for devices in ((), ("cpu",)):
        on(monkeypatch, *devices)
        model(torch.randn(5, 3, 6)).sum().backward()
    assert model.rnn.weight_hh_l0_raw.grad is not None


def test_memory_is_freed_after_the_forward_and_once_in_backward(monkeypatch) -> None:
    """Autograd keeps the key, not the piece; backward has it once."""
    on(monkeypatch, "cpu")
    model = flattened(nn.LSTM(6, 16, num_layers=2, bidirectional=True))
    apply_dropconnect(model, "*", p=0.4)
    alive: list[StorageWeakRef] = []
    note_flat_weights(
        monkeypatch, lambda made: alive.append(StorageWeakRef(made.untyped_storage()))
    )
    loss = model(torch.randn(5, 3, 6))[0].sum()
    assert [ref.expired() for ref in alive] == [True]
    loss.backward(retain_graph=True)
    assert [ref.expired() for ref in alive] == [True, True]
    loss.backward()
    assert [ref.expired() for ref in alive] == [True, True, True]


def test_weights_that_do_not_lie_in_one_piece_are_masked_as_ever(memories, monkeypatch) -> None:
    on(monkeypatch, "cpu")
    tied = flattened(nn.RNN(4, 4, num_layers=2))
    tied.weight_hh_l1 = tied.weight_hh_l0
    models = [(nn.LSTM(6, 16), 6), (tied, 4)]
    for i in range(4):
        part = flattened(nn.LSTM(6, 16))
        weight = list(part.parameters())[i]
        elsewhere = weight.untyped_storage().clone()
        where = weight.storage_offset(), weight.size(), weight.stride()
        weight.data = torch.empty(0).set_(elsewhere, *where)
        models.append((part, 6))
    for model, size in models:
        apply_dropconnect(model, "*", p=0.4)
        model(torch.randn(5, 3, size))[0].sum().backward()
        assert model.weight_hh_l0_raw.grad is not None
    assert memories == []


def test_a_piece_of_which_over_half_is_something_else_is_not_copied(memories, monkeypatch) -> None:
    on(monkeypatch, "cpu")
    size = sum(weight.numel() for weight in nn.LSTM(6, 16).parameters())
    for room, count in ((size + 1, 0), (size, 1)):
        model = apply_dropconnect(flattened(nn.LSTM(6, 16), room), "*", p=0.4)
        model(torch.randn(5, 3, 6))
        assert len(memories) == count


def test_frozen_weights_get_no_gradient(monkeypatch) -> None:
    on(monkeypatch, "cpu")
    model = flattened(nn.LSTM(6, 16, num_layers=2))
    apply_dropconnect(model, "*", p=0.4)
    model.weight_hh_l1_raw.requires_grad_(False)
    model.weight_ih_l0.requires_grad_(False)
    model(torch.randn(5, 3, 6))[0].sum().backward()
    without = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert without == {"weight_hh_l1_raw", "weight_ih_l0"}


def test_a_weight_that_was_changed_since_is_refused(monkeypatch) -> None:
    on(monkeypatch, "cpu")
    for name in ("weight_ih_l0", "weight_hh_l0_raw"):
        model = flattened(nn.LSTM(6, 16))
        apply_dropconnect(model, "*", p=0.4)
        loss = model(torch.randn(5, 3, 6))[0].sum()
        with torch.no_grad():
            getattr(model, name).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_checkpointing_recomputes_the_same_masks(memories, monkeypatch) -> None:
    on(monkeypatch, "cpu")
    model = flattened(nn.LSTM(6, 16, num_layers=2))
    apply_dropconnect(model, "*", p=0.4)
    x = torch.randn(5, 3, 6, requires_grad=True)

    def grads(call) -> list[Tensor]:
        torch.manual_seed(2)
        model.zero_grad()
        call(x)[0].square().sum().backward()
        return [weight.grad.clone() for weight in model.parameters()]

    expected = grads(model)
    assert all(map(torch.equal, grads(partial(checkpoint, model, use_reentrant=False)), expected))
    # Without gradients torch has another kernel for the forward, which rounds otherwise.
    torch.testing.assert_close(grads(partial(checkpoint, model, use_reentrant=True)), expected)
    assert len(memories) == 2 + 3 + 3


def test_second_derivatives(monkeypatch) -> None:
    model = flattened(nn.RNN(3, 16).double())
    apply_dropconnect(model, "*", p=0.4)
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for devices in ((), ("cpu",)):
        on(monkeypatch, *devices)
        torch.manual_seed(2)
        loss = model(x)[0].square().sum()
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), tuple(model.parameters())))
    assert all(map(torch.equal, *found))


def test_held_masks_copies_and_strip(monkeypatch) -> None:
    on(monkeypatch, "cpu")
    model = flattened(nn.LSTM(6, 16))
    before = dict(model.named_parameters())
    places = {name: weight.data_ptr() for name, weight in before.items()}
    apply_dropconnect(model, "*", p=0.4)
    x = torch.randn(5, 3, 6)
    with hold_masks(model):
        assert torch.equal(model(x)[0], model(x)[0])
    assert not torch.equal(model(x)[0], model(x)[0])
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    expected = model(x)[0]
    torch.manual_seed(3)
    assert torch.equal(twin(x)[0], expected)
    strip_dropconnect(model)
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == places
    assert all(weight is before[name] for name, weight in model.named_parameters())
