"""The passes of a model that each rank has all layers of."""

import torch
from torch import Tensor

from parallel.batch import Batch
from parallel.context import Context, at_work
from parallel.fsdp import ShardedModel
from parallel.passes import gradient_weight


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
            with at_work(self.context, micro_batch.targets.shape[1]) as part:
                loss_sum = self.model.loss_sum(**micro_batch.inputs, targets=micro_batch.targets, **part)
                (loss_sum * gradient_weight(loss_sum, weight)).backward()
            total += loss_sum.detach()
        return total

    def loss_sum(self, batch: Batch) -> Tensor:
        """The sum of a micro-batch's losses, ()."""
        with at_work(self.context, batch.targets.shape[1]) as part:
            return self.model.loss_sum(**batch.inputs, targets=batch.targets, **part)

    def of_all_layers(self, counts: Tensor | None) -> Tensor | None:
        """What is said of each layer with experts, (L, ...), None without experts."""
        return counts
