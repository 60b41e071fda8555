"""Saves of a run: while the loop waits, or in the background, from a copy in the host's memory."""

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from parallel.processes import any_rank
from train import checkpoint
from train.checkpoint_folder import Progress
from train.config import CheckpointConfig
from train.errors import NoSpace, RunError
from train.host_copy import HostCopy
from train.mirror import Mirror

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_GO_ON = "give the same command again: it goes on from the newest checkpoint"


class Saver:
    """Writes checkpoints into `folder`; every method is called by all ranks together.

    In the background there is one at a time, whose ranks talk in a group of their own: the loop's collectives go on
    meanwhile. The copy, too, is made beside the next step's forward and backward, which don't change what is saved;
    its update has to wait for it.

    mirror: on rank 0, where what is saved is copied to.
    """

    def __init__(
        self,
        folder: Path,
        rules: CheckpointConfig,
        origin: Mapping[str, Any],
        mirror: Mirror | None = None,
    ) -> None:
        self.folder, self.rules, self.origin, self._mirror = folder, rules, origin, mirror
        self.missed = 0
        """Saves in a row that found no room on the disk, up to the newest one that has come to its end."""
        self._missed: NoSpace | None = None
        self._group = dist.new_group(backend="gloo") if rules.asynchronous else None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._copy = HostCopy(self._thread)
        self._copying: Future[dict[str, Tensor]] | None = None
        self._writing: Future[Path] | None = None

    def save(self, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        """Write a checkpoint, or begin to copy the tensors and to write it, once the one before is written.

        Before the tensors change, `wait_for_copy`. Where the disk is full it is missed, aloud, and the next one tries
        again.

        Raises:
            RunError: it can't be written, or was missed too often in a row; in the background, the save before.
        """
        arguments = (progress, self.rules, self.origin, self._group, self._spare)
        if self._group is None:
            self._note(lambda: checkpoint.save(self.folder, tensors, *arguments))
            return
        self.wait()
        copying = self._copying = self._copy.begin(tensors)
        # after it, in the same thread
        self._writing = self._thread.submit(
            lambda: checkpoint.save(self.folder, copying.result(), *arguments)
        )

    def wait_for_copy(self) -> None:
        """Wait until what was given to `save` may change."""
        if self._copying is not None:
            copying, self._copying = self._copying, None
            copying.result()

    def check(self) -> None:
        """Note how a save in the background went, if it has come to its end: on all ranks alike. Raises as `save`."""
        if self._mirror is not None:
            self._mirror.check()
        if self._writing is not None and any_rank(self._writing.done()):
            self.wait()

    def wait(self) -> None:
        """Wait for the save in the background, if there is one, and note how it went. Raises as `save`."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._note(writing.result)

    def finish(self) -> None:
        """Wait for the last save of a run.

        Raises:
            RunError: it can't be written, or was missed, since no other follows.
        """
        self.wait()
        if self._missed is not None:
            raise RunError(f"{self._missed} and {_GO_ON}")

    def wait_for_mirror(self) -> None:
        """Wait until all that was saved is copied, or couldn't be, which is said."""
        while any_rank(self._mirror is not None and self._mirror.busy):
            time.sleep(_POLL_SECONDS)

    def _spare(self) -> Path | None:
        return None if self._mirror is None else self._mirror.sending

    def _note(self, save: Callable[[], Path]) -> None:
        """Count misses, which all ranks have alike."""
        try:
            log.debug("saved %s", save())
            self.missed, self._missed = 0, None
            if self._mirror is not None:
                self._mirror.send()
        except NoSpace as error:
            self.missed, self._missed = self.missed + 1, error
            most = self.rules.max_missed_saves
            if self.missed > most:
                raise RunError(
                    f"{error} and {_GO_ON}; {self.missed} saves in a row found no room (checkpoint.max_missed_saves)"
                ) from None
            log.warning(
                "%s; training goes on, and the next save tries again (%d missed in a row, of at most %d)",
                *(error, self.missed, most),
            )
        except RunError as error:
            raise RunError(f"{error}: mend that, and {_GO_ON}") from None

    def close(self) -> None:
        """Wait, and let go of the thread and its group. Raises as `save`."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._copy.close()
            if self._mirror is not None:
                self._mirror.close()
            if self._group is not None:
                dist.destroy_process_group(self._group)
