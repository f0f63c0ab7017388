"""The C++ kernels: built once, whole, by whoever comes first; and what happens where they cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from surgery.ops import Law, Layout, drop_weight, key_from_seed
from surgery.ops.cpu import build, native
from surgery.ops.law import Mask

SIZE = 20_000


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch) -> Path:
    """A folder for kernels that holds none, and a process that has loaded none."""
    folder = tmp_path / "kernels"
    monkeypatch.setenv("DROPCONNECT_CACHE_DIR", str(folder))
    monkeypatch.setattr(native, "_libraries", {})
    return folder


@pytest.fixture
def builds(monkeypatch) -> list[str]:
    """Names of the sources that are compiled."""
    built: list[str] = []
    compile_ = build._compile

    def spy(compiler, name, folder):
        built.append(name)
        return compile_(compiler, name, folder)

    monkeypatch.setattr(build, "_compile", spy)
    return built


@pytest.mark.compiler
def test_kernels_are_compiled_once_and_kept(empty_cache: Path, builds, monkeypatch) -> None:
    first = native.library("masks")
    assert native.library("masks") is first
    assert builds == ["masks"]
    assert [path.suffix for path in empty_cache.iterdir()] == [".so"]  # nothing half-written
    monkeypatch.setattr(native, "_libraries", {})  # another process
    native.library("masks")
    assert builds == ["masks"]


@pytest.mark.compiler
def test_threads_that_come_together_compile_once(empty_cache: Path, builds) -> None:
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
    assert builds == ["masks"]
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
    change: str, empty_cache: Path, builds, monkeypatch
) -> None:
    native.library("masks")
    if change == "flags":
        monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    else:
        monkeypatch.setenv("CXX", "c++ -DOTHER")
    monkeypatch.setattr(native, "_libraries", {})
    native.library("masks")
    assert builds == ["masks"] * 2


@pytest.mark.compiler
def test_flags_that_a_compiler_does_not_know_are_left_out(empty_cache: Path, monkeypatch) -> None:
    extras = (("-march=no-such-machine",), ("-no-such-flag",), ())
    monkeypatch.setattr(build, "EXTRAS", extras)
    weight = torch.randn(SIZE)
    used = torch.empty_like(weight)
    law = Law.of(0.4, weight.device, weight.dtype)
    mask = Mask(key_from_seed(1), law, Layout.elements(SIZE))
    expected = drop_weight(weight, *mask)
    monkeypatch.setattr(native, "_drop_functions", {})
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
    monkeypatch.setattr(native, "_libraries", {})
    assert native.library("masks") is not None
    assert os.listdir(tmp_path) == ["file"]


NO_COMPILER = """
import warnings
import torch
from surgery.ops import Law, Layout, drop_weight, key_from_seed
weight = torch.arange(20_000.0)
law, layout = Law.of(0.4, weight.device, weight.dtype), Layout.elements(20_000)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    used = [drop_weight(weight, key_from_seed(21), law, layout) for _ in range(2)]
ours = [w for w in seen if "DropConnect" in str(w.message)]
print(len(ours), ours[0].category.__name__ if ours else None, float(used[0].double().sum()))
"""


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param({"CXX": "no-such-compiler"}, id="no compiler"),
        pytest.param({"CXX": "false"}, id="compiler fails"),
        pytest.param({"CXX": "'x"}, id="no command"),
        pytest.param({"DROPCONNECT_CACHE_DIR": "{file}"}, id="no folder"),
    ],
)
def test_real_machine_without_a_working_compiler(broken, tmp_path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    env = {**os.environ, "DROPCONNECT_CACHE_DIR": str(tmp_path / "cache")}
    env |= {name: value.format(file=file) for name, value in broken.items()}
    env.pop("DROPCONNECT_COMPILE", None)
    result = subprocess.run(
        [sys.executable, "-c", NO_COMPILER], env=env, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    weight = torch.arange(20_000.0)
    law = Law.of(0.4, weight.device, weight.dtype)
    expected = drop_weight(weight, key_from_seed(21), law, Layout.elements(20_000))
    assert result.stdout.split() == ["1", "RuntimeWarning", str(float(expected.double().sum()))]


@pytest.mark.compiler
def test_processes_that_come_together_all_find_whole_kernels(tmp_path) -> None:
    env = {**os.environ, "DROPCONNECT_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", NO_COMPILER]
    running = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    answers = {process.communicate(timeout=120)[0] for process in running}
    assert len(answers) == 1
    assert answers.pop().split()[:2] == ["0", "None"]
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".so"]
