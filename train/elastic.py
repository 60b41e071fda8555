"""A run on this machine that goes on without a process that keeps dying, as when its device is gone."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence

from parallel.errors import LayoutError
from parallel.layout import Layout
from train.checkpoint_folder import newest_step
from train.config_file import load_config
from train.errors import EXIT_USER_ERROR, ConfigError
from train.resolve import Plan, resolve
from train.run_folder import folder_of
from train.stop import EXIT_INTERRUPTED
from train.torchrun import Ended

_DEVICES = "CUDA_VISIBLE_DEVICES"

Start = Callable[[int, Sequence[str], Mapping[str, str]], Ended]
"""Trains with so many processes, overrides and additions to the environment, until it ends."""


def keep_training(
    start: Start,
    config: str,
    overrides: Sequence[str],
    plan: Plan,
    max_restarts: int,
    stops: Callable[[], bool],
) -> int:
    """Start a run again after each failure, at most `max_restarts` times. Returns the exit code of the last start.

    A process that failed first in two starts one after the other, without a new checkpoint between, is left out, and
    its device with it: the run goes on with as many of the others as its layout and global batch allow, with fewer
    data-parallel ranks.

    stops: whether the run was asked to stop.
    """
    places = list(range(plan.layout.world_size))
    processes, settings, environment = len(places), list(overrides), dict[str, str]()
    blamed: tuple[int, int] | None = None
    for restart in range(max_restarts + 1):
        ended = start(processes, settings, environment)
        if restart == max_restarts or stops() or ended.code in (0, EXIT_USER_ERROR, EXIT_INTERRUPTED):
            break
        before, blamed = blamed, None
        if ended.failed is not None:
            blamed = places[ended.failed], newest_step(folder_of(plan.config).checkpoints)
        if blamed is None or blamed != before:
            continue
        place, step = blamed
        places.remove(place)
        fitting = _fewer(config, overrides, plan.layout, len(places))
        what = f"process {place} failed first in two starts from step {step}"
        if fitting is None:
            print(f"error: {what}, and without it no layout fits the global batch", file=sys.stderr)
            break
        processes, sizes = fitting
        settings = [*overrides, *sizes]
        environment = {_DEVICES: _visible(places, plan.layout.world_size)}
        blamed = None
        print(
            f"warning: {what}: going on without it, as {processes} process(es), {' '.join(sizes)}",
            file=sys.stderr,
        )
    return ended.code


def _fewer(config: str, overrides: Sequence[str], layout: Layout, most: int) -> tuple[int, list[str]] | None:
    """The largest number of processes that works, up to `most`, and the overrides for its data-parallel ranks.

    The number of replicas stays, where that can be; None where nothing works.
    """
    others = layout.world_size // layout.data_size
    for data in range(most // others, 0, -1):
        for replicas in range(min(layout.dp_replicate, data), 0, -1):
            sizes = [f"parallel.dp_replicate={replicas}", f"parallel.dp_shard={data // replicas}"]
            if data % replicas == 0 and _works(config, [*overrides, *sizes], data * others):
                return data * others, sizes
    return None


def _works(config: str, overrides: Sequence[str], processes: int) -> bool:
    try:
        resolve(load_config(config, overrides), world_size=processes)
    except (ConfigError, LayoutError):
        return False
    return True


def _visible(places: Sequence[int], of: int) -> str:
    """The devices of those places, as CUDA is told of them."""
    given = os.environ.get(_DEVICES)
    names = list(map(str, range(of))) if given is None else given.split(",")
    return ",".join(names[place] for place in places if place < len(names))
