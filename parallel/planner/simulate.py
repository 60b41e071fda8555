"""A step of one rank of a job of any size, measured: memory, FLOPs, collectives. B batch, T sequence.

The rank is built and run by the engine that would run it, in a group of ranks that moves nothing, on tensors that have
shapes and no values. Its operators are the CPU's, so that where a GPU has a kernel of its own, as for RMS norm, more
activations are kept here.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model.model import Model
from model.transformer import Trunk
from parallel.config import CompileConfig
from parallel.engine import EngineConfig, MakeOptimizer
from parallel.errors import LayoutError
from parallel.gradients import local
from parallel.mesh import Mesh
from parallel.planner.facts import Arrangement, RunFacts
from parallel.planner.simulated.engine import SimulatedEngine
from parallel.planner.simulated.memory import MemoryLog
from parallel.planner.simulated.meter import Meter
from parallel.planner.simulated.traffic import Traffic, TrafficLog
from parallel.planner.simulated.work import WorkLog
from parallel.planner.zero_bubble import in_halves
from parallel.simulate import simulated_rank


@dataclass(frozen=True)
class Simulated:
    """What one rank's step took."""

    memory: dict[str, int]
    """Bytes at the peak, by part, named as those of `parallel.planner.memory.Memory`."""
    matmul: float
    """FLOPs of matrix products, the recomputed ones too."""
    attention: float
    """FLOPs of scores and values."""
    traffic: dict[tuple[str, str], Traffic]
    """Collectives by kind and dimension, named as in `parallel.planner.traffic`."""


def simulate(run: RunFacts, arrangement: Arrangement, place: int, make_optimizer: MakeOptimizer) -> Simulated:
    """Take a whole step as the first rank at a place of the pipeline.

    Raises LayoutError where what is asked for can't be simulated.
    """
    _check(run, arrangement)
    layout = arrangement.layout
    with simulated_rank(place * (layout.world_size // layout.pp), layout.world_size):
        mesh = Mesh(layout, "cpu")
        with FakeTensorMode(allow_non_fake_inputs=True):
            config = engine_config(run, arrangement)
            engine = SimulatedEngine(config, mesh, torch.device("cpu"), make_optimizer)
            return _measure(engine, config)


def _check(run: RunFacts, arrangement: Arrangement) -> None:
    """Raises LayoutError where what is asked for can't be simulated."""
    parallel, again = arrangement.parallel, arrangement.activation_checkpoint.mode
    checks: tuple[tuple[str, object, bool, str], ...] = (
        ("parallel.engine", parallel.engine, parallel.engine == "deepspeed", "torch"),
        ("precision", "fp8", run.precision == "fp8", "bf16"),
        ("parallel.cpu_offload", "true", parallel.cpu_offload, "false"),
        ("compile.enabled", "true", run.compiled, "false"),
        ("model.attention.kernel", "flex", run.model.attention.kernel == "flex", "auto"),
        ("activation_checkpoint.mode", again, again == "auto", "selective"),
        # either half would recompute again and again
        ("activation_checkpoint.mode", again, in_halves(arrangement) and again != "none", "none"),
    )
    for name, value, refused, works in checks:
        if refused:
            of = f" with parallel.pp_schedule={parallel.pp_schedule}" if name.endswith("mode") else ""
            raise LayoutError(f"{name}={value}{of} can't be simulated: use {name}={works} with --simulate")


def engine_config(run: RunFacts, arrangement: Arrangement) -> EngineConfig:
    """What an engine is told of a run that is planned, its blocks not compiled."""
    return EngineConfig(
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


@dataclass(frozen=True)
class _Batch:
    """As `parallel.batch.Batch`."""

    inputs: dict[str, Tensor]
    targets: Tensor

    def micro_batches(self, size: int) -> Iterator["_Batch"]:
        for begin in range(0, len(self.targets), size):
            chosen = slice(begin, begin + size)
            inputs = {name: values[chosen] for name, values in self.inputs.items()}
            yield _Batch(inputs, self.targets[chosen])

    def to(self, device: torch.device) -> "_Batch":
        return self


def _measure(engine: SimulatedEngine, config: EngineConfig) -> Simulated:
    parameters, layout = list(engine.parameters.values()), engine.layout
    reduced_at_once = layout.shard_size > 1 and layout.pp == 1
    memory = MemoryLog(whole_gradients="gathered" if reduced_at_once else "gradients")
    work, traffic = WorkLog(), TrafficLog(engine.mesh)
    memory.mark("weights", [*map(local, parameters), *engine.model.buffers()])
    memory.mark(
        "optimizer", [local(value) for p in parameters for value in engine.optimizer.state[p].values()]
    )
    for model in engine.models:
        _note_loss(model, memory)
    targets = torch.zeros(config.global_batch_size // layout.data_size, config.seq_len, dtype=torch.int64)
    batch = _Batch(engine.models[0].example(*targets.shape), targets)
    with ExitStack() as stack:
        stack.enter_context(memory.resizing("gathered"))
        stack.enter_context(Meter(memory.note, work.note, traffic.note).metering())
        engine.forward_backward(batch, step=1)
        memory.mark("gradients", [local(p.grad) for p in parameters if p.grad is not None])
        engine.step(lr=0.0)
    return Simulated(memory.peak(), work.matmul, work.attention, dict(traffic.total))


def _note_loss(model: Model, memory: MemoryLog) -> None:
    """Let the log know what the loss makes."""
    assert isinstance(model, Trunk)
    loss_sum = model.vocabulary.loss_sum

    def noted(*args: Any) -> Tensor:
        with memory.within("logits"):
            return loss_sum(*args)

    model.vocabulary.loss_sum = noted  # type: ignore[method-assign,assignment]
