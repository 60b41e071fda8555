"""The torch engine: FSDP2, with a gradient norm that is global, and steps that don't wait for the host."""

import re
from collections import defaultdict
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from parallel.apply import LaidOut, lay_out
from parallel.context import Context, context_of
from parallel.cut import holders, view
from parallel.engine import Engine, EngineConfig, Fill, MakeOptimizer, set_learning_rate
from parallel.fp8 import check_device
from parallel.fsdp import COMPUTE_DTYPE
from parallel.gradients import add_partial, clip, global_norm, local, skip_unless_finite
from parallel.loss_scale import LossScale
from parallel.mesh import Mesh
from parallel.pipeline import Pipeline, SharedParameters, Stage
from parallel.whole import FsdpPasses


class TorchEngine(Engine):
    """A model sharded by FSDP2, and in stages where there is a pipeline."""

    pipeline: ClassVar[type[Pipeline]] = Pipeline

    def __init__(
        self, config: EngineConfig, mesh: Mesh, device: torch.device, make_optimizer: MakeOptimizer
    ) -> None:
        """With initial weights.

        Raises LayoutError where what is asked for can't be laid out so.
        """
        parallel, precision = config.parallel, config.precision
        if precision == "fp8":
            check_device(device)
        self.device = device
        self.seed = config.seed
        self.mesh = mesh
        self.max_grad_norm = config.max_grad_norm
        context = context_of(config.parallel, mesh)
        laid_out = self._lay_out(config, context)
        self.cuts = laid_out.cuts
        self.budgeted = laid_out.budgeted
        if parallel.num_stages == 1:
            (model,) = laid_out.roots
            self.model = model
            each = mesh.layout.shard_size > 1
            self.passes = FsdpPasses(model, context, config.micro_batch_size, reduce_each=each)
        else:
            stages = cast("list[Stage]", laid_out.roots)
            self.model = nn.ModuleList(stages)
            self.passes = self.pipeline(
                stages, parallel, mesh.pp, device, COMPUTE_DTYPE[precision], context, config.micro_batch_size
            )
        self.parameters = {_plain(name): parameter for name, parameter in self.model.named_parameters()}
        self.shared = self._share_parameters()
        self._holders = {
            name: holders(cast(DTensor, parameter), self.cuts[name], mesh)
            for name, parameter in self.parameters.items()
        }
        self.optimizer = make_optimizer(self.model, config.model)
        # where gradients are: with offload, on the host
        gradient_device = torch.device("cpu") if parallel.cpu_offload else device
        self.loss_scale = LossScale(gradient_device, enabled=precision == "fp16")

    def _lay_out(self, config: EngineConfig, context: Context | None) -> LaidOut:
        return lay_out(config, self.mesh, context)

    def _share_parameters(self) -> SharedParameters:
        return SharedParameters(self.parameters, self.mesh.pp)

    def _loss_weight(self) -> Tensor:
        return self.loss_scale.scale.double()

    def step(self, lr: float) -> Tensor:
        """As `Engine.step` says, without asking the host whether the norm is finite."""
        named = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        add_partial([g for name, g in named.items() if self.cuts[name].partial], self.mesh.tp)
        self.shared.add(named)
        parts = defaultdict(list)
        for name, gradient in named.items():
            if name not in self.shared.counted_elsewhere:
                parts[self._holders[name]].append(gradient)
        norm = global_norm(parts, self.mesh.pp) / self.loss_scale.scale
        clip(list(named.values()), norm, self.max_grad_norm, self.loss_scale.scale)
        overflow = skip_unless_finite(self.optimizer, norm)
        self.loss_scale.update(overflow)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._balance_experts(1 - overflow)
        return norm

    def weights(self) -> dict[str, Tensor]:
        """Views of this rank's shards: what is loaded into them is what the model has."""
        self._reshard()
        tensors = {_plain(name): tensor for name, tensor in self.model.state_dict().items()}
        return {f"model.{name}": self._whole(name, tensor) for name, tensor in tensors.items()}

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        """What a parameter or its optimizer state is a shard of; a number or a buffer as it is."""
        return view(tensor, self.cuts[name], self.mesh) if isinstance(tensor, DTensor) else tensor

    def state(self) -> dict[str, Tensor]:
        """As `weights`, of all tensors of the training state."""
        tensors = self.weights()
        if not self.optimizer.state:
            self._allocate_optimizer_state()
        for name, parameter in self.parameters.items():
            assert parameter in self.optimizer.state, name
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = self._whole(name, value)
        return tensors | {f"loss_scale.{key}": value for key, value in self.loss_scale.state().items()}

    def restore(self, fill: Fill, *, weights_only: bool = False) -> None:
        fill(self.weights() if weights_only else self.state())

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
