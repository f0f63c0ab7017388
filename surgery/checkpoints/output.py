"""Where new files of a checkpoint go, so that at any moment the old checkpoint or the new one is whole.

No file is changed in place. A header of more than one page cannot be rewritten in one step that nothing
interrupts, and while it is half new the file is none; so each file is written beside, and renamed once
it is on disk. Where the file system shares blocks between files (btrfs, xfs, zfs), a copy of which only
the header differs takes no time and no space.

Several files with an index are changed in the order

    new files under names of their own      nobody reads them yet
    an index that names them                the one step
    the same files under the usual names    the old ones go
    an index that names those

and what a killed process has left of that is finished, or removed, by the next one.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..base.files import no_folder, publish, sweep, sync_folder, unfinished_folder, whole_file
from ..spec.errors import SurgeryError
from ..spec.forms import is_cached, real
from ..spec.saved import PLAN_FILE, are_anchors
from .weights import (
    PICKLES,
    SAFETENSORS,
    Weights,
    WrongUse,
    index_text,
    is_index,
    is_of_weights,
    other_indexes,
    read_index,
)

_OWN = re.compile(r"(.+)\.new-[0-9a-f]{8}\.safetensors")
"""New files under names of their own, until they have the usual ones."""


@contextmanager
def new_checkpoint(weights: Weights, out: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder to write files into, under the names that they have in a checkpoint, and the form of
    their index, to be changed (empty if there is none). They become the new checkpoint `out` when the
    block ends: a folder, with what else lies in the folder of the old one, or a file.

    Raises:
        WrongUse: there is something already, or no folder for it; or several files were to be one; or
            a file would have a wrong name.
    """
    if is_file(out, weights.path.is_dir() or weights.index is not None):
        if weights.index is not None:
            raise WrongUse(f"{weights.path} is several files; name a folder to write, not {out}")
        with new_file(out) as folder:
            yield folder, {}
            (name,) = weights.headers
            os.replace(folder / name, folder / out.name)
    else:
        with new_folder(out) as folder:
            index: dict[str, Any] = dict(weights.index or {})
            yield folder, index
            copy_companions(weights.folder, folder)
            if weights.index is not None:
                write_index(folder / weights.index_name, index)


def is_file(out: Path, folder: bool) -> bool:
    """Whether `out` names a file of safetensors to be written, and not a folder for a checkpoint.

    Args:
        folder: whether it may be a folder.

    Raises:
        WrongUse: it has to be a file, or is named as one, and does not end as such files do.
    """
    if out.name.endswith(SAFETENSORS):
        return True
    if not folder or out.name.endswith(PICKLES):
        check_ending(out, SAFETENSORS)
    return False


def check_ending(out: Path, ending: str) -> None:
    """Raise `WrongUse` unless the name of a file says what is written into it."""
    if not out.name.endswith(ending):
        raise WrongUse(f"{out} must end in {ending}: that is what is written")


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """A folder in which to write a file of the name of `out`, which becomes `out` when the block ends.

    Raises:
        WrongUse: there is something already, or no folder for it.
    """
    check_new(out, "file")
    with unfinished_folder(out.parent) as folder:
        yield folder
        publish(folder / out.name, out)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes the new folder `out` when the block ends.

    Raises:
        WrongUse: there is something already, or no folder for it.
    """
    check_new(out, "folder")
    with unfinished_folder(out.parent) as unfinished:
        folder = unfinished / out.name
        folder.mkdir()
        yield folder
        for path in folder.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        sync_folder(folder)
        os.replace(folder, out)
        sync_folder(out.parent)


def check_new(out: Path, kind: str) -> None:
    """Raise `WrongUse` unless a new `kind` (file, folder) can be made there. An empty folder may become
    one that is not."""
    name = os.path.basename(out)
    if name in ("", ".", ".."):
        raise WrongUse(f"{out} names a folder that is there already; name a new one in it")
    if out.is_symlink():
        raise WrongUse(
            f"{out} is a link, to {os.readlink(out)}; name a path that is none, or remove it"
        )
    if out.is_dir() and kind == "file":
        raise WrongUse(f"{out} is a folder, and one file is written; name a file in it")
    if any(out.iterdir()) if out.is_dir() else out.exists():
        raise WrongUse(f"{out} is there already; name one that is not, or remove it")
    if not out.parent.is_dir():
        raise WrongUse(no_folder(out.parent))


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy what lies beside weights in a folder (config, tokenizer, ...) into another: plain files that
    hold no weights, and not our own. Returns their names."""
    names = []
    for path in sorted(source.iterdir()):
        is_ours = path.name == PLAN_FILE or are_anchors(path.name)
        regular = (not path.is_symlink() and path.is_file()) or is_cached(path)
        hidden = path.name.startswith(".")
        if regular and not (is_ours or hidden or is_of_weights(path.name)):
            shutil.copyfile(path, target / path.name)
            names.append(path.name)
    return names


@contextmanager
def in_place(weights: Weights) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder to write the new files of a checkpoint into, under their old names, and the form of its
    index, to be changed; they take the place of the old ones when the block ends.

    The old files of which there is no new one are removed.

    Raises:
        WrongUse: the checkpoint is a part of another.
    """
    home = weights.folder
    _refuse_part(weights)
    modes = {name: stat.S_IMODE(os.stat(home / name).st_mode) for name in weights.headers}
    with unfinished_folder(home) as folder:
        form = json.loads(json.dumps(weights.index))
        yield folder, form
        written = [name for name in weights.headers if (folder / name).exists()]
        for name in written:
            os.chmod(folder / name, modes[name])
        if weights.index is None:
            for name in written:
                publish(folder / name, home / name)
            return
        own = {name: _own_name(name) for name in written}
        path = home / weights.index_name
        try:
            for name in written:
                publish(folder / name, home / own[name])
            _write_index(path, form, own)
        except BaseException:  # a disk that is full, Ctrl-C
            remove_unnamed(home)
            raise
        _usual_names(path, form, own)
        for name in weights.headers.keys() - own.keys():
            (home / name).unlink()


def _refuse_part(weights: Weights) -> None:
    """Raise `WrongUse` if another index names a file of the checkpoint: it would be wrong."""
    home = weights.folder
    own = {real(home / name) for name in weights.headers}
    for other, form in other_indexes(home, weights.index_name):
        parts = {real(home / name) for name in form["weight_map"].values()}
        if own & parts and weights.index is None:
            raise WrongUse(f"{weights.path} is a part of {other}; name that, or the folder")
        if own & parts:
            raise WrongUse(
                f"{min(own & parts)} is also a part of {other}, whose keys would be wrong: write to a "
                "new folder (OUT), or remove that index"
            )


def _own_name(name: str) -> str:
    return f"{name.removesuffix(SAFETENSORS)}.new-{secrets.token_hex(4)}{SAFETENSORS}"


def _write_index(path: Path, form: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Replace an index by one that has other names of files."""
    weight_map = {key: names.get(name, name) for key, name in form["weight_map"].items()}
    write_index(path, {**form, "weight_map": weight_map})


def write_index(path: Path, form: Mapping[str, Any]) -> None:
    """Write an index, as a whole or not at all."""
    with whole_file(path) as temporary:
        Path(temporary).write_bytes(index_text(form, str(path)))


def _usual_names(path: Path, form: Mapping[str, Any], own: Mapping[str, str]) -> None:
    """Give new files, which the index names by names of their own, the usual ones.

    Args:
        path: of the index.
        form: the index with the usual names.
        own: from usual names to those of their own.
    """
    home = path.parent
    with unfinished_folder(home) as folder:
        for usual, its_own in own.items():
            try:
                os.link(home / its_own, folder / usual)
            except OSError:  # a file system without links
                shutil.copyfile(home / its_own, folder / usual)
            publish(folder / usual, home / usual)
    _write_index(path, form, {})
    for its_own in own.values():
        (home / its_own).unlink()
    sync_folder(home)


def finish(path: Path) -> bool:
    """Finish what a killed process has left in the folder of a checkpoint.

    Args:
        path: the file, or the index.

    Returns:
        whether the index named new files by names of their own.
    """
    sweep(path.parent)
    if not is_index(path.name) or not path.is_file():
        return False
    form = read_index(path)
    named = set(form["weight_map"].values())
    own = {f"{found[1]}{SAFETENSORS}": name for name in named if (found := _OWN.fullmatch(name))}
    if own:
        usual = {its_own: name for name, its_own in own.items()}
        weight_map = {key: usual.get(name, name) for key, name in form["weight_map"].items()}
        _usual_names(path, {**form, "weight_map": weight_map}, own)
    return bool(own)


def remove_unnamed(folder: Path) -> None:
    """Remove new files under names of their own that no index names. One that cannot be read may name
    any of them."""
    with suppress(SurgeryError, OSError):
        forms = [form for _, form in other_indexes(folder)]
        named = {name for form in forms for name in form["weight_map"].values()}
        for one in list(folder.iterdir()):
            if _OWN.fullmatch(one.name) and one.name not in named:
                one.unlink()
