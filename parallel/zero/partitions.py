"""Where DeepSpeed keeps what a rank has of a parameter in fp32, and of its optimizer state, at each stage."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine as Library
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

MASTER = ""
"""In place of a key of the optimizer's state: the weights themselves."""


class Partitions(ABC):
    """A rank's elements of each parameter, flattened: some range of them, or none."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.allocate()

    @abstractmethod
    def held(self, parameter: nn.Parameter) -> range:
        """Which elements this rank has."""

    @abstractmethod
    def read(self, parameter: nn.Parameter, key: str) -> Tensor:
        """This rank's elements, (n,), fp32, of the weights (MASTER) or of the optimizer's state by its key."""

    @abstractmethod
    def write(self, parameter: nn.Parameter, key: str, values: Tensor) -> None:
        """The inverse of `read`. `publish` is to follow."""

    @abstractmethod
    def masters(self) -> list[Tensor]:
        """The tensors that the optimizer steps."""

    @abstractmethod
    def publish(self) -> None:
        """Give the model the weights that were written."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The one that DeepSpeed wraps."""
        return self.library.basic_optimizer

    def allocate(self) -> None:
        """Let the optimizer make its state."""
        self._allocate(self.masters())

    def _allocate(self, masters: list[Tensor]) -> None:
        """Optimizers make their state at the first step: one of no gradient and no learning rate changes no weight."""
        groups = [(group, group["lr"], group["params"]) for group in self.optimizer.param_groups]
        for group, _, _ in groups:
            group["lr"], group["params"] = 0.0, []
        groups[0][0]["params"] = masters
        gradients = [master.grad for master in masters]  # with offload, buffers
        for master in masters:
            master.grad = torch.zeros_like(master)
        self.optimizer.step()
        for group, rate, parameters in groups:
            group["lr"], group["params"] = rate, parameters
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient
            for value in self.optimizer.state[master].values():
                value.zero_()

    def steps(self) -> list[Tensor]:
        """The optimizer's counts of its steps."""
        return [self.optimizer.state[master]["step"] for master in self.masters()]


class WholeParameters(Partitions):
    """Stage 0: every rank has all of a parameter."""

    def __init__(self, library: Library) -> None:
        wrapper: Any = library.optimizer
        self._master: dict[nn.Parameter, Tensor] = {}
        if hasattr(wrapper, "fp32_groups"):
            for ours, theirs in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
                self._master |= dict(zip(ours, theirs, strict=True))
        else:
            self._master = {p: p for group in wrapper.param_groups for p in group["params"]}
        super().__init__(library)

    def held(self, parameter: nn.Parameter) -> range:
        return range(parameter.numel())

    def read(self, parameter: nn.Parameter, key: str) -> Tensor:
        master = self._master[parameter]
        return (master if key == MASTER else self.optimizer.state[master][key]).detach().flatten()

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, key: str, values: Tensor) -> None:
        master = self._master[parameter]
        (master if key == MASTER else self.optimizer.state[master][key]).copy_(values.view_as(master))

    def masters(self) -> list[Tensor]:
        return list(self._master.values())

    @torch.no_grad()
    def publish(self) -> None:
        for parameter, master in self._master.items():
            if parameter is not master:
                parameter.copy_(master)


class FlatGroups(Partitions):
    """Stages 1 and 2: all parameters of a group follow one another, and each rank has an equal piece of that."""

    def __init__(self, library: Library) -> None:
        super().__init__(library)
        library.optimizer._lazy_init_hp_params_optimizer_state()

    def held(self, parameter: nn.Parameter) -> range:
        mapping = self._mapping(parameter)
        if mapping is None:
            return range(0)
        address = mapping.lp_fragment_address
        return range(address.start, address.start + address.numel)

    def read(self, parameter: nn.Parameter, key: str) -> Tensor:
        mapping = self._mapping(parameter)
        if mapping is None:
            return torch.empty(0, device=self.masters()[0].device)
        return (mapping.get_hp_fragment() if key == MASTER else mapping.get_hp_fragment(key)).detach()

    def write(self, parameter: nn.Parameter, key: str, values: Tensor) -> None:
        self.read(parameter, key).copy_(values)

    def masters(self) -> list[Tensor]:
        wrapper: Any = self.library.optimizer
        if hasattr(wrapper, "single_partition_of_fp32_groups"):
            return wrapper.single_partition_of_fp32_groups
        return wrapper.fp32_groups_flat_partition

    def publish(self) -> None:
        self.library.optimizer.update_lp_params()

    @staticmethod
    def _mapping(parameter: nn.Parameter) -> Any:
        return parameter._hp_mapping  # type: ignore[attr-defined]


class PartitionedParameters(Partitions):
    """Stage 3: each rank has an equal piece of every parameter, padded at its end."""

    def allocate(self) -> None:
        """What is offloaded to a disk is fetched for it, group by group."""
        wrapper: Any = self.library.optimizer
        for group, master in enumerate(self.masters()):
            on_disk = wrapper._swappable_optimizer_subgroup(group)
            if on_disk:
                wrapper._optimizer_states_and_gradient_swap_in(group)
            self._allocate([master])
            if on_disk:
                wrapper._optimizer_states_and_gradient_swap_out(group)

    def held(self, parameter: nn.Parameter) -> range:
        size, total = parameter.ds_tensor.ds_numel, parameter.ds_numel  # type: ignore[attr-defined]
        rank = parameter.ds_process_group.rank()  # type: ignore[attr-defined]
        return range(min(rank * size, total), min((rank + 1) * size, total))

    def read(self, parameter: nn.Parameter, key: str) -> Tensor:
        padded = (
            safe_get_local_fp32_param(parameter)
            if key == MASTER
            else safe_get_local_optimizer_state(parameter, key)
        )
        return padded[: len(self.held(parameter))].detach()

    def write(self, parameter: nn.Parameter, key: str, values: Tensor) -> None:
        padded = torch.zeros(parameter.ds_tensor.numel(), device=values.device)  # type: ignore[attr-defined]
        padded[: len(values)] = values
        if key == MASTER:
            safe_set_local_fp32_param(parameter, padded)
            parameter.ds_tensor.data.copy_(padded)  # type: ignore[attr-defined]
        else:
            safe_set_local_optimizer_state(parameter, padded, key)

    def masters(self) -> list[Tensor]:
        return self.library.optimizer.fp32_partitioned_groups_flat

    def publish(self) -> None:
        """Small parameters are kept whole on every rank, and gathered anew; of others, `write` wrote both."""
        whole = self.library.optimizer.persistent_parameters
        if whole:
            whole[0].partition(whole)
            whole[0].all_gather(whole)


def partitions_of(library: Library, stage: int) -> Partitions:
    """Those of a stage."""
    kinds: dict[int, type[Partitions]] = {
        0: WholeParameters,
        1: FlatGroups,
        2: FlatGroups,
        3: PartitionedParameters,
    }
    return kinds[stage](library)
