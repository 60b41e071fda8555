"""Pipeline parallelism: each rank has some consecutive layers, and micro-batches go from rank to rank.

Schedules: GPipe (Huang et al. 2019), 1F1B and interleaved 1F1B (Narayanan et al. 2021), zero bubble (Qi et al. 2023).
B batch, T sequence, D d_model.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from model.loss import IGNORE_INDEX
from model.moe import auxiliary_sum
from model.part import Part
from model.positions import Positions
from model.transformer import Trunk
from parallel.batch import Batch
from parallel.config import ParallelConfig
from parallel.context import Context, at_work
from parallel.gradients import local
from parallel.passes import gradient_weight
from parallel.stages import MANY_STAGES, Schedule, rank_of

SCHEDULES: dict[Schedule, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv_zero_bubble": ScheduleZBVZeroBubble,
}


class Stage(nn.Module):
    """Some consecutive layers of a model, with what comes before the first and after the last."""

    def __init__(
        self, model: Trunk, index: int, layers: range, *, is_last: bool, context: Context | None
    ) -> None:
        super().__init__()
        self.model = model
        self.index = index
        self.is_first, self.is_last = index == 0, is_last
        self.context = context
        self.weight: Tensor | float = 1.0
        """What the gradient of the sum of losses is multiplied by."""
        _keep(model, layers, is_first=self.is_first, is_last=is_last)

    def forward(self, x: Tensor, targets: Tensor, **inputs: Tensor) -> Tensor:
        """x (B, T, D) from the stage before -> (B, T, D), from the last (1,): the sum of the losses.

        The first takes its own inputs. targets (B, T) and the model's inputs are given to all.
        """
        part: dict[str, Part] = {}
        if self.context is not None and self.context.part is not None:
            part = {"part": self.context.part}
        if self.is_first:
            x = self.model.start(targets=targets, **inputs, **part)
        where = {name: inputs[name] for name in ("document_ids", "padding") if name in inputs}
        hidden = self.model.middle(x, **where, **part)  # type: ignore[arg-type]
        if self.is_last:
            return self.model.finish(hidden, targets, **part).unsqueeze(0)
        if not hidden.routings or not torch.is_grad_enabled():
            return hidden.states
        scored = (targets != IGNORE_INDEX).sum(dim=1)
        return _AddLoss.apply(hidden.states, auxiliary_sum(hidden.routings, scored), self.weight)

    def activation(self, length: int) -> tuple[int, int]:
        """T and D of what goes from stage to stage of sequences of `length`."""
        if self.context is not None and self.context.part is not None:
            length = self.context.part.size
        return length + self.model.prefix_length, self.model.config.d_model


class _AddLoss(torch.autograd.Function):
    """x, whose backward is also that of a loss (), which x's way to the last stage's loss doesn't lead by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, weight: Tensor | float) -> Tensor:
        ctx.weight = weight
        ctx.like = loss.detach()
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.ones_like(ctx.like) * ctx.weight, None


def _keep(model: Trunk, layers: range, *, is_first: bool, is_last: bool) -> None:
    """Take out of a model what others have. The names of what is left stay."""
    for index in range(len(model.blocks)):
        if index not in layers:
            # not by the list's own methods, which would number what follows anew
            del model.blocks._modules[str(index)]
    if not is_first:
        needed = {"embedding"} if is_last and model.head is None else set()
        for name in {*model.entrance} - needed:
            if getattr(model, name) is not None:
                setattr(model, name, nn.Identity())
        if model.config.positional.encoding in ("learned", "sinusoidal"):
            model.positions = Positions(model.config)
    if not is_last:
        model.norm = None
        if model.head is not None:
            model.head = nn.Identity()  # type: ignore[assignment]


class Pipeline:
    """Runs micro-batches through the stages of all ranks."""

    def __init__(
        self,
        stages: list[Stage],
        config: ParallelConfig,
        group: dist.ProcessGroup,
        device: torch.device,
        dtype: torch.dtype,
        context: Context | None,
        micro_batch_size: int,
    ) -> None:
        """stages: this rank's, in order. dtype: of the activations between stages."""
        self.stages = stages
        self.num_stages = config.num_stages
        self.schedule = config.pp_schedule
        self.group, self.device, self.dtype, self.context = group, device, dtype, context
        self.micro_batch_size = micro_batch_size
        self._made: dict[tuple[int, ...], Any] = {}
        self._sums: list[Tensor] = []
        self._handed_on = torch.empty(0)  # from a stage to the next on the same rank

    def forward_backward(self, batch: Batch, weight: Tensor) -> Tensor:
        """Gradients of the sum of the batch's losses times a weight; returns the sum, (), 0 but on the last."""
        for stage in self.stages:
            stage.weight = weight
        self._sums.clear()
        targets = batch.targets
        with at_work(self.context, targets.shape[1]):
            count = len(targets) // self.micro_batch_size
            shape = (count, self.micro_batch_size, *self.stages[0].activation(targets.shape[1]))
            if shape not in self._made:
                self._made[shape] = self._make(*shape)
            step: Callable[..., Any] = self._made[shape].step
            first = (targets,) if self.stages[0].is_first else ()
            step(*first, target=targets, return_outputs=False, targets=targets, **batch.inputs)
        return self._total()

    def loss_sum(self, batch: Batch) -> Tensor:
        """The sum of a micro-batch's losses, (), on the last stage's rank, and 0 on the others."""
        self._sums.clear()
        with at_work(self.context, batch.targets.shape[1]):
            shape = (len(batch.targets), *self.stages[0].activation(batch.targets.shape[1]))
            for index in range(self.num_stages):
                self._evaluate(index, batch, shape)
        return self._total()

    def of_all_layers(self, counts: Tensor | None) -> Tensor | None:
        """What each stage's ranks say of its layers with experts, (L, ...), put together."""
        config = self.stages[0].model.config
        if config.moe is None:
            return None
        mine = [
            place
            for place, layer in enumerate(config.moe_layers)
            if any(str(layer) in stage.model.blocks._modules for stage in self.stages)
        ]
        shape = (len(config.moe_layers), 2, config.moe.num_experts)
        whole = torch.zeros(shape, dtype=torch.int64, device=self.device)
        if counts is not None:
            whole[mine] = counts
        dist.all_reduce(whole, group=self.group)
        return whole

    def _evaluate(self, index: int, batch: Batch, shape: tuple[int, ...]) -> None:
        stage = next((stage for stage in self.stages if stage.index == index), None)
        if stage is None:
            return
        x = torch.empty(shape, dtype=self.dtype, device=self.device)
        before, after = (self._rank(index + step) for step in (-1, 1))
        if not stage.is_first:
            if before == self.group.rank():
                x = self._handed_on
            else:
                dist.recv(x, group=self.group, group_src=before)
        out = stage(x, batch.targets, **batch.inputs)
        if stage.is_last:
            self._sums.append(out.squeeze(0))
        elif after == self.group.rank():
            self._handed_on = out
        else:
            dist.send(out.contiguous(), group=self.group, group_dst=after)

    def _rank(self, stage: int) -> int:
        return rank_of(stage, self.group.size(), self.schedule)

    def _total(self) -> Tensor:
        return torch.stack([torch.zeros((), device=self.device, dtype=torch.float64), *self._sums]).sum()

    def _make(self, count: int, *activation: int) -> Any:
        """The schedule of so many micro-batches with activations of this shape."""
        x = torch.empty(activation, dtype=self.dtype, device=self.device, requires_grad=True)
        loss_sum = x[0, 0, :1].to(torch.promote_types(self.dtype, torch.float32))
        tokens = torch.empty(activation[0], 1, dtype=torch.int64, device=self.device)
        stages = [
            PipelineStage(
                stage,
                stage.index,
                self.num_stages,
                self.device,
                input_args=(tokens,) if stage.is_first else (x,),
                output_args=(loss_sum,) if stage.is_last else (x,),
                group=self.group,
            )
            for stage in self.stages
        ]
        several = self.schedule in MANY_STAGES
        return SCHEDULES[self.schedule](
            stages if several else stages[0], count, loss_fn=self._loss, scale_grads=False
        )

    def _loss(self, loss_sum: Tensor, targets: Tensor) -> Tensor:
        total = loss_sum.squeeze(0)
        self._sums.append(total.detach().double())
        return total * gradient_weight(total, self.stages[-1].weight)


class SharedParameters:
    """Parameters that several ranks of a pipeline have: their gradients are summed, and counted once.

    Such are a head that is the embedding, and positions that every layer's attention reads.
    """

    def __init__(self, names: Iterable[str], group: dist.ProcessGroup) -> None:
        self._groups: dict[str, dist.ProcessGroup] = {}
        self.counted_elsewhere: set[str] = set()
        if group.size() == 1:
            return
        everyones = self._everyones(list(names), group)
        owners = {
            name: tuple(
                dist.get_global_rank(group, rank) for rank, theirs in enumerate(everyones) if name in theirs
            )
            for name in names
        }
        made = self._make_groups({ranks for ranks in owners.values() if len(ranks) > 1})
        for name in sorted(owners):
            if owners[name] in made:
                self._groups[name] = made[owners[name]]
                if owners[name][0] != dist.get_rank():
                    self.counted_elsewhere.add(name)

    def _everyones(self, names: list[str], group: dist.ProcessGroup) -> list[list[str]]:
        """The names that each rank of the pipeline has."""
        everyones: list[list[str]] = [[] for _ in range(group.size())]
        dist.all_gather_object(everyones, names, group=group)
        return everyones

    def _make_groups(self, wanted: set[tuple[int, ...]]) -> dict[tuple[int, ...], dist.ProcessGroup]:
        """The groups of global ranks that any rank wants, of which it is one.

        All ranks make all of them: torch names one that its ranks make alone by how many each of these has already.
        """
        everyones: list[set[tuple[int, ...]]] = [set() for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyones, wanted)
        made = {ranks: dist.new_group(list(ranks)) for ranks in sorted(set().union(*everyones))}
        return {ranks: made[ranks] for ranks in wanted}

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Sum, in place, the gradients of shared parameters over the ranks that have them."""
        for name, group in self._groups.items():
            dist.all_reduce(local(gradients[name]), group=group)
