"""Where tables are shown."""

import sys

from rich.console import Console


def console(*, markup: bool = False) -> Console:
    """The terminal, or a pipe or file, which have no width to keep to. markup: text says its colours, in [brackets]."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=markup)
