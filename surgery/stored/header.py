"""The header of a safetensors file: read and checked, and written again.

    8 bytes    n, the length of the header
    n bytes    JSON: of every tensor its dtype, shape and place in the data; metadata; spaces at its end
    the rest   the data

The library reads a file only as a whole, and into tensors. What it refuses is refused here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from ..spec.errors import SurgeryError
from ..spec.forms import counted, each, fields, load_json, shown, size, text

MAX_HEADER = 100_000_000
"""The longest header that the format allows."""

MAX_DIMENSIONS = 64
"""Of one tensor: what torch allows."""

ALIGNMENT = 8
"""The data begin at a multiple of so many bytes."""

DTYPES: dict[str, tuple[int, str | None]] = {
    **{"F64": (64, "float64"), "F32": (32, "float32"), "F16": (16, "float16")},
    **{"BF16": (16, "bfloat16"), "C64": (64, "complex64"), "BOOL": (8, "bool")},
    **{"I64": (64, "int64"), "I32": (32, "int32"), "I16": (16, "int16"), "I8": (8, "int8")},
    **{"U64": (64, "uint64"), "U32": (32, "uint32"), "U16": (16, "uint16"), "U8": (8, "uint8")},
    **{"F8_E4M3": (8, "float8_e4m3fn"), "F8_E4M3FNUZ": (8, "float8_e4m3fnuz")},
    **{"F8_E5M2": (8, "float8_e5m2"), "F8_E5M2FNUZ": (8, "float8_e5m2fnuz")},
    **{"F8_E8M0": (8, "float8_e8m0fnu"), "F4": (4, "float4_e2m1fn_x2")},
    **{"F6_E2M3": (6, None), "F6_E3M2": (6, None)},
}
"""Every dtype of the format: the bits of one entry, and what torch calls it, if it has such."""

BITS = {name: bits for name, (bits, _) in DTYPES.items()}
"""Of one entry of each dtype."""

_METADATA = "__metadata__"


class TensorType(NamedTuple):
    """Dtype and shape of a tensor, as the format says them."""

    dtype: str
    """A key of `BITS`."""
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """How many it takes."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


class Entry(NamedTuple):
    """One tensor of a file."""

    dtype: str
    """A key of `BITS`."""
    shape: tuple[int, ...]
    start: int
    """Of its bytes, counted from the begin of the data."""
    end: int

    @property
    def bytes(self) -> int:
        """How many it takes."""
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """What a header says."""

    entries: Mapping[str, Entry]
    """By key, in the order of the data."""
    metadata: Mapping[str, str] | None
    """Text by text; None if there is none."""
    data_at: int
    """Where the data begin in the file."""

    @property
    def bytes(self) -> int:
        """Of the data."""
        return max((entry.end for entry in self.entries.values()), default=0)


def read_header(file: BinaryIO, name: str) -> Header:
    """The header of a file that is open to read.

    Args:
        name: of the file, for messages.

    Raises:
        SurgeryError: the file is damaged, or none of this format.
        OSError: it cannot be read.
    """
    file_size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if file_size < 8 or length > min(MAX_HEADER, file_size - 8):
        raise SurgeryError(
            f"{name} is no safetensors file, or damaged: it has {file_size:,} bytes and says that its "
            f"header has {length:,}"
        )
    content = file.read(length)
    if not content.startswith(b"{"):
        raise SurgeryError(
            f"{name} is no safetensors file, or damaged: its header is no JSON object"
        )
    form = load_json(content, f"the header of {name}")
    metadata = form.pop(_METADATA, None)
    if metadata is not None:
        metadata = _texts(metadata, f"{name}: {_METADATA}")
    entries = {
        text(key, f"{name}: a key"): _entry(value, f"{name}: {shown(key)}")
        for key, value in form.items()
    }
    in_order = sorted(entries.items(), key=lambda item: (item[1].start, item[1].end))
    header = Header(dict(in_order), metadata, 8 + length)
    _check_places(header, file_size, name)
    return header


def _entry(form: Any, where: str) -> Entry:
    read = fields(form, where, {"dtype": text, "shape": each(size), "data_offsets": each(size)})
    dtype, shape, offsets = read["dtype"], read["shape"], read["data_offsets"]
    if dtype not in BITS:
        raise SurgeryError(f"{where} has dtype {shown(dtype)}, which this release does not know")
    if len(shape) > MAX_DIMENSIONS:
        raise SurgeryError(
            f"{where} has {counted(len(shape), 'dimension')}; no more than {MAX_DIMENSIONS} are read"
        )
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise SurgeryError(f"{where} has data_offsets {shown(offsets)}, which are no begin and end")
    entry = Entry(dtype, shape, *offsets)
    if math.prod(shape) * BITS[dtype] != 8 * entry.bytes:
        raise SurgeryError(
            f"{where} has {entry.bytes:,} bytes, and its shape and dtype need another number"
        )
    return entry


def _texts(form: Any, where: str) -> dict[str, str]:
    if not isinstance(form, dict):
        raise SurgeryError(f"{where} must be an object; got {shown(form)}")
    for key, value in form.items():
        if not isinstance(value, str):
            raise SurgeryError(f"{where}.{key[:60]} must be a text; got {shown(value)}")
        try:
            f"{key}{value}".encode()
        except UnicodeEncodeError:
            raise SurgeryError(f"{where} holds what is not Unicode") from None
    return form


def _check_places(header: Header, file_size: int, name: str) -> None:
    """Raise `SurgeryError` unless the tensors lie one after the other and fill the data."""
    end = 0
    for key, entry in header.entries.items():
        if entry.start != end:
            kind = (
                "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            )
            raise SurgeryError(f"{name} is damaged: {shown(key)} {kind}")
        end = entry.end
    if header.data_at + end != file_size:
        raise SurgeryError(
            f"{name} is damaged: its tensors have {end:,} bytes, and "
            f"{file_size - header.data_at:,} are there"
        )


def placed(types: Mapping[str, TensorType]) -> dict[str, Entry]:
    """Entries for tensors that lie one after the other, those of wide dtypes first: so each begins at
    a multiple of its width, and a reader can map it.

    Args:
        types: by key; those of one width stay in their order.
    """
    entries: dict[str, Entry] = {}
    end = 0
    for key in sorted(types, key=lambda key: -BITS[types[key].dtype]):
        start, end = end, end + types[key].bytes
        entries[key] = Entry(*types[key], start, end)
    return entries


def encoded(
    entries: Mapping[str, Entry], metadata: Mapping[str, str] | None, data_at: int | None = None
) -> bytes:
    """The first bytes of a file: the length of the header, and the header.

    Args:
        entries, metadata: see `Header`.
        data_at: where the data shall begin, if that is possible; None is as early as they can.

    Raises:
        SurgeryError: a tensor has the name that the format keeps for metadata.
    """
    if _METADATA in entries:
        raise SurgeryError(f"a tensor is called {_METADATA!r}, which safetensors keeps for itself")
    form: dict[str, Any] = {} if metadata is None else {_METADATA: dict(metadata)}
    for key, entry in entries.items():
        places = [entry.start, entry.end]
        form[key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": places}
    content = json.dumps(form, separators=(",", ":"), ensure_ascii=False).encode()
    room = -(8 + len(content)) % ALIGNMENT
    if data_at is not None and data_at >= 8 + len(content):
        room = data_at - 8 - len(content)
    content += b" " * room
    return len(content).to_bytes(8, "little") + content
