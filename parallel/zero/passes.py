"""The passes of a model that DeepSpeed holds."""

from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine as Library
from torch import Tensor, nn

from model.model import Model
from parallel.batch import Batch
from parallel.context import Context, at_work
from parallel.passes import gradient_weight
from parallel.zero.groups import ExpertLayer


class LossRoot(nn.Module):
    """A model whose forward is its loss, which is what DeepSpeed's hooks are for."""

    def __init__(self, model: Model, experts: ExpertLayer | None) -> None:
        super().__init__()
        self.model = model
        self.experts = experts

    def forward(self, **inputs: Any) -> Tensor:
        """The sum of a micro-batch's losses, ()."""
        return self.model.loss_sum(**inputs)


class ZeroPasses:
    """Runs micro-batches one after another; gradients are summed over ranks as the stage does it."""

    def __init__(self, library: Library, context: Context | None, micro_batch_size: int) -> None:
        self.library = library
        self.context = context
        self.micro_batch_size = micro_batch_size

    def forward_backward(self, batch: Batch, weight: Tensor) -> Tensor:
        """Gradients of the sum of the batch's losses times a weight, ready for a step; returns the sum, ()."""
        total = torch.zeros((), device=batch.targets.device, dtype=torch.float64)
        micro_batches = list(batch.micro_batches(self.micro_batch_size))
        for number, micro_batch in enumerate(micro_batches, start=1):
            self.library.set_gradient_accumulation_boundary(number == len(micro_batches))
            with at_work(self.context, micro_batch.targets.shape[1]) as part:
                loss_sum = self.library(**micro_batch.inputs, targets=micro_batch.targets, **part)
                weighted = loss_sum * gradient_weight(loss_sum, weight)
                self.library.backward(weighted, scale_wrt_gas=False)
            total += loss_sum.detach()
        return total

    def loss_sum(self, batch: Batch) -> Tensor:
        """The sum of a micro-batch's losses, ()."""
        with at_work(self.context, batch.targets.shape[1]) as part:
            return self.library.module(**batch.inputs, targets=batch.targets, **part)

    def of_all_layers(self, counts: Tensor | None) -> Tensor | None:
        """What is said of each layer with experts, (L, ...), None without experts."""
        return counts
