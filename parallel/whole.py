"""The passes of a model that each rank has all layers of."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from parallel.batch import Batch
from parallel.context import Context, at_work
from parallel.fsdp import ShardedModel
from parallel.passes import gradient_weight


class Whole(ABC):
    """Runs micro-batches one after another."""

    def __init__(self, context: Context | None, micro_batch_size: int) -> None:
        self.context = context
        self.micro_batch_size = micro_batch_size

    def forward_backward(self, batch: Batch, weight: Tensor) -> Tensor:
        """Gradients of the sum of the batch's losses times a weight, ready for a step; returns the sum, ()."""
        total = torch.zeros((), device=batch.targets.device, dtype=torch.float64)
        micro_batches = list(batch.micro_batches(self.micro_batch_size))
        for number, micro_batch in enumerate(micro_batches, start=1):
            self._before(last=number == len(micro_batches))
            with at_work(self.context, micro_batch.targets.shape[1]) as part:
                loss_sum = self._forward(**micro_batch.inputs, targets=micro_batch.targets, **part)
                self._backward(loss_sum * gradient_weight(loss_sum, weight))
            total += loss_sum.detach()
        return total

    def loss_sum(self, batch: Batch) -> Tensor:
        """The sum of a micro-batch's losses, ()."""
        with at_work(self.context, batch.targets.shape[1]) as part:
            return self._forward(**batch.inputs, targets=batch.targets, **part)

    def of_all_layers(self, counts: Tensor | None) -> Tensor | None:
        """What is said of each layer with experts, (L, ...), None without experts."""
        return counts

    @abstractmethod
    def _before(self, *, last: bool) -> None:
        """A micro-batch comes, of a step the last or not."""

    @abstractmethod
    def _forward(self, **inputs: Any) -> Tensor:
        """The sum of a micro-batch's losses, ()."""

    @abstractmethod
    def _backward(self, loss: Tensor) -> None: ...


class FsdpPasses(Whole):
    """Of a model that FSDP2 shards."""

    def __init__(
        self, model: ShardedModel, context: Context | None, micro_batch_size: int, *, reduce_each: bool
    ) -> None:
        """reduce_each: sum gradients over the shards' ranks after every micro-batch, lest each hold a whole one."""
        super().__init__(context, micro_batch_size)
        self.model = model
        self.reduce_each = reduce_each

    def _before(self, *, last: bool) -> None:
        self.model.set_requires_gradient_sync(last or self.reduce_each)
        # replicas are summed once, after the last
        self.model.set_requires_all_reduce(last)

    def _forward(self, **inputs: Any) -> Tensor:
        return self.model.loss_sum(**inputs)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()
