"""What `docs/migration.md` tells to write has the same law as what was written before.

Both sides draw their masks, so outputs are compared in mean and in square, within standard errors. A
library that is not installed is skipped; `torch` itself is always there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import apply_dropconnect, mc_predict
from surgery.compat import torchnlp

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
P = 0.4
X = torch.linspace(-1, 1, 12).view(3, 4)
STEPS = torch.linspace(-1, 1, 24).view(3, 2, 4)
"""(time, batch, features)."""


def from_page(name: str) -> Any:
    """A function that the page shows."""
    block = re.search(rf"```python\n(def {name}\(.*?)```", PAGE, re.S)
    assert block is not None
    scope: dict[str, Any] = {"torch": torch}
    exec(block[1], scope)
    return scope[name]


@pytest.fixture
def check_same(check_mean: Any) -> Callable[..., None]:
    """Fails unless two ways to draw agree in mean and in square."""

    def check(one: Callable[[], Tensor], other: Callable[[], Tensor], count: int = 1500) -> None:
        for power in (1, 2):
            check_mean(lambda power=power: one() ** power - other() ** power, 0.0, count)

    return check


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 5)


def lstm() -> nn.LSTM:
    torch.manual_seed(0)
    return nn.LSTM(4, 4)


def test_every_peer_of_the_table_has_a_section() -> None:
    links = re.findall(r"\]\(#([\w-]+)\) \|", PAGE)
    titles = [re.sub(r"\W+", "-", title).lower() for title in re.findall(r"^## (.*)$", PAGE, re.M)]
    assert len(links) == 10
    assert set(links) <= set(titles)


class TestPyTorchNLP:
    @pytest.mark.parametrize("name", ["WeightDropLinear", "WeightDropLSTM", "WeightDropGRU"])
    def test_modules(self, check_same: Any, name: str) -> None:
        theirs = pytest.importorskip("torchnlp.nn.weight_drop")
        old = getattr(theirs, name)(4, 4, weight_dropout=P)
        new = getattr(torchnlp, name)(4, 4, weight_dropout=P)
        new.load_state_dict(old.state_dict())
        read = (lambda out: out) if name == "WeightDropLinear" else (lambda out: out[0])
        check_same(lambda: read(old(STEPS)), lambda: read(new(STEPS)))


class TestFastai:
    def test_weight_dropout(self, check_same: Any) -> None:
        theirs = pytest.importorskip("fastai.text.models.awdlstm")
        old = theirs.WeightDropout(lstm(), P)
        new = lstm()
        new.load_state_dict(from_page("names_of_the_lstm")(old.state_dict()))
        apply_dropconnect(new, nn.LSTM, p=P)
        check_same(lambda: old(STEPS)[0], lambda: new(STEPS)[0])
        assert torch.equal(old.eval()(STEPS)[0], new.eval()(STEPS)[0])

    def test_embedding_dropout(self, check_same: Any) -> None:
        theirs = pytest.importorskip("fastai.text.models.awdlstm")
        words, ids = nn.Embedding(6, 3), torch.arange(6)
        old = theirs.EmbeddingDropout(nn.Embedding.from_pretrained(words.weight.detach()), P)
        apply_dropconnect(words, nn.Embedding, p=P, unit="input")
        check_same(lambda: old(ids), lambda: words(ids))
        assert {bool(row.any()) for row in words(ids.repeat(20))} == {True, False}

    def test_its_names(self) -> None:
        """As they are in its state dicts, also without it."""
        plain = lstm().state_dict()
        saved = {"weight_hh_l0_raw": plain["weight_hh_l0"]}
        saved |= {f"module.{key}": value for key, value in plain.items() if "_hh_l0" not in key}
        saved["module.bias_hh_l0"] = plain["bias_hh_l0"]
        fresh = nn.LSTM(4, 4)
        fresh.load_state_dict(from_page("names_of_the_lstm")(saved))
        assert all(torch.equal(value, plain[key]) for key, value in fresh.state_dict().items())


def test_baal(check_same: Any) -> None:
    theirs = pytest.importorskip("baal.bayesian.weight_drop")
    old = theirs.patch_module(nn.Sequential(linear()), ["Linear"], P)
    new = nn.Sequential(linear())
    old.load_state_dict(new.state_dict())  # patching had made others
    apply_dropconnect(new, nn.Linear, p=P, inference="sample")
    check_same(lambda: old.eval()(X), lambda: new.eval()(X))


def test_probly(check_same: Any) -> None:
    """Scaled once, the weights that were trained there drop as they did."""
    theirs = pytest.importorskip("probly.representation.dropconnect")
    layers = nn.Sequential(nn.Linear(4, 4), linear())
    old = theirs.DropConnect(layers, p=P)
    old.eval()
    with torch.no_grad():
        layers[1].weight.mul_(1 - P)
    apply_dropconnect(layers, nn.Linear, exclude="0", p=P, inference="sample")
    check_same(lambda: old(X), lambda: layers.eval()(X))
    samples = old.predict_representation(X, n_samples=4000, logits=True)
    prediction = mc_predict(layers, X, samples=4000)
    error = (prediction.variance.add(samples.var(1)) / 4000).sqrt()
    assert bool(((prediction.mean - samples.mean(1)).abs() <= 6 * error).all())


def test_parametrize(check_same: Any) -> None:
    old, new = linear(), linear()
    torch.nn.utils.parametrize.register_parametrization(old, "weight", nn.Dropout(P))
    apply_dropconnect(new, "weight", p=P)
    check_same(lambda: old(X), lambda: new(X))
    assert torch.equal(old.eval()(X), new.eval()(X))


class TestSpikingJelly:
    def build(self, samples: int | None = None) -> tuple[Any, nn.Module]:
        theirs = pytest.importorskip("spikingjelly.activation_based.layer")
        old = theirs.DropConnectLinear(4, 5, p=P, samples_num=4000, activation=nn.ReLU())
        new = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
        new[0].load_state_dict(from_page("scaled")(old.state_dict(), P))
        options: dict[str, Any] = {"sampling": "example", "bias": True, "inference": "moments"}
        return old, apply_dropconnect(new, "0", p=P, samples=samples, **options)

    def test_training(self, check_same: Any) -> None:
        old, new = self.build()
        check_same(lambda: old(X), lambda: new(X))

    def test_inference_by_draws(self, check_same: Any) -> None:
        old, new = self.build(samples=4000)
        check_same(lambda: old.eval()(X), lambda: new.eval()(X), 60)

    def test_inference_in_closed_form(self, check_mean: Any) -> None:
        old, new = self.build()
        check_mean(lambda: old.eval()(X), new.eval()(X), 60)


class TestStochasticDepth:
    """A residual branch that ends in a Linear."""

    class Block(nn.Module):
        def __init__(self, drop: nn.Module) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc1, self.fc2, self.drop = nn.Linear(4, 6), nn.Linear(6, 4), drop

        def branch(self, x: Tensor) -> Tensor:
            return self.fc2(self.fc1(x).relu())

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop(self.branch(x))

    SAMPLING = pytest.mark.parametrize(
        ("mode", "sampling"), [("row", "example"), ("batch", "batch")], ids=["row", "batch"]
    )

    @SAMPLING
    def test_torchvision(self, check_same: Any, mode: str, sampling: str) -> None:
        theirs = pytest.importorskip("torchvision.ops")
        old = self.Block(theirs.StochasticDepth(P, mode=mode))
        new = self.Block(nn.Identity())
        apply_dropconnect(new, "*.fc2", p=P, unit="tensor", sampling=sampling, bias=True)
        check_same(lambda: old(STEPS), lambda: new(STEPS))

    def test_timm(self, check_same: Any) -> None:
        theirs = pytest.importorskip("timm.layers")
        old, new = self.Block(theirs.DropPath(P)), self.Block(nn.Identity())
        apply_dropconnect(new, "*.fc2", p=P, unit="tensor", sampling="example", bias=True)
        check_same(lambda: old(STEPS), lambda: new(STEPS))

    @SAMPLING
    def test_the_branch_is_whole_or_gone(self, mode: str, sampling: str) -> None:
        block = self.Block(nn.Identity())
        x = torch.randn(200, 3, 4)
        branch = block.branch(x) / (1 - P)
        apply_dropconnect(block, "*.fc2", p=P, unit="tensor", sampling=sampling, bias=True)
        added = block(x) - x
        kept = added.flatten(1).any(1)
        torch.testing.assert_close(added, branch * kept.view(-1, 1, 1), rtol=1e-4, atol=1e-5)
        assert len(kept.unique()) == (2 if mode == "row" else 1)
