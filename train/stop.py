"""Being asked to stop by a signal: noted at once, acted on when the step is done. Light to import.

From the start of a process until its training begins the signals are held back, since connecting to the other ranks
fails when it is interrupted, and helpers that libraries start meanwhile would be killed by them.
"""

import ctypes
import faulthandler
import os
import signal
import sys
import time
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""What asks a run to stop: a launcher, Ctrl-C, and a cluster ahead of a time limit."""

EXIT_STOPPED = 75
"""Stopped by a signal, checkpoint saved, start me again (EX_TEMPFAIL)."""
EXIT_INTERRUPTED = 128 + signal.SIGINT

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_ONE_PRESS_SECONDS = 1.0  # a terminal and torchrun each pass the same Ctrl-C on


class Stopped(Exception):
    """Training stopped, since a signal asked for it, after a step of which there is a checkpoint."""


@dataclass
class Stop:
    """Whether a signal has asked this process to stop."""

    requested: signal.Signals | None = None
    asked_at: float = 0.0
    grace_seconds: float | None = None
    """From the request to the end of the process; None before training begins."""

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal. Clusters and launchers send it more than once."""
        now = time.monotonic()
        if self.requested is None:
            self.requested, self.asked_at = signal.Signals(number), now
            self.limit()
        elif number == signal.SIGINT and now - self.asked_at > _ONE_PRESS_SECONDS:
            os._exit(EXIT_INTERRUPTED)

    def limit(self) -> None:
        """A process that is asked to stop and still there after its grace shows where it stands, and ends with 1."""
        if self.requested is not None and self.grace_seconds is not None:
            faulthandler.dump_traceback_later(self.grace_seconds, exit=True)


_stop = Stop()


def hold_signals() -> None:
    """Note what asks this process to stop, and have it wait until `listen` where libraries don't let it through."""
    for number in SIGNALS:
        signal.signal(number, _stop.note)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def ignore_signals() -> None:
    """Let what asks to stop pass by; processes that are started ignore it likewise until they hold it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def die_with_parent() -> None:
    """Be killed when the process that started this one is gone, as torchrun's workers otherwise aren't."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def listen(grace_seconds: float) -> Stop:
    """Training begins: from now on signals come at once, those that were held back included.

    A second Ctrl-C ends the process, and so does the end of the grace time, in seconds.
    """
    _stop.grace_seconds = grace_seconds
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    _stop.limit()
    return _stop


def training_began() -> bool:
    """Whether `listen` was called in this process."""
    return _stop.grace_seconds is not None
