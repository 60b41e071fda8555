"""Files that grow by a line at a time while a run goes on."""

import json
import logging
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class Lines:
    """A JSON object a line, readable meanwhile. What can't be written, which is said, is kept until it can."""

    def __init__(self, path: Path) -> None:
        """The file is made with the first line."""
        self.path = path
        self.file: FileIO | None = None
        self._unwritten = b""

    def append(self, values: Mapping[str, Any]) -> None:
        """Append a line."""
        told = bool(self._unwritten)
        self._unwritten += json.dumps(values).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not told:
                log.warning("%s: %s: written once it can be", self.path, error)

    def close(self) -> None:
        """Write what is left, if it can be, and close the file."""
        try:
            self._write()
        except OSError as error:
            log.warning("%s: %s: its last lines are lost", self.path, error)
        if self.file is not None:
            self.file.close()

    def _write(self) -> None:
        while self._unwritten:
            if self.file is None:
                self.file = FileIO(self.path, "ab")
            self._unwritten = self._unwritten[self.file.write(self._unwritten) :]
