"""What a rank needs of its device's memory, by part. T sequence, D d_model, V vocabulary.

Peaks are looked for at four moments of a step: in the loss, at the start and at the end of the last backward, and in
the optimizer's step. The parts are those of the moment at which most is needed.
"""

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
from parallel.planner.rank import Rank, ranks_of, under_way


@dataclass(frozen=True)
class Memory:
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
    def total(self) -> float:
        """All of it."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """By name."""
        return vars(self)

    def with_reserve(self, device: Device) -> "Memory":
        """With what the device keeps for itself."""
        return replace(self, reserve=device.reserved_gib * 2**30 + self.total * device.fragmentation)


def predict_memory(run: RunFacts, arrangement: Arrangement, device: Device) -> Memory:
    """Of the rank that needs most. Of a pipeline, those at both ends are looked at."""
    memories = [memory_of_rank(run, arrangement, rank, device.type) for rank in ranks_of(run, arrangement)]
    return max(memories, key=lambda memory: memory.total).with_reserve(device)


def memory_of_rank(run: RunFacts, arrangement: Arrangement, rank: Rank, device: DeviceType) -> Memory:
    """Of one rank, the reserve left out."""
    micro_batches = arrangement.micro_batches(run)
    a, master = run.itemsize, run.master_size
    stored, computed = rank.all.stored, rank.all.computed
    steady = Memory(weights=stored * master, optimizer=2 * stored * master)
    layer, root = rank.largest_layer.computed, rank.root.computed
    sharded = arrangement.layout.shard_size > 1
    reduces_each = sharded and arrangement.layout.pp == 1
    # before the last backward of a step
    gradients = 0.0 if micro_batches == 1 else master * (stored if reduces_each else computed)
    # the buffer of the newest gathering waits for the next; in the backward it is beside the layer at work
    gathered = computed * a if arrangement.keeps_gathered else (root + layer * sharded) * a
    at_work = 0 if arrangement.keeps_gathered else layer * a
    # gradients of one layer, and of the layer before what is being reduced
    reducing = layer * (a + master)
    kept, working = _activations(run, arrangement, rank, micro_batches, device)
    in_loss, after_loss = _loss(run, arrangement, device) if rank.is_last else (0.0, 0.0)
    all_reduced = master * (stored if reduces_each or micro_batches == 1 else computed)
    moments = (
        replace(steady, gradients=gradients, gathered=gathered, activations=kept, logits=in_loss),
        replace(
            steady,
            gradients=gradients,
            gathered=gathered + at_work + reducing,
            activations=kept + working,
            logits=after_loss,
        ),
        replace(
            steady,
            gradients=all_reduced,
            gathered=root * (a + master if sharded else 2 * master)
            + (layer * a if arrangement.keeps_gathered else 0),
        ),
        replace(steady, gradients=stored * master),
    )
    return max(moments, key=lambda memory: memory.total)


def _activations(
    run: RunFacts, arrangement: Arrangement, rank: Rank, micro_batches: int, device: DeviceType
) -> tuple[float, float]:
    """What is kept of all micro-batches that are under way; what the backward of a layer takes beside."""
    kept, working = 0.0, 0.0
    for experts, count in ((False, rank.dense_layers), (True, rank.expert_layers)):
        if not count:
            continue
        layer = kept_of_layer(run, arrangement, device, experts=experts)
        for recompute, share in recomputed_layers(arrangement.activation_checkpoint).items():
            kept += count * share * layer.of(recompute)
            again = layer.none - layer.of(recompute) if recompute != "none" else 0.0
            working = max(working, layer.working + max(0.0, again))
    times = under_way(arrangement, rank, micro_batches)
    return kept * times, working


def _loss(run: RunFacts, arrangement: Arrangement, device: DeviceType) -> tuple[float, float]:
    """What the loss takes while it is computed, and what of it is left for the backward."""
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
    return norm + 2 * hidden + head + max(logits + piece, cast), norm + hidden + rows * d * a
