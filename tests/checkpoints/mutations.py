"""Good checkpoints made bad: folders of files as bytes, and what may have happened to them."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from surgery import save_dropconnect
from surgery.verbs.raw_files import quiet

from ..verbs.hostile import TEXTS, VALUES, nodes
from .raw import expected, operated, write

Files = dict[str, bytes]
"""What lies in a folder, by name."""

MARK = b"what nobody may read"
"""Stands in every file outside of the folder."""


class Evil:
    """What leaves a file called `evil`, if a pickle of it is loaded as pickles are."""

    def __reduce__(self) -> Any:
        return os.system, ("touch evil",)


def _files(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _saved(form: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(form, file, **options)
    return file.getvalue()


@cache
@quiet()
def good() -> dict[str, Files]:
    """Checkpoints that all commands take, or that one of them does."""
    found: dict[str, Files] = {}
    with tempfile.TemporaryDirectory() as name:
        home, model = Path(name), operated()
        found["raw"] = _files(write(model, home / "raw"))
        found["shards"] = _files(write(model, home / "shards", shards=2))
        found["no plan"] = _files(write(model, home / "no_plan", plan=False))
        save_dropconnect(model, home / "plain")
        save_file(expected(model), home / "plain" / "model.safetensors")
        found["plain"] = _files(home / "plain")
        state = dict(model.state_dict())
    old = {"rnn.module.weight_hh_l0_raw": torch.ones(8, 2), "rnn.module.bias": torch.ones(8)}
    run = {"state_dict": old, "epoch": 3, "optimizer": {"step": torch.ones(1)}}
    found["pickle"] = {"model.pt": _saved(state)}
    found["old pickle"] = {"model.pt": _saved(old, _use_new_zipfile_serialization=False)}
    found["run"] = {"model.pt": _saved(run)}
    halves = [dict([*state.items()][part::2]) for part in range(2)]
    index = {key: f"pytorch_model-{part}.bin" for part in range(2) for key in halves[part]}
    found["pickles"] = {
        **{f"pytorch_model-{part}.bin": _saved(halves[part]) for part in range(2)},
        "pytorch_model.bin.index.json": json.dumps({"weight_map": index}).encode(),
        "config.json": b"{}",
    }
    return found


def _some(files: Files, rng: random.Random, *endings: str) -> str | None:
    names = sorted(name for name in files if name.endswith(endings))
    return rng.choice(names) if names else None


def flip(files: Files, rng: random.Random) -> None:
    name = rng.choice(sorted(files))
    data = bytearray(files[name] or b" ")
    for _ in range(rng.randrange(1, 8)):
        data[rng.randrange(min(len(data), rng.choice((16, 600, 10**9))))] = rng.randrange(256)
    files[name] = bytes(data)


def cut(files: Files, rng: random.Random) -> None:
    name = rng.choice(sorted(files))
    files[name] = files[name][: rng.randrange(len(files[name]) + 1)]


def insert(files: Files, rng: random.Random) -> None:
    name = rng.choice(sorted(files))
    data, at = files[name], rng.randrange(len(files[name]) + 1)
    files[name] = data[:at] + rng.randbytes(rng.randrange(1, 20)) + data[at:]


def swap(files: Files, rng: random.Random) -> None:
    one, other = rng.choice(sorted(files)), rng.choice(sorted(files))
    files[one], files[other] = files[other], files[one]


def remove(files: Files, rng: random.Random) -> None:
    del files[rng.choice(sorted(files))]


def rename(files: Files, rng: random.Random) -> None:
    name = rng.choice(sorted(files))
    new = ["model.safetensors.index.json", "pytorch_model.bin", "dropconnect.json", "a.pt", "x"]
    files[rng.choice([*new, "model.new-01234567.safetensors", "b.safetensors"])] = files.pop(name)


NAMES = ("../outside/model.safetensors", "/etc/passwd", "model.safetensors", "..", "a/b", "evil")
UNPRINTABLE = ("\ud800", "a\nb", "a\x1b[2Jb")
DTYPES = ("F4", "F8_E4M3", "F8_E8M0", "F6_E2M3", "I64", "U8", "C64", "F128", "f32")


def _change(form: Any, rng: random.Random) -> None:
    """One node of a tree removed, moved, or something else."""
    places = list(nodes(form)) if isinstance(form, (dict, list)) else []
    if not places:
        return
    container, key = rng.choice(places)
    how = rng.random()
    if how < 0.15:
        del container[key]
    elif how < 0.3 and isinstance(container, dict):
        container[rng.choice([f"{key}_raw", "", "__metadata__", *UNPRINTABLE])] = container.pop(key)
    elif how < 0.45:
        container[key] = copy.deepcopy(rng.choice(places)[0])
    elif how < 0.6 and isinstance(container[key], int):
        container[key] += rng.choice((-8, -1, 1, 4, 8, 2**32))
    else:
        container[key] = copy.deepcopy(
            rng.choice((*VALUES, *NAMES, *UNPRINTABLE, *DTYPES, "@here@"))
        )


def _rewritten(content: bytes, rng: random.Random) -> bytes | None:
    try:
        form = json.loads(content)
    except (ValueError, RecursionError):
        return None
    _change(form, rng)
    return json.dumps(form).replace('"@here@"', rng.choice(TEXTS)).encode()


def change_json(files: Files, rng: random.Random) -> None:
    name = _some(files, rng, ".json")
    if name is not None:
        files[name] = _rewritten(files[name], rng) or files[name]


def change_header(files: Files, rng: random.Random) -> None:
    """Of a safetensors file, its length kept right."""
    name = _some(files, rng, ".safetensors")
    if name is None:
        return
    data = files[name]
    end = 8 + int.from_bytes(data[:8], "little")
    header = _rewritten(data[8:end], rng)
    if header is not None:
        files[name] = len(header).to_bytes(8, "little") + header + data[end:]


def change_length(files: Files, rng: random.Random) -> None:
    name = _some(files, rng, ".safetensors")
    if name is not None:
        length = rng.choice((0, 7, 2**31, 2**63, 2**64 - 1, 100_000_001))
        files[name] = length.to_bytes(8, "little") + files[name][8:]


PICKLE = ".pt", ".bin"
GLOBALS = (
    b"posix\nsystem",
    b"builtins\neval",
    b"torch\nload",
    b"torch._utils\n_rebuild_sparse_tensor",
)


def change_pickle(files: Files, rng: random.Random) -> None:
    """What the archive of `torch.save` says of its tensors, and not their bytes."""
    name = _some(files, rng, *PICKLE)
    new = io.BytesIO()
    try:
        if name is None or not zipfile.is_zipfile(io.BytesIO(files[name])):
            return
        with zipfile.ZipFile(io.BytesIO(files[name])) as old, zipfile.ZipFile(new, "w") as out:
            for record in old.infolist():
                data = old.read(record)
                if record.filename.endswith(".pkl"):
                    data = _other_pickle(data, rng)
                elif rng.random() < 0.05:
                    data = data[: len(data) // 2]
                packed = zipfile.ZIP_DEFLATED if rng.random() < 0.02 else zipfile.ZIP_STORED
                out.writestr(record.filename, data, packed)
    except Exception:  # whatever zipfile and zlib make of an archive that was changed before
        return
    files[name] = new.getvalue()


def _other_pickle(data: bytes, rng: random.Random) -> bytes:
    how = rng.random()
    if how < 0.2:
        return data.replace(b"torch._utils\n_rebuild_tensor_v2", rng.choice(GLOBALS))
    if how < 0.3:
        return pickle.dumps({"w_raw": Evil()}, protocol=2)
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(changed))
        if how < 0.6:
            changed[at] = rng.randrange(256)
        else:  # a number of one byte: of a size, a stride, an offset
            numbers = [place for place, one in enumerate(changed[:-1]) if one == ord("K")]
            changed[rng.choice(numbers or [at - 1]) + 1] = rng.choice((0, 1, 2, 7, 127, 255))
    return bytes(changed)


def whole_pickle(files: Files, rng: random.Random) -> None:
    """A file of `torch.save` with something else in it."""
    name = _some(files, rng, *PICKLE) or "model.pt"
    odd: Callable[[], Any] = rng.choice(_ODD)
    form = {"w_raw": torch.ones(2), rng.choice(("a", "\ud800", "__metadata__", "w")): odd()}
    files[name] = _saved(form, _use_new_zipfile_serialization=rng.random() < 0.5)


_ODD: tuple[Callable[[], Any], ...] = (
    Evil,
    lambda: torch.ones(2, device="meta"),
    lambda: torch.ones(2, 2).to_sparse(),
    lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
    lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    lambda: torch.ones(1).expand(2**40),
    lambda: torch.ones(2, dtype=torch.complex128),
    lambda: torch.ones(2, dtype=torch.complex64).conj(),
    lambda: {"a": torch.ones(1)},
    lambda: [torch.ones(1)],
    lambda: None,
)

MUTATIONS = (
    *(flip, flip, cut, insert, swap, remove, rename, change_json, change_json, change_json),
    *(change_header, change_header, change_header, change_length, change_pickle, change_pickle),
    whole_pickle,
)
