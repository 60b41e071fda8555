"""A tree of settings as dotted keys, each with its value and the place where that was said."""

from collections.abc import Mapping
from typing import Any

Values = dict[str, tuple[Any, str]]
"""Dotted key -> value and where it came from."""


def put(values: Values, key: str, value: Any, source: str) -> None:
    """Set a key. A plain value replaces what stood below it, a key below a plain value that, and {} nothing below."""
    others = related(values, key)
    if value == {} and any(other.startswith(f"{key}.") for other in others):
        return
    for other in others:
        del values[other]
    values[key] = (value, source)


def related(values: Values, key: str) -> list[str]:
    """The keys below and above one."""
    return [other for other in values if other.startswith(f"{key}.") or key.startswith(f"{other}.")]


def flatten(tree: Mapping[str, Any], source: str = "", prefix: str = "") -> Values:
    """Each dotted key of a tree. An empty mapping is a value."""
    values: Values = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            values |= flatten(value, source, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = (value, source)
    return values


def nest(values: Values) -> dict[str, Any]:
    """The tree whose keys these are, none above another."""
    tree: dict[str, Any] = {}
    for key, (value, _) in values.items():
        *sections, name = key.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[name] = value
    return tree
