"""A `model` section in our words, whatever words it was written in (`model.aliases`)."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

from model.aliases import CHOICES, NAMES, TYPES, Choice
from model.dotted import Values, flatten, nest, put, related


def in_our_words(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section as a tree of our keys. Raises ValueError as `Settings` does."""
    settings = Settings()
    settings.add(flatten(section))
    return nest(settings.settled())


class Settings:
    """What is said of a model, layer by layer (files, the command line); of two layers the later one counts."""

    def __init__(self, prefix: str = "") -> None:
        """Keys that begin with the prefix are the model's, and others are taken as they are."""
        self.prefix = prefix
        self.values: Values = {}
        self._suggestions: list[tuple[Mapping[str, Any], str]] = []

    def add(self, layer: Values) -> None:
        """Say more.

        Raises ValueError, one line, for two spellings that contradict each other, and for an unknown value.
        """
        translation = _Translation(self.prefix)
        for key, (value, source) in layer.items():
            translation.say(key, value, source)
        for key, (value, source) in translation.ours.items():
            put(self.values, key, value, source)
        self._suggestions += translation.suggestions

    def settled(self) -> Values:
        """All of it, with the type in our words, and what that and other choices bring along."""
        values, groups = dict(self.values), self._suggestions[::-1]
        name, source = values.get(f"{self.prefix}type", (None, ""))
        if isinstance(name, str) and name in TYPES:
            because = f"{source} ({name})" if source else ""
            values[f"{self.prefix}type"] = (TYPES[name].type, because)
            groups.append((TYPES[name].defaults, because))
        for group, source in groups:
            self._suggest(values, group, source)
        return values

    def _suggest(self, values: Values, group: Mapping[str, Any], source: str) -> None:
        variant, _ = values.get(f"{self.prefix}ffn.variant", (group.get("ffn.variant"), ""))
        for name, value in group.items():
            key = f"{self.prefix}{name}"
            said = key in values or any(values[other][0] != {} for other in related(values, key))
            if not said and (variant == group.get("ffn.variant") or not name.startswith("ffn.")):
                put(values, key, value, source)


class _Translation:
    """One layer, key by key."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.ours: Values = {}
        self.suggestions: list[tuple[Mapping[str, Any], str]] = []
        self._said: dict[str, str] = {}
        self._chosen: dict[int, tuple[Choice, str]] = {}

    def say(self, key: str, value: Any, source: str) -> None:
        here = f"{_place(source)}{key}={value!r}"
        name = key.removeprefix(self.prefix) if key.startswith(self.prefix) else ""
        if name not in CHOICES:
            self._set(self.prefix + NAMES[name] if name in NAMES else key, value, source, here)
            return
        choice = _choose(CHOICES[name], here, value)
        other, there = self._chosen.setdefault(id(CHOICES[name]), (choice, here))
        if other != choice:
            raise _contradiction(there, here)
        for target, meant in choice.sets.items():
            self._set(self.prefix + target, meant, source, here)
        self.suggestions.append((choice.suggests, source))

    def _set(self, key: str, value: Any, source: str, here: str) -> None:
        if key in self.ours and self.ours[key][0] != value:
            raise _contradiction(self._said[key], here)
        put(self.ours, key, value, source)
        self._said[key] = here


def _choose(choices: Mapping[str, Choice], here: str, value: Any) -> Choice:
    known = {_plain(name): choice for name, choice in choices.items()}
    if _plain(value) in known:
        return known[_plain(value)]
    close = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(choices)}"
    raise ValueError(f"{here} is not known: {hint}")


def _plain(value: Any) -> str:
    return re.sub(r"[^a-z0-9]", "", str(value).lower())


def _contradiction(one: str, other: str) -> ValueError:
    return ValueError(f"{one} and {other} contradict each other: keep one of them")


def _place(source: str) -> str:
    return "" if source in ("", "command line") else f"{source}: "
