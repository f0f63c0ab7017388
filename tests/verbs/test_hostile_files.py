"""Files from anywhere: a `SurgeryError` or an `OSError`, the model as it was, and never a wait."""

from __future__ import annotations

import collections
import json
import os
import random
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surgery import (
    DropConnectConfig,
    Plan,
    Site,
    SurgeryError,
    apply_dropconnect,
    dropconnect_sites,
    load_dropconnect,
    plan_dropconnect,
    save_dropconnect,
    strip_dropconnect,
)
from surgery.spec.saved import PLAN_FILE

from ..helpers import Snapshot
from ..internals import set_constant
from .hostile import MUTATIONS, TEXTS, VALUES

CASES = 420
PATIENCE = 20
"""Seconds after which a case counts as one that waits."""


def model() -> nn.ModuleDict:
    torch.manual_seed(3)
    parts = {
        "fc": nn.Linear(4, 4),
        "embed": nn.Embedding(4, 4),
        "head": nn.Linear(4, 4, bias=False),
    }
    parts["head"].weight = parts["embed"].weight
    return nn.ModuleDict(parts)


def operated() -> nn.ModuleDict:
    return apply_dropconnect(model(), ["fc", "embed"], p=0.3, toward="pretrained")


def outcome(fresh: nn.Module, before: Snapshot, folder: Path) -> str:
    """What loading does; anything but a refusal that leaves the model alone comes out as it is."""

    def wait(*args: Any) -> None:
        raise AssertionError(f"still waiting after {PATIENCE} s")

    signal.signal(signal.SIGALRM, wait)
    signal.alarm(PATIENCE)
    try:
        load_dropconnect(fresh, folder)
    except (SurgeryError, OSError) as error:
        result, message = type(error).__name__, str(error)
    else:
        result, message = "loaded", ""
        strip_dropconnect(fresh)
    finally:
        signal.alarm(0)
    assert Snapshot(fresh) == before
    assert len(message.encode()) < 9000  # and it can be printed
    return result


def attack(folder: Path, count: int, seed: int) -> collections.Counter[str]:
    """What so many mutations come to, in order of the mutations; a failure says which it was."""
    save_dropconnect(operated(), folder / "good")
    fresh = model()
    before = Snapshot(fresh)
    found: collections.Counter[str] = collections.Counter()
    for number in range(count):
        rng = random.Random(f"{seed}.{number}")
        mutation = MUTATIONS[number % len(MUTATIONS)]
        bad = folder / "bad"
        shutil.copytree(folder / "good", bad)
        mutation(bad, rng)
        try:
            found[outcome(fresh, before, bad)] += 1
        except BaseException as error:
            raise AssertionError(f"{mutation.__name__}, case {seed}.{number}: {error!r}") from error
        shutil.rmtree(bad)
    return found


def test_mutations_of_a_save_are_refused_or_loaded(tmp_path: Path) -> None:
    found = attack(tmp_path, CASES, 0)
    assert found["SurgeryError"] > CASES / 2
    assert found["loaded"] > 0  # for example with another p


@pytest.mark.slow
def test_many_mutations_of_a_save_are_refused_or_loaded(tmp_path: Path, capsys: Any) -> None:
    found = attack(tmp_path, 16_000, 1)
    with capsys.disabled():
        print(f"\n16,000 hostile files: {dict(found)}")
    assert sum(found.values()) == 16_000


BAD_P = ["1e400", "NaN", "-1", "2", '"0.5"', "true", "null", "[]", "1" * 400]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        *(('"p": 0.3', f'"p": {p}', r"NaN is not|config\.p|config: p is") for p in BAD_P),
        ('"module": "fc"', '"module": 1', r"plan\.sites\[0\]\.module must be a text; got 1"),
        ('"module": "fc"', '"module": ["fc"]', r"module must be a text; got a list of 1"),
        ('"plan": {', '"plan": "x", "plans": {', r"unknown fields \['plans'\]"),
        ('"version": 1', '"version": 2', r"it was saved in format 2; this release reads format 1"),
        ('"version": 1', '"version": 1, "version": 1', "names a key twice"),
        ('"file": "', '"file": "../', "must name a safetensors file in the same folder"),
        ('"file": "', '"file": "/', "must name a safetensors file in the same folder"),
        ('"shape": [', '"shape": [-1,', r"shape\[0\] must not be negative"),
        ('"shape": [', f'"shape": [{2**64},', r"shape\[0\] must be an integer of 64 bits"),
        ('"embed"', '"fc"', "names 'fc.weight' twice"),
        ('"fc"', '"\\ud800"', "not Unicode"),
    ],
)
def test_the_message_says_where(old: str, new: str, words: str, tmp_path: Path) -> None:
    save_dropconnect(operated(), tmp_path)
    text = (tmp_path / PLAN_FILE).read_text()
    assert old in text
    (tmp_path / PLAN_FILE).write_text(text.replace(old, new, 1))
    with pytest.raises(SurgeryError, match=words) as caught:
        load_dropconnect(model(), tmp_path)
    assert str(tmp_path / PLAN_FILE) in str(caught.value)


@pytest.mark.parametrize("form", [*VALUES, json.loads("[" * 90 + "]" * 90)], ids=str)
@pytest.mark.parametrize("kind", [DropConnectConfig, Site, Plan], ids=lambda kind: kind.__name__)
def test_forms_of_the_wrong_type(kind: Any, form: Any) -> None:
    if kind is DropConnectConfig and form == {"version": 1}:
        pytest.skip("every field has a default")
    with pytest.raises(SurgeryError):
        kind.from_json(form)


@pytest.mark.parametrize("text", TEXTS[4:6])
def test_deep_nesting_is_refused_also_in_a_deep_stack(text: str, tmp_path: Path) -> None:
    save_dropconnect(operated(), tmp_path)
    (tmp_path / PLAN_FILE).write_text(text)

    def deep(levels: int) -> None:
        if levels:
            return deep(levels - 1)
        # Python 3.13 reads on to the end, where something is missing
        with pytest.raises(SurgeryError, match=r"nested too deeply|Expecting value"):
            load_dropconnect(model(), tmp_path)

    deep(200)


def test_a_plan_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / PLAN_FILE, "wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(SurgeryError, match="is longer than the 67,108,864 bytes"):
        load_dropconnect(model(), tmp_path)


def test_forms_of_an_older_version_are_migrated_step_by_step(tmp_path: Path, monkeypatch) -> None:
    save_dropconnect(operated(), tmp_path)
    expected = dropconnect_sites(operated())
    renamed = (tmp_path / PLAN_FILE).read_text().replace('"toward"', '"target"')
    (tmp_path / PLAN_FILE).write_text(renamed.replace('"anchors"', '"pretrained"'))

    def rename(old: str, new: str) -> Any:
        return lambda form: {new if name == old else name: form[name] for name in form}

    steps = {
        1: {"config": rename("target", "goal"), "file": rename("pretrained", "start")},
        2: {"config": rename("goal", "toward")},
        3: {"file": rename("start", "anchors")},
    }
    set_constant(monkeypatch, "format version", 4)
    set_constant(monkeypatch, "migrations", steps)
    assert dropconnect_sites(load_dropconnect(model(), tmp_path)) == expected
    with pytest.raises(SurgeryError, match="format 5; this release reads format 4 and older ones"):
        Plan.from_json({"version": 5, "sites": []})


def test_a_full_disk_is_an_os_error_and_leaves_the_old_files(tmp_path: Path) -> None:
    """In a child, whose files may not grow beyond what is allowed."""
    wide = apply_dropconnect(nn.Linear(64, 64), nn.Linear, toward="pretrained")
    save_dropconnect(wide, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        wide.weight_anchor.add_(1.0)
    for limit in (0, 100, 10_000):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                save_dropconnect(wide, tmp_path)
            except OSError:
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_plan_that_was_read_is_the_plan_that_was_made() -> None:
    made = plan_dropconnect(model(), ["fc", "embed"], p=0.3, toward="pretrained", bias=True)
    assert Plan.from_json(json.loads(json.dumps(made.to_json()))) == made
