"""Checkpoints of others: their keys become those of the plain modules, and these compute what theirs
did in `eval()`.

State dicts are made here, key by key, as the source of each library makes them; where one is installed,
its own modules are saved too.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from surgery import SurgeryError, apply_dropconnect, convert_checkpoint, plain_state_dict
from surgery.checkpoints.conventions import CONVENTIONS
from surgery.checkpoints.tensors import read_tensors
from surgery.checkpoints.weights import WrongUse
from surgery.stored.header import read_header

from .raw import apart, names, operated, same

LSTM = dict(input_size=4, hidden_size=4)
SEQUENCE = torch.linspace(-1, 1, 5 * 2 * 4).view(5, 2, 4)


def lstm() -> nn.LSTM:
    torch.manual_seed(1)
    return nn.LSTM(**LSTM)


def plain(prefix: str = "", layer: nn.Module | None = None) -> dict[str, Tensor]:
    state = (lstm() if layer is None else layer).state_dict()
    return {prefix + key: value.clone() for key, value in state.items()}


def moved(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    return {names.get(key, key): value for key, value in state.items()}


HH = "weight_hh_l0"


def by_torchnlp(after_eval: bool) -> dict[str, Tensor]:
    state = moved(plain("rnn."), {f"rnn.{HH}": f"rnn.{HH}_raw"})
    return {**state, **({f"rnn.{HH}": state[f"rnn.{HH}_raw"]} if after_eval else {})}


def by_awd_lstm(after_forward: bool) -> dict[str, Tensor]:
    state = moved(plain("rnns.0.module."), {f"rnns.0.module.{HH}": f"rnns.0.module.{HH}_raw"})
    state |= {"encoder.weight": torch.ones(3, 4), "decoder.weight": torch.ones(3, 4)}
    masked = {f"rnns.0.module.{HH}": torch.zeros(16, 4)}
    return {**state, **(masked if after_forward else {})}


def by_fastai(old: bool) -> dict[str, Tensor]:
    state = moved(plain("0.rnns.0.module."), {f"0.rnns.0.module.{HH}": f"0.rnns.0.{HH}_raw"})
    state |= {"0.encoder.weight": torch.ones(3, 4), "0.encoder_dp.emb.weight": torch.ones(3, 4)}
    return {**state, **({f"0.rnns.0.module.{HH}": torch.zeros(16, 4)} if old else {})}


def by_parametrize() -> dict[str, Tensor]:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("p", torch.tensor(0.5))

        def forward(self, weight: Tensor) -> Tensor:
            return nn.functional.dropout(weight, 0.5, self.training)

    model = nn.Sequential(OrderedDict(rnn=lstm()))
    parametrize.register_parametrization(model.rnn, HH, Dropped())
    return model.state_dict()


EMBEDDED = {"encoder.weight": torch.ones(3, 4)}
AWD = {**EMBEDDED, "decoder.weight": torch.ones(3, 4), **plain("rnns.0.")}
FASTAI = {"0.encoder.weight": torch.ones(3, 4), **plain("0.rnns.0.")}
LINEAR = nn.Linear(3, 3)
CASES: dict[str, tuple[str, Any, dict[str, Tensor], int]] = {
    "torchnlp": ("torchnlp", by_torchnlp(False), plain("rnn."), 0),
    "torchnlp after eval": ("torchnlp", by_torchnlp(True), plain("rnn."), 1),
    "awd-lstm": ("awd-lstm", by_awd_lstm(False), AWD, 0),
    "awd-lstm after a forward": ("awd-lstm", by_awd_lstm(True), AWD, 1),
    "awd-lstm, the module alone": (
        "awd-lstm",
        moved(plain("module."), {f"module.{HH}": f"module.{HH}_raw"}),
        plain(),
        0,
    ),
    "fastai": ("fastai", by_fastai(False), FASTAI, 1),
    "fastai, first release": ("fastai", by_fastai(True), FASTAI, 2),
    "parametrize": ("parametrize", by_parametrize(), plain("rnn."), 1),
    "mixout": ("mixout", plain("fc.", LINEAR), plain("fc.", LINEAR), 0),
    "mixout with its target": (
        "mixout",
        {**plain("fc.", LINEAR), "fc.target": torch.zeros(3, 3), "target": torch.ones(1)},
        {**plain("fc.", LINEAR), "target": torch.ones(1)},
        1,
    ),
    "probly": ("probly", plain("model.0.", LINEAR), plain("0.", LINEAR), 0),
    "probly, a function": ("probly", plain("0.", LINEAR), plain("0.", LINEAR), 0),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_keys_are_those_of_the_plain_modules(name: str, ending: str, tmp_path: Path) -> None:
    convention, state, expected, left_out = CASES[name]
    source, out = tmp_path / f"in{ending}", tmp_path / "out.safetensors"
    if ending == ".pt":
        torch.save(state, source)
    else:
        save_file({key: value.clone() for key, value in state.items()}, source)
    done = convert_checkpoint(source, out, convention)
    assert same(load_file(out), expected)
    assert len(done.left_out) == left_out
    assert done.unmatched == ()
    assert done.tensors == len(expected)
    kept = state.keys() - done.left_out.keys()
    assert {done.renamed.get(key, key) for key in kept} == set(expected)


@pytest.mark.filterwarnings("ignore")
def test_pytorch_nlp_itself(tmp_path: Path) -> None:
    theirs = pytest.importorskip("torchnlp.nn").WeightDropLSTM(**LSTM, weight_dropout=0.5)
    before = theirs.eval()(SEQUENCE)[0]
    torch.save(theirs.state_dict(), tmp_path / "in.pt")
    convert_checkpoint(tmp_path / "in.pt", tmp_path / "out.safetensors", "torchnlp")
    ours = lstm()
    ours.load_state_dict(load_file(tmp_path / "out.safetensors"))
    assert torch.equal(ours(SEQUENCE)[0], before)


@pytest.mark.filterwarnings("ignore")
def test_fastai_itself(tmp_path: Path) -> None:
    awd = pytest.importorskip("fastai.text.models.awdlstm")
    theirs = awd.AWD_LSTM(9, 4, 6, 2).eval()
    words = torch.arange(8).view(2, 4)
    before = theirs(words)
    torch.save({"model": theirs.state_dict(), "opt": None}, tmp_path / "in.pth")
    convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.safetensors", "fastai")
    state = load_file(tmp_path / "out.safetensors")
    layers = [nn.LSTM(4, 6, batch_first=True), nn.LSTM(6, 4, batch_first=True)]
    ours = nn.ModuleDict({"encoder": nn.Embedding(9, 4), "rnns": nn.ModuleList(layers)})
    ours.load_state_dict(state)
    x = ours["encoder"](words)
    for layer in layers:
        x = layer(x)[0]
    assert torch.equal(x, before)


@pytest.mark.filterwarnings("ignore")
def test_probly_itself(tmp_path: Path) -> None:
    probly = pytest.importorskip("probly.representation")
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    torch.save(probly.DropConnect(model).state_dict(), tmp_path / "in.pt")
    convert_checkpoint(tmp_path / "in.pt", tmp_path / "out.safetensors", "probly")
    assert same(load_file(tmp_path / "out.safetensors"), dict(model.state_dict()))


def test_our_own_raw_keys_in_a_pickle(tmp_path: Path) -> None:
    model = operated()
    torch.save(model.state_dict(), tmp_path / "in.pt")
    done = convert_checkpoint(tmp_path / "in.pt", tmp_path / "out.safetensors", "surgery")
    assert same(load_file(tmp_path / "out.safetensors"), dict(plain_state_dict(model)))
    assert len(done.renamed) == len(done.left_out) == 5  # both names of the tied one


@pytest.mark.parametrize("shards", [1, 2])
def test_a_folder_becomes_a_folder(shards: int, tmp_path: Path) -> None:
    model = apply_dropconnect(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), "*", p=0.5)
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "config.json").write_text("{}")
    state = apart(dict(model.state_dict()))[0]
    if shards == 1:
        torch.save(state, source / "pytorch_model.bin")
    else:
        weight_map = {}
        for number in range(shards):
            part = dict([*state.items()][number::shards])
            torch.save(part, source / f"pytorch_model-{number}.bin")
            weight_map |= dict.fromkeys(part, f"pytorch_model-{number}.bin")
        index = source / "pytorch_model.bin.index.json"
        index.write_text(str({"weight_map": weight_map}).replace("'", '"'))
    convert_checkpoint(source, out, "surgery")
    assert names(out) == ["config.json", "model.safetensors"]
    assert same(load_file(out / "model.safetensors"), dict(plain_state_dict(model)))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("name", ["state_dict", "model", None])
def test_what_lies_around_a_state_dict(name: str | None, zipped: bool, tmp_path: Path) -> None:
    state: Any = {**by_torchnlp(False), "version": 3}
    whole = state if name is None else {name: state, "epoch": 2, "opt": {"step": torch.ones(1)}}
    torch.save(whole, tmp_path / "in.pt", _use_new_zipfile_serialization=zipped)
    convert_checkpoint(tmp_path / "in.pt", tmp_path / "out.safetensors", "torchnlp")
    assert same(load_file(tmp_path / "out.safetensors"), plain("rnn."))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_dtypes_and_shapes_pass(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {"a_raw": torch.ones(2, 3).to(dtype), "b": torch.ones(()).to(dtype)}
    state |= {"empty": torch.ones(0, 3).to(dtype), "turned": torch.arange(6).view(2, 3).T.to(dtype)}
    torch.save(state, tmp_path / "in.pt")
    convert_checkpoint(tmp_path / "in.pt", tmp_path / "out.safetensors", "torchnlp")
    assert same(load_file(tmp_path / "out.safetensors"), moved(state, {"a_raw": "a"}))


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch evil",)


def refused(
    tmp_path: Path, words: str, convention: str = "torchnlp", kind: Any = SurgeryError
) -> None:
    with pytest.raises(kind, match=words) as caught:
        convert_checkpoint(tmp_path / "in.pt", tmp_path / "out.safetensors", convention)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out.safetensors").exists()


def test_code_in_a_pickle_does_not_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (pickle.dumps(Evil()), pickle.dumps({"w_raw": Evil()}), b"", b"no pickle"):
        (tmp_path / "in.pt").write_bytes(content)
        refused(tmp_path, "is damaged, or holds more than tensors")
        assert not (tmp_path / "evil").exists()
    torch.save(nn.Linear(2, 2), tmp_path / "in.pt")  # as awd-lstm-lm saves
    refused(tmp_path, r"saved whole has to be loaded by its own code: save its state_dict\(\)")


def test_files_that_hold_something_else(tmp_path: Path) -> None:
    for content, words in (
        ([torch.ones(1)], "holds list, and no state dict"),
        ({"a": 1}, "holds the keys"),
        ({"w_raw": torch.ones(2).to_sparse()}, "which safetensors does not hold"),
    ):
        torch.save(content, tmp_path / "in.pt")
        refused(tmp_path, words)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (lambda: torch.ones(2, device="meta"), "'a' is a meta tensor, .* without values, which"),
        (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "'a' is a nested"),
        (lambda: torch.ones(2).to_sparse(), "'a' is a tensor of layout torch.sparse_coo, which"),
        (lambda: torch.eye(2).to_sparse_csr(), "'a' is a tensor of layout torch.sparse_csr"),
        (
            lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            r"'a' is quantized \(torch.qint8; dequantize\(\) it\), which safetensors",
        ),
        (lambda: torch.ones(2, dtype=torch.complex128), "'a' is torch.complex128, which"),
        (lambda: torch.ones(1).expand(2**40), r"in\.pt: 'a' takes 4,398,046,511,104 bytes"),
    ],
    ids=["meta", "nested", "sparse", "csr", "quantized", "complex128", "expanded"],
)
def test_tensors_that_a_file_cannot_hold(odd: Any, words: str, tmp_path: Path) -> None:
    torch.save({"w_raw": torch.ones(2), "a": odd()}, tmp_path / "in.pt")
    refused(tmp_path, words, "surgery")


@pytest.mark.parametrize("key", ["\ud800_raw", "a\udfff", "k" * 5000], ids=ascii)
def test_keys_that_are_no_text(key: str, tmp_path: Path) -> None:
    torch.save({"w_raw": torch.ones(2), key: torch.ones(2)}, tmp_path / "in.pt")
    refused(tmp_path, r"in\.pt: a key is no name: too long, or not Unicode", "surgery")


def test_a_file_of_two_state_dicts_is_refused(tmp_path: Path) -> None:
    state = by_torchnlp(False)
    torch.save({"model": state, "state_dict": state}, tmp_path / "in.pt")
    refused(tmp_path, "a state dict under each of state_dict, model: save the one that is meant")


def test_an_archive_that_is_longer_unpacked(tmp_path: Path) -> None:
    torch.save({"w_raw": torch.zeros(100_000)}, tmp_path / "good.pt")
    with (
        zipfile.ZipFile(tmp_path / "good.pt") as good,
        zipfile.ZipFile(tmp_path / "in.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for record in good.infolist():
            packed.writestr(record.filename, good.read(record))
    refused(tmp_path, "its records are packed, as torch packs none")


def test_what_torch_says_of_a_pickle_is_told_without_its_advice(tmp_path: Path) -> None:
    torch.save({"w_raw": Evil()}, tmp_path / "in.pt")
    refused(
        tmp_path, r"\(UnpicklingError: Trying to load unsupported GLOBAL \w+\.system .* blocked"
    )
    torch.save(nn.Linear(2, 2), tmp_path / "in.pt")
    refused(tmp_path, r"Unsupported global: GLOBAL torch\.nn\.modules\.linear\.Linear\)\. A model")


def test_tensors_are_aligned(tmp_path: Path) -> None:
    """Wide dtypes first, as safetensors has them: else a reader could not map the others."""
    state = {"a_raw": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(1, dtype=torch.bool)}
    state |= {"c": torch.randn(2), "d": torch.randn(3, dtype=torch.float64)}
    torch.save(state, tmp_path / "in.pt")
    out = tmp_path / "out.safetensors"
    convert_checkpoint(tmp_path / "in.pt", out, "surgery")
    with open(out, "rb") as file:
        header = read_header(file, "it")
    assert list(header.entries) == ["d", "c", "a", "b"]
    assert header.data_at % 8 == 0
    for key, entry in header.entries.items():
        assert entry.start % {"d": 8, "c": 4, "a": 2, "b": 1}[key] == 0
    assert same(load_file(out), moved(state, {"a_raw": "a"}))


def test_keys_of_another_convention_are_told(tmp_path: Path) -> None:
    torch.save(by_parametrize(), tmp_path / "in.pt")
    refused(tmp_path, "as those of torchnlp do; it looks like parametrize")
    torch.save(plain(), tmp_path / "in.pt")
    refused(tmp_path, r"no key looks like `weight_hh_l0_raw`.*The first key is 'weight_ih_l0'")
    torch.save({"a.module.w_raw": torch.ones(1), "a.w": torch.ones(1)}, tmp_path / "in.pt")
    refused(tmp_path, "would both be 'a.w'", "awd-lstm")
    refused(tmp_path, "convention must be one of torchnlp, awd-lstm", "keras", ValueError)


def test_what_matches_nothing_is_named(tmp_path: Path) -> None:
    state = {**by_parametrize(), "other.parametrizations.weight.original0": torch.ones(1)}
    torch.save(state, tmp_path / "in.pt")
    out = tmp_path / "out.safetensors"
    done = convert_checkpoint(tmp_path / "in.pt", out, "parametrize")
    assert done.unmatched == ("other.parametrizations.weight.original0",)


def test_an_embedding_that_is_not_the_same_stays(tmp_path: Path) -> None:
    state = {**by_fastai(False), "0.encoder_dp.emb.weight": torch.zeros(3, 4)}
    torch.save(state, tmp_path / "in.pt")
    convert_checkpoint(tmp_path / "in.pt", tmp_path / "out.safetensors", "fastai")
    assert "0.encoder_dp.emb.weight" in load_file(tmp_path / "out.safetensors")


def test_wrong_use(tmp_path: Path) -> None:
    torch.save(by_torchnlp(False), tmp_path / "in.pt")
    for out, words in (("out.bin", "must end in .safetensors"), ("no/x.safetensors", "no folder")):
        with pytest.raises(WrongUse, match=words):
            convert_checkpoint(tmp_path / "in.pt", tmp_path / out, "torchnlp")
    with pytest.raises(WrongUse, match="there is no"):
        convert_checkpoint(tmp_path / "none.pt", tmp_path / "x.safetensors", "torchnlp")


def test_the_help_and_the_page_name_every_convention() -> None:
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()
    assert all(f"`{name}`" in page for name in CONVENTIONS)


def test_views_arrive_as_their_values(tmp_path: Path) -> None:
    long = torch.arange(6.0)
    views = {
        "strided": long[::2],
        "one": long[::2][:1],
        "expanded": torch.ones(1).expand(5),
        "column": torch.randn(3, 2)[:, 0],
        "turned": torch.randn(2, 3).T,
        "conjugate": torch.randn(2, dtype=torch.complex64).conj(),
    }
    torch.save({"l.weight_raw": torch.randn(2, 3), **views}, tmp_path / "in.pt")
    convert_checkpoint(tmp_path / "in.pt", tmp_path / "out.safetensors", "surgery")
    stored = read_tensors(tmp_path / "out.safetensors")  # old safetensors read no complex numbers
    found = {key: one.read() for key, one in stored.items()}
    assert all(torch.equal(found[name], value) for name, value in views.items())


def test_a_tensor_with_the_name_of_the_metadata_is_refused(tmp_path: Path) -> None:
    torch.save({"w_raw": torch.ones(2), "__metadata__": torch.ones(2)}, tmp_path / "in.pt")
    with pytest.raises(SurgeryError, match="'__metadata__', which safetensors keeps"):
        convert_checkpoint(tmp_path / "in.pt", tmp_path / "out.safetensors", "surgery")
    assert not (tmp_path / "out.safetensors").exists()
