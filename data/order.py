"""Which sequence is read at each place of a run: a function of the seed alone, computed for any stretch of places.

A mixture's places come in rounds. In each, every source has its proportion of the places, which the seed arranges at
random. A source gives its sequences in passes, one after the other without end: each pass has all of them once, in
an order of its own.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ROUND = 100_000
"""Places of a round: proportions are kept to as many parts."""


class Order:
    """The places of a run, from 0 without end, and the sequences at them.

    A sequence's id is its index, counted through the sources one after the other.
    """

    def __init__(
        self, sizes: Sequence[int], proportions: Sequence[float], *, shuffle: bool, seed: int
    ) -> None:
        """sizes: sequences of each source. Without `shuffle` passes are in the order that is stored."""
        self._sizes, self._shuffle, self._seed = sizes, shuffle, seed
        self._offsets = [sum(sizes[:source]) for source in range(len(sizes))]
        self._counts = apportion(proportions, ROUND)
        self._kept: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def ids(self, begin: int, end: int) -> NDArray[np.int64]:
        """The sequences at the places [begin, end)."""
        found = np.empty(end - begin, np.int64)
        for number in range(begin // ROUND, -(-end // ROUND)):
            first = number * ROUND
            start, stop = max(begin - first, 0), min(end - first, ROUND)
            arranged = self._arranged(number)
            for source, offset in enumerate(self._offsets):
                before = number * self._counts[source] + np.count_nonzero(arranged[:start] == source)
                places = np.flatnonzero(arranged[start:stop] == source)
                found[first + start - begin + places] = offset + self._draw(source, before, len(places))
        return found

    def taken(self, end: int) -> list[int]:
        """How many sequences each source has given at the places [0, end)."""
        number, within = divmod(end, ROUND)
        in_round = np.bincount(self._arranged(number)[:within], minlength=len(self._sizes))
        return [number * count + int(more) for count, more in zip(self._counts, in_round, strict=True)]

    def _arranged(self, number: int) -> NDArray[np.uint16]:
        """The source at each place of a round."""
        sources = np.repeat(np.arange(len(self._counts), dtype=np.uint16), self._counts)
        return sources if len(self._counts) == 1 else sources[self._permutation(0, number, ROUND)]

    def _draw(self, source: int, begin: int, count: int) -> NDArray[np.int64]:
        """What a source gives from its sequence number `begin` of all passes on."""
        size, end = self._sizes[source], begin + count
        if not self._shuffle:
            return np.arange(begin, end) % size
        passes = range(begin // size, -(-end // size))
        parts = [
            self._permutation(1 + source, number, size)[max(begin - number * size, 0) : end - number * size]
            for number in passes
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _permutation(self, which: int, number: int, size: int) -> NDArray[np.int64]:
        """Of round `number` (which=0), or of that pass of a source (1, 2, ...); the last of each is kept."""
        if self._kept.get(which, (-1,))[0] != number:  # of a large source it takes seconds
            self._kept[which] = number, permutation(size, self._seed, which, number)
        return self._kept[which][1]


def apportion(proportions: Sequence[float], parts: int) -> list[int]:
    """As many of `parts` to each as its proportion, by largest remainders."""
    exact = [proportion / sum(proportions) * parts for proportion in proportions]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda at: shares[at] - exact[at])
    for at in by_remainder[: parts - sum(shares)]:
        shares[at] += 1
    return shares


def permutation(size: int, *key: int) -> NDArray[np.int64]:
    """A permutation that depends on `key` alone.

    numpy promises that its bit generators' numbers stay the same in later versions, but not what its own `permutation`
    makes of them.
    """
    numbers = np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(numbers, kind="stable")
