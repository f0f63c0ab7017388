"""sentence-transformers: every kind of module with weights saves them plain, alone and in a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surgery import (
    apply_dropconnect,
    dropconnect_sites,
    load_dropconnect,
    plain_state_dict,
)
from surgery.verbs.checkpoint import anchors

library = pytest.importorskip("sentence_transformers", minversion="5.4")
from sentence_transformers.sentence_transformer import modules  # noqa: E402
from sentence_transformers.sparse_encoder import modules as sparse  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

WORDS = ["a", "b", "c", "[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]


def tokenizer() -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    one = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    one.pre_tokenizer = pre_tokenizers.Whitespace()
    return one


def transformer_folder(path: Path, head: str = "BertModel") -> str:
    """A tiny BERT with its tokenizer."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, head)(config).save_pretrained(path)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "pad", "cls", "sep", "mask")}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer(), **names)
    fast.save_pretrained(path)
    return str(path)


def words() -> Any:
    from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer

    return WhitespaceTokenizer(WORDS)


MODULES: dict[str, tuple[Callable[[Path], Any], Any]] = {
    "Transformer": (lambda path: modules.Transformer(transformer_folder(path)), "*.query"),
    "MLMTransformer": (
        lambda path: sparse.MLMTransformer(transformer_folder(path, "BertForMaskedLM")),
        "*.query",
    ),
    "Dense": (lambda path: modules.Dense(8, 4), "linear"),
    "CNN": (lambda path: modules.CNN(8, 4), "convs.*"),
    "LSTM": (lambda path: modules.LSTM(8, 4), "encoder"),
    "WeightedLayerPooling": (lambda path: modules.WeightedLayerPooling(8, 3, 1), "layer_weights"),
    "WordEmbeddings": (
        lambda path: modules.WordEmbeddings(words(), torch.randn(len(WORDS), 8), True),
        "emb_layer",
    ),
    "WordWeights": (lambda path: modules.WordWeights(WORDS, {"a": 2.0}), "emb_layer"),
    "StaticEmbedding": (
        lambda path: modules.StaticEmbedding(tokenizer(), embedding_dim=8),
        "embedding.weight",
    ),
    "SparseAutoEncoder": (lambda path: sparse.SparseAutoEncoder(8, 4, 2), "encoder"),
    "SparseStaticEmbedding": (
        lambda path: sparse.SparseStaticEmbedding(MODULES["Transformer"][0](path).tokenizer),
        "weight",
    ),
}  # fmt: skip


def made(name: str, tmp_path: Path, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A plain module and an operated copy of it."""
    make, targets = MODULES[name]
    plain = make(tmp_path / "base")
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    return plain, apply_dropconnect(copy.deepcopy(plain), targets, p=0.3, **options)


def assert_same(one: Any, other: Any) -> None:
    assert list(one) == list(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("name", MODULES)
def test_a_module_by_itself(tmp_path: Path, name: str, safe: bool) -> None:
    plain, model = made(name, tmp_path, toward="pretrained")
    folder = tmp_path / "saved"
    folder.mkdir()
    model.save(str(folder), safe_serialization=safe)
    kind: Any = type(plain)
    loaded = kind.load(str(folder))
    assert_same(loaded.state_dict(), plain.state_dict())
    for parameter in loaded.parameters():
        parameter.requires_grad_(True)
    load_dropconnect(loaded, folder)
    assert dropconnect_sites(loaded) == dropconnect_sites(model)
    assert_same(anchors(loaded), anchors(model))


def test_every_kind_with_weights_is_tested() -> None:
    from sentence_transformers.base.modules import Module

    def below(kind: type) -> list[type]:
        return [kind, *(more for one in kind.__subclasses__() for more in below(one))]

    saving = {kind.__name__ for kind in below(Module) if "save" in vars(kind)}
    plain = {"Module", "BoW", "Dropout", "Normalize", "Pooling", "Router", "LogitScore"}
    plain |= {"SpladePooling", "LayerNorm", "MultiVectorMask", "BaseTokenPooling"}
    plain |= {"LambdaTokenPooling", "HierarchicalTokenPooling"}
    assert saving - plain <= MODULES.keys()


@pytest.mark.parametrize("kind", ["SentenceTransformer", "SparseEncoder", "CrossEncoder"])
def test_whole_models(tmp_path: Path, kind: str) -> None:
    """Sites are saved under their names in the whole model, and found there again."""
    if kind == "SentenceTransformer":
        first = modules.Transformer(transformer_folder(tmp_path / "base"))
        parts = [first, modules.Pooling(8), modules.Dense(8, 4)]
        plain = library.SentenceTransformer(modules=parts, device="cpu")
        targets = ["*.query", "2.linear"]
    elif kind == "SparseEncoder":
        first = sparse.MLMTransformer(transformer_folder(tmp_path / "base", "BertForMaskedLM"))
        plain = library.SparseEncoder(modules=[first, sparse.SpladePooling()], device="cpu")
        targets = ["*.query"]
    else:
        folder = transformer_folder(tmp_path / "base", "BertForSequenceClassification")
        plain = library.CrossEncoder(folder, device="cpu")
        targets = ["*.query", "*.classifier"]
    model = apply_dropconnect(copy.deepcopy(plain), targets, p=0.3, toward="pretrained")
    folder = str(tmp_path / "saved")
    model.save_pretrained(folder, create_model_card=False)
    loaded = type(plain)(folder, device="cpu")
    assert_same(loaded.state_dict(), plain.state_dict())
    load_dropconnect(loaded, folder)
    assert dropconnect_sites(loaded) == dropconnect_sites(model)
    assert_same(anchors(loaded), anchors(model))
    assert_same(plain_state_dict(loaded), plain.state_dict())
