"""Which layers a pipeline's stages have. Light to import: it is checked before anything starts."""

from functools import cache
from itertools import pairwise
from typing import Literal

from model.config import ModelConfig, known

Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"]

MANY_STAGES = ("interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble")
"""Schedules with several stages on a rank."""


def rank_of(stage: int, ranks: int, schedule: Schedule) -> int:
    """Stages go round the ranks; those of zbv there and back, so that the last is where the first is."""
    if schedule == "zbv_zero_bubble" and stage >= ranks:
        return 2 * ranks - 1 - stage
    return stage % ranks


def stages_of(rank: int, ranks: int, stages: int, schedule: Schedule) -> list[int]:
    """The stages of a rank, in order."""
    return [stage for stage in range(stages) if rank_of(stage, ranks, schedule) == rank]


def split_layers(config: ModelConfig, seq_len: int, stages: int) -> list[range]:
    """The layers of each stage, one or more, so that the slowest is as fast as can be.

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
    """Where each of so many consecutive parts starts, the heaviest as light as can be, early ones filled first."""

    @cache
    def best(start: int, left: int) -> tuple[float, tuple[int, ...]]:
        if left == 1:
            return sum(weights[start:]), (start,)
        options = []
        for stop in range(start + 1, len(weights) - left + 2):
            heaviest, starts = best(stop, left - 1)
            options.append((max(sum(weights[start:stop]), heaviest), (start, *starts)))
        return min(options)

    return best(0, parts)[1]
