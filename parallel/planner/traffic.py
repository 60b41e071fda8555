"""What a rank sends and receives in a step, collective by collective.

B batch, T sequence, D d_model, H heads, K kv heads, E head_dim, X experts.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from model.config import known
from parallel.layout import Layout
from parallel.planner.activations import Shape, recomputed_layers
from parallel.planner.facts import Arrangement, RunFacts
from parallel.planner.parameters import held
from parallel.planner.rank import Rank
from parallel.planner.work import needs_last_product
from parallel.planner.zero import gathered_in_loss, whole_in_stage_3
from parallel.stages import rank_of

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send"]
Dimension = Literal["dp_shard", "dp_replicate", "tp", "cp", "ep", "pp"]
WIDE = 4


@dataclass(frozen=True)
class Exchange:
    """Equal collectives of one rank in a step."""

    kind: Kind
    dimension: Dimension
    """Whose ranks take part; dp_shard: those over which FSDP shards, so that cp is among them."""
    ranks: int
    stride: int
    """How far apart the ranks are that take part."""
    count: int
    """In a step."""
    bytes: float
    """Of one: of the whole that all_gather puts out or reduce_scatter takes in, of what all_reduce, all_to_all and
    send take."""
    of: str
    """What is sent: `layer`, `root`, `tokens`, ...; `step`: what is beside no computation."""

    @property
    def total(self) -> float:
        """Bytes of a step."""
        return self.count * self.bytes


def bytes_by_kind(exchanges: Iterable[Exchange]) -> dict[tuple[Kind, Dimension], float]:
    """Bytes of a step, by kind and dimension."""
    totals: dict[tuple[Kind, Dimension], float] = defaultdict(float)
    for exchange in exchanges:
        totals[exchange.kind, exchange.dimension] += exchange.total
    return dict(totals)


def traffic_of_rank(run: RunFacts, arrangement: Arrangement, rank: Rank) -> list[Exchange]:
    """All exchanges of a step but those of a few numbers (losses, norms, counts)."""
    return traffic_of_weights(run, arrangement, rank) + traffic_of_work(run, arrangement, rank)


def traffic_of_weights(run: RunFacts, arrangement: Arrangement, rank: Rank) -> list[Exchange]:
    """Those that gather weights and sum gradients over data-parallel ranks."""
    makes = _zero if arrangement.parallel.engine == "deepspeed" else _fsdp
    return _of_several(makes(run, arrangement, rank))


def traffic_of_work(run: RunFacts, arrangement: Arrangement, rank: Rank) -> list[Exchange]:
    """Those that a micro-batch makes on its way."""
    makers = _tensor, _context, _experts, _pipeline
    return _of_several(each for make in makers for each in make(run, arrangement, rank))


def _of_several(exchanges: Iterable[Exchange]) -> list[Exchange]:
    return [each for each in exchanges if each.ranks > 1 and each.count and each.bytes]


def _fsdp(run: RunFacts, arrangement: Arrangement, rank: Rank) -> Iterator[Exchange]:
    layout = arrangement.layout
    # a pipeline gathers and reduces once in a step
    times = 1 if layout.pp > 1 else arrangement.micro_batches(run)
    gathers = 1 if arrangement.keeps_gathered else 2
    units = (
        ("layer", rank.dense_layer, rank.dense_layers, gathers),
        ("layer", rank.expert_layer, rank.expert_layers, gathers),
        ("root", rank.root, 1, 1),
    )
    for of, mine, count, gathered in units:
        if not count:
            continue
        yield from _shards(
            run, layout, of, mine.shard, count, times, gathered, (layout.shard_size, layout.tp)
        )
        if mine.expert_shard:
            ranks = layout.shard_size // layout.ep, layout.tp * layout.ep
            yield from _shards(run, layout, of, mine.expert_shard, count, times, gathered, ranks)


def _shards(
    run: RunFacts,
    layout: Layout,
    of: str,
    shard: int,
    count: int,
    times: int,
    gathered: int,
    over: tuple[int, int],
) -> Iterator[Exchange]:
    """Of so many units with shards of this size. over: ranks and stride."""
    ranks, stride = over
    if ranks > 1:
        whole = shard * ranks
        gathers = count * times * gathered
        yield Exchange("all_gather", "dp_shard", ranks, stride, gathers, whole * run.itemsize, of)
        yield Exchange(
            "reduce_scatter", "dp_shard", ranks, stride, count * times, whole * run.master_size, of
        )
    replicas = layout.dp_replicate
    if replicas > 1:
        apart = layout.tp * layout.shard_size
        yield Exchange("all_reduce", "dp_replicate", replicas, apart, count, shard * run.master_size, of)


def _zero(run: RunFacts, arrangement: Arrangement, rank: Rank) -> Iterator[Exchange]:
    """Whole gradients are summed in fp32: of stages 0 and 1 once in a step, of 2 after every micro-batch; stage 3 sends
    each rank its part. Weights are gathered after the step, or by stage 3 whenever they are used and not there."""
    layout, held, stage = arrangement.layout, rank.all, arrangement.parallel.deepspeed.stage
    every = arrangement.micro_batches(run)
    units = (
        (held.whole, layout.shard_size, layout.tp),
        (held.expert_whole, layout.shard_size // layout.ep, layout.tp * layout.ep),
    )
    for whole, ranks, stride in units:
        if not whole:
            continue
        if stage == 3:
            partitioned = whole - whole_in_stage_3(run, arrangement, rank)
            again = partitioned - gathered_in_loss(run, arrangement, rank)
            size = (partitioned + again) * run.itemsize
            yield Exchange("all_gather", "dp_shard", ranks, stride, every, size, "layer")
            yield Exchange("reduce_scatter", "dp_shard", ranks, stride, every, whole * WIDE, "layer")
            left = (whole - partitioned) * run.itemsize
            yield Exchange("all_gather", "dp_shard", ranks, stride, 1, left, "step")
            continue
        yield Exchange(
            "all_reduce", "dp_shard", ranks, stride, every if stage == 2 else 1, whole * WIDE, "step"
        )
        if stage > 0:
            yield Exchange("all_gather", "dp_shard", ranks, stride, 1, whole * run.itemsize, "step")


def _tensor(run: RunFacts, arrangement: Arrangement, rank: Rank) -> Iterator[Exchange]:
    layout, shape, model = arrangement.layout, Shape.of(run, arrangement), run.model
    ranks, micro_batches = layout.tp, arrangement.micro_batches(run)
    if ranks == 1:
        return
    size = shape.tokens * model.d_model * shape.itemsize
    shared = arrangement.parallel.sequence_parallel

    def exchange(kind: Kind, count: float, bytes_: float = size, of: str = "tokens") -> Exchange:
        return Exchange(kind, "tp", ranks, 1, round(count * micro_batches), bytes_, of)

    full = recomputed_layers(arrangement.activation_checkpoint).get("full", 0.0)
    dense_regions, expert_regions = 2, 2 if model.moe is not None and model.moe.num_shared_experts else 1
    regions = dense_regions * rank.dense_layers + expert_regions * rank.expert_layers
    # of a dense layer made again, the last sum is left out where nothing needs it
    left_out = 0 if needs_last_product(run) else rank.dense_layers
    if shared:
        yield exchange("all_gather", regions * (2 + full))
        yield exchange("reduce_scatter", regions * (2 + full) - left_out * full)
        yield exchange("all_gather", 2 * rank.stages)
    else:
        yield exchange("all_reduce", regions * (2 + full) - left_out * full)
        yield exchange("all_gather", rank.expert_layers * (2 + full))
    if rank.expert_layers and model.moe is not None:
        logits = shape.tokens * model.moe.num_experts * WIDE
        yield exchange("all_gather", rank.expert_layers * (1 + full), logits, "routing")
    yield exchange("all_reduce", rank.is_first + rank.is_last)
    if rank.is_last:
        yield exchange("all_reduce", 1, 3 * shape.tokens * WIDE, "normalizers")
    if arrangement.parallel.engine == "deepspeed":
        # as they are made
        partial = rank.all.partial * layout.shard_size * run.itemsize
        yield exchange("all_reduce", 1, partial, "partial gradients")
    else:
        partial = rank.all.partial * run.master_size
        yield Exchange("all_reduce", "tp", ranks, 1, 1, partial, "partial gradients")


def _context(run: RunFacts, arrangement: Arrangement, rank: Rank) -> Iterator[Exchange]:
    layout, shape, attention = arrangement.layout, Shape.of(run, arrangement), run.model.attention
    if layout.cp == 1:
        return
    full = recomputed_layers(arrangement.activation_checkpoint).get("full", 0.0)
    parts = 2 if attention.variant == "complex" else 1
    if arrangement.in_ring:
        # of keys and values, each in a message of its own; their gradients are summed on their way
        numbers = shape.tokens * shape.kv_heads * (parts + 1) * known(attention.head_dim) / 2
        sends = 2 * (layout.cp - 1) * rank.layers * arrangement.micro_batches(run)
        wide = max(shape.itemsize, WIDE)
        for times, itemsize, of in ((2 + full, shape.itemsize, "keys"), (1, wide, "gradients of keys")):
            yield Exchange("send", "cp", layout.cp, layout.tp, round(sends * times), numbers * itemsize, of)
        return
    keys = max(shape.kv_heads, layout.cp)
    widths = shape.heads * (parts + 1) + keys * (parts + 1)
    size = shape.tokens * widths * known(attention.head_dim) * shape.itemsize / 4
    count = round(4 * rank.layers * (2 + full) * arrangement.micro_batches(run))
    yield Exchange("all_to_all", "cp", layout.cp, layout.tp, count, size, "heads")


def _experts(run: RunFacts, arrangement: Arrangement, rank: Rank) -> Iterator[Exchange]:
    layout, shape, moe = arrangement.layout, Shape.of(run, arrangement), run.model.moe
    if layout.ep == 1 or moe is None:
        return
    full = recomputed_layers(arrangement.activation_checkpoint).get("full", 0.0)
    size = shape.own_tokens * moe.top_k * run.model.d_model * shape.itemsize
    count = round(2 * rank.expert_layers * (2 + full) * arrangement.micro_batches(run))
    yield Exchange("all_to_all", "ep", layout.ep, layout.tp, count, size, "rows")


def _pipeline(run: RunFacts, arrangement: Arrangement, rank: Rank) -> Iterator[Exchange]:
    layout, shape, parallel = arrangement.layout, Shape.of(run, arrangement), arrangement.parallel
    if layout.pp == 1:
        return
    last = parallel.num_stages - 1

    def elsewhere(stage: int, other: int) -> bool:
        if not 0 <= other <= last:
            return False
        return rank_of(other, layout.pp, parallel.pp_schedule) != rank_of(
            stage, layout.pp, parallel.pp_schedule
        )

    sends = sum(elsewhere(stage, stage + step) for stage in rank.stage_numbers for step in (1, -1))
    size = shape.tokens * run.model.d_model * shape.itemsize
    stride = layout.world_size // layout.pp
    yield Exchange("send", "pp", layout.pp, stride, sends * arrangement.micro_batches(run), size, "tokens")
    if run.model.tie_embeddings and (rank.is_first or rank.is_last):
        tables = [each for each in run.inventory.entrance if each.sharding == "vocabulary"]
        table = held(tables, layout, run.inventory.kv_heads, shares_tokens=False)
        ends = stride * (layout.pp - 1)
        yield Exchange("all_reduce", "pp", 2, ends, 1, table.shard * run.master_size, "tied embedding")
