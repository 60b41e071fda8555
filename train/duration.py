"""Durations as people write them."""

import re
from typing import Annotated

from pydantic import BeforeValidator, Field

_UNITS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_PART = r"(\d+(?:\.\d+)?)\s*([dhms])"


def parse_seconds(value: object) -> object:
    """`90m`, `1h30m`, `2d` or a number of seconds -> seconds. Other types pass through, to be refused by their own.

    Raises:
        ValueError: text of another form.
    """
    if not isinstance(value, str):
        return value
    if re.fullmatch(rf"(?:{_PART}\s*)+", value):
        return sum(float(number) * _UNITS[unit] for number, unit in re.findall(_PART, value))
    try:
        return float(value)
    except ValueError:
        raise ValueError(
            f"{value!r} is not a duration: write 90m, 1h30m, 2d or a number of seconds"
        ) from None


Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(gt=0)]
"""In a configuration."""


def format_seconds(seconds: float) -> str:
    """The two largest units: `1h30m`, `2m05s`, `12s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3_600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3_600}h{whole % 3_600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3_600:02d}h"
