"""The checkpoints of a run, as a person asks for them."""

import time
from dataclasses import dataclass
from pathlib import Path

from train import checkpoint_folder
from train.checkpoint_folder import MANIFEST, Progress, complete, find_damage, progress_if_readable
from train.errors import RunError
from train.retention import prune, reasons_to_stay
from train.run_folder import open_run


@dataclass(frozen=True)
class Row:
    """A checkpoint in the list."""

    path: Path
    step: int
    progress: Progress | None
    """None where the manifest is damaged."""
    bytes: int
    age_seconds: float
    kept: tuple[str, ...]
    """Why it stays; empty: the next save removes it."""


def rows(run: str) -> list[Row]:
    """The finished checkpoints of a run, oldest first.

    Raises:
        RunError: no such run, or it has none.
    """
    folder, config = open_run(run)
    reasons = reasons_to_stay(folder.checkpoints, config.checkpoint)
    _refuse_none(run, list(reasons))
    return [
        Row(
            path,
            checkpoint_folder.step_of(path),
            progress_if_readable(path),
            sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
            time.time() - (path / MANIFEST).stat().st_mtime,
            tuple(why),
        )
        for path, why in reasons.items()
    ]


def damages(run: str) -> dict[Path, str | None]:
    """What is wrong with each checkpoint of a run, oldest first, by hashing all of its files again.

    Raises:
        RunError: no such run, it has no checkpoint, or one is of another format.
    """
    folder, _ = open_run(run)
    found = complete(folder.checkpoints)
    _refuse_none(run, found)
    return {path: find_damage(path) for path in found}


def prune_run(run: str) -> list[Path]:
    """Remove the checkpoints that the run's configuration doesn't keep. Returns them.

    Raises:
        RunError: no such run, or one can't be removed.
    """
    folder, config = open_run(run)
    try:
        return prune(folder.checkpoints, config.checkpoint)
    except OSError as error:
        raise RunError(f"{error.filename}: not removed: {error.strerror}") from None


def find_checkpoint(path: str) -> Path:
    """A checkpoint's folder, by itself or as the newest of a run's.

    Raises:
        RunError: it is neither, or damaged.
    """
    found = Path(path)
    if not (found / MANIFEST).is_file():
        folder, _ = open_run(path)
        checkpoints = complete(folder.checkpoints)
        _refuse_none(path, checkpoints)
        found = checkpoints[-1]
    if damage := find_damage(found):
        raise RunError(f"{found} is damaged: {damage}: `trireme checkpoint verify` says which ones are whole")
    return found


def _refuse_none(run: str, found: list[Path]) -> None:
    if not found:
        raise RunError(f"{run} has no checkpoint: train it until its first")
