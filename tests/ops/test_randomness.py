"""What `docs/masks.md` promises of masks, and that the same statistics reject weaker hashes.

`pytest tests/ops/test_randomness.py -s` prints the table of that page.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery.ops.hash import (
    advance_key,
    draw_key,
    hash_bits,
    key_from_seed,
    mix,
    multipliers,
    spread,
)

from ..internals import derived_key, signed
from .statistics import (
    Hash,
    block_score,
    centred,
    correlation,
    every_lag,
    products,
    verdict,
    window,
)
from .weak_hashes import added_rank, fixed_multipliers, only_multiplied, two_rounds

KEYS = [key_from_seed(seed) for seed in range(64)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads gain nothing on these sizes, and cost much where tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def hash_of_example(multiplier: int) -> Hash:
    factor = torch.tensor(signed(multiplier), dtype=torch.int32)
    return lambda index, key: mix(spread(index), key, factor)


def own_lags(hash_of: Hash, p: float, size: int, keys: list[Tensor]) -> Tensor:
    masks = (centred(hash_of, key, p, window(0, size)) for key in keys)
    return every_lag((mask, mask) for mask in masks)[1:]


class TestLags:
    """A mask beside itself, shifted: rows and columns of a matrix of any width are such shifts."""

    def test_every_lag(self) -> None:
        scores = own_lags(hash_bits, 0.5, 1 << 21, KEYS[:16])
        assert verdict("lags below 2^21, p = 0.5, 16 keys", scores) == []

    def test_every_lag_rejects_two_rounds(self) -> None:
        scores = own_lags(two_rounds, 0.5, 1 << 21, KEYS[:16])
        assert verdict("two rounds: lags below 2^21, p = 0.5, 16 keys", scores) != []

    @pytest.mark.slow
    @pytest.mark.parametrize("p", [0.5, 0.1, 0.3, 0.9])
    @pytest.mark.parametrize("log2", [18, 20, 22, 23, 24])
    def test_every_lag_of_many_keys(self, log2: int, p: float) -> None:
        keys = KEYS[: min(64, 1 << (26 - log2))]
        scores = own_lags(hash_bits, p, 1 << log2, keys)
        what = f"lags below 2^{log2}, p = {p}, {len(keys)} keys"
        # The spread of the scores is that of independent ones only where both values are as likely.
        assert verdict(what, scores, only_largest=p != 0.5) == []

    @pytest.mark.slow
    @pytest.mark.parametrize("p", [0.5, 0.1])
    def test_every_lag_of_an_example(self, p: float) -> None:
        key = KEYS[5]
        for example, multiplier in enumerate(multipliers(8, key).tolist()):
            scores = own_lags(hash_of_example(multiplier), p, 1 << 22, [key])
            what = f"lags below 2^22, p = {p}, example {example} of a batch"
            assert verdict(what, scores, only_largest=p != 0.5) == []

    @pytest.mark.parametrize("lag", [4027264, 32218112, 8054528, 2013632])
    def test_lags_that_two_rounds_fail(self, lag: int) -> None:
        def scores(hash_of: Hash) -> list[float]:
            pairs = [
                [centred(hash_of, key, 0.5, window(at, 1 << 19)) for at in (0, lag)]
                for key in KEYS[:8]
            ]
            return [sum(correlation(*pair) for pair in pairs) / math.sqrt(len(pairs))]

        assert verdict(f"lag {lag}", scores(hash_bits)) == []
        assert verdict(f"two rounds: lag {lag}", scores(two_rounds)) != []


class TestMatrix:
    @pytest.mark.parametrize(
        ("rows", "columns"),
        [
            (1024, 1024),
            pytest.param(4096, 4096, marks=pytest.mark.slow),
            pytest.param(21844, 768, marks=pytest.mark.slow),
        ],
    )
    @pytest.mark.parametrize("p", [0.5, 0.1, 0.9])
    def test_blocks_rows_and_columns(self, rows: int, columns: int, p: float) -> None:
        blocks, lines = [], []
        for key in KEYS[:4]:
            mask = centred(hash_bits, key, p, window(0, rows * columns)).view(rows, columns)
            blocks.append(block_score(mask > 0, p))
            lines += [mask.sum(dim) / mask.shape[dim] ** 0.5 for dim in (0, 1)]
        assert verdict(f"4x4 blocks of {rows}x{columns}, p = {p}", blocks) == []
        assert verdict(f"rows and columns of {rows}x{columns}, p = {p}", torch.cat(lines)) == []

    def test_blocks_reject_a_repeated_pattern(self) -> None:
        mask = centred(hash_bits, KEYS[0], 0.5, window(0, 1 << 20)).view(1024, 1024) > 0
        mask[3::4, 3::4] = mask[::4, ::4]
        assert abs(block_score(mask, 0.5)) > 8


Masks = Callable[[Tensor], Tensor]


def masks_of_examples(bits_of: Callable[[Tensor], Tensor], p: float) -> Masks:
    """Centred masks (examples, indices)."""
    threshold = round(p * 2**32) - 2**31
    return lambda index: ((bits_of(index) >= threshold).float() - (1 - p)) / math.sqrt(p * (1 - p))


def examples_of(key: Tensor, count: int) -> Callable[[Tensor], Tensor]:
    own = multipliers(count, key)[:, None]
    return lambda index: mix(spread(index), key, own)


def fixed_examples_of(key: Tensor, examples: list[int]) -> Callable[[Tensor], Tensor]:
    own = fixed_multipliers(max(examples) + 1)[examples][:, None]
    return lambda index: two_rounds(index, key, own)


class TestExamples:
    KNOWN = (56, 130, 7, 163)
    """Whose fixed multipliers were an odd combination that vanishes."""

    @staticmethod
    def quartets(masks: Masks, pairs: list[tuple[int, int]]) -> Masks:
        """Products of pairs, of which products of pairs are those of four."""
        first, second = torch.tensor(pairs).t()

        def of(index: Tensor) -> Tensor:
            found = masks(index)
            return found[first] * found[second]

        return of

    def test_pairs(self) -> None:
        for key in KEYS[:2]:
            masks = masks_of_examples(examples_of(key, 128), 0.5)
            assert verdict("pairs of 128 examples", products(masks, 1 << 17)) == []

    def test_pairs_reject_fixed_multipliers(self) -> None:
        masks = masks_of_examples(fixed_examples_of(KEYS[0], [*range(62), 2069, 28945]), 0.5)
        assert verdict("fixed multipliers: pairs", products(masks, 1 << 16)) != []

    def test_quartets(self) -> None:
        pairs = [(2 * i, 2 * i + 1) for i in range(96)] + [self.KNOWN[:2], self.KNOWN[2:]]
        pairs = [pair for pair in pairs if not {*pair} & {*self.KNOWN}] + pairs[-2:]
        for key in KEYS[:2]:
            masks = masks_of_examples(examples_of(key, 192), 0.5)
            assert (
                verdict("fours of 192 examples", products(self.quartets(masks, pairs), 1 << 17))
                == []
            )
        masks = masks_of_examples(fixed_examples_of(KEYS[0], list(range(192))), 0.5)
        scores = products(self.quartets(masks, pairs), 1 << 16)
        assert verdict("fixed multipliers: fours", scores) != []

    @pytest.mark.parametrize("factor", [3, -3, 5, -1, 7])
    def test_multipliers_that_are_multiples_of_each_other(self, factor: int) -> None:
        """Some keys have such a pair among a thousand examples."""
        index, scores = window(0, 1 << 19), []
        for key in KEYS[:4]:
            own = int(multipliers(6, key)[5])
            pair = [signed(own), signed(own * factor)]
            mine = [centred(hash_of_example(multiplier), key, 0.5, index) for multiplier in pair]
            scores.append(correlation(*mine))
            weak = [centred(only_multiplied(multiplier), key, 0.5, index) for multiplier in pair]
            assert abs(correlation(*weak)) > 50
        assert verdict(f"multipliers in the ratio 1 : {factor}", scores) == []

    @pytest.mark.slow
    @pytest.mark.parametrize("p", [0.5, 0.1, 0.9])
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_pairs_of_a_thousand(self, seed: int, p: float) -> None:
        masks = masks_of_examples(examples_of(KEYS[seed], 1024), p)
        scores = products(masks, 1 << 18)
        assert verdict(f"pairs of 1,024 examples, p = {p}, key {seed}", scores) == []

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_quartets_of_a_thousand(self, seed: int) -> None:
        order = torch.randperm(1024, generator=torch.Generator().manual_seed(seed)).tolist()
        pairs = list(zip(order[::2], order[1::2]))
        masks = masks_of_examples(examples_of(KEYS[seed], 1024), 0.5)
        scores = products(self.quartets(masks, pairs), 1 << 18)
        assert verdict(f"fours of 1,024 examples, p = 0.5, key {seed}", scores) == []

    @pytest.mark.slow
    def test_lags_between_examples(self) -> None:
        key = KEYS[3]
        own = multipliers(64, key).tolist()
        mask = [centred(hash_of_example(m), key, 0.5, window(0, 1 << 18)) for m in own]
        for other in range(1, 64):
            scores = every_lag([(mask[0], mask[other])])
            assert verdict(f"lags of example 0 against {other}", scores) == []


def between(keys: list[Tensor], p: float, size: int) -> Tensor:
    """z-scores of each pair of the masks of keys."""
    return products(
        lambda index: torch.stack([centred(hash_bits, key, p, index) for key in keys]), size
    )


def lags_between(first: Tensor, second: Tensor, size: int) -> Tensor:
    """z-scores of all lags, to both sides."""
    a, b = (centred(hash_bits, key, 0.5, window(0, size)) for key in (first, second))
    return torch.cat([every_lag([(a, b)]), every_lag([(b, a)])])


class TestKeys:
    """Masks of different keys: of ranks, of parts of a huge weight, seeds, calls and sites."""

    def test_rank_that_an_added_constant_fails(self) -> None:
        """Rank 7 at i against rank 0 at i + 919235."""

        def scores(hash_of: Hash, of_rank: Callable[[Tensor, int], Tensor]) -> list[float]:
            return [
                correlation(
                    centred(hash_of, of_rank(key, 7), 0.5, window(0, 1 << 20)),
                    centred(hash_of, key, 0.5, window(919235, 1 << 20)),
                )
                for key in KEYS[:4]
            ]

        assert verdict("rank 7 against rank 0 at 919235", scores(hash_bits, derived_key)) == []
        assert verdict("added ranks: the same", scores(two_rounds, added_rank)) != []

    def test_keys_of_ranks_and_parts_differ_by_no_constant(self) -> None:
        for number in (1, 7, 255, -1, -5):
            differences = {tuple((derived_key(key, number) - key).tolist()) for key in KEYS}
            assert len(differences) == len(KEYS)

    def test_ranks_and_parts(self) -> None:
        key = KEYS[9]
        keys = [key, *(derived_key(key, rank) for rank in (1, 2, 3, 7, 64, 255))]
        keys += [advance_key(own, part << 32) for own in keys[:3] for part in (1, 2, 5)]
        assert verdict("ranks and parts of a huge weight", between(keys, 0.5, 1 << 18)) == []

    @pytest.mark.slow
    @pytest.mark.parametrize("p", [0.5, 0.1])
    def test_ranks(self, p: float) -> None:
        for seed in range(2):
            keys = [KEYS[seed], *(derived_key(KEYS[seed], rank) for rank in range(1, 256))]
            assert verdict(f"pairs of 256 ranks, p = {p}", between(keys, p, 1 << 18)) == []

    @pytest.mark.slow
    def test_lags_of_ranks(self) -> None:
        scores = [
            lags_between(KEYS[4], derived_key(KEYS[4], rank), 1 << 17) for rank in range(1, 256)
        ]
        assert verdict("lags of 255 ranks against rank 0", torch.cat(scores)) == []
        scores = [lags_between(KEYS[5], derived_key(KEYS[5], rank), 1 << 22) for rank in (1, 7)]
        assert verdict("lags below 2^22 of ranks 1 and 7", torch.cat(scores)) == []

    @pytest.mark.slow
    @pytest.mark.parametrize("base", [0, 1, 2**40 + 12345])
    def test_neighbouring_and_bit_flipped_seeds(self, base: int) -> None:
        seeds = [base, base + 1, base + 2, *(base ^ (1 << bit) for bit in range(64))]
        keys = [key_from_seed(seed) for seed in dict.fromkeys(seeds)]
        assert verdict(f"pairs of seeds around {base}", between(keys, 0.5, 1 << 18)) == []
        scores = [lags_between(keys[0], key, 1 << 17) for key in keys[1:]]
        assert verdict(f"lags of seeds around {base}", torch.cat(scores)) == []

    @pytest.mark.slow
    @pytest.mark.parametrize("rank", [0, 3])
    def test_consecutive_calls_and_sites(self, rank: int) -> None:
        torch.manual_seed(11)
        keys: list[Any] = [draw_key(torch.device("cpu"), rank) for _ in range(128)]
        assert verdict(f"pairs of 128 calls, rank {rank}", between(keys, 0.5, 1 << 18)) == []
        scores = [lags_between(a, b, 1 << 17) for a, b in itertools.pairwise(keys)]
        assert verdict(f"lags of consecutive calls, rank {rank}", torch.cat(scores)) == []


@pytest.mark.slow
def test_keep_rate() -> None:
    """To 1e-4, over 2**28 entries."""
    rates = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99)
    kept, total = dict.fromkeys(rates, 0), 0
    for key in KEYS:
        for index in window(0, 1 << 22).split(1 << 17):
            bits, total = hash_bits(index, key), total + len(index)
            for p in rates:
                kept[p] += int((bits >= round(p * 2**32) - 2**31).sum())
    for p in rates:
        rate = kept[p] / total
        print(f"| keep rate, p = {p} | {total:,} | {rate:.6f} | {1 - p:.2f} |")
        assert abs(rate - (1 - p)) < 1e-4
    scores = [(kept[p] / total - (1 - p)) / math.sqrt(p * (1 - p) / total) for p in rates]
    assert verdict("keep rate at nine p", scores) == []
