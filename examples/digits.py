"""Handwritten digits: those of scikit-learn, or MNIST's from files in IDX form."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

UNSIGNED_BYTE = 0x08
"""The type code of IDX files that hold bytes."""


@dataclass(frozen=True)
class Digits:
    """Images and what they show."""

    images: Tensor
    """float32, (examples, pixels), from 0 (paper) to 1 (ink)."""
    labels: Tensor
    """int64, (examples,), 0 to 9."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Digits:
        return Digits(self.images[indices], self.labels[indices])


def load_digits() -> Digits:
    """The 1797 digits of 8 x 8 pixels that scikit-learn brings along."""
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    return Digits(torch.from_numpy(images).float() / 16, torch.from_numpy(labels).long())


def random_split(data: Digits, *sizes: int, seed: int) -> list[Digits]:
    """Parts of the given sizes, drawn at random; what is left over is in none.

    Raises:
        ValueError: there are not enough examples.
    """
    if sum(sizes) > len(data):
        raise ValueError(f"{len(data)} examples cannot be split into parts of {sizes}")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return [data.take(part) for part in order[: sum(sizes)].split(list(sizes))]


def load_mnist(folder: Path) -> tuple[Digits, Digits]:
    """Train and test digits from the four files of MNIST in `folder`, gzipped or not.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is not what its name says; the message names it and what is wrong.
    """
    train, test = (_load_pair(folder, part) for part in ("train", "t10k"))
    if train.images.shape[1] != test.images.shape[1]:
        raise ValueError(
            f"{folder}: train images have {train.images.shape[1]} pixels, those of t10k "
            f"{test.images.shape[1]}"
        )
    return train, test


def _load_pair(folder: Path, part: str) -> Digits:
    images_file = _find(folder, f"{part}-images-idx3-ubyte")
    labels_file = _find(folder, f"{part}-labels-idx1-ubyte")
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if len(images) != len(labels):
        raise ValueError(
            f"{images_file} has {len(images)} images, {labels_file} {len(labels)} labels"
        )
    if labels.max() > 9:
        raise ValueError(f"{labels_file}: labels are digits from 0 to 9; found {labels.max()}")
    return Digits(
        torch.from_numpy(images.reshape(len(images), -1).astype(np.float32) / 255),
        torch.from_numpy(labels.astype(np.int64)),
    )


def _find(folder: Path, name: str) -> Path:
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise FileNotFoundError(f"{folder} holds neither {name} nor {name}.gz")


def read_idx(file: Path, dims: int) -> np.ndarray:
    """The bytes in an IDX file: uint8, with that number of dimensions.

    The form: two zero bytes, the type, the number of dimensions, the sizes (big-endian, 32 bits), the
    data.

    Raises:
        ValueError: the file has another form, another number of dimensions, no entry, or more or fewer
            bytes than its sizes say.
    """
    content = _content(file)
    magic = bytes([0, 0, UNSIGNED_BYTE, dims])
    if content[:4] != magic:
        raise ValueError(
            f"{file} is no IDX file of bytes in {dims} dimensions: it starts with "
            f"{content[:4].hex(' ') or 'nothing'}, not {magic.hex(' ')}"
        )
    header = 4 + 4 * dims
    if len(content) < header:
        raise ValueError(f"{file} ends within its header, after {len(content)} of {header} bytes")
    sizes = tuple(int(size) for size in np.frombuffer(content, ">u4", dims, 4))
    expected = header + math.prod(sizes)
    if len(content) != expected or expected == header:
        raise ValueError(
            f"{file} should hold {' x '.join(map(str, sizes))} entries, {expected} bytes with the "
            f"header; it has {len(content)}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(sizes)


def _content(file: Path) -> bytes:
    if file.suffix != ".gz":
        return file.read_bytes()
    try:
        return gzip.decompress(file.read_bytes())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file} cannot be unpacked: {error}") from error
