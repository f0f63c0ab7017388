"""Good saves made bad: mutations of the JSON, of bytes, of tensors, and of what kind of file it is."""

from __future__ import annotations

import copy
import json
import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from surgery.spec.saved import PLAN_FILE
from surgery.stored.tensors import digest

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**64), 10**400, 0.5, -0.5, 1.5, 1e308),
    *("", "x", "../x", "/etc/passwd", "a\0b", "\ud800", "x" * 100_000, "fc.weight", "all", "NaN"),
    *([], [[]], {}, [1], ["x"], {"x": 1}, [None] * 3, {"version": 1}, [{}], {"": ""}),
)
"""What is put where something else belongs."""

TEXTS = ("1e400", "-1e400", "NaN", "Infinity", "[" * 5000, '{"a":' * 5000, "1" * 5000, '"\\ud800"')
"""The same, as JSON that Python cannot or does not write."""

Mutation = Callable[[Path, random.Random], None]


def nodes(form: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    for key in list(form) if isinstance(form, dict) else range(len(form)):
        yield form, key
        if isinstance(form[key], (dict, list)):
            yield from nodes(form[key])


def change_a_value(folder: Path, rng: random.Random) -> None:
    _rewrite(folder, lambda form: _assign(form, rng, copy.deepcopy(rng.choice(VALUES))))


def change_a_text(folder: Path, rng: random.Random) -> None:
    _rewrite(folder, lambda form: _assign(form, rng, "@here@"), ('"@here@"', rng.choice(TEXTS)))


def change_many(folder: Path, rng: random.Random) -> None:
    for _ in range(rng.randrange(2, 6)):
        change_a_value(folder, rng)


def remove_a_node(folder: Path, rng: random.Random) -> None:
    def remove(form: Any) -> None:
        container, key = rng.choice(list(nodes(form)))
        del container[key]

    _rewrite(folder, remove)


def rename_a_key(folder: Path, rng: random.Random) -> None:
    def rename(form: Any) -> None:
        container, key = rng.choice([pair for pair in nodes(form) if isinstance(pair[0], dict)])
        container[rng.choice([f"{key}s", "", "version", "p", "../x", "\ud800"])] = container.pop(
            key
        )

    _rewrite(folder, rename)


def repeat_a_key(folder: Path, rng: random.Random) -> None:
    text = (folder / PLAN_FILE).read_text()
    name = rng.choice(["version", "plan", "sites", "module", "p", "file", "shape"])
    (folder / PLAN_FILE).write_text(text.replace(f'"{name}":', f'"{name}": 1, "{name}":', 1))


def move_a_node(folder: Path, rng: random.Random) -> None:
    def move(form: Any) -> None:
        container, key = rng.choice(list(nodes(form)))
        _assign(form, rng, copy.deepcopy(container[key]))

    _rewrite(folder, move)


def other_top(folder: Path, rng: random.Random) -> None:
    tops = ["", "null", "[]", "1", '"x"', *TEXTS, "{}", '{"version": 1}', "[" + "[]," * 100 + "[]]"]
    (folder / PLAN_FILE).write_text(rng.choice(tops))


def flip_bytes(folder: Path, rng: random.Random) -> None:
    path = rng.choice(_files(folder))
    data = bytearray(path.read_bytes())
    for _ in range(rng.randrange(1, 8)):
        data[rng.randrange(min(len(data), 600))] = rng.randrange(256)
    path.write_bytes(data)


def cut(folder: Path, rng: random.Random) -> None:
    path = rng.choice(_files(folder))
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def insert(folder: Path, rng: random.Random) -> None:
    path = rng.choice(_files(folder))
    data, at = path.read_bytes(), rng.randrange(path.stat().st_size)
    path.write_bytes(data[:at] + rng.randbytes(rng.randrange(1, 20)) + data[at:])


def change_the_header(folder: Path, rng: random.Random) -> None:
    """Of the tensors, keeping its length right."""
    path = _files(folder)[1]
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    _assign(header, rng, copy.deepcopy(rng.choice([*VALUES, "F4", "F8_E4M3", "I64", "U8", "C64"])))
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])


def _is_known(dtype: torch.dtype) -> bool:
    """Whether this safetensors can write the type: 0.4 knows no complex numbers."""
    try:
        save({"x": torch.ones(1, dtype=dtype)})
    except KeyError:
        return False
    return True


_NUMBERS = (torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8)
DTYPES = tuple(filter(_is_known, _NUMBERS))


def other_tensors(folder: Path, rng: random.Random) -> None:
    """Whose digest is right."""
    names = ["fc.weight", "embed.weight", "rnn.weight_hh_l0", "x", ""]
    shapes = [(4, 4), (16, 4), (0,), (), (4, 5), (1, 4, 4), (2**20,)]
    count = rng.randrange(4)
    tensors = {
        rng.choice(names): torch.ones(rng.choice(shapes), dtype=rng.choice(DTYPES))
        for _ in range(count)
    }
    tensors = tensors if rng.random() < 0.5 else {**_good_anchors(), **dict([*tensors.items()][:1])}
    path = _files(folder)[1]
    path.write_bytes(save(tensors))
    form = json.loads((folder / PLAN_FILE).read_text())
    form["anchors"]["sha256"] = digest(tensors)
    (folder / PLAN_FILE).write_text(json.dumps(form))


def other_kind_of_file(folder: Path, rng: random.Random) -> None:
    path = rng.choice(_files(folder))
    path.unlink()
    _KINDS[rng.randrange(len(_KINDS))](path)


def _listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = os.getcwd()
        os.chdir(path.parent)  # the path of a socket is short
        one.bind(path.name)
        os.chdir(here)


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 42)


_KINDS: tuple[Callable[[Path], Any], ...] = (
    os.mkfifo,
    os.mkdir,
    _listen,
    _sparse,
    lambda path: path.touch(mode=0),
    lambda path: path.symlink_to(path.name),
    lambda path: path.symlink_to("nowhere"),
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to("/dev/stdin"),
    lambda path: path.symlink_to(path.parent),
    lambda path: None,
)

MUTATIONS: tuple[Mutation, ...] = (
    *(change_a_value, change_a_text, change_many, remove_a_node, rename_a_key, repeat_a_key),
    *(move_a_node, other_top, flip_bytes, cut, insert, change_the_header, other_tensors),
    other_kind_of_file,
)


def _files(folder: Path) -> list[Path]:
    """The plan and the anchors."""
    return [folder / PLAN_FILE, next(folder.glob("dropconnect_anchors*"))]


def _good_anchors() -> dict[str, torch.Tensor]:
    return {name: torch.ones(4, 4) for name in ("fc.weight", "embed.weight")}


def _assign(form: Any, rng: random.Random, value: Any) -> None:
    container, key = rng.choice(list(nodes(form)))
    container[key] = value


def _rewrite(folder: Path, change: Callable[[Any], Any], text: tuple[str, str] = ("", "")) -> None:
    path = folder / PLAN_FILE
    form = json.loads(path.read_text())
    if not isinstance(form, dict) or not form:
        return
    change(form)
    path.write_text(json.dumps(form).replace(*text))
