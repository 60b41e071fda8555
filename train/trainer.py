"""The loop. It knows of batches, steps and listeners; of layouts it knows nothing."""

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from typing import Any, Protocol

import torch
from torch import Tensor

from data.stream import Batch, TrainingStream
from model.moe import ExpertStatistics
from parallel.processes import any_rank
from train.checkpoint_folder import Progress
from train.faults.health import GaveUp, Health
from train.metrics import ExpertLoad, Metrics, peak_memory_bytes
from train.monitor import Monitor
from train.order_digest import OrderDigest
from train.resolve import Plan
from train.schedule import learning_rate
from train.stop import Stop, Stopped

log = logging.getLogger(__name__)


class Engine(Protocol):
    """What the loop asks of an engine; all ranks ask together."""

    device: torch.device

    def forward_backward(self, batch: Batch, step: int) -> Tensor:
        """Gradients of the global batch's mean loss, which is returned; `step` fixes the random draws."""

    def step(self, lr: float) -> Tensor:
        """Update the weights; returns the gradient norm before clipping."""

    def expert_statistics(self) -> ExpertStatistics | None:
        """The experts' load in the last step, on the device; None without experts."""


@dataclass(frozen=True)
class Hooks:
    """What is done between steps, each by all ranks together."""

    save: Callable[[int, str], None]
    """Write a checkpoint of the step, with the data's digest so far."""
    before_update: Callable[[], None]
    """Wait until a save doesn't need the state as it is any longer."""
    evaluate: Callable[[], float]
    """The validation loss."""
    sample: Callable[[int], None]
    """Generate a text and tell the monitor."""
    missed_saves: Callable[[], int]
    """Saves in a row that found no room."""
    saved: Callable[[], None]
    """After the last save: wait for it, and raise if it isn't there."""
    check: Callable[[], None]
    """After each step: raise what has gone wrong in the background."""
    record: Callable[..., None]
    """Write a fault down; see `train.faults.record.FaultRecord.write`."""
    roll_back: Callable[[dict[str, Any]], Progress | None]
    """Load the newest checkpoint, go on in the data from the given position, and forget the metrics since.

    Returns where the checkpoint stands. None: there is none, and nothing was done."""
    differing_ranks: Callable[[], list[int]]
    """Those whose weights aren't what they should be; see `train.faults.replicas`."""
    slow_ranks: Callable[[float, float], dict[int, str]]
    """Those that hold the others up, and at what; see `train.faults.stragglers`."""
    step_ended: Callable[[int], None]
    """A step and all that comes after it is done."""


@dataclass(frozen=True)
class Pending:
    """A step whose results may still be on their way from the device."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    experts: ExpertStatistics | None
    order: Tensor
    """What the data's digest is read from."""
    sample_ids: Tensor
    """Of this rank's sequences, on the host."""
    data: dict[str, Any]
    """The position in the data after this step."""
    lr: float
    step_seconds: float
    data_seconds: float


class _RolledBack(Exception):
    """A checkpoint was loaded; whatever was under way is to be left."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress


class Trainer:
    """Trains from the step after `start` to the end that the plan sets.

    What a step computed is read when the next one is under way, so that the device never waits for the host.
    """

    def __init__(
        self,
        plan: Plan,
        engine: Engine,
        stream: TrainingStream,
        monitor: Monitor,
        hooks: Hooks,
        order: OrderDigest,
        health: Health,
        *,
        flops_per_token: float,
        peak_flops: float,
        start: int,
    ) -> None:
        self.plan, self.config = plan, plan.config
        self.engine, self.stream, self.monitor, self.hooks = engine, stream, monitor, hooks
        self.order, self.health = order, health
        self.utilization_per_rate = flops_per_token / peak_flops
        self.step = self._saved = self._compared = start
        self._pending: Pending | None = None
        self._sample_ids = torch.empty(0, dtype=torch.int64)  # of the newest batch
        # of each step since ranks were compared: seconds of waiting for data, and in all
        self._steps: deque[tuple[float, float]] = deque(maxlen=plan.config.faults.find_slow_every_steps or 0)

    def train(self, stop: Stop) -> int:
        """Run to the end. Returns the last step done, of which there is a checkpoint.

        Raises:
            Stopped: some rank was asked to stop before the end; there is a checkpoint all the same.
            GaveUp: too many steps in a row were skipped, or a rank computes differently.
        """
        deadline = time.monotonic() + (self.config.run.wall_time or float("inf"))
        while True:
            self.start_clock()
            try:
                self._go_on(stop, deadline)
                break
            except _RolledBack as back:
                self._go_on_from(back.progress)
        if self.step != self.plan.total_steps and any_rank(stop.requested is not None):
            raise Stopped(f"stopped by a signal after step {self.step}")
        return self.step

    def _go_on(self, stop: Stop, deadline: float) -> None:
        """Until all steps are done and saved, or the deadline (monotonic, seconds) or a signal is there."""
        while self.step != self.plan.total_steps and not any_rank(
            stop.requested is not None or time.monotonic() > deadline
        ):
            self.step += 1
            self.train_step()
            self.hooks.check()
            if self._due(self.config.faults.compare_every_steps):
                self._pause(self._compare)
            if self._due(self.config.faults.find_slow_every_steps):
                self._pause(self._find_slow)
            if self._due(self.config.evaluation.every_steps) or self._is_last():
                self._pause(lambda: self.tell(self.hooks.evaluate()))
            if self._due(self.config.evaluation.sample_every_steps):
                self._pause(lambda: self.hooks.sample(self.step))
            if self._due(self.config.checkpoint.every_steps) or self._long_unsaved():
                self._pause(self._save)
            self.hooks.step_ended(self.step)
        if self._saved != self.step:
            self._pause(self._save)
        self.hooks.saved()

    def _go_on_from(self, progress: Progress) -> None:
        log.warning("went back to step %d; the batches since then are left out", progress.step)
        self.step = self._saved = self._compared = progress.step
        self._pending = None
        self.order.go_on_from(progress.data_order_digest)
        self.health.rolled_back(progress.faults)

    def start_clock(self) -> None:
        """From here on the first step's time is counted, and the time without a checkpoint."""
        self._clock = time.perf_counter()
        self._saved_at = time.monotonic()
        self._steps.clear()

    def train_step(self) -> None:
        """One optimizer step; the one before is told of once this one is under way."""
        schedule = self.config.schedule
        lr = learning_rate(self.step, self.config.optimizer.lr, self.plan.schedule_steps, schedule)
        began = time.perf_counter()
        batch = next(self.stream)
        data_seconds = time.perf_counter() - began
        self._sample_ids = batch.sample_ids
        order = self.order.add(self.step, batch.sample_ids)
        loss = self.engine.forward_backward(batch, self.step)
        self.hooks.before_update()
        grad_norm = self.engine.step(lr)
        experts = self.engine.expert_statistics()
        self.tell()
        now = time.perf_counter()
        self._pending = Pending(
            self.step,
            loss,
            grad_norm,
            experts,
            order,
            batch.sample_ids,
            self.stream.state_dict(),
            lr,
            now - self._clock,
            data_seconds,
        )
        self._clock = now
        self._steps.append((data_seconds, self._pending.step_seconds))

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _is_last(self) -> bool:
        return self.config.evaluation.every_steps is not None and self.step == self.plan.total_steps

    def _save(self) -> None:
        if self.config.faults.compare_every_steps is not None and self._compared != self.step:
            self._compare()
        self.tell()
        self.hooks.save(self.step, self.order.value)
        self._saved, self._saved_at = self.step, time.monotonic()

    def _long_unsaved(self) -> bool:
        every = self.config.checkpoint.every_time
        return every is not None and any_rank(time.monotonic() - self._saved_at > every)

    def _compare(self) -> None:
        """Have no rank go on with other weights than those that hold the same ones."""
        ranks = self.hooks.differing_ranks()
        if ranks:
            self.hooks.record("differing ranks", self.step, self._sample_ids, ranks=ranks)
            who = ", ".join(map(str, ranks))
            raise GaveUp(
                f"gave up at step {self.step}: the weights of rank {who} are not those of the ranks that hold the "
                f"same, as they were after step {self._compared}: leave its device out and give the same command "
                f"again; checkpoints are right, since ranks are compared before each"
            )
        self._compared = self.step

    def _find_slow(self) -> None:
        """Name the ranks that hold the others up."""
        slow = self.hooks.slow_ranks(*map(mean, zip(*self._steps, strict=True)))
        self._steps.clear()
        for line in slow.values():
            log.warning("step %d: %s", self.step, line)
        if slow:
            self.hooks.record("slow ranks", self.step, self._sample_ids, ranks=sorted(slow))

    def _pause(self, action: Callable[[], None]) -> None:
        """Do something between steps that doesn't count as training time."""
        began = time.perf_counter()
        action()
        self._clock += time.perf_counter() - began

    def tell(self, validation_loss: float | None = None) -> None:
        """Tell the monitor of the pending step, if there is one.

        Raises:
            GaveUp: too many steps in a row were skipped.
        """
        if self._pending is None:
            return
        loss, grad_norm = self._pending.loss.item(), self._pending.grad_norm.item()
        skipped = self.health.skipped(loss, grad_norm)
        spike = None if skipped else self.health.spike(loss, grad_norm)
        rate = self.plan.tokens_per_step / self._pending.step_seconds
        experts = self._pending.experts
        metrics = Metrics(
            step=self._pending.step,
            tokens=self._pending.step * self.plan.tokens_per_step,
            loss=loss,
            grad_norm=grad_norm,
            lr=self._pending.lr,
            tokens_per_second=rate,
            mfu=rate * self.utilization_per_rate,
            memory_bytes=peak_memory_bytes(self.engine.device),
            step_seconds=self._pending.step_seconds,
            data_seconds=self._pending.data_seconds,
            data_order_digest=self.order.read(self._pending.order),
            sequences=self._pending.data["sequences"],
            epochs={
                source.name: self._pending.data["sequences"][source.name] / source.info.train.sequences
                for source in self.plan.mixture
            },
            skipped_steps=self.health.skipped_steps,
            left_out_batches=self._pending.data["batches"] - self._pending.step,
            spike=spike,
            missed_saves=self.hooks.missed_saves(),
            skipped_sequences=self.stream.skipped_sequences or None,
            validation_loss=validation_loss,
            experts=None if experts is None else ExpertLoad.of(experts),
        )
        self.monitor.step(metrics)
        pending, self._pending = self._pending, None
        if skipped:
            self._skipped(pending, loss, grad_norm)
        if spike is not None:
            self._spiked(pending, loss, grad_norm, spike)

    def _spiked(self, pending: Pending, loss: float, grad_norm: float, score: float) -> None:
        log.warning(
            "step %d is a spike (robust z-score %.1f): loss %s, gradient norm %s",
            *(pending.step, score, loss, grad_norm),
        )
        facts = {"loss": loss, "grad_norm": grad_norm, "robust_z": score}
        self.hooks.record("spike", pending.step, pending.sample_ids, **facts)
        progress = self.hooks.roll_back(pending.data) if self.health.may_roll_back else None
        if progress is not None:
            self.hooks.record("rollback", pending.step, pending.sample_ids, to_step=progress.step)
            raise _RolledBack(progress)

    def _skipped(self, pending: Pending, loss: float, grad_norm: float) -> None:
        log.warning("step %d skipped: loss %s, gradient norm %s", pending.step, loss, grad_norm)
        self.hooks.record("skipped", pending.step, pending.sample_ids, loss=loss, grad_norm=grad_norm)
        if self.health.hopeless:
            raise GaveUp(
                f"gave up at step {pending.step}: loss or gradient was not finite in "
                f"{self.health.skipped_in_a_row} steps in a row (faults.max_skipped_steps); the sequences of each "
                f"stand in faults.jsonl in the run's folder"
            )
