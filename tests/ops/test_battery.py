"""The tests of `make statistics` in small, and that they reject what is not random."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from surgery.ops.hash import hash_bits, key_from_seed

from .battery import (
    _results,
    avalanche,
    birthdays,
    gaps,
    of_battery,
    one_bit_of,
    other_seeds,
    own,
    patterns,
    runs,
)
from .statistics import faults
from .streams import STREAMS, packed


def test_masks_pass() -> None:
    assert own(1 << 17, 2) == []


@pytest.mark.parametrize("test", [runs, gaps, patterns])
def test_a_mask_that_repeats_its_neighbour_does_not(test: Callable[[Tensor, float], float]) -> None:
    """One entry in four is that before it."""
    kept = torch.rand(1 << 18) < 0.5
    where = torch.arange(1, len(kept), 4)
    kept[where] = kept[where - 1]
    assert abs(test(kept, 0.5)) > 8


def test_words_of_too_few_bits_have_too_many_birthdays() -> None:
    kept = (torch.rand(1 << 13, 18) < 0.5) & (torch.arange(18) >= 3)
    assert abs(birthdays(kept.flatten(), 0.5)) > 8


def test_keys_that_differ_in_one_bit_do_not() -> None:
    """Of the second word, behind which are two rounds only; so keys are random, or hashes."""
    key, size = key_from_seed(77), 1 << 18
    assert faults(avalanche(hash_bits, 0.5, size, key, other_seeds(77))) == []
    assert faults(avalanche(hash_bits, 0.5, size, key, one_bit_of(key))) != []


@pytest.mark.parametrize("name", STREAMS)
def test_streams_are_masks_packed(name: str) -> None:
    torch.manual_seed(3)
    (mask,) = itertools.islice(STREAMS[name](), 1)
    (octets,) = itertools.islice(packed(iter([mask])), 1)
    bits = [octet >> bit & 1 for octet in octets[:64] for bit in range(8)]
    assert bits == mask.flatten()[:512].int().tolist()
    assert len(octets) * 8 == mask.numel()
    assert abs(float(mask.float().mean()) - 0.5) < 4 * 0.5 / mask.numel() ** 0.5


def test_lines_of_dieharder() -> None:
    lines = ["#====#", "        test_name   |ntup| tsamples |psamples|  p-value |Assessment"]
    lines.append("   diehard_birthdays|   0|       100|      20|0.12345678|  PASSED  ")
    assert [*_results(lines)] == [("diehard_birthdays", 0.12345678)]


def test_lines_of_testu01(tmp_path: Path) -> None:
    """Of a program that stops reading when it has enough, and tells other things too."""
    program = tmp_path / "testu01"
    program.write_text(
        "#!/bin/sh\nhead -c 4096 > /dev/null\necho '= Summary ='\necho \"$1 W|0.25\"\n"
    )
    program.chmod(0o755)
    assert of_battery(str(program), "Crush", STREAMS["calls"]()) == [("Crush W", 0.25)]
