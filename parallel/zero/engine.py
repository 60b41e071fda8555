"""The DeepSpeed engine: ZeRO over the data-parallel ranks, around the same cuts of the same model."""

import os
from collections import defaultdict
from copy import deepcopy
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from model.config import ModelConfig
from model.model import Model
from parallel.apply import by_memory, check_blocks, prepare_layers
from parallel.build import Blueprint
from parallel.context import context_of
from parallel.cut import strides, view
from parallel.engine import Engine, EngineConfig, Fill, MakeOptimizer, set_learning_rate
from parallel.errors import LayoutError
from parallel.fsdp import COMPUTE_DTYPE
from parallel.gradients import clip, global_norm, skip_unless_finite
from parallel.loss_scale import GROWTH_INTERVAL
from parallel.mesh import Mesh
from parallel.zero.config import library_config
from parallel.zero.exchange import move, rows
from parallel.zero.groups import ExpertLayer, ModelParallelUnit, announce_experts, group_name, mark
from parallel.zero.initialize import initial_values, materialize
from parallel.zero.library import check_disk_operator
from parallel.zero.partitions import MASTER, Partitions, partitions_of
from parallel.zero.passes import LossRoot, ZeroPasses

STATE = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter beside the number of steps."""


class DeepSpeedEngine(Engine):
    """A model that DeepSpeed steps."""

    def __init__(
        self, config: EngineConfig, mesh: Mesh, device: torch.device, make_optimizer: MakeOptimizer
    ) -> None:
        """With initial weights.

        Raises LayoutError where what is asked for can't be laid out so.
        """
        self.device = device
        self.seed = config.seed
        self.mesh = mesh
        self.max_grad_norm = config.max_grad_norm
        self.stage = config.parallel.deepspeed.stage
        _connect(mesh)
        settings = _settings(config, mesh)
        if config.parallel.deepspeed.nvme_path is not None:
            check_disk_operator()
        if config.precision == "fp16" and device.type == "cpu":
            raise LayoutError(
                "precision=fp16: DeepSpeed has none on a CPU: use precision=bf16, or parallel.engine=torch"
            )
        context = context_of(config.parallel, mesh)
        dtype = COMPUTE_DTYPE[config.precision]
        check_blocks(config)
        blueprint = Blueprint(config.model, config.parallel, mesh, context)
        self.budgeted = by_memory(blueprint, config)
        built = blueprint.build(0, torch.float32)
        self.cuts, self.model = built.cuts, built.model
        prepare_layers(built.model, config, self.budgeted, mesh)
        initial = initial_values(built.model, config.model, built.cuts, mesh, config.seed)
        materialize(built.model, initial, dtype, device, settings if self.stage == 3 else None)
        self.parameters = dict(built.model.named_parameters())
        mark(self.parameters, built.cuts, mesh)
        optimizer = self._optimizer(make_optimizer(self.model, config.model))
        self.library = self._initialize(config, settings, optimizer)
        self.passes = ZeroPasses(self.library, context, config.micro_batch_size)
        # the library clips, and tells the norm, at every other stage and precision
        self._clips = self.stage == 0 and config.precision == "fp32"
        self.partitions: Partitions = partitions_of(self.library, self.stage)
        self._everywhere = self._held_everywhere() if self.stage > 0 else {}
        if dtype != torch.float32:  # of what was rounded, the masters are exact
            for name, parameter in self.parameters.items():
                exact = initial.of(name, self.partitions.held(parameter)).to(device)
                self.partitions.write(parameter, MASTER, exact)
            self.partitions.publish()

    def _initialize(
        self, config: EngineConfig, settings: dict[str, Any], optimizer: torch.optim.Optimizer
    ) -> deepspeed.DeepSpeedEngine:
        ep = self.mesh.layout.ep
        experts = None
        if ep > 1:
            assert isinstance(config.model, ModelConfig) and config.model.moe is not None
            experts = ExpertLayer(config.model.moe.num_experts, ep)
        assert isinstance(self.model, Model)
        library, *_ = deepspeed.initialize(
            model=LossRoot(self.model, experts),
            optimizer=optimizer,
            config=settings,
            mpu=ModelParallelUnit(self.mesh),
            dist_init_required=False,
        )
        return library

    def _optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Experts that ranks share out are in groups of their own, which DeepSpeed partitions over fewer ranks."""
        if self.mesh.layout.ep == 1:
            return optimizer
        experts = {parameter for name, parameter in self.parameters.items() if self.cuts[name].expert}
        for group in list(optimizer.param_groups):
            shared_out = [parameter for parameter in group["params"] if parameter in experts]
            group["params"] = [parameter for parameter in group["params"] if parameter not in experts]
            if shared_out:
                name = group_name(self.mesh.layout.ep)
                optimizer.add_param_group({**group, "params": shared_out, "moe": True, "name": name})
        return optimizer

    def _loss_weight(self) -> Tensor:
        """DeepSpeed takes the mean over the data-parallel ranks, where the sum is meant."""
        return torch.tensor(float(self.mesh.layout.shard_size), dtype=torch.float64, device=self.device)

    def step(self, lr: float) -> Tensor:
        set_learning_rate(self.library.optimizer, lr)
        own_norm = self._clip() if self._clips else None
        self.library.step()
        norm = self.library.get_global_grad_norm() if own_norm is None else own_norm
        norm = torch.as_tensor(norm, dtype=torch.float64, device=self.device)
        self._balance_experts(norm.isfinite().float())
        return norm

    def weights(self) -> dict[str, Tensor]:
        return {f"model.{name}": tensor for name, tensor in self._tensors(MASTER).items()} | self._buffers()

    def state(self) -> dict[str, Tensor]:
        tensors = self.weights()
        for key in STATE:
            tensors |= {f"optimizer.{name}.{key}": values for name, values in self._tensors(key).items()}
        step = self.partitions.steps()[0]
        return (
            tensors
            | {f"optimizer.{name}.step": step.clone() for name in self.parameters}
            | self._loss_scale()
        )

    def restore(self, fill: Fill, *, weights_only: bool = False) -> None:
        tensors = self.weights() if weights_only else self.state()
        fill(tensors)
        for name, parameter in self.parameters.items():
            self._write(name, parameter, MASTER, tensors[f"model.{name}"])
            if not weights_only:
                for key in STATE:
                    self._write(name, parameter, key, tensors[f"optimizer.{name}.{key}"])
        self.partitions.publish()
        if weights_only:
            return
        for count in self.partitions.steps():
            count.copy_(tensors[f"optimizer.{next(iter(self.parameters))}.step"])
        self._set_loss_scale(tensors)

    def _clip(self) -> Tensor:
        """Clip the gradients as the torch engine does; where their norm is not finite, nothing will be updated."""
        parts: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = defaultdict(list)
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None, name
            cut = self.cuts[name]
            groups = () if cut.dim is None else (self.mesh.tp,)
            parts[groups].append(parameter.grad)
        norm = global_norm(parts, self.mesh.pp)
        clip([gradient for gradients in parts.values() for gradient in gradients], norm, self.max_grad_norm)
        skip_unless_finite(self.library.basic_optimizer, norm)
        return norm

    def _tensors(self, key: str) -> dict[str, Tensor]:
        """What the ranks have of every parameter's weights or optimizer state, by rows."""
        return {name: self._whole(name, parameter, key) for name, parameter in self.parameters.items()}

    def _whole(self, name: str, parameter: nn.Parameter, key: str) -> DTensor:
        values, ranks = self.partitions.read(parameter, key), self._partition_mesh(name)
        shape = _shape(parameter)
        if self.stage == 0:
            local, placement = values.view(shape), cast(Placement, Replicate())
        else:
            held = self._everywhere[name]
            moved = move(values, held, rows(shape, ranks.size()), ranks.get_group())
            local, placement = moved.view(-1, *shape[1:]), Shard(0)
        shard = DTensor.from_local(
            local, ranks, (placement,), run_check=False, shape=shape, stride=strides(shape)
        )
        return view(shard, self.cuts[name], self.mesh)

    def _write(self, name: str, parameter: nn.Parameter, key: str, whole: Tensor) -> None:
        """The inverse of `_whole`."""
        assert isinstance(whole, DTensor)
        values, ranks = whole.to_local().flatten(), self._partition_mesh(name)
        if self.stage > 0:
            held = self._everywhere[name]
            values = move(values, rows(_shape(parameter), ranks.size()), held, ranks.get_group())
        self.partitions.write(parameter, key, values)

    def _partition_mesh(self, name: str) -> DeviceMesh:
        """The ranks over which ZeRO partitions a parameter."""
        return (self.mesh.experts if self.cuts[name].expert else self.mesh.dense)["fsdp"]

    def _held_everywhere(self) -> dict[str, list[range]]:
        """Which elements each rank has of each parameter."""
        by_group: dict[dist.ProcessGroup, list[str]] = defaultdict(list)
        for name in self.parameters:
            by_group[self._partition_mesh(name).get_group()].append(name)
        everywhere = {}
        for group, names in by_group.items():
            held = [self.partitions.held(self.parameters[name]) for name in names]
            ours = torch.tensor([[piece.start, piece.stop] for piece in held], device=self.device)
            table = [torch.empty_like(ours) for _ in range(group.size())]
            dist.all_gather(table, ours, group=group)
            for name, *pieces in zip(names, *(each.tolist() for each in table), strict=True):
                everywhere[name] = [range(*piece) for piece in pieces]
        return everywhere

    def _buffers(self) -> dict[str, Tensor]:
        """Persistent ones, which every rank has whole."""
        tensors = self.model.state_dict()
        return {f"model.{name}": tensor for name, tensor in tensors.items() if name not in self.parameters}

    def _scaler(self) -> Any:
        """What holds DeepSpeed's loss scale, with fp16."""
        wrapper = self.library.optimizer
        return wrapper.loss_scaler if hasattr(wrapper, "loss_scaler") else wrapper.loss_scale_config

    def _loss_scale(self) -> dict[str, Tensor]:
        if not self.library.fp16_enabled():
            return {}
        scaler = self._scaler()
        finite_steps = (scaler.cur_iter - scaler.last_overflow_iter - 1) % GROWTH_INTERVAL
        return {
            "loss_scale.scale": torch.tensor(float(scaler.cur_scale), device=self.device),
            "loss_scale.finite_steps": torch.tensor(float(finite_steps), device=self.device),
        }

    def _set_loss_scale(self, tensors: dict[str, Tensor]) -> None:
        if self.library.fp16_enabled():
            scaler = self._scaler()
            scaler.cur_scale = tensors["loss_scale.scale"].item()
            scaler.cur_iter, scaler.last_overflow_iter = int(tensors["loss_scale.finite_steps"].item()), -1


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Of a parameter as this rank has it, cut; under stage 3 it is empty where it isn't in use."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _settings(config: EngineConfig, mesh: Mesh) -> dict[str, Any]:
    at_once = config.micro_batch_size * mesh.layout.data_size
    settings = library_config(
        config.parallel.deepspeed,
        config.precision,
        micro_batch_size=config.micro_batch_size,
        accumulation_steps=config.global_batch_size // at_once,
        max_grad_norm=config.max_grad_norm,
    )
    if config.parallel.deepspeed.stage == 0 and config.precision == "fp32":
        settings["gradient_clipping"] = 0.0  # done here, since the library doesn't tell the norm
    _check(settings, mesh)
    return settings


def _check(settings: dict[str, Any], mesh: Mesh) -> None:
    """Raises LayoutError where DeepSpeed doesn't know a key, or a value of it."""
    try:
        deepspeed.DeepSpeedConfig(deepcopy(settings), ModelParallelUnit(mesh))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise LayoutError(
            f"parallel.deepspeed.config: {error.title} refuses {key}={first['input']!r}: {first['msg']}"
        ) from None


def _connect(mesh: Mesh) -> None:
    """DeepSpeed's collectives over the group that there is, and its word for the process's place on its node."""
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.init_distributed("gloo" if mesh.device_type == "cpu" else "nccl", auto_mpi_discovery=False)
    announce_experts(mesh)
