"""The C++ kernels: built once, whole, by whoever comes first; and what happens where they cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.ops import Law, Layout, drop_weight, key_from_seed
from surgery.ops.cpu import native
from surgery.ops.hash import multipliers
from surgery.ops.law import Mask

from ...internals import as_in_a_new_process, constant, forget_kernels, set_constant

SIZE = 20_000


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch) -> Path:
    """A folder for kernels that holds none, and a process that has loaded none."""
    folder = tmp_path / "kernels"
    monkeypatch.setenv("DROPCONNECT_CACHE_DIR", str(folder))
    as_in_a_new_process(monkeypatch)
    return folder


@pytest.mark.compiler
def test_kernels_are_compiled_once_and_kept(empty_cache: Path, compiled, monkeypatch) -> None:
    first = native.library("masks")
    assert native.library("masks") is first
    assert compiled() == ["masks"]
    assert [path.suffix for path in empty_cache.iterdir()] == [".so"]  # nothing half-written
    forget_kernels()
    native.library("masks")
    assert compiled() == ["masks"]


@pytest.mark.compiler
def test_threads_that_come_together_compile_once(empty_cache: Path, compiled) -> None:
    found: list[object] = []
    barrier = threading.Barrier(8)

    def use() -> None:
        barrier.wait()
        found.append(native.library("masks"))

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiled() == ["masks"]
    assert len(found) == 8
    assert len(set(map(id, found))) == 1


@pytest.mark.compiler
def test_threads_mask_at_the_same_time() -> None:
    """Each with a key of its own; what they get is what they get alone."""
    weight = torch.randn(SIZE)
    law, layout = Law.of(0.4, weight.device, weight.dtype), Layout.elements(SIZE)
    keys = [key_from_seed(seed) for seed in range(8)]
    expected = [drop_weight(weight, key, law, layout) for key in keys]
    equal = [True] * len(keys)

    def use(number: int) -> None:
        for _ in range(50):
            used = drop_weight(weight, keys[number], law, layout)
            equal[number] = equal[number] and torch.equal(used, expected[number])

    threads = [threading.Thread(target=use, args=(number,)) for number in range(len(keys))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(equal)


@pytest.mark.compiler
@pytest.mark.parametrize("change", ["flags", "compiler"])
def test_a_change_of_what_a_kernel_depends_on_compiles_again(
    change: str, empty_cache: Path, compiled, monkeypatch
) -> None:
    native.library("masks")
    if change == "flags":
        set_constant(monkeypatch, "compiler flags", (*constant("compiler flags"), "-DOTHER"))
    else:
        monkeypatch.setenv("CXX", f"{os.environ['CXX']} -DOTHER")
    forget_kernels()
    native.library("masks")
    assert compiled() == ["masks"] * 2


@pytest.mark.compiler
def test_flags_that_a_compiler_does_not_know_are_left_out(empty_cache: Path, monkeypatch) -> None:
    extras = (("-march=no-such-machine",), ("-no-such-flag",), ())
    set_constant(monkeypatch, "extra compiler flags", extras)
    weight = torch.randn(SIZE)
    used = torch.empty_like(weight)
    law = Law.of(0.4, weight.device, weight.dtype)
    mask = Mask(key_from_seed(1), law, Layout.elements(SIZE))
    expected = drop_weight(weight, *mask)
    forget_kernels()
    native.drop(weight, None, None, used, None, mask)
    assert torch.equal(used, expected)


@pytest.mark.compiler
def test_a_cache_that_cannot_be_written_is_replaced_for_this_process(tmp_path, monkeypatch) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    monkeypatch.delenv("DROPCONNECT_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    as_in_a_new_process(monkeypatch)
    assert native.library("masks") is not None
    assert os.listdir(tmp_path) == ["file"]


FORKED = """
import json, os, sys, warnings
import torch
from surgery.ops import Law, Layout, drop_weight, key_from_seed

def masked():
    weight = torch.arange(20_000.0)
    law, layout = Law.of(0.4, weight.device, weight.dtype), Layout.elements(20_000)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        used = [drop_weight(weight, key_from_seed(21), law, layout) for _ in range(2)]
    ours = [w.category.__name__ for w in seen if "DropConnect" in str(w.message)]
    return [ours, float(used[1].double().sum())]

children = []
for environment in json.loads(sys.argv[1]):
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            os.environ.update(environment)
            os.write(write, json.dumps(masked()).encode())
        finally:
            os._exit(0)
    os.close(write)
    children.append(os.fdopen(read))
print(json.dumps([json.load(child) for child in children]))
"""


def in_processes(environments: list[dict[str, str]]) -> list[Any]:
    """What a cold process finds with each of these: the warnings, and a sum. They are forks of one that
    has imported the library and done nothing, and run at the same time."""
    known = {name: value for name, value in os.environ.items() if name != "DROPCONNECT_COMPILE"}
    command = [sys.executable, "-c", FORKED, json.dumps(environments)]
    done = subprocess.run(command, env=known, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found


def expected_sum() -> float:
    weight = torch.arange(20_000.0)
    law = Law.of(0.4, weight.device, weight.dtype)
    used = drop_weight(weight, key_from_seed(21), law, Layout.elements(20_000))
    return float(used.double().sum())


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_machine_without_a_working_compiler_warns_once_and_masks_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    broken = {
        "no compiler": {"CXX": "no-such-compiler"},
        "compiler fails": {"CXX": "false"},
        "no command": {"CXX": "'x"},
        "no folder": {"DROPCONNECT_CACHE_DIR": str(tmp_path / "file")},
    }
    cache = {"DROPCONNECT_CACHE_DIR": str(tmp_path / "cache")}
    found = in_processes([{**cache, **environment} for environment in broken.values()])
    expected = [["RuntimeWarning"], expected_sum()]
    assert dict(zip(broken, found)) == dict.fromkeys(broken, expected)


@pytest.mark.compiler
def test_processes_that_come_together_all_find_whole_kernels(
    tmp_path: Path, compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECONDS_OF_A_COMPILER", "0.3")
    found = in_processes([{"DROPCONNECT_CACHE_DIR": str(tmp_path / "cache")}] * 3)
    assert found == [[[], expected_sum()]] * 3
    assert set(compiled()) == {"masks"}
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".so"]


@pytest.mark.compiler
@pytest.mark.parametrize("examples", [0, 1, 2, 33, 70_000])
def test_multipliers_of_examples_are_those_of_the_formula(examples: int) -> None:
    for seed in range(4):
        key = key_from_seed(seed)
        found = native.example_multipliers(examples, key)
        assert torch.equal(found, multipliers(examples, key))
