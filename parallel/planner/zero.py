"""What a rank needs of memory under DeepSpeed's ZeRO (Rajbhandari et al. 2020), as DeepSpeed 0.19 keeps it.

Weights are computed with in the dtype of computation; master weights, AdamW's moments and reduced gradients are fp32.
Gradients go to a bucket, and are reduced when it is full.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from parallel.cut import DIM
from parallel.planner.activations import WIDE, DeviceType
from parallel.planner.facts import Arrangement, RunFacts
from parallel.planner.moments import Memory, layers_of, loss_bytes
from parallel.planner.rank import Rank
from parallel.zero.config import DeepSpeedConfig, raw_number

ALL_REDUCED = 500_000_000
"""Elements that are reduced at once where gradients aren't partitioned."""


@dataclass(frozen=True)
class Holds:
    """Bytes that a rank has of everything, whatever moment it is."""

    weights: float
    """In the dtype of computation."""
    master: float
    optimizer: float
    whole_gradients: float
    """Not partitioned, after a micro-batch."""
    gradients: float
    """Beside these, and reduced ones."""
    bucket: float
    """Where gradients are gathered to be reduced, while there are any."""
    reducing: float
    """Copies in a reduction."""
    in_step: float
    """Gradients, when the optimizer steps."""
    on_host: float = 0.0
    """Gradients and weights on their way between device and host."""
    staging: float = 0.0
    """The same on the device."""


@dataclass(frozen=True)
class _Sizes:
    """Elements of a rank."""

    all: float
    shard: float
    bucket: int
    """That a bucket has room for."""
    filled: float
    """That are reduced at once."""

    @classmethod
    def of(cls, arrangement: Arrangement, rank: Rank) -> "_Sizes":
        zero, held = arrangement.parallel.deepspeed, rank.all
        bucket = raw_number(zero, "zero_optimization.reduce_bucket_size", 500_000_000)
        return cls(
            held.computed,
            shard_of(arrangement, rank),
            bucket,
            min(held.computed, bucket if zero.stage > 0 else ALL_REDUCED),
        )


def shard_of(arrangement: Arrangement, rank: Rank) -> float:
    """Elements of a rank's part of what is partitioned."""
    layout, held = arrangement.layout, rank.all
    return held.whole / layout.shard_size + held.expert_whole / (layout.shard_size // layout.ep)


def zero_memory(run: RunFacts, arrangement: Arrangement, rank: Rank, device: DeviceType) -> Memory:
    """Of one rank, the reserve left out. What is offloaded is in the host's memory, which a CPU's ranks compute in."""
    zero, holds = arrangement.parallel.deepspeed, holds_of(run, arrangement, rank)
    moments = [*_passes(run, arrangement, rank, device, holds), Memory(gradients=holds.in_step)]
    steady = holds.staging + (holds.bucket if zero.stage == 3 else 0.0)
    most = max(moments, key=lambda memory: memory.total)
    most = replace(
        most,
        weights=holds.weights + holds.master,
        optimizer=holds.optimizer,
        gathered=most.gathered + steady,
    )
    if device == "cpu":
        return replace(most, gradients=most.gradients + holds.on_host)
    return _offloaded(most, zero, holds)


def holds_of(run: RunFacts, arrangement: Arrangement, rank: Rank) -> Holds:
    """By the stage."""
    holds, zero = _holds_of(run, arrangement, rank), arrangement.parallel.deepspeed
    if zero.offload_optimizer == "none":
        return holds
    shard = shard_of(arrangement, rank)
    if zero.stage == 3:
        return replace(holds, on_host=WIDE * shard)
    largest = run.itemsize * max(elements for elements, _ in _parameters(run, arrangement, rank))
    return replace(holds, on_host=(WIDE + run.itemsize) * shard + largest, staging=largest)


def _holds_of(run: RunFacts, arrangement: Arrangement, rank: Rank) -> Holds:
    zero, a, size = arrangement.parallel.deepspeed, run.itemsize, _Sizes.of(arrangement, rank)
    stage, offloads = zero.stage, zero.offload_optimizer != "none"
    narrow, n, shard = a < WIDE, size.all, size.shard
    if stage == 0:
        # the library's optimizer for narrow weights has a master of each; for fp32 there is none
        copies = (a + WIDE if narrow else a) * size.filled
        stepped = a * n + (WIDE * n if narrow else 0.0)
        return Holds(a * n, WIDE * n if narrow else 0.0, 8.0 * n, a * n, 0.0, 0.0, copies, stepped)
    master, optimizer, reduced = WIDE * shard, 8.0 * shard, WIDE * shard
    if stage == 1 and run.precision == "bf16" and not offloads:
        # sums in fp32 of whole gradients, which stay
        return Holds(a * n, master, optimizer, a * n, WIDE * n, 0.0, 0.0, (a + WIDE) * n)
    # where they are fp32 from the start, they are flattened once more for the step; with offload on the host
    stepped = reduced * (2 if offloads or not narrow else 1)
    if stage == 1:
        bucket, copies = WIDE * size.bucket, WIDE * size.filled
        return Holds(a * n, master, optimizer, WIDE * n, reduced if narrow else 0.0, bucket, copies, stepped)
    if stage == 2:
        copies = (a + (WIDE if narrow else 0)) * size.filled
        buckets = 1 + raw_number(zero, "zero_optimization.overlap_comm", 0)
        return Holds(a * n, master, optimizer, 0.0, reduced, a * buckets * size.bucket, copies, stepped)
    weights = a * (shard + whole_in_stage_3(run, arrangement, rank))
    return Holds(
        weights, master, optimizer, 0.0, reduced, WIDE * size.bucket, WIDE * size.filled, 2 * reduced
    )


def whole_in_stage_3(run: RunFacts, arrangement: Arrangement, rank: Rank) -> float:
    """Elements of parameters that stage 3 finds too small to partition."""
    zero = arrangement.parallel.deepspeed
    threshold = raw_number(zero, "zero_optimization.stage3_param_persistence_threshold", 100_000)
    parameters = _parameters(run, arrangement, rank)
    return sum(elements * times for elements, times in parameters if elements < threshold)


def _parameters(run: RunFacts, arrangement: Arrangement, rank: Rank) -> Iterator[tuple[float, int]]:
    """Elements of each parameter on a rank, before it is partitioned, and how many of it there are."""
    tp, inventory = arrangement.layout.tp, run.inventory
    parts = (
        (inventory.entrance, 1),
        (inventory.dense_layer, rank.dense_layers),
        (inventory.expert_layer, rank.expert_layers),
        (inventory.exit, 1),
        (inventory.everywhere, 1),
    )
    for parameters, times in parts:
        for shape, sharding in parameters:
            yield prod(shape) / (tp if DIM.get(sharding) is not None else 1), times


def gathered_in_loss(run: RunFacts, arrangement: Arrangement, rank: Rank) -> float:
    """Elements of partitioned weights that stage 3 has gathered in the loss: the backward soon uses them again."""
    zero = arrangement.parallel.deepspeed
    reuse = raw_number(zero, "zero_optimization.stage3_max_reuse_distance", 1_000_000_000)
    all_ = rank.all.computed - whole_in_stage_3(run, arrangement, rank)
    if 2 * all_ <= reuse:
        return all_
    return min(all_, reuse / 2 + rank.root.computed + 2 * rank.largest_layer.computed)


def _fetched_ahead(run: RunFacts, arrangement: Arrangement, rank: Rank) -> float:
    """Elements of a buffer that stage 3 fetches weights into."""
    ahead = raw_number(
        arrangement.parallel.deepspeed, "zero_optimization.stage3_prefetch_bucket_size", 50_000_000
    )
    all_ = rank.all.computed - whole_in_stage_3(run, arrangement, rank)
    return max(0.0, min(all_ - rank.largest_layer.computed, ahead))


def _passes(
    run: RunFacts, arrangement: Arrangement, rank: Rank, device: DeviceType, holds: Holds
) -> Iterator[Memory]:
    """In the loss, in the backward of the last layer, when a bucket is full for the first time, and at the end."""
    one, stage = arrangement.micro_batches(run) == 1, arrangement.parallel.deepspeed.stage
    in_loss, _, after_loss = loss_bytes(run, arrangement, device)
    layers = list(layers_of(run, arrangement, rank, device))
    kept = sum(layer.kept * layer.count for layer in layers)
    # reduced gradients are made in a step's backward, but for those of stage 3 and for sums in fp32
    stays = stage == 3 or (stage == 1 and holds.bucket == 0)
    before = holds.gradients if stays or not one else 0.0
    before += 0.0 if one else holds.whole_gradients
    gathered = 0.0
    if stage == 3:
        gathered = gathered_in_loss(run, arrangement, rank) * run.itemsize
        # what was fetched ahead is there twice until the last of it is used
        ahead = _fetched_ahead(run, arrangement, rank) * run.itemsize
        yield Memory(gradients=before, gathered=gathered + ahead, activations=kept)
    # where gradients aren't partitioned, a bucket is there from the first micro-batch on, and else in a backward
    bucket = holds.bucket if stage in (1, 2) else 0.0
    waiting = bucket if stage == 1 and not one else 0.0
    yield Memory(gradients=before, gathered=gathered + waiting, activations=kept, logits=in_loss)
    after = holds.gradients + (holds.whole_gradients if not one else 0.0)
    for layer in layers:
        for at_work in (layer.in_feedforward, layer.in_attention):
            now = Memory(
                gathered=gathered + bucket, activations=kept - layer.kept + at_work, logits=after_loss
            )
            yield replace(now, gradients=after)
    done = _share_when_full(arrangement, rank)
    whole = holds.whole_gradients if not one else holds.whole_gradients * done
    if stage == 1 and bucket:
        whole -= holds.reducing  # they have moved to the bucket
    full = gathered * (1 - done) + bucket + holds.reducing
    yield Memory(gradients=holds.gradients + whole, gathered=full, activations=kept * (1 - done))


def _share_when_full(arrangement: Arrangement, rank: Rank) -> float:
    """Of the backward, when a bucket is full for the first time; or it is reduced at the end."""
    if arrangement.parallel.deepspeed.stage < 2:
        return 1.0
    size = _Sizes.of(arrangement, rank)
    in_layers = rank.all.computed - rank.root.computed
    return min(1.0, max(0.0, size.bucket - rank.root.computed / 2) / in_layers)


def _offloaded(memory: Memory, zero: DeepSpeedConfig, holds: Holds) -> Memory:
    """With what is in the host's memory."""
    host, weights = 0.0, memory.weights
    if zero.offload_optimizer != "none":
        host += holds.master + memory.optimizer + holds.on_host
        weights -= holds.master
        memory = replace(memory, optimizer=0.0)
    if zero.offload_param != "none":
        host, weights = host + holds.weights, weights - holds.weights
    return replace(memory, weights=weights, host=host)
