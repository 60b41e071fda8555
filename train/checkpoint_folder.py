"""The checkpoints of a run as they lie on the disk: which are whole, and where the run stood. Light to import."""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import xxhash

from train.errors import RunError

FORMAT = 2
_READABLE_FORMATS = (1, 2)
"""The first had SHA-256 for its files, which takes longer than writing them."""
_HASHES: dict[str, Callable[[], Any]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}
MANIFEST = "manifest.json"
UNFINISHED = ".tmp"
"""How the name of a folder ends that is being written, or removed."""
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)
_FILE_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
"""Of a file directly in the folder."""
_NAME = re.compile(r"step-(\d{8,})")


class Damaged(Exception):
    """A checkpoint isn't what was written; the message says in what."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands: what a checkpoint holds beside tensors."""

    step: int
    tokens: int
    data: dict[str, Any]
    """The position in the data, as `data.stream.TrainingStream.state_dict` gives it."""
    data_order_digest: str = "0" * 16
    """Of all global batches up to the step, as `train.order_digest.OrderDigest` gives it."""
    loss: float | None = None
    """Of the step's batch, before its update; None where none is known."""
    validation_loss: float | None = None
    """After the step; None where it wasn't evaluated."""
    faults: dict[str, Any] = field(default_factory=dict)
    """What went wrong so far, as `train.faults.health.Health` gives it."""


def complete(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if step_in_name(path.name) is not None]
    return sorted((path for path in named if (path / MANIFEST).is_file()), key=step_of)


def newest_step(folder: Path) -> int:
    """The step of the newest finished checkpoint, unchecked; 0 where there is none."""
    return max(map(step_of, complete(folder)), default=0)


def step_of(path: Path) -> int:
    """The step of a checkpoint, which its name says."""
    return int(path.name.removeprefix("step-"))


def step_in_name(name: str) -> int | None:
    """The step of a checkpoint by its folder's name; None where that is no checkpoint's."""
    found = _NAME.fullmatch(name)
    return None if found is None else int(found[1])


def remove(path: Path) -> None:
    """Remove a checkpoint, which at no time is there in part."""
    aside = path.with_suffix(f".removed{UNFINISHED}")
    path.rename(aside)
    shutil.rmtree(aside)


def clean_up(folder: Path, log: logging.Logger) -> None:
    """Remove what was left half written or half removed when a run was killed."""
    for path in folder.glob(f"step-*{UNFINISHED}"):
        log.warning("%s was left unfinished: removed", path)
        shutil.rmtree(path)


def latest(folder: Path, log: logging.Logger) -> Path | None:
    """The newest checkpoint whose files are as they were written; damaged ones are passed over, and named.

    Raises:
        RunError: a newer one is of another format.
    """
    for path in reversed(complete(folder)):
        damage = find_damage(path)
        if damage is None:
            return path
        log.warning("%s is damaged (%s): going back to the one before", path, damage)
    return None


def refuse_if_all_damaged(folder: Path) -> None:
    """Where no checkpoint of a run is good, let it not begin anew by itself, which would remove what can be saved.

    Raises:
        RunError: there are some.
    """
    named = [path for path in folder.iterdir() if step_in_name(path.name) is not None]
    if named:
        names = ", ".join(path.name for path in sorted(named, key=step_of))
        raise RunError(
            f"{folder}: all checkpoints are damaged ({names}): bring one back from a copy, such as checkpoint.mirror, "
            f"or move them away to begin anew"
        )


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None.

    Raises:
        RunError: it is of another format.
    """
    try:
        for name, fact in _read_files(path).items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != fact["bytes"] or not _has_hash(file, fact):
                return f"{name} is not what was written"
    except Damaged as damage:
        return str(damage)
    except _UNREADABLE as error:
        return f"{MANIFEST}: {type(error).__name__}: {error}"
    return None


def file_names(path: Path) -> list[str]:
    """Of the files that a checkpoint's manifest lists, each directly in its folder.

    Raises:
        Damaged: it can't be read, or leads out of the folder.
        RunError: it is of another format.
    """
    return list(_read_files(path))


def _read_files(path: Path) -> dict[str, dict[str, Any]]:
    try:
        files = dict(_read_manifest(path)["files"])
    except _UNREADABLE as error:
        raise Damaged(f"{MANIFEST}: {type(error).__name__}: {error}") from None
    for name in files:
        if not _FILE_NAME.fullmatch(name):
            raise Damaged(f"{MANIFEST}: {name!r} is no name of a file")
    return files


def load_progress(path: Path) -> Progress:
    """Where the run stood.

    Raises:
        RunError: the checkpoint is of another format.
    """
    return Progress(**_read_manifest(path)["progress"])


def progress_if_readable(path: Path) -> Progress | None:
    """Where the run stood; None where the manifest is damaged.

    Raises:
        RunError: the checkpoint is of another format.
    """
    try:
        return load_progress(path)
    except _UNREADABLE:
        return None


def loss_of(path: Path) -> float | None:
    """After the step, on validation data; None where it isn't known or no number.

    Raises:
        RunError: the checkpoint is of another format.
    """
    progress = progress_if_readable(path)
    loss = None if progress is None else progress.validation_loss
    return loss if loss is not None and isfinite(loss) else None


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    if manifest["format"] not in _READABLE_FORMATS:
        raise RunError(
            f"{path}: checkpoint format {manifest['format']}, this version reads {FORMAT} and older ones: "
            f"use the version that wrote it"
        )
    written = manifest.pop("sha256", None)  # those of before it was introduced lack it
    if written not in (None, digest(manifest)):
        raise ValueError("it is not what was written")
    return manifest


def digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's values, in hexadecimal."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _has_hash(file: Path, fact: Mapping[str, Any]) -> bool:
    """Whether a file's content has the hash that a manifest gives for it, by whichever algorithm."""
    (name,) = fact.keys() & _HASHES.keys()
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, _HASHES[name]).hexdigest() == fact[name]
