"""The peak of a rank's memory in real steps on this CPU, by tracking what its allocator hands out."""

import gc
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from data.stream import Batch
from model.config import BaseModelConfig, known
from parallel.engine import Engine
from parallel.engines import make_engine
from parallel.gradients import local
from parallel.planner.facts import Arrangement, RunFacts
from parallel.planner.simulate import engine_config
from parallel.simulate import simulated_rank


def batch_of(tokens: Tensor) -> Batch:
    """Of a rank, (B, T), which are their own targets."""
    return Batch({"tokens": tokens}, tokens, torch.arange(len(tokens)))


def measured_peak(run: RunFacts, arrangement: Arrangement, rank: int = 0) -> int:
    """Bytes at the peak of a rank's second step, its weights and optimizer among them.

    The other ranks are not there: collectives allocate what they would, and move nothing.
    """
    with simulated_rank(rank, arrangement.layout.world_size):
        return peak_here(run, arrangement)


def peak_here(run: RunFacts, arrangement: Arrangement) -> int:
    """The same of this process, in a group of as many as the layout has."""
    before = _storages()
    engine = engine_for(run, arrangement)
    sequences = run.global_batch_size // arrangement.layout.data_size
    tokens = torch.zeros(sequences, run.seq_len, dtype=torch.int64)
    batch = batch_of(tokens)

    def step() -> None:
        engine.forward_backward(batch, 0)
        engine.step(0.0)

    step()
    held = sum(storage.nbytes() for place, storage in _storages().items() if place not in before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    return held + _peak(profiler)


class _Counter(TorchDispatchMode):
    """Bytes of collectives by kind, the larger of what goes in and what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = operator(*args, **(kwargs or {}))
        kind = KINDS.get(operator.name().rpartition("::")[2].partition(".")[0])
        if kind is not None:
            # how much comes from other ranks' experts is theirs to say
            sides = args if kind == "all_to_all" else (args, output)
            tensors = [leaf for leaf in tree_leaves(sides) if isinstance(leaf, Tensor)]
            self.bytes[kind] += max(tensor.nbytes for tensor in tensors)
        return output


KINDS = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_to_all_single": "all_to_all",
    "send": "send",
}


def _grouped(left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


GROUPED = {torch.ops.trireme.grouped_linear: _grouped, torch.ops.trireme.grouped_outer: _grouped}


def counted_step(run: RunFacts, arrangement: Arrangement, before: int = 0) -> tuple[float, dict[str, float]]:
    """FLOPs of a rank's matrix products in a real step, and the bytes of its collectives by kind; the first, or one
    that comes after others."""
    with simulated_rank(0, arrangement.layout.world_size):
        return counted_here(run, arrangement, before)


def counted_here(run: RunFacts, arrangement: Arrangement, before: int = 0) -> tuple[float, dict[str, float]]:
    """The same of this process, in a group of as many as the layout has."""
    engine = engine_for(run, arrangement)
    sequences = run.global_batch_size // arrangement.layout.data_size
    tokens = torch.randint(0, known(run.model.vocab_size), (sequences, run.seq_len))

    def step() -> None:
        engine.forward_backward(batch_of(tokens), 0)
        engine.step(0.0)

    for _ in range(before):
        step()
    with FlopCounterMode(display=False, custom_mapping=GROUPED) as flops, _Counter() as counter:
        step()
    return flops.get_total_flops(), dict(counter.bytes)


def engine_for(run: RunFacts, arrangement: Arrangement) -> Engine:
    """The engine that is measured, in a group of as many as the layout has."""

    def make_optimizer(model: nn.Module, _: BaseModelConfig) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), fused=True)

    config, device = engine_config(run, arrangement), torch.device("cpu")
    return make_engine(config, arrangement.layout, device, make_optimizer)


def _storages() -> dict[int, torch.UntypedStorage]:
    """The memory of all tensors that there are, by its address, which no other gets while this is held."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, Tensor)]
    return dict(filter(None, (_storage(each) for each in tensors if each.device.type == "cpu")))


def _storage(tensor: Tensor) -> tuple[int, torch.UntypedStorage] | None:
    """A tensor's memory and its address; the compiler keeps tensors that have none."""
    try:
        storage = local(tensor).untyped_storage()
        return storage.data_ptr(), storage
    except RuntimeError:
        return None


def _peak(profiler: Any) -> int:
    """The highest sum of what was allocated and freed in turn."""
    held = highest = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest
