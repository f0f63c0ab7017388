"""`capture`: which way it takes and why, its inputs, its errors, and that the model stays as it is."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from surgery import SurgeryError, apply_dropconnect
from surgery.transforms.capture.capture import Capture, CaptureError, capture, capture_of
from surgery.transforms.reading.find import find

from ...zoo.tiny import TINY
from ...zoo.traits import Branches, Restless, WantsLabels


def way(graph: fx.GraphModule) -> Capture:
    found = capture_of(graph)
    assert found is not None
    return found


def test_a_plain_model_is_traced_and_needs_no_inputs() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    graph = capture(model)
    assert way(graph) == Capture(way="symbolic_trace")
    assert str(way(graph)) == "captured by symbolic_trace"
    assert graph.get_parameter("0.weight") is model[0].weight


def test_a_transformer_is_exported_with_dummies(tiny) -> None:
    model = tiny("gpt2").train()
    graph = capture(model)
    assert way(graph).way == "export"
    assert list(way(graph).reasons) == ["symbolic_trace"]
    assert str(way(graph)).startswith("captured by export\n  symbolic_trace failed: ")
    assert graph.get_parameter("transformer.wpe.weight") is model.transformer.wpe.weight
    assert model.training


def test_data_dependent_branches_are_recorded(capfd) -> None:
    graph = capture(Branches(), torch.ones(2, 4))
    assert way(graph).way == "record"
    assert list(way(graph).reasons) == ["symbolic_trace", "export"]
    assert "control flow" in way(graph).reasons["symbolic_trace"]
    assert "data-dependent" in way(graph).reasons["export"]
    assert capfd.readouterr() == ("", "")


def test_a_graph_is_returned_as_it_is() -> None:
    graph = fx.symbolic_trace(nn.Linear(4, 4))
    assert capture(graph) is graph
    assert capture_of(graph) is None


def test_captured_graphs_copy_and_pickle() -> None:
    for graph in (capture(nn.Linear(4, 3)), capture(Branches(), torch.ones(2, 4))):
        x = torch.ones(2, 4)
        for twin in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
            assert all(map(torch.equal, twin(x), graph(x)))
        assert way(copy.deepcopy(graph)) == way(graph)


def test_a_forward_that_needs_labels() -> None:
    x, labels = torch.ones(2, 4), torch.tensor([1, 2])
    model = WantsLabels()
    for inputs in ((x, labels), {"x": x, "labels": labels}):
        assert way(capture(model, inputs)).way == "record"
    with pytest.raises(CaptureError) as error:
        capture(model, x)
    assert str(error.value) == (
        "cannot capture WantsLabels:\n"
        "  - symbolic_trace: TraceError: symbolically traced variables cannot be used as inputs to "
        "control flow\n"
        "  - export: TypeError: missing a required argument: 'labels'\n"
        "  - record: TypeError: WantsLabels.forward() missing 1 required positional argument: "
        "'labels'\n"
        "fix: give example_inputs with which model(...) runs in evaluation mode"
    )
    assert isinstance(error.value, SurgeryError)


def test_no_inputs_given_and_none_to_be_made() -> None:
    with pytest.raises(CaptureError) as error:
        capture(Branches())
    assert str(error.value) == (
        "cannot capture Branches:\n"
        "  - symbolic_trace: TraceError: symbolically traced variables cannot be used as inputs to "
        "control flow\n"
        "  - export: it needs inputs, and none were given\n"
        "  - record: it needs inputs, and none were given\n"
        "fix: give example_inputs, the arguments of one forward call (a tensor, a tuple or a mapping)"
    )


@pytest.mark.parametrize("call", [capture, find])
def test_leading_sizes_that_disagree(call: Any, tiny) -> None:
    ids, mask = torch.ones(4, 5, dtype=torch.long), torch.ones(3, 5, dtype=torch.long)
    with pytest.raises(CaptureError) as error:
        call(tiny("minilm"), {"input_ids": ids, "attention_mask": mask})
    assert str(error.value) == (
        "cannot run BertModel on these example_inputs: their leading sizes differ: input_ids 4, "
        "attention_mask 3; give one row for each example in all of them"
    )


@pytest.mark.parametrize("call", [capture, find])
def test_leading_sizes_of_other_inputs_that_do_not_run(call: Any) -> None:
    inputs = {"x": torch.ones(2, 4), "labels": torch.tensor([1, 2, 3])}
    with pytest.raises(CaptureError, match=r"batch_size \(2\) to match") as error:
        call(WantsLabels(), inputs)
    assert str(error.value).endswith(
        "\nfix: give example_inputs of one batch; their leading sizes differ: x 2, labels 3"
    )


@pytest.mark.parametrize("call", [capture, find])
def test_leading_sizes_may_differ_where_the_model_wants_them_to(call: Any) -> None:
    model = nn.Sequential(nn.GRU(4, 3))
    assert call(model[0], (torch.ones(5, 2, 4), torch.zeros(1, 2, 3))) is not None


@pytest.mark.parametrize("call", [capture, find])
def test_the_meta_device(call: Any, tiny) -> None:
    with torch.device("meta"):
        model = Branches()
        bert = tiny("minilm")
    with pytest.raises(
        CaptureError, match="fix: the model is on the meta device; load its weights"
    ):
        call(model, torch.ones(2, 4))
    assert call(bert) is not None


@pytest.mark.parametrize("call", [capture, find])
def test_inputs_of_another_type(call: Any) -> None:
    with pytest.raises(TypeError, match="example_inputs is a str; give a tensor"):
        call(nn.Linear(4, 4), "words")


@pytest.mark.parametrize("name", sorted({*TINY} - {"bert", "mamba", "mixtral", "t5_gated"}))
def test_the_model_is_left_as_it_was(name: str, tiny) -> None:
    model = tiny(name).train()
    next(iter(model.children())).eval()
    flags = [module.training for module in model.modules()]
    names = [list(vars(module)) for module in model.modules()]
    values = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    capture(model)
    assert [module.training for module in model.modules()] == flags
    assert [list(vars(module)) for module in model.modules()] == names
    assert all(torch.equal(values[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_no_proxy_stays_in_a_model_that_keeps_its_results() -> None:
    model = Restless()
    before = [dict(vars(module)) for module in model.modules()]
    capture(model, torch.randn(3, 4))
    assert [dict(vars(module)) for module in model.modules()] == before
    assert torch.equal(model.calls, torch.zeros(()))


def test_an_operated_model(keys) -> None:
    model = apply_dropconnect(nn.Sequential(nn.Linear(4, 4), Branches()), "*", p=0.5).train()
    graph = capture(model, torch.ones(2, 4))
    assert way(graph).way == "record"
    assert keys == []
    assert "dropconnect p=0.5" in repr(model)
    assert all(module.training for module in model.modules())
    model(torch.ones(2, 4))
    assert keys


OTHERS: dict[str, Any] = {
    "clip": lambda t: t.CLIPModel(
        t.CLIPConfig(
            text_config={**_SMALL, "vocab_size": 50},
            vision_config={**_SMALL, "image_size": 16, "patch_size": 8},
        )
    ),
    "resnet": lambda t: t.ResNetModel(t.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])),
    "whisper": lambda t: t.WhisperModel(
        t.WhisperConfig(
            vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=20, decoder_ffn_dim=20, num_mel_bins=8,
            max_source_positions=20, pad_token_id=0, bos_token_id=0, eos_token_id=1,
            decoder_start_token_id=0,
        )
    ),
    "wav2vec2": lambda t: t.Wav2Vec2Model(
        t.Wav2Vec2Config(
            **_SMALL, conv_dim=[16], conv_stride=[5], conv_kernel=[10], num_feat_extract_layers=1
        )
    ),
    "sequence classifier without padding": lambda t: t.GPT2ForSequenceClassification(
        t.GPT2Config(
            vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0,
            eos_token_id=0,
        )
    ),
}  # fmt: skip
_SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("name", OTHERS)
def test_dummies_for_other_inputs(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    findings = find(OTHERS[name](transformers))
    assert findings.capture == Capture(way="record")


def test_a_model_with_a_config_of_its_own_gets_no_dummies() -> None:
    class Configured(nn.Module):
        main_input_name = "spectrum"

        def __init__(self) -> None:
            super().__init__()
            self.config, self.fc = object(), nn.Linear(4, 4)

        def forward(self, spectrum: Tensor) -> Tensor:
            return self.fc(spectrum)

    assert way(capture(Configured())).way == "symbolic_trace"
    assert find(Configured())["fc.weight"][0].op == "linear"


def test_transformers_is_not_imported() -> None:
    code = "import sys, surgery.transforms.reading.find; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
