"""The passes of a model that DeepSpeed holds."""

from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine as Library
from torch import Tensor, nn

from model.model import Model
from parallel.context import Context
from parallel.whole import Whole
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


class ZeroPasses(Whole):
    """Gradients are summed over ranks as the stage does it."""

    def __init__(self, library: Library, context: Context | None, micro_batch_size: int) -> None:
        super().__init__(context, micro_batch_size)
        self.library = library

    def _before(self, *, last: bool) -> None:
        self.library.set_gradient_accumulation_boundary(last)

    def _forward(self, **inputs: Any) -> Tensor:
        # what the library's own forward does besides is for the backward
        run = self.library if torch.is_grad_enabled() else self.library.module
        return run(**inputs)

    def _backward(self, loss: Tensor) -> None:
        self.library.backward(loss, scale_wrt_gas=False)
