"""A process of a run, from its place in the group to its end."""

import logging
import os
import sys
import threading
from functools import partial
from typing import NoReturn

import torch.distributed as dist

from parallel.processes import end_process, pick_device, process_group
from train import run_folder
from train.agree import on_first_rank
from train.config_file import Loaded
from train.errors import of_disk
from train.faults.health import GaveUp
from train.faults.memory import OutOfMemory
from train.resolve import resolve
from train.run import run
from train.run_folder import RunFolder
from train.stop import EXIT_STOPPED, Stopped, listen

EXIT_FAILED = 1

log = logging.getLogger(__name__)


def work(loaded: Loaded) -> NoReturn:
    """Check, join the group, train, and end the process. Every rank checks alike, so a user's mistake stops all.

    A run that a signal stopped has a file that says so in its folder, since torchrun passes no exit code on; under
    torchrun, which would start the ranks again, the code is 0.

    Raises:
        ConfigError, RunError, LayoutError, InputError: the user's mistake.
    """
    plan = resolve(loaded)
    folder = run_folder.folder_of(plan.config)
    run_folder.check_same_run(folder, plan)
    device = pick_device()
    code = 0
    with process_group(device):
        on_first_rank(lambda: run_folder.create(folder, plan), f"{folder.path} can't be written")
        _log_to(folder)
        try:
            run(plan, device, partial(listen, plan.config.run.grace_time))
        except Stopped as stopped:
            log.info("%s: the same command goes on from there", stopped)
            on_first_rank(
                partial(folder.stopped.write_text, f"{stopped}\n"), f"{folder.stopped}: not written"
            )
            code = 0 if "TORCHELASTIC_RUN_ID" in os.environ else EXIT_STOPPED
        except GaveUp as gave_up:
            if dist.get_rank() == 0:
                print(f"error: {gave_up}", file=sys.stderr)
            code = EXIT_FAILED
        except OutOfMemory as error:
            log.error("%s", error)
            end_process(EXIT_FAILED)  # the others, which wait for this rank, end when it is gone
        dist.barrier()
    end_process(code)


class LogFile(logging.FileHandler):
    """A file that, once it can't be written, which is said, gets no more."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Called in place of a traceback for each line."""
        print(f"warning: {self.baseFilename}: {sys.exception()}: no more is written there", file=sys.stderr)
        self.setLevel(logging.CRITICAL + 1)


def _log_to(folder: RunFolder) -> None:
    """All that a rank logs goes into a file of its own; what matters to a person, on rank 0, also to the screen.

    Raises:
        RunError: the file can't be made.
    """
    rank = dist.get_rank()
    try:
        to_file = LogFile(folder.log_of(rank))
    except OSError as error:
        raise of_disk(f"{folder.log_of(rank)} can't be written", error) from None
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_screen = logging.StreamHandler(sys.stdout)
    to_screen.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    ours = logging.getLogger("train")
    ours.setLevel(logging.DEBUG)
    ours.addHandler(to_screen)
    logging.basicConfig(level=logging.WARNING, handlers=[to_file])
    logging.captureWarnings(True)
    threading.excepthook = _tell_of_thread


def _tell_of_thread(args: threading.ExceptHookArgs) -> None:
    """As usual, but for TensorBoard's: what that failed with comes out at the next step, and is told there."""
    if type(args.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
        threading.__excepthook__(args)
