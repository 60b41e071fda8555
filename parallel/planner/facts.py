"""What is to be run, and how: all that a plan is made from. B batch, T sequence, D d_model."""

from dataclasses import dataclass
from functools import cached_property

from model.config import ModelConfig
from parallel.config import ActivationCheckpointConfig, ParallelConfig, Precision
from parallel.fit import BYTES
from parallel.layout import SIZES, Layout
from parallel.planner.parameters import Inventory, take_inventory
from parallel.stages import split_layers


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

    @property
    def tokens_per_step(self) -> int:
        """Of all ranks."""
        return self.global_batch_size * self.seq_len

    @property
    def itemsize(self) -> int:
        """Bytes of a number in computation."""
        return BYTES[self.precision]

    @property
    def master_size(self) -> int:
        """Bytes of a number in stored weights, reduced gradients and optimizer state."""
        return 8 if self.precision == "fp64" else 4

    @cached_property
    def inventory(self) -> Inventory:
        """The model's parameters."""
        return take_inventory(self.model)

    @cached_property
    def _splits(self) -> dict[int, list[range]]:
        return {}

    def split(self, stages: int) -> list[range]:
        """The layers of each of so many pipeline stages."""
        if stages not in self._splits:
            self._splits[stages] = split_layers(self.model, self.model.max_seq_len, stages)
        return self._splits[stages]


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

    @property
    def zero_stage(self) -> int | None:
        """DeepSpeed's, or None under the torch engine."""
        return self.parallel.deepspeed.stage if self.parallel.engine == "deepspeed" else None

    @property
    def keeps_gathered(self) -> bool:
        """Whether weights stay gathered from their first use in a step to their last."""
        if self.zero_stage is not None:
            return self.zero_stage < 3
        return not self.parallel.reshard_after_forward or self.layout.pp > 1
