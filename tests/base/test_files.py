"""Files that are whole or not there, whoever writes them and whenever that is cut off."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.base.files import whole_file


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_the_umask_of_the_process_is_not_touched(tmp_path: Path, monkeypatch) -> None:
    """It is one for all threads; what the kernel takes of 0o666 is right all the same."""
    (tmp_path / "ordinary").write_text("")
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask is the process's"))
    with whole_file(tmp_path / "ours") as path:
        save_file({"a": torch.ones(2)}, path)  # which makes a file of its own, with mode 0o600
    with whole_file(tmp_path / "private", 0o600) as path:
        Path(path).write_text("")
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in names(tmp_path)}
    assert modes["ours"] == modes["ordinary"]
    assert modes["private"] == 0o600
    assert torch.equal(load_file(tmp_path / "ours")["a"], torch.ones(2))


@pytest.mark.parametrize("step", ["os.fsync", "os.replace", "os.chmod", "body"])
def test_a_failure_leaves_the_old_file_alone(step: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("old")

    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    def write() -> None:
        with whole_file(tmp_path / "file") as path:
            Path(path).write_text("new")
            os.chmod(path, 0o600)
            if step == "body":
                fail()
            monkeypatch.setattr(step, fail)

    with pytest.raises(KeyboardInterrupt):
        write()
    monkeypatch.undo()
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with whole_file(tmp_path / "file") as path:
            Path(path).write_text("half")
            Path(path + ".of-the-writer").write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    (left,) = names(tmp_path)
    _, host, _ = left.split("-")
    (tmp_path / left.replace(host, "0" * 8)).mkdir()  # of another host, perhaps at work
    old = tmp_path / left.replace(host, "1" * 8)
    old.mkdir()
    os.utime(old, (1, 1))
    (tmp_path / ".dropconnect-notes.unfinished").write_text("the user's")
    with whole_file(tmp_path / "file") as path:
        Path(path).write_text("whole")
    kept = [".dropconnect-notes.unfinished", left.replace(host, "0" * 8), "file"]
    assert names(tmp_path) == sorted(kept)


def test_what_is_being_written_is_not_swept(tmp_path: Path) -> None:
    with whole_file(tmp_path / "one") as one:
        with whole_file(tmp_path / "two") as two:
            Path(two).write_text("two")
        Path(one).write_text("one")
    assert names(tmp_path) == ["one", "two"]


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for _ in range(60):
                with whole_file(tmp_path / "file") as path:
                    Path(path).write_text(str(number) * 1000)
                assert len(set((tmp_path / "file").read_text())) == 1
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert names(tmp_path) == ["file"]


def test_a_link_is_not_taken_for_what_was_left(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("")
    with whole_file(tmp_path / "file") as path:
        Path(path).write_text("")
        link = Path(path).parent
    link.symlink_to(tmp_path / "elsewhere")
    with whole_file(tmp_path / "file") as path:
        Path(path).write_text("")
    assert link.is_symlink()
    assert names(tmp_path / "elsewhere") == ["precious"]
