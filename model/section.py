"""What the sections of the model's configuration share."""

from typing import Annotated

from pydantic import ConfigDict, Field

SECTION = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

Rate = Annotated[float, Field(ge=0.0, lt=1.0)]


def known(value: int | None) -> int:
    """A value that its section has filled in."""
    assert value is not None
    return value


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`, at least 1."""
    return next((d for d in range(min(number, limit), 1, -1) if number % d == 0), 1)
