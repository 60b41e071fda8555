"""A run under its faults, one after the other, from the first start to its end."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.deal import DEALS, Run
from benchmarks.faults.schedule import KINDS, Fault

_LOOK_SECONDS = 0.02
_AT_MOST_SECONDS = 300.0
"""Until a run reaches its next fault, or ends."""


@dataclass
class Outcome:
    """What became of a fault."""

    fault: Fault
    struck: float
    """Seconds, monotonic."""
    redo: int
    """The step after which all that was lost is made up for."""
    wrong: str | None = None
    """What was not as it should be."""
    lost_seconds: float | None = None
    """Until that step was done; None: the run never got there."""


class Storm:
    """Has faults strike a run in their order."""

    def __init__(self, run: Run, faults: list[Fault], say: Callable[[str], None]) -> None:
        self.run, self.faults, self.say = run, faults, say
        self.outcomes: list[Outcome] = []

    def pass_over(self) -> list[Outcome]:
        """From the first start to the end of the run.

        Raises:
            RuntimeError: the run ended too early, or comes to no end.
        """
        self.run.start()
        for index in range(len(self.faults)):
            self._strike(index)
        self._await(lambda: self.run.process.poll() is not None, "its end")
        if self.run.process.returncode != 0:
            raise RuntimeError(f"the run ended with {self.run.process.returncode}: see {self.run.log}")
        self._note_progress()
        return self.outcomes

    def _strike(self, index: int) -> None:
        fault, plan = self.faults[index], self.run.plan
        kind = KINDS[fault.kind]
        self._await(lambda: plan.reached(index) is not None, f"fault {index}: {fault}")
        reached = plan.reached(index)
        assert reached is not None
        outcome = Outcome(fault, time.monotonic(), max(reached.step, self._told() + 1))
        self.outcomes.append(outcome)
        if fault.kind in DEALS:  # else the rank brings it about
            outcome.wrong = DEALS[fault.kind](self.run, index, reached)
        if kind.code is not None:
            code = self.run.process.wait(_AT_MOST_SECONDS)
            if code != kind.code:
                outcome.wrong = f"the command ended with {code}, not with {kind.code}"
        plan.end(index)
        told = f"{index + 1:3} step {reached.step:4}  {fault.kind} ({fault.point}, rank {fault.rank})"
        self.say(f"{told}: {outcome.wrong}" if outcome.wrong else told)
        if kind.code is not None:
            self.run.start()

    def _await(self, there: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _AT_MOST_SECONDS
        while not there():
            self._note_progress()
            code = self.run.process.poll()
            if code is not None and not there():
                raise RuntimeError(f"the run ended with {code} before {what}: see {self.run.log}")
            if time.monotonic() > deadline:
                self.run.kill()
                raise RuntimeError(f"the run never came to {what}: see {self.run.log}")
            time.sleep(_LOOK_SECONDS)

    def _note_progress(self) -> None:
        told = self._told()
        for outcome in self.outcomes:
            if outcome.lost_seconds is None and told >= outcome.redo:
                outcome.lost_seconds = time.monotonic() - outcome.struck

    def _told(self) -> int:
        """The newest step in the metrics."""
        lines = _last_bytes(self.run.folder.metrics).splitlines()[:-1]
        return json.loads(lines[-1])["step"] if len(lines) > 1 else 0


def _last_bytes(file: Path, count: int = 5000) -> bytes:
    """The end of a file, with whatever line is cut at either side; an end of line ends the last whole one."""
    if not file.is_file():
        return b""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - count))
        return stream.read() + b"|"
