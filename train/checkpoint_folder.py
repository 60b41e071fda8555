"""The checkpoints of a run as they lie on the disk: which are whole, and where the run stood. Light to import."""

import hashlib
import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.errors import RunError

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: what a checkpoint holds beside tensors."""

    step: int
    tokens: int
    data: dict[str, Any]
    """The position in the data, as `data.stream.TrainingStream.state_dict` gives it."""
    data_order_digest: str = "0" * 16
    """Of all global batches up to the step, as `train.order_digest.OrderDigest` gives it."""
    faults: dict[str, Any] = field(default_factory=dict)
    """What went wrong so far, as `train.faults.health.Health` gives it."""


def complete(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(named, key=_step)


def newest_step(folder: Path) -> int:
    """The step of the newest finished checkpoint, unchecked; 0 where there is none."""
    return max(map(_step, complete(folder)), default=0)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def latest(folder: Path, log: logging.Logger) -> Path | None:
    """The newest checkpoint whose files are as they were written; damaged ones are passed over, and named."""
    for path in reversed(complete(folder)):
        damage = find_damage(path)
        if damage is None:
            return path
        log.warning("%s is damaged (%s): going back to the one before", path, damage)
    return None


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, fact in manifest["files"].items():
            file = path / name
            if not file.resolve().is_relative_to(path.resolve()):
                return f"{name} leads out of the folder"
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != fact["bytes"] or checksum(file) != fact["sha256"]:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: {type(error).__name__}: {error}"
    return None


def load_progress(path: Path) -> Progress:
    """Where the run stood.

    Raises:
        RunError: the checkpoint is of another format.
    """
    manifest = json.loads((path / MANIFEST).read_text())
    if manifest["format"] != FORMAT:
        raise RunError(
            f"{path}: checkpoint format {manifest['format']}, this version reads {FORMAT}: "
            f"use the version that wrote it"
        )
    return Progress(**manifest["progress"])


def checksum(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
