"""The paper's network: its data, its recipe, its ways of inference, its statistics."""

from __future__ import annotations

import gzip
import json
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paper_mlp
import pytest
import torch
from digits import Digits, load_digits, load_mnist, random_split, read_idx
from paper_mlp import (
    BASELINE,
    METHODS,
    Run,
    Score,
    chosen,
    compare_all,
    evaluate,
    mlp,
    rate_factor,
    summarise_rates,
)
from report import compare, estimate, written_whole
from torch import nn

from surgery import apply_dropconnect, dropconnect_sites


def idx(values: np.ndarray) -> bytes:
    """The content of an IDX file."""
    sizes = struct.pack(f">{values.ndim}I", *values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes()


NAMES = {
    "train-images-idx3-ubyte": (6, 3, 2),
    "train-labels-idx1-ubyte": (6,),
    "t10k-images-idx3-ubyte": (4, 3, 2),
    "t10k-labels-idx1-ubyte": (4,),
}


@pytest.fixture(params=["plain", "gz"])
def mnist(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder like MNIST's, with 6 and 4 images of 3 x 2 pixels."""
    for name, shape in NAMES.items():
        content = idx(np.arange(np.prod(shape)).reshape(shape) % 10)
        if request.param == "gz":
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (tmp_path / name).write_bytes(content)
    return tmp_path


def test_mnist_files_are_read(mnist: Path) -> None:
    train, test = load_mnist(mnist)
    assert (len(train), len(test)) == (6, 4)
    assert train.images.shape == (6, 6)
    assert torch.equal(test.images.flatten(), torch.arange(24) % 10 / 255)
    assert test.labels.tolist() == [0, 1, 2, 3]
    assert (test.images.dtype, test.labels.dtype) == (torch.float32, torch.int64)


GOOD = idx(np.zeros((2, 3, 2)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with nothing, not 00 00 08 03"),
        (b"\x89PNG\r\n", "is no IDX file of bytes in 3 dimensions: it starts with 89 50 4e 47"),
        (idx(np.zeros(4)), "starts with 00 00 08 01, not 00 00 08 03"),
        (b"\x00\x00\x0d\x03" + GOOD[4:], "starts with 00 00 0d 03"),
        (GOOD[:10], "ends within its header, after 10 of 16 bytes"),
        (GOOD[:-1], "should hold 2 x 3 x 2 entries, 28 bytes with the header; it has 27"),
        (GOOD + b"x", "28 bytes with the header; it has 29"),
        (idx(np.zeros((0, 3, 2))), "should hold 0 x 3 x 2 entries"),
    ],
    ids=["empty", "png", "labels", "float", "header", "short", "long", "none"],
)
def test_bad_idx_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "images"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_idx(file, 3)
    assert str(raised.value).startswith(str(file))


def test_a_torn_gz_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "images.gz"
    file.write_bytes(gzip.compress(GOOD)[:-9])
    with pytest.raises(ValueError, match=r"images\.gz cannot be unpacked: "):
        read_idx(file, 3)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("train-labels-idx1-ubyte", np.zeros(5), "has 6 images, .* 5 labels"),
        ("t10k-labels-idx1-ubyte", np.full(4, 10), "labels are digits from 0 to 9; found 10"),
        ("t10k-images-idx3-ubyte", np.zeros((4, 2, 2)), "images have 6 pixels, those of t10k 4"),
    ],
    ids=["count", "label", "pixels"],
)
def test_files_that_do_not_fit_are_refused(
    name: str, values: np.ndarray, message: str, tmp_path: Path
) -> None:
    for other, shape in NAMES.items():
        (tmp_path / other).write_bytes(idx(np.zeros(shape)))
    (tmp_path / name).write_bytes(idx(values))
    with pytest.raises(ValueError, match=message):
        load_mnist(tmp_path)


def test_a_missing_file_is_named(mnist: Path) -> None:
    next(mnist.glob("t10k-labels*")).unlink()
    name = "t10k-labels-idx1-ubyte"
    with pytest.raises(FileNotFoundError, match=rf"holds neither {name} nor {name}\.gz$"):
        load_mnist(mnist)


def test_random_split_is_of_different_digits() -> None:
    data = Digits(torch.arange(20.0)[:, None], torch.arange(20) % 10)
    parts = random_split(data, 8, 5, seed=3)
    chosen = torch.cat([part.images for part in parts]).flatten()
    assert [len(part) for part in parts] == [8, 5]
    assert len(chosen.unique()) == 13
    assert torch.equal(chosen % 10, torch.cat([part.labels for part in parts]))
    assert torch.equal(parts[0].images, random_split(data, 8, 5, seed=3)[0].images)
    with pytest.raises(ValueError, match=r"20 examples cannot be split into parts of \(20, 1\)"):
        random_split(data, 20, 1, seed=0)


def test_learning_rate_follows_the_papers_schedule() -> None:
    epochs = 1480
    factors = [rate_factor((epoch + 0.5) / epochs) for epoch in range(epochs)]
    assert [(factors.count(f), f) for f in sorted(set(factors), reverse=True)] == [
        *((600, 1.0), (400, 0.5), (400, 0.1)),
        *((20, 0.05), (20, 0.01), (20, 0.005), (20, 0.001)),
    ]
    assert factors == sorted(factors, reverse=True)


def test_weights_start_as_in_the_paper() -> None:
    model = mlp(64, 200)
    assert [tuple(p.shape) for p in model.parameters()][::2] == [(200, 64), (200, 200), (10, 200)]
    assert float(model.fc2.weight.detach().std()) == pytest.approx(0.1, rel=0.02)
    assert not any(layer.bias.any() for layer in model if isinstance(layer, nn.Linear))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method: str) -> None:
    """Chance is 90 % of errors."""
    options = paper_mlp.parse(["--quick"])
    vars(options).update(epochs=15, hidden=100, train_size=1000, test_size=300)
    run = paper_mlp.train((method, 0, 0.05), options)
    assert run.scores["mean"].error < 50
    assert len(run.curve) == 15
    assert run.curve[-1] == run.scores["mean"].error
    expected = ["mean"] if method == BASELINE else ["mean", "moments", "10 draws", "100 masks"]
    assert list(run.scores) == expected


def test_ways_of_inference_differ_and_leave_the_model_in_mean_mode() -> None:
    model = mlp(64, 32)
    test = random_split(load_digits(), 200, seed=0)[0]
    before = evaluate(model, test, samples=1000)
    assert list(before) == ["mean"]
    apply_dropconnect(model, ["fc1", "fc2"], p=0.5, sampling="example")
    scores = evaluate(model, test, samples=1000)
    assert scores["mean"] == before["mean"]
    assert scores["moments"].loss != scores["mean"].loss
    assert scores["1000 draws"].loss == pytest.approx(scores["moments"].loss, abs=0.02)
    assert {site.config.inference for site in dropconnect_sites(model)} == {"mean"}


def test_score() -> None:
    probabilities = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.75, 0.0]])
    found = paper_mlp.score(probabilities, torch.tensor([0, 0]))
    about: Any = pytest.approx(np.log(8) / 2)
    assert found == Score(50.0, about)


def test_differences_are_paired() -> None:
    text = compare("it", [1.0, 2.0, 3.0], [0.9, 1.8, 2.9], "points")
    assert text.split() == ["it", "+0.13", "±", "0.03", "points,", "within", "noise"]
    assert "more than noise" in compare("it", [1.0, 2.0, 3.0], [0.9, 1.9, 2.9001], "points")
    assert "within noise" in compare("it", [1.0, 2.0], [1.0, 2.0], "points")
    assert estimate([1.0, 3.0]) == (2.0, 1.0)


def test_the_rate_is_chosen_by_validation_loss_over_seeds() -> None:
    losses = {0.1: [0.1, 0.9], 0.03: [0.3, 0.4]}  # the test error says the contrary
    rates = {
        rate: [Run(BASELINE, seed, rate, loss, {"mean": Score(9 * (rate < 0.1), 0)}, [])
               for seed, loss in enumerate(own)]
        for rate, own in losses.items()
    }  # fmt: skip
    assert chosen({BASELINE: rates}) == {BASELINE: rates[0.03]}
    assert summarise_rates({BASELINE: rates}).split()[-3:] == ["No-Drop", "0.500", "0.350"]


def test_every_comparison_is_printed() -> None:
    ways = {"mean": Score(3.0, 0.2), "moments": Score(2.0, 0.1)}
    runs = {m: [Run(m, seed, 0.1, 0.2, ways, [3.0]) for seed in (0, 1)] for m in METHODS}
    text = compare_all(runs)
    assert text.count("-1.00 ± 0.00 points, more than noise") == 4
    assert text.count("-0.1000 ± 0.0000 nats, more than noise") == 4
    assert text.count("+0.00 ± 0.00 points, within noise") == 4 + 2


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "out"

    def write(text: str, fail: bool) -> None:
        with written_whole(folder) as unfinished:
            (unfinished / "a").write_text(text)
            if fail:
                raise RuntimeError("disk on fire")
            (unfinished / "b").write_text(text)

    write("first", fail=False)
    with pytest.raises(RuntimeError, match="disk on fire"):
        write("second", fail=True)
    assert {file.name: file.read_text() for file in folder.iterdir()} == {
        "a": "first",
        "b": "first",
    }


def test_one_seed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        paper_mlp.parse(["--seeds", "1"])
    assert "--seeds must be at least 2" in capsys.readouterr().err


def test_no_data_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["paper_mlp.py", "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^error: .* holds neither train-images-idx3-ubyte nor"):
        paper_mlp.main()


@pytest.mark.slow
@pytest.mark.parametrize("data", ["scikit-learn", "idx"])
def test_script(
    data: str,
    run_example: Callable[[str], subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    command = "examples/paper_mlp.py --quick"
    if data == "idx":
        for name, shape in NAMES.items():
            shape = (100, *shape[1:])
            (tmp_path / name).write_bytes(idx(np.arange(np.prod(shape)).reshape(shape) % 10))
        command += f" --data {tmp_path} --validation-size 30"
    done = run_example(command)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower()
    assert done.stdout.count("noise") == 4 + 2 + 4 + 4 + 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["runs"]) == 2 * len(METHODS)
    for name in ("errors.png", "curves.png"):
        assert (tmp_path / name).stat().st_size > 10_000
