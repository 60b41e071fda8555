"""A thread that ends a process whose training stands still, as when a collective waits for a rank that never comes."""

import faulthandler
import logging
import os
import threading
import time
from pathlib import Path

from train.duration import format_seconds

log = logging.getLogger(__name__)

_OTHERS_SECONDS = 5.0
"""Between writing and the end, so that ranks that noticed a little later have written, too: a launcher ends them all
with the first."""


class Watchdog:
    """Watches from when it is made until it is closed; told of every step that ended."""

    def __init__(self, timeout: float | None, rank: int, step: int, file: Path) -> None:
        """timeout: seconds; None: nothing is watched. step: the last one done. file: gets the stacks."""
        self.timeout, self.rank, self.file = timeout or float("inf"), rank, file
        self._closed = threading.Event()
        self.beat(step)
        if timeout is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, step: int) -> None:
        """The step ended."""
        self._step, self._deadline = step, time.monotonic() + self.timeout

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(max(0.0, self._deadline - time.monotonic())):
            if time.monotonic() > self._deadline:
                self._end()

    def _end(self) -> None:
        """Say where this rank stands, and end the process with 1."""
        waited = format_seconds(self.timeout)
        log.error(
            "rank %d hangs: step %d didn't end within %s (faults.hang_timeout); the stack of every thread stands in %s",
            *(self.rank, self._step + 1, waited, self.file),
        )
        with self.file.open("a") as file:
            file.write(f"rank {self.rank}, in step {self._step + 1}:\n")
            file.flush()
            faulthandler.dump_traceback(file)
        time.sleep(_OTHERS_SECONDS)
        os._exit(1)
