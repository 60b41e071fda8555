"""The order of a mixture is exact: proportions, passes, any stretch of it."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import ROUND, Order, apportion, permutation

SOURCES = st.lists(st.tuples(st.integers(1, 50), st.floats(0.01, 100)), min_size=1, max_size=4)


def make(sources: list[tuple[int, float]], seed: int = 3, shuffle: bool = True) -> Order:
    sizes, proportions = zip(*sources, strict=True)
    return Order(sizes, proportions, shuffle=shuffle, seed=seed)


@given(SOURCES, st.integers(0, 2**70), st.booleans(), st.data())
@settings(max_examples=30, deadline=None)
def test_any_stretch_is_part_of_the_one_order(
    sources: list[tuple[int, float]], seed: int, shuffle: bool, data: st.DataObject
) -> None:
    start = data.draw(st.sampled_from([0, 7, ROUND - 60, 3 * ROUND - 100]))
    edges = sorted(data.draw(st.lists(st.integers(0, 200), min_size=1, max_size=5)))
    whole = make(sources, seed, shuffle).ids(start, start + 200)
    cut = make(sources, seed, shuffle)
    for begin, end in itertools.pairwise([0, *edges, 200]):
        assert (cut.ids(start + begin, start + end) == whole[begin:end]).all()
    offsets = np.cumsum([0, *(size for size, _ in sources)])
    counted = np.histogram(whole, offsets)[0]
    taken = np.array(cut.taken(start + 200)) - np.array(cut.taken(start))
    assert (taken == counted).all()


@given(SOURCES, st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_source_gives_all_it_has_before_it_gives_any_again(
    sources: list[tuple[int, float]], seed: int
) -> None:
    ids = make(sources, seed).ids(0, 2000)
    first = 0
    for size, _ in sources:
        mine = ids[(ids >= first) & (ids < first + size)] - first
        for begin in range(0, len(mine), size):
            whole_pass = mine[begin : begin + size]
            assert len(set(whole_pass)) == len(whole_pass)
        first += size


def test_every_round_keeps_the_proportions_and_no_place_is_preferred() -> None:
    order = make([(1000, 7), (10, 2.5), (300, 0.5)])
    assert order.taken(ROUND) == [70_000, 25_000, 5_000]
    assert order.taken(3 * ROUND) == [210_000, 75_000, 15_000]
    early = np.array([make([(1000, 7), (10, 2.5), (300, 0.5)], seed).taken(1000) for seed in range(200)])
    assert early.mean(axis=0) == pytest.approx([700, 250, 50], abs=4)
    assert early.std(axis=0) == pytest.approx(np.sqrt([700 * 0.3, 250 * 0.75, 50 * 0.95]), rel=0.2)


def test_passes_rounds_seeds_and_sources_are_arranged_apart() -> None:
    one = make([(500, 1)])
    assert (one.ids(0, 500) != one.ids(500, 1000)).any()
    assert (one.ids(0, 500) != make([(500, 1)], seed=4).ids(0, 500)).any()
    two = make([(500, 1), (500, 1)])
    ids = two.ids(0, ROUND)
    first, second = ids[ids < 500][:500], ids[ids >= 500][:500] - 500
    assert (first != second).any()
    assert ((ids < 500) != (two.ids(ROUND, 2 * ROUND) < 500)).any()


def test_unshuffled_sources_come_as_they_are_stored() -> None:
    ids = make([(7, 1), (5, 1)], shuffle=False).ids(0, 40)
    assert ids[ids < 7].tolist() == [at % 7 for at in range((ids < 7).sum())]
    assert ids[ids >= 7].tolist() == [7 + at % 5 for at in range((ids >= 7).sum())]


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.integers(1, 10**6))
def test_parts_are_apportioned(proportions: list[float], parts: int) -> None:
    shares = apportion(proportions, parts)
    assert sum(shares) == parts
    for share, proportion in zip(shares, proportions, strict=True):
        assert abs(share - proportion / sum(proportions) * parts) <= 1


def test_permutations_are_even_and_are_never_other_ones() -> None:
    """The literal is what every later version must give, or runs would not go on as they began."""
    assert permutation(8, 7, 1, 0).tolist() == [1, 3, 2, 7, 4, 5, 0, 6]
    orders = Counter(tuple(permutation(3, seed, 1, 0).tolist()) for seed in range(6000))
    assert len(orders) == 6 and all(abs(count - 1000) < 130 for count in orders.values())
