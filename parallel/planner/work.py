"""What a rank computes on a micro-batch. B batch, T sequence, D d_model, F d_ff, V vocabulary."""

from dataclasses import dataclass

from model.attention_variants import ATTENTION
from model.config import known
from model.cost import linear_cost
from model.feedforward import FEEDFORWARD
from model.moe import MoE
from parallel.planner.activations import Shape, recomputed_layers
from parallel.planner.facts import Arrangement, RunFacts
from parallel.planner.rank import Rank

FLASH_BACKWARD = 2.5
"""Over its forward: the scores are made again (Dao 2023); of plain products it is 2."""

QUANTIZED, QUANTIZED_COMPILED = 31, 5
"""Bytes moved for a number that 8 bits are made of: by operators one after another, whose results are fp32, and by a
pass for the largest number and one for the rest."""


@dataclass(frozen=True)
class Work:
    """FLOPs, 2 for a multiply-add, and bytes that element-wise operators move.

    Causal attention counts half of the square, as in `model.count`.
    """

    matmul: float = 0.0
    attention: float = 0.0
    moved: float = 0.0
    eight_bits: float = 0.0
    """Of the products, those of 8-bit floats."""

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self.values, other.values, strict=True)))

    def __mul__(self, times: float) -> "Work":
        return Work(*(value * times for value in self.values))

    @property
    def values(self) -> tuple[float, ...]:
        """All fields."""
        return self.matmul, self.attention, self.moved, self.eight_bits

    @property
    def flops(self) -> float:
        """Products and attention."""
        return self.matmul + self.attention


@dataclass(frozen=True)
class Passes:
    """Work on one micro-batch."""

    forward: Work = Work()
    backward: Work = Work()
    recompute: Work = Work()

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(
            self.forward + other.forward, self.backward + other.backward, self.recompute + other.recompute
        )

    def __mul__(self, times: float) -> "Passes":
        return Passes(self.forward * times, self.backward * times, self.recompute * times)

    @property
    def total(self) -> Work:
        """All."""
        return self.forward + self.backward + self.recompute


def work_of_rank(run: RunFacts, arrangement: Arrangement, rank: Rank) -> Passes:
    """Work of a rank on one micro-batch."""
    key = "work of rank", rank.dense_layers, rank.expert_layers, rank.is_last, arrangement.share_of_work
    return run.once(key, lambda: _work_of_rank(run, arrangement, rank))


def _work_of_rank(run: RunFacts, arrangement: Arrangement, rank: Rank) -> Passes:
    work = Passes()
    for experts, count in ((False, rank.dense_layers), (True, rank.expert_layers)):
        if count:
            work += work_of_layer(run, arrangement, experts=experts) * count
    if rank.is_last:
        work += _head(run, arrangement)
    return work


def work_of_layer(run: RunFacts, arrangement: Arrangement, *, experts: bool) -> Passes:
    """Work of one layer on one micro-batch."""
    key = "work", experts, arrangement.share_of_work
    return run.once(key, lambda: _work_of_layer(run, arrangement, experts=experts))


def _work_of_layer(run: RunFacts, arrangement: Arrangement, *, experts: bool) -> Passes:
    model, tp = run.model, arrangement.layout.tp
    variant, shape = ATTENTION[model.attention.variant], Shape.of(run, arrangement)
    projected = variant.query_cost(model).flops / tp
    # fewer heads than ranks: each computes the one that it looks at
    projected += variant.key_value_cost(model).flops * shape.kv_heads / known(model.attention.num_kv_heads)
    products = variant.query_cost(model) + variant.key_value_cost(model)
    mixing = variant.cost(model, run.seq_len).flops - products.flops
    fed = MoE.cost(model) if experts else FEEDFORWARD[model.ffn.variant].cost(model)
    linear = projected + (0.0 if experts else fed.flops / tp)
    eight_bits = shape.tokens * linear if run.precision == "fp8" else 0.0
    forward = Work(
        shape.tokens * (projected + fed.flops / tp),
        shape.tokens * mixing / tp,
        _moved(run, shape, experts=experts),
        eight_bits,
    )
    backward = Work(forward.matmul * 2, forward.attention * FLASH_BACKWARD, forward.moved * 2, eight_bits * 2)
    if eight_bits:
        there, back = _quantized(run, shape, linear, experts=experts)
        forward, backward = forward + Work(moved=there), backward + Work(moved=back)
    again = Work()
    for recompute, share in recomputed_layers(arrangement.activation_checkpoint).items():
        if recompute == "full":
            last = 0.0 if experts or needs_last_product(run) else _last_product(run, shape, tp)
            narrow = eight_bits - last if eight_bits else 0.0
            again += Work(forward.matmul - last, forward.attention, forward.moved, narrow) * share
        elif recompute == "selective":
            again += Work(moved=forward.moved) * share
    return Passes(forward, backward, again)


def _quantized(run: RunFacts, shape: Shape, linear: float, *, experts: bool) -> tuple[float, float]:
    """Bytes that making 8-bit floats moves in a layer's forward and backward; see `parallel.fp8`.

    linear: FLOPs of a token. Of products' inputs, weights and outputs' gradients the largest number is looked for, and
    each is scaled and rounded; in the backward weights again, and all three are transposed.
    """
    model, tp = run.model, run.model.attention.num_heads / shape.heads
    hidden = 0.0 if experts else known(model.ffn.d_ff) / tp
    gates = 0 if experts else 2 if model.ffn.variant != "mlp" else 1
    heads, kv_heads = (count * known(model.attention.head_dim) for count in (shape.heads, shape.kv_heads))
    d, tokens, weights = model.d_model, shape.tokens, linear / 2
    inputs = tokens * ((3 + gates) * d + heads + hidden)
    outputs = tokens * (heads + 2 * kv_heads + d + gates * hidden + (0 if experts else d))
    each = QUANTIZED_COMPILED if run.compiled else QUANTIZED
    return each * (inputs + weights), each * (weights + outputs) + 2 * (inputs + weights + outputs)


def needs_last_product(run: RunFacts) -> bool:
    """Whether a layer's backward needs what its last projection made, which is else not made again."""
    model = run.model
    return model.norm.placement != "pre" or model.dropout > 0


def _last_product(run: RunFacts, shape: Shape, tp: int) -> float:
    return shape.tokens * linear_cost(known(run.model.ffn.d_ff), run.model.d_model).flops / tp


def _moved(run: RunFacts, shape: Shape, *, experts: bool) -> float:
    """Bytes in and out of the forward's element-wise operators; the compiler joins them into fewer."""
    model, a, compiled = run.model, shape.itemsize, run.compiled
    d, steps = model.d_model, 1 if model.parallel_layers else 2
    norms = steps * (2 if model.norm.placement == "sandwich" else 1)
    vectors: float = norms * 2 + steps * (2 if compiled else 3)
    moved: float = vectors * shape.own_tokens * d
    if model.positional.encoding == "rope":
        heads = (shape.heads + shape.kv_heads) * known(model.attention.head_dim)
        moved += (2 if compiled else 12) * shape.tokens * heads
    width, tokens = known(model.ffn.d_ff), shape.tokens
    tp = model.attention.num_heads / shape.heads
    hidden = tokens * width / tp
    if experts:
        assert model.moe is not None
        rows = shape.own_tokens * model.moe.top_k
        hidden = rows * known(model.moe.d_ff)
        # sorted by expert, and back
        moved += 6 * rows * d
        hidden += tokens / tp * model.moe.num_shared_experts * known(model.moe.d_ff)
    passes = (3 if compiled else 5) if model.ffn.variant != "mlp" else 2
    return (moved + passes * hidden) * a


def _head(run: RunFacts, arrangement: Arrangement) -> Passes:
    shape = Shape.of(run, arrangement)
    rows = -(-known(run.model.vocab_size) // arrangement.layout.tp)
    product = shape.tokens * linear_cost(run.model.d_model, rows).flops
    # logits, in fp32 too, are read and written some ten times; see model.loss
    return Passes(Work(product, 0.0, 10.0 * shape.tokens * rows * 4), Work(2 * product))
