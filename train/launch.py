"""Starting the processes of a run on this machine."""

import os
import sys
from collections.abc import Mapping, Sequence

from data.dataset import SPLITS
from data.shards import check
from data.shared_memory import clean_stale_shared_memory
from train import checkpoint_folder, run_folder
from train.config_file import load_config
from train.elastic import keep_training
from train.errors import ConfigError
from train.resolve import resolve
from train.run_folder import RunFolder
from train.stop import EXIT_STOPPED, hold_signals
from train.torchrun import Ended, Torchrun


def launch(config: str, overrides: Sequence[str], max_restarts: int = 0, elastic: bool = False) -> None:
    """Check everything; then train in this process, or in torchrun's where the layout needs several.

    After a failure torchrun, which then starts a single process, too, starts all again, at most `max_restarts` times.
    elastic: without a process that keeps dying; see `train.elastic`.

    Raises:
        ConfigError, RunError, LayoutError, InputError: the user's mistake, before any process is started.
    """
    under_launcher = "RANK" in os.environ
    if max_restarts and under_launcher:
        raise ConfigError(
            f"--max-restarts={max_restarts} is for processes that this command starts, but a launcher has started it "
            f"(RANK is set): give --max-restarts={max_restarts} to torchrun instead"
        )
    if elastic and not max_restarts:
        raise ConfigError(
            "--elastic leaves out a process that keeps dying: it needs --max-restarts=3, or another number"
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
    torchrun = Torchrun()

    def start(count: int, settings: Sequence[str], environment: Mapping[str, str]) -> Ended:
        worker = ["-m", "train", config, *settings]
        return torchrun.run(count, 0 if elastic else max_restarts, worker, environment)

    if elastic:
        code = keep_training(start, config, overrides, plan, max_restarts, lambda: bool(torchrun.asked))
    else:
        code = start(processes, overrides, {}).code
    sys.exit(EXIT_STOPPED if code == 0 and folder.stopped.exists() else code)


def _reached(folder: RunFolder, step: int) -> bool:
    """Whether the newest checkpoint is of this step or a later one, and good; where it isn't, training says so."""
    newest = checkpoint_folder.complete(folder.checkpoints)[-1:]
    return any(
        checkpoint_folder.step_of(path) >= step and checkpoint_folder.find_damage(path) is None
        for path in newest
    )
