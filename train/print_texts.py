"""Texts of a finished run, on the terminal."""

import sys
from collections.abc import Sequence

from train.evaluate_run import LoadedRun
from train.texts import TextSettings, continuations, shown_prompt


def print_texts(run: LoadedRun, prompts: Sequence[str], settings: TextSettings) -> None:
    """One text as it comes; several when all are there, each under a header.

    Raises:
        RunError: the model can't do it.
    """
    count = len(prompts) * settings.samples
    pieces = continuations(run.model, run.tokenizer, prompts, settings, run.device)
    if count == 1:
        print(shown_prompt(run.model, prompts[0]), end="", flush=True)
        for (piece,) in pieces:
            print(piece, end="", flush=True)
        print()
        return
    for at, parts in enumerate(zip(*pieces, strict=True)):
        print(f"--- {at + 1} of {count} ---")
        print(shown_prompt(run.model, prompts[at // settings.samples]) + "".join(parts))


def answer_lines(run: LoadedRun, settings: TextSettings) -> None:
    """Go on from each line of stdin, to its end.

    Raises:
        RunError: the model can't do it.
    """
    ask = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(ask)
        except EOFError:
            return
        print_texts(run, [line], settings)
