"""Faults from outside: what is done to the processes and files of a run."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.faults.plan import Plan, Reached
from data.dataset import open_dataset
from data.shards import read_index
from data.shared_memory import choosing_names, free_number
from train.checkpoint_folder import MANIFEST, complete
from train.run_folder import RunFolder

_PASSED_ON_SECONDS = 1.5
"""A launcher passes signals on within this time."""
_PAUSE_SECONDS = 2.0
_ROOT = Path(__file__).parent.parent.parent


class Run:
    """A run that is disturbed: its newest process, and its files."""

    def __init__(
        self, folder: RunFolder, dataset: Path, plan: Plan, config: Path, restarts: int, log: Path
    ) -> None:
        """restarts: how often torchrun may start the ranks again."""
        self.folder, self.dataset, self.plan, self.log = folder, dataset, plan, log
        self.starts = 0
        self.command = [sys.executable, "-m", "train.cli", "train", str(config)]
        self.command += [f"run.name={folder.path.name}", f"--max-restarts={restarts}"]
        path = [str(_ROOT / "benchmarks" / "faults" / "path"), str(_ROOT)]
        self.environment = os.environ | {"TRIREME_CHAOS": str(plan.folder), "PYTHONPATH": ":".join(path)}

    def start(self) -> None:
        """Give the command again; every second time it saves in the background."""
        background = self.starts % 2 == 1
        self.starts += 1
        self.process = self._give(f"checkpoint.asynchronous={background}")

    def refused(self) -> bool:
        """Whether the command now ends with a user's error."""
        return self._give().wait() == 2

    def kill(self) -> None:
        """All processes at once, as a cluster does."""
        command = psutil.Process(self.process.pid)
        for process in [*command.children(recursive=True), command]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def _give(self, *overrides: str) -> "subprocess.Popen[bytes]":
        with self.log.open("ab") as log:
            return subprocess.Popen([*self.command, *overrides], stdout=log, stderr=log, env=self.environment)


Deal = Callable[[Run, int, Reached], str | None]
"""Brings a fault about; index: the fault's number. Returns what was not as it should be."""


def _kill(whom: Callable[[Run, Reached], int]) -> Deal:
    def deal(run: Run, index: int, reached: Reached) -> None:
        os.kill(whom(run, reached), signal.SIGKILL)

    return deal


def _ask(number: signal.Signals, whom: Callable[[Run, Reached], int]) -> Deal:
    """Signal, and let the rank go on when it has got it."""

    def deal(run: Run, index: int, reached: Reached) -> None:
        os.kill(whom(run, reached), number)
        time.sleep(_PASSED_ON_SECONDS)
        run.plan.release(index)

    return deal


def _launcher(run: Run, reached: Reached) -> int:
    return run.process.pid


def _agent(run: Run, reached: Reached) -> int:
    return reached.agent


def _worker(run: Run, reached: Reached) -> int:
    return reached.pid


def _kill_all(run: Run, index: int, reached: Reached) -> None:
    run.kill()


def _interrupt_twice(run: Run, index: int, reached: Reached) -> None:
    run.process.send_signal(signal.SIGINT)
    time.sleep(_PASSED_ON_SECONDS)
    run.process.send_signal(signal.SIGINT)


def _stop_for_ever(run: Run, index: int, reached: Reached) -> None:
    os.kill(reached.pid, signal.SIGSTOP)


def _stop_for_a_while(run: Run, index: int, reached: Reached) -> None:
    os.kill(reached.pid, signal.SIGSTOP)
    time.sleep(_PAUSE_SECONDS)
    os.kill(reached.pid, signal.SIGCONT)
    run.plan.release(index)


def _damaging(damage: Callable[[Path, random.Random], None]) -> Deal:
    """Kill all, then damage the newest checkpoint, if there is one before it: without a good one a run is refused."""

    def deal(run: Run, index: int, reached: Reached) -> None:
        run.kill()
        for newest in complete(run.folder.checkpoints)[1:][-1:]:
            damage(newest, random.Random(index))

    return deal


def _tensors(checkpoint: Path, chance: random.Random) -> Path:
    return chance.choice(sorted(checkpoint.rglob("*.safetensors")))


def _flip_a_bit(checkpoint: Path, chance: random.Random) -> None:
    file = _tensors(checkpoint, chance)
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def _cut_short(checkpoint: Path, chance: random.Random) -> None:
    file = _tensors(checkpoint, chance)
    os.truncate(file, chance.randrange(file.stat().st_size))


def _lose_a_file(checkpoint: Path, chance: random.Random) -> None:
    _tensors(checkpoint, chance).unlink()


def _garble_manifest(checkpoint: Path, chance: random.Random) -> None:
    file = checkpoint / MANIFEST
    os.truncate(file, chance.randrange(1, file.stat().st_size))


def _leave_half_written(checkpoint: Path, chance: random.Random) -> None:
    step = int(checkpoint.name.removeprefix("step-"))
    half = shutil.copytree(checkpoint, checkpoint.with_name(f"step-{step + 1:08d}.tmp"))
    (half / MANIFEST).unlink()
    _cut_short(half, chance)


def _leave_shared_memory(run: Run, index: int, reached: Reached) -> None:
    """That of the killed run, and that of another one."""
    run.kill()
    with choosing_names():
        number = free_number()
        for name in ("locals", "barrier", "shard_states"):
            Path(f"/dev/shm/{number:06d}_{name}").write_bytes(b"\xff" * 16)


def _missing_shard(run: Run, index: int, reached: Reached) -> str | None:
    run.kill()
    shard = _shard(run)
    aside = shard.rename(shard.with_suffix(".aside"))
    refused = run.refused()
    aside.rename(shard)
    return None if refused else "the command did not refuse data without a shard"


def _damaged_shard(run: Run, index: int, reached: Reached) -> str | None:
    run.kill()
    shard = _shard(run)
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused = run.refused()
    shard.write_bytes(content)
    return None if refused else "the command did not refuse data with a damaged shard"


def _shard(run: Run) -> Path:
    return read_index(open_dataset(run.dataset), "train")[0].path


DEALS: dict[str, Deal] = {
    "a worker is killed": _kill(_worker),
    "torchrun is killed": _kill(_agent),
    "the launcher is killed": _kill(_launcher),
    "all processes are killed": _kill_all,
    "SIGTERM": _ask(signal.SIGTERM, _launcher),
    "SIGUSR1": _ask(signal.SIGUSR1, _launcher),
    "SIGUSR2": _ask(signal.SIGUSR2, _launcher),
    "SIGUSR1 to one worker": _ask(signal.SIGUSR1, _worker),
    "Ctrl-C": _ask(signal.SIGINT, _launcher),
    "Ctrl-C twice": _interrupt_twice,
    "a bit of the newest checkpoint flips": _damaging(_flip_a_bit),
    "the newest checkpoint is cut short": _damaging(_cut_short),
    "a file of the newest checkpoint is gone": _damaging(_lose_a_file),
    "the newest checkpoint's manifest is garbled": _damaging(_garble_manifest),
    "a half-written checkpoint is left": _damaging(_leave_half_written),
    "stale shared memory is left": _leave_shared_memory,
    "a shard of the data is gone": _missing_shard,
    "a shard of the data is damaged": _damaged_shard,
    "a worker is stopped for ever": _stop_for_ever,
    "a worker is stopped for a while": _stop_for_a_while,
}
"""Those that a rank doesn't bring about by itself; see `benchmarks.faults.planted.FROM_WITHIN`."""
