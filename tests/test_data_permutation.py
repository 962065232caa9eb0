from __future__ import annotations

import itertools
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from allfuse.base.keys import mix
from allfuse.split.data import Permutation

SLOW = pytest.mark.slow


def whole(size: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return Permutation(size, seed, epoch)(np.arange(size))


def excess(counts: np.ndarray, expected: float, freedom: int) -> float:
    """The chi-square statistic in standard deviations above its mean."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [*range(1, 40), 255, 256, 257, 1023, 4096, 4097, 65_537])
def test_is_a_bijection(size: int) -> None:
    for seed, epoch in ((0, 0), (1, 0), (0, 1), (-5, 3), (2**70, 10**9)):
        assert sorted(whole(size, seed, epoch).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [10**9 + 7, 10**12, 2**53 + 1, 2**62 - 1, 2**62])
def test_huge_sizes_cost_no_memory_and_never_repeat_an_index(size: int) -> None:
    order = Permutation(size, 3, 4)
    tracemalloc.start()
    ends = np.concatenate([np.arange(5000), np.arange(size - 5000, size)])
    found = order(ends)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2_000_000
    assert found.min() >= 0
    assert found.max() < size
    assert len(np.unique(found)) == 10_000
    # Uniform over the range: the mean of 10,000 draws is within 5 standard errors of the middle.
    assert abs(float(np.mean(found / size)) - 0.5) < 5 / math.sqrt(12 * 10_000)


def test_one_position_gives_what_many_give() -> None:
    order = Permutation(1000, 7, 2)
    together = order(np.arange(1000))
    alone = [int(order(np.array([position]))[0]) for position in range(1000)]
    assert alone == together.tolist()


def test_is_the_same_on_every_platform() -> None:
    assert whole(10, seed=0, epoch=0).tolist() == [9, 4, 2, 6, 3, 0, 1, 8, 5, 7]
    assert Permutation(10**12, 42, 7)(np.arange(3)).tolist() == [
        338100729803,
        742591246339,
        219952283628,
    ]


def test_without_shuffle_the_order_is_the_data_sets() -> None:
    assert Permutation(9, 1, 1, shuffle=False)(np.arange(9)).tolist() == list(range(9))


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=SLOW), pytest.param(4, marks=SLOW), 5])
def test_every_order_of_few_samples_is_equally_likely(size: int) -> None:
    draws = 2400
    found = Counter(tuple(whole(size, seed).tolist()) for seed in range(draws))
    orders = list(itertools.permutations(range(size)))
    counts = np.array([found[order] for order in orders])
    assert excess(counts, draws / len(orders), len(orders) - 1) < 5


@pytest.mark.parametrize(
    "size", [6, pytest.param(16, marks=SLOW), 17, pytest.param(100, marks=SLOW)]
)
def test_every_sample_is_equally_likely_at_every_position(size: int) -> None:
    draws = 1000
    counts = np.zeros((size, size))
    steps = np.zeros(size)
    for seed in range(draws):
        order = whole(size, seed // 2, seed % 2)
        counts[np.arange(size), order] += 1
        steps += np.bincount((order[1:] - order[:-1]) % size, minlength=size)
    assert excess(counts, draws / size, (size - 1) ** 2) < 5
    # and so is every step from one sample to the next
    assert excess(steps[1:], steps[1:].mean(), size - 2) < 5


def test_neighbours_epochs_and_seeds_are_uncorrelated() -> None:
    size = 100_000
    order = whole(size, 1, 1)
    for other in (np.arange(size), np.roll(order, 1), whole(size, 1, 2), whole(size, 2, 1)):
        assert abs(np.corrcoef(order, other)[0, 1]) * math.sqrt(size) < 5
        assert int((order == other).sum()) < 10  # 1 is expected


def test_keys_differ_in_every_part_and_in_the_order_of_parts() -> None:
    keys = [mix(*parts) for parts in itertools.product(range(12), repeat=3)]
    assert len(set(keys)) == 12**3
    assert all(0 <= key < 2**64 for key in keys)


@pytest.mark.parametrize("size", [0, -1, 2**62 + 1])
def test_a_size_without_an_order_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=str(size)):
        Permutation(size, 0, 0)
