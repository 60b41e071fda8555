"""What a rank needs of its device's memory, by part. T sequence, D d_model, V vocabulary.

Peaks are looked for in the loss, in the backward of the last two layers (the second has the first's gradients on their
way), at the end of the last backward, and in the optimizer's step. The parts are those of the moment at which most is
needed.
"""

from collections.abc import Iterator
from dataclasses import replace

from parallel.planner.activations import WIDE, DeviceType, Shape
from parallel.planner.facts import Arrangement, RunFacts
from parallel.planner.hardware import Device
from parallel.planner.moments import Memory, layers_of, loss_bytes
from parallel.planner.rank import Rank, ranks_of, under_way
from parallel.planner.zero import zero_memory
from parallel.planner.zero_bubble import in_halves, peak_in_halves
from parallel.stages import MANY_STAGES


def predict_memory(run: RunFacts, arrangement: Arrangement, device: Device) -> Memory:
    """Of the rank that needs most. Of a pipeline, those at both ends are looked at."""
    memories = [memory_of_rank(run, arrangement, rank, device.type) for rank in ranks_of(run, arrangement)]
    return max(memories, key=lambda memory: memory.total).with_reserve(device)


def memory_of_rank(run: RunFacts, arrangement: Arrangement, rank: Rank, device: DeviceType) -> Memory:
    """Of one rank, the reserve left out."""
    if arrangement.parallel.engine == "deepspeed":
        return zero_memory(run, arrangement, rank, device)
    master = run.master_size
    stored, computed = rank.all.stored, rank.all.computed
    # a CPU's ranks compute in the host's memory
    host = arrangement.parallel.cpu_offload and device != "cpu"
    shard = 0.0 if host else float(stored * master)
    reduces_each = arrangement.layout.shard_size > 1 and arrangement.layout.pp == 1
    one = arrangement.micro_batches(run) == 1
    # before the last backward of a step
    before = 0.0 if one else shard if reduces_each else master * computed
    after = shard if reduces_each or one else master * computed
    moments = (
        *_at_work(run, arrangement, rank, device, before),
        *(replace(moment, gradients=after) for moment in _ends(run, arrangement, rank, device)),
        Memory(gradients=shard),
    )
    most = max(moments, key=lambda memory: memory.total)
    if host:
        # of the layer at work and the next, shards come in and gradients go out
        passing = 2 * rank.largest_layer.stored * master
        return replace(most, gathered=most.gathered + passing, host=4.0 * stored * master)
    return replace(most, weights=shard, optimizer=2 * shard)


def _at_work(
    run: RunFacts, arrangement: Arrangement, rank: Rank, device: DeviceType, gradients: float
) -> Iterator[Memory]:
    """In forwards and backwards. gradients: bytes that there are of them before the last backward of a step."""
    at_once = under_way(arrangement, rank, arrangement.micro_batches(run))
    if in_halves(arrangement):
        peak = peak_in_halves(run, arrangement, rank, device)
        sent = _between_stages(run, arrangement, rank, at_once)
        gathered = rank.all.padded(arrangement.layout) * run.itemsize
        yield replace(peak, gradients=gradients, gathered=gathered, activations=peak.activations + sent)
        return
    # with all forwards first, there are no gradients while most is kept
    stretches = ((at_once, 0.0), (1.0, gradients)) if _all_first(arrangement) else ((at_once, gradients),)
    for several, reduced in stretches:
        for moment in _passes(run, arrangement, rank, device, several):
            yield replace(moment, gradients=reduced)


def _all_first(arrangement: Arrangement) -> bool:
    """Whether all forwards of a step come before its first backward."""
    return arrangement.layout.pp > 1 and arrangement.parallel.pp_schedule == "gpipe"


def _passes(
    run: RunFacts, arrangement: Arrangement, rank: Rank, device: DeviceType, several: float
) -> Iterator[Memory]:
    """In the loss, and in the backward of the last layer and of the one before it, of several micro-batches that are
    under way."""
    layout, a = arrangement.layout, run.itemsize
    in_loss, waiting, after_loss = loss_bytes(run, arrangement, device) if rank.is_last else (0.0, 0.0, 0.0)
    others = (several - 1) * waiting if _all_first(arrangement) else 0.0
    in_loss, after_loss = in_loss + others, after_loss + others
    kept = sum(layer.kept * layer.count for layer in layers_of(run, arrangement, rank, device))
    kept = kept * several + _between_stages(run, arrangement, rank, several)
    all_ = rank.all.padded(layout) * a
    root, gathering = (all_, 0) if arrangement.keeps_gathered else (rank.root.padded(layout) * a, 1)
    largest = rank.largest_layer.padded(layout) * a
    yield Memory(gathered=root + gathering * largest, activations=kept, logits=in_loss)
    layers = list(layers_of(run, arrangement, rank, device))
    for layer, previous in zip(layers, [*layers[1:], layers[0]], strict=True):
        held, expert = layer.parameters, layer.parameters.padded_experts(layout)
        dense = held.padded(layout) - expert
        # what the gradients of the layer before are reduced in; experts have theirs by themselves, and first
        reducing, own_reducing = (
            (dense * run.master_size, expert * run.master_size) if layout.pp == 1 else (0, 0)
        )
        # this layer's weights, and those of the next, which is being gathered
        at_work = root + gathering * 2 * dense * a
        in_feedforward = Memory(
            gathered=at_work + (gathering * 2 * expert + layer.last_product) * a,
            activations=kept - layer.kept + layer.in_feedforward,
            logits=after_loss,
        )
        in_attention = Memory(
            gathered=at_work + held.whole * a + own_reducing,
            activations=kept - layer.kept + layer.in_attention,
            logits=after_loss,
        )
        # experts' whole gradients, the last of which may be there in two orders, and what they are reduced in
        if expert:
            gradients = (expert + layer.last_product) * a
            yield replace(in_attention, gathered=at_work + gradients + own_reducing)
        for now in (in_feedforward, in_attention):
            yield now
            if rank.layers > 1:
                another = 0 if now is in_attention and expert else reducing
                # where weights stay gathered, they do until their backward
                let_go = previous.parameters.padded(layout) * a if not gathering and layout.pp == 1 else 0
                yield replace(
                    now, gathered=now.gathered + another - let_go, activations=now.activations - previous.kept
                )


def _ends(run: RunFacts, arrangement: Arrangement, rank: Rank, device: DeviceType) -> Iterator[Memory]:
    """When all gradients of the root are there, and when they are reduced."""
    layout, a, master = arrangement.layout, run.itemsize, run.master_size
    root, padded = rank.root.computed, rank.root.padded(layout)
    # a head that is the embedding has a gradient of each, and their sum
    twice = run.model.tie_embeddings and rank.is_first and rank.is_last
    gradients = root * (3 if twice else 1) * a
    first_layer = rank.largest_layer.padded(layout) * master if layout.pp == 1 else 0
    kept = rank.all.padded(layout) * a if arrangement.keeps_gathered else padded * a
    accumulates = layout.pp > 1 or layout.shard_size == 1
    widened = root * master if accumulates and device == "cpu" and a < WIDE else 0
    received = _between_stages(run, arrangement, rank, 0)
    yield Memory(gathered=kept + gradients + first_layer + widened, activations=received)
    reducing = root * a + padded * master * (1 if layout.shard_size > 1 else 2)
    yield Memory(gathered=kept - padded * a + reducing, activations=received)


def _between_stages(run: RunFacts, arrangement: Arrangement, rank: Rank, under_way: float) -> float:
    """What stages of a pipeline are sent by those next to them, for all micro-batches of a step, and what they send on.

    That is kept of those that are under way, at the last forward; where a rank has several stages, torch keeps all that
    was sent until the step's end.
    """
    shape, last = Shape.of(run, arrangement), arrangement.parallel.num_stages - 1
    size = shape.tokens * run.model.d_model * shape.itemsize
    after = sum(stage < last for stage in rank.stage_numbers)
    before = sum(stage > 0 for stage in rank.stage_numbers)
    count = arrangement.micro_batches(run)
    received = (before + after) * count
    if arrangement.parallel.pp_schedule in MANY_STAGES:
        return size * (received + after * count + before * (count - under_way))
    return size * (received + after * under_way)
