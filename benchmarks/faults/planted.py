"""Faults from within: what a rank does where one is to strike."""

import errno
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.storage import StorageWriter

from benchmarks.faults.plan import Plan, Reached
from benchmarks.faults.schedule import STARTING, Fault, Point
from parallel.gradients import local
from parallel.torch_engine import TorchEngine
from train import checkpoint
from train.trainer import Trainer

_LOOK_SECONDS = 0.02
_CLOCK_JUMP = -100_000.0
"""Seconds: more than a day back."""


class Rank:
    """Follows where a rank is, and has its faults strike."""

    def __init__(self, plan: Path, rank: int) -> None:
        self.plan, self.rank = Plan(plan), rank
        self.faults, self.nan_every = self.plan.read()
        self.next = 0
        self.trainer: Trainer | None = None

    def at(self, point: Point) -> None:
        """The rank is at this point; returns when it may go on."""
        while self.next < len(self.faults) and self.plan.over(self.next):
            self.next += 1
        if self.next == len(self.faults) or not self._strikes(self.faults[self.next], point):
            return
        step = 0 if self.trainer is None else self.trainer.step
        self.plan.reach(self.next, Reached(os.getpid(), os.getppid(), step))
        FROM_WITHIN.get(self.faults[self.next].kind, Rank.wait)(self)

    def _strikes(self, fault: Fault, point: Point) -> bool:
        if fault.rank != self.rank or fault.point != point or self.plan.reached(self.next) is not None:
            return False
        return point in STARTING or (self.trainer is not None and self.trainer.step >= fault.step)

    def wait(self) -> None:
        """For what comes from outside."""
        while not self.plan.released(self.next):
            time.sleep(_LOOK_SECONDS)

    def fill_disk(self) -> None:
        """As a write fails."""
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def run_out_of_memory(self) -> None:
        """As an allocation fails on a GPU."""
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def hang(self) -> None:
        """For ever, in the thread that trains."""
        while True:
            time.sleep(1)

    def flip_a_bit(self) -> None:
        """Of a weight: one that no update's rounding swallows."""
        assert self.trainer is not None and isinstance(self.trainer.engine, TorchEngine)
        weights = next(iter(self.trainer.engine.weights().values()))
        local(weights).detach().view(torch.int32).view(-1)[0] ^= 1 << 16

    def turn_clock(self) -> None:
        """From now on."""
        now = time.time
        time.time = lambda: now() + _CLOCK_JUMP


FROM_WITHIN: dict[str, Callable[[Rank], None]] = {
    "the disk is full": Rank.fill_disk,
    "a device is out of memory": Rank.run_out_of_memory,
    "a rank hangs": Rank.hang,
    "a bit of a rank's weights flips": Rank.flip_a_bit,
    "the clock jumps": Rank.turn_clock,
}


def plant(run: ModuleType, plan: Path, number: int) -> None:
    """Have a rank come by its points; called before it joins the group, with the module `train.run`."""
    rank = Rank(plan, number)
    _before(run, "run", lambda *_, **__: rank.at("joined"))
    _before(Trainer, "train_step", lambda trainer: _step(rank, trainer))
    _before(checkpoint, "dcp_save", lambda *_, storage_writer, **__: _write(rank, storage_writer))
    _after(checkpoint, "save", lambda *_, **__: rank.at("saved"))
    _plant_nan(rank)
    rank.at("start")


def _step(rank: Rank, trainer: Trainer) -> None:
    rank.trainer = trainer
    rank.at("step")


def _write(rank: Rank, writer: StorageWriter) -> None:
    _after(writer, "write_data", lambda *_: rank.at("save"))


def _plant_nan(rank: Rank) -> None:
    """In rank 1's gradients alone, before they are summed: all have to notice."""
    weigh = TorchEngine._loss_weight

    def loss_weight(self: TorchEngine) -> Tensor:
        weight = weigh(self)
        wrong = rank.rank == 1 and rank.trainer is not None and rank.trainer.step % rank.nan_every == 0
        return weight * math.nan if wrong else weight

    TorchEngine._loss_weight = loss_weight  # type: ignore[method-assign]


def _before(owner: Any, name: str, action: Callable[..., None]) -> None:
    call = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        action(*args, **kwargs)
        return call(*args, **kwargs)

    setattr(owner, name, wrapped)


def _after(owner: Any, name: str, action: Callable[..., None]) -> None:
    call = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        action(*args, **kwargs)
        return result

    setattr(owner, name, wrapped)
