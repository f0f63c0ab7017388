"""Kernels that are kept: damaged ones are built again, those that others could write are not loaded."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surgery.ops.cpu import build, native

from ...internals import as_in_a_new_process, expect_functions, forget_kernels, set_constant

NAME = "activations"
"""The kernels that compile fastest."""

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="other users are a Unix affair")


@pytest.fixture
def folder(
    tmp_path: Path, compiled: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An empty cache, for a process that has loaded nothing."""
    as_in_a_new_process(monkeypatch)
    made = tmp_path / "above" / "kernels"
    made.mkdir(parents=True)
    monkeypatch.setenv("DROPCONNECT_CACHE_DIR", str(made))
    return made


def load_anew() -> Any:
    forget_kernels()
    return native.library(NAME)


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def belongs_to_another(path: Path, monkeypatch) -> None:
    if os.geteuid() == 0:
        os.chown(path, 54321, -1, follow_symlinks=False)
    else:
        stranger = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: stranger)


DAMAGED = """
import importlib, pathlib, sys, torch
from surgery.ops.cpu import native
cache, other = map(pathlib.Path, sys.argv[1:])
mean, var = torch.linspace(-2, 2, 40), torch.full((40,), 0.3)
expected = native.excess(mean, var)
(path,) = cache.iterdir()
good = path.read_bytes()
damages = {
    "truncated": good[:4096], "empty": b"", "text": b"no library",
    "bit": good[:-1] + bytes([good[-1] ^ 1]), "other": other.read_bytes(),
}
for name, content in damages.items():
    path.unlink()  # the one that is loaded stays as it is
    path.write_bytes(content)
    for _ in range(2):  # built again once, and then kept
        importlib.reload(native)  # has loaded nothing
        assert torch.equal(native.excess(mean, var), expected), name
assert [path.read_bytes() == good for path in cache.iterdir()] == [True]
"""


@pytest.mark.compiler
def test_damaged_kernels_are_built_again_once(tmp_path: Path, compiled) -> None:
    """In a process of its own, since a truncated library kills the one that calls it."""
    source = tmp_path / "other.cpp"
    source.write_text('extern "C" int other() { return 1; }')
    other = tmp_path / "other.so"
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(other)], check=True)
    kept = tmp_path / "kept"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", DAMAGED, str(kept), str(other)],
        env={**os.environ, "DROPCONNECT_CACHE_DIR": str(kept)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert compiled() == ["activations"] * 6


@pytest.mark.compiler
def test_kernels_without_the_functions_are_built_again(folder: Path, compiled, monkeypatch) -> None:
    """Also where their hash is right."""
    load_anew()
    older = only_file(folder)
    expect_functions(monkeypatch, NAME, {"no_such_function": [ctypes.c_int]})
    with pytest.raises(build.NoCompiler, match="no_such_function"):
        load_anew()
    assert compiled() == [NAME] * 3  # the second time also without the cache
    assert not older.exists()


@pytest.mark.compiler
@pytest.mark.parametrize("where", ["folder", "above", "link"])
@pytest.mark.parametrize("how", ["everybody", "group", "owner"])
def test_a_folder_that_others_may_change_is_not_used(
    where: str, how: str, folder: Path, compiled, monkeypatch, tmp_path: Path
) -> None:
    load_anew()
    if where == "link":
        (tmp_path / "link").symlink_to(folder)
        monkeypatch.setenv("DROPCONNECT_CACHE_DIR", str(tmp_path / "link"))
    bad = folder.parent if where == "above" else folder
    if how == "owner":
        belongs_to_another(bad, monkeypatch)
    else:
        if where == "above":
            os.chown(bad, -1, os.getgid() if os.geteuid() else 54321)
        bad.chmod(0o777 if how == "everybody" else 0o770)
    before = os.listdir(folder)
    words = {"owner": "belongs to user", "group": "by group"}.get(how, "by everybody")
    if how == "group" and where == "above" and os.getgid() == os.geteuid() != 0:
        pytest.skip("a group of the user's own may write above")
    with pytest.warns(RuntimeWarning, match=rf"kernels are compiled for this process.* {words}"):
        assert load_anew()
    assert compiled() == [NAME] * 2
    assert os.listdir(folder) == before


@pytest.mark.compiler
def test_a_folder_as_tmp_may_be_above(folder: Path, compiled) -> None:
    folder.parent.chmod(0o1777)
    load_anew()
    load_anew()
    assert compiled() == [NAME]


@pytest.mark.compiler
@pytest.mark.parametrize("how", ["everybody", "group", "owner", "link", "fifo", "folder"])
def test_a_file_that_others_may_write_is_not_loaded(
    how: str, folder: Path, compiled, monkeypatch, tmp_path: Path
) -> None:
    load_anew()
    path = only_file(folder)
    if how == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        belongs_to_another(path, monkeypatch)
    elif how in ("everybody", "group"):
        path.chmod(0o666 if how == "everybody" else 0o664)
    elif how == "link":
        path.rename(tmp_path / "elsewhere.so")
        path.symlink_to(tmp_path / "elsewhere.so")
    else:
        path.unlink()
        path.mkdir() if how == "folder" else os.mkfifo(path)
    assert load_anew()
    assert compiled() == [NAME] * 2
    if how != "folder":  # the new one has taken its place
        found = path.lstat()
        assert (found.st_uid, found.st_mode & 0o777022) == (os.geteuid(), 0o100000)
        load_anew()
        assert compiled() == [NAME] * 2


@pytest.mark.compiler
def test_what_a_wide_umask_gives_is_loaded_again(folder: Path, compiled) -> None:
    before = os.umask(0)
    try:
        load_anew()
    finally:
        os.umask(before)
    load_anew()
    assert compiled() == [NAME]


@pytest.mark.compiler
def test_nothing_is_made_in_the_home_of_another(folder: Path, compiled, monkeypatch) -> None:
    """As under sudo, which keeps HOME."""
    monkeypatch.delenv("DROPCONNECT_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(folder))
    belongs_to_another(folder, monkeypatch)
    with pytest.warns(RuntimeWarning, match="belongs to user"):
        load_anew()
    assert os.listdir(folder) == []


@pytest.mark.compiler
@pytest.mark.parametrize("step", ["os.replace", "os.fsync"])
def test_a_cache_that_is_full_is_done_without(
    step: str, folder: Path, compiled, monkeypatch
) -> None:
    def fail(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(step, fail)
    assert load_anew()
    assert compiled() == [NAME]
    assert os.listdir(folder) == []


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("'x", "No closing quotation"),
        ('""', "no C\\+\\+ compiler"),
        ("/", "no C\\+\\+ compiler"),
        ("true", "fails \\(exit 0\\)"),
        ("printf '\\377' >&2; exit 1", "fails \\(exit 1\\)"),
        ("while [ $# -gt 1 ]; do shift; done; echo > $1", "cannot be used"),
        ("cat; sleep 60", "did not end"),
    ],
    ids=["quote", "empty", "folder", "true", "no-text", "writes-no-library", "hangs"],
)
def test_a_compiler_that_is_none(command: str, reason: str, tmp_path: Path, monkeypatch) -> None:
    if ";" in command:
        command = script(tmp_path / "compiler", command)
    kept = tmp_path / "kept"
    monkeypatch.setenv("DROPCONNECT_CACHE_DIR", str(kept))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("CXX", command)
    set_constant(monkeypatch, "patience with a compiler", 0.5)
    with pytest.raises(build.NoCompiler, match=reason):
        load_anew()
    assert set(os.listdir(tmp_path)) <= {"kept", "compiler"}
    assert not kept.exists() or os.listdir(kept) == []


@pytest.mark.compiler
def test_a_blank_cxx_is_none(folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", " ")
    assert load_anew()


NO_CACHE = """
import os, sys, torch
from surgery.ops.cpu import native
mean, var = torch.linspace(-2, 2, 40), torch.full((40,), 0.3)
native.library("activations")
child = os.fork()
native.library("masks")
native.excess(mean, var)
if child == 0:
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
native.excess(mean, var)
"""


@pytest.mark.compiler
def test_without_a_cache_nothing_is_left(tmp_path: Path, compiled) -> None:
    """Also by a process that forks, before or after it has compiled."""
    (tmp_path / "cache").write_text("no folder")
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    env.pop("DROPCONNECT_CACHE_DIR", None)
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", NO_CACHE]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(compiled()) == ["activations", "masks", "masks"]
    assert os.listdir(tmp_path) == ["cache"]
