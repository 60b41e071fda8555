"""Layouts that fit their processes, and the words for those that don't."""

import pytest

from parallel.config import ParallelConfig
from parallel.errors import LayoutError
from parallel.layout import Layout, resolve_layout


def test_what_is_left_goes_to_sharding() -> None:
    assert resolve_layout(ParallelConfig(dp_replicate=2), 8) == Layout(dp_replicate=2, dp_shard=4)


def test_given_sizes_must_multiply_to_the_processes() -> None:
    with pytest.raises(LayoutError, match=r"2 x 3 = 6 process\(es\), but there are 4: start 6"):
        resolve_layout(ParallelConfig(dp_replicate=2, dp_shard=3), 4)


def test_replicas_must_divide_the_processes() -> None:
    with pytest.raises(LayoutError, match="parallel.dp_replicate=3 = 3 doesn't divide 4"):
        resolve_layout(ParallelConfig(dp_replicate=3), 4)


def test_no_dimension_of_size_zero() -> None:
    with pytest.raises(ValueError, match="parallel.dp_shard=0"):
        ParallelConfig(dp_shard=0)
