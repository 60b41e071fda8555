"""Large numbers as people write them."""

import math
import re

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def parse_count(value: object) -> float:
    """`300M`, `1.5B`, `1e20` or a number -> the number.

    Raises:
        ValueError: anything else, and what isn't positive and finite.
    """
    number = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
    elif isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e[-+]?\d+)?)\s*([kmbt]?)\s*", value, flags=re.IGNORECASE)
        number = float(found[1]) * _UNITS[found[2].upper()] if found else math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{value!r} is not a positive number: write 300M, 1.5B or 1e20")
    return number


def format_count(number: float) -> str:
    """Three digits: `300M`, `1.5B`, `1.2e+20`."""
    for unit in ("T", "B", "M", "K", ""):
        if _UNITS[unit] <= number < 1e3 * _UNITS[unit]:
            return f"{number / _UNITS[unit]:.3g}{unit}"
    return f"{number:.3g}"
