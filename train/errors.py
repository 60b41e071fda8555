"""What goes wrong by the user's doing, and how it is told: one line, exit code 2."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from data.errors import InputError
from model.errors import ConversionError
from parallel.errors import LayoutError
from slurm.errors import SlurmError

EXIT_USER_ERROR = 2
REFUSED_FILE = "TRIREME_REFUSED_FILE"
"""In the environment of ranks: a file that they make where a user's error ends them before training begins, or in their
last start. torchrun would start them again, and passes no exit code on."""

FAILED_FILE = "TRIREME_FAILED_FILE"
"""In the environment of torchrun: a file that gets the process that failed first, by its number on this machine."""


class ConfigError(Exception):
    """The configuration, or what it names, is wrong. The message is one line that says what would work."""


class RunError(Exception):
    """A run folder is not what the command needs. The message is one line that says what would do."""


class NoSpace(RunError):
    """A disk is full, or a quota is used up."""


def no_space(error: OSError) -> bool:
    """Whether it says that a disk is full or a quota is used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def of_disk(what: str, error: OSError) -> RunError:
    """A failure of the file system as an error to be told in one line, which begins with `what`."""
    told = f"{what}: {type(error).__name__}: {error}"
    if no_space(error):
        return NoSpace(f"{told}: free some space")
    return RunError(told)


USER_ERRORS = (ConfigError, RunError, InputError, LayoutError, ConversionError, SlurmError)


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Print a user's error as one line on stderr and exit with code 2."""
    try:
        yield
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        if "torch.distributed" in sys.modules:
            from parallel.processes import end_process  # there may have been a group

            end_process(EXIT_USER_ERROR)
        sys.exit(EXIT_USER_ERROR)
