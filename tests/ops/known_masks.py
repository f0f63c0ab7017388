"""The masks once more, on Python's integers: what every implementation must give.

    python tests/ops/known_masks.py > tests/ops/known_masks.txt

writes the answers. Nothing of `surgery` is used here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

FILE = Path(__file__).with_suffix(".txt")
RUN = 8
"""Consecutive indices on a line."""
RATES = ("0.1", "0.5", "0.9")

_WORD, _LONG = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
_GOLDEN = 0x9E3779B9

Key = tuple[int, int]


def before_last(index: int, key: Key, low: int = _WORD) -> int:
    """The hash of an index before the last product. `low` is a mask of what shifts bring down."""
    z = (index * _GOLDEN + key[0]) & _WORD
    z ^= (z >> 17) & low
    z = (z * 0xED5AD4BB + key[1]) & _WORD
    z ^= (z >> 11) & low
    z = (z * 0xAC4C1B51) & _WORD
    return z ^ ((z >> 15) & low)


def bits_of_batch(index: int, key: Key) -> int:
    return (before_last(index, key) * 0x31848BAB) & _WORD


def multiplier(example: int, key: Key) -> int:
    """Of round 3, for an example of a batch."""

    def even(number: int) -> int:
        low = _WORD - 1
        z = before_last(2 * number, (key[1] & low, key[0] & low), low) * 0x31848BAB & _WORD
        return z ^ ((z >> 16) & low)

    return even(example) ^ even(0) ^ 0x31848BAB


def bits_of_example(index: int, key: Key, example: int) -> int:
    own = multiplier(example, key)
    second = bits_of_batch(index, key)
    second ^= second >> 16
    return ((before_last(index, key) ^ (second & (own ^ 0x31848BAB))) * own) & _WORD


def scrambled(seed: int) -> int:
    """The first output of splitmix64."""
    z = (seed + 0x9E3779B97F4A7C15) & _LONG
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _LONG
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _LONG
    return z ^ (z >> 31)


def derived(key: Key, number: int) -> Key:
    """The key of a rank (number > 0), or of a part of 2**32 indices (number < 0)."""
    if number == 0:
        return key
    factor, summand = scrambled(2 * number) | 1, scrambled(2 * number + 1)
    words = (word - (1 << 32) if word >> 31 else word for word in key)
    a, b = (folded(word * factor + summand) for word in words)
    first, second = (folded(x * 0xD1342543DE82EF95 + y) for x, y in ((a, b), (b, a)))
    return first & _WORD, second & _WORD


def folded(z: int) -> int:
    """z ^ z >> 32 on signed 64-bit numbers."""
    z &= _LONG
    z = z - (1 << 64) if z >> 63 else z
    return z ^ (z >> 32)


def is_kept(bits: int, p: float) -> bool:
    """Whether the bits, as a signed number, reach the threshold of p."""
    signed = bits - (1 << 32) if bits >> 31 else bits
    return signed >= round(p * 2**32) - 2**31


@dataclasses.dataclass(frozen=True)
class Line:
    """The bits and masks of `RUN` indices from `start` on."""

    key: Key
    """As drawn."""
    rank: int
    example: int
    start: int
    bits: tuple[int, ...]
    kept: tuple[str, ...]
    """For each of `RATES`, "1" where kept and "0" where dropped."""

    @classmethod
    def of(cls, key: Key, rank: int, example: int, start: int) -> Line:
        own = derived(derived(key, rank), -(start >> 32))
        bits = tuple(bits_of_example(start + i, own, example) for i in range(RUN))
        kept = ("".join("01"[is_kept(word, float(p))] for word in bits) for p in RATES)
        return cls(key, rank, example, start, bits, tuple(kept))

    @classmethod
    def read(cls, text: str) -> Line:
        k0, k1, rank, example, start, *rest = text.split()
        bits = tuple(int(word, 16) for word in rest[:RUN])
        key = int(k0, 16), int(k1, 16)
        return cls(key, int(rank), int(example), int(start), bits, tuple(rest[RUN:]))

    def __str__(self) -> str:
        words = " ".join(f"{word:08x}" for word in self.bits)
        place = f"{self.key[0]:08x} {self.key[1]:08x} {self.rank} {self.example} {self.start}"
        return f"{place} {words} {' '.join(self.kept)}"


KEYS = (
    (0, 0),
    (1, 0),
    (0, 1),
    (_WORD, _WORD),
    (0x243F6A88, 0x85A308D3),
    (0x13198A2E, 0x03707344),
    (0x80000000, 0x7FFFFFFF),
)
PLACES = (
    *((0, 0, start) for start in (0, 1000, 4027264, (1 << 30) - 4, (1 << 31) - 4, (1 << 32) - 8)),
    *((0, 0, (part << 32) + start) for part, start in ((1, 0), (3, 7), (1 << 20, 5))),
    *((rank, 0, 0) for rank in (1, 7, 255, 100000)),
    *((0, example, 919235) for example in (1, 2, 163, 1023, 28945)),
    *((7, 56, 12), (2, 0, (5 << 32) + 9)),
)
"""(rank, example, start)."""

HEADER = f"""\
# Known answers of the masks of dropconnect-surgery, made by known_masks.py. A line:
#   k0 k1       the key as drawn, hexadecimal
#   rank        of the process; the key of the hash is derived from it
#   example     of the batch; 0 is also the mask of a whole batch
#   start       index of the first of {RUN} consecutive entries
#   {RUN} words     their bits, hexadecimal
#   {len(RATES)} masks     1 where the entry is kept, 0 where dropped, at p = {", ".join(RATES)}
"""


def computed() -> Iterator[Line]:
    for key in KEYS:
        for place in PLACES:
            yield Line.of(key, *place)


def stored() -> list[Line]:
    lines = FILE.read_text().splitlines()
    return [Line.read(line) for line in lines if line and not line.startswith("#")]


if __name__ == "__main__":
    print(HEADER, end="")
    for line in computed():
        print(line)
