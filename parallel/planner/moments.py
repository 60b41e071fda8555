"""What there is of a rank's layers and of its loss at the peak of a step, whatever shards the model.

T sequence, D d_model, V vocabulary.
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
from parallel.planner.rank import Rank


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

    host: float = 0.0
    """Offloaded to the host's memory, and no part of the sum."""

    @property
    def parts(self) -> dict[str, float]:
        """By name: what is on the device."""
        return {name: size for name, size in vars(self).items() if name != "host"}

    @property
    def in_gb(self) -> str:
        """The parts of 50 MB and more, as they are told."""
        return ", ".join(f"{part} {size / 1e9:.1f}" for part, size in self.parts.items() if size >= 5e7)

    def with_reserve(self, device: Device) -> "Memory":
        """With what the device keeps for itself."""
        return replace(self, reserve=device.reserved_gib * 2**30 + self.total * device.fragmentation)


@dataclass(frozen=True)
class Layers:
    """Equal layers of a rank, in bytes of a micro-batch."""

    count: float
    kept: float
    in_feedforward: float
    in_attention: float
    parameters: Held
    last_product: float
    """Elements of the weights of the last projection, whose gradient is the first to be there."""


def layers_of(run: RunFacts, arrangement: Arrangement, rank: Rank, device: DeviceType) -> Iterator[Layers]:
    """Those of a rank."""
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
            yield Layers(
                count * share, kept, layer.in_feedforward, layer.in_attention, parameters, last_product
            )


def loss_bytes(run: RunFacts, arrangement: Arrangement, device: DeviceType) -> tuple[float, float, float]:
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
