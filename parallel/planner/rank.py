"""What one rank of a layout has: its layers, their parameters, and how many micro-batches it is at."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

from parallel.planner.facts import Arrangement, RunFacts
from parallel.planner.parameters import Held, Parameters, held
from parallel.stages import IN_HALVES, stages_of


@dataclass(frozen=True)
class Rank:
    """A rank's place in the pipeline, and what it has of the model."""

    place: int
    stage_numbers: tuple[int, ...]
    dense_layers: int
    expert_layers: int
    is_first: bool
    is_last: bool
    dense_layer: Held
    """Parameters of one layer."""
    expert_layer: Held
    root: Held
    """What is in no layer: embedding, last norm, head, positions."""

    @property
    def stages(self) -> int:
        """How many it has."""
        return len(self.stage_numbers)

    @property
    def layers(self) -> int:
        """Of both kinds."""
        return self.dense_layers + self.expert_layers

    @cached_property
    def all(self) -> Held:
        """All parameters of the rank."""
        return self.root + self.dense_layer * self.dense_layers + self.expert_layer * self.expert_layers

    @cached_property
    def largest_layer(self) -> Held:
        """The one with most parameters."""
        kinds = ((self.dense_layer, self.dense_layers), (self.expert_layer, self.expert_layers))
        return max((held for held, count in kinds if count), key=lambda held: held.computed)


def rank_at(run: RunFacts, arrangement: Arrangement, place: int) -> Rank:
    """The rank at a place of the pipeline, of those there the one that holds most."""
    parallel, layout = arrangement.parallel, arrangement.layout
    shares = layout.tp, layout.shard_size, layout.ep, parallel.sequence_parallel
    key = "rank", place, layout.pp, parallel.num_stages, parallel.pp_schedule, shares
    return run.once(key, partial(_rank_at, run, arrangement, place))


def _rank_at(run: RunFacts, arrangement: Arrangement, place: int) -> Rank:
    parallel, layout, inventory = arrangement.parallel, arrangement.layout, run.inventory
    stages = stages_of(place, parallel.pp, parallel.num_stages, parallel.pp_schedule)
    split = run.split(parallel.num_stages)
    layers = [layer for stage in stages for layer in split[stage]]
    experts = sum(layer in run.model.moe_layers for layer in layers)
    is_first, is_last = 0 in stages, parallel.num_stages - 1 in stages

    def mine(parameters: Parameters, *, in_layer: bool = False) -> Held:
        shares_tokens = in_layer and parallel.sequence_parallel
        return held(parameters, layout, inventory.kv_heads, shares_tokens=shares_tokens)

    root = mine(inventory.everywhere)
    if is_first or (is_last and run.model.tie_embeddings):
        root += mine(inventory.entrance)
    if is_last:
        root += mine(inventory.exit)
    return Rank(
        place,
        tuple(stages),
        len(layers) - experts,
        experts,
        is_first,
        is_last,
        mine(inventory.dense_layer, in_layer=True),
        mine(inventory.expert_layer, in_layer=True),
        root,
    )


def ranks_of(run: RunFacts, arrangement: Arrangement) -> Iterator[Rank]:
    """The ranks at both ends of the pipeline, one of which needs most."""
    for place in sorted({0, arrangement.layout.pp - 1}):
        yield rank_at(run, arrangement, place)


def under_way(arrangement: Arrangement, rank: Rank, micro_batches: int) -> float:
    """Micro-batches of which a rank holds what all its layers keep, at most at once.

    1F1B and interleaved 1F1B: Narayanan et al. 2021, section 2.2, and the warm-up of torch's schedule. Zero bubble: as
    1F1B's first rank, on all (Qi et al. 2024), until there are the gradients of weights.
    """
    pp, schedule = arrangement.layout.pp, arrangement.parallel.pp_schedule
    if pp == 1:
        return 1.0
    if schedule == "gpipe":
        return float(micro_batches)
    if schedule == "1f1b":
        return float(min(micro_batches, pp - rank.place))
    if schedule in IN_HALVES:
        return float(min(micro_batches, pp))
    # of single stages
    warm_up = (rank.stages - 1) * pp + 2 * (pp - 1 - rank.place)
    return min(micro_batches * rank.stages, warm_up + 1) / rank.stages
