"""`find` on small networks, in each dialect: operations, users, counts, ties, what follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from surgery import SurgeryError, apply_dropconnect
from surgery.spec.plan import Use
from surgery.transforms.capture.capture import CaptureError
from surgery.transforms.capture.record import record
from surgery.transforms.reading.find import find
from surgery.transforms.reading.findings import Findings

from ...zoo.traits import Branches, Functional


def symbolic_graph(model: nn.Module, inputs: Any) -> fx.GraphModule:
    return fx.symbolic_trace(model)


def exported_graph(model: nn.Module, inputs: Any) -> fx.GraphModule:
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    graph = torch.export.export(model.eval(), args, strict=False).module()
    assert isinstance(graph, fx.GraphModule)
    return graph


DIALECTS = {"recorded": record, "symbolic": symbolic_graph, "exported": exported_graph}

every_dialect = pytest.mark.parametrize("dialect", DIALECTS)


def found(model: nn.Module, inputs: Any, dialect: str) -> Findings:
    return find(model, graph=DIALECTS[dialect](model, inputs))


def ops(findings: Findings) -> dict[str, str]:
    """Readable: `2 linear -> relu`."""
    return {
        name: ", ".join(
            f"{use}" + (f" -> {use.activation}" if use.activation else "") for use in uses
        )
        for name, uses in findings.items()
    }


class After(nn.Module):
    """A linear layer and whatever follows it."""

    def __init__(self, after: Callable[[Tensor], Tensor] | nn.Module) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.bias = nn.Parameter(torch.randn(4))
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.fc(x)) @ torch.ones(4, 4)


@every_dialect
def test_bare_parameters_views_slices_and_packs(dialect: str) -> None:
    model, x = Functional(), torch.randn(2, 4)
    findings = found(model, x, dialect)
    assert ops(findings) == {
        "w": "linear -> silu, linear -> tanh",
        "v": "matmul -> relu",
        "b": "add -> relu",
        "packed": "linear, linear -> sigmoid, linear -> glu",
        "stack": "grouped_mm -> relu",
        "table": "embedding",
        "idle": "",
    }
    assert findings.unused == ("idle",)
    assert {use.by for uses in findings.values() for use in uses} == {""}


RECURRENT = {
    "lstm": (lambda: nn.LSTM(4, 3, num_layers=2, proj_size=2, bidirectional=True), (5, 2, 4)),
    "gru": (lambda: nn.GRU(4, 3), (5, 2, 4)),
    "rnn": (lambda: nn.RNN(4, 3, nonlinearity="relu"), (5, 2, 4)),
    "lstm_cell": (lambda: nn.LSTMCell(4, 3), (2, 4)),
    "gru_cell": (lambda: nn.GRUCell(4, 3), (2, 4)),
    "rnn_cell": (lambda: nn.RNNCell(4, 3), (2, 4)),
}


@pytest.mark.filterwarnings("ignore:The tensor attributes self.0._flat_weights")
@every_dialect
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent(name: str, dialect: str) -> None:
    """The layer in a model, since the root is never a leaf of a symbolic trace."""
    make, shape = RECURRENT[name]
    model = nn.Sequential(make())
    findings = found(model, torch.randn(shape), dialect)
    assert list(findings) == [name for name, _ in model.named_parameters()]
    assert set(findings.values()) == {(Use(op=name, by="0"),)}
    if dialect != "symbolic":
        assert set(findings.input_shapes.values()) == {(shape,)}


def test_packed_sequences_and_loops_over_a_cell() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.cell = nn.GRU(4, 3, batch_first=True), nn.GRUCell(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True)
            _, h = self.rnn(packed)
            for step in range(3):
                h = self.cell(h[0], h[0] + step)[None]
            return h

    findings = find(Packed(), torch.randn(2, 5, 4))
    assert findings["rnn.weight_hh_l0"] == (Use(op="gru", by="rnn"),)
    assert findings.input_shapes["rnn.weight_hh_l0"] == ((8, 4),)
    assert findings["cell.weight_hh"] == (Use(op="gru_cell", by="cell", times=3),)


CONVOLUTIONS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 8)),
    "conv2d padded": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 8, 8)),
}


@every_dialect
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, dialect: str) -> None:
    make, shape = CONVOLUTIONS[name]
    model = nn.Sequential(make(), nn.ReLU())
    uses = set(found(model, torch.randn(shape), dialect).values())
    assert uses == {(Use(op="conv", by="0", activation="relu"),)}


@every_dialect
def test_norms_embeddings_bilinear_prelu(dialect: str) -> None:
    model = nn.Sequential(
        nn.Embedding(9, 4), nn.LayerNorm(4), nn.GroupNorm(1, 3), nn.BatchNorm1d(3), nn.Tanh(),
        nn.RMSNorm(4), nn.PReLU(),
    )  # fmt: skip
    findings = found(model, torch.randint(0, 9, (2, 3)), dialect)
    assert ops(findings) == {
        "0.weight": "embedding",
        "1.weight": "norm",
        "1.bias": "norm",
        "2.weight": "norm",
        "2.bias": "norm",
        "3.weight": "norm -> tanh",
        "3.bias": "norm -> tanh",
        "5.weight": "norm -> prelu",
        "6.weight": "prelu",
    }


@every_dialect
def test_multihead_attention_reads_its_child(dialect: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    findings = found(Block(), torch.randn(2, 3, 4), dialect)
    names = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    assert list(findings) == [f"attention.{name}" for name in names]
    assert set(findings.values()) == {(Use(op="attention", by="attention"),)}


@pytest.mark.parametrize("dialect", ["recorded", "exported"])
def test_transformer_encoder_layers(dialect: str) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, activation="gelu")
    findings = found(nn.TransformerEncoder(layer, 2), torch.randn(2, 3, 4), dialect)
    for i in range(2):
        one = {k[9:]: v for k, v in ops(findings).items() if k.startswith(f"layers.{i}.")}
        assert one == {
            "self_attn.in_proj_weight": "attention",
            "self_attn.in_proj_bias": "attention",
            "self_attn.out_proj.weight": "attention",
            "self_attn.out_proj.bias": "attention",
            "linear1.weight": "linear -> gelu",
            "linear1.bias": "linear -> gelu",
            "linear2.weight": "linear",
            "linear2.bias": "linear",
            **{f"norm{n}.{p}": "norm" for n in (1, 2) for p in ("weight", "bias")},
        }
        (use,) = findings[f"layers.{i}.self_attn.out_proj.weight"]
        assert use.by == f"layers.{i}.self_attn"


def test_a_leaf_that_hides_what_it_does_is_other() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8))
    assert set(find(model).values()) == {(Use(op="other", by="0"),)}


@every_dialect
def test_products_by_matmul_and_einsum(dialect: str) -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Parameter(torch.randn(2, 2)), nn.Parameter(torch.randn(4, 4))
            self.added, self.summed = (
                nn.Parameter(torch.randn(4, 4)),
                nn.Parameter(torch.randn(4, 4)),
            )
            self.experts, self.scale = (
                nn.Parameter(torch.randn(3, 4, 4)),
                nn.Parameter(torch.ones(4)),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = (self.left @ x).relu() @ self.right.t()
            x = torch.addmm(x.sum(), x, self.added).tanh()
            x = torch.einsum("bi,oi->bo", x, self.summed)
            x = torch.bmm(x.expand(3, 2, 4), self.experts).sigmoid() * self.scale
            return x @ self.experts[0].t().contiguous()

    assert ops(found(Products(), torch.randn(2, 4), dialect)) == {
        "left": "matmul -> relu",
        "right": "matmul",
        "added": "addmm -> tanh",
        "summed": "matmul",
        "experts": "grouped_mm -> sigmoid, grouped_mm",
        "scale": "scale",
    }


class Tied(nn.Module):
    """One weight under two names, and one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.words.weight
        self.fc = nn.Linear(4, 4)
        self.again = self.fc

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.again(F.relu(self.fc(self.words(ids)))))


@every_dialect
def test_ties_and_shared_modules(dialect: str) -> None:
    findings = found(Tied(), torch.randint(0, 9, (2, 3)), dialect)
    both = (Use(op="embedding", by="words"), Use(op="linear", by="head"))
    twice = (Use(op="linear", by="fc", activation="relu"), Use(op="linear", by="fc"))
    assert dict(findings) == {
        "words.weight": both,
        "head.weight": both,
        "fc.weight": twice,
        "fc.bias": twice,
        "again.weight": twice,
        "again.bias": twice,
    }
    assert findings.tied == (
        ("words.weight", "head.weight"),
        ("fc.weight", "again.weight"),
        ("fc.bias", "again.bias"),
    )


@every_dialect
def test_reading_a_dtype_or_a_shape_is_no_use(dialect: str) -> None:
    model = After(lambda x: x.type_as(model.bias).view_as(x).to(model.bias.dtype).relu())
    findings = found(model, torch.randn(2, 4), dialect)
    assert findings.unused == ("bias",)
    assert findings["fc.weight"] == (Use(op="linear", by="fc", activation="relu"),)


def test_a_plain_model_needs_no_inputs() -> None:
    findings = find(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert findings["0.weight"] == (Use(op="linear", by="0", activation="relu"),)
    assert findings.input_shapes["0.weight"] == (None,)
    assert findings.capture is not None
    assert findings.capture.way == "symbolic_trace"


def test_the_printed_table() -> None:
    assert str(find(Branches(), torch.ones(2, 4))) == (
        "captured by record\n"
        "up.weight    linear by up -> relu\n"
        "up.bias      linear by up -> relu\n"
        "down.weight  unused\n"
        "down.bias    unused"
    )


def test_inputs_with_which_the_model_does_not_run() -> None:
    with pytest.raises(CaptureError, match="mat1 and mat2 shapes cannot be multiplied") as error:
        find(nn.Sequential(nn.Linear(4, 4)), torch.ones(2, 5))
    assert str(error.value).startswith("cannot capture Sequential:\n  - record: RuntimeError")
    assert isinstance(error.value, SurgeryError)


def test_an_untraceable_model_without_inputs() -> None:
    with pytest.raises(
        CaptureError, match="fix: give example_inputs, the arguments of one forward"
    ):
        find(Branches())


@pytest.mark.parametrize("inputs", [None, torch.ones(2, 4)], ids=["traced", "recorded"])
def test_operated_modules_have_plain_names(inputs: Tensor | None) -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    before = find(plain, inputs)
    after = find(apply_dropconnect(plain, "*", p=0.5), inputs)
    assert list(after) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert dict(after) == dict(before)


def test_the_input_shape_shows_the_batch() -> None:
    class Flattens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole, self.flat = nn.Linear(4, 4), nn.Linear(4, 4)
            self.position = nn.Embedding(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.whole(x) + self.position(torch.arange(3))
            return self.flat(x.reshape(-1, 4))

    shapes = find(Flattens(), torch.randn(2, 3, 4)).input_shapes
    assert shapes["whole.weight"] == ((2, 3, 4),)
    assert shapes["flat.weight"] == ((6, 4),)
    assert shapes["position.weight"] == ((3,),)
