"""How a checkpoint comes to be there: written aside, described by a manifest, on the disk, and only then renamed."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from train.checkpoint_folder import FORMAT, MANIFEST, UNFINISHED, Progress, digest, remove
from train.tensor_files import Written


def place(folder: Path, step: int) -> Path:
    """Of a step's checkpoint among those of a run."""
    return folder / f"step-{step:08d}"


def begin(final: Path) -> Path:
    """Make the folder to write in, which becomes `final` in the end.

    Raises:
        OSError: it can't be made, as where the run's folder is gone.
    """
    give_up(final)
    final.parent.mkdir(exist_ok=True)
    aside = _aside(final)
    aside.mkdir()
    return aside


def give_up(final: Path) -> None:
    """Remove what was begun."""
    aside = _aside(final)
    if aside.exists():
        shutil.rmtree(aside)


def _aside(final: Path) -> Path:
    return final.with_suffix(UNFINISHED)


def commit(final: Path, written: Sequence[Written], progress: Progress, origin: Mapping[str, Any]) -> None:
    """Let what was written aside be the checkpoint `final`; `origin` is what else its manifest says."""
    aside = _aside(final)
    libraries = ["trireme", "torch", *(["deepspeed"] if origin.get("engine") == "deepspeed" else [])]
    manifest = {
        "format": FORMAT,
        "versions": {name: version(name) for name in libraries},
        **origin,
        "progress": asdict(progress),
        "files": {file.name: {"bytes": file.bytes, "xxh3_128": file.xxh3_128} for file in written},
    }
    manifest_file = aside / MANIFEST
    manifest_file.write_text(json.dumps(manifest | {"sha256": digest(manifest)}, indent=1) + "\n")
    to_disk(manifest_file)
    finish(final)


def finish(final: Path) -> None:
    """A whole checkpoint, whose files are on the disk, gets its name."""
    aside = _aside(final)
    to_disk(aside)
    if final.exists():  # the same step again, after going back to an earlier checkpoint
        remove(final)
    aside.rename(final)
    to_disk(final.parent)


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
