"""Layers are shared out among stages so that the slowest is as fast as can be, and the others alike."""

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from parallel.stages import _fairest, split_layers


@given(st.data(), st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_no_split_is_fairer(data: st.DataObject, weights: list[int]) -> None:
    parts = data.draw(st.integers(1, len(weights)))

    def unfairness(starts: tuple[int, ...]) -> tuple[int, int]:
        loads = [sum(weights[start:stop]) for start, stop in pairwise((*starts, len(weights)))]
        return max(loads), sum(load * load for load in loads)

    every = [(0, *others) for others in combinations(range(1, len(weights)), parts - 1)]
    assert unfairness(_fairest(tuple(map(float, weights)), parts)) == min(map(unfairness, every))


def test_a_large_vocabulary_is_as_much_work_as_layers() -> None:
    config = ModelConfig(vocab_size=100_000, d_model=64, num_layers=8)
    assert split_layers(config, 128, 2) == [range(7), range(7, 8)]
