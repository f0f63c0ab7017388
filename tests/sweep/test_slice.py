"""A slice of the sweep that runs with every test, and the parts of the sweep itself."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
import surgery.adapters.transformers  # noqa: E402
import surgery.transforms  # noqa: E402, F401

from . import run  # noqa: E402
from .check import check  # noqa: E402
from .models import Case, NotBuilt, build, cases  # noqa: E402
from .page import page, share_refused  # noqa: E402
from .run import Result, results  # noqa: E402

SLICE = (
    *("bert", "albert", "deberta-v2", "electra/masked_lm", "big_bird", "mobilebert"),
    *("gpt2", "bloom", "falcon", "opt", "llama/causal_lm", "gemma2", "phi", "cohere"),
    *("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next", "granitemoe"),
    *("mamba", "falcon_mamba", "rwkv", "xlnet", "roformer", "ctrl"),
    *("t5", "bart", "pegasus", "marian", "switch_transformers"),
    *("vit", "resnet", "convnext", "segformer", "clip", "videomae"),
    *("whisper", "wav2vec2-bert", "patchtst"),
)
"""One for each mechanism: layers that are shared, Conv1D, experts and routers, states that are scanned,
tied embeddings, encoders with decoders, convolutions, frames, series."""


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SLICE)
def test_an_architecture(name: str) -> None:
    found = _found(name)
    assert found["refused"] == {}
    assert found["sites"] > 0
    assert found["drew"] > found["sites"] / 2
    assert found["left_out"] == []


def _found(name: str) -> Result:
    kind, _, head = name.partition("/")
    if Case(kind, head) not in cases():
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    built = build(Case(kind, head))
    return vars(check(built.model, built.inputs))


def test_every_model_type_is_a_case() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    names = {str(case) for case in cases()}
    assert {str(name) for name in CONFIG_MAPPING_NAMES} <= names
    assert len(names) == len(cases())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_dies_takes_no_other_along(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(case: Case) -> Result:
        if case.model_type == "dies":
            os.kill(os.getpid(), signal.SIGTERM)
        if case.model_type == "hangs":
            os.kill(os.getpid(), signal.SIGXCPU)
        return {"case": str(case), "status": "passed", "seconds": 0}

    monkeypatch.setattr(run, "result_of", dies)
    found = {one["case"]: one for one in results(map(Case, ("a", "dies", "hangs", "b")), 2)}
    assert {name: one["status"] for name, one in found.items()} == {
        "a": "passed", "b": "passed", "dies": "not built", "hangs": "not built"
    }  # fmt: skip
    assert found["dies"]["reason"] == "the process died (signal 15)"
    assert found["hangs"]["reason"] == "took too long"


def test_what_cannot_be_made_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(case: Case) -> None:
        raise NotBuilt("too large: 9 million parameters")

    monkeypatch.setattr(run, "build", fails)
    found = run.result_of(Case("bert"))
    assert (found["status"], found["reason"]) == ("not built", "too large: 9 million parameters")


RESULTS: list[Result] = [
    {"case": "a_b", "head": "", "status": "passed", "sites": 3, "left_out": []},
    {"case": "c", "head": "", "status": "refused", "sites": 3, "left_out": ["it is not saved: no"],
     "refused": {"x.w": "Conv1d: is odd; exclude it", "y.w": ": is odd; exclude it"}},
    {"case": "d", "head": "", "status": "not built", "reason": "too large: 7 million parameters"},
    {"case": "d/lm", "head": "lm", "status": "not built", "reason": "too large: 9 million parameters"},
    {"case": "e/lm", "head": "lm", "status": "failed", "reason": "it broke"},
]  # fmt: skip


def test_the_page_groups_what_it_is_told() -> None:
    text = page(RESULTS)
    assert "| model types | 3 | 2 | 1 | 1 | 0 | 0 | 1 |" in text
    assert "| classes with heads | 2 | 1 | 0 | 0 | 1 | 0 | 1 |" in text
    share = "built: 1 of 2, 50.0 %; with the classes with heads: 1 of 3, 33.3 %.\n"
    assert f"\n\nRefused of the model types that were {share}" in text
    assert "**is odd** (1, with how many of their weights):\nc (2 of 5)." in text
    assert "**it broke** (1):\ne/lm." in text
    assert "**too large with widths that suit its other settings** (2):\nd, d/lm." in text
    assert "**it is not saved** (1):\nc." in text
    assert "**model types** (1):\na\\_b." in text


def test_the_page_that_is_there_tells_of_no_failure() -> None:
    text = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (model types|classes with heads) \| (.*) \|$", text, re.M)
    assert len(rows) == 2
    counts = [[int(cell) for cell in cells.split(" | ")] for _, cells in rows]
    types, both = counts[0], [sum(column) for column in zip(*counts)]
    assert f"\n\n{share_refused((types[3], types[1]), (both[3], both[1]))}" in text
    for total, built, passed, refused, failed, empty, not_built in counts:
        assert total == built + not_built
        assert built == passed + refused + failed + empty
        assert failed == 0
    listed = re.findall(r"^\*\*(.*)\*\* \((\d+)[^)]*\):\n((?:.+\n)+)", text, re.M)
    assert listed
    for _, count, names in listed:
        assert names.count(",") + 1 == int(count)
