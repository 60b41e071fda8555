"""What trains a model that is laid over ranks: one optimizer step, with a loss and a gradient norm that are global."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.config import BaseModelConfig
from model.loss import IGNORE_INDEX
from model.moe import ExpertStatistics, expert_statistics, take_expert_counts, update_balance
from parallel.activation_budget import Budgeted
from parallel.batch import Batch
from parallel.config import ActivationCheckpointConfig, CompileConfig, ParallelConfig, Precision
from parallel.cut import Cuts
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.passes import Passes

MakeOptimizer = Callable[[nn.Module, BaseModelConfig], torch.optim.Optimizer]
"""Makes an optimizer of the parameters of a model, or of stages of it, of this configuration."""

Fill = Callable[[dict[str, Tensor]], None]
"""Fills the given tensors in place, each by its name."""


@dataclass(frozen=True)
class EngineConfig:
    """What an engine is to do, from the sections of a run's configuration."""

    model: BaseModelConfig
    parallel: ParallelConfig
    precision: Precision
    activation_checkpoint: ActivationCheckpointConfig
    compile: CompileConfig
    micro_batch_size: int
    """Sequences."""
    global_batch_size: int
    """Sequences of a step, of all ranks."""
    seq_len: int
    max_grad_norm: float
    seed: int


class Engine(ABC):
    """Holds a model that is laid over ranks, and its optimizer; every method is called by all ranks together."""

    device: torch.device
    seed: int
    mesh: Mesh
    model: nn.Module
    cuts: Cuts
    """How parameters are cut, by name."""
    passes: Passes
    budgeted: Budgeted | None
    """How blocks recompute where a budget decides that."""

    @property
    def layout(self) -> Layout:
        """The sizes of the mesh."""
        return self.mesh.layout

    def forward_backward(self, batch: Batch, step: int) -> Tensor:
        """Accumulate the gradient of the mean loss over all targets of the global batch.

        Random draws (dropout) are a function of (seed, step, data-parallel rank), so none need be saved.

        Returns the loss (), on the device: the sum over target tokens divided by their global count.
        """
        place = (self.mesh.data_rank, self.mesh.cp_rank, self.mesh.pp_rank)
        torch.manual_seed(_seed_of(self.seed, step, *place))
        batch = batch.to(self.device)
        count = self.mesh.sum_over_data((batch.targets != IGNORE_INDEX).sum()).clamp(min=1)
        total = self.passes.forward_backward(batch, self._loss_weight() / count)
        return self.mesh.sum_over_losses(total) / count

    @abstractmethod
    def _loss_weight(self) -> Tensor:
        """By what the loss is multiplied for the backward, (), fp64, beside the number of targets."""

    @abstractmethod
    def step(self, lr: float) -> Tensor:
        """Clip, update the weights and clear the gradients. Returns the global gradient norm before clipping, ().

        Where the norm is not finite, the update is skipped on every rank alike.
        """

    def _balance_experts(self, applied: Tensor) -> None:
        """Even the load by the counts of the whole step, over all micro-batches and ranks."""
        counts = take_expert_counts(self.model)
        if counts is not None:
            self.mesh.sum_over_data(counts)
            update_balance(self.model, counts, applied.to(counts.device))
        self._expert_counts = self.passes.of_all_layers(counts)

    _expert_counts: Tensor | None = None

    def expert_statistics(self) -> ExpertStatistics | None:
        """The experts' load in the last step, on the device, equal on all ranks; None without experts."""
        return None if self._expert_counts is None else expert_statistics(self._expert_counts)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """The mean loss over all targets of `batches`, of which every rank has the same number."""
        self.model.eval()
        sums = torch.zeros(2, device=self.device, dtype=torch.float64)
        for batch in batches:
            batch = batch.to(self.device)
            sums[0] += self.passes.loss_sum(batch)
            sums[1] += (batch.targets != IGNORE_INDEX).sum()
        self.model.train()
        loss, count = self.mesh.sum_over_losses(sums[0]), self.mesh.sum_over_data(sums[1])
        return (loss / count).item()

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The model's parameters, in the master dtype, and persistent buffers, by name, to be saved."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """All tensors of the training state by name: weights, optimizer, loss scale; to be saved."""

    @abstractmethod
    def restore(self, fill: Fill, *, weights_only: bool = False) -> None:
        """Go on from other weights, or from another state: `fill` is given what `weights` or `state` returns."""


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Of every group, `lr` times the group's own `lr_scale`, where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def _seed_of(*parts: int) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
