"""The search finds what a look at every layout finds, and what it finds can be started."""

from collections.abc import Iterator

import pytest

from parallel.config import ParallelConfig
from parallel.errors import LayoutError
from parallel.fit import check_fit, check_micro_batches
from parallel.planner.estimate import Estimate, estimate
from parallel.planner.facts import Arrangement, RunFacts
from parallel.planner.hardware import Device, load_device
from parallel.planner.search import ABOUT, RECOMPUTED, meshes, search
from parallel.planner.step_time import least_seconds
from tests.parallel.planner.cases import LLAMA, MOE, run_of
from train.config_file import load_config
from train.plan import run_facts

GPU = load_device("h100-80gb")


def preset(name: str) -> RunFacts:
    return run_facts(load_config(name, ["data.path=unused"]).config)


def small_gpu(gib: float) -> Device:
    return GPU.model_copy(update={"memory_gib": gib, "reserved_gib": 0.0})


def all_layouts(run: RunFacts, world: int, device: Device) -> Iterator[Estimate]:
    """Every mesh that fits the model, with every schedule and way of recomputing; without a bound on anything."""
    for layout in meshes(run, world, device):
        schedules = [("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 4)]
        schedules += [("interleaved_zero_bubble", 2), ("zbv_zero_bubble", 2)]
        for schedule, stages in schedules if layout.pp > 1 else schedules[:1]:
            sizes = {
                name: getattr(layout, name) for name in ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep")
            }
            for reshard in (True, False) if layout.pp == 1 else (True,):
                parallel = ParallelConfig(
                    **sizes, pp_schedule=schedule, stages_per_rank=stages, reshard_after_forward=reshard
                )
                for micro in (1, 2, 4, 8):
                    count, left = divmod(run.global_batch_size, micro * layout.data_size)
                    try:
                        check_fit(layout, parallel, run.model, run.seq_len)
                        check_micro_batches(parallel, count)
                    except LayoutError:
                        continue
                    if left or not count or (schedule == "1f1b" and count < layout.pp):
                        continue
                    for again in RECOMPUTED[:1] if "zero_bubble" in schedule else RECOMPUTED:
                        yield estimate(run, Arrangement(parallel, micro, again), device)


@pytest.mark.parametrize("gib", [0.02, 0.03, 1.0])
@pytest.mark.parametrize("model", [LLAMA, MOE], ids=["dense", "experts"])
def test_nothing_that_fits_is_faster(model: dict[str, object], gib: float) -> None:
    run, device = run_of(model, sequences=8), small_gpu(gib)
    found = search(run, 8, device)
    fastest = min(
        (each for each in all_layouts(run, 8, device) if each.fits), key=lambda each: each.time.total
    )
    assert found.fitting[0].fits
    assert found.fitting[0].time.total <= fastest.time.total * (1 + ABOUT) ** 2


@pytest.mark.parametrize(("name", "world"), [("7b", 64), ("70b", 512), ("moe-8x7b", 64)])
def test_what_is_found_can_be_started(name: str, world: int) -> None:
    run = preset(name)
    found = search(run, world, GPU)
    assert len(found.fitting) > 1
    for each in found.fitting:
        arrangement = each.arrangement
        assert arrangement.layout.world_size == world and each.fits
        assert run.global_batch_size % (arrangement.layout.data_size * arrangement.micro_batch_size) == 0
        check_fit(arrangement.layout, arrangement.parallel, run.model, run.seq_len)
        check_micro_batches(arrangement.parallel, arrangement.micro_batches(run))
        assert least_seconds(run, arrangement, GPU) <= each.time.total
    assert all(not each.fits for each in found.too_large)


@pytest.mark.slow
def test_the_largest_search_weighs_few_enough() -> None:
    """A core weighs some 4,000 a second; without bounds there would be many times as many."""
    assert 10_000 < search(preset("405b"), 4096, GPU).weighed < 40_000


def test_the_method_that_is_asked_for_is_searched() -> None:
    """Four sequences and eight ranks: some share a sequence."""
    ring = ParallelConfig(cp_method="ring")
    searched = search(run_of(LLAMA, sequences=4), 8, GPU, limit=20, given=ring)
    found = [each.arrangement for each in searched.fitting]
    assert any(arrangement.layout.cp > 1 for arrangement in found)
    assert all(arrangement.in_ring for arrangement in found if arrangement.layout.cp > 1)


def test_a_model_that_fits_nowhere_is_told_how_many_would_do() -> None:
    run = preset("70b")
    with pytest.raises(LayoutError, match="no layout of 8 x H100 80GB fits: .* use 16 of them") as told:
        search(run, 8, GPU)
    assert "\n" not in str(told.value)
    assert search(run, 16, GPU).fitting


def test_a_batch_that_can_not_be_shared_out_is_told() -> None:
    with pytest.raises(
        LayoutError, match="no layout of 7 ranks can share out data.global_batch_size=8 .* 4 for"
    ):
        search(run_of(LLAMA, sequences=8), 7, GPU)
