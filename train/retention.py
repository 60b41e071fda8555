"""Which checkpoints of a run stay."""

import logging
from math import isfinite
from pathlib import Path

from train.checkpoint_folder import complete, latest, progress_if_readable, remove, step_of
from train.config import CheckpointConfig

log = logging.getLogger(__name__)

FOR_EVER = "for ever"


def reasons_to_stay(folder: Path, rules: CheckpointConfig) -> dict[Path, list[str]]:
    """The finished checkpoints of a run, oldest first, each with why it stays; one without a reason may go."""
    found = complete(folder)
    reasons: dict[Path, list[str]] = {path: [] for path in found}
    for path in found[-rules.keep :]:
        reasons[path].append("newest")
    for path in found:
        if rules.keep_every is not None and step_of(path) % rules.keep_every == 0:
            reasons[path].append(FOR_EVER)
    for path in _best(found, rules.keep_best):
        reasons[path].append("best")
    return reasons


def prune(folder: Path, rules: CheckpointConfig) -> list[Path]:
    """Remove the checkpoints that nothing keeps. Returns what they were, oldest first."""
    gone = [path for path, reasons in reasons_to_stay(folder, rules).items() if not reasons]
    for path in gone:
        remove(path)
    return gone


def make_room(folder: Path, rules: CheckpointConfig) -> list[Path]:
    """Remove now what the next checkpoint makes superfluous; never the newest that is whole. Returns what was removed."""
    whole = latest(folder, log)
    fewer = rules.model_copy(update={"keep": max(1, rules.keep - 1)})
    gone = [path for path, why in reasons_to_stay(folder, fewer).items() if not why and path != whole]
    for path in gone:
        remove(path)
    return gone


def _best(found: list[Path], count: int) -> list[Path]:
    """Those with the lowest validation loss, of those that were evaluated; the newer of equal ones."""
    if not count:
        return []
    losses: dict[Path, float] = {}
    for path in reversed(found):
        progress = progress_if_readable(path)
        loss = None if progress is None else progress.validation_loss
        if loss is not None and isfinite(loss):
            losses[path] = loss
    return sorted(losses, key=lambda path: losses[path])[:count]
