"""Memory of the schedules that cut the backward in two (Qi et al. 2024, Zero Bubble Pipeline Parallelism), in torch's
order.

From its backward for activations to the one for weights a stage keeps all that its forward kept, and the gradients of
what has weights gave. T tokens of a rank, D d_model.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from model.config import known
from parallel.planner.actions import actions_of
from parallel.planner.activations import WIDE, DeviceType, Shape, kept_of_layer, norms_of_layer
from parallel.planner.facts import Arrangement, RunFacts
from parallel.planner.moments import Memory, loss_bytes
from parallel.planner.rank import Rank
from parallel.stages import IN_HALVES

_ROUNDS = 4
"""Of micro-batches; after them a rank holds no more than before."""


@dataclass(frozen=True)
class _Moment:
    """In a forward, or in half of a backward; in the order of a rank's stages."""

    forward_of: int | None
    held: tuple[int, ...]
    """Micro-batches whose forward was, and whose gradients of weights are not yet."""
    halved: tuple[int, ...]
    """Of them, those whose gradients of activations are."""

    def within(self, other: "_Moment") -> bool:
        """Whether there is no more of anything here."""
        less = all(mine <= others for mine, others in zip(self.held, other.held, strict=True))
        fewer = all(mine <= others for mine, others in zip(self.halved, other.halved, strict=True))
        return less and fewer and self.forward_of == other.forward_of


def in_halves(arrangement: Arrangement) -> bool:
    """Whether the backward is cut in two."""
    return arrangement.layout.pp > 1 and arrangement.parallel.pp_schedule in IN_HALVES


def peak_in_halves(run: RunFacts, arrangement: Arrangement, rank: Rank, device: DeviceType) -> Memory:
    """What there is of activations and of the loss where most is, of a rank that recomputes nothing."""
    split = run.split(arrangement.parallel.num_stages)
    layers, last = [len(split[stage]) for stage in rank.stage_numbers], len(split) - 1
    in_loss, waiting, _ = loss_bytes(run, arrangement, device) if rank.is_last else (0.0, 0.0, 0.0)
    layer = kept_of_layer(run, arrangement, device, experts=False)
    gradients = gradients_for_weights(run, arrangement, device)
    at_work = max(layer.in_feedforward, layer.in_attention) - layer.none

    def of(moment: _Moment) -> Memory:
        counts = zip(layers, moment.held, moment.halved, strict=True)
        kept = sum(count * (held * layer.none + halved * gradients) for count, held, halved in counts)
        logits = waiting * moment.held[-1] + (in_loss - waiting if moment.forward_of == last else 0.0)
        return Memory(activations=kept + (at_work if moment.forward_of is None else 0.0), logits=logits)

    return max(map(of, _moments(run, arrangement, rank)), key=lambda memory: memory.total)


def _moments(run: RunFacts, arrangement: Arrangement, rank: Rank) -> list[_Moment]:
    """Of a rank's step, those in which no less is there than in any other."""
    layout, parallel = arrangement.layout, arrangement.parallel
    rounds = max(1, arrangement.micro_batches(run) // layout.pp)
    shown = arrangement.micro_batches(run) // rounds * min(rounds, _ROUNDS)
    key = "moments", rank.place, shown, layout.pp, parallel.pp_schedule, parallel.num_stages

    def find() -> list[_Moment]:
        found = set(_all_moments(arrangement, rank, shown))
        return [each for each in found if not any(each.within(other) for other in found - {each})]

    return run.once(key, find)


def _all_moments(arrangement: Arrangement, rank: Rank, micro_batches: int) -> Iterator[_Moment]:
    held, halved = dict.fromkeys(rank.stage_numbers, 0), dict.fromkeys(rank.stage_numbers, 0)
    for action in actions_of(arrangement, rank.place, micro_batches):
        stage, forward = action.stage, action.work == "F"
        held[stage] += forward
        # the first stage sends no gradients, and leaves all to the other half
        halved[stage] += action.work == "I" and stage > 0
        yield _Moment(stage if forward else None, tuple(held.values()), tuple(halved.values()))
        if action.work in ("B", "W"):
            held[stage] -= 1
            halved[stage] = max(0, halved[stage] - 1)


def gradients_for_weights(run: RunFacts, arrangement: Arrangement, device: DeviceType) -> float:
    """Bytes of the gradients of what a layer's norms, projections and products give for a micro-batch."""
    model, shape = run.model, Shape.of(run, arrangement)
    attention, a = model.attention, shape.itemsize
    parts = 2 if attention.variant == "complex" else 1
    head = known(attention.head_dim) * shape.tokens * a
    of_heads = head * (parts * (shape.heads + shape.kv_heads) + shape.kv_heads)
    hidden = shape.tokens * known(model.ffn.d_ff) / arrangement.layout.tp * a
    products = of_heads + hidden * (1 if model.ffn.variant == "mlp" else 2)
    # a CPU multiplies by the weights of its RMS norm in fp32
    wide = WIDE if device == "cpu" and model.norm.type != "layernorm" else a
    normed = norms_of_layer(model) * shape.own_tokens * model.d_model * wide
    return products + 2 * shape.tokens * model.d_model * a + normed
