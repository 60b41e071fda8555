"""What one rank does for all, so that all of them go on, or none."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from train.errors import RunError, of_disk

T = TypeVar("T")


def on_first_rank(action: Callable[[], T], what: str, group: dist.ProcessGroup | None = None) -> T:
    """Do something on rank 0 alone, while the others wait. Returns its result on all ranks.

    group: of all ranks, through which they agree; left out, the default one.

    Raises:
        RunError: it raised RunError, or OSError, whose reason then follows `what`; on all ranks alike. NoSpace, which
            is one, where there is no room.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except RunError as error:
            outcome[1] = error
        except OSError as error:
            outcome[1] = of_disk(what, error)
    dist.broadcast_object_list(outcome, group=group)
    result, failure = outcome
    if failure is not None:
        raise failure
    return cast(T, result)
