"""torchrun, which notes which of its processes failed first: `python -m train.agent` with torchrun's arguments."""

import os
import sys
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from train.errors import EXIT_USER_ERROR, FAILED_FILE, REFUSED_FILE


def main() -> None:
    """Run until all processes are done, or have failed too often, which is told unless they have said why."""
    try:
        run.main()
    except ChildFailedError as error:
        if Path(os.environ[REFUSED_FILE]).exists():
            sys.exit(EXIT_USER_ERROR)
        _, failure = error.get_first_failure()
        Path(os.environ[FAILED_FILE]).write_text(str(failure.local_rank))
        raise


if __name__ == "__main__":
    main()
