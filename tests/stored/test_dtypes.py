"""Every dtype of the format passes, as safetensors itself writes and reads it."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as theirs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from surgery import SurgeryError, convert_checkpoint, inspect_checkpoint, strip_checkpoint
from surgery.stored.header import BITS, DTYPES, read_header
from surgery.stored.tensors import DTYPES as IN_TORCH
from surgery.stored.tensors import read_tensor, type_of, write_tensors


def file_of(path: Path, dtype: str, shape: list[int], size: int) -> Path:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    text = json.dumps({"a_raw": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(range(size)))
    return path


def opens(path: Path) -> bool:
    """Whether safetensors takes a file."""
    try:
        with safe_open(path, "pt"):
            return True
    except SafetensorError:
        return False


def is_known(dtype: str, folder: Path) -> bool:
    """Whether the installed safetensors has a dtype."""
    return opens(file_of(folder / "probe.safetensors", dtype, [8], BITS[dtype]))


def test_the_table_has_all_that_safetensors_knows(tmp_path: Path) -> None:
    assert theirs._TYPES.items() <= IN_TORCH.items()
    assert all(dtype in IN_TORCH.values() for dtype in theirs._SIZE if dtype is not None)
    with pytest.raises(SafetensorError) as caught:
        safe_open(file_of(tmp_path / "unknown.safetensors", "F1", [8], 1), "pt").__enter__()
    listed = re.search(r"expected one of (.*) at line", str(caught.value))
    if listed:  # older ones do not say
        known = set(re.findall(r"`(\w+)`", listed[1]))
        assert len(known) > 12
        assert known <= DTYPES.keys()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_has_as_many_bytes_as_safetensors_wants(dtype: str, tmp_path: Path) -> None:
    """And is looked at and stripped, if torch has such tensors or not."""
    path = tmp_path / "a.safetensors"
    file_of(path, dtype, [4, 2], BITS[dtype] + 1)
    assert not opens(path)
    with pytest.raises(SurgeryError, match="need another number"):
        inspect_checkpoint(path)
    file_of(path, dtype, [4, 2], BITS[dtype])
    if is_known(dtype, tmp_path):
        with safe_open(path, "pt") as file:
            assert file.get_slice("a_raw").get_dtype() == dtype
    assert inspect_checkpoint(path).tensors[0].dtype == dtype
    strip_checkpoint(path)
    assert path.read_bytes()[-BITS[dtype] :] == bytes(range(BITS[dtype]))


@pytest.mark.parametrize("dtype", IN_TORCH)
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), ()], ids=str)
def test_tensors_pass_as_by_safetensors(dtype: str, shape: Any, tmp_path: Path) -> None:
    kind = IN_TORCH[dtype]
    if dtype == "F4" and not shape:
        pytest.skip("pairs lie along a dimension")
    size = torch.Size(shape).numel() * kind.itemsize
    values = torch.arange(1, size + 1, dtype=torch.uint8) % 2  # of any dtype, also bool
    tensor = values.view(kind).view(shape) if size else torch.empty(shape, dtype=kind)
    ours, by_them = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_tensors(ours, {"a": type_of("a", tensor)}, {"a": tensor}.__getitem__)
    with open(ours, "rb") as file:
        again = read_tensor(file, read_header(file, "it"), "a")
    assert (again.dtype, again.shape) == (kind, shape)
    assert not size or torch.equal(again.reshape(-1).view(torch.uint8), values)
    if kind in theirs._SIZE and is_known(dtype, tmp_path):
        save_file({"a": tensor}, by_them)
        assert ours.read_bytes() == by_them.read_bytes()
        found = load_file(ours)["a"]
        assert (found.dtype, found.shape) == (kind, shape)
        torch.save({"a_raw": tensor}, tmp_path / "in.pt")
        convert_checkpoint(tmp_path / "in.pt", tmp_path / "out.safetensors", "surgery")
        assert (tmp_path / "out.safetensors").read_bytes()[-size or 9999 :] == (
            by_them.read_bytes()[-size or 9999 :]
        )


def test_halves_of_bytes_that_no_tensor_holds(tmp_path: Path) -> None:
    if "F4" not in IN_TORCH:
        pytest.skip("this torch has no dtype of four bits")
    path = file_of(tmp_path / "a.safetensors", "F4", [2, 3], 3)
    assert inspect_checkpoint(path).tensors[0].shape == (2, 3)
    with pytest.raises(SurgeryError, match="an odd number of F4 in its last dimension"):
        convert_checkpoint(path, tmp_path / "out.safetensors", "surgery")
    assert not (tmp_path / "out.safetensors").exists()
