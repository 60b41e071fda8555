"""What a rank needs of its device's memory, by part. T sequence, D d_model, V vocabulary.

Peaks are looked for in the loss, in the backward of the last two layers (the second has the first's gradients on their
way), at the end of the last backward, and in the optimizer's step. The parts are those of the moment at which most is
needed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from model.config import known
from model.loss import CHUNK_ELEMENTS, CHUNK_TOKENS, VOCABULARY_SLICE
from parallel.planner.activations import (
    WIDE,
    DeviceType,
    Shape,
    kept_of_layer,
    norm_bytes,
    recomputed_layers,
)
from parallel.planner.facts import Arrangement, RunFacts
from parallel.planner.hardware import Device
from parallel.planner.parameters import Held
from parallel.planner.parts import Parts
from parallel.planner.rank import Rank, ranks_of, under_way


@dataclass(frozen=True)
class Memory(Parts):
    """Bytes of one rank at the peak of a step, by part."""

    weights: float = 0.0
    """As they are stored, in fp32."""
    gradients: float = 0.0
    """Reduced, in fp32; where they are not reduced after every micro-batch, whole ones too."""
    optimizer: float = 0.0
    """AdamW's two moments."""
    gathered: float = 0.0
    """Weights that are gathered, in the dtype of computation, and buffers of the collectives."""
    activations: float = 0.0
    """Kept for the backward, recomputed in it, and gradients of activations."""
    logits: float = 0.0
    """Of the loss: a chunk of logits, and the gradients of head and hidden states."""
    reserve: float = 0.0
    """What the device's driver, libraries and communicators take, and the allocator's waste."""

    @property
    def in_gb(self) -> str:
        """The parts of 50 MB and more, as they are told."""
        return ", ".join(f"{part} {size / 1e9:.1f}" for part, size in self.parts.items() if size >= 5e7)

    def with_reserve(self, device: Device) -> "Memory":
        """With what the device keeps for itself."""
        return replace(self, reserve=device.reserved_gib * 2**30 + self.total * device.fragmentation)


def predict_memory(run: RunFacts, arrangement: Arrangement, device: Device) -> Memory:
    """Of the rank that needs most. Of a pipeline, those at both ends are looked at."""
    memories = [memory_of_rank(run, arrangement, rank, device.type) for rank in ranks_of(run, arrangement)]
    return max(memories, key=lambda memory: memory.total).with_reserve(device)


def memory_of_rank(run: RunFacts, arrangement: Arrangement, rank: Rank, device: DeviceType) -> Memory:
    """Of one rank, the reserve left out."""
    master = run.master_size
    stored, computed = rank.all.stored, rank.all.computed
    reduces_each = arrangement.layout.shard_size > 1 and arrangement.layout.pp == 1
    one = arrangement.micro_batches(run) == 1
    # before the last backward of a step
    before = 0.0 if one else master * (stored if reduces_each else computed)
    after = master * (stored if reduces_each or one else computed)
    at_once = under_way(arrangement, rank, arrangement.micro_batches(run))
    # with all forwards first, there are no gradients while most is kept
    at_work = ((at_once, 0.0), (1.0, before)) if _all_first(arrangement) else ((at_once, before),)
    moments = (
        *(
            replace(moment, gradients=reduced)
            for several, reduced in at_work
            for moment in _passes(run, arrangement, rank, device, several)
        ),
        *(replace(moment, gradients=after) for moment in _ends(run, arrangement, rank, device)),
        Memory(gradients=stored * master),
    )
    most = max(moments, key=lambda memory: memory.total)
    return replace(most, weights=stored * master, optimizer=2 * stored * master)


def _all_first(arrangement: Arrangement) -> bool:
    """Whether all forwards of a step come before its first backward."""
    return arrangement.layout.pp > 1 and arrangement.parallel.pp_schedule == "gpipe"


def _passes(
    run: RunFacts, arrangement: Arrangement, rank: Rank, device: DeviceType, several: float
) -> Iterator[Memory]:
    """In the loss, and in the backward of the last layer and of the one before it, of several micro-batches that are
    under way."""
    layout, a = arrangement.layout, run.itemsize
    in_loss, waiting, after_loss = _loss(run, arrangement, device) if rank.is_last else (0.0, 0.0, 0.0)
    others = (several - 1) * waiting if _all_first(arrangement) else 0.0
    in_loss, after_loss = in_loss + others, after_loss + others
    kept = sum(layer.kept * layer.count for layer in _layers(run, arrangement, rank, device))
    kept = kept * several + _between_stages(run, arrangement, rank, several)
    all_ = rank.all.padded(layout) * a
    root, gathering = (all_, 0) if arrangement.keeps_gathered else (rank.root.padded(layout) * a, 1)
    largest = rank.largest_layer.padded(layout) * a
    yield Memory(gathered=root + gathering * largest, activations=kept, logits=in_loss)
    layers = list(_layers(run, arrangement, rank, device))
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


@dataclass(frozen=True)
class _Layers:
    """Equal layers of a rank, in bytes of a micro-batch."""

    count: float
    kept: float
    in_feedforward: float
    in_attention: float
    parameters: Held
    last_product: float
    """Elements of the weights of the last projection, whose gradient is the first to be there."""


def _layers(run: RunFacts, arrangement: Arrangement, rank: Rank, device: DeviceType) -> Iterator[_Layers]:
    layout, model = arrangement.layout, run.model
    for experts, count, parameters in (
        (False, rank.dense_layers, rank.dense_layer),
        (True, rank.expert_layers, rank.expert_layer),
    ):
        if not count:
            continue
        last_product = known(model.ffn.d_ff) * model.d_model / layout.tp
        if experts:
            assert model.moe is not None
            last_product = model.moe.num_experts / layout.ep * known(model.moe.d_ff) * model.d_model
        layer = kept_of_layer(run, arrangement, device, experts=experts)
        for recompute, share in recomputed_layers(arrangement.activation_checkpoint).items():
            kept = layer.of(recompute)
            yield _Layers(
                count * share, kept, layer.in_feedforward, layer.in_attention, parameters, last_product
            )


def _between_stages(run: RunFacts, arrangement: Arrangement, rank: Rank, times: float) -> float:
    """What stages of a pipeline are sent by those next to them, for all micro-batches of a step, and what they send on,
    of those that are under way."""
    shape, last = Shape.of(run, arrangement), arrangement.parallel.num_stages - 1
    size = shape.tokens * run.model.d_model * shape.itemsize
    after = sum(stage < last for stage in rank.stage_numbers)
    before = sum(stage > 0 for stage in rank.stage_numbers)
    return size * ((before + after) * arrangement.micro_batches(run) + after * times)


def _loss(run: RunFacts, arrangement: Arrangement, device: DeviceType) -> tuple[float, float, float]:
    """What the loss takes while it is computed, until its backward, and after that."""
    model, shape = run.model, Shape.of(run, arrangement)
    d, a = model.d_model, shape.itemsize
    hidden = shape.tokens * d * a
    rows = -(-known(model.vocab_size) // arrangement.layout.tp)
    chunk = min(shape.tokens, max(CHUNK_TOKENS, CHUNK_ELEMENTS // rows))
    narrow = a < WIDE
    logits = chunk * rows * (a + WIDE if narrow else a)
    norm = shape.tokens * (norm_bytes(model, a, device) + d * a)
    head = rows * d * max(WIDE, a)
    # what a chunk adds to the head's gradient is made in slices; a CPU widens it before it adds
    piece = min(rows, VOCABULARY_SLICE) * d * (a + (WIDE if device == "cpu" else 0)) if narrow else 0
    cast = rows * d * a if narrow else 0
    return norm + 2 * hidden + head + max(logits + piece, cast), norm + hidden + head, rows * d * a
