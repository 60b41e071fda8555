"""Saves of a run: while the loop waits, or in the background, from a copy in the host's memory."""

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from parallel.processes import any_rank
from train import checkpoint
from train.checkpoint_folder import Progress
from train.config import CheckpointConfig

log = logging.getLogger(__name__)


class Saver:
    """Writes checkpoints into `folder`; every method is called by all ranks together.

    In the background there is one at a time, whose ranks talk in a group of their own: the loop's collectives go on
    meanwhile.
    """

    def __init__(self, folder: Path, rules: CheckpointConfig, origin: Mapping[str, Any]) -> None:
        self.folder, self.rules, self.origin = folder, rules, origin
        self._group = dist.new_group(backend="gloo") if rules.asynchronous else None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None
        pinned = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(pinned, False, False, False))

    def save(self, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        """Write a checkpoint, or copy the tensors and begin to write it, once the one before is written.

        Raises:
            RunError: the disk is full, or can't be written to; in the background, of the save before.
        """
        arguments = (progress, self.rules, self.origin, self._group)
        if self._group is None:
            log.debug("saved %s", checkpoint.save(self.folder, tensors, *arguments))
            return
        self.wait()
        copied = self._stager.stage(dict(tensors))
        assert isinstance(copied, dict)
        self._writing = self._thread.submit(checkpoint.save, self.folder, copied, *arguments)

    def check(self) -> None:
        """Raise what a save in the background failed with, if it has come to its end: on all ranks alike."""
        if self._writing is not None and any_rank(self._writing.done()):
            self.wait()

    def wait(self) -> None:
        """Wait for the save in the background, if there is one, and raise what it failed with."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            log.debug("saved %s", writing.result())

    def close(self) -> None:
        """Wait, and let go of the thread and its group."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._stager.close()
            if self._group is not None:
                dist.destroy_process_group(self._group)
