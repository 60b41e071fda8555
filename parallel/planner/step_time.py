"""How long a step takes, by part."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from parallel.planner.facts import Arrangement, RunFacts
from parallel.planner.hardware import Device
from parallel.planner.rank import Rank, rank_at
from parallel.planner.topology import seconds
from parallel.planner.traffic import Exchange, traffic_of_rank
from parallel.planner.work import Passes, Work, work_of_rank

STEPPED = 10
"""Times that the optimizer's step reads or writes a number for each parameter: the gradient for the norm, twice for
its scaling, then weight, gradient and both moments, and all but the gradient back."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by part; communication is what no computation hides."""

    compute: float = 0.0
    """Matrix products and attention, forward and backward."""
    recompute: float = 0.0
    """What is made again for the backward."""
    elementwise: float = 0.0
    """Norms, activations, rotations, residual sums, casts: bound by the device's memory."""
    dp: float = 0.0
    """Gathering weights, summing gradients."""
    tp: float = 0.0
    cp: float = 0.0
    ep: float = 0.0
    pp: float = 0.0
    """Sending from stage to stage."""
    bubble: float = 0.0
    """Ranks of a pipeline that wait for others."""
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        """The step."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def predict_step_time(run: RunFacts, arrangement: Arrangement, device: Device) -> StepTime:
    """Of the slowest rank, for which the others wait."""
    pp = arrangement.layout.pp
    times = [
        _of_rank(run, arrangement, rank_at(run, arrangement, place), device)
        for place in sorted({0, pp // 2, pp - 1})
    ]
    return max(times, key=lambda time: time.total)


def compute_seconds(work: Work, run: RunFacts, device: Device) -> float:
    """Of products and attention."""
    peak = device.peak_flops(run.precision)
    return work.matmul / (peak * device.matmul_efficiency) + work.attention / (
        peak * device.attention_efficiency
    )


def _moving_seconds(bytes_: float, device: Device) -> float:
    return bytes_ / (device.memory_gb_per_s * 1e9 * device.memory_efficiency)


def _of_rank(run: RunFacts, arrangement: Arrangement, rank: Rank, device: Device) -> StepTime:
    micro_batches = arrangement.micro_batches(run)
    work, traffic = work_of_rank(run, arrangement, rank), traffic_of_rank(run, arrangement, rank)
    recompute = compute_seconds(work.recompute, run, device) * micro_batches
    compute = compute_seconds(work.forward + work.backward, run, device) * micro_batches
    copied = _copied(run, arrangement, rank, micro_batches)
    elementwise = _moving_seconds(work.total.moved * micro_batches + copied, device)
    exposed = {name: _sum(traffic, name, device) for name in ("tp", "cp", "ep", "pp")}
    busy = compute + recompute + elementwise + sum(exposed.values())
    forward = _share_of_forward(work, run, device)
    return StepTime(
        compute=compute,
        recompute=recompute,
        elementwise=elementwise,
        dp=_exposed_dp(arrangement, traffic, device, micro_batches, busy * forward, busy * (1 - forward)),
        **exposed,
        bubble=busy * bubble(arrangement, micro_batches, forward),
        optimizer=_moving_seconds(STEPPED * rank.all.stored * run.master_size, device),
    )


def _sum(traffic: Iterable[Exchange], dimension: str, device: Device) -> float:
    return sum(seconds(each, device) * each.count for each in traffic if each.dimension == dimension)


def _share_of_forward(work: Passes, run: RunFacts, device: Device) -> float:
    return compute_seconds(work.forward, run, device) / compute_seconds(work.total, run, device)


def _copied(run: RunFacts, arrangement: Arrangement, rank: Rank, micro_batches: int) -> float:
    """Bytes that gathering and reducing copy in and out of buffers."""
    a, times = run.itemsize, 1 if arrangement.layout.pp > 1 else micro_batches
    gathers = 1 if arrangement.keeps_gathered else 2
    return rank.all.computed * (2 * a * gathers + a + run.master_size) * times


def _exposed_dp(
    arrangement: Arrangement,
    traffic: list[Exchange],
    device: Device,
    micro_batches: int,
    forward: float,
    backward: float,
) -> float:
    """What of gathering and reducing is longer than the computation beside it, and what has none beside it.

    forward, backward: seconds of all micro-batches. Without a pipeline the forward gathers the next layer, and the
    backward gathers the one before and reduces the one behind; replicas are summed in the last backward. The root is
    gathered before the first layer, and reduced after it.
    """
    mine = [each for each in traffic if each.dimension in ("dp_shard", "dp_replicate")]
    spent = {(each.kind, each.of == "root"): 0.0 for each in mine}
    for each in mine:
        spent[each.kind, each.of == "root"] += seconds(each, device) * each.count
    gather, reduce = spent.get(("all_gather", False), 0.0), spent.get(("reduce_scatter", False), 0.0)
    replicate = spent.get(("all_reduce", False), 0.0)
    alone = sum(taken for (_, is_root), taken in spent.items() if is_root)
    if arrangement.layout.pp > 1:
        return alone + max(0.0, gather - forward / micro_batches) + reduce + replicate
    in_forward = gather if arrangement.keeps_gathered else gather / 2
    one = backward / micro_batches
    last = (gather - in_forward + reduce) / micro_batches + replicate
    others = (gather - in_forward + reduce) * (1 - 1 / micro_batches)
    return alone + max(0.0, in_forward - forward) + max(0.0, others - (backward - one)) + max(0.0, last - one)


def bubble(arrangement: Arrangement, micro_batches: int, forward: float) -> float:
    """Time that a rank waits, over the time that it works; `forward`: the forward's share of that.

    GPipe, 1F1B: Narayanan et al. 2021, section 2.2.1, and interleaved 2.2.2. Zero bubble: Qi et al. 2023, table 1
    (ZB-H1: (p - 1)(F + B - W)), over the stages of a rank; ZBV: (p - 1)(F + B - 2W), their 2024. B is the gradients of
    activations, W that of weights, which takes as long as the forward does.
    """
    pp, schedule = arrangement.layout.pp, arrangement.parallel.pp_schedule
    stages = arrangement.parallel.stages_per_rank or 1
    if pp == 1:
        return 0.0
    of_one = (pp - 1) / micro_batches
    if schedule in ("gpipe", "1f1b"):
        return of_one
    if schedule == "interleaved_1f1b":
        return of_one / stages
    weights = forward
    left = 1 - weights * (2 if schedule == "interleaved_zero_bubble" else 3)
    return of_one * max(0.0, left) / (stages if schedule == "interleaved_zero_bubble" else 1)
