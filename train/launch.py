"""Starting the processes of a run on this machine."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from data.dataset import SPLITS
from data.shards import check
from data.shared_memory import clean_stale_shared_memory
from train import checkpoint_folder, run_folder
from train.config_file import load_config
from train.errors import EXIT_USER_ERROR, REFUSED_FILE, ConfigError
from train.resolve import resolve
from train.run_folder import RunFolder
from train.stop import (
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    SIGNALS,
    die_with_parent,
    hold_signals,
    ignore_signals,
)

_AGAIN_SECONDS = 1.0


def launch(config: str, overrides: Sequence[str], max_restarts: int = 0) -> None:
    """Check everything; then train in this process, or in torchrun's where the layout needs several.

    After a failure torchrun, which then starts a single process, too, starts all again, at most `max_restarts` times.

    Raises:
        ConfigError, RunError, LayoutError, InputError: the user's mistake, before any process is started.
    """
    under_launcher = "RANK" in os.environ
    if max_restarts and under_launcher:
        raise ConfigError(
            f"--max-restarts={max_restarts} is for processes that this command starts, but a launcher has started it "
            f"(RANK is set): give --max-restarts={max_restarts} to torchrun instead"
        )
    loaded = load_config(config, overrides)
    plan = resolve(loaded)
    folder = run_folder.folder_of(plan.config)
    run_folder.check_same_run(folder, plan)
    if plan.total_steps is not None and _reached(folder, plan.total_steps):
        print(f"{folder.path} is already done ({plan.total_steps} steps): raise run.steps to go on with it")
        return None
    if plan.config.data.on_bad_shard == "fail":
        check([source.info for source in plan.mixture], SPLITS)
    clean_stale_shared_memory()
    processes = plan.layout.world_size
    if under_launcher or (processes == 1 and not max_restarts):
        hold_signals()
        from train.worker import work  # only now: torch takes seconds

        work(loaded)
    folder.stopped.unlink(missing_ok=True)
    code = _run_torchrun(processes, max_restarts, ["-m", "train", config, *overrides])
    sys.exit(EXIT_STOPPED if code == 0 and folder.stopped.exists() else code)


def _reached(folder: RunFolder, step: int) -> bool:
    """Whether the newest checkpoint is of this step or a later one, and good; where it isn't, training says so."""
    newest = checkpoint_folder.complete(folder.checkpoints)[-1:]
    return any(
        checkpoint_folder.step_of(path) >= step and checkpoint_folder.find_damage(path) is None
        for path in newest
    )


def _run_torchrun(processes: int, max_restarts: int, command: Sequence[str]) -> int:
    """Run the command as a group of processes, pass signals on to them, and wait. Returns the exit code.

    torchrun itself ignores signals: it would end the workers before they have saved.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # torchrun tells workers to end only if another failed, and then there is nothing to wait for
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")
    # a store for each start: in a shared one those who start again find the addresses of the dead
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    options = ["--standalone", f"--nproc-per-node={processes}", f"--max-restarts={max_restarts}"]
    options.append("--signals-to-handle=SIGQUIT")
    torchrun = [sys.executable, "-m", "torch.distributed.run", *options, *command]
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(prefix="trireme-") as folder:
        refused = Path(folder) / "refused"
        environment = os.environ | {REFUSED_FILE: str(refused)}
        return _watch(subprocess.Popen(torchrun, preexec_fn=_keep_at_it, env=environment), refused)


def _watch(agent: "subprocess.Popen[bytes]", refused: Path) -> int:
    """Wait for torchrun, pass signals on, and end it where its workers refuse to train, as they would each time."""
    asked: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, _: asked.append(number))
    while True:
        with suppress(subprocess.TimeoutExpired):
            code = agent.wait(_AGAIN_SECONDS)
            return EXIT_USER_ERROR if refused.exists() else code
        if refused.exists():
            agent.kill()  # and its workers with it
            return EXIT_USER_ERROR
        if asked.count(signal.SIGINT) > 1:
            agent.kill()
            return EXIT_INTERRUPTED
        if asked:  # again and again: workers that have just been started miss it
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
