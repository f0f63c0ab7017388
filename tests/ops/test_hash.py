"""The bits are as good as independent fair coins, for every key, and the tests could tell if not."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from surgery.ops.hash import (
    ROUND3,
    advance_key,
    draw_key,
    hash_bits,
    key_from_seed,
    key_tensor,
    mix,
    multipliers,
    spread,
    words,
)

from ..internals import STEP, derived_key, derived_words, forget_generators, signed
from .statistics import INDEX, LAGS, SIZE, Hash, centred, correlation, faults, lag_scores
from .weak_hashes import index_xor, two_xors

PROBABILITIES = (0.5, 0.1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads gain nothing on these sizes, and cost much where tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeds_keys(count: int) -> list[Tensor]:
    return [key_from_seed(seed) for seed in range(count)]


@pytest.mark.parametrize("p", PROBABILITIES)
def test_lags_are_independent(p: float) -> None:
    assert faults(lag_scores(hash_bits, p, seeds_keys(25))) == []


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("weak", [index_xor, two_xors])
def test_lag_test_rejects_weak_hashes(weak, p: float) -> None:
    assert faults(lag_scores(weak, p, seeds_keys(25))) != []


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.5, 0.1, 0.3, 0.9, 0.01])
def test_lags_are_independent_over_many_keys(p: float) -> None:
    assert faults(lag_scores(hash_bits, p, seeds_keys(400))) == []


@pytest.mark.slow
@pytest.mark.parametrize("p", PROBABILITIES)
def test_every_short_lag_is_independent(p: float) -> None:
    assert faults(lag_scores(hash_bits, p, seeds_keys(4), range(1, 2049))) == []


def rate_scores(p: float, keys: list[Tensor]) -> Tensor:
    return torch.stack([centred(hash_bits, key, p).double().sum() / SIZE**0.5 for key in keys])


@pytest.mark.parametrize("p", PROBABILITIES)
def test_keep_rate(p: float) -> None:
    assert faults(rate_scores(p, seeds_keys(50))) == []


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.5, 0.1, 0.9, 0.01, 1e-4])
def test_keep_rate_of_many_keys(p: float) -> None:
    assert faults(rate_scores(p, seeds_keys(1000))) == []


@pytest.mark.parametrize("width", [64, 768, 1000, 1024])
@pytest.mark.parametrize("dim", [0, 1], ids=["columns", "rows"])
def test_rows_and_columns_have_the_keep_rate(dim: int, width: int) -> None:
    """The sums over rows (and columns) of a matrix are as spread as sums of independent entries."""
    rows = SIZE // width
    scores = []
    for key in seeds_keys(4):
        matrix = centred(hash_bits, key, 0.3, INDEX[: rows * width]).view(rows, width)
        scores.append(matrix.sum(dim) / matrix.shape[dim] ** 0.5)
    assert faults(torch.cat(scores)) == []


@pytest.mark.parametrize("bit", [31, 30, 24, 20, 17, 16])
def test_every_upper_bit_is_fair(bit: int) -> None:
    """Not only the sign: a threshold compares them all."""
    scores = [
        (((hash_bits(INDEX, key) >> bit) & 1).sum() - SIZE / 2) * 2 / SIZE**0.5
        for key in seeds_keys(20)
    ]
    assert faults(torch.stack(scores)) == []


def test_bits_of_one_key_are_all_different() -> None:
    """For one key the hash is a bijection of the indices: no weight shares another's bits."""
    bits = hash_bits(INDEX, key_from_seed(7))
    assert bits.unique().numel() == SIZE


def neighbours(base: int) -> list[int]:
    """A seed, its neighbours, and itself with each of its 64 bits flipped."""
    return [base, base + 1, base - 1, base + 2, *(base ^ (1 << bit) for bit in range(64))]


def cross_scores(keys: list[Tensor], p: float) -> Tensor:
    masks = [centred(hash_bits, key, p) for key in keys]
    return torch.tensor([correlation(a, b) for a, b in itertools.combinations(masks, 2)])


@pytest.mark.parametrize("base", [1, 2**40 + 12345], ids=["small", "large"])
@pytest.mark.parametrize("p", PROBABILITIES)
def test_neighbouring_and_bit_flipped_seeds_are_independent(p: float, base: int) -> None:
    keys = [key_from_seed(seed) for seed in neighbours(base)]
    first = centred(hash_bits, keys[0], p)
    scores = [correlation(first, centred(hash_bits, key, p)) for key in keys[1:]]
    assert faults(torch.tensor(scores)) == []


@pytest.mark.parametrize("p", PROBABILITIES)
def test_consecutive_calls_and_sites_are_independent(p: float) -> None:
    keys: list[Any] = [draw_key(torch.device("cpu")) for _ in range(20)]
    assert faults(cross_scores(keys, p)) == []


def example_masks(key: Tensor, p: float, examples: Iterable[int]) -> list[Tensor]:
    """The centred masks of some of the first thousand examples."""
    last = multipliers(1000, key)

    def hash_of(example: int) -> Hash:
        return lambda index, key: mix(spread(index), key, last[example])

    return [centred(hash_of(example), key, p) for example in examples]


def pair_scores(masks: list[Tensor]) -> Tensor:
    return torch.tensor([correlation(a, b) for a, b in itertools.combinations(masks, 2)])


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize(
    "examples", [range(24), range(976, 1000), [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]], ids=str
)
def test_examples_are_independent(examples, p: float) -> None:
    assert faults(pair_scores(example_masks(seeds_keys(1)[0], p, examples))) == []


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.5, 0.1, 0.9, 0.01])
def test_all_examples_of_a_batch_are_independent(p: float) -> None:
    """8,128 pairs at a time."""
    for key in seeds_keys(3):
        scores = torch.stack(example_masks(key, p, range(128)))
        products = scores @ scores.t() / SIZE**0.5
        upper = torch.triu_indices(128, 128, 1)
        assert faults(products[upper[0], upper[1]]) == []


@pytest.mark.parametrize("p", PROBABILITIES)
def test_examples_are_independent_three_at_a_time(p: float) -> None:
    masks = example_masks(seeds_keys(2)[1], p, range(12))
    scores = [correlation(a * b, c) for a, b, c in itertools.combinations(masks, 3)]
    assert faults(torch.tensor(scores)) == []


@pytest.mark.parametrize("p", PROBABILITIES)
def test_lags_between_examples_are_independent(p: float) -> None:
    """Also of each example with itself: its mask is as random as that of a batch."""
    masks = example_masks(seeds_keys(3)[2], p, [0, 1, 2, 3, 500, 999])
    scores = [correlation(a[:-lag], b[lag:]) for a in masks for b in masks for lag in LAGS[::2]]
    assert faults(torch.tensor(scores)) == []


def test_pair_test_rejects_multipliers_that_are_multiples_of_each_other() -> None:
    """Were example e to multiply by e + 1, the masks of neighbours would go together."""
    key = seeds_keys(1)[0]

    def weak(example: int) -> Hash:
        return lambda index, key: mix(spread(index), key) * (2 * example + 1)

    masks = [centred(weak(example), key, 0.5) for example in range(24)]
    assert faults(pair_scores(masks)) != []


@pytest.mark.parametrize("seed", range(4))
def test_multipliers_are_odd_and_all_different(seed: int) -> None:
    """An even one would lose bits; equal ones would give two examples one mask."""
    found = multipliers(1 << 20, key_from_seed(seed))
    assert found.dtype == torch.int32
    assert bool((found & 1).all())
    assert found.unique().numel() == 1 << 20
    assert int(found[0]) == ROUND3


def test_ranks_are_independent() -> None:
    keys: list[Any] = []
    for rank in range(20):
        torch.manual_seed(5)
        keys.append(draw_key(torch.device("cpu"), rank))
    assert faults(cross_scores(keys, 0.5)) == []


def test_rank_zero_draws_as_one_process_does() -> None:
    key: Any = draw_key(torch.device("cpu"), rank=0)
    torch.manual_seed(1234)
    again: Any = draw_key(torch.device("cpu"))
    assert torch.equal(again, key)


def key_pairs(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(key_from_seed(2 * n), key_from_seed(2 * n + 1)) for n in range(count)]


def shifted(a: Tensor, b: Tensor) -> Tensor:
    """The indices at which `b` enters the first round as `a` does at 0, 1, 2, ..."""
    inverse = pow(STEP, -1, 1 << 32)
    return INDEX + signed((int(a[0]) - int(b[0])) * inverse)


def xored(a: Tensor, b: Tensor) -> Tensor:
    return INDEX ^ (a[0] ^ b[0])


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("aligned", [shifted, xored])
def test_masks_are_not_permutations_of_each_other(aligned, p: float) -> None:
    scores = [
        correlation(centred(hash_bits, a, p), centred(hash_bits, b, p, index=aligned(a, b)))
        for a, b in key_pairs(15)
    ]
    assert faults(torch.tensor(scores)) == []


def test_permutation_test_rejects_a_key_that_is_only_xored_in() -> None:
    a, b = key_pairs(1)[0]
    assert torch.equal(index_xor(INDEX, a), index_xor(xored(a, b), b))


def test_permutation_test_rejects_one_key_word() -> None:
    """With the second word left out, a shift of the index would map one mask onto the other."""
    a, b = (key * torch.tensor([1, 0], dtype=torch.int32) for key in key_pairs(1)[0])
    assert torch.equal(hash_bits(INDEX, a), hash_bits(shifted(a, b), b))


@pytest.mark.parametrize("start", [0, 1, 1000, 2**31 - 5, 2**31, 2**32 - 3000])
def test_advanced_key_continues_the_bits(start: int) -> None:
    key = key_from_seed(3)
    index = torch.tensor([signed(start + i) for i in range(1000)], dtype=torch.int32)
    moved = advance_key(key, start)
    assert torch.equal(
        hash_bits(torch.arange(1000, dtype=torch.int32), moved), hash_bits(index, key)
    )


@pytest.mark.parametrize("part", [(2**32, 5000), (3 * 2**32 + 7, 2**32 - 8), (9, 2**31)])
def test_advanced_keys_compose(part: tuple[int, int]) -> None:
    """Advancing twice is advancing by the sum, where the second step stays inside a part."""
    first, second = part
    key = key_from_seed(3)
    twice = advance_key(advance_key(key, first), second)
    assert torch.equal(twice, advance_key(key, first + second))


@pytest.mark.parametrize("p", PROBABILITIES)
def test_parts_of_a_huge_weight_do_not_repeat_each_other(p: float) -> None:
    """Bits 2**32 indices apart are independent, though the index is 32 bits wide."""
    scores = []
    for key in seeds_keys(8):
        first = centred(hash_bits, key, p)
        for high in (1, 2, 3, 4, 8, 16):
            scores.append(correlation(first, centred(hash_bits, advance_key(key, high << 32), p)))
    assert faults(torch.tensor(scores)) == []


def test_key_is_one_step_of_splitmix64() -> None:
    """The first output of the reference splitmix64 seeded with 0 is 0xE220A8397B1DCDAF."""
    low, high = (int(word) & 0xFFFFFFFF for word in key_from_seed(0))
    assert (high << 32 | low) == 0xE220A8397B1DCDAF


def test_draw_key_is_reproduced_by_the_seed() -> None:
    torch.manual_seed(9)
    keys: list[Any] = [draw_key(torch.device("cpu")) for _ in range(3)]
    torch.manual_seed(9)
    again: list[Any] = [draw_key(torch.device("cpu")) for _ in keys]
    assert all(map(torch.equal, again, keys))
    assert len({tuple(key.tolist()) for key in keys}) == 3
    assert keys[0].dtype == torch.int32
    assert keys[0].shape == (2,)


@given(word=st.integers(0, 2**64 - 1), number=st.integers(-(2**33), 2**33))
def test_keys_derived_on_the_host_are_those_of_the_device(word: int, number: int) -> None:
    key = key_from_seed(word)
    assert derived_words(*words(key), number) == tuple(derived_key(key, number).tolist())


class PhiloxGenerator:
    """What the generator of a GPU tells the host."""

    def __init__(self, seed: int, offset: int) -> None:
        self.seed, self.offset = seed, offset

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        assert offset % 4 == 0
        self.offset = offset


def test_keys_of_a_gpu_are_made_of_its_seed_and_offset(monkeypatch) -> None:
    generators = [PhiloxGenerator(7, 0), PhiloxGenerator(8, 0)]
    module = SimpleNamespace(default_generators=generators, current_device=lambda: 1)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    forget_generators(monkeypatch)
    first, other, current = (torch.device(name) for name in ("cuda:0", "cuda:1", "cuda"))

    def drawn(device: torch.device, rank: int = 0) -> tuple[int, ...]:
        key = draw_key(device, rank)
        assert isinstance(key, tuple)  # on the host
        assert torch.equal(key_tensor(key), torch.tensor(key, dtype=torch.int32))
        return key

    keys = [drawn(first) for _ in range(50)]
    assert len(set(keys)) == 50
    assert generators[0].offset == 200  # moves on, so that torch's own draws are others too
    generators[0].offset = 100
    assert drawn(first) == keys[25]  # as activation checkpointing restores it
    generators[0].offset = 100
    assert drawn(first, rank=3) != keys[25]
    assert drawn(other) not in keys
    before = generators[1].offset
    drawn(current)
    assert generators[1].offset == before + 4
