"""The torch engine: one optimizer step of a sharded model, with a loss and a gradient norm that are global."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from model.config import BaseModelConfig
from model.loss import IGNORE_INDEX
from model.moe import ExpertStatistics, expert_statistics, take_expert_counts, update_balance
from parallel.apply import lay_out
from parallel.batch import Batch
from parallel.config import ActivationCheckpointConfig, CompileConfig, ParallelConfig, Precision
from parallel.context import Context
from parallel.cut import holders, view
from parallel.fsdp import COMPUTE_DTYPE
from parallel.gradients import add_partial, global_norm, local, scale
from parallel.loss_scale import LossScale
from parallel.mesh import Mesh
from parallel.pipeline import Pipeline, SharedParameters, Stage
from parallel.whole import Whole

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class TorchEngine:
    """Holds the sharded `model` and its optimizer; every method is called by all ranks together."""

    def __init__(
        self,
        model_config: BaseModelConfig,
        parallel: ParallelConfig,
        precision: Precision,
        activation_checkpoint: ActivationCheckpointConfig,
        compilation: CompileConfig,
        *,
        mesh: Mesh,
        device: torch.device,
        make_optimizer: MakeOptimizer,
        micro_batch_size: int,
        max_grad_norm: float,
        seed: int,
    ) -> None:
        self.device = device
        self.seed = seed
        self.mesh = mesh
        self.layout = mesh.layout
        self.max_grad_norm = max_grad_norm
        context = Context(mesh.cp) if mesh.layout.cp > 1 else None
        laid_out = lay_out(
            model_config, parallel, precision, activation_checkpoint, compilation, mesh, context, seed
        )
        self.cuts = laid_out.cuts
        self.model: nn.Module
        self.passes: Whole | Pipeline
        if parallel.num_stages == 1:
            (self.model,) = laid_out.roots
            self.passes = Whole(self.model, context, micro_batch_size, reduce_each=mesh.layout.shard_size > 1)
        else:
            stages = cast("list[Stage]", laid_out.roots)
            self.model = nn.ModuleList(stages)
            self.passes = Pipeline(
                stages, parallel, mesh.pp, device, COMPUTE_DTYPE[precision], context, micro_batch_size
            )
        self.parameters = {_plain(name): parameter for name, parameter in self.model.named_parameters()}
        self.shared = SharedParameters(self.parameters, mesh.pp)
        self._holders = {
            name: holders(cast(DTensor, parameter), self.cuts[name], mesh)
            for name, parameter in self.parameters.items()
        }
        self.optimizer = make_optimizer(self.model)
        # where gradients are: with offload, on the host
        gradient_device = torch.device("cpu") if parallel.cpu_offload else device
        self.loss_scale = LossScale(gradient_device, enabled=precision == "fp16")
        self._expert_counts: Tensor | None = None

    def forward_backward(self, batch: Batch, step: int) -> Tensor:
        """Accumulate the gradient of the mean loss over all targets of the global batch.

        Random draws (dropout) are a function of (seed, step, data-parallel rank), so none need be saved.

        Returns the loss (), on the device: the sum over target tokens divided by their global count.
        """
        place = (self.mesh.data_rank, self.mesh.cp_rank, self.mesh.pp_rank)
        torch.manual_seed(_seed_of(self.seed, step, *place))
        batch = batch.to(self.device)
        count = self.mesh.sum_over_data((batch.targets != IGNORE_INDEX).sum()).clamp(min=1)
        total = self.passes.forward_backward(batch, self.loss_scale.scale.double() / count)
        return self.mesh.sum_over_losses(total) / count

    def step(self, lr: float) -> Tensor:
        """Clip, update the weights and clear the gradients. Returns the global gradient norm before clipping, ().

        Where the norm is not finite, the update is skipped on every rank alike, without asking the host.
        """
        named = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        gradients = list(named.values())
        add_partial([g for name, g in named.items() if self.cuts[name].partial], self.mesh.tp)
        self.shared.add(named)
        parts = defaultdict(list)
        for name, gradient in named.items():
            if name not in self.shared.counted_elsewhere:
                parts[self._holders[name]].append(gradient)
        norm = global_norm(parts, self.mesh.pp) / self.loss_scale.scale
        clip = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        scale(gradients, (clip / self.loss_scale.scale).to(gradients[0].dtype))
        overflow = (~norm.isfinite()).float()
        self.loss_scale.update(overflow)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # the fused optimizers read these two attributes on the device, as under torch.amp.GradScaler
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.found_inf = overflow  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._balance_experts(1 - overflow)
        return norm

    def _balance_experts(self, applied: Tensor) -> None:
        """Even the load by the counts of the whole step, over all micro-batches and ranks."""
        counts = take_expert_counts(self.model)
        if counts is not None:
            self.mesh.sum_over_data(counts)
            update_balance(self.model, counts, applied.to(counts.device))
        self._expert_counts = self.passes.of_all_layers(counts)

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

    def weights(self) -> dict[str, Tensor]:
        """The model's parameters and persistent buffers by name, to be saved, or to be loaded into in place."""
        self._reshard()
        tensors = {_plain(name): tensor for name, tensor in self.model.state_dict().items()}
        return {f"model.{name}": self._whole(name, tensor) for name, tensor in tensors.items()}

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        """What a parameter or its optimizer state is a shard of; a number or a buffer as it is."""
        return view(tensor, self.cuts[name], self.mesh) if isinstance(tensor, DTensor) else tensor

    def state(self) -> dict[str, Tensor]:
        """All tensors of the training state by name: weights, optimizer, loss scale."""
        tensors = self.weights()
        if not self.optimizer.state:
            self._allocate_optimizer_state()
        for name, parameter in self.parameters.items():
            assert parameter in self.optimizer.state, name
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = self._whole(name, value)
        return tensors | {f"loss_scale.{key}": value for key, value in self.loss_scale.state().items()}

    def _reshard(self) -> None:
        """A forward without a backward leaves gathered weights, in the compute dtype, in place of the shards."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _allocate_optimizer_state(self) -> None:
        """Optimizers make their state at the first step: one of no gradient and no learning rate changes no weight."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for values in self.optimizer.state.values():
            for value in values.values():
                local(value).zero_()


def _plain(name: str) -> str:
    """A parameter's name in the whole model, of that in a list of stages, `0.model.NAME`."""
    return re.sub(r"^\d+\.model\.", "", name)


def _seed_of(*parts: int) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
