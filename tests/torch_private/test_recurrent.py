"""Canaries of the lists of weights that an RNN keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery.torch_private import recurrent

from .canary import canary


def _rnn() -> nn.LSTM:
    return nn.LSTM(2, 4, num_layers=2, bidirectional=True)


@canary(recurrent, "nn.RNNBase._flat_weights_names")
def test_the_names_are_those_of_all_parameters() -> None:
    rnn = _rnn()
    assert recurrent.names_of(rnn) == list(rnn._parameters)


@canary(recurrent, "nn.RNNBase._flat_weights")
def test_a_forward_reads_its_weights_from_the_list() -> None:
    """Also where a subclass has a property in its place."""
    x = torch.randn(5, 1, 2)
    rnn, other = nn.GRU(2, 3), nn.GRU(2, 3)
    weights = getattr(rnn, recurrent.FLAT_WEIGHTS)
    assert all(a is b for a, b in zip(weights, rnn.parameters(), strict=True))
    wanted = other(x)[0]
    given = list(other.parameters())
    asked = property(lambda self: given, lambda self, value: None)
    rnn.__class__ = type("Other", (nn.GRU,), {recurrent.FLAT_WEIGHTS: asked})
    del rnn.__dict__[recurrent.FLAT_WEIGHTS]
    assert rnn(x)[0].equal(wanted)


@canary(recurrent, "nn.RNNBase._flat_weight_refs")
def test_torch_makes_these_lists() -> None:
    """And what it makes is taken for right by its own forward."""
    rnn = _rnn()
    made = recurrent.flat_lists(list(rnn.parameters()))
    for name, value in made.items():
        assert rnn.__dict__.pop(name) == value, name
    assert not [name for name in rnn.__dict__ if "flat_weight" in name and "names" not in name]
    rnn.__dict__.update(made)
    rnn(torch.randn(5, 1, 2))[0].sum().backward()
    assert rnn.weight_hh_l1.grad is not None


@canary(recurrent, "nn.RNNBase._update_flat_weights")
def test_who_looks_after_the_list() -> None:
    """These two are called through the class, by the forward and by moves."""
    called: list[str] = []

    def keeper(name: str) -> Any:
        def keeps(self: Any) -> None:
            called.append(name)
            getattr(nn.LSTM, name)(self)

        return keeps

    assert all(hasattr(nn.RNNBase, name) for name in recurrent.KEEPERS)
    watched = type("Watched", (nn.LSTM,), {name: keeper(name) for name in recurrent.KEEPERS})
    rnn = watched(2, 3)
    called.clear()
    rnn(torch.randn(5, 1, 2))
    assert called == ["_update_flat_weights"]
    rnn.to(torch.float64)
    assert "flatten_parameters" in called


@canary(recurrent, "torch._cudnn_rnn_flatten_weight", "torch._use_cudnn_rnn_flatten_weight")
def test_weights_are_moved_for_cudnn() -> None:
    """As `flatten_parameters` does; where there is no GPU, the arguments are what it gives."""
    if not torch.cuda.is_available():
        schema = str(torch.ops.aten._cudnn_rnn_flatten_weight.default._schema)
        names = "weight_arr weight_stride0 input_size mode hidden_size proj_size num_layers"
        at = [schema.find(f" {name}") for name in names.split()[1:]]
        assert at == sorted(at)
        assert min(at) > 0
        assert isinstance(torch._use_cudnn_rnn_flatten_weight(), bool)
        return
    rnn = nn.GRU(4, 8, bias=False, device="cuda")
    own: list[Tensor] = [torch.randn_like(one) for one in rnn.parameters()]
    kept = [one.clone() for one in own]
    sizes = (8, 0, 1, False, False)
    if recurrent.put_where_cudnn_wants(own, 2, "GRU", 4, *sizes):
        assert all(one.equal(copy) for one, copy in zip(own, kept))
        assert len({one.untyped_storage().data_ptr() for one in own}) == 1
    else:
        pytest.skip("this torch has no cuDNN")
