"""Learning rates at the points that define each schedule."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config import ScheduleConfig
from train.duration import format_seconds, parse_seconds
from train.schedule import learning_rate


def rates(kind: str, **settings: float) -> list[float]:
    config = ScheduleConfig(type=kind, warmup_steps=10, min_lr_ratio=0.1, **settings)  # type: ignore[arg-type]
    return [learning_rate(step, 1.0, 100, config) for step in range(1, 121)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(kind: str) -> None:
    assert rates(kind)[:10] == pytest.approx([step / 10 for step in range(1, 11)])


@pytest.mark.parametrize(("kind", "half_way"), [("cosine", 0.55), ("linear", 0.55), ("wsd", 1.0)])
def test_decay_ends_at_the_minimum_and_stays(kind: str, half_way: float) -> None:
    by_step = rates(kind)
    assert by_step[54] == pytest.approx(half_way)
    assert by_step[99:] == pytest.approx([0.1] * 21)
    assert all(a >= b for a, b in pairwise(by_step[9:]))


def test_wsd_is_stable_until_its_last_part() -> None:
    by_step = rates("wsd", decay_fraction=0.25)
    assert by_step[9:75] == [1.0] * 66
    assert by_step[75] < 1.0


def test_constant_has_no_end() -> None:
    assert learning_rate(10**9, 0.5, None, ScheduleConfig(type="constant")) == 0.5


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90m", 5400), ("1h30m", 5400), ("2d", 172800), ("1.5h", 5400), ("45", 45), ("10s", 10), (7, 7)],
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@given(st.integers(0, 10**7))
def test_formatted_durations_keep_two_units(seconds: int) -> None:
    again = parse_seconds(format_seconds(seconds))
    assert isinstance(again, float | int)
    assert seconds - max(60, seconds * 0.05) <= again <= seconds
