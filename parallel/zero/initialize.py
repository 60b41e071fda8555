"""Memory and initial weights for a model that DeepSpeed will hold: never a whole model in one rank's memory."""

from dataclasses import dataclass
from math import prod

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.config import BaseModelConfig
from model.initialize import as_rows, initial_rows
from model.weights import Weight, declared_weights
from parallel.collectives import share
from parallel.cut import Cut, Cuts
from parallel.mesh import Mesh


@dataclass(frozen=True)
class InitialValues:
    """What each parameter of a rank starts with, bit-equal to its part of the whole; see `model.initialize`."""

    config: BaseModelConfig
    weights: dict[str, Weight]
    cuts: Cuts
    mesh: Mesh
    seed: int

    def of(self, name: str, elements: range | None = None) -> Tensor:
        """Of the parameter as this rank has it, cut but not partitioned; or some of its elements, (n,). fp32."""
        cut = self.cuts[name]
        start, shape = self._place(cut)
        count, *row = as_rows(shape)
        rest = prod(row)
        first, last = 0, count
        if elements is not None:
            if not elements:
                return torch.empty(0)
            first, last = elements.start // rest, -(-elements.stop // rest)
        above = start * prod(shape[1:-1]) if cut.dim == 0 else 0
        rows = initial_rows(
            name, self.weights[name], cut.shape, self.config, self.seed, above + first, above + last
        )
        if cut.dim == 1:
            rows = rows.narrow(1, start, shape[1])
        if elements is None:
            return rows.reshape(shape).contiguous()
        return rows.flatten()[elements.start - first * rest :][: len(elements)]

    def _place(self, cut: Cut) -> tuple[int, tuple[int, ...]]:
        """Where this rank's part begins in the dimension that is cut, and its shape."""
        if cut.dim is None:
            return 0, cut.shape
        start, stop = share(cut.shape[cut.dim], self.mesh.ep if cut.expert else self.mesh.tp)
        return start, (*cut.shape[: cut.dim], stop - start, *cut.shape[cut.dim + 1 :])


def initial_values(
    model: nn.Module, config: BaseModelConfig, cuts: Cuts, mesh: Mesh, seed: int
) -> InitialValues:
    """Of a model on the meta device."""
    return InitialValues(config, declared_weights(model), cuts, mesh, seed)


@torch.no_grad()
def materialize(
    model: nn.Module,
    initial: InitialValues,
    dtype: torch.dtype,
    device: torch.device,
    partition: dict[str, object] | None,
) -> None:
    """Fill a model on the meta device with its initial values, rounded to a dtype; buffers are zeros.

    partition: DeepSpeed's configuration where ZeRO 3 partitions each parameter as soon as it is there.
    """
    for prefix, module in model.named_modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        for name in own:
            full = f"{prefix}.{name}" if prefix else name
            values = initial.of(full)
            assert values.shape == module.get_parameter(name).shape, full
            parameter = nn.Parameter(values.to(device, dtype))
            parameter.__dict__.update(module.get_parameter(name).__dict__)
            setattr(module, name, parameter)
        if own and partition is not None:
            _partition(module, own, initial.mesh.dense.get_group("fsdp"), partition, dtype)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros_like(buffer, device=device))


def _partition(
    module: nn.Module,
    names: list[str],
    group: dist.ProcessGroup,
    config: dict[str, object],
    dtype: torch.dtype,
) -> None:
    """By a module that has these parameters alone, since DeepSpeed converts those of inner modules too."""
    holder = nn.Module()
    for name in names:
        holder.register_parameter(name, module.get_parameter(name))
    deepspeed.zero.Init(
        holder, data_parallel_group=group, mem_efficient_linear=False, config_dict_or_path=config, dtype=dtype
    )
