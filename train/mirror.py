"""A second place for checkpoints, anywhere that fsspec reaches: written in the background, read when one is lost."""

import logging
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import fsspec

from train.checkpoint_folder import (
    MANIFEST,
    Damaged,
    complete,
    file_names,
    find_damage,
    loss_of,
    step_in_name,
    step_of,
)
from train.commit import begin, finish, give_up, place, to_disk
from train.config import CheckpointConfig
from train.retention import reasons
from train.run_folder import RunFolder, vocabulary_files

log = logging.getLogger(__name__)


class Mirror:
    """`url`/NAME, laid out as the run's folder is; only rank 0 has one.

    A manifest is written last and removed first, so that a checkpoint that has one is whole. One is copied at a time.
    """

    def __init__(self, url: str, run: RunFolder, rules: CheckpointConfig) -> None:
        self.url = f"{url.rstrip('/')}/{run.path.name}"
        self.run, self.rules = run, rules
        self.sending: Path | None = None
        """What is being copied, and must stay."""
        self._files, self._root = fsspec.url_to_fs(self.url)
        self._checkpoints = f"{self._root}/{run.checkpoints.name}"
        self._thread = ThreadPoolExecutor(1, "mirror")
        self._jobs: list[Future[None]] = []

    def start(self, check: Callable[[RunFolder, str], None]) -> None:
        """Let `check` refuse what another run has left there, called with the run as it is there; then say what it is.

        Raises:
            OSError: it can't be written to.
            RunError: what `check` raises.
        """
        with tempfile.TemporaryDirectory() as folder:
            there = RunFolder(Path(folder))
            if self._files.exists(f"{self._root}/{there.config.name}"):
                for file in (self.run.config, *vocabulary_files(self.run)):
                    self._files.get_file(f"{self._root}/{file.name}", str(there.path / file.name))
                check(there, self.url)
        self._files.makedirs(self._checkpoints, exist_ok=True)
        for file in (self.run.config, *vocabulary_files(self.run)):
            self._files.put_file(str(file), f"{self._root}/{file.name}")

    def steps(self) -> list[int]:
        """Those of the whole checkpoints there, in order."""
        return [step for step in self._begun() if self._files.exists(self._at(step, MANIFEST))]

    def bring_back(self, after: int) -> Path | None:
        """Copy the newest checkpoint of a step after `after` into the run's folder. None where there is none."""
        for step in reversed(self.steps()):
            if step <= after:
                break
            path = place(self.run.checkpoints, step)
            try:
                self._fetch(step, path)
            except (Damaged, FileNotFoundError) as damage:
                give_up(path)
                log.warning(
                    "%s is damaged in the mirror (%s): going back to the one before", path.name, damage
                )
                continue
            log.warning("%s was gone or damaged: brought back from %s", path, self.url)
            return path
        return None

    def send(self) -> None:
        """Begin to copy what is missing there."""
        self._jobs.append(self._thread.submit(self.update))

    def update(self) -> None:
        """Copy what is missing there, the newest first, and remove what no rule keeps."""
        there = {step: self._files.cat_file(self._at(step, MANIFEST)) for step in self.steps()}
        damaged: set[Path] = set()
        while missing := [path for path in self._missing(there) if path not in damaged]:
            path = self.sending = missing[-1]
            try:
                if damage := find_damage(path):
                    damaged.add(path)
                    log.warning("%s is damaged (%s): not copied to %s", path, damage, self.url)
                else:
                    there[step_of(path)] = self._copy(path)
            finally:
                self.sending = None
        self._prune()

    @property
    def busy(self) -> bool:
        """Whether something is being copied."""
        return not all(job.done() for job in self._jobs)

    def check(self) -> None:
        """Say what went wrong since the last time; the next `send` tries again."""
        while self._jobs and self._jobs[0].done():
            error = self._jobs.pop(0).exception()
            if error is not None:
                what = type(error).__name__
                log.warning("%s is behind: %s: %s; the next save tries again", self.url, what, error)
                log.debug("where it went wrong", exc_info=error)

    def close(self) -> None:
        """Begin nothing more. What is on its way goes on to its end, or is gone on with by the next start."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._jobs = [job for job in self._jobs if not job.cancelled()]
        self.check()

    def _at(self, step: int, *names: str) -> str:
        return "/".join([self._checkpoints, place(self.run.checkpoints, step).name, *names])

    def _begun(self) -> list[int]:
        self._files.invalidate_cache()
        if not self._files.exists(self._checkpoints):
            return []
        names = (
            path.rstrip("/").rpartition("/")[2] for path in self._files.ls(self._checkpoints, detail=False)
        )
        return sorted(step for name in names if (step := step_in_name(name)) is not None)

    def _missing(self, there: Mapping[int, bytes]) -> list[Path]:
        """The checkpoints of the run that aren't there, or are others of the same step; oldest first.

        there: the manifests of those that are, by step.
        """
        return [
            path
            for path in complete(self.run.checkpoints)
            if step_of(path) not in there or there[step_of(path)] != (path / MANIFEST).read_bytes()
        ]

    def _copy(self, path: Path) -> bytes:
        """Returns its manifest."""
        step = step_of(path)
        self._remove(step)
        self._files.makedirs(self._at(step), exist_ok=True)
        for name in (*file_names(path), MANIFEST):
            self._files.put_file(str(path / name), self._at(step, name))
        return (path / MANIFEST).read_bytes()

    def _fetch(self, step: int, final: Path) -> None:
        aside = begin(final)
        self._files.get_file(self._at(step, MANIFEST), str(aside / MANIFEST))
        for name in file_names(aside):
            self._files.get_file(self._at(step, name), str(aside / name))
        if damage := find_damage(aside):
            raise Damaged(damage)
        for file in aside.iterdir():
            to_disk(file)
        finish(final)

    def _prune(self) -> None:
        whole = self.steps()
        kept = reasons(whole, self.rules, self._loss)
        for step in self._begun():
            if not kept.get(step):
                self._remove(step)

    def _loss(self, step: int) -> float | None:
        with tempfile.TemporaryDirectory() as folder:
            self._files.get_file(self._at(step, MANIFEST), str(Path(folder) / MANIFEST))
            return loss_of(Path(folder))

    def _remove(self, step: int) -> None:
        if self._files.exists(self._at(step, MANIFEST)):
            self._files.rm_file(self._at(step, MANIFEST))
        if self._files.exists(self._at(step)):
            self._files.rm(self._at(step), recursive=True)
