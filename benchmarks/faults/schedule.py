"""Faults as data: which one, where in a run, and in which rank; drawn by a seed."""

import random
from dataclasses import dataclass
from typing import Literal

Point = Literal["start", "joined", "step", "save", "saved"]
"""Where a rank is: about to join the group, about to load the checkpoint, before a step, its share of a checkpoint
written and not yet sealed, a checkpoint just done."""

STARTING: tuple[Point, ...] = ("start", "joined")
TRAINING: tuple[Point, ...] = ("step", "save", "saved")
EVERYWHERE = STARTING + TRAINING


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    points: tuple[Point, ...]
    """Where it may strike."""
    code: int | None = None
    """What `trireme train` ends with by it; None: it goes on by itself."""
    restarts: bool = True
    """Whether the ranks are always started again, by torchrun or with the command."""


KINDS = {
    "a worker is killed": Kind(EVERYWHERE),
    "torchrun is killed": Kind(EVERYWHERE, code=256 - 9),
    "the launcher is killed": Kind(EVERYWHERE, code=-9),
    "all processes are killed": Kind(EVERYWHERE, code=-9),
    "SIGTERM": Kind(EVERYWHERE, code=75),
    "SIGUSR1": Kind(EVERYWHERE, code=75),
    "SIGUSR2": Kind(EVERYWHERE, code=75),
    "SIGUSR1 to one worker": Kind(TRAINING, code=75),
    "Ctrl-C": Kind(EVERYWHERE, code=75),
    "Ctrl-C twice": Kind(EVERYWHERE, code=130),
    "a bit of the newest checkpoint flips": Kind(TRAINING, code=-9),
    "the newest checkpoint is cut short": Kind(TRAINING, code=-9),
    "a file of the newest checkpoint is gone": Kind(TRAINING, code=-9),
    "the newest checkpoint's manifest is garbled": Kind(TRAINING, code=-9),
    "a half-written checkpoint is left": Kind(TRAINING, code=-9),
    "stale shared memory is left": Kind(TRAINING, code=-9),
    "a shard of the data is gone": Kind(TRAINING, code=-9),
    "a shard of the data is damaged": Kind(TRAINING, code=-9),
    "the disk is full": Kind(("save",), restarts=False),
    "a device is out of memory": Kind(("step",)),
    "a rank hangs": Kind(("step",)),
    "a worker is stopped for ever": Kind(("step", "saved")),
    "a worker is stopped for a while": Kind(TRAINING, restarts=False),
    "a bit of a rank's weights flips": Kind(("step",)),
    "the clock jumps": Kind(("step",), restarts=False),
}


@dataclass(frozen=True)
class Fault:
    """One fault; they strike in their order, each when the ones before are over."""

    kind: str
    point: Point
    step: int
    """It strikes at the first such point of this step or a later one; when starting, at the next start."""
    rank: int
    """The rank that is there."""


def draw(count: int, seed: int, ranks: int, spacing: int) -> list[Fault]:
    """So many faults, about one every `spacing` steps: every kind once before one comes again."""
    chance = random.Random(seed)
    kinds: list[str] = []
    while len(kinds) < count:
        kinds += chance.sample(sorted(KINDS), len(KINDS))
    faults: list[Fault] = []
    starts = True  # the run's first start comes by itself
    for index, name in enumerate(kinds[:count]):
        kind = KINDS[name]
        possible = [point for point in kind.points if starts or point not in STARTING]
        step = (index + 1) * spacing + chance.randrange(spacing)
        faults.append(Fault(name, chance.choice(possible), step, chance.randrange(ranks)))
        starts = kind.restarts
    return faults
