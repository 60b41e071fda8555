"""Sizes in bytes as people write them."""

import re

_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(value: object) -> object:
    """`20GB` (1000 to the third), `20GiB` (1024), `1.5e9` or a number -> whole bytes. Other types pass through.

    Raises:
        ValueError: text of another form.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([KMGT]?)(i?)B?", value.strip(), re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise ValueError(f"{value!r} is not a size: write 20GB, 18.5GiB or a number of bytes")
    return round(float(found[1]) * (1024 if found[3] else 1000) ** _UNITS[found[2].upper()])


def format_bytes(size: int) -> str:
    """`1.25GB`, rounded up, so that what reads it back has room for `size`."""
    power = min((len(str(size)) - 1) // 3, 4)
    digits = -(-size * 100 // 1000**power) if power else size * 100
    return f"{digits / 100:g}{'' if power == 0 else 'KMGT'[power - 1]}B"
