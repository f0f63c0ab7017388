"""What kinds declare that a forward reads: what its source shows, and only while it is that forward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor, nn

from surgery.kinds import kind_of
from surgery.kinds.reads import forward_in_source, forward_of

DECLARED: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "conv": lambda: nn.Conv2d(4, 4, 1),
    "circular-conv": lambda: nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"),
    "transposed-conv": lambda: nn.ConvTranspose3d(4, 4, 1),
    "embedding": lambda: nn.Embedding(4, 4),
    "bag": lambda: nn.EmbeddingBag(4, 4),
    "lstm-cell": lambda: nn.LSTMCell(4, 4),
    "gru-cell": lambda: nn.GRUCell(4, 4),
    "rnn-cell": lambda: nn.RNNCell(4, 4),
    "attention": lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
    "attention-of-widths": lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
    "sequential": lambda: nn.Sequential(nn.Linear(4, 4)),
    "encoder-layer": lambda: nn.TransformerEncoderLayer(4, 2, 4),
    "decoder-layer": lambda: nn.TransformerDecoderLayer(4, 2, 4),
    "decoder": lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 4), 1),
    "transformer": lambda: nn.Transformer(4, 2, 1, 1, 4, batch_first=True),
}


@pytest.mark.parametrize("make", DECLARED.values(), ids=DECLARED)
def test_kinds_declare_what_the_source_of_torch_shows(make: Callable[[], nn.Module]) -> None:
    """Of every parameter inside; the source is that of the torch which is installed."""
    module = make()
    cls = type(module)
    assert kind_of(module).reads(cls, module) is not None
    source, declared = forward_in_source(cls), forward_of(cls, module)
    paths = [tuple(name.split(".")) for name, _ in module.named_parameters()]
    assert [source.reads(path) for path in paths] == [declared.reads(path) for path in paths]
    for path in paths:
        assert not source.hands_out(path[:-1])


def test_a_declaration_holds_for_what_has_the_same_forward() -> None:
    class Renamed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)

    class Computed(Renamed):
        @property
        def weight(self) -> Tensor:  # type: ignore[override]
            return self.weight_v

    class Overrides(nn.Conv1d):
        def _conv_forward(self, *args):
            return super()._conv_forward(*args) * self.scale

    assert kind_of(Renamed()).reads(Renamed, Renamed()) == ("weight", "bias")
    linear, conv = nn.Linear(4, 4), nn.Conv1d(4, 4, 1)
    assert kind_of(linear).reads(Computed, linear) is None
    assert forward_of(Computed, linear).reads(("weight_v",))
    assert forward_of(Overrides, conv).reads(("scale",))


def test_a_forward_that_was_replaced_is_not_the_declared_one(monkeypatch) -> None:
    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        return x @ self.weight.t()

    linear = nn.Linear(4, 4)
    monkeypatch.setattr(nn.Linear, "forward", forward)
    assert kind_of(linear).reads(nn.Linear, linear) is None
