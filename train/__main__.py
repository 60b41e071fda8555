"""The worker: `torchrun ... -m train CONFIG [key.path=value ...]`, and what `trireme train` starts."""

import os
import sys
from pathlib import Path

from train.errors import REFUSED_FILE, USER_ERRORS, told_in_one_line
from train.stop import die_with_parent, hold_signals, training_began


def main(arguments: list[str]) -> None:
    """Train in this process, as one of the launcher's group or alone."""
    if not arguments or arguments[0].startswith("-"):
        print("usage: torchrun ... -m train CONFIG [key.path=value ...]", file=sys.stderr)
        sys.exit(2)
    hold_signals()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    with told_in_one_line():
        try:
            _train(arguments)
        except USER_ERRORS:
            if REFUSED_FILE in os.environ and (not training_began() or _is_last_start()):
                Path(os.environ[REFUSED_FILE]).touch()
            raise


def _is_last_start() -> bool:
    """Whether torchrun starts the ranks no more."""
    return os.environ["TORCHELASTIC_RESTART_COUNT"] == os.environ["TORCHELASTIC_MAX_RESTARTS"]


def _train(arguments: list[str]) -> None:
    from train.config_file import load_config
    from train.worker import work

    work(load_config(arguments[0], arguments[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
