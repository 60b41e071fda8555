"""A step of one rank of a job of any size, measured: memory, FLOPs, collectives. B batch, T sequence.

The rank is built and run by the engine that would run it, on a group of ranks that moves nothing, and on tensors that
have shapes and no values; only the operators' outputs are made up.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model.config import ModelConfig
from model.model import Model
from model.transformer import Trunk
from parallel.engine import EngineConfig, MakeOptimizer
from parallel.errors import LayoutError
from parallel.gradients import local
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.planner.simulated.engine import SimulatedEngine
from parallel.planner.simulated.memory import MemoryLog
from parallel.planner.simulated.meter import Meter
from parallel.planner.simulated.traffic import Traffic, TrafficLog
from parallel.planner.simulated.work import WorkLog
from parallel.simulate import simulated_rank


@dataclass(frozen=True)
class _Batch:
    """As `parallel.batch.Batch`."""

    inputs: dict[str, Tensor]
    targets: Tensor

    def micro_batches(self, size: int) -> Iterator["_Batch"]:
        for begin in range(0, len(self.targets), size):
            chosen = slice(begin, begin + size)
            yield _Batch(
                {name: values[chosen] for name, values in self.inputs.items()}, self.targets[chosen]
            )

    def to(self, device: torch.device) -> "_Batch":
        return self


@dataclass(frozen=True)
class Simulated:
    """What one rank's step takes."""

    memory: dict[str, int]
    """Bytes at the peak, by part."""
    matmul: float
    """FLOPs of matrix products, with those that are recomputed."""
    attention: float
    """FLOPs of scores and values."""
    traffic: dict[tuple[str, str], Traffic]
    """Collectives by kind and dimension of the layout."""


def simulate(config: EngineConfig, layout: Layout, rank: int, make_optimizer: MakeOptimizer) -> Simulated:
    """Take a whole step as one rank of a layout, on the CPU's operators.

    Raises LayoutError where what is asked for can't be simulated.
    """
    _check(config)
    with simulated_rank(rank, layout.world_size):
        mesh = Mesh(layout, "cpu")
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            engine = SimulatedEngine(config, mesh, torch.device("cpu"), make_optimizer)
            return _measure(engine, config, fake)


def _check(config: EngineConfig) -> None:
    """Raises LayoutError where what is asked for can't be simulated."""
    for name, value, works in (
        ("parallel.engine", config.parallel.engine, "torch"),
        ("parallel.cpu_offload", config.parallel.cpu_offload, False),
        ("compile.enabled", config.compile.enabled, False),
    ):
        if value != works:
            raise LayoutError(
                f"{name}={str(value).lower()} can't be simulated: use {name}={str(works).lower()} with --simulate"
            )
    if isinstance(config.model, ModelConfig) and config.model.attention.kernel == "flex":
        raise LayoutError(
            "model.attention.kernel=flex can't be simulated, on the CPU's operators: use "
            "model.attention.kernel=auto with --simulate"
        )


def _measure(engine: SimulatedEngine, config: EngineConfig, fake: FakeTensorMode) -> Simulated:
    memory, work, traffic = MemoryLog(), WorkLog(), TrafficLog(engine.mesh)
    memory.mark("weights", [local(parameter) for parameter in engine.parameters.values()])
    memory.mark("weights", list(engine.model.buffers()))
    memory.mark("optimizer", [local(value) for state in engine.optimizer.state.values() for value in state.values()])
    for model in engine.models:
        _note_loss(model, memory)
    sequences = config.global_batch_size // engine.layout.data_size
    targets = torch.zeros(sequences, config.seq_len, dtype=torch.int64)
    batch = _Batch(engine.models[0].example(*targets.shape), targets)
    with ExitStack() as stack:
        stack.enter_context(memory.resizing("gathered"))
        stack.enter_context(Meter(fake, memory.note, work.note, traffic.note))
        engine.forward_backward(batch, step=1)
        memory.mark("gradients", [local(p.grad) for p in engine.parameters.values() if p.grad is not None])
        engine.step(lr=0.0)
    return Simulated(memory.peak(), work.matmul, work.attention, dict(traffic.total))


def _note_loss(model: Model, memory: MemoryLog) -> None:
    """Let the log know what the loss makes."""
    if not isinstance(model, Trunk):
        return
    loss_sum = model.vocabulary.loss_sum

    def noted(*args: Any) -> Tensor:
        with memory.within("logits"):
            return loss_sum(*args)

    model.vocabulary.loss_sum = noted  # type: ignore[method-assign]
