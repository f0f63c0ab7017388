"""`mc_predict` over the batches of a loader, with nested inputs and outputs."""

from __future__ import annotations

import gc
import sys
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from surgery import MCPrediction, SurgeryError, apply_dropconnect, mc_predict

from ..helpers import Snapshot
from .test_mc_predict import P, Returns, Stack, classifier

FIELDS = ("mean", "variance", "probabilities", "entropy", "mutual_information")


def assert_equal(one: MCPrediction, other: MCPrediction, rtol: float = 1e-5) -> None:
    assert one.samples == other.samples
    found, expected = ({name: getattr(made, name) for name in FIELDS} for made in (one, other))
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-5)


def loader(x: Tensor, size: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, torch.arange(len(x))), size, **options)


def test_a_loader_gives_what_its_rows_give_as_one_batch() -> None:
    """The last batch is ragged; the labels of `(x, y)` are left out."""
    model, x = classifier(), torch.randn(11, 6)
    whole = mc_predict(model, x, 9, seed=3, batch_size=1)
    found = mc_predict(model, loader(x, 4), 9, seed=3, batch_size=1)
    assert found.mean.shape == (11, 4)
    assert_equal(found, whole)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_all_batches_have_the_masks_of_a_sample_in_common(batch_size: int) -> None:
    """Equal rows get equal predictions wherever they lie, also in a ragged last batch."""
    x = torch.randn(1, 6).expand(10, 6)
    stack = Stack(classifier())
    found = mc_predict(stack, DataLoader(x, 4), 12, seed=1, batch_size=batch_size)  # type: ignore[arg-type]
    assert len(stack.seen) == (3 * 12 if batch_size == 1 else 3)
    torch.testing.assert_close(found.mean, found.mean[:1].expand_as(found.mean))
    assert (found.variance > 0).all()


def test_rows_a_batch_do_not_matter_where_samples_run_one_by_one() -> None:
    model, x = classifier(), torch.randn(10, 6)
    few, many = (mc_predict(model, loader(x, n), 5, seed=2) for n in (2, 7))
    assert_equal(few, many)


@pytest.mark.parametrize("sampling", ["example", "gaussian"])
def test_masks_of_examples_differ_from_batch_to_batch(sampling: str) -> None:
    model, x = classifier(sampling=sampling), torch.randn(1, 6).expand(6, 6)
    found = mc_predict(model, loader(x, 3), 9, seed=1)
    assert len({tuple(row.tolist()) for row in found.mean}) == 6
    assert_equal(found, mc_predict(model, loader(x, 3), 9, seed=1))


class Texts(nn.Module):
    """What a transformers model looks like from outside."""

    def __init__(self, needs_labels: bool = False) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, 6), nn.Linear(6, 3)
        self.needs_labels = needs_labels
        self.given: list[dict[str, Any]] = []

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        self.given.append({"input_ids": input_ids, "labels": labels})
        hidden = self.words(input_ids).mean(1)
        loss = None if labels is None else hidden.sum() * labels.sum()
        return OrderedDict(loss=loss, logits=self.head(hidden), hidden_states=(hidden, hidden))


def batches(ids: Tensor) -> Iterator[dict[str, Tensor]]:
    for part in ids.split(4):
        yield {"input_ids": part, "labels": torch.zeros(len(part), dtype=torch.long)}


def test_labels_in_batches_are_left_out() -> None:
    model, ids = apply_dropconnect(Texts(), "head", p=P), torch.randint(0, 20, (9, 5))
    found = mc_predict(model, batches(ids), 4, seed=1)
    assert all(given["labels"] is None for given in model.given)
    assert_equal(found, mc_predict(model, ids, 4, seed=1))


class NeedsLabels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.fc(x) + labels[:, None]


def test_labels_that_a_forward_needs_are_given() -> None:
    model = apply_dropconnect(NeedsLabels(), "fc", p=P)
    x, labels = torch.randn(6, 6), torch.arange(6.0)
    whole = mc_predict(model, (x, labels), 4, seed=1)
    rows = [{"x": x[:4], "labels": labels[:4]}, {"x": x[4:], "labels": labels[4:]}]
    assert_equal(mc_predict(model, iter(rows), 4, seed=1), whole)
    assert_equal(mc_predict(model, DataLoader(TensorDataset(x, labels), 4), 4, seed=1), whole)


def test_the_loader_runs_as_it_would_alone() -> None:
    """It sees the user's generators and gradients, and the model in the mode that it had."""
    model = classifier().train()
    state, seen = torch.get_rng_state(), []

    def watched() -> Iterator[Tensor]:
        for _ in range(2):
            seen.append((model.training, torch.is_grad_enabled(), torch.rand(()).item()))
            yield torch.randn(3, 6)

    before = Snapshot(model)
    mc_predict(model, watched(), 4, seed=1)
    assert Snapshot(model) == before
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    expected = []
    for _ in range(2):
        expected.append((True, True, torch.rand(()).item()))
        torch.randn(3, 6)
    assert seen == expected
    assert torch.equal(torch.get_rng_state(), after)


def test_without_a_seed_the_generator_gives_one() -> None:
    model, x = classifier(), torch.randn(6, 6)
    torch.manual_seed(5)
    first, second = (mc_predict(model, loader(x, 4), 4) for _ in range(2))
    assert not torch.equal(first.mean, second.mean)
    torch.manual_seed(5)
    assert torch.equal(mc_predict(model, loader(x, 4), 4).mean, first.mean)


def test_memory_does_not_grow_with_the_samples() -> None:
    """No output is alive when the next one is made, but the one before."""
    alive: list[Any] = []
    most = 0

    def note(u: Tensor) -> Tensor:
        nonlocal most
        alive.append(weakref.ref(u))
        gc.collect()
        most = max(most, sum(one() is not None for one in alive))
        return u

    model = nn.Sequential(classifier(), Returns(note))
    gc.collect()
    gc.freeze()  # what other tests have imported is not looked through each time
    try:
        mc_predict(model, loader(torch.randn(8, 6), 4), 12, batch_size=1)
    finally:
        gc.unfreeze()
    assert len(alive) == 24
    assert most <= 2


def test_what_is_wrong_with_a_loader_is_said() -> None:
    model = classifier()
    with pytest.raises(SurgeryError, match="the loader gave no batch"):
        mc_predict(model, iter(()), 4)
    mixed = [torch.randn(2, 6), (torch.randn(2, 6),), {"input": torch.randn(2, 3, 6)}]
    with pytest.raises(
        SurgeryError, match=r"different shapes after the rows: \[\(3, 4\), \(4,\)\]"
    ):
        mc_predict(model, iter(mixed), 4)
    model = apply_dropconnect(NeedsLabels(), "fc", p=P)
    wrong = [(torch.randn(2, 6), torch.ones(2)), (torch.randn(2, 6), torch.ones(3))]
    with pytest.raises(SurgeryError, match=r"batch 1 of the loader: every input tensor must have"):
        mc_predict(model, iter(wrong), 4)


def test_a_bar_is_shown_if_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = classifier(), torch.randn(6, 6)
    mc_predict(model, loader(x, 2), 4)
    assert capsys.readouterr().err == ""
    pytest.importorskip("tqdm")
    mc_predict(model, loader(x, 2), 4, progress=True)
    assert "mc_predict: 100%" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="progress=True needs tqdm: pip install tqdm"):
        mc_predict(model, loader(x, 2), 4, progress=True)


class Nested(nn.Module):
    """Its tensors lie in a dict inside of a positional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, given: dict[str, Any], scale: float = 1.0) -> Tensor:
        left, right = given["parts"]
        return self.fc(left + right) * scale + given["shift"]


def test_nested_inputs_run_together() -> None:
    stack = Stack(apply_dropconnect(Nested(), "fc", p=P))
    parts = torch.randn(4, 6), torch.randn(4, 6)
    given = {"parts": [*parts], "shift": torch.ones(3, 3).mean()}
    found = mc_predict(stack, (given, 2.0), 9, seed=1)
    assert len(stack.seen) == 1
    plain = apply_dropconnect(nn.Linear(6, 3), "*", p=P)
    plain.load_state_dict(stack.inner.fc.state_dict())
    expected = mc_predict(plain, sum(parts), 9, seed=1)
    torch.testing.assert_close(found.mean, expected.mean * 2 + 1)
    halves = [{"parts": [a, b], "shift": given["shift"]} for a, b in zip(*map(_halves, parts))]
    rows = [{"given": half, "scale": 2.0} for half in halves]
    by_loader = mc_predict(stack, iter(rows), 9, seed=1, batch_size=36)
    torch.testing.assert_close(by_loader.mean, found.mean)


def _halves(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(2)


@dataclass
class Found:
    number: int
    scores: Tensor


class Both(NamedTuple):
    loss: Tensor
    inner: tuple[Any, ...]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda u: {"loss": u.sum(), "y": u},
        lambda u: ({"loss": u.sum()}, [(u, u.exp())]),
        lambda u: Found(3, u),
        lambda u: Both(u.mean(), (Found(2, u),)),
        lambda u: {"features": u.exp(), "logits": (u, u.exp())},
    ],
)
def test_nested_outputs(wrap: Any) -> None:
    inner, x = classifier(), torch.randn(5, 6)
    model = nn.Sequential(inner, Returns(wrap))
    assert_equal(mc_predict(model, x, 9, seed=1), mc_predict(inner, x, 9, seed=1), rtol=0)


def test_a_part_of_the_output_by_name_or_function() -> None:
    model, ids = apply_dropconnect(Texts(), "words", p=P), torch.randint(0, 20, (5, 4))
    logits = mc_predict(model, ids, 4, seed=1)
    named = mc_predict(model, ids, 4, seed=1, output="logits")
    assert torch.equal(logits.mean, named.mean)
    hidden = mc_predict(
        model, ids, 4, seed=1, class_dim=None, output=lambda out: out["hidden_states"][1]
    )
    torch.testing.assert_close(model.head(hidden.mean), logits.mean)


def test_a_model_of_transformers_and_its_collator(tiny: Any) -> None:
    transformers = pytest.importorskip("transformers")
    model = apply_dropconnect(tiny("bert"), "all-linear", p=0.2)
    rows = [
        {"input_ids": [i % 90 + 1] * 5, "attention_mask": [1] * 5, "labels": 1} for i in range(7)
    ]
    data: Any = DataLoader(rows, 3, collate_fn=transformers.default_data_collator)  # type: ignore[arg-type]
    found = mc_predict(model, data, 8, seed=0)
    assert found.mean.shape == (7, 2)
    whole = transformers.default_data_collator(rows)
    del whole["labels"]
    assert_equal(mc_predict(model, data, 4, seed=0), mc_predict(model, whole, 4, seed=0), rtol=1e-4)


def test_labels_are_left_out_of_a_wrapped_model_too() -> None:
    model, x = classifier(), torch.randn(4, 6)
    wrapped: Any = torch.compile(model, backend="eager")
    for one in (model, wrapped):
        found = mc_predict(one, iter([(x, torch.zeros(4))]), samples=2, seed=0)
        assert found.mean.shape[0] == 4
