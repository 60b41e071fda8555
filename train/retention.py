"""Which checkpoints of a run stay."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from train.checkpoint_folder import complete, latest, loss_of, remove, step_of
from train.config import CheckpointConfig

log = logging.getLogger(__name__)

FOR_EVER = "for ever"


def reasons(
    steps: Sequence[int], rules: CheckpointConfig, loss_at: Callable[[int], float | None]
) -> dict[int, list[str]]:
    """Why the checkpoint of each of the steps, which are in order, stays; one without a reason may go.

    loss_at: the validation loss; None where it isn't known.
    """
    found: dict[int, list[str]] = {step: [] for step in steps}
    for step in steps[-rules.keep :]:
        found[step].append("newest")
    for step in steps:
        if rules.keep_every is not None and step % rules.keep_every == 0:
            found[step].append(FOR_EVER)
    for step in _best(steps, rules.keep_best, loss_at):
        found[step].append("best")
    return found


def reasons_to_stay(folder: Path, rules: CheckpointConfig) -> dict[Path, list[str]]:
    """The finished checkpoints of a run, oldest first, each with why it stays; one without a reason may go."""
    there = {step_of(path): path for path in complete(folder)}
    return {
        there[step]: why
        for step, why in reasons(list(there), rules, lambda step: loss_of(there[step])).items()
    }


def prune(folder: Path, rules: CheckpointConfig, spare: Path | None = None) -> list[Path]:
    """Remove the checkpoints that nothing keeps, but for one that is needed. Returns what they were, oldest first."""
    gone = [path for path, why in reasons_to_stay(folder, rules).items() if not why and path != spare]
    for path in gone:
        remove(path)
    return gone


def make_room(folder: Path, rules: CheckpointConfig) -> list[Path]:
    """Remove now what the next checkpoint makes superfluous; never the newest that is whole. Returns what it was."""
    whole = latest(folder, log)
    fewer = rules.model_copy(update={"keep": max(1, rules.keep - 1)})
    gone = [path for path, why in reasons_to_stay(folder, fewer).items() if not why and path != whole]
    for path in gone:
        remove(path)
    return gone


def _best(steps: Sequence[int], count: int, loss_at: Callable[[int], float | None]) -> list[int]:
    """Those with the lowest validation loss, of those that were evaluated; the newer of equal ones."""
    if not count:
        return []
    losses = {step: loss for step in reversed(steps) if (loss := loss_at(step)) is not None}
    return sorted(losses, key=lambda step: losses[step])[:count]
