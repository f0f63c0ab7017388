"""Every weight of six architectures (and two variants): its operation, users, ties, activation."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch

from surgery import apply_dropconnect
from surgery.spec.plan import Use
from surgery.transforms.capture.capture import capture, capture_of
from surgery.transforms.reading.find import find
from surgery.transforms.reading.findings import Findings

TABLES: dict[str, dict[str, str]] = {
    "minilm": {
        "embeddings.*_embeddings.weight": "embedding",
        "*.LayerNorm.*": "norm",
        "*.self.query.*": "linear",
        "*.self.key.*": "linear",
        "*.self.value.*": "linear",
        "*.attention.output.dense.*": "linear",
        "*.intermediate.dense.*": "linear gelu",
        "encoder.layer.[01].output.dense.*": "linear",
        "pooler.dense.*": "linear tanh",
    },
    "albert": {
        "embeddings.*_embeddings.weight": "embedding",
        "embeddings.LayerNorm.*": "norm",
        "encoder.embedding_hidden_mapping_in.*": "linear",
        "*.full_layer_layer_norm.*": "2 norm",
        "*.attention.LayerNorm.*": "2 norm",
        "*.attention.query.*": "2 linear",
        "*.attention.key.*": "2 linear",
        "*.attention.value.*": "2 linear",
        "*.attention.dense.*": "2 linear",
        "*.ffn.*": "2 linear gelu_new",
        "*.ffn_output.*": "2 linear",
        "pooler.*": "linear tanh",
    },
    "gpt2": {
        "transformer.wte.weight": "embedding, linear by lm_head",
        "transformer.wpe.weight": "embedding",
        "*.ln_*": "norm",
        "*.c_attn.*": "addmm",
        "*.attn.c_proj.*": "addmm",
        "*.mlp.c_fc.*": "addmm gelu_new",
        "*.mlp.c_proj.*": "addmm",
        "lm_head.weight": "embedding by transformer.wte, linear",
    },
    "llama": {
        "model.embed_tokens.weight": "embedding",
        "*.self_attn.?_proj.weight": "linear",
        "*.mlp.gate_proj.weight": "linear silu",
        "*.mlp.up_proj.weight": "linear",
        "*.mlp.down_proj.weight": "linear",
        "*norm.weight": "scale",
        "lm_head.weight": "linear",
    },
    "t5": {
        "shared.weight": "embedding by encoder.embed_tokens, "
        "embedding by decoder.embed_tokens, linear by lm_head",
        "*Attention.[qkvo].weight": "linear",
        "*.relative_attention_bias.weight": "embedding",
        "*layer_norm.weight": "scale",
        "*.DenseReluDense.wi.weight": "linear relu",
        "*.DenseReluDense.wo.weight": "linear",
    },
    "mixtral": {
        "model.embed_tokens.weight": "embedding",
        "*.self_attn.?_proj.weight": "linear",
        "*.mlp.gate.weight": "linear softmax",
        "*.mlp.experts.gate_up_proj": "grouped_mm swiglu",
        "*.mlp.experts.down_proj": "grouped_mm",
        "*norm.weight": "scale",
        "lm_head.weight": "linear",
    },
    "vit": {
        "vit.embeddings.cls_token": "cat",
        "vit.embeddings.position_embeddings": "add",
        "vit.embeddings.patch_embeddings.projection.*": "conv",
        "*.attention.?_proj.*": "linear",
        "*layernorm*": "norm",
        "*.mlp.fc1.*": "linear gelu",
        "*.mlp.fc2.*": "linear",
        "classifier.*": "linear",
    },
}  # fmt: skip
"""By pattern, how a parameter is used: `[times] operation [activation] [by module]`; its own module if
none is named."""

for _copy in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
    TABLES["t5"][_copy] = TABLES["t5"]["shared.weight"]
TABLES["t5_gated"] = {
    **{pattern: how for pattern, how in TABLES["t5"].items() if ".wi." not in pattern},
    "*.DenseReluDense.wi_0.weight": "linear gelu_new",
    "*.DenseReluDense.wi_1.weight": "linear",
}

OTHER_NAMES = {
    "*.attention.?_proj.*": ("*.attention.query.*", "*.attention.key.*", "*.attention.value.*",
                             "*.attention.output.dense.*"),
    "*.mlp.fc1.*": ("*.intermediate.dense.*",),
    "*.mlp.fc2.*": ("*.layer.[01].output.dense.*",),
}  # fmt: skip
"""What transformers 5.0 calls the same weights of ViT."""

TIED = {
    "gpt2": {("transformer.wte.weight", "lm_head.weight")},
    "t5": {
        ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
         "lm_head.weight")
    },
}  # fmt: skip
TIED["t5_gated"] = TIED["t5"]


def rows(name: str, parameters: list[str]) -> dict[str, str]:
    """The table of a model, by the names that this version of transformers has."""
    table = TABLES[name]
    if name == "vit" and not any(fnmatchcase(one, "*.mlp.fc1.*") for one in parameters):
        table = {new: how for row, how in table.items() for new in OTHER_NAMES.get(row, (row,))}
    return table


def expected(name: str, table: dict[str, str]) -> tuple[Use, ...]:
    """The uses that the table says; exactly one pattern must match."""
    (pattern,) = [pattern for pattern in table if fnmatchcase(name, pattern)]
    return tuple(use(text, own=name.rpartition(".")[0]) for text in table[pattern].split(", "))


def use(text: str, own: str) -> Use:
    text, _, by = text.partition(" by ")
    words = text.split()
    times = int(words.pop(0)) if words[0].isdigit() else 1
    return Use(op=words[0], by=by or own, times=times, activation=(words[1:] or [None])[0])


def check(findings: Findings, model: Any, name: str) -> None:
    parameters = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    assert list(findings) == parameters
    table = rows(name, parameters)
    wanted = {parameter: expected(parameter, table) for parameter in parameters}
    assert dict(findings) == wanted
    assert set(findings.tied) == TIED.get(name, set())
    assert findings.unused == ()


LIKE_OTHERS = {"t5_gated", "albert"}
"""Exports that take seconds, and have no operation that no other has."""


@pytest.mark.parametrize("name", TABLES)
def test_recorded(name: str, tiny) -> None:
    model = tiny(name)
    findings = find(model)
    assert findings.capture is not None
    assert (findings.capture.way, dict(findings.capture.reasons)) == ("record", {})
    check(findings, model, name)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LIKE_OTHERS)) for n in TABLES]
)
def test_exported(name: str, tiny, traced_experts: str) -> None:
    model = tiny(name)
    model.config._experts_implementation = traced_experts
    graph = capture(model)
    found = capture_of(graph)
    assert found is not None
    assert found.way == "export"
    assert list(found.reasons) == ["symbolic_trace"]
    findings = find(model, graph=graph)
    check(findings, model, name)
    assert findings.input_shapes == find(model).input_shapes


@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_the_table_is_there(name: str, tiny) -> None:
    names = [n for n, _ in tiny(name).named_parameters(remove_duplicate=False)]
    for pattern in rows(name, names):
        assert any(fnmatchcase(n, pattern) for n in names), pattern


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_however_they_are_computed(implementation: str, tiny) -> None:
    """Eager code is one product for each expert that a token was sent to."""
    model = tiny("mixtral")
    model.config._experts_implementation = implementation
    findings = find(model)
    experts = "model.layers.0.mlp.experts"
    for name, activation in (("gate_up_proj", "swiglu"), ("down_proj", None)):
        (found,) = findings[f"{experts}.{name}"]
        assert (found.op, found.by, found.activation) == ("grouped_mm", experts, activation)
        assert (found.times > 1) == (implementation == "eager")


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_an_operated_model_has_plain_names(name: str, tiny) -> None:
    model = apply_dropconnect(tiny(name), "*", p=0.3).train()
    check(find(model), model=tiny(name), name=name)
    check(find(model, graph=capture(model)), model=tiny(name), name=name)
    assert model.training
    assert any("_raw" in n for n, _ in model.named_parameters())


def test_labels_and_cache_do_not_matter(tiny) -> None:
    model = tiny("gpt2")
    ids = torch.randint(0, 99, (3, 5))
    findings = find(model, {"input_ids": ids, "labels": ids, "use_cache": True})
    check(findings, model, "gpt2")
    assert findings.input_shapes["transformer.h.0.mlp.c_fc.weight"] == ((15, 32),)
    assert findings.input_shapes["lm_head.weight"] == ((3, 5), (3, 5, 32))
    graph = capture(model, {"input_ids": ids, "labels": ids})
    assert [n.name for n in graph.graph.find_nodes(op="placeholder")] == ["input_ids", "use_cache"]
