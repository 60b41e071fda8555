"""How long a step takes, by part."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from model.config import known
from parallel.planner.activations import Shape, recomputed_layers
from parallel.planner.facts import Arrangement, RunFacts
from parallel.planner.hardware import Device
from parallel.planner.offload import host_bytes, stepped
from parallel.planner.parts import Parts
from parallel.planner.rank import Rank, rank_at
from parallel.planner.topology import seconds
from parallel.planner.traffic import Exchange, traffic_of_weights, traffic_of_work
from parallel.planner.work import FLASH_BACKWARD, Work, work_of_rank

STEPPED = 10
"""Times that the optimizer's step reads or writes a number for each parameter: the gradient for the norm, twice for
its scaling, then weight, gradient and both moments, and all but the gradient back."""
KERNELS, KERNELS_COMPILED = 40, 15
"""That a layer's forward starts; the backward starts twice as many. Counted roughly."""


@dataclass(frozen=True)
class StepTime(Parts):
    """Seconds of a step, by part; communication is what no computation hides."""

    compute: float = 0.0
    """Matrix products and attention, forward and backward."""
    recompute: float = 0.0
    """What is made again for the backward."""
    elementwise: float = 0.0
    """Norms, activations, rotations, residual sums, casts: bound by the device's memory."""
    launch: float = 0.0
    """The device waits for the host to start small kernels."""
    dp: float = 0.0
    """Gathering weights, summing gradients."""
    tp: float = 0.0
    cp: float = 0.0
    ep: float = 0.0
    pp: float = 0.0
    """Sending from stage to stage, where nothing is computed beside it."""
    bubble: float = 0.0
    """Ranks of a pipeline that wait for others."""
    optimizer: float = 0.0
    host: float = 0.0
    """Copies between a device and its host, of what is offloaded."""


def predict_step_time(run: RunFacts, arrangement: Arrangement, device: Device) -> StepTime:
    """Of the slowest rank, for which the others wait."""
    times = [step_time_of_place(run, arrangement, place, device) for place in _places(run, arrangement)]
    return max(times, key=lambda time: time.total)


def least_seconds(run: RunFacts, arrangement: Arrangement, device: Device) -> float:
    """What a step takes at least, whichever data-parallel ranks share weights: quick, as layouts have it in common."""
    return max(at_work(run, arrangement, place, device).time.total for place in _places(run, arrangement))


def _places(run: RunFacts, arrangement: Arrangement) -> list[int]:
    """Of the pipeline: its ends, and the one between them that has most layers."""
    pp, parallel = arrangement.layout.pp, arrangement.parallel
    if pp < 3:
        return list(range(pp))
    key = "places", pp, parallel.num_stages, parallel.pp_schedule

    def find() -> list[int]:
        fullest = max(range(1, pp - 1), key=lambda place: rank_at(run, arrangement, place).layers)
        return [0, fullest, pp - 1]

    return run.once(key, find)


def compute_seconds(work: Work, run: RunFacts, device: Device, rate: float) -> float:
    """Of products, which reach a share `rate` of what large ones do, and attention."""
    peak = device.peak_flops(run.wide_precision)
    matmul = (work.matmul - work.eight_bits) / peak
    if work.eight_bits:
        matmul += work.eight_bits / device.peak_flops("fp8")
    return matmul / (device.matmul_efficiency * rate) + work.attention / (peak * device.attention_efficiency)


def matmul_rate(run: RunFacts, arrangement: Arrangement, device: Device) -> float:
    """The share of the rate of large products that is left with few tokens and features on a rank."""
    shape, layout, model = Shape.of(run, arrangement), arrangement.layout, run.model
    features = min(model.d_model, known(model.ffn.d_ff)) / layout.tp
    half = device.half_rate_size
    return shape.tokens / (shape.tokens + half) * features / (features + half)


@dataclass(frozen=True)
class AtWork:
    """A rank's step but for what its data-parallel ranks do for each other."""

    time: StepTime
    forward: float
    """Seconds in forwards and in backwards."""
    backward: float


def at_work(run: RunFacts, arrangement: Arrangement, place: int, device: Device) -> AtWork:
    """Of the rank at a place of the pipeline."""
    layout, parallel = arrangement.layout, arrangement.parallel
    pipeline = layout.pp, parallel.pp_schedule, parallel.num_stages
    key = "time", device.name, arrangement.share_of_work, arrangement.micro_batches(run), place, pipeline
    return run.once(key, lambda: _find_at_work(run, arrangement, rank_at(run, arrangement, place), device))


def _find_at_work(run: RunFacts, arrangement: Arrangement, rank: Rank, device: Device) -> AtWork:
    layout, micro_batches = arrangement.layout, arrangement.micro_batches(run)
    rate = matmul_rate(run, arrangement, device)
    work, traffic = work_of_rank(run, arrangement, rank), traffic_of_work(run, arrangement, rank)

    def took(work: Work) -> float:
        return compute_seconds(work, run, device, rate) * micro_batches

    recompute, forward = took(work.recompute), took(work.forward)
    compute = forward + took(work.backward)
    elementwise = work.total.moved * micro_batches / device.memory_rate
    exposed = {name: _sum(traffic, name, device) for name in ("tp", "cp", "ep")}
    exposed["pp"] = _sending(arrangement, traffic, device, compute + recompute + elementwise)
    if arrangement.in_ring:
        # while keys are on their way, those before them are at work
        beside = Work(attention=work.total.attention * (1 - 1 / layout.cp))
        exposed["cp"] = max(0.0, exposed["cp"] - took(beside))
    on_device = compute + recompute + elementwise + sum(exposed.values())
    launch = max(0.0, _launching(run, arrangement, rank, device) * micro_batches - on_device)
    busy = on_device + launch
    share = forward / (compute + recompute)
    waiting = bubble(arrangement, micro_batches, work.forward, run, device) * busy
    time = StepTime(
        compute=compute,
        recompute=recompute,
        elementwise=elementwise,
        launch=launch,
        bubble=waiting,
        **exposed,
    )
    return AtWork(time, busy * share, busy * (1 - share))


def step_time_of_place(run: RunFacts, arrangement: Arrangement, place: int, device: Device) -> StepTime:
    """Of the rank at a place of the pipeline."""
    micro_batches, rank = arrangement.micro_batches(run), rank_at(run, arrangement, place)
    passes = at_work(run, arrangement, place, device)
    copied = _copied(run, arrangement, rank, micro_batches) / device.memory_rate
    traffic = traffic_of_weights(run, arrangement, rank)
    return replace(
        passes.time,
        dp=copied + _exposed(arrangement, traffic, device, micro_batches, passes.forward, passes.backward),
        optimizer=_stepping_seconds(run, arrangement, rank, device),
        host=host_bytes(run, arrangement, rank) / device.host_rate,
    )


def _stepping_seconds(run: RunFacts, arrangement: Arrangement, rank: Rank, device: Device) -> float:
    bytes_ = STEPPED * stepped(arrangement, rank) * run.master_size
    return bytes_ / (device.host_memory_rate if arrangement.offloads else device.memory_rate)


def _launching(run: RunFacts, arrangement: Arrangement, rank: Rank, device: Device) -> float:
    """Seconds that the host takes to start the kernels of a micro-batch."""
    forward = KERNELS_COMPILED if run.compiled else KERNELS
    again = sum(
        share for how, share in recomputed_layers(arrangement.activation_checkpoint).items() if how != "none"
    )
    return rank.layers * forward * (3 + again) * device.launch_us * 1e-6


def _sum(traffic: Iterable[Exchange], dimension: str, device: Device) -> float:
    return sum(seconds(each, device) * each.count for each in traffic if each.dimension == dimension)


def _sending(
    arrangement: Arrangement, traffic: Iterable[Exchange], device: Device, computing: float
) -> float:
    """What a pipeline's ranks wait for what they send each other.

    A micro-batch of 1f1b comes back to a rank just when it is needed, so that each send makes all later ones wait, and
    torch's schedule waits for it, too. Schedules with several stages on a rank have more micro-batches under way
    (Narayanan et al. 2021, section 2.2), and gpipe all: sends go on beside the computation of the next. None is beside
    it while the pipeline fills and empties.

    computing: seconds of a step.
    """
    waits = [each for each in traffic if each.dimension == "pp"]
    taken = {each: seconds(each, device) * each.count for each in waits}
    others = sum(taken[each] for each in waits if each.kind != "send")
    sends = [each for each in waits if each.kind == "send"]
    all_ = sum(taken[each] for each in sends)
    if arrangement.parallel.pp_schedule == "1f1b":
        return all_ + others
    ramp = 2 * (arrangement.layout.pp - 1) * max((seconds(each, device) for each in sends), default=0.0)
    return min(all_, ramp + max(0.0, all_ - computing)) + others


def _copied(run: RunFacts, arrangement: Arrangement, rank: Rank, micro_batches: int) -> float:
    """Bytes that gathering and reducing copy in and out of buffers."""
    a, times = run.itemsize, 1 if arrangement.layout.pp > 1 else micro_batches
    gathers = 1 if arrangement.keeps_gathered else 2
    return rank.all.computed * (2 * a * gathers + a + run.master_size) * times


def _exposed(
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
    spent: dict[tuple[str, bool], float] = defaultdict(float)
    for each in traffic:
        spent[each.kind, each.of in ("root", "step")] += seconds(each, device) * each.count
    gather, reduce, replicate = (
        spent[kind, False] for kind in ("all_gather", "reduce_scatter", "all_reduce")
    )
    alone = sum(taken for (_, by_itself), taken in spent.items() if by_itself)
    if arrangement.layout.pp > 1:
        return alone + max(0.0, gather - forward / micro_batches) + reduce + replicate
    in_forward = gather if arrangement.keeps_gathered else gather / 2
    one = backward / micro_batches
    last = (gather - in_forward + reduce) / micro_batches + replicate
    others = (gather - in_forward + reduce) * (1 - 1 / micro_batches)
    return alone + max(0.0, in_forward - forward) + max(0.0, others - (backward - one)) + max(0.0, last - one)


def bubble(
    arrangement: Arrangement, micro_batches: int, forward: Work, run: RunFacts, device: Device
) -> float:
    """Time that a rank waits, over the time that it works.

    GPipe, 1F1B: Narayanan et al. 2021, section 2.2.1; interleaved: 2.2.2. ZB-H1, which a rank's stages share as they do
    interleaved 1F1B: (p - 1)(F + B - W), ZBV: (p - 1)(F + B - 2W), F, B and W being the times of the forward and of
    the gradients of activations and of weights (Qi et al. 2024). Products take as long in each of the three; attention
    has no weights.
    """
    pp, schedule = arrangement.layout.pp, arrangement.parallel.pp_schedule
    if pp == 1:
        return 0.0
    of_one = (pp - 1) / micro_batches
    if schedule in ("gpipe", "1f1b"):
        return of_one
    if schedule == "interleaved_1f1b":
        return of_one / (arrangement.parallel.stages_per_rank or 1)
    product, mixing = (
        compute_seconds(work, run, device, 1.0)
        for work in (Work(forward.matmul, eight_bits=forward.eight_bits), Work(attention=forward.attention))
    )
    in_attention = (1 + FLASH_BACKWARD) * mixing
    whole = 3 * product + in_attention
    if schedule == "interleaved_zero_bubble":
        return of_one / (arrangement.parallel.stages_per_rank or 1) * (product + in_attention) / whole
    return of_one * in_attention / whole
