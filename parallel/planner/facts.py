"""What is to be run, and how: all that a plan is made from. B batch, T sequence, D d_model."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

from model.config import ModelConfig
from parallel.config import ActivationCheckpointConfig, ParallelConfig, Precision
from parallel.fit import BYTES
from parallel.layout import SIZES, Layout
from parallel.planner.parameters import Inventory, take_inventory
from parallel.stages import split_layers

Made = TypeVar("Made")


@dataclass(frozen=True)
class RunFacts:
    """A run, whatever machine it is on."""

    model: ModelConfig
    """With its vocabulary."""
    seq_len: int
    global_batch_size: int
    """Sequences of a step."""
    precision: Precision = "bf16"
    compiled: bool = False
    _memo: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` makes, remembered by a key: a search asks for the same thousands of times."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    @property
    def tokens_per_step(self) -> int:
        """Of all ranks."""
        return self.global_batch_size * self.seq_len

    @property
    def itemsize(self) -> int:
        """Bytes of a number in computation."""
        return BYTES[self.precision]

    @property
    def wide_precision(self) -> Precision:
        """That of attention, and of products that are not in 8 bits."""
        return "bf16" if self.precision == "fp8" else self.precision

    @property
    def master_size(self) -> int:
        """Bytes of a number in stored weights, reduced gradients and optimizer state."""
        return 8 if self.precision == "fp64" else 4

    @cached_property
    def inventory(self) -> Inventory:
        """The model's parameters."""
        return take_inventory(self.model)

    def split(self, stages: int) -> list[range]:
        """The layers of each of so many pipeline stages."""
        make = partial(split_layers, self.model, self.model.max_seq_len, stages)
        return self.once(("split", stages), make)


@dataclass(frozen=True)
class Arrangement:
    """How a run is laid over ranks."""

    parallel: ParallelConfig
    """With dp_shard said, not -1."""
    micro_batch_size: int
    """Sequences."""
    activation_checkpoint: ActivationCheckpointConfig

    @cached_property
    def layout(self) -> Layout:
        """The sizes of the mesh's dimensions."""
        return Layout(**{name: getattr(self.parallel, name) for name in SIZES}, ep=self.parallel.ep)

    def micro_batches(self, run: RunFacts) -> int:
        """Of one rank in one step."""
        return run.global_batch_size // (self.micro_batch_size * self.layout.data_size)

    @cached_property
    def share_of_work(self) -> tuple[Hashable, ...]:
        """All that says how much of a layer's work on a micro-batch is a rank's."""
        layout, again = self.layout, self.activation_checkpoint
        shared, method = self.parallel.sequence_parallel, self.parallel.cp_method
        cut = self.parallel.engine, layout.cp, method, layout.tp, layout.ep, shared
        how = again if again.mode == "auto" else (again.mode, again.n)
        return *cut, self.micro_batch_size, how

    @property
    def in_ring(self) -> bool:
        """Whether keys and values go from rank to rank."""
        return self.layout.cp > 1 and self.parallel.cp_method == "ring"

    @property
    def offloads(self) -> bool:
        """Whether optimizer state is in the host's memory."""
        if self.parallel.engine == "deepspeed":
            return self.parallel.deepspeed.offload_optimizer != "none"
        return self.parallel.cpu_offload

    @property
    def keeps_gathered(self) -> bool:
        """Whether weights stay gathered from their first use in a micro-batch to their last; in a pipeline, a step."""
        if self.parallel.engine == "deepspeed":
            return self.parallel.deepspeed.stage < 3
        return not self.parallel.reshard_after_forward or self.layout.pp > 1
