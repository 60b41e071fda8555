"""Which layers a pipeline's stages have. Light to import: it is checked before anything starts."""

from collections.abc import Callable
from functools import cache
from itertools import accumulate, pairwise
from math import inf
from operator import add
from typing import Literal

from model.config import ModelConfig, known

Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"]

MANY_STAGES = ("interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble")
"""Schedules with several stages on a rank."""

IN_HALVES = ("interleaved_zero_bubble", "zbv_zero_bubble")
"""Schedules that cut the backward in two: for activations, and for weights."""


def rank_of(stage: int, ranks: int, schedule: Schedule) -> int:
    """Stages go round the ranks; those of zbv there and back, so that the last is where the first is."""
    if schedule == "zbv_zero_bubble" and stage >= ranks:
        return 2 * ranks - 1 - stage
    return stage % ranks


def stages_of(rank: int, ranks: int, stages: int, schedule: Schedule) -> list[int]:
    """The stages of a rank, in order."""
    return [stage for stage in range(stages) if rank_of(stage, ranks, schedule) == rank]


def split_layers(config: ModelConfig, seq_len: int, stages: int) -> list[range]:
    """The layers of each stage, one or more, so that the slowest is as fast as can be, and the others alike.

    Layers weigh what they compute; the embedding counts with the first, and the head with the last.
    """
    from model.block import Block  # only here: it imports torch

    weights = [
        Block.cost(config, seq_len, moe=layer in config.moe_layers).flops
        for layer in range(config.num_layers)
    ]
    # a look-up moves as much memory as it computes little: about a vector of the residual stream
    weights[0] += 2.0 * config.d_model
    weights[-1] += 2.0 * config.d_model * known(config.vocab_size)
    starts = [*_fairest(tuple(weights), stages), config.num_layers]
    return [range(start, stop) for start, stop in pairwise(starts)]


def _fairest(weights: tuple[float, ...], parts: int) -> tuple[int, ...]:
    """Where each of so many consecutive parts starts: the heaviest as light as can be, then all as equal as can be."""
    before = list(accumulate(weights, initial=0.0))

    def weight(start: int, stop: int) -> float:
        return before[stop] - before[start]

    heaviest, _ = _best(len(weights), parts, weight, max)

    def square(start: int, stop: int) -> float:
        return weight(start, stop) ** 2 if weight(start, stop) <= heaviest else inf

    return _best(len(weights), parts, square, add)[1]


def _best(
    size: int,
    parts: int,
    cost: Callable[[int, int], float],
    together: Callable[[float, float], float],
) -> tuple[float, tuple[int, ...]]:
    """The least that so many consecutive parts, none empty, cost together, and where each starts."""

    @cache
    def best(start: int, left: int) -> tuple[float, tuple[int, ...]]:
        if left == 1:
            return cost(start, size), (start,)
        options = []
        for stop in range(start + 1, size - left + 2):
            rest, starts = best(stop, left - 1)
            options.append((together(cost(start, stop), rest), (start, *starts)))
        return min(options)

    return best(0, parts)
