"""The names of shared memory: taking one, and removing what killed runs left behind."""

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")
_SEGMENT = re.compile(
    r"(\d{6})_(locals|barrier|next_epoch|cache_usage|shard_states|shard_access_times|resume|epoch_shape|epoch_data)"
)
_LOCK = re.compile(r"(\d{6})_(barrier|cache)_filelock")


@contextmanager
def choosing_names() -> Iterator[None]:
    """Keep this user's other processes on this node from choosing or removing segments meanwhile.

    Within it nobody may wait for another process, on which all runs of the user would wait. The lock is beside the
    segments, since jobs on one node may have folders of their own for temporary files.
    """
    folder = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    lock = folder / f"trireme-{os.getuid()}-shared-memory.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # given up when the file is closed, or the process ends
        yield


def free_number() -> int:
    """The first number that no segment and no lock file bears, to be taken within `choosing_names`."""
    folders = (_SHARED_MEMORY, Path(tempfile.gettempdir()))
    names = [path.name for folder in folders if folder.is_dir() for path in folder.iterdir()]
    matches = (_SEGMENT.fullmatch(name) or _LOCK.fullmatch(name) for name in names)
    taken = {int(match[1]) for match in matches if match}
    return next(number for number in count() if number not in taken)


def clean_stale_shared_memory() -> list[str]:
    """Remove this user's streaming segments of runs that no living process has mapped, and lock files without any.

    Call it in one process of each node, before the ranks start. streaming has a function of this name too; that
    one stops at the first free number, so that most segments stay, and removes those of living runs.
    Returns the names of the removed segments. Does nothing where there is no /dev/shm.
    """
    if not _SHARED_MEMORY.is_dir():
        return []
    with choosing_names():
        return _clean()


def _clean() -> list[str]:
    segments = {
        path: stat.st_ino
        for path in _SHARED_MEMORY.iterdir()
        if _SEGMENT.fullmatch(path.name) and (stat := _ours(path))
    }
    # A run's short-lived segments are at times mapped by no process, but its others are: it lives or dies whole.
    mapped = _mapped() if segments else set()
    alive = {path.name[:6] for path, inode in segments.items() if inode in mapped}
    stale = [path for path in segments if path.name[:6] not in alive]
    for path in stale:
        path.unlink(missing_ok=True)
    in_use = {name[:6] for name in os.listdir(_SHARED_MEMORY) if _SEGMENT.fullmatch(name)}  # noqa: PTH208
    for path in Path(tempfile.gettempdir()).iterdir():
        if (match := _LOCK.fullmatch(path.name)) and match[1] not in in_use and _ours(path):
            path.unlink(missing_ok=True)
    return [path.name for path in stale]


def _ours(path: Path) -> os.stat_result | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat if stat.st_uid == os.getuid() else None


def _mapped() -> set[int]:
    """The inodes of shared memory that processes have mapped which we may look into: all of this user's are.

    Not the names: a living process may hold a removed segment, whose name a later run bore.
    """
    found: set[int] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text(errors="replace").splitlines()
        except OSError:  # it has ended, or belongs to another user
            continue
        found.update(int(line.split()[4]) for line in lines if "/dev/shm/" in line)
    return found
