"""The passes of a model that each rank has all layers of."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from model.part import Part
from parallel.batch import Batch
from parallel.context import Context
from parallel.fsdp import ShardedModel


class Whole:
    """Runs micro-batches one after another."""

    def __init__(
        self, model: ShardedModel, context: Context | None, micro_batch_size: int, *, reduce_each: bool
    ) -> None:
        """reduce_each: sum gradients over the shards' ranks after every micro-batch, lest each hold a whole one."""
        self.model = model
        self.context = context
        self.micro_batch_size = micro_batch_size
        self.reduce_each = reduce_each

    def forward_backward(self, batch: Batch, weight: Tensor) -> Tensor:
        """Gradients of the sum of the batch's losses times a weight, ready for a step; returns the sum, ()."""
        total = torch.zeros((), device=batch.targets.device, dtype=torch.float64)
        micro_batches = list(batch.micro_batches(self.micro_batch_size))
        for number, micro_batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            self.model.set_requires_gradient_sync(last or self.reduce_each)
            # replicas are summed once, after the last
            self.model.set_requires_all_reduce(last)
            with self._at_work(micro_batch) as part:
                loss_sum = self.model.loss_sum(**micro_batch.inputs, targets=micro_batch.targets, **part)
                (loss_sum * weight).backward()
            total += loss_sum.detach()
        return total

    def loss_sum(self, batch: Batch) -> Tensor:
        """The sum of a micro-batch's losses, ()."""
        with self._at_work(batch) as part:
            return self.model.loss_sum(**batch.inputs, targets=batch.targets, **part)

    def of_all_layers(self, counts: Tensor | None) -> Tensor | None:
        """What is said of each layer with experts, (L, ...), None without experts."""
        return counts

    @contextmanager
    def _at_work(self, batch: Batch) -> Iterator[dict[str, Part]]:
        """What the model is told, forward and backward, of its part of the sequences, if it has one."""
        if self.context is None:
            yield {}
        else:
            with self.context.at_work(batch.targets.shape[1]) as part:
                yield {"part": part}
