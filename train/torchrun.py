"""A torchrun on this machine: started, passed signals on to, waited for."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from train.errors import EXIT_USER_ERROR, FAILED_FILE, REFUSED_FILE
from train.stop import EXIT_INTERRUPTED, SIGNALS, die_with_parent, ignore_signals

_AGAIN_SECONDS = 1.0


@dataclass(frozen=True)
class Ended:
    """How a torchrun ended."""

    code: int
    """Its exit code, or 2 where its processes refused to train."""
    failed: int | None = None
    """The process that failed first, by its number on this machine."""


class Torchrun:
    """Starts torchruns one after another; from its making on it notes the signals that ask to stop."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        for number in SIGNALS:
            signal.signal(number, lambda number, _: self.asked.append(number))

    def run(
        self, processes: int, max_restarts: int, command: Sequence[str], environment: Mapping[str, str]
    ) -> Ended:
        """Run the command as a group of processes, pass signals on to them, and wait.

        torchrun itself ignores signals: it would end the workers before they have saved.
        """
        threads = max(1, (os.cpu_count() or 1) // processes)
        defaults = {
            "OMP_NUM_THREADS": str(threads),
            # torchrun tells workers to end only if another failed, and then there is nothing to wait for
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
            # a store for each start: in a shared one those who start again find the addresses of the dead
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        options = ["--standalone", f"--nproc-per-node={processes}", f"--max-restarts={max_restarts}"]
        options.append("--signals-to-handle=SIGQUIT")
        agent = [sys.executable, "-m", "train.agent", *options, *command]
        sys.stdout.flush()
        with tempfile.TemporaryDirectory(prefix="trireme-") as folder:
            refused, failed = Path(folder) / "refused", Path(folder) / "failed"
            files = {REFUSED_FILE: str(refused), FAILED_FILE: str(failed)}
            settings = defaults | os.environ | files | dict(environment)
            code = self._watch(subprocess.Popen(agent, preexec_fn=_keep_at_it, env=settings), refused)
            return Ended(code, int(failed.read_text()) if failed.exists() else None)

    def _watch(self, agent: "subprocess.Popen[bytes]", refused: Path) -> int:
        """Wait for torchrun, pass signals on, and end it where its workers refuse to train, as they would each time."""
        while True:
            with suppress(subprocess.TimeoutExpired):
                code = agent.wait(_AGAIN_SECONDS)
                return EXIT_USER_ERROR if refused.exists() else code
            if refused.exists():
                agent.kill()  # and its workers with it
                return EXIT_USER_ERROR
            if self.asked.count(signal.SIGINT) > 1:
                agent.kill()
                return EXIT_INTERRUPTED
            if self.asked:  # again and again: workers that have just been started miss it
                _ask_to_stop(agent.pid)


def _keep_at_it() -> None:
    """In torchrun, before it starts: go on until the workers end, or the launcher is gone."""
    ignore_signals()
    die_with_parent()


def _ask_to_stop(agent: int) -> None:
    """Tell torchrun's workers, each of which is in a session of its own."""
    for worker in psutil.Process(agent).children():
        with suppress(psutil.NoSuchProcess):
            worker.terminate()
