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
from .page import page  # noqa: E402
from .run import Result, results  # noqa: E402

SLICE = (
    *("bert", "albert", "deberta-v2", "electra/masked_lm", "big_bird", "longformer"),
    *("gpt2", "bloom", "falcon", "opt", "llama/causal_lm", "gemma2", "phi", "cohere"),
    *("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next", "granitemoe"),
    *("mamba", "mamba2", "rwkv", "xlnet", "roformer", "ctrl"),
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
