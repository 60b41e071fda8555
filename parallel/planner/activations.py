"""What a layer keeps of a micro-batch for its backward, tensor by tensor.

`parallel.activation_memory` measures the same on a twin of the model, which takes seconds for each layout; this is for
thousands of them. B batch, T sequence, D d_model, H heads, K kv heads, E head_dim, F d_ff, X experts.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal, get_args

from model.config import ModelConfig, known
from parallel.activation_budget import choose
from parallel.activation_checkpoint import Recompute
from parallel.config import ActivationCheckpointConfig
from parallel.planner.facts import Arrangement, RunFacts
from parallel.stages import stages_of

DeviceType = Literal["cpu", "cuda"]
WIDE = 4
"""Bytes of what is computed in at least fp32."""


@dataclass(frozen=True)
class Shape:
    """Numbers of one rank's work on one micro-batch."""

    tokens: int
    """In the regions of tensor parallelism, where each rank has some heads or features of all tokens: B x T / cp."""
    own_tokens: int
    """Between them."""
    heads: float
    kv_heads: float
    """Of one rank."""
    itemsize: int
    eight_bits: bool = False
    """Blocks' linear layers compute so, and keep what goes in so."""
    quantized_apart: bool = False
    """By kernels that each write what they make, in fp32."""

    @classmethod
    def of(cls, run: RunFacts, arrangement: Arrangement) -> "Shape":
        """Of an arrangement."""
        layout, attention = arrangement.layout, run.model.attention
        tokens = arrangement.micro_batch_size * run.seq_len // layout.cp
        shared = arrangement.parallel.sequence_parallel
        return cls(
            tokens,
            -(-tokens // layout.tp) if shared else tokens,
            attention.num_heads / layout.tp,
            max(1.0, known(attention.num_kv_heads) / layout.tp),
            run.itemsize,
            run.precision == "fp8",
            run.precision == "fp8" and not run.compiled,
        )

    def entering(self, size: float, products: int = 1) -> float:
        """Bytes that so many products keep of their input of a size in bytes."""
        return products * size / self.itemsize if self.eight_bits else size

    def quantizing(self, size: float) -> float:
        """Bytes that it takes to make 8 bits of each number of a tensor of a size in bytes."""
        return 2 * WIDE * size / self.itemsize if self.quantized_apart else 0.0


@dataclass(frozen=True)
class Kept:
    """Bytes that a layer keeps of a micro-batch with each way of recomputing, and what there is of it in its backward,
    when either half is at work."""

    none: float
    selective: float
    full: float
    in_feedforward: float
    in_attention: float

    def of(self, recompute: Recompute) -> float:
        """Bytes with one way."""
        return {"none": self.none, "selective": self.selective, "full": self.full}[recompute]


@dataclass(frozen=True)
class _Part:
    """What attention or feed-forward keeps, and what of gradients its backward takes beside, at most at once."""

    none: float
    selective: float
    working: float


def kept_of_layer(run: RunFacts, arrangement: Arrangement, device: DeviceType, *, experts: bool) -> Kept:
    """What one layer keeps, its input among it, its output not."""
    key = "kept", device, experts, arrangement.share_of_work
    return run.once(key, lambda: _kept_of_layer(run, arrangement, device, experts=experts))


def _kept_of_layer(run: RunFacts, arrangement: Arrangement, device: DeviceType, *, experts: bool) -> Kept:
    model, shape = run.model, Shape.of(run, arrangement)
    d, a = model.d_model, shape.itemsize
    own = shape.own_tokens * d * a
    attention = _attention(model, arrangement, shape, device)
    feedforward = _experts(model, shape) if experts else _feedforward(model, shape, known(model.ffn.d_ff))
    norms = norms_of_layer(model)
    norm_kept = norms * shape.own_tokens * norm_bytes(model, run.itemsize, device)
    # the first norm's input is the layer's, counted below
    inputs = (norms - 1) * own if _keeps_input(model, run.itemsize, device) else 0
    dropout = _dropout(model, shape, device)
    none = own + attention.none + feedforward.none + norm_kept + inputs + dropout
    selective = own + attention.selective + feedforward.selective
    return Kept(
        none,
        selective,
        own,
        in_feedforward=none + feedforward.working + own,
        in_attention=none - feedforward.none + attention.working + own,
    )


class Resolved(ActivationCheckpointConfig):
    """`auto`, when it is known what its budget comes to."""

    shares: tuple[tuple[Recompute, float], ...]
    """Of the layers."""


def resolve(run: RunFacts, arrangement: Arrangement, device: DeviceType) -> Arrangement:
    """With `auto` as its budget decides, as `parallel.activation_budget` does it; others as they are. Of a pipeline, by
    the rank that recomputes most.

    Raises:
        LayoutError: the layers can't keep to the budget.
    """
    config = arrangement.activation_checkpoint
    if config.memory_budget is None:
        return arrangement
    kept = {
        experts: {how: round(of.of(how)) for how in get_args(Recompute)}
        for experts in {layer in run.model.moe_layers for layer in range(run.model.num_layers)}
        for of in (kept_of_layer(run, arrangement, device, experts=experts),)
    }
    parallel = arrangement.parallel
    found: list[Counter[Recompute]] = []
    for place in range(parallel.pp):
        split = run.split(parallel.num_stages)
        stages = stages_of(place, parallel.pp, parallel.num_stages, parallel.pp_schedule)
        mine = {str(layer): kept[layer in run.model.moe_layers] for stage in stages for layer in split[stage]}
        found.append(Counter(choose(mine, config.memory_budget).values()))
    most = max(found, key=lambda counts: (counts["full"] / counts.total(), counts["selective"]))
    shares = tuple((how, count / most.total()) for how, count in most.items())
    resolved = Resolved(mode=config.mode, memory_budget=config.memory_budget, shares=shares)
    return replace(arrangement, activation_checkpoint=resolved)


def recomputed_layers(config: ActivationCheckpointConfig) -> dict[Recompute, float]:
    """The share of the layers that recompute so."""
    mode = config.mode
    if isinstance(config, Resolved):
        return dict(config.shares)
    assert mode != "auto"
    if mode == "every_nth":
        return {"full": 1 / config.n, "none": 1 - 1 / config.n}
    return {mode: 1.0}


def norms_of_layer(model: ModelConfig) -> int:
    """How many norms a layer has."""
    steps = 1 if model.parallel_layers else 2
    return steps * (2 if model.norm.placement == "sandwich" else 1)


def norm_bytes(model: ModelConfig, itemsize: int, device: DeviceType) -> float:
    """Of one norm on one token, its input left out. CPUs have no fused RMS norm: what it is made of is kept."""
    d = model.d_model
    if model.norm.type == "layernorm":
        return 2.0 * WIDE
    scaled = d * itemsize if model.norm.type == "scalenorm" else 0
    if device == "cuda":
        return scaled + WIDE
    return scaled + WIDE + (2 * WIDE * d if itemsize < WIDE else d * itemsize)


def _keeps_input(model: ModelConfig, itemsize: int, device: DeviceType) -> bool:
    return device == "cuda" or model.norm.type == "layernorm" or itemsize >= WIDE


def _attention(model: ModelConfig, arrangement: Arrangement, shape: Shape, device: DeviceType) -> _Part:
    config, layout, a = model.attention, arrangement.layout, shape.itemsize
    head = known(config.head_dim)
    parts = 2 if config.variant == "complex" else 1
    query = shape.tokens * shape.heads * head * parts * a
    key = shape.tokens * shape.kv_heads * head * parts * a
    value, mixed = key / parts, query / parts
    # where ranks of cp are more than kv heads, these are repeated
    to_heads = layout.cp > 1 and not arrangement.in_ring
    repeated = max(1.0, layout.cp / shape.kv_heads) if to_heads else 1.0
    together = query + (key + value) * repeated + mixed + shape.tokens * shape.heads * WIDE
    inside = shape.tokens * model.d_model * a
    own = shape.own_tokens * model.d_model * a
    normed = 0.0
    if config.qk_norm:
        wide = 1.0 if device == "cuda" else (2 * WIDE / a if a < WIDE else 2.0)
        normed = (query + key) * wide
    exchanged = mixed if to_heads else 0.0
    entering = shape.entering(inside, 3) + (mixed / a if shape.eight_bits else 0.0)
    products = query + key + value + mixed + shape.tokens * shape.heads * WIDE + inside
    collectives = inside + own if layout.tp > 1 else 0.0
    # the exchanges of queries, keys, values and of what comes back are kept, too
    collectives += together if to_heads else 0.0
    working = inside + 2 * (query + key + value) + shape.quantizing(inside)
    return _Part(entering + together + normed + exchanged, products + collectives, working)


def _feedforward(model: ModelConfig, shape: Shape, d_ff: float, tp: float | None = None) -> _Part:
    a = shape.itemsize
    tp = model.attention.num_heads / shape.heads if tp is None else tp
    inside, own = shape.tokens * model.d_model * a, shape.own_tokens * model.d_model * a
    hidden = shape.tokens * d_ff / tp * a
    gated = model.ffn.variant != "mlp"
    collectives = inside + own if tp > 1 else 0.0
    # the last product's input is let go when there is its gradient
    made = (2 if gated else 1) * hidden
    kept = shape.entering(inside, 2 if gated else 1) + made + shape.entering(hidden)
    return _Part(kept, made + inside + collectives, made + shape.quantizing(hidden))


def _experts(model: ModelConfig, shape: Shape) -> _Part:
    """Tokens that a rank has go to experts that are whole, in even shares."""
    moe, a = model.moe, shape.itemsize
    assert moe is not None
    rows = shape.own_tokens * moe.top_k
    routed, hidden = rows * model.d_model * a, rows * known(moe.d_ff) * a
    wide_input = shape.own_tokens * model.d_model * WIDE
    logits = shape.own_tokens * moe.num_experts * WIDE
    gated = model.ffn.variant != "mlp"
    none: float = wide_input + 3 * logits + 40 * rows + 2 * routed + (3 if gated else 2) * hidden
    selective: float = logits + (2 if gated else 1) * hidden + routed
    working: float = (2 if gated else 1) * hidden
    if moe.num_shared_experts:
        shared = _feedforward(model, shape, moe.num_shared_experts * known(moe.d_ff))
        none, selective = none + shared.none, selective + shared.selective
        working = max(working, shared.working)
    return _Part(none, selective, working)


def _dropout(model: ModelConfig, shape: Shape, device: DeviceType) -> float:
    """The masks."""
    a = 1 if device == "cuda" else shape.itemsize
    tp = model.attention.num_heads / shape.heads
    hidden = shape.tokens * known(model.ffn.d_ff) / tp * a if model.ffn.dropout else 0.0
    return hidden + (2 * shape.own_tokens * model.d_model * a if model.dropout else 0.0)
