"""The fastest layouts that fit: all meshes, schedules, micro-batches and ways of recomputing are weighed.

What is left out can't win: a gpipe schedule takes as long as 1f1b and holds more; tensor parallelism across nodes puts
the slowest link into every layer. Zero-bubble schedules, which cut the backward in two, are weighed without
recomputation, which either half would do again and again; interleaved_zero_bubble where embeddings are tied, which
zbv_zero_bubble, whose idle time is shorter, can't have.

Of the engine torch weights are freed after the forward or kept, as in ZeRO's stages 3 and 2; of the engine deepspeed
all stages are weighed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

from parallel.config import ActivationCheckpointConfig, CompileConfig, ParallelConfig
from parallel.errors import LayoutError
from parallel.fit import check_fit, check_fp8, check_micro_batches
from parallel.layout import Layout
from parallel.planner.estimate import Estimate, estimate
from parallel.planner.facts import Arrangement, RunFacts
from parallel.planner.hardware import Device
from parallel.planner.step_time import least_seconds
from parallel.sizes import format_bytes
from parallel.stages import IN_HALVES, MANY_STAGES, Schedule
from parallel.zero.fit import refusals

ABOUT = 0.02
"""Times that differ by less are taken to be the same."""
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
"""Sequences."""
RECOMPUTED = (
    ActivationCheckpointConfig(mode="none"),
    ActivationCheckpointConfig(mode="selective"),
    ActivationCheckpointConfig(mode="every_nth", n=4),
    ActivationCheckpointConfig(mode="every_nth", n=2),
    ActivationCheckpointConfig(mode="full"),
)
"""From the fastest to the one that keeps least."""
PIPELINES: tuple[tuple[Schedule, int], ...] = (
    ("1f1b", 1),
    ("interleaved_1f1b", 2),
    ("interleaved_1f1b", 4),
    ("interleaved_zero_bubble", 2),
    ("zbv_zero_bubble", 2),
)
"""Schedules and stages of a rank."""
TORCH = ParallelConfig()
"""The engine torch, which offloads nothing."""


Cut = tuple[int, int, int, int]
"""How a model is cut: pp, cp, tp, ep."""


@dataclass
class Found:
    """What a search comes to: the best of each way to cut the model, fastest first."""

    limit: int
    fitting: list[Estimate] = field(default_factory=list)
    too_large: list[Estimate] = field(default_factory=list)
    """Faster than the last that fits, but nothing makes them fit; each in the form that needs least."""
    weighed: int = 0
    _smallest: dict[Cut, Estimate] = field(default_factory=dict)

    @property
    def to_beat(self) -> float:
        """Seconds above which a step is of no interest."""
        return self.fitting[-1].time.total if len(self.fitting) == self.limit else float("inf")

    def add(self, found: Estimate) -> None:
        """One more, of which one that fits and is as fast may be known."""
        cut = _cut(found)
        smallest = self._smallest.get(cut)
        if smallest is None or found.memory.total < smallest.memory.total:
            self._smallest[cut] = found
        rivals = [each for each in self.fitting if _cut(each) == cut]
        if found.fits and all(_weight(found) < _weight(each) for each in rivals):
            kept = [each for each in self.fitting if each not in rivals]
            self.fitting = sorted([*kept, found], key=lambda each: each.time.total)[: self.limit]

    @property
    def smallest(self) -> Estimate | None:
        """What needs least memory."""
        return min(self._smallest.values(), key=lambda each: each.memory.total, default=None)

    def settle(self) -> None:
        """Put the one first that cuts the model least among those that are about as fast as the fastest."""
        fastest, slowest = self.fitting[0].time.total, self.fitting[-1].time.total
        even = [each for each in self.fitting if each.time.total <= fastest * (1 + ABOUT)]
        even.sort(key=lambda each: prod(_cut(each)))
        self.fitting = [*even, *(each for each in self.fitting if each not in even)]
        large = [each for each in self._smallest.values() if not each.fits and each.time.total < slowest]
        self.too_large = sorted(large, key=lambda each: each.time.total)


def _weight(found: Estimate) -> float:
    """Seconds, and a little for filling the memory, which leaves none for what was not foreseen."""
    return found.time.total * (1 + ABOUT * found.memory.total / found.device.memory_bytes)


def _cut(found: Estimate) -> Cut:
    layout = found.arrangement.layout
    return layout.pp, layout.cp, layout.tp, layout.ep


def search(
    run: RunFacts, world_size: int, device: Device, limit: int = 6, given: ParallelConfig = TORCH
) -> Found:
    """The fastest layouts of so many ranks.

    given: what all have in common: the engine, what is offloaded, and the method of context parallelism.

    Raises:
        LayoutError: none is possible, or none fits into the device's memory.
    """
    found = _find(run, world_size, device, limit, given)
    smallest = found.smallest
    if smallest is None:
        raise LayoutError(
            f"no layout of {world_size} ranks can share out data.global_batch_size={run.global_batch_size} sequences: "
            f"use a number of GPUs that divides it, {_divisor(run.global_batch_size, world_size)} for example"
        )
    if not found.fitting:
        raise _too_large(run, smallest, device, given)
    found.settle()
    return found


def _find(run: RunFacts, world_size: int, device: Device, limit: int, given: ParallelConfig) -> Found:
    found = Found(limit)
    for layout in meshes(run, world_size, device, given):
        _weigh(run, layout, device, found, given)
    return found


def meshes(run: RunFacts, world_size: int, device: Device, given: ParallelConfig = TORCH) -> Iterator[Layout]:
    """All sizes of the mesh's dimensions that the model can have, least cut ones first."""
    sizes = [
        (pp * tp * cp, pp, tp, cp)
        for pp in divisors(world_size)
        for tp in divisors(world_size // pp)
        for cp in divisors(world_size // pp // tp)
        if pp <= run.model.num_layers and tp <= device.devices_per_node
    ]
    for cut, pp, tp, cp in sorted(sizes):
        ranks = world_size // cut
        if not _possible(run, Layout(dp_shard=ranks, cp=cp, tp=tp, pp=pp), given):
            continue
        for dp_replicate in divisors(ranks):
            if run.global_batch_size % ranks:
                continue
            whole = Layout(dp_replicate, ranks // dp_replicate, cp, tp, pp)
            for ep in _expert_sizes(run, whole):
                yield Layout(dp_replicate, ranks // dp_replicate, cp, tp, pp, ep)


def _possible(run: RunFacts, layout: Layout, given: ParallelConfig) -> bool:
    parallel = _parallel(layout, given=given)
    try:
        check_fit(layout, parallel, run.model, run.seq_len)
        check_fp8(layout, parallel, run.model, run.precision)
    except LayoutError:
        return False
    return True


def _expert_sizes(run: RunFacts, layout: Layout) -> list[int]:
    if run.model.moe is None:
        return [1]
    return [ep for ep in divisors(run.model.moe.num_experts) if layout.shard_size % ep == 0]


def _parallel(
    layout: Layout,
    schedule: Schedule = "1f1b",
    stages: int = 1,
    reshard: bool = True,
    given: ParallelConfig = TORCH,
) -> ParallelConfig:
    return ParallelConfig(
        engine=given.engine,
        deepspeed=given.deepspeed,
        cpu_offload=given.cpu_offload,
        dp_replicate=layout.dp_replicate,
        dp_shard=layout.dp_shard,
        cp=layout.cp,
        cp_method=given.cp_method,
        tp=layout.tp,
        pp=layout.pp,
        ep=layout.ep,
        pp_schedule=schedule,
        stages_per_rank=stages,
        reshard_after_forward=reshard,
    )


def _variants(run: RunFacts, layout: Layout, given: ParallelConfig) -> Iterator[ParallelConfig]:
    """The ways to run a mesh, that the model can have."""
    if given.engine == "deepspeed":
        yield from _zero_variants(run, layout, given)
        return
    if layout.pp == 1:
        yield _parallel(layout, given=given)
        yield _parallel(layout, reshard=False, given=given)
        return
    for schedule, stages in PIPELINES:
        if schedule == "interleaved_zero_bubble" and not run.model.tie_embeddings:
            continue
        parallel = _parallel(layout, schedule, stages, given=given)
        try:
            check_fit(layout, parallel, run.model, run.seq_len)
            check_fp8(layout, parallel, run.model, run.precision)
        except LayoutError:
            continue
        yield parallel


def _zero_variants(run: RunFacts, layout: Layout, given: ParallelConfig) -> Iterator[ParallelConfig]:
    """The stages that can offload what is to be."""
    zero, compilation = given.deepspeed, CompileConfig(enabled=run.compiled)
    least = 1 if zero.offload_optimizer != "none" else 0
    if zero.offload_param != "none" or zero.offload_optimizer == "nvme":
        least = 3
    for stage in range(least, 4):
        update = {"deepspeed": zero.model_copy(update={"stage": stage})}
        parallel = _parallel(layout, given=given.model_copy(update=update))
        if not any(refusals(layout, parallel, run.precision, compilation)):
            yield parallel


def _weigh(run: RunFacts, layout: Layout, device: Device, found: Found, given: ParallelConfig) -> None:
    for parallel in _variants(run, layout, given):
        for size in MICRO_BATCHES:
            count, left = divmod(run.global_batch_size, size * layout.data_size)
            if left or not count or not _schedules(parallel, count):
                continue
            whole = parallel.pp_schedule in IN_HALVES
            for again in RECOMPUTED[:1] if whole else RECOMPUTED:
                found.weighed += 1
                arrangement = Arrangement(parallel, size, again)
                if least_seconds(run, arrangement, device) >= found.to_beat:
                    break
                this = estimate(run, arrangement, device)
                found.add(this)
                # what recomputes more takes longer
                if this.fits or this.time.total >= found.to_beat:
                    break


def _schedules(parallel: ParallelConfig, count: int) -> bool:
    try:
        check_micro_batches(parallel, count)
    except LayoutError:
        return False
    return parallel.pp_schedule in MANY_STAGES or count >= parallel.pp


def _too_large(run: RunFacts, least: Estimate, device: Device, given: ParallelConfig) -> LayoutError:
    world = least.arrangement.layout.world_size
    # more ranks make no part smaller than their share
    sizes = (world * 2**n for n in range(1, 11) if least.memory.total / 2**n < device.memory_bytes)
    more = next((size for size in sizes if _find(run, size, device, 1, given).fitting), None)
    advice = (
        f"use {more} of them"
        if more
        else "use a larger data.global_batch_size, which more ranks can share out"
    )
    return LayoutError(
        f"no layout of {world} x {device.name} fits: {least.arrangement.layout} needs least, "
        f"{format_bytes(round(least.memory.total))} of {format_bytes(device.memory_bytes)} on each: {advice}, a device "
        f"with more memory, or a smaller model"
    )


def divisors(number: int) -> list[int]:
    """All, in order."""
    return [size for size in range(1, number + 1) if number % size == 0]


def _divisor(number: int, most: int) -> int:
    return max(size for size in divisors(number) if size <= most)
