"""`mc_predict`: what of a batch the forward of a model is given."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from surgery import SurgeryError, apply_dropconnect, mc_predict

from .test_mc_predict import P

X, MASK, Y = torch.randn(6, 4), torch.rand(6, 4) > 0.5, torch.arange(6)


class Notes(nn.Module):
    """Notes what its forward was given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.given: list[dict[str, Any]] = []

    def noted(self, x: Tensor, **given: Any) -> Tensor:
        self.given.append({name: value for name, value in given.items() if value is not None})
        return self.fc(x)


class One(Notes):
    def forward(self, x: Tensor) -> Tensor:
        return self.noted(x)


class Optional(Notes):
    def forward(self, x: Tensor, mask: Any = None, labels: Any = None) -> Tensor:
        return self.noted(x, mask=mask, labels=labels)


class Two(Notes):
    def forward(self, x: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
        return self.noted(x, mask=mask, scale=None if scale == 1.0 else scale)


class AllOptional(Notes):
    """As a model of transformers."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None
    ) -> Tensor:
        return self.noted(input_ids, attention_mask=attention_mask, labels=labels)


class Anything(Notes):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.noted(x, args=args or None, **kwargs)


class NamesOnly(Notes):
    def forward(self, *, x: Tensor) -> Tensor:
        return self.noted(x)


def operated(kind: type[Notes]) -> Any:
    return apply_dropconnect(kind(), "fc", p=P)


def predict(model: Notes, loader: Any) -> dict[str, Any]:
    """What the forward was given beside the input."""
    found = mc_predict(model, loader, 2, seed=1)
    inputs = mc_predict(model.fc, iter([X]), 2, seed=1)
    torch.testing.assert_close(found.mean, inputs.mean)
    return model.given[-1]


NAMES = [f"text {i}" for i in range(6)]


@pytest.mark.parametrize(
    ("kind", "batch", "given"),
    [
        (One, X, []),
        (One, (X, Y), []),
        (One, (X, MASK, Y), []),  # nothing that could take a mask
        (Optional, (X,), []),
        (Optional, [X, Y], []),
        (Optional, (X, Y.float()), []),
        (Optional, (X, NAMES), []),
        (Optional, (X, Y, NAMES, MASK), []),  # the fourth is nothing that it could take
        (Two, (X, MASK), ["mask"]),
        (Two, (X, MASK, Y), ["mask"]),
        (AllOptional, (X, Y), []),
        (Anything, (X, Y), ["args"]),
        (Optional, {"x": X, "mask": MASK, "labels": Y}, ["mask"]),
        (One, {"x": X, "label": Y, "more": MASK}, []),
        (Anything, {"x": X, "label_ids": Y, "more": MASK}, ["more"]),
        (AllOptional, {"input_ids": X, "attention_mask": MASK, "idx": Y}, ["attention_mask"]),
        (NamesOnly, {"x": X, "y": Y}, []),
    ],
)
def test_what_a_loader_gives(kind: Any, batch: Any, given: list[str]) -> None:
    assert list(predict(operated(kind), iter([batch]))) == given


def test_adapters_of_peft() -> None:
    """PEFT passes everything on: what counts is what the model inside takes."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["fc"])
    model = apply_dropconnect(peft.get_peft_model(One(), config), "*.lora_A", p=P)
    for batch in ((X, Y), {"x": X, "more": Y}):
        assert mc_predict(model, iter([batch]), 2).mean.shape == (6, 3)


@pytest.mark.parametrize(
    ("kind", "batch", "needs", "name", "with_it"),
    [
        (Optional, (X, MASK), 1, "mask", "({'x': x, 'mask': mask} for x, mask, *_ in loader)"),
        (Optional, (X, MASK, Y), 1, "mask", "(x for x, *_ in loader)"),
        (Optional, (X, None), 1, "mask", "(x for x, *_ in loader)"),
        (Optional, (X, Y, Y[:, None]), 1, "labels", "(x for x, *_ in loader)"),
        (Two, (X, MASK, 2.0), 2, "scale", "((x, mask) for x, mask, *_ in loader)"),
        (AllOptional, (X, MASK, Y), 1, "attention_mask", "(input_ids for input_ids, *_ in loader)"),
    ],
)
def test_what_may_be_an_argument_or_a_target(
    kind: Any, batch: Any, needs: int, name: str, with_it: str
) -> None:
    model = operated(kind)
    with pytest.raises(SurgeryError) as caught:
        mc_predict(model, iter([batch]), 2)
    said = str(caught.value)
    assert said.startswith(
        f"batch 0 of the loader: of its {len(batch)} parts {kind.__name__}.forward needs {needs}, and"
    )
    assert f"another one is a target or its {name!r}. " in said
    assert with_it in said
    assert model.given == []


def test_what_the_error_says_to_do() -> None:
    """Both ways out of it, from a DataLoader."""
    model, loader = operated(Optional), DataLoader(TensorDataset(X, MASK, Y), 4)
    assert predict(model, (x for x, *_ in loader)) == {}
    rows: Iterable[Any] = ({"x": x, "mask": mask} for x, mask, *_ in loader)
    assert torch.equal(predict(model, rows)["mask"], MASK[4:])


@pytest.mark.parametrize(
    ("kind", "inputs", "message"),
    [
        (One, {"y": X}, r"One.forward takes \(x\): missing a required argument: 'x'"),
        (One, {"x": X, "more": MASK}, r"takes \(x\): got an unexpected keyword argument 'more'"),
        (One, (X, Y), r"takes \(x\): too many positional arguments$"),
        (Two, (X,), r"Two.forward takes \(x, mask, scale\): missing a required argument: 'mask'"),
        (NamesOnly, X, r"NamesOnly.forward takes \(x\): too many positional arguments"),
        (One, [X, X], r"too many positional arguments. It is a list, which is .* iter\("),
        (Optional, [{"x": X}, {"x": X}], r"inputs is a list of 2 mappings, which .* iter\("),
        (One, torch.randn(6, 4).numpy(), r"batch 0 of the loader: got no tensor, but \(ndarray\)"),
        (One, TensorDataset(X), r"got no tensor, but \(TensorDataset\)\. .* comes in a DataLoader"),
    ],
)  # fmt: skip
def test_what_a_forward_does_not_take(kind: Any, inputs: Any, message: str) -> None:
    """The error is ours, before anything runs."""
    model = operated(kind)
    with pytest.raises(SurgeryError, match=message):
        mc_predict(model, inputs, 2)
    assert model.given == []


def test_a_batch_without_what_is_needed_is_named() -> None:
    batches = [{"x": X, "mask": MASK}, {"x": X}]
    with pytest.raises(SurgeryError, match=r"^batch 1 of the loader: Two.forward takes .* 'mask'$"):
        mc_predict(operated(Two), iter(batches), 2)


def test_one_batch_by_hand_is_passed_as_it_is() -> None:
    """What a loader's would have to leave out."""
    model = operated(Optional)
    for inputs in ((X, MASK, Y), [X, MASK, Y], {"x": X, "mask": MASK, "labels": Y}):
        mc_predict(model, inputs, 2)
        assert list(model.given[-1]) == ["mask", "labels"]


class FromLabels(AllOptional):
    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        return labels


def test_labels_of_which_a_decoder_makes_its_input() -> None:
    batch = {"input_ids": X, "labels": Y}
    assert list(predict(operated(FromLabels), iter([batch]))) == ["labels"]
    assert list(predict(operated(AllOptional), iter([batch]))) == []


def test_encoder_decoders_of_transformers(tiny: Any) -> None:
    """T5 refuses a batch without labels and without decoder inputs; the same with the latter."""
    pytest.importorskip("transformers")
    model = apply_dropconnect(tiny("t5"), "all-linear", p=0.2)
    ids = torch.randint(1, 90, (4, 6))
    shifted = model.prepare_decoder_input_ids_from_labels(labels=ids)
    found = [
        mc_predict(model, iter([{"input_ids": ids, **more}]), 2, seed=1).mean
        for more in ({"labels": ids}, {"labels": ids, "decoder_input_ids": shifted})
    ]
    assert torch.equal(*found)


def test_a_signature_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = operated(Optional), []
    real = inspect.signature
    monkeypatch.setattr(inspect, "signature", lambda one: read.append(one) or real(one))
    counts = []
    for batches in (1, 5):
        read.clear()
        mc_predict(model, iter([{"x": X, "labels": Y}] * batches), 2)
        counts.append(len(read))
    assert counts[0] == counts[1] > 0


def test_a_forward_without_a_signature_gets_everything() -> None:
    """One written in C, say."""
    model = operated(Anything)
    model.forward = NoSignature(model.forward)
    with pytest.raises(TypeError):
        inspect.signature(model.forward)
    mc_predict(model, iter([(X, Y)]), 2)
    assert list(model.given[-1]) == ["args"]


class NoSignature:
    __signature__ = 0

    def __init__(self, call: Any) -> None:
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


@pytest.mark.parametrize("sampling", ["batch", "example"])
@pytest.mark.parametrize("seed", [2**64 - 1, -1, -(2**63), 0])
def test_every_seed_of_torch(seed: int, sampling: str) -> None:
    """Batches of a loader have the seeds that follow, around the end of the range."""
    model = apply_dropconnect(nn.Linear(4, 3), "*", p=P, sampling=sampling)
    found = mc_predict(model, iter([X, X, X]), 4, seed=seed).mean
    step = 0 if sampling == "batch" else 1
    alone = [mc_predict(model, X, 4, seed=(seed + step * i) % 2**64).mean for i in range(3)]
    assert torch.equal(found, torch.cat(alone))


class Whole(Notes):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.noted(batch["x"])


def test_a_mapping_that_is_the_one_argument() -> None:
    model, batch = operated(Whole), {"x": X}
    begin = "missing a required argument: 'batch'. A mapping is taken for arguments by name; "
    with pytest.raises(SurgeryError) as loader:
        mc_predict(model, iter([batch]), 2)
    assert str(loader.value).endswith(
        f"{begin}if it is 'batch' itself, write ((b,) for b in loader)"
    )
    with pytest.raises(SurgeryError) as alone:
        mc_predict(model, batch, 2)
    assert "unexpected keyword argument 'x'" in str(alone.value) or begin in str(alone.value)
    assert str(alone.value).endswith("if it is 'batch' itself, write (inputs,)")
    mc_predict(model, ((b,) for b in iter([batch])), 2)
    mc_predict(model, (batch,), 2)
