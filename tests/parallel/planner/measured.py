"""The peak of a rank's memory in real steps on this CPU, by tracking what its allocator hands out."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from parallel.config import CompileConfig
from parallel.engine import EngineConfig
from parallel.mesh import Mesh
from parallel.planner.facts import Arrangement, RunFacts
from parallel.simulate import simulated_rank
from parallel.torch_engine import TorchEngine


@dataclass(frozen=True)
class Sequences:
    """A rank's share of a global batch."""

    inputs: dict[str, Tensor]
    targets: Tensor

    def micro_batches(self, size: int) -> Any:
        """Successive cuts."""
        for start in range(0, len(self.targets), size):
            inputs = {name: tensor[start : start + size] for name, tensor in self.inputs.items()}
            yield Sequences(inputs, self.targets[start : start + size])

    def to(self, device: torch.device) -> "Sequences":
        """It is there."""
        return self


def measured_peak(run: RunFacts, arrangement: Arrangement, rank: int = 0) -> int:
    """Bytes at the peak of a rank's second step, its weights and optimizer among them.

    The other ranks are not there: collectives allocate what they would, and move nothing.
    """
    with simulated_rank(rank, arrangement.layout.world_size):
        engine = _engine(run, arrangement)
        sequences = run.global_batch_size // arrangement.layout.data_size
        tokens = torch.zeros(sequences, run.seq_len, dtype=torch.int64)
        batch = Sequences({"tokens": tokens}, tokens)

        def step() -> None:
            engine.forward_backward(batch, 0)
            engine.step(0.0)

        step()
        held = _bytes_of(engine)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
        dist.barrier()
    return held + _peak(profiler)


def _engine(run: RunFacts, arrangement: Arrangement) -> TorchEngine:
    config = EngineConfig(
        run.model,
        arrangement.parallel,
        run.precision,
        arrangement.activation_checkpoint,
        CompileConfig(),
        arrangement.micro_batch_size,
        run.global_batch_size,
        run.seq_len,
        max_grad_norm=1.0,
        seed=0,
    )

    def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), fused=True)

    return TorchEngine(config, Mesh(arrangement.layout, "cpu"), torch.device("cpu"), make_optimizer)


def _bytes_of(engine: TorchEngine) -> int:
    """Of weights and optimizer state, which were there before."""
    from parallel.gradients import local

    state = [value for values in engine.optimizer.state.values() for value in values.values()]
    return sum(local(t).untyped_storage().nbytes() for t in (*engine.parameters.values(), *state))


def _peak(profiler: Any) -> int:
    """The highest sum of what was allocated and freed in turn."""
    held = highest = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest
