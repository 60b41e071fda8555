"""Removing the shared memory that killed runs left behind."""

import os
import re
import tempfile
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")
_SEGMENT = re.compile(
    r"(\d{6})_(locals|barrier|next_epoch|cache_usage|shard_states|shard_access_times|resume|epoch_shape|epoch_data)"
)
_LOCK = re.compile(r"(\d{6})_(barrier|cache)_filelock")


def clean_stale_shared_memory() -> list[str]:
    """Remove this user's streaming segments that no living process has mapped, and lock files without segments.

    Call it in one process of each node, before the ranks start. streaming has a function of this name too; that
    one stops at the first free number, so that most segments stay, and removes those of living runs.
    Returns the names of the removed segments. Does nothing where there is no /dev/shm.
    """
    if not _SHARED_MEMORY.is_dir():
        return []
    segments = [path for path in _SHARED_MEMORY.iterdir() if _SEGMENT.fullmatch(path.name) and _ours(path)]
    mapped = _mapped() if segments else set()
    stale = [path for path in segments if str(path) not in mapped]
    for path in stale:
        path.unlink(missing_ok=True)
    in_use = {name[:6] for name in os.listdir(_SHARED_MEMORY) if _SEGMENT.fullmatch(name)}  # noqa: PTH208
    for path in Path(tempfile.gettempdir()).iterdir():
        if (match := _LOCK.fullmatch(path.name)) and match[1] not in in_use and _ours(path):
            path.unlink(missing_ok=True)
    return [path.name for path in stale]


def _ours(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.getuid()
    except FileNotFoundError:
        return False


def _mapped() -> set[str]:
    """The shared memory that processes which we may look into have mapped: all of this user's are among them."""
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text(errors="replace").splitlines()
        except OSError:  # it has ended, or belongs to another user
            continue
        found.update(line[line.index("/dev/shm/") :] for line in lines if "/dev/shm/" in line)
    return found
