"""`DropConnectCallback` under `lightning.pytorch.Trainer`: plain checkpoints, resuming, averages."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surgery import (
    SurgeryError,
    apply_dropconnect,
    dropconnect_sites,
    plain_state_dict,
    set_p,
)
from surgery.verbs.checkpoint import anchors

pytest.importorskip("lightning")
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger

from surgery.adapters.lightning import DropConnectCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",  # advice of its own
    "ignore:.*LeafSpec:FutureWarning",
    "ignore:.*LeafSpec:UserWarning",
    "ignore:.*Checkpoint directory:UserWarning",
    "ignore:.*configure_model:UserWarning",
    "ignore:.*when using `ckpt_path`:UserWarning",
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",  # dynamo looks at it
)


class Module(LightningModule):
    """Two layers, a batch norm (buffers), and weights by seed."""

    def __init__(self, seed: int = 0, late: bool = False) -> None:
        super().__init__()
        self.seed = seed
        self.net: Any = None
        if not late:
            self.make()

    def make(self) -> None:
        if self.net is None:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                self.net = nn.Sequential(
                    nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)
                )

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class LateModule(Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed, late=True)

    def configure_model(self) -> None:
        self.make()


class QuietModule(Module):
    """`self.log` does not compile."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def data(shuffle: bool = False, same: bool = False) -> Any:
    """16 rows in batches of 4, each batch the same if asked for."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 4, generator=generator)
    if same:
        x = x[:4].repeat(4, 1)
    rows = torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long())
    return torch.utils.data.DataLoader(rows, batch_size=4, shuffle=shuffle)


def trainer(path: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    settings = {
        "max_epochs": 2, "logger": False, "enable_checkpointing": False, "log_every_n_steps": 1,
        "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu",
        **settings,
    }  # fmt: skip
    if any(isinstance(one, ModelCheckpoint) for one in callbacks):
        settings["enable_checkpointing"] = True
    return Trainer(default_root_dir=path, callbacks=list(callbacks), **settings)


def fit(path: Path, module: Any, *callbacks: Callback, seed: int = 3, **settings: Any) -> Any:
    torch.manual_seed(seed)
    rows = data(settings.pop("shuffle", False), settings.pop("same", False))
    resume = settings.pop("resume", None)
    trainer(path, *callbacks, **settings).fit(module, rows, ckpt_path=resume)
    return module


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in plain_state_dict(module).items()}


def assert_same(one: Any, other: Any) -> None:
    assert list(one) == list(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("only", [False, True], ids=["", "save_weights_only"])
@pytest.mark.parametrize("kind", [Module, LateModule])
def test_checkpoints_are_plain(tmp_path: Path, kind: Any, only: bool) -> None:
    save = ModelCheckpoint(tmp_path, save_weights_only=only)
    drop = DropConnectCallback("net.*", p=0.3, toward="pretrained")
    module = fit(tmp_path, kind(), drop, save)
    assert [site.name for site in dropconnect_sites(module)] == ["net.0.weight", "net.3.weight"]
    stored = torch.load(save.best_model_path)["state_dict"]
    assert_same(stored, weights(module))
    if kind is Module:
        loaded = Module.load_from_checkpoint(save.best_model_path, seed=9)
        assert_same(loaded.state_dict(), stored)


def test_it_drops_and_moves_p(tmp_path: Path) -> None:
    """Every step is that of a loop written by hand with the same p and the same masks."""
    expected = [0.4 * (0.5 * (1 + math.cos(math.pi * i / 7))) for i in range(8)]
    logger = CSVLogger(tmp_path)
    drop = DropConnectCallback("net.*", p=0.4, schedule="cosine")
    module = fit(tmp_path, Module(), drop, logger=logger)
    by_hand = apply_dropconnect(Module(), "net.*", p=0.4)
    optimizer = by_hand.configure_optimizers()
    torch.manual_seed(3)
    p = iter(expected)
    for _ in range(2):
        for x, y in data():
            set_p(by_hand, next(p))
            optimizer.zero_grad()
            nn.functional.cross_entropy(by_hand.net(x), y).backward()
            optimizer.step()
    assert_same(weights(module), weights(by_hand))
    assert not torch.equal(
        weights(module)["net.0.weight"], weights(fit(tmp_path, Module()))["net.0.weight"]
    )
    assert [site.config.p for site in dropconnect_sites(module)] == [0.4, 0.4]
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("dropconnect_p")
    assert [float(row.split(",")[column]) for row in rows[1:]] == pytest.approx(expected, abs=1e-6)
    share = rows[0].split(",").index("dropconnect_fraction")
    size = sum(one.numel() for one in module.parameters())
    assert float(rows[1].split(",")[share]) == pytest.approx(0.4 * 36 / size)


@pytest.mark.parametrize("toward", ["zero", "pretrained"])
@pytest.mark.parametrize("when", ["epoch", "step", "late"])
def test_resumes_bit_for_bit(tmp_path: Path, toward: str, when: str) -> None:
    """In the midst of an epoch Lightning begins with its first batch again, unless the loader itself is
    resumed; so there all batches are the same."""
    kind = LateModule if when == "late" else Module
    settings = {"shuffle": True, "max_epochs": 3}
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    file = "epoch=0.ckpt"
    if when == "step":
        settings = {"same": True, "max_epochs": 3}
        save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
        file = "step=6.ckpt"

    def drop() -> DropConnectCallback:
        return DropConnectCallback("net.*", p=0.4, toward=toward, schedule="linear")

    whole = fit(tmp_path, kind(), drop(), save, **settings)
    second = drop()
    resumed = fit(tmp_path, kind(7), second, resume=tmp_path / file, seed=8, **settings)
    assert_same(weights(resumed), weights(whole))
    if toward == "pretrained":
        start = kind()
        start.make()
        assert_same(anchors(resumed), {name: start.state_dict()[name] for name in anchors(whole)})
        assert_same(anchors(resumed), anchors(whole))


def test_resumes_with_a_generator(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)

    def run(start: int, *callbacks: Callback, **settings: Any) -> Any:
        drop = DropConnectCallback("net.*", p=0.4, generator=11)
        return fit(tmp_path, Module(start), drop, *callbacks, max_epochs=3, **settings)

    whole = run(0, save)
    resumed = run(7, resume=tmp_path / "epoch=0.ckpt", seed=8)
    assert_same(weights(resumed), weights(whole))


def test_resume_without_known_anchors_is_an_error(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="plain")
    fit(tmp_path, Module(), save)
    drop = DropConnectCallback("net.*", toward="pretrained")
    with pytest.raises(SurgeryError, match=r"plain\.ckpt was written without DropConnect"):
        fit(tmp_path, Module(), drop, resume=tmp_path / "plain.ckpt", max_epochs=3)


@pytest.mark.parametrize("first", ["drop", "average"])
@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_averages(tmp_path: Path, toward: str, first: str) -> None:
    """The average is that of the weights after each step; anchors are in nothing of it."""
    seen: list[dict[str, torch.Tensor]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            seen.append(weights(module))

    drop = DropConnectCallback("net.*", p=0.3, toward=toward)
    average, save = EMAWeightAveraging(decay=0.5), ModelCheckpoint(tmp_path)
    order = [drop, average] if first == "drop" else [average, drop]
    module = Module()
    start = weights(module)
    settings = {"max_epochs": 2}
    torch.manual_seed(3)
    run = trainer(tmp_path, Watch(), *order, save, **settings)
    run.fit(module, data(), data())
    expected = {name: value.clone() for name, value in seen[0].items()}
    for after in seen[1:]:
        for name, value in after.items():
            if value.is_floating_point():
                expected[name] = 0.5 * expected[name] + 0.5 * value
            else:
                expected[name] = value
    found = weights(module)
    assert list(found) == list(start)
    for name, value in found.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    if toward == "pretrained":
        assert_same(anchors(module), {name: start[name] for name in anchors(module)})
    stored = torch.load(save.best_model_path)
    assert_same(stored["state_dict"], found)
    assert list(stored["current_model_state"]) == list(start)
    assert_same(Module.load_from_checkpoint(save.best_model_path).state_dict(), found)


@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_averages_resume(tmp_path: Path, toward: str) -> None:
    def run(start: int, **settings: Any) -> Any:
        drop = DropConnectCallback("net.*", p=0.3, toward=toward)
        save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        average = EMAWeightAveraging(decay=0.5)
        return fit(tmp_path, Module(start), drop, average, save, max_epochs=3, **settings)

    whole = run(0)
    resumed = run(7, resume=tmp_path / "epoch=0.ckpt", seed=8)
    assert_same(weights(resumed), weights(whole))


def test_swa(tmp_path: Path) -> None:
    """Stochastic weight averaging takes the mean of the weights at the beginning of its epochs."""
    starts: list[dict[str, torch.Tensor]] = []
    averaged: dict[str, torch.Tensor] = {}

    class Watch(Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            starts.append(weights(module))

        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            if (
                trainer.current_epoch == 4
            ):  # the one that is added for the statistics of batch norms
                averaged.update(averaged or weights(module))

    swa = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)
    drop = DropConnectCallback("net.*", p=0.3, toward="pretrained")
    module = fit(tmp_path, Module(), Watch(), drop, swa, max_epochs=4)
    for name, _ in Module().named_parameters():
        mean = torch.stack([one[name] for one in starts[1:4]]).mean(0)
        torch.testing.assert_close(averaged[name], mean, rtol=1e-5, atol=1e-6)
    start = Module().state_dict()
    assert_same(anchors(module), {name: start[name] for name in anchors(module)})


@pytest.mark.parametrize("target", ["module", "part"])
@torch._inductor.config.patch(fallback_random=True)  # else a graph has a generator of its own
@pytest.mark.compiler
def test_compiled(tmp_path: Path, target: str) -> None:
    """Compiled before `fit`: the masks and the weights are those of eager code."""
    torch._dynamo.reset()
    eager = fit(tmp_path, QuietModule(), DropConnectCallback("net.*", p=0.3), max_epochs=1)
    module = QuietModule()
    compiled: Any = module
    if target == "module":
        compiled = torch.compile(module)
    else:
        module.net.compile()
    fit(tmp_path, compiled, DropConnectCallback("net.*", p=0.3), max_epochs=1)
    for name in (
        "net.0.weight",
        "net.3.weight",
        "net.3.bias",
    ):  # a bias before a batch norm is noise
        one, other = weights(module)[name], weights(eager)[name]
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_strips_at_the_end(tmp_path: Path) -> None:
    drop = DropConnectCallback("net.*", p=0.3, toward="pretrained", strip_at_end=True)
    module = fit(tmp_path, Module(), drop, EMAWeightAveraging(decay=0.5))
    assert list(module.state_dict()) == list(Module().state_dict())
    assert type(module.net[0]) is nn.Linear


def test_a_second_fit_goes_on(tmp_path: Path) -> None:
    drop = DropConnectCallback("net.*", p=0.3, schedule="linear")
    module = fit(tmp_path, Module(), drop)
    fit(tmp_path, module, drop)
    assert len(dropconnect_sites(module)) == 2
    other = copy.deepcopy(module)
    with pytest.raises(SurgeryError, match="has DropConnect already"):
        fit(tmp_path, other, DropConnectCallback("net.*", p=0.5))


def test_ddp(tmp_path: Path) -> None:
    """Two processes: plain checkpoints, equal weights, and a resumed run goes on exactly."""
    worker = Path(__file__).with_name("lightning_worker.py")
    command = [sys.executable, str(worker), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    files = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert files == ["resumed-0.pt", "resumed-1.pt", "whole-0.pt", "whole-1.pt"], done.stderr[
        -3000:
    ]
    whole = torch.load(tmp_path / "whole-0.pt")
    for name in ("whole-1", "resumed-0", "resumed-1"):
        other = torch.load(tmp_path / f"{name}.pt")
        for key, value in whole.items():
            if "running" not in key:  # statistics of a batch are those of a process
                assert torch.equal(value, other[key]), (name, key)
    stored = torch.load(tmp_path / "epoch=0.ckpt")["state_dict"]
    assert list(stored) == list(whole) == list(Module().state_dict())


def test_the_private_name() -> None:
    """adapters/lightning stands on it."""
    average = EMAWeightAveraging()
    assert average._average_model is None
