"""What each rank of a pipeline does in a step, in order."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

from torch.distributed.pipelining.schedules import (
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from parallel.planner.facts import Arrangement
from parallel.stages import Schedule, rank_of

Work = Literal["F", "B", "I", "W"]
"""Forward, backward; of a backward in two halves gradients of activations and of weights."""

_SCHEDULES: dict[Schedule, Any] = {
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv_zero_bubble": ScheduleZBVZeroBubble,
}


@dataclass(frozen=True)
class Action:
    """Work of a stage on a micro-batch."""

    work: Work
    stage: int
    micro_batch: int


def actions_of(arrangement: Arrangement, place: int, count: int) -> Iterator[Action]:
    """What a rank of the pipeline does with so many micro-batches, in order. Of schedules with several stages on a rank
    it is torch's own order."""
    pp, parallel = arrangement.layout.pp, arrangement.parallel
    stages = parallel.num_stages // pp
    if parallel.pp_schedule in ("gpipe", "1f1b"):
        ahead = count if parallel.pp_schedule == "gpipe" else min(count, pp - place)
        order = [("F", number) for number in range(ahead)]
        for number in range(count):
            order.append(("B", number))
            if number + ahead < count:
                order.append(("F", number + ahead))
        yield from (Action(work, place, number) for work, number in order)  # type: ignore[arg-type]
        return
    of_schedule = SimpleNamespace(
        pp_group_size=pp,
        n_local_stages=stages,
        num_stages=parallel.num_stages,
        microbatches_per_round=count // max(1, count // pp),
        _n_microbatches=count,
    )
    for each in _SCHEDULES[parallel.pp_schedule]._calculate_single_rank_operations(of_schedule, place):
        if each is not None:
            assert rank_of(each.stage_index, pp, parallel.pp_schedule) == place
            yield Action(each.computation_type.value, each.stage_index, each.microbatch_index)
