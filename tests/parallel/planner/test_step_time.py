"""Where a step's seconds come from."""

import pytest

from parallel.planner.facts import Arrangement, RunFacts
from parallel.planner.hardware import load_device
from parallel.planner.rank import rank_at
from parallel.planner.step_time import StepTime, predict_step_time
from parallel.planner.topology import seconds
from parallel.planner.traffic import traffic_of_work
from parallel.planner.work import work_of_rank
from tests.parallel.planner.cases import LLAMA, MOE, arranged, run_of

GPU = load_device("h100-80gb")
DEEP = {**LLAMA, "num_layers": 16}


def one_send(run: RunFacts, arrangement: Arrangement) -> float:
    traffic = traffic_of_work(run, arrangement, rank_at(run, arrangement, 1))
    (send,) = (each for each in traffic if each.kind == "send")
    return seconds(send, GPU)


def time_of(run: RunFacts, schedule: str, stages: int) -> tuple[StepTime, float]:
    arrangement = arranged(1, pp=4, pp_schedule=schedule, stages_per_rank=stages)
    return predict_step_time(run, arrangement, GPU), one_send(run, arrangement)


def test_sends_of_1f1b_are_waited_for_and_those_of_interleaved_ones_only_at_the_ends() -> None:
    run = run_of({**DEEP, "max_seq_len": 2048}, sequences=32)
    plain, send = time_of(run, "1f1b", 1)
    # the slowest rank has the head, and sends gradients back
    assert plain.pp == pytest.approx(32 * send)
    for schedule, stages in (("interleaved_1f1b", 2), ("interleaved_zero_bubble", 2), ("zbv_zero_bubble", 2)):
        assert time_of(run, schedule, stages)[0].pp == pytest.approx(2 * 3 * send)


def test_sends_that_take_longer_than_what_is_computed_are_waited_for() -> None:
    run = run_of(DEEP, sequences=32)
    slow = GPU.model_copy(update={"name": "slow", "link_gb_per_s": 0.01, "network_gb_per_s": 0.01})
    arrangement = arranged(1, pp=4, pp_schedule="interleaved_1f1b")
    time = predict_step_time(run, arrangement, slow)
    traffic = traffic_of_work(run, arrangement, rank_at(run, arrangement, 1))
    sent = sum(seconds(each, slow) * each.count for each in traffic)
    assert 0.9 * sent < time.pp <= sent


def test_8_bits_halve_the_time_of_blocks_products() -> None:
    """But not that of the head, of attention and of experts."""
    for model, linear in ((LLAMA, 1.0), (MOE, 0.0)):
        wide, narrow = run_of(model), run_of(model, "fp8")
        arrangement = arranged(1)
        of_wide, of_narrow = (
            work_of_rank(run, arrangement, rank_at(run, arrangement, 0)).total for run in (wide, narrow)
        )
        assert of_narrow.flops == of_wide.flops and of_wide.eight_bits == 0
        assert of_narrow.moved > of_wide.moved
        head = 3 * 2 * 256 * 128 * 2048
        if linear:
            assert of_narrow.matmul - of_narrow.eight_bits == head
        faster = (
            predict_step_time(wide, arrangement, GPU).compute
            / predict_step_time(narrow, arrangement, GPU).compute
        )
        assert 1 < faster < 2
